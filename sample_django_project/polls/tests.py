"""Tests of the sample project: ``python manage.py test`` in this folder."""

from __future__ import annotations

import hashlib
import secrets
import threading
from datetime import timedelta
from io import StringIO
from unittest import mock

from django.conf import settings
from django.contrib.auth import get_user_model
from django.core.cache import cache
from django.core.exceptions import ValidationError
from django.core.management import CommandError, call_command
from django.db import connection
from django.templatetags.static import static
from django.test import Client, SimpleTestCase, TestCase, TransactionTestCase, override_settings
from django.test.utils import CaptureQueriesContext
from django.urls import reverse
from django.utils import timezone

from bench.views import MAX_STREAM_MB
from polls import listing
from polls.catalogue import POLLS, catalogue
from polls.models import AlreadyVoted, Choice, Question, Topic, Vote
from polls.templatetags.polls_time import ago, ahead

ANSWERS = ("Yes", "No", "Perhaps")


def ask(text: str = "Is it raining?", answers: tuple[str, ...] = ANSWERS, **fields) -> Question:
    """A published question with choices."""
    fields.setdefault("topic", Topic.NATURE)
    question = Question.objects.create(text=text, **fields)
    for answer in answers:
        question.choices.create(text=answer)
    return question


def hours(number: float) -> timedelta:
    """So many hours."""
    return timedelta(hours=number)


class OwnCacheMixin:
    """Gives each test a part of the cache to itself, and leaves what else is in there alone."""

    def setUp(self):
        super().setUp()
        own = {**settings.CACHES["default"], "KEY_PREFIX": f"test-{secrets.token_hex(4)}"}
        with_own_cache = self.settings(CACHES={"default": own})
        with_own_cache.enable()
        self.addCleanup(with_own_cache.disable)


class PollsTestCase(OwnCacheMixin, TestCase):
    """A test case with a cache of its own, whose votes invalidate it as they do outside a test."""

    def vote(self, question: Question, answer: str = "Yes", client: Client | None = None):
        """Vote as a visitor does and follow to the page that comes next."""
        with self.captureOnCommitCallbacks(execute=True):
            return (client or self.client).post(
                question.get_absolute_url(), {"choice": question.choices.get(text=answer).pk}, follow=True
            )

    def votes(self, question: Question) -> dict[str, int]:
        """The counts by answer."""
        return dict(question.choices.values_list("text", "votes"))


class TallyTests(PollsTestCase):
    def test_orders_by_votes_and_gives_percentages(self):
        question = ask()
        question.choices.filter(text="No").update(votes=3)
        question.choices.filter(text="Perhaps").update(votes=1)
        tally = question.tally()
        self.assertEqual(tally["total"], 4)
        self.assertEqual(
            [(choice["text"], choice["percent"], choice["leads"]) for choice in tally["choices"]],
            [("No", 75.0, True), ("Perhaps", 25.0, False), ("Yes", 0.0, False)],
        )

    def test_nobody_leads_without_votes(self):
        tally = ask().tally()
        self.assertEqual(tally["total"], 0)
        self.assertEqual({choice["percent"] for choice in tally["choices"]}, {0.0})
        self.assertFalse(any(choice["leads"] for choice in tally["choices"]))


class VoteTests(PollsTestCase):
    def test_a_vote_is_recorded_and_counted(self):
        choice = ask().choices.get(text="No")
        vote = Vote.objects.cast(choice, "ada")
        choice.refresh_from_db()
        self.assertEqual((vote.choice, vote.question, choice.votes), (choice, choice.question, 1))

    def test_a_second_vote_is_refused_and_changes_nothing(self):
        question = ask()
        Vote.objects.cast(question.choices.get(text="No"), "ada")
        with self.assertRaises(AlreadyVoted):
            Vote.objects.cast(question.choices.get(text="Yes"), "ada")
        self.assertEqual(self.votes(question), {"Yes": 0, "No": 1, "Perhaps": 0})

    def test_the_same_voter_may_answer_another_question(self):
        for text in ("Is it raining?", "Is it Tuesday?"):
            Vote.objects.cast(ask(text).choices.get(text="No"), "ada")
        self.assertEqual(Vote.objects.filter(voter="ada").count(), 2)

    def test_a_choice_deleted_in_the_meantime_leaves_no_vote(self):
        choice = ask().choices.get(text="No")
        Choice.objects.filter(pk=choice.pk).delete()
        with self.assertRaises(Choice.DoesNotExist):
            Vote.objects.cast(choice, "ada")
        self.assertFalse(Vote.objects.exists())

    def test_a_question_must_close_after_it_is_published(self):
        now = timezone.now()
        question = Question(text="Too late?", topic=Topic.PLAY, pub_date=now, closes_at=now - hours(1))
        with self.assertRaisesMessage(ValidationError, "must close after it is published"):
            question.full_clean()


