"""The result of an asynchronous call."""

from __future__ import annotations

import asyncio
import copy
from collections.abc import Callable, Generator
from typing import Any, TypeVar, cast

import torch

__all__ = ["Future", "future_from"]

T = TypeVar("T")


class Future(torch.futures.Future[T]):
    """A ``torch.futures.Future`` that Ctrl-C can interrupt and asyncio can await.

    ``torch.futures.wait_all`` and ``collect_all`` take it like any other.

    Callbacks given to ``then`` and ``add_done_callback`` run on the thread that received the answer; they must not
    wait for other answers there.
    """

    _pending: Any = None  # what the runtime waits on; None for a future that the program made itself

    def wait(self) -> T:
        """Return the result, or raise what the call raised.

        Raises
        ------
        RemoteError, CallTimeout, WorkerDied
            As ``rpc_sync`` would.
        KeyboardInterrupt
            On Ctrl-C; the call goes on.
        """
        if self._pending is not None and not self.done():  # done inside its own callbacks already
            self._pending.wait()
        return super().wait()

    def set_exception(self, result: BaseException) -> None:  # type: ignore[override]  # torch says T, and means this
        """Mark it as failed: ``wait`` and ``value`` raise a fresh exception like ``result`` each time."""
        # The stored one would remember in its traceback every frame that waited, and never let go of what they hold:
        # the garbage collector does not see into a torch future.
        self._set_unwrap_func(_raise_fresh)
        self.set_result(cast(T, result))  # the unwrap function turns it into a raise

    def __await__(self) -> Generator[Any, None, T]:
        if not self.done():
            loop = asyncio.get_running_loop()
            arrived = loop.create_future()

            def settle() -> None:
                if not arrived.done():  # cancelled meanwhile
                    arrived.set_result(None)

            def tell(_: Any) -> None:
                loop.call_soon_threadsafe(settle)

            self.add_done_callback(tell)
            yield from arrived
        return self.value()


def future_from(
    source: torch.futures.Future, what: Callable[[Any], T], first: Callable[[], None] | None = None
) -> Future[T]:
    """Return a future of what is made of the result of another; who fails, fails it.

    Parameters
    ----------
    source : Future
    what : callable
        Given the result, returns that of the new future.
    first : callable, optional
        Called when the outcome is known, before anybody hears of it.
    """
    future: Future[T] = Future()
    future._pending = getattr(source, "_pending", None)  # what ``then`` returns has none

    def settle(done: Any) -> None:
        try:
            result = what(done.value())
        except BaseException as error:
            if first is not None:
                first()
            future.set_exception(error.with_traceback(None))  # its frames hold this future: never freed else
        else:
            if first is not None:
                first()
            future.set_result(result)

    source.add_done_callback(settle)
    return future


def _raise_fresh(stored: BaseException) -> None:
    try:
        fresh = copy.copy(stored)  # by its __reduce__: the way that all exceptions can be made again
        fresh.__cause__, fresh.__suppress_context__ = stored.__cause__, stored.__suppress_context__
    except Exception:  # a class that refuses: better the error itself, with its frames, than none
        fresh = stored
    try:
        raise fresh
    finally:
        del fresh  # it remembers this frame
