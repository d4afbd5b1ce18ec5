"""The cached lists follow what is voted and what is changed in the admin."""

from typing import Any

from django.db import transaction
from django.db.models.signals import post_delete, post_save
from django.dispatch import receiver

from polls import listing
from polls.models import Choice, Question, Vote


@receiver([post_save, post_delete], sender=Question)
@receiver([post_save, post_delete], sender=Choice)
@receiver(post_save, sender=Vote)
def lists_changed(using: str, **kwargs: Any) -> None:
    """Make the lists anew once the change can be seen."""
    transaction.on_commit(listing.invalidate, using=using)