class ConcurrentVoteTests(OwnCacheMixin, TransactionTestCase):
    """Many votes at the same moment, each on a connection of its own."""

    VOTERS = 40

    def all_at_once(self, votes: list[tuple[Choice, str]]) -> list[str]:
        """Cast the votes from one thread each; what became of them, sorted."""
        outcomes = []
        start = threading.Barrier(len(votes))

        def cast(choice, voter):
            start.wait(timeout=30)
            try:
                Vote.objects.cast(choice, voter)
                outcome = "counted"
            except AlreadyVoted:
                outcome = "refused"
            finally:
                connection.close()
            outcomes.append(outcome)

        threads = [threading.Thread(target=cast, args=vote, daemon=True) for vote in votes]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(timeout=60)
        self.assertEqual(len(outcomes), len(votes), "a thread failed or did not finish")
        return sorted(outcomes)

    def test_no_vote_is_lost(self):
        yes, no, perhaps = ask().choices.all()
        votes = [((yes, yes, no)[number % 3], f"voter {number}") for number in range(self.VOTERS)]
        self.assertEqual(self.all_at_once(votes), ["counted"] * self.VOTERS)
        expected = {choice: sum(voted == choice for voted, _ in votes) for choice in (yes, no, perhaps)}
        self.assertEqual({choice: choice.votes for choice in Choice.objects.all()}, expected)
        self.assertEqual(Vote.objects.count(), self.VOTERS)

    def test_one_voter_counts_once(self):
        yes, no, _ = question_choices = list(ask().choices.all())
        votes = [((yes, no)[number % 2], "ada") for number in range(self.VOTERS)]
        self.assertEqual(self.all_at_once(votes), ["counted"] + ["refused"] * (self.VOTERS - 1))
        counts = Choice.objects.filter(pk__in=[choice.pk for choice in question_choices])
        self.assertEqual(sum(choice.votes for choice in counts), 1)
        self.assertEqual(Vote.objects.count(), 1)


