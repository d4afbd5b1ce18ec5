"""The polls in the admin."""

from django.contrib import admin
from django.db.models import Sum
from django.db.models.functions import Coalesce

from polls.models import Choice, Question


class ChoiceInline(admin.TabularInline):
    """The choices of a question, at least two of them."""

    model = Choice
    fields = ["text", "votes"]
    readonly_fields = ["votes"]
    extra = 0
    min_num = 2

    def get_formset(self, request, obj=None, **kwargs):
        """A formset that refuses fewer than two choices."""
        return super().get_formset(request, obj, validate_min=True, **kwargs)


@admin.register(Question)
class QuestionAdmin(admin.ModelAdmin):
    """Questions with their choices and results."""

    list_display = ["text", "topic", "pub_date", "total_votes", "takes_votes"]
    list_filter = ["topic", "pub_date", "closes_at"]
    search_fields = ["text", "choices__text"]
    date_hierarchy = "pub_date"
    inlines = [ChoiceInline]
    fieldsets = [
        (None, {"fields": ["text", "detail", "topic"]}),
        ("When", {"fields": ["pub_date", "closes_at"]}),
    ]

    def get_queryset(self, request):
        """The questions with their number of votes."""
        votes = Coalesce(Sum("choices__votes"), 0)
        return super().get_queryset(request).annotate(votes=votes)

    @admin.display(description="votes", ordering="votes")
    def total_votes(self, question: Question) -> int:
        """The votes for all choices."""
        return question.votes

    @admin.display(description="open", boolean=True)
    def takes_votes(self, question: Question) -> bool:
        """Whether one can vote now."""
        return question.is_open
