"""One call for both worlds: a greenlet waits for it, an event loop awaits it.

`either_way` makes it of a function that waits cooperatively: in a greenlet the call is that function's, where an
event loop is running the function runs on a greenlet of its own and an ``asyncio.Future`` stands for its result.
`Task` is what has been started and will end: a function on a greenlet (`spawn`), one in a native thread
(`puff_patch.runtime.native`), or anything that calls back (`wrap_async`).
"""

from __future__ import annotations

import asyncio
import contextvars
import functools
import logging
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Generator, Iterable, Iterator
from concurrent.futures import TimeoutError as FutureTimeout  # TimeoutError itself from Python 3.11 on
from typing import Any, Generic, TypeVar

import gevent
from gevent import Greenlet, GreenletExit

from puff_patch.runtime import aio
from puff_patch.runtime.futures import HubFuture, native_lock
from puff_patch.runtime.mailbox import Mailbox

T = TypeVar("T")

_logger = logging.getLogger("puff_patch.tasks")
_running_loop: Callable[[], Any] = asyncio._get_running_loop


class TaskKilled(RuntimeError):
    """The task was killed before it had a result."""


def is_asyncio() -> bool:
    """Whether an event loop is running here, so that a call of this API returns an awaitable."""
    return _running_loop() is not None


def is_greenlet() -> bool:
    """Whether none is, so that a call of this API waits."""
    return _running_loop() is None


class Outcome(HubFuture):
    """A future of what has begun: nobody can cancel it, and an exception that nobody looks at is logged."""

    def __init__(self, what: object) -> None:
        super().__init__()
        self._state = "RUNNING"
        self._what = what
        self.looked_at = False
        self.killed = False

    def finish(self, result: Any, error: BaseException | None) -> None:
        """Set the result, or the exception if there is one; of a killed task nobody wants to know any more."""
        if self.killed and self.done():
            return
        if error is not None:
            self.set_exception(error)
        else:
            self.set_result(result)

    def kill(self) -> None:
        """Have it end as killed unless it has ended, whatever `finish` says later."""
        self.killed = True
        if not self.done():
            self.set_exception(TaskKilled(f"{_name(self._what)} was killed"))

    def awaited(self, kill: Callable[[], object]) -> asyncio.Future[Any]:
        """In an event loop: a future of it; if that is cancelled, ``kill`` is called."""
        self.looked_at = True  # from here on asyncio tells of an exception that nobody looks at
        future: asyncio.Future[Any] = asyncio.wrap_future(self)

        def ended(future: asyncio.Future[Any]) -> None:
            if future.cancelled():
                kill()

        future.add_done_callback(ended)
        return future

    def __del__(self) -> None:
        error = self._exception
        if error is not None and not self.looked_at and not isinstance(error, TaskKilled):
            _logger.error("nobody has looked at the exception of %s", _name(self._what), exc_info=error)


def _name(what: object) -> str:
    return getattr(what, "__qualname__", None) or repr(what)


class Task(Generic[T]):
    """Something that was started.  Any number of greenlets may wait for its end, and of coroutines await it.

    Attributes:
        finished: whether it has ended.
    """

    __slots__ = ("__weakref__", "_kill", "_outcome")

    def __init__(self, outcome: Outcome, kill: Callable[[], object]) -> None:
        self._outcome = outcome
        self._kill = kill

    def join(self, timeout: float | None = None) -> Any:
        """Wait for the end; where an event loop is running, return an awaitable of the same.

        Args:
            timeout: seconds to wait at most; None means no limit.  The task goes on when they are over.

        Returns:
            What the function returned.

        Raises:
            TimeoutError: the time is over.
            TaskKilled: the task was killed.
            BaseException: whatever the function raised.
        """
        if _running_loop() is not None:
            future = self._outcome.awaited(self._kill)
            return future if timeout is None else asyncio.ensure_future(_within(future, timeout))
        self._outcome.looked_at = True
        try:
            return self._outcome.result(timeout)
        except FutureTimeout:
            if self._outcome.done():  # the function's own
                raise
            raise TimeoutError(f"{_name(self._outcome._what)} did not end within {timeout:g} seconds") from None

    def get(self, block: bool = True, timeout: float | None = None) -> Any:
        """`join`, under gevent's name; with ``block=False`` it must have ended."""
        return self.join(timeout if block else 0)

    def __await__(self) -> Generator[Any, None, T]:
        """In an event loop.  Cancelling what awaits kills the task, as with asyncio's own tasks."""
        return self._outcome.awaited(self._kill).__await__()

    def kill(self, block: bool = True, timeout: float | None = None) -> Any:
        """End it: `gevent.GreenletExit` is raised in its greenlet, and ``join`` raises `TaskKilled`.

        A function in a native thread cannot be stopped: one that has not begun will not begin, of one that has the
        result is dropped.

        Args:
            block: whether to wait for its end; where an event loop is running, an awaitable of that is returned.
            timeout: seconds to wait at most; None means no limit.
        """
        self._outcome.looked_at = True
        self._kill()
        if _running_loop() is None:
            if block:
                self._outcome._await(timeout)
            return None
        return asyncio.ensure_future(_ended(self._outcome, timeout)) if block else None

    @property
    def finished(self) -> bool:
        return self._outcome.done()

    def ready(self) -> bool:
        """As `finished`, under gevent's name."""
        return self._outcome.done()

    def successful(self) -> bool:
        """Whether it has ended, and without an exception."""
        return self._outcome.done() and self._outcome._exception is None

    @property
    def result(self) -> T | None:
        """What the function returned; None if it has not."""
        result: T | None = self._outcome._result
        return result

    @property
    def exception(self) -> BaseException | None:
        """What the function raised; None if it has not."""
        self._outcome.looked_at |= self._outcome.done()
        return self._outcome._exception

    def __repr__(self) -> str:
        state = "running" if not self.finished else "finished" if self.successful() else "failed"
        return f"<Task {_name(self._outcome._what)} {state}>"