class IndexTests(PollsTestCase):
    def get(self, path: str = "/", **query):
        """The front page, or another."""
        return self.client.get(path, query)

    def test_shows_questions_newest_first_with_their_results(self):
        now = timezone.now()
        older = ask("Older?", pub_date=now - hours(2))
        ask("Newer?", pub_date=now - hours(1))
        older.choices.filter(text="No").update(votes=1234)
        response = self.get()
        self.assertContains(response, "1,234 votes")
        self.assertContains(response, "100</span>%")
        self.assertLess(response.content.index(b"Newer?"), response.content.index(b"Older?"))

    def test_a_question_without_votes_invites_the_first(self):
        ask()
        self.assertContains(self.get(), "No votes yet. Be the first.")

    def test_without_questions_says_what_to_do(self):
        self.assertContains(self.get(), "manage.py seed")
        self.assertContains(self.get("/topics/code/"), "Nobody has asked about code &amp; tools.")

    def test_hides_what_is_not_published_yet(self):
        ask("Tomorrow?", pub_date=timezone.now() + hours(24))
        self.assertNotContains(self.get(), "Tomorrow?")

    def test_shows_one_topic(self):
        for topic in (Topic.CODE, Topic.FOOD, Topic.FOOD):
            self.vote(ask(f"About {topic} {secrets.token_hex(4)}?", topic=topic))
        response = self.get(reverse("polls:topic", args=["food"]))
        self.assertContains(response, "About food", count=2)
        self.assertNotContains(response, "About code")
        self.assertContains(response, "<strong>2</strong> votes on")
        self.assertContains(self.get(), "<strong>3</strong> votes on")

    def test_an_unknown_topic_is_not_found(self):
        response = self.get("/topics/nonsense/")
        self.assertContains(response, "Nobody raised a hand here", status_code=404)

    def test_pages(self):
        now = timezone.now()
        for number in range(listing.PER_PAGE + 1):
            ask(f"Question {number:02}?", pub_date=now - hours(number))
        first, second = self.get(), self.get(page=2)
        self.assertContains(first, "Page 1 of 2")
        self.assertNotContains(first, "Question 12?")
        self.assertContains(second, "Question 12?")
        self.assertContains(self.get(page=9), "Question 12?")
        for odd in ("0", "-1", "x", "", "9" * 50, "²"):
            with self.subTest(page=odd):
                self.assertEqual(self.get(page=odd).status_code, 200)

    def test_marks_what_the_visitor_voted_on(self):
        question = ask()
        self.assertNotContains(self.get(), "You voted")
        self.vote(question)
        for _ in range(2):  # made, then from the cache
            self.assertContains(self.get(), "You voted", count=1)
            self.assertNotContains(Client().get("/"), "You voted")

    def test_takes_as_many_queries_for_many_questions_as_for_one(self):
        ask("The first?")
        with CaptureQueriesContext(connection) as for_one:
            self.get()
        for number in range(listing.PER_PAGE + 5):
            ask(f"Question {number}?")
        listing.invalidate()
        with CaptureQueriesContext(connection) as for_many:
            self.get()
        self.assertEqual((len(for_one), len(for_many)), (3, 3))

    def test_comes_from_the_cache_without_a_query(self):
        ask()
        self.get()
        with self.assertNumQueries(0):
            self.assertContains(self.get(), "Is it raining?")

    def test_a_voter_costs_one_query_more(self):
        self.vote(ask())
        self.get()
        with self.assertNumQueries(1):
            self.get()

    def test_a_vote_shows_at_once(self):
        question = ask()
        self.assertContains(self.get(), "0 votes")
        self.vote(question)
        self.assertContains(self.get(), "1 vote<")

    def test_an_edit_shows_at_once(self):
        question = ask()
        self.get()
        with self.captureOnCommitCallbacks(execute=True):
            question.text = "Is it snowing?"
            question.save()
        self.assertContains(self.get(), "Is it snowing?")
        with self.captureOnCommitCallbacks(execute=True):
            question.delete()
        self.assertNotContains(self.get(), "Is it snowing?")

    def test_a_list_read_before_a_vote_is_not_shown_after_it(self):
        question = ask()
        make = listing._make

        def make_while_somebody_votes(*args):
            made = make(*args)
            self.vote(question, client=Client())
            return made

        with mock.patch.object(listing, "_make", make_while_somebody_votes):
            self.assertContains(self.get(), "0 votes")
        self.assertContains(self.get(), "1 vote<")


class DetailTests(PollsTestCase):
    def test_offers_the_choices(self):
        response = self.client.get(ask(detail="Look out of the window.").get_absolute_url())
        self.assertContains(response, 'type="radio"', count=3)
        self.assertContains(response, "Look out of the window.")

    def test_a_vote_is_counted_and_confirmed(self):
        question = ask()
        response = self.vote(question, "No")
        self.assertRedirects(response, reverse("polls:results", args=[question.pk]))
        self.assertContains(response, "Counted: “No”.")
        self.assertContains(response, "your vote", count=1)
        self.assertEqual(self.votes(question), {"Yes": 0, "No": 1, "Perhaps": 0})

    def test_a_visitor_votes_once(self):
        question = ask()
        self.vote(question, "No")
        response = self.vote(question, "Yes")
        self.assertContains(response, "a vote counts once")
        self.assertEqual(self.votes(question), {"Yes": 0, "No": 1, "Perhaps": 0})

    def test_the_loser_of_a_race_is_told_so(self):
        question = ask()
        with mock.patch("polls.views._voted", return_value={}):
            self.vote(question, "No")
            response = self.vote(question, "Yes")
        self.assertContains(response, "a vote counts once")
        self.assertEqual(self.votes(question), {"Yes": 0, "No": 1, "Perhaps": 0})

    def test_visitors_vote_independently(self):
        question = ask()
        for answer in ("No", "No", "Yes"):
            self.vote(question, answer, Client())
        self.assertEqual(self.votes(question), {"Yes": 1, "No": 2, "Perhaps": 0})

    def test_who_has_voted_is_shown_the_results(self):
        question = ask()
        self.vote(question)
        response = self.client.get(question.get_absolute_url())
        self.assertRedirects(response, reverse("polls:results", args=[question.pk]))

    def test_asks_for_a_choice(self):
        question = ask()
        response = self.client.post(question.get_absolute_url(), {})
        self.assertContains(response, "Pick one of the answers first.")
        self.assertFalse(Vote.objects.exists())

    def test_refuses_a_choice_of_another_question(self):
        other = ask("Is it Tuesday?").choices.first()
        for choice in (other.pk, "nonsense", 2**70):
            with self.subTest(choice=choice):
                response = self.client.post(ask(f"{choice}?").get_absolute_url(), {"choice": choice})
                self.assertContains(response, "not one of the answers")
        self.assertFalse(Vote.objects.exists())

    def test_a_choice_removed_while_it_is_voted_for(self):
        question = ask()
        removed = mock.patch.object(Vote.objects, "cast", side_effect=Choice.DoesNotExist)
        with removed:
            response = self.vote(question)
        self.assertRedirects(response, question.get_absolute_url())
        self.assertContains(response, "has just been removed")

    def test_a_closed_question_takes_no_votes(self):
        now = timezone.now()
        question = ask(pub_date=now - hours(2), closes_at=now - hours(1))
        response = self.vote(question)
        self.assertContains(response, "your vote came too late")
        self.assertNotContains(response, "Vote on this")
        self.assertFalse(Vote.objects.exists())

    def test_what_is_not_there_is_not_found(self):
        hidden = ask(pub_date=timezone.now() + hours(1))
        for name in ("polls:detail", "polls:results", "polls:live"):
            for pk in (hidden.pk, 0):
                with self.subTest(name=name, pk=pk):
                    self.assertEqual(self.client.get(reverse(name, args=[pk])).status_code, 404)

    def test_is_safe_from_other_sites(self):
        question = ask()
        response = Client(enforce_csrf_checks=True).post(
            question.get_absolute_url(), {"choice": question.choices.first().pk}
        )
        self.assertEqual(response.status_code, 403)
        self.assertFalse(Vote.objects.exists())

    def test_escapes_what_people_write(self):
        question = ask("<b>Bold</b>?", ("<script>", "&"))
        for path in ("/", question.get_absolute_url(), reverse("polls:results", args=[question.pk])):
            with self.subTest(path=path):
                response = self.client.get(path)
                self.assertContains(response, "&lt;b&gt;Bold&lt;/b&gt;?")
                self.assertNotContains(response, "<b>Bold")
                self.assertNotContains(response, "<script>")


