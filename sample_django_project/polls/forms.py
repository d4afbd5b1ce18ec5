"""The ballot."""

from typing import Any

from django import forms

from polls.models import Choice, Question


class BallotForm(forms.Form):
    """One choice of one question."""

    choice = forms.ModelChoiceField(
        queryset=Choice.objects.none(),
        widget=forms.RadioSelect,
        empty_label=None,
        error_messages={
            "required": "Pick one of the answers first.",
            "invalid_choice": "That is not one of the answers. Pick one of these.",
        },
    )

    def __init__(self, question: Question, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.fields["choice"].queryset = question.choices.all()
