"""What a project's own tests do.  Run patched, by ``manage.py test``."""
# ruff: noqa: PT027  (run by Django, not by pytest)

import threading
import time
from concurrent.futures import ThreadPoolExecutor
from urllib.error import HTTPError
from urllib.request import urlopen

from django.core.cache import cache
from django.db import (
    DatabaseError,
    InterfaceError,
    OperationalError,
    connection,
    connections,
    transaction,
)
from django.test import LiveServerTestCase, TestCase, TransactionTestCase

import puff_patch
from shop.models import Item, Receipt

BOTH = {"default", "archive"}


class Requests(LiveServerTestCase):
    databases = BOTH

    def fetch(self, path):
        try:
            with urlopen(self.live_server_url + path, timeout=10) as response:
                return response.status
        except HTTPError as error:
            error.close()
            return error.code

    def test_each_request_is_a_transaction(self):
        Item.objects.create(name="pen", stock=100)
        paths = ["/buy/pen/", "/buy/pen/", "/break/pen/"] * 20
        with self.assertLogs("django.request", "ERROR"), ThreadPoolExecutor(20) as pool:
            statuses = list(pool.map(self.fetch, paths))
        assert statuses == [200, 200, 500] * 20
        assert Item.objects.get().stock == 60
        assert Receipt.objects.count() == 40
        assert cache.get("broken") is None

    def test_a_savepoint_is_undone_alone(self):
        cache.delete_many(["inner", "outer"])
        assert self.fetch("/half/cup/") == 200
        assert [item.name for item in Item.objects.all()] == ["cup-outer"]
        assert [cache.get("inner"), cache.get("outer")] == [None, "cup"]

    def test_leases_are_back_after_the_response(self):
        Item.objects.create(name="pen", stock=1)
        connections.close_all()
        assert self.fetch("/buy/pen/") == 200
        deadline = time.monotonic() + 5
        while any(stats["pool_available"] < stats["pool_size"] for stats in puff_patch.stats().values()):
            assert time.monotonic() < deadline, puff_patch.stats()
            time.sleep(0.01)


class Locks(TransactionTestCase):
    databases = BOTH

    def setUp(self):
        Item.objects.create(name="pen", stock=3)

    def in_thread(self, function):
        """Its result, from a thread with a connection of its own."""

        def run():
            try:
                with transaction.atomic():
                    return function()
            finally:
                connection.close()

        return self.pool.submit(run)

    def test_select_for_update(self):
        with ThreadPoolExecutor(1) as self.pool:
            with transaction.atomic():
                Item.objects.select_for_update().get()
                with self.assertRaises(OperationalError):
                    self.in_thread(lambda: Item.objects.select_for_update(nowait=True).get()).result(10)
                skipped = self.in_thread(lambda: list(Item.objects.select_for_update(skip_locked=True)))
                assert skipped.result(10) == []
                waiting = self.in_thread(lambda: Item.objects.select_for_update().get().stock)
                time.sleep(0.1)
                assert not waiting.done()
                Item.objects.update(stock=2)
            assert waiting.result(10) == 2

    def test_iterators_of_several_threads_are_read_in_turns(self):
        """Server-side cursors, within a transaction and, holdable, without."""
        Item.objects.bulk_create(Item(name=f"n{n}") for n in range(500))
        turn = threading.Barrier(4)

        def read():
            found = 0
            for _ in Item.objects.filter(name__startswith="n").iterator(chunk_size=100):
                if found % 100 == 0:
                    turn.wait(10)
                found += 1
            return found

        def read_without_a_transaction():
            try:
                return read()
            finally:
                connection.close()

        with ThreadPoolExecutor(4) as self.pool:
            results = [self.in_thread(read) for _ in range(2)]
            results += [self.pool.submit(read_without_a_transaction) for _ in range(2)]
            assert [result.result(20) for result in results] == [500] * 4

    def test_the_databases_have_transactions_of_their_own(self):
        with self.assertRaises(LookupError), transaction.atomic():
            Item.objects.create(name="lost")
            with transaction.atomic(using="archive"):
                Receipt.objects.create(item="kept")
            raise LookupError
        assert [item.name for item in Item.objects.all()] == ["pen"]
        assert [receipt.item for receipt in Receipt.objects.all()] == ["kept"]

    def test_broken_transactions_and_closed_connections(self):
        with transaction.atomic():
            with self.assertRaises(DatabaseError), transaction.atomic():
                connection.cursor().execute("SELECT nonsense")
            assert Item.objects.count() == 1
        # psycopg2 raises the one for a closed connection, psycopg 3 the other.
        with self.assertRaises((InterfaceError, OperationalError)), transaction.atomic():
            connection.close()
            Item.objects.count()
        with self.assertRaises(RuntimeError), transaction.atomic(), transaction.atomic(durable=True):
            pass
        assert Item.objects.count() == 1


class Isolated(TestCase):
    databases = BOTH

    @classmethod
    def setUpTestData(cls):
        cls.item = Item.objects.create(name="pen", stock=3)
        Receipt.objects.create(item="pen")

    def test_one(self):
        Item.objects.update(stock=1)
        Receipt.objects.create(item="one")
        assert Receipt.objects.count() == 2

    def test_two(self):
        self.item.refresh_from_db()
        assert self.item.stock == 3
        assert Receipt.objects.count() == 1

    def test_on_commit(self):
        with self.captureOnCommitCallbacks(execute=True) as callbacks:
            assert self.client.get("/buy/pen/").status_code == 200
        assert len(callbacks) == 1
        assert Receipt.objects.count() == 2
