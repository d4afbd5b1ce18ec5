"""The asyncio thread: one native thread of this process runs one event loop, beside the hub of the greenlets.

asyncio knows which loop is running by native thread.  So a coroutine that a greenlet waits for does not run in the
greenlet's own thread, where every other greenlet would believe to be in it, but here.  `run_coroutine` leads
from a greenlet (or any thread) to the loop, `run_on_hub` from the loop to a greenlet.

The thread starts with the first use, ends with the process or `stop`, and is not there in a forked child, which
starts its own when it needs one.  Its loop is uvloop's where that is installed, else asyncio's on real epoll and
sockets: it never touches a hub.
"""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import functools
import os
import signal
import socket
import sys
import threading
from collections.abc import Awaitable, Callable, Coroutine
from concurrent.futures import Executor, Future
from concurrent.futures import TimeoutError as FutureTimeout  # TimeoutError itself from Python 3.11 on
from typing import Any, TypeVar

import gevent
from gevent.monkey import get_original

from puff_patch.runtime.futures import CurrentGreenletExecutor, HubExecutor, HubFuture, native_lock, start_warm
from puff_patch.runtime.hub_loop import LoopCall
from puff_patch.runtime.locks import native_threads
from puff_patch.runtime.mailbox import Mailbox

T = TypeVar("T")

_start_new_thread: Callable[..., int] = get_original("_thread", "start_new_thread")
_native_ident: Callable[[], int] = get_original("_thread", "get_ident")

_lock = native_lock()
_home: Mailbox | None = None
_executor: HubExecutor | None = None
_thread: AsyncioThread | None = None
_fork_hooked = False
# What a forked child inherits and must neither use nor close: the parent uses the same kernel objects.
_inherited: list[object] = []


class AsyncioThread:
    """A native thread that runs an event loop.  `get_thread` gives the one of this process."""

    def __init__(self) -> None:
        self.loop: Any = _new_loop()
        self.ident = 0
        self._stopping = asyncio.Event()
        self._ended = HubFuture()
        _start_new_thread(self._run, ())

    def stop(self, timeout: float = 5.0) -> bool:
        """Cancel what runs on the loop and end the thread.  Call it in a greenlet.

        Args:
            timeout: seconds to wait at most.

        Returns:
            False if the time ran out.
        """
        with contextlib.suppress(RuntimeError):  # the loop is closed
            self.loop.call_soon_threadsafe(self._stopping.set)
        try:
            self._ended.result(timeout)
        except FutureTimeout:
            return False
        return True

    async def _main(self) -> None:
        await self._stopping.wait()
        others = asyncio.all_tasks() - {asyncio.current_task()}
        for task in others:
            task.cancel()
        await asyncio.gather(*others, return_exceptions=True)
        await self.loop.shutdown_asyncgens()

    def _run(self) -> None:
        self.ident = _native_ident()
        native_threads.add(self.ident)
        # Signals are for the main thread: one that the kernel delivered here would not wake the hub.
        signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
        # As threading does for its own threads: coverage and debuggers see what runs here.
        sys.settrace(threading.gettrace())
        sys.setprofile(threading.getprofile())
        try:
            asyncio.set_event_loop(self.loop)
            # Not run_forever(): anyio looks for the task at the root of all, to which its worker threads belong.
            self.loop.run_until_complete(self._main())
        finally:
            self.loop.close()
            # The stand-in that threading keeps of a thread it did not start, for good.
            for ident in (threading.get_ident(), self.ident):
                threading._active.pop(ident, None)  # type: ignore[attr-defined]
            native_threads.discard(self.ident)
            self._ended.set_result(None)


class _LoopMixin:
    """What differs in the loop of the asyncio thread, whoever made it."""

    def run_in_executor(self, executor: Executor | None, func: Callable[..., Any], *args: Any) -> Any:
        if executor is None:
            executor = get_executor()
        elif not isinstance(executor, (HubExecutor, CurrentGreenletExecutor)) and not getattr(
            executor, "runs_on_hub", False
        ):
            # Its threads would be greenlets of this thread, which has no hub to run them.
            executor = _SubmitOnHub(executor)
        return super().run_in_executor(executor, func, *args)  # type: ignore[misc]

    async def subprocess_exec(self, *_: Any, **__: Any) -> Any:
        raise NotImplementedError(_NO_SUBPROCESS)

    async def subprocess_shell(self, *_: Any, **__: Any) -> Any:
        raise NotImplementedError(_NO_SUBPROCESS)