class ResultsTests(PollsTestCase):
    def results(self, question: Question):
        """The results page."""
        return self.client.get(reverse("polls:results", args=[question.pk]))

    def test_invites_to_vote(self):
        self.assertContains(self.results(ask()), "Vote on this")

    def test_goes_on_to_the_newest_open_question_not_answered(self):
        now = timezone.now()
        third = ask("Third?", pub_date=now - hours(3))
        second = ask("Second?", pub_date=now - hours(2))
        ask("Closed?", pub_date=now - hours(1), closes_at=now - hours(0.5))
        first = ask("First?", pub_date=now - hours(1))
        self.assertEqual(self.results(third).context["next_question"], first)
        self.vote(first)
        self.assertEqual(self.results(first).context["next_question"], second)
        self.vote(second)
        self.vote(third)
        self.assertContains(self.results(third), "you have answered everything")

    def test_live_results_follow_the_votes(self):
        question = ask()
        url = reverse("polls:live", args=[question.pk])
        self.assertEqual(self.client.get(url).json()["total"], 0)
        self.vote(question, "No")
        tally = self.client.get(url).json()
        self.assertEqual((tally["total"], tally["choices"][0]["text"]), (1, "No"))

    def test_live_results_that_did_not_change_are_not_sent_again(self):
        url = reverse("polls:live", args=[ask().pk])
        etag = self.client.get(url).headers["ETag"]
        self.assertEqual(self.client.get(url, headers={"If-None-Match": etag}).status_code, 304)

    def test_the_number_of_queries_does_not_grow_with_the_choices(self):
        for number in (2, 30):
            question = ask(f"{number}?", tuple(f"Answer {n}" for n in range(number)))
            with self.subTest(choices=number), self.assertNumQueries(3):
                self.results(question)


class ServedByTests(PollsTestCase):
    def test_every_page_tells_how_it_was_served(self):
        stats = {"pool_size": 3, "pool_available": 1, "pool_max": 8, "requests_waiting": 2, "requests_num": 71}
        pools = {"postgres://somewhere/db": stats, "redis://somewhere/0": {**stats, "requests_waiting": 0}}
        with mock.patch("puff_patch.stats", return_value=pools):
            response = self.client.get("/")
        self.assertContains(response, "PostgreSQL: 2 of 8 connections in use, 2 waiting")
        self.assertContains(response, "Redis: 2 of 8 connections in use<")

    def test_tells_browsers_where_the_icon_is(self):
        self.assertRedirects(
            self.client.get("/favicon.ico"), static("img/favicon.svg"), fetch_redirect_response=False
        )

    def test_tells_the_queries_in_debug(self):
        ask()
        with self.settings(DEBUG=True):
            self.assertContains(self.client.get("/"), "SQL queries")
            self.assertContains(self.client.get("/"), "list from the cache")


