"""Raw forks, native threads and subprocesses."""

from __future__ import annotations

from processes.conftest import Program


def test_forks_amid_queries_share_nothing_and_end_cleanly(program: Program) -> None:
    """Once from a greenlet while others are mid-query, and twice as a daemon does."""
    told = program("""
        import os, pickle, sys
        import gevent
        import psycopg2
        from worker import backend, share_nothing, use

        def child_use(write):
            with os.fdopen(write, "wb") as pipe:
                pipe.write(pickle.dumps(use()))

        def fork_and_use(double):
            read, write = os.pipe()
            pid = os.fork()
            if not pid:
                os.close(read)
                if double and os.fork():
                    os._exit(0)
                if double:
                    os.setsid()
                child_use(write)
                sys.exit(0)  # as a program ends: with every exit handler
            os.close(write)
            with os.fdopen(read, "rb") as pipe:
                found = pickle.loads(gevent.get_hub().threadpool.apply(pipe.read))
            assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
            return found

        parent = os.getpid()

        def ask():
            try:
                return [backend() for _ in range(30)]
            except psycopg2.OperationalError:
                assert os.getpid() != parent  # a copy of it that runs on in a child has lost its connection

        asking = [gevent.spawn(ask) for _ in range(6)]
        gevent.sleep(0.05)
        uses = [fork_and_use(double) for double in (False, True, False)]
        gevent.joinall(asking, raise_error=True)
        mine = (os.getpid(), sorted({found for greenlet in asking for found in greenlet.value}), -1)
        assert share_nothing(use(), mine, *uses), (mine, uses)
        print(len(uses))
    """)
    assert told == "3\n"


def test_a_child_leaves_idle_connections_and_those_of_closed_pools_alone(program: Program) -> None:
    """Also what the forking greenlet was the last to use."""
    told = program("""
        import gc, os, warnings
        import psycopg, psycopg2
        from gevent.monkey import get_original
        from worker import POSTGRES_URL

        native = get_original("socket", "socket")

        def is_cut_off(descriptor):
            with native(fileno=os.dup(descriptor)) as sock:
                sock.setblocking(False)
                try:
                    return sock.recv(1) == b""
                except BlockingIOError:
                    return False

        idle, leased = [], []
        for driver in (psycopg2, psycopg):
            connection = driver.connect(POSTGRES_URL)
            idle.append(connection.fileno())
            connection.close()
            connection = driver.connect(POSTGRES_URL, pool={"max_size": 2})
            leased.append(connection)
            connection._puff_lease.pool.close()
        del connection
        pid = os.fork()
        if not pid:
            warnings.simplefilter("ignore", ResourceWarning)
            left = [descriptor for descriptor in idle if not is_cut_off(descriptor)]
            leased.clear()
            gc.collect()
            get_original("time", "sleep")(0.3)
            os._exit(len(left))
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
        for connection in leased:
            with connection.cursor() as cursor:
                cursor.execute("SELECT 1")
            connection.close()
        print("unharmed")
    """)
    assert told == "unharmed\n"


def test_a_child_does_not_go_on_with_a_handshake_of_the_parent(program: Program) -> None:
    told = program("""
        import os, socket
        import gevent
        import psycopg, psycopg2

        server = socket.create_server(("127.0.0.1", 0))
        dsn = f"host=127.0.0.1 port={server.getsockname()[1]} user=u dbname=d sslmode=disable gssencmode=disable"
        connecting = [gevent.spawn(driver.connect, dsn) for driver in (psycopg2, psycopg)]
        peers = [server.accept()[0] for _ in connecting]
        for peer in peers:
            assert peer.recv(1000)
        pid = os.fork()
        if not pid:
            gevent.get_hub().exception_stream = None
            gevent.joinall(connecting, timeout=3)
            os._exit(sum(not each.ready() for each in connecting))
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
        assert not any(each.ready() for each in connecting)
        gevent.killall(connecting)
        for each in (server, *peers):
            each.close()
        print("left alone")
    """)
    assert told == "left alone\n"


