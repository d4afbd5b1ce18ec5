"""pytest plugin: tests run patched, on a greenlet, with PostgreSQL and Redis at hand; ``async def`` tests too.

``puff pytest``, or ``pytest -p puff_patch.pytest_plugin`` (in ``addopts``, to have it always).  It is no entry
point: those load for everybody, in an order nobody chooses, while ``-p`` comes first of all, before other plugins
and the project's own ``conftest.py`` get to import anything.

The run stays on the main greenlet: what a fixture has set up there, such as the connection whose transaction a
test is in, is the test's own.  See docs/testing.md.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import os
import signal
import sys
import time
import warnings
from collections.abc import AsyncGenerator, Callable, Coroutine, Generator, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any, Protocol

import gevent
import pytest

import puff_patch

if TYPE_CHECKING:
    from puff_patch.server import Applications, ServerOptions

_NAME = "puff_patch.pytest_plugin"


class PuffLeakWarning(UserWarning):
    """A test has left greenlets or leases of connections behind."""


def pytest_addoption(parser: pytest.Parser) -> None:
    """Declare the options, and patch: no hook is called earlier."""
    _patch()
    group = parser.getgroup("puff_patch")
    group.addoption(
        "--puff-embedded",
        action="store_true",
        help="start PostgreSQL and Redis from wheels, and put their URLs into the environment",
    )
    group.addoption(
        "--puff-timeout",
        type=float,
        metavar="SECONDS",
        help="fail a test that takes longer, or whose fixtures do, and show what every greenlet is doing",
    )
    group.addoption("--puff-leaks", action="store_true", help="warn of greenlets and leases a test leaves behind")
    parser.addini("puff_embedded", "as --puff-embedded", type="bool", default=False)
    parser.addini("puff_timeout", "as --puff-timeout", default="")
    parser.addini("puff_leaks", "as --puff-leaks", type="bool", default=False)


def _patch() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error", puff_patch.PatchedTooLateWarning)
        try:
            puff_patch.patch_all()
        except puff_patch.PatchedTooLateWarning as warning:
            raise pytest.UsageError(
                f"{warning}\nUnder pytest: put `-p {_NAME}` into addopts, before any other plugin, or run "
                "`puff pytest`; not into pytest_plugins of a conftest.py."
            ) from None


@pytest.hookimpl(tryfirst=True)
def pytest_load_initial_conftests(early_config: pytest.Config) -> None:
    """Have the servers running before anybody reads their URLs: pytest-django loads the settings here."""
    if early_config.known_args_namespace.puff_embedded or early_config.getini("puff_embedded"):
        from puff_patch import embedded

        os.environ["PUFF_EMBEDDED"] = "1"
        embedded.ensure(_data_dir(early_config), export=True)


def _data_dir(config: pytest.Config) -> Path | None:
    # Not where pytest happens to be called from.
    return None if os.environ.get("PUFF_DATA_DIR") else config.rootpath / ".puff"


def pytest_configure(config: pytest.Config) -> None:
    """Check the settings, and make the marker known."""
    config.addinivalue_line(
        "markers", "puff_timeout(seconds): how long this test may take, and its fixtures; 0 for no limit"
    )
    try:
        config.stash[_TIMEOUT] = _seconds(config.option.puff_timeout or config.getini("puff_timeout") or 0)
    except ValueError as error:
        raise pytest.UsageError(f"puff_timeout: {error}") from None


def pytest_report_header() -> str:
    """Say that this is no plain run."""
    return f"puff_patch: {puff_patch.__version__}, patched"


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_setupnodes(config: pytest.Config) -> None:
    """Have pytest-xdist's workers load this plugin first, too: they read the command line, but no addopts."""
    params = config.invocation_params
    config.invocation_params = replace(params, args=("-p", _NAME, *params.args))


# Async tests and fixtures.


def _run(coroutine: Coroutine[Any, Any, Any]) -> Any:
    """Run a coroutine on the asyncio thread while this greenlet waits, and does what ``sync_to_async`` wants."""
    from puff_patch.runtime.aio import run_coroutine
    from puff_patch.runtime.futures import CurrentGreenletExecutor

    executor = CurrentGreenletExecutor()

    async def run() -> Any:
        asgiref = sys.modules.get("asgiref.sync")
        if asgiref is None:
            return await coroutine
        # As below async_to_sync: Django's connections are this greenlet's, and in the test's transaction.
        asgiref.AsyncToSync.executors.current = executor
        try:
            return await coroutine
        finally:
            asgiref.AsyncToSync.executors.current = None

    return run_coroutine(run(), executor=executor)