async def _within(future: asyncio.Future[Any], timeout: float) -> Any:
    done, _ = await asyncio.wait([future], timeout=timeout)
    if not done:
        raise TimeoutError(f"it did not end within {timeout:g} seconds")
    return future.result()


async def _ended(outcome: Outcome, timeout: float | None) -> None:
    future = asyncio.wrap_future(outcome)
    await asyncio.wait([future], timeout=timeout)
    if future.done():
        future.exception()  # seen


class _Call:
    """A function on its way to a greenlet, in the caller's context."""

    __slots__ = ("_args", "_context", "_fn", "_greenlet", "_kwargs", "_mailbox", "outcome")

    def __init__(self, fn: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.outcome = Outcome(fn)
        self._fn = fn
        self._args = args
        self._kwargs = kwargs
        self._context = contextvars.copy_context()
        self._greenlet: Any = None
        self._mailbox: Mailbox | None = None

    def start(self) -> None:
        """Begin soon, on a greenlet of this thread or, in an event loop, of the one whose greenlets it uses."""
        loop = _running_loop()
        if loop is None:
            self._mailbox = Mailbox.current()
            self._begin()
        elif aio.runs_greenlets(loop):
            self._mailbox = mailbox = aio.get_mailbox()
            if not mailbox.post(self._begin):
                raise RuntimeError("the hub whose greenlets run this is gone: its thread has ended")
        else:
            # Nothing is patched, and this loop holds up its thread's greenlets.
            from puff_patch.runtime import native

            native.get_pool().submit(self._run)

    def _begin(self) -> None:
        self._greenlet = Greenlet(self._run)
        # For one that somebody kills before it has begun.
        self._greenlet.rawlink(self._ended)
        self._greenlet.start()

    def _run(self) -> None:
        outcome = self.outcome
        try:
            result = self._context.run(self._fn, *self._args, **self._kwargs)
        except GreenletExit:
            outcome.kill()
        except (SystemExit, KeyboardInterrupt) as error:
            outcome.finish(None, error)
            raise
        except BaseException as error:  # noqa: BLE001 - raised again where it is waited for
            outcome.finish(None, error)
        else:
            outcome.finish(result, None)
        finally:
            # The traceback refers to this frame: without the rest an outcome nobody holds is gone at once.
            del self, outcome

    def _ended(self, _: object) -> None:
        if not self.outcome.done():
            self.outcome.kill()

    def kill(self) -> None:
        """Raise GreenletExit in the greenlet; from any thread."""
        if self._mailbox is not None:
            self._mailbox.post_or_call(self._kill)
        else:
            self.outcome.kill()  # it is in a thread

    def _kill(self) -> None:
        if self._greenlet is not None:
            self._greenlet.kill(block=False)


def spawn(fn: Callable[..., T], /, *args: Any, **kwargs: Any) -> Task[T]:
    """Run a function on a greenlet of its own, from a greenlet or an event loop.

    It begins when the caller next waits, in a copy of the caller's context.

    Args:
        fn: the function.
        args: its arguments.
        kwargs: its keyword arguments.

    Returns:
        The task.  An exception that nobody looks at is logged once the task is dropped (``puff_patch.tasks``).
    """
    call = _Call(fn, args, kwargs)
    call.start()
    return Task(call.outcome, call.kill)


def either_way(fn: Callable[..., Any]) -> Callable[..., Any]:
    """Have a function that waits cooperatively run on a greenlet, and be awaitable, where a loop is running.

    Elsewhere it is what it was.  Cancelling what awaits kills the greenlet.
    """

    @functools.wraps(fn)
    def call(*args: Any, **kwargs: Any) -> Any:
        if _running_loop() is None:
            return fn(*args, **kwargs)
        started = _Call(fn, args, kwargs)
        started.start()
        return started.outcome.awaited(started.kill)

    return call


def at_once(fn: Callable[..., Any]) -> Callable[..., Any]:
    """`either_way` for what does not wait: done here, and where a loop is running its result is awaitable."""

    @functools.wraps(fn)
    def call(*args: Any, **kwargs: Any) -> Any:
        loop = _running_loop()
        if loop is None:
            return fn(*args, **kwargs)
        future: asyncio.Future[Any] = loop.create_future()
        try:
            future.set_result(fn(*args, **kwargs))
        except Exception as error:  # noqa: BLE001 - raised again where it is awaited
            future.set_exception(error)
        return future

    return call


Return = Callable[..., None]


def wrap_async(
    fn: Callable[[Return], object], join: bool = True, wrap_return: Callable[[Any], Any] | None = None
) -> Any:
    """Wait for, or await, something that calls back when it has a result: a native extension, for one.

    Args:
        fn: begins it, and returns soon.  It is given a function ``r``, to be called once, by any thread:
            ``r(value)`` with the result or ``r(None, error)`` with an exception.
        join: whether a greenlet waits; if not, a `Task` is returned.  In an event loop it makes no difference.
        wrap_return: called with the result; what it returns is the result.  It runs where ``r`` was called.

    Returns:
        The result; where an event loop is running, an awaitable of it.

    Raises:
        BaseException: what ``fn`` raised, or what ``r`` was given.
    """
    outcome = Outcome(fn)

    def finish(value: Any = None, error: BaseException | None = None) -> None:
        if outcome.done() and not outcome.killed:
            raise RuntimeError("the result was returned already")
        if error is None and wrap_return is not None:
            try:
                value = wrap_return(value)
            except Exception as raised:  # noqa: BLE001 - raised again where it is waited for
                error = raised
        outcome.finish(value, error)

    fn(finish)
    task: Task[Any] = Task(outcome, outcome.kill)
    if _running_loop() is not None:
        return outcome.awaited(outcome.kill)
    return task.join() if join else task


def sleep_ms(milliseconds: float) -> Any:
    """Let others run for a while.

    Args:
        milliseconds: how long; 0 lets every other greenlet that is ready have its turn.

    Returns:
        None; where an event loop is running, an awaitable.
    """
    if milliseconds < 0:
        raise ValueError(f"sleep_ms takes a number of milliseconds of at least 0, not {milliseconds}")
    if _running_loop() is not None:
        return asyncio.ensure_future(asyncio.sleep(milliseconds / 1000))
    gevent.sleep(milliseconds / 1000)
    return None


def join_all(tasks: Iterable[Any], timeout: float | None = None) -> Any:
    """Wait until all tasks have ended; where an event loop is running, return an awaitable of the same.

    Args:
        tasks: tasks, or greenlets of gevent's.
        timeout: seconds to wait at most; None means no limit.  The tasks go on when they are over.

    Returns:
        A list of their results in the order of ``tasks``.

    Raises:
        TimeoutError: the time is over.
        BaseException: that of the first one to fail; the others go on.
    """
    found = [_as_task(task) for task in tasks]
    if _running_loop() is not None:
        return asyncio.ensure_future(_gather(found, timeout))
    for _ in _Completed(found, timeout):
        pass
    return [task.join() for task in found]


async def _gather(tasks: list[Task[Any]], timeout: float | None) -> list[Any]:
    gathered = asyncio.gather(*(task.join() for task in tasks))
    if timeout is None:
        return await gathered
    results: list[Any] = await _within(gathered, timeout)
    return results


def join_iter(tasks: Iterable[Any], timeout: float | None = None) -> Any:
    """The results of tasks in the order in which they end: for ``for``, and in coroutines for ``async for``.

    Args:
        tasks: tasks, or greenlets of gevent's.
        timeout: seconds that all of it may take; None means no limit.

    Raises:
        TimeoutError: the time is over.
        BaseException: what a task raised, when it is its turn; ``next()`` goes on with the others after it.
    """
    return _Completed([_as_task(task) for task in tasks], timeout)


class _Completed(Iterator[Any], AsyncIterator[Any]):
    """What `join_iter` returns."""

    def __init__(self, tasks: list[Task[Any]], timeout: float | None) -> None:
        self._left = len(tasks)
        self._timeout = timeout
        self._until = None if timeout is None else time.monotonic() + timeout
        self._lock = native_lock()
        self._ended: deque[Task[Any]] = deque()
        self._next: HubFuture | None = None
        for task in tasks:
            task._outcome.add_done_callback(functools.partial(self._add, task))

    def _add(self, task: Task[Any], _: object) -> None:
        # In any thread.
        with self._lock:
            waiting, self._next = self._next, None
            if waiting is None:
                self._ended.append(task)
        if waiting is not None:
            waiting.set_result(task)

    def _take(self) -> HubFuture:
        future = HubFuture()
        with self._lock:
            if not self._ended:
                self._next = future
                return future
            task = self._ended.popleft()
        future.set_result(task)
        return future

    def _put_back(self, future: HubFuture) -> None:
        """What it stood for is still to come, or has come meanwhile."""
        with self._lock:
            if self._next is future:
                self._next = None
                return
        self._ended.appendleft(future.result())

    def _remaining(self) -> float | None:
        return None if self._until is None else max(0.0, self._until - time.monotonic())

    def _expired(self) -> TimeoutError:
        return TimeoutError(f"{self._left} tasks did not end within {self._timeout:g} seconds")

    def __iter__(self) -> Iterator[Any]:
        return self

    def __next__(self) -> Any:
        if not self._left:
            raise StopIteration
        future = self._take()
        try:
            task = future.result(self._remaining())
        except FutureTimeout:
            self._put_back(future)
            raise self._expired() from None
        except BaseException:
            self._put_back(future)
            raise
        self._left -= 1
        return task.join()

    def __aiter__(self) -> AsyncIterator[Any]:
        return self

    async def __anext__(self) -> Any:
        if not self._left:
            raise StopAsyncIteration
        future = self._take()
        # Running, so that cancelling what awaits it does not cancel it.
        future.done() or future.set_running_or_notify_cancel()
        awaited = asyncio.wrap_future(future)
        try:
            await asyncio.wait([awaited], timeout=self._remaining())
        except BaseException:
            self._put_back(future)
            raise
        if not awaited.done():
            self._put_back(future)
            raise self._expired()
        self._left -= 1
        return await awaited.result().join()


def _as_task(given: Any) -> Task[Any]:
    if isinstance(given, Task):
        return given
    if not isinstance(given, Greenlet):
        raise TypeError(f"a task or a greenlet is expected, not {given!r}")
    outcome = Outcome(given)
    mailbox = Mailbox.current()

    def ended(greenlet: Any) -> None:
        error = greenlet.exception
        if error is None and isinstance(greenlet.value, GreenletExit):
            outcome.kill()
        else:
            outcome.finish(greenlet.value, error)

    outcome.looked_at = True  # gevent has told of it
    given.rawlink(ended)
    return Task(outcome, lambda: mailbox.post_or_call(functools.partial(given.kill, block=False)))


class GlobalState:
    """What is shared by a whole program under the name ``global_state``: attributes of your choice.

    With `set_global_state` they are those of an object, for one of a native extension; before that they can just
    be set.
    """

    _target: Any

    def __init__(self) -> None:
        object.__setattr__(self, "_target", None)

    def __getattr__(self, name: str) -> Any:
        if self._target is not None:
            return getattr(self._target, name)
        raise AttributeError(
            f"global_state has no {name!r}: set it (puff_patch.global_state.{name} = ...) or say whose attributes "
            f"these are (puff_patch.set_global_state(object)) when the program starts"
        )

    def __setattr__(self, name: str, value: Any) -> None:
        if self._target is None:
            object.__setattr__(self, name, value)
        else:
            setattr(self._target, name, value)

    def __repr__(self) -> str:
        return f"<global_state {self._target!r}>" if self._target is not None else f"<global_state {vars(self)}>"


global_state = GlobalState()


def set_global_state(target: Any) -> None:
    """Have ``global_state``, also where it was imported already, stand for an object; None for none."""
    state = vars(global_state)
    state.clear()
    state["_target"] = target