# gevent takes the news of every child that ends, in the main thread; a second one who wants it makes it deaf.
_NO_SUBPROCESS = (
    "asyncio's subprocesses do not work in puff_patch's asyncio thread. Use the subprocess module on a greenlet: "
    "await asyncio.to_thread(subprocess.run, ...)"
)


class _SubmitOnHub(Executor):
    """Another executor, whose threads are started from the hub."""

    def __init__(self, executor: Executor) -> None:
        self._executor = executor

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
        future = HubFuture()

        def finish(inner: Future[Any]) -> None:
            if inner.cancelled():
                future.cancel()
                future.set_running_or_notify_cancel()
            elif (error := inner.exception()) is not None:
                future.set_exception(error)
            else:
                future.set_result(inner.result())

        def start() -> None:
            if not future.set_running_or_notify_cancel():
                return
            try:
                inner = self._executor.submit(fn, *args, **kwargs)
            except BaseException as error:  # noqa: BLE001 - raised again where the future is waited for
                future.set_exception(error)
            else:
                inner.add_done_callback(finish)

        get_executor().submit(start)
        return future


class _SelectorLoop(_LoopMixin, asyncio.SelectorEventLoop):  # type: ignore[misc]
    """asyncio's own loop on what gevent has left untouched."""

    def __init__(self) -> None:
        super().__init__(get_original("selectors", "EpollSelector")() if _has_epoll() else None)

    def _make_self_pipe(self) -> None:
        ends = native_socketpair()
        for end in ends:
            end.setblocking(False)
        self._ssock, self._csock = ends
        self._internal_fds += 1  # type: ignore[attr-defined]
        self._add_reader(self._ssock.fileno(), self._read_from_self)  # type: ignore[attr-defined]


def _has_epoll() -> bool:
    try:
        get_original("selectors", "EpollSelector")
    except AttributeError:
        return False
    return True


def native_socketpair() -> tuple[Any, Any]:
    """A pair of connected sockets that gevent knows nothing of."""
    import _socket

    native = get_original("socket", "socket")
    pair = _socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    return tuple(native(end.family, end.type, end.proto, fileno=end.detach()) for end in pair)


@functools.cache
def _uvloop_class() -> Any:
    # Not uvloop.Loop: that name is patched, for loops that greenlets run.
    from uvloop.loop import Loop

    return type("UvLoop", (_LoopMixin, Loop, asyncio.AbstractEventLoop), {})


def _new_loop() -> Any:
    try:
        loop_class = _uvloop_class()
    except ImportError:
        loop_class = _SelectorLoop
    return loop_class()


def get_home() -> Mailbox:
    """The mailbox of the hub whose greenlets run what the asyncio thread asks for: that of the first caller."""
    global _home
    home = _home
    if home is None or home.closed:
        _hook_fork()
        home = _home = Mailbox.current()
    return home


def get_executor() -> HubExecutor:
    """The executor over the greenlets of the home hub."""
    global _executor
    executor = _executor
    if executor is None or executor._mailbox is not get_home():
        executor = _executor = HubExecutor(get_home())
    return executor


def get_thread() -> AsyncioThread:
    """The asyncio thread of this process, started now if it is not running."""
    global _thread
    thread = _thread
    if thread is None or thread.loop.is_closed():
        get_home()
        with _lock:
            if _thread is None or _thread.loop.is_closed():
                _thread = AsyncioThread()
            thread = _thread
    return thread


def in_thread() -> bool:
    """Whether the caller is in the asyncio thread."""
    return _thread is not None and _thread.ident == _native_ident()


def runs_greenlets(loop: Any) -> bool:
    """Whether greenlets run while ``loop`` waits: it is the asyncio thread's, or waits in a hub itself."""
    from gevent.selectors import GeventSelector

    return isinstance(loop, _LoopMixin) or isinstance(getattr(loop, "_selector", None), GeventSelector)


def get_mailbox() -> Mailbox:
    """That of the hub whose greenlets the calling thread's loops use: for the asyncio thread's the home hub."""
    return get_home() if in_thread() else Mailbox.current()


def run_on_greenlet(fn: Callable[..., object], *args: Any) -> None:
    """Have ``fn(*args)`` called on a greenlet soon; nobody learns of its outcome."""
    if not get_mailbox().post(start_warm, fn, *args):
        raise RuntimeError("the hub whose greenlets run this is gone: its thread has ended")