class AdminTests(PollsTestCase):
    def setUp(self):
        super().setUp()
        self.client.force_login(get_user_model().objects.create_superuser("root", password="unused"))

    def form(self, *answers: str) -> dict[str, str]:
        """What the admin sends to add a question."""
        data = {
            "text": "Is it raining?",
            "topic": "nature",
            "pub_date_0": "2020-02-02",
            "pub_date_1": "12:00:00",
            "choices-TOTAL_FORMS": str(max(len(answers), 2)),
            "choices-INITIAL_FORMS": "0",
        }
        data.update({f"choices-{number}-text": answer for number, answer in enumerate(answers)})
        return data

    def test_adds_a_question_with_its_choices(self):
        url = reverse("admin:polls_question_add")
        self.assertContains(self.client.get(url), 'id="id_choices-1-text"')
        self.assertRedirects(
            self.client.post(url, self.form("Yes", "No")), reverse("admin:polls_question_changelist")
        )
        self.assertEqual(self.votes(Question.objects.get()), {"Yes": 0, "No": 0})

    def test_refuses_a_question_with_one_choice(self):
        response = self.client.post(reverse("admin:polls_question_add"), self.form("Yes"))
        self.assertContains(response, "at least 2")
        self.assertFalse(Question.objects.exists())

    def test_refuses_the_same_choice_twice(self):
        response = self.client.post(reverse("admin:polls_question_add"), self.form("Yes", "Yes"))
        self.assertContains(response, "duplicate")

    def test_lists_filters_and_searches(self):
        url = reverse("admin:polls_question_changelist")
        ask("Is it raining?").choices.filter(text="No").update(votes=7)
        ask("Spaces?", topic=Topic.CODE)
        with CaptureQueriesContext(connection) as for_two:
            self.assertContains(self.client.get(url), 'class="field-total_votes">7<')
        for number in range(10):
            ask(f"Question {number}?")
        with self.assertNumQueries(len(for_two)):
            self.client.get(url)
        self.assertContains(self.client.get(url, {"topic__exact": "code"}), "1 question")
        self.assertContains(self.client.get(url, {"q": "raining"}), "1 result")
        self.assertContains(self.client.get(url, {"o": "-4"}), "Is it raining?")

    def test_deletes_a_question_that_was_voted_on(self):
        question = ask()
        self.vote(question)
        self.client.post(reverse("admin:polls_question_delete", args=[question.pk]), {"post": "yes"})
        self.assertFalse(Question.objects.exists())
        self.assertFalse(Vote.objects.exists())


class SeedTests(PollsTestCase):
    def seed(self, *args: str) -> str:
        """Run the command; what it printed."""
        out = StringIO()
        call_command("seed", *args, stdout=out)
        return out.getvalue()

    def test_asks_every_written_question(self):
        self.assertIn(f"{len(POLLS)} polls added", self.seed())
        self.assertEqual(Question.objects.published().count(), len(POLLS))
        self.assertEqual(set(Question.objects.values_list("topic", flat=True)), set(Topic.values))
        self.assertTrue(Question.objects.filter(closes_at__lt=timezone.now()).exists())
        for poll in POLLS:
            tally = Question.objects.get(text=poll.text).tally()
            self.assertEqual({choice["text"] for choice in tally["choices"]}, set(poll.answers))
            self.assertEqual(tally["total"] == 0, poll.fresh, poll.text)
        self.assertEqual(self.client.get("/").status_code, 200)

    def test_again_adds_nothing_and_keeps_the_votes(self):
        self.seed("--questions", "5")
        question = Question.objects.first()
        before = self.votes(question)
        self.vote(question, question.choices.first().text)
        self.assertIn("0 polls added, 5 there", self.seed("--questions=5"))
        self.assertEqual(sum(self.votes(question).values()), sum(before.values()) + 1)
        self.assertIn("2 polls added, 7 there", self.seed("--questions=7"))

    def test_makes_any_number(self):
        self.seed("--questions=200")
        self.assertEqual(Question.objects.count(), 200)
        texts = [poll.text for poll in catalogue()]
        self.assertEqual(len(texts), len(set(texts)))
        for number in ("-1", str(len(texts) + 1)):
            with self.subTest(number=number), self.assertRaisesMessage(CommandError, "takes a number"):
                self.seed(f"--questions={number}")

    def test_takes_a_few_queries_for_any_number(self):
        with self.assertNumQueries(6):  # two of them for the transaction
            self.seed("--questions=100")

    def test_makes_an_admin_only_when_debugging(self):
        users = get_user_model().objects
        with self.assertRaisesMessage(CommandError, "needs DEBUG"):
            self.seed("--admin")
        self.assertFalse(users.exists() or Question.objects.exists())
        with self.settings(DEBUG=True):
            self.assertIn("Superuser 'admin'", self.seed("--admin"))
            self.assertNotIn("Superuser", self.seed("--admin"))
        self.assertTrue(Client().login(username="admin", password="admin"))
        self.assertTrue(users.get().is_superuser)

    def test_without_the_option_makes_no_admin(self):
        with self.settings(DEBUG=True):
            self.seed()
        self.assertFalse(get_user_model().objects.exists())


