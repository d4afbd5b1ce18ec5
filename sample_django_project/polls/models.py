"""Questions, their choices, and who voted."""

from __future__ import annotations

from typing import Any

from django.db import IntegrityError, models, transaction
from django.db.models import F
from django.urls import reverse
from django.utils import timezone


class Topic(models.TextChoices):
    """What a question is about."""

    FOOD = "food", "Food & drink"
    CODE = "code", "Code & tools"
    WORK = "work", "Working life"
    PLACES = "places", "Places"
    NATURE = "nature", "Out of doors"
    CULTURE = "culture", "Books & screens"
    SCIENCE = "science", "Science"
    PLAY = "play", "Games & play"


class QuestionQuerySet(models.QuerySet):
    """Questions, with the filters that views ask for."""

    def published(self) -> QuestionQuerySet:
        """Those that visitors may see."""
        return self.filter(pub_date__lte=timezone.now())

    def open(self) -> QuestionQuerySet:
        """Those that take votes now."""
        now = timezone.now()
        return self.filter(models.Q(closes_at=None) | models.Q(closes_at__gt=now), pub_date__lte=now)


class Question(models.Model):
    """A question that visitors vote on."""

    text = models.CharField("question", max_length=200, unique=True)
    detail = models.CharField(
        max_length=300, blank=True, help_text="A sentence of context, shown below the question."
    )
    topic = models.CharField(max_length=16, choices=Topic.choices)
    pub_date = models.DateTimeField(
        "published", default=timezone.now, help_text="A date to come keeps the question hidden until then."
    )
    closes_at = models.DateTimeField(
        "closes", null=True, blank=True, help_text="Leave empty to take votes for ever."
    )

    objects = QuestionQuerySet.as_manager()

    class Meta:
        ordering = ["-pub_date", "-pk"]
        indexes = [
            models.Index(fields=["-pub_date", "-id"], name="polls_newest"),
            models.Index(fields=["topic", "-pub_date", "-id"], name="polls_newest_by_topic"),
        ]
        constraints = [
            models.CheckConstraint(
                condition=models.Q(closes_at=None) | models.Q(closes_at__gt=F("pub_date")),
                name="polls_closes_after_published",
                violation_error_message="A question must close after it is published.",
            ),
        ]

    def __str__(self) -> str:
        return self.text

    def get_absolute_url(self) -> str:
        """The page to vote on this question."""
        return reverse("polls:detail", args=[self.pk])

    @property
    def is_open(self) -> bool:
        """Whether it takes votes now."""
        return self.closes_at is None or self.closes_at > timezone.now()

    def tally(self) -> dict[str, Any]:
        """The result so far: the total, and the choices with the most votes first.

        Reads ``self.choices.all()``, so prefetch them when there are many questions.
        """
        choices = sorted(self.choices.all(), key=lambda choice: (-choice.votes, choice.pk))
        total = sum(choice.votes for choice in choices)
        most = choices[0].votes if choices else 0
        return {
            "total": total,
            "choices": [
                {
                    "id": choice.pk,
                    "text": choice.text,
                    "votes": choice.votes,
                    "percent": 100 * choice.votes / total if total else 0.0,
                    "leads": 0 < most == choice.votes,
                }
                for choice in choices
            ],
        }


class Choice(models.Model):
    """One of the answers to a question."""

    question = models.ForeignKey(Question, on_delete=models.CASCADE, related_name="choices")
    text = models.CharField("choice", max_length=100)
    votes = models.PositiveIntegerField(default=0, editable=False)

    class Meta:
        ordering = ["pk"]
        constraints = [
            models.UniqueConstraint(fields=["question", "text"], name="polls_choices_differ"),
        ]

    def __str__(self) -> str:
        return self.text


class AlreadyVoted(Exception):
    """This voter has answered this question before."""


class VoteManager(models.Manager):
    """Votes are made with `cast`, which keeps the count right."""

    def cast(self, choice: Choice, voter: str) -> Vote:
        """Record one vote and count it, both or neither.

        The database decides whether it is the voter's first, so that two requests at the same moment cannot
        both be; and it adds to the count itself, so that no vote is lost.

        Raises:
            AlreadyVoted: the voter has answered this question before.
            Choice.DoesNotExist: the choice was deleted in the meantime.
        """
        try:
            with transaction.atomic(using=self.db):
                vote = self.create(question_id=choice.question_id, choice=choice, voter=voter)
                counted = Choice.objects.using(self.db).filter(pk=choice.pk).update(votes=F("votes") + 1)
                if not counted:
                    raise Choice.DoesNotExist(f"choice {choice.pk} was deleted")
        except IntegrityError as error:
            raise AlreadyVoted(f"this voter has answered question {choice.question_id} before") from error
        return vote


class Vote(models.Model):
    """That a visitor has voted; the counts are in `Choice.votes`."""

    question = models.ForeignKey(Question, on_delete=models.CASCADE, related_name="ballots")
    choice = models.ForeignKey(Choice, on_delete=models.CASCADE, related_name="ballots")
    voter = models.CharField(max_length=32, help_text="A random name kept in the visitor's session.")
    created = models.DateTimeField(auto_now_add=True)

    objects = VoteManager()

    class Meta:
        ordering = ["-created"]
        constraints = [
            # In this order, so that its index also finds all votes of a voter.
            models.UniqueConstraint(fields=["voter", "question"], name="polls_one_vote_each"),
        ]

    def __str__(self) -> str:
        return f"{self.choice} ({self.created:%Y-%m-%d %H:%M})"
