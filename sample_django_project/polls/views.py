"""The pages of the polls."""

import secrets

from django.contrib import messages
from django.http import Http404, HttpRequest, JsonResponse
from django.shortcuts import get_object_or_404, redirect, render
from django.views.decorators.cache import cache_control, never_cache
from django.views.decorators.http import require_http_methods, require_safe

from polls import listing
from polls.forms import BallotForm
from polls.models import AlreadyVoted, Choice, Question, Topic, Vote

VOTER = "voter"


@require_safe
def index(request, topic=""):
    """The newest questions, of all topics or of one."""
    if topic and topic not in Topic.values:
        raise Http404(f"there is no topic {topic!r}")
    page, from_cache = listing.page(topic, request.GET.get("page", "1"))
    voted = _voted(request, [question["id"] for question in page["questions"]])
    context = {
        "page": page,
        "topic": topic,
        "topic_label": Topic(topic).label if topic else "",
        "voted": voted,
        # The template keeps what it made of this page, for each set of questions that visitors have answered.
        "voted_key": ",".join(map(str, sorted(voted))),
        "page_seconds": listing.PAGE_SECONDS,
        "featured": page["number"] == 1 and not topic,
        "list_from_cache": from_cache,
    }
    return render(request, "polls/index.html", context)


@never_cache
@require_http_methods(["GET", "HEAD", "POST"])
def detail(request, pk):
    """The ballot of a question, and the place to hand it in."""
    question = _published_or_404(pk)
    if not question.is_open:
        if request.method == "POST":
            messages.error(request, "This poll has closed: your vote came too late.")
        return redirect("polls:results", pk)
    if _voted(request, [pk]):
        if request.method == "POST":
            messages.info(request, "You have voted on this one before; a vote counts once.")
        return redirect("polls:results", pk)

    if request.method != "POST":
        return render(request, "polls/detail.html", {"question": question, "form": BallotForm(question)})
    form = BallotForm(question, request.POST)
    if not form.is_valid():
        return render(request, "polls/detail.html", {"question": question, "form": form})
    choice = form.cleaned_data["choice"]
    try:
        Vote.objects.cast(choice, _voter(request))
    except AlreadyVoted:
        messages.info(request, "You have voted on this one before; a vote counts once.")
    except Choice.DoesNotExist:
        messages.error(request, "That answer has just been removed. Pick another one.")
        return redirect("polls:detail", pk)
    else:
        messages.success(request, f"Counted: “{choice.text}”. Thank you!")
    return redirect("polls:results", pk)


@never_cache
@require_safe
def results(request, pk):
    """The votes so far."""
    question = _published_or_404(pk)
    voted = _voted(request, [pk])
    context = {
        "question": question,
        "tally": question.tally(),
        "voted_choice": voted.get(pk),
        "next_question": _next_question(request, pk),
    }
    return render(request, "polls/results.html", context)


@cache_control(no_cache=True)  # ask every time, and answer 304 while nobody votes
@require_safe
def live_results(request, pk):
    """The votes so far as JSON, for a results page that stays open."""
    return JsonResponse(_published_or_404(pk).tally())


def _published_or_404(pk: int) -> Question:
    return get_object_or_404(Question.objects.published(), pk=pk)


def _voter(request: HttpRequest) -> str:
    """The random name under which this visitor votes."""
    return request.session.setdefault(VOTER, secrets.token_urlsafe(16))


def _voted(request: HttpRequest, questions: list[int]) -> dict[int, int]:
    """Which of the questions this visitor has answered, with the choice; no query for a new visitor."""
    voter = request.session.get(VOTER)
    if not voter:
        return {}
    return dict(Vote.objects.filter(voter=voter, question__in=questions).values_list("question_id", "choice_id"))


def _next_question(request: HttpRequest, pk: int) -> Question | None:
    """The newest open question that this visitor has not answered."""
    questions = Question.objects.open().exclude(pk=pk)
    if voter := request.session.get(VOTER):
        questions = questions.exclude(ballots__voter=voter)
    return questions.first()