class BenchTests(PollsTestCase):
    def test_hello_needs_neither_database_nor_cache(self):
        with self.assertNumQueries(0), mock.patch.object(cache, "get") as get:
            self.assertEqual(self.client.get("/hello/").content, b"Hello, world!\n")
        get.assert_not_called()

    def test_mixed_does_one_query_and_one_cache_read(self):
        question = ask()
        url = f"/bench/mixed/?pk={question.pk}"
        self.client.get(url)  # fills the cache
        with self.assertNumQueries(1), mock.patch.object(cache, "get", wraps=cache.get) as get:
            answer = self.client.get(url).json()
        get.assert_called_once()
        self.assertEqual(
            answer, {"id": question.pk, "question": "Is it raining?", "cached": "Hello from the cache"}
        )

    def test_orm_and_cache(self):
        question = ask()
        with self.assertNumQueries(1):
            self.assertContains(self.client.get(f"/bench/orm/?pk={question.pk}"), "Is it raining?")
        with self.assertNumQueries(0):
            self.assertContains(self.client.get("/bench/cache/"), "Hello from the cache")
        self.assertEqual(self.client.get("/bench/orm/?pk=0").status_code, 404)

    def test_sleeps(self):
        with mock.patch("bench.views.time.sleep") as sleep:
            self.assertEqual(self.client.get("/bench/sleep/?ms=1500").content, b"Slept for 1500 ms\n")
        sleep.assert_called_once_with(1.5)

    def test_streams(self):
        response = self.client.get("/bench/stream/?mb=3")
        self.assertTrue(response.streaming)
        self.assertEqual(response.headers["Content-Length"], str(3 * 2**20))
        self.assertEqual(sum(map(len, response.streaming_content)), 3 * 2**20)

    def test_refuses_numbers_out_of_bounds(self):
        for url in (
            f"/bench/stream/?mb={MAX_STREAM_MB + 1}",
            "/bench/stream/?mb=-1",
            "/bench/stream/?mb=x",
            "/bench/sleep/?ms=10001",
            "/bench/sleep/?ms=",
            "/bench/orm/?pk=" + "9" * 30,
            "/bench/mixed/?pk=²",
        ):
            with self.subTest(url=url), self.assertLogs("django.request", "WARNING"):
                self.assertEqual(self.client.get(url).status_code, 400)

    def test_uploads_are_measured_without_a_csrf_token(self):
        body = secrets.token_bytes(200_000)
        client = Client(enforce_csrf_checks=True)
        for method in (client.put, client.post):
            response = method("/bench/upload/", body, content_type="application/octet-stream")
            self.assertEqual(response.json(), {"bytes": len(body), "sha256": hashlib.sha256(body).hexdigest()})
        self.assertEqual(client.put("/bench/upload/file.bin", body).json()["bytes"], len(body))

    @override_settings(DATA_UPLOAD_MAX_MEMORY_SIZE=10)
    def test_uploads_are_not_limited_by_memory(self):
        response = self.client.put("/bench/upload/", b"x" * 1000)
        self.assertEqual(response.json()["bytes"], 1000)


class TimeTests(SimpleTestCase):
    def test_one_unit_is_enough(self):
        now = timezone.now()
        self.assertEqual(ago(now - hours(29)), "1\xa0day ago")
        self.assertEqual(ago(now - timedelta(seconds=20)), "just now")
        self.assertEqual(ahead(now + hours(50)), "in 2\xa0days")
        self.assertEqual(ahead(now + timedelta(seconds=20)), "in a moment")