def pytest_pyfunc_call(pyfuncitem: pytest.Function) -> bool | None:
    """Run an ``async def`` test, unless another plugin has made something else of it by now."""
    if not inspect.iscoroutinefunction(pyfuncitem.obj):
        return None
    names = pyfuncitem._fixtureinfo.argnames
    _run(pyfuncitem.obj(**{name: pyfuncitem.funcargs[name] for name in names}))
    return True


@pytest.hookimpl(wrapper=True, trylast=True)
def pytest_fixture_setup(
    fixturedef: pytest.FixtureDef[Any], request: pytest.FixtureRequest
) -> Generator[None, object, object]:
    """Run an ``async def`` fixture, unless another plugin has made something else of it by now."""
    __tracebackhide__ = True
    original = fixturedef.func
    fixturedef.func = _made_sync(original, request)  # type: ignore[misc]
    try:
        return (yield)
    finally:
        fixturedef.func = original  # type: ignore[misc]
        if fixturedef.scope != "function" and _BEFORE in request.config.stash:
            # What it has started is not one test's alone.
            _remember(request.config)


def _made_sync(function: Any, request: pytest.FixtureRequest) -> Callable[..., Any]:
    is_generator = inspect.isasyncgenfunction(function)
    if not is_generator and not inspect.iscoroutinefunction(function):
        return function  # type: ignore[no-any-return]
    call = function
    owner = getattr(function, "__self__", None)
    if owner is not None and isinstance(request.instance, type(owner)):
        # A method is called with the instance the test is called with.
        call = function.__func__.__get__(request.instance)

    @functools.wraps(function)
    def value(**kwargs: Any) -> Any:
        return _run(call(**kwargs))

    @functools.wraps(function)
    def values(**kwargs: Any) -> Iterator[Any]:
        generator: AsyncGenerator[Any, None] = call(**kwargs)
        yield _run(_next(generator))
        if _run(_next(generator, _END)) is not _END:
            pytest.fail(f"the fixture {function.__name__!r} has more than one yield", pytrace=False)

    return values if is_generator else value


_END: Any = object()


async def _next(generator: AsyncGenerator[Any, None], *default: Any) -> Any:
    return await anext(generator, *default)


# Time-outs.

_TIMEOUT = pytest.StashKey[float]()
_TIMER = pytest.StashKey["_Timer"]()


def _seconds(value: Any) -> float:
    try:
        seconds = float(value)
    except (TypeError, ValueError):
        seconds = -1.0
    if not 0 <= seconds < float("inf"):
        raise ValueError(f"it takes a number of seconds, 0 for no limit, not {value!r}")
    return seconds


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Read the time limit of each test."""
    for item in items:
        seconds = item.config.stash[_TIMEOUT]
        marker = item.get_closest_marker("puff_timeout")
        if marker is not None:
            try:
                (value,) = (*marker.args, *marker.kwargs.values())
                seconds = _seconds(value)
            except ValueError as error:
                raise pytest.UsageError(f"{item.nodeid}: puff_timeout: {error}") from None
        item.stash[_TIMEOUT] = seconds


class _Timer:
    """Interrupts what runs in the calling greenlet; if ``repeated``, again and again as long as that goes on.

    A signal, and not a timer of the hub's: that one would not come while something blocks the hub.
    """

    def __init__(self, seconds: float, *, repeated: bool) -> None:
        self.seconds = seconds
        self._greenlet = gevent.getcurrent()
        self._hub = gevent.get_hub()
        self._before = signal.signal(signal.SIGALRM, self._on_alarm)
        signal.setitimer(signal.ITIMER_REAL, seconds, seconds if repeated else 0)

    def cancel(self) -> None:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, self._before)

    def _on_alarm(self, signum: int, frame: FrameType | None) -> None:
        from puff_patch.runtime.dump import dump_stacks

        stacks = dump_stacks({id(self._greenlet): "the test"})
        # To stderr: what a failing test was told may be lost with it (a fixture's finally that raises).
        print(f"\n{stacks}", file=sys.stderr)
        error = pytest.fail.Exception(
            f"it took more than {self.seconds:g} s; what every greenlet was doing is in its stderr"
        )
        current = gevent.getcurrent()
        if current is self._greenlet:
            raise error
        self._hub.loop.run_callback(self._greenlet.throw, error)
        if current is not self._hub:
            # It keeps the test's greenlet from running.
            raise gevent.GreenletExit


@contextlib.contextmanager
def _limited(item: pytest.Item) -> Iterator[None]:
    """Limit the time of a phase; not of what lies between, where pytest itself would be interrupted."""
    __tracebackhide__ = True
    seconds = item.stash.get(_TIMEOUT, 0.0)
    timer = _Timer(seconds, repeated=True) if seconds else None
    try:
        yield
    finally:
        if timer is not None:
            timer.cancel()


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_call(item: pytest.Item) -> Generator[None, None, None]:
    """Limit the time of a test."""
    __tracebackhide__ = True
    with _limited(item):
        return (yield)


@pytest.hookimpl(optionalhook=True)
def pytest_timeout_set_timer(item: pytest.Item, settings: Any) -> bool:
    """pytest-timeout's time-outs are ours: its own would be raised in whatever greenlet happens to run."""
    item.stash[_TIMER] = _Timer(settings.timeout, repeated=False)
    return True