def test_a_child_makes_pools_though_another_thread_was_making_one(program: Program) -> None:
    told = program("""
        import os, signal
        import gevent
        import psycopg, psycopg2
        from gevent.monkey import get_original
        from puff_patch.pools import postgres, redis
        from puff_patch.pools import psycopg as psycopg3
        from worker import POSTGRES_URL, REDIS_URL

        def make(**options):
            for driver in (psycopg2, psycopg):
                driver.connect(POSTGRES_URL, pool=options).close()
            redis.shared_client(REDIS_URL, {"max_connections": options["max_size"]}).ping()

        make(max_size=1)
        held = []

        def hold():
            for lock in (postgres._registry._lock, psycopg3._registry._lock, redis._clients_lock):
                lock.acquire()
            held.append(True)
            get_original("time", "sleep")(60)

        get_original("_thread", "start_new_thread")(hold, ())
        while not held:
            gevent.sleep(0.001)
        pid = os.fork()
        if not pid:
            signal.alarm(5)
            make(max_size=2)
            os._exit(0)
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
        print("made")
    """)
    assert told == "made\n"


def test_native_threads_use_the_pools_beside_greenlets(program: Program) -> None:
    """Threads that no patch has made a greenlet; the last one ends with a lease out."""
    told = program("""
        import os, threading, time
        import gevent
        import psycopg2
        import puff_patch
        from gevent.monkey import get_original
        from worker import POSTGRES_URL, backend, client, use

        start = get_original("_thread", "start_new_thread")
        lock = get_original("_thread", "allocate_lock")
        uses, done = [], []

        def thread():
            try:
                uses.append(use())
            finally:
                pass
                done.append(1)

        def leave_a_lease():
            connection = psycopg2.connect(POSTGRES_URL, pool={"max_size": 2})
            connection.cursor().execute("SELECT 1")
            del connection
            done.append(1)

        use()  # imports what it needs: a native thread cannot wait for an import in another one, says gevent
        for _ in range(3):
            start(thread, ())
        start(leave_a_lease, ())
        greenlets = [gevent.spawn(use) for _ in range(3)]
        pooled = [gevent.get_hub().threadpool.spawn(use) for _ in range(2)]
        gevent.joinall([*greenlets, *pooled], raise_error=True)
        with gevent.Timeout(20):
            while len(done) < 4:
                gevent.sleep(0.01)
        uses += [each.get() for each in [*greenlets, *pooled]]
        assert len(uses) == 8
        assert {process for process, *_ in uses} == {os.getpid()}
        (stats,) = [found for name, found in puff_patch.stats().items() if name.startswith("postgres")]
        held = [psycopg2.connect(POSTGRES_URL, pool={"max_size": 2}) for _ in range(2)]
        print(stats["pool_max"], len(held))
    """)
    assert told == "2 2\n"


def test_subprocesses_let_greenlets_run(program: Program) -> None:
    told = program("""
        import subprocess, time
        import gevent
        from worker import backend

        ticks = []

        def tick():
            while True:
                ticks.append(1)
                gevent.sleep(0.005)

        gevent.spawn(tick)
        backend()
        assert subprocess.check_output(["sh", "-c", "sleep 0.1; echo out"], text=True) == "out\\n"
        text = "x" * 1_000_000
        with subprocess.Popen(["cat"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
            assert process.communicate(text, timeout=20)[0] == text
        with (
            subprocess.Popen(["sh", "-c", "sleep 0.1; seq 1000"], stdout=subprocess.PIPE) as first,
            subprocess.Popen(["tail", "-1"], stdin=first.stdout, stdout=subprocess.PIPE, text=True) as second,
        ):
            first.stdout.close()
            assert second.communicate(timeout=20)[0] == "1000\\n"
        backend()
        print(len(ticks) > 20)
    """)
    assert told == "True\n"


def test_a_fork_that_python_is_not_told_of_shares_nothing(program: Program) -> None:
    """uWSGI forks in C; no hook of Python's runs in the child."""
    told = program("""
        import ctypes, json, os
        import gevent
        from worker import share_nothing, use

        uses = [use()]
        read, write = os.pipe()
        pid = ctypes.PyDLL(None).fork()
        if not pid:
            gevent.reinit()
            os.write(write, json.dumps(use()).encode())
            os._exit(0)
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
        uses += [json.loads(os.read(read, 10_000)), use()]
        assert share_nothing(*uses), uses
        print(len(uses))
    """)
    assert told == "3\n"
