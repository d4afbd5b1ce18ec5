"""The front page's lists, kept in the cache until somebody votes.

Each list is stored under a key that contains the current version; `invalidate` makes a new version.  A request
that was already reading old rows when a vote came in stores its list under the old version, where nobody looks
again, so a stale list cannot outlive the vote.
"""

from __future__ import annotations

import secrets
from typing import Any

from django.core.cache import cache
from django.core.paginator import Paginator
from django.db.models import Count, Sum
from django.db.models.functions import Coalesce

from polls.models import Question, Topic

PER_PAGE = 12

VERSION_KEY = "polls:version"
VERSION_SECONDS = 24 * 60 * 60
# Not for ever: questions are also published and closed by the clock, which invalidates nothing.
PAGE_SECONDS = 60


def invalidate() -> None:
    """Let every list be made anew."""
    cache.set(VERSION_KEY, secrets.token_hex(8), VERSION_SECONDS)


def page(topic: str, number: str) -> tuple[dict[str, Any], bool]:
    """One page of questions, newest first.

    Args:
        topic: a value of `polls.models.Topic`, or ``""`` for all.
        number: the number of the page as the visitor gave it; anything odd gives the nearest page there is.

    Returns:
        The page, as plain values that any cache can hold, and whether it came from the cache.  Its ``key``
        is another one as soon as somebody votes or edits.
    """
    version = cache.get_or_set(VERSION_KEY, lambda: secrets.token_hex(8), VERSION_SECONDS)
    # The number goes into a key, so it must not be whatever somebody typed.
    number = number if number.isascii() and number.isdigit() and len(number) < 5 else "1"
    key = f"polls:page:{version}:{topic}:{int(number)}"
    found = cache.get(key)
    if found is not None:
        return found, True
    made = {"key": key, **_make(topic, int(number))}
    cache.set(key, made, PAGE_SECONDS)
    return made, False


def _make(topic: str, number: int) -> dict[str, Any]:
    """Three queries, however many questions there are."""
    published = Question.objects.published()
    by_topic = {
        row["topic"]: row
        for row in published.order_by()
        .values("topic")
        .annotate(questions=Count("pk", distinct=True), votes=Coalesce(Sum("choices__votes"), 0))
    }
    counts = {name: row["questions"] for name, row in by_topic.items()}
    chosen = [row for name, row in by_topic.items() if topic in ("", name)]
    total = sum(row["questions"] for row in chosen)

    questions = published.filter(topic=topic) if topic else published
    paginator = Paginator(questions.prefetch_related("choices"), PER_PAGE)
    # The paginator would count again what is known.
    paginator.count = total
    current = paginator.get_page(number)
    return {
        "questions": [_summary(question) for question in current],
        "number": current.number,
        "pages": paginator.num_pages,
        "topics": [
            {"value": value, "label": label, "questions": counts[value]}
            for value, label in Topic.choices
            if value in counts
        ],
        "total_questions": total,
        "total_votes": sum(row["votes"] for row in chosen),
    }


def _summary(question: Question) -> dict[str, Any]:
    return {
        "id": question.pk,
        "text": question.text,
        "detail": question.detail,
        "topic": question.topic,
        "topic_label": question.get_topic_display(),
        "pub_date": question.pub_date,
        "closes_at": question.closes_at,
        "is_open": question.is_open,
        **question.tally(),
    }
