"""``manage.py seed``: polls to look at."""

from __future__ import annotations

import argparse
import random
from datetime import timedelta
from typing import Any

from django.conf import settings
from django.contrib.auth import get_user_model
from django.core.management.base import BaseCommand, CommandError
from django.db import transaction
from django.utils import timezone

from polls import listing
from polls.catalogue import POLLS, Poll, catalogue
from polls.models import Choice, Question

ADMIN = "admin"


class Command(BaseCommand):
    """Adds the polls that are missing and touches none that is there, so running it again is safe."""

    help = "Add interesting polls, with votes; those that are there already stay as they are."

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        """``--questions`` and ``--admin``."""
        parser.add_argument(
            "--questions",
            type=int,
            default=len(POLLS),
            metavar="N",
            help="how many polls of the catalogue to have (default: %(default)s)",
        )
        parser.add_argument(
            "--admin",
            action="store_true",
            help=f"also make the superuser {ADMIN} with the password {ADMIN}; only when DEBUG is on",
        )

    def handle(self, *, questions: int, admin: bool, **options: Any) -> None:
        """Seed in one transaction."""
        polls = catalogue()
        if not 0 <= questions <= len(polls):
            raise CommandError(f"--questions takes a number from 0 to {len(polls)}, not {questions}")
        if admin and not settings.DEBUG:
            raise CommandError("--admin makes a user with a well-known password, so it needs DEBUG to be on")
        with transaction.atomic():
            added = self._seed(polls[:questions])
            made_admin = admin and self._make_admin()
        listing.invalidate()

        self.stdout.write(f"{added} polls added, {Question.objects.count()} there now.")
        if made_admin:
            self.stdout.write(f"Superuser {ADMIN!r} with password {ADMIN!r} made.")

    def _seed(self, polls: list[Poll]) -> int:
        there = set(Question.objects.values_list("text", flat=True))
        missing = [(age, poll) for age, poll in enumerate(polls) if poll.text not in there]
        now = timezone.now()
        questions = Question.objects.bulk_create(_question(poll, age, now) for age, poll in missing)
        Choice.objects.bulk_create(
            Choice(question=question, text=text, votes=votes)
            for question, (_, poll) in zip(questions, missing, strict=True)
            for text, votes in _votes(poll).items()
        )
        return len(questions)

    def _make_admin(self) -> bool:
        users = get_user_model().objects
        if users.filter(username=ADMIN).exists():
            return False
        users.create_superuser(ADMIN, password=ADMIN)
        return True


def _question(poll: Poll, age: int, now: Any) -> Question:
    chance = random.Random(poll.text)
    published = now - timedelta(minutes=chance.randint(2, 20), hours=9 * age + chance.uniform(0, 7))
    if poll.fresh:
        published = now - timedelta(hours=9 * age)
    closes = published + timedelta(days=poll.open_days) if poll.open_days else None
    return Question(text=poll.text, detail=poll.detail, topic=poll.topic, pub_date=published, closes_at=closes)


def _votes(poll: Poll) -> dict[str, int]:
    """Votes after the shares that the poll names: different for each poll, the same every time."""
    if poll.fresh:
        return dict.fromkeys(poll.answers, 0)
    chance = random.Random(poll.text)
    crowd = chance.uniform(1, 9)
    # The power makes favourites stand out; the floor is there for answers that nobody is expected to give.
    return {
        text: round((4 + share**1.5) * crowd * chance.uniform(0.8, 1.25)) for text, share in poll.answers.items()
    }