@pytest.hookimpl(optionalhook=True)
def pytest_timeout_cancel_timer(item: pytest.Item) -> bool:
    """See `pytest_timeout_set_timer`."""
    timer = item.stash.get(_TIMER, None)
    if timer is not None:
        timer.cancel()
        del item.stash[_TIMER]
    return True


# Leaks.

_BEFORE = pytest.StashKey[tuple[float, dict[int, Any]]]()
_LEAK_GRACE = 0.2


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> Generator[None, None, None]:
    """Remember what there was before the test; limit the time of its fixtures."""
    __tracebackhide__ = True
    if item.config.option.puff_leaks or item.config.getini("puff_leaks"):
        _remember(item.config)
    with _limited(item):
        return (yield)


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_teardown(item: pytest.Item) -> Generator[None, None, None]:
    """Limit the time of the fixtures' ends, and warn of what is left after the test."""
    __tracebackhide__ = True
    with _limited(item):
        yield
    before = item.config.stash.get(_BEFORE, None)
    if before is None:
        return
    left = _left(*before)
    limit = time.monotonic() + _LEAK_GRACE
    while left and time.monotonic() < limit:
        # What is about to end is no leak.
        gevent.sleep(0.01)
        left = _left(*before)
    if left:
        item.warn(PuffLeakWarning("the test has left behind:\n" + "\n".join(left)))


def _remember(config: pytest.Config) -> None:
    from puff_patch.runtime.dump import living_greenlets

    config.stash[_BEFORE] = (time.monotonic(), {id(each): each for each in living_greenlets()})


def _left(began: float, before: dict[int, Any]) -> list[str]:
    from puff_patch.pools.base import all_pools
    from puff_patch.pools.holders import describe_holders
    from puff_patch.runtime.dump import living_greenlets
    from puff_patch.runtime.stacks import describe, greenlet_stack

    found = [
        f"  {each!r}, now at {describe(stack)}"
        for each in living_greenlets()
        # Others than gevent's own kind, such as the hub, are the runtime's.
        if isinstance(each, gevent.Greenlet) and id(each) not in before and (stack := greenlet_stack(each))
    ]
    for pool in all_pools():
        # The test's own greenlet may keep one from test to test, as Django does.
        leased = [slot for slot in list(pool._leased) if slot.leased_at > began and not slot.is_held_here()]
        if leased:
            found.append(f"  leases of {pool.name}:{describe_holders(leased, time.monotonic())}")
    return found


# Fixtures.


@dataclass(frozen=True)
class Services:
    """Where a PostgreSQL and a Redis are.

    Args:
        postgres_url: for psycopg2 and psycopg.
        redis_url: for redis-py.
    """

    postgres_url: str
    redis_url: str


@pytest.fixture(scope="session")
def puff_services(pytestconfig: pytest.Config) -> Services:
    """The servers this program is configured for; embedded ones are started where no URL is given."""
    from puff_patch.config import current

    config = current()
    if "default" not in config.postgres_urls or "default" not in config.redis_urls:
        from puff_patch import embedded

        embedded.ensure(_data_dir(pytestconfig), export=True)
        config = current()
    return Services(config.postgres_url(), config.redis_url())


class StartServer(Protocol):
    """What the fixture ``puff_server`` gives."""

    def __call__(self, app: Any, options: ServerOptions | None = None) -> str:
        """Serve an application until the end of the test.

        Args:
            app: a WSGI application, or `puff_patch.server.Applications`.
            options: by default a free port of the loopback interface.

        Returns:
            Where it listens, such as ``http://127.0.0.1:41231``.
        """


@pytest.fixture
def puff_server() -> Iterator[StartServer]:
    """Serves applications over real HTTP, in greenlets of this process, until the end of the test."""
    from puff_patch.server import serving

    with contextlib.ExitStack() as running:

        def start(app: Callable[..., Any] | Applications, options: ServerOptions | None = None) -> str:
            return running.enter_context(serving(app, options))

        yield start