def waits_cooperatively() -> bool:
    """Whether the loop that is running here, or that `asyncio.run` would run here, lets greenlets run."""
    import selectors

    from gevent.selectors import GeventSelector

    loop = asyncio._get_running_loop()
    default: type = selectors.DefaultSelector
    return runs_greenlets(loop) if loop is not None else default is GeventSelector


def stop(timeout: float = 5.0) -> bool:
    """Stop the asyncio thread if there is one; the next use starts another.  Call it in a greenlet.

    Args:
        timeout: seconds to wait at most.

    Returns:
        False if the time ran out.
    """
    global _thread
    thread, _thread = _thread, None
    return thread is None or thread.stop(timeout)


def _hook_fork() -> None:
    global _fork_hooked
    if not _fork_hooked:
        _fork_hooked = True
        os.register_at_fork(after_in_child=_forget)


def _forget() -> None:
    global _home, _executor, _thread, _lock
    if _thread is not None:
        _inherited.append(_thread)
    _home = _executor = _thread = None
    native_threads.clear()
    _lock = native_lock()


def run_coroutine(
    coroutine: Coroutine[Any, Any, T],
    *,
    context: contextvars.Context | None = None,
    timeout: float | None = None,
    executor: CurrentGreenletExecutor | None = None,
) -> T:
    """Run a coroutine on the asyncio thread while the calling greenlet waits and others run.

    If the greenlet is killed or a `gevent.Timeout` of its own expires, the coroutine is cancelled.  The loop goes
    on after it, and so do tasks that it started and leaves behind.

    Args:
        coroutine: what to run.
        context: the context to run it in; by default the caller's, which then takes over the changes that the
            coroutine made, as if it had been awaited.
        timeout: seconds after which the coroutine is cancelled; None means no limit.
        executor: what the calling greenlet waits in; what is submitted to it meanwhile runs on this greenlet.

    Returns:
        What the coroutine returns.

    Raises:
        TimeoutError: the time is over.
        RuntimeError: an event loop is running in the calling greenlet: await the coroutine there.
        BaseException: whatever the coroutine raises.
    """
    if asyncio._get_running_loop() is not None:
        coroutine.close()
        raise RuntimeError("run_coroutine() waits, and an event loop is running here: await the coroutine instead")
    call = LoopCall(get_thread().loop)
    future = HubFuture()
    changed: list[contextvars.Context] = []

    async def run() -> None:
        # Before the future is done: the greenlet's thread may go on at once.
        try:
            result = await coroutine
        except BaseException as error:  # noqa: BLE001 - raised again in the greenlet
            changed.append(contextvars.copy_context())
            future.set_exception(error)
        else:
            changed.append(contextvars.copy_context())
            future.set_result(result)

    (contextvars.copy_context() if context is None else context).copy().run(call.start, run())
    waiting = executor or CurrentGreenletExecutor()
    waiting.on_interrupt = call.cancel
    expired = gevent.Timeout(timeout)
    try:
        with expired:
            waiting.run_until_future(future)
    except gevent.Timeout as error:
        if error is not expired:
            raise
        raise TimeoutError(f"the coroutine did not end within {timeout:g} seconds") from None
    if changed:
        if context is None:
            take_over(changed[0])
        else:
            context.run(take_over, changed[0])
    result: T = future.result()
    return result


def take_over(context: contextvars.Context) -> None:
    """Set in the current context what differs in another."""
    for variable, value in context.items():
        if variable.get(_UNSET) is not value:
            variable.set(value)


_UNSET: Any = object()


def run_on_hub(fn: Callable[..., T], /, *args: Any, **kwargs: Any) -> Awaitable[T]:
    """Run a function on a greenlet of the hub; call and await it in an event loop.

    It runs in a copy of the caller's context.  As with a thread, cancelling the awaiting task does not stop a
    function that has begun: it runs to its end and its result is dropped; one that has not begun will not.

    Args:
        fn: the function; it may block, cooperatively.
        args: its arguments.
        kwargs: its keyword arguments.

    Returns:
        An awaitable of what the function returns or raises.
    """
    call = functools.partial(contextvars.copy_context().run, fn, *args, **kwargs)
    return asyncio.wrap_future(get_executor().submit(call))
