"""The autograd contexts of one runtime: made, told to other workers by their calls, let go of everywhere."""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Callable
from typing import Any

import torch

from fastref.autograd.links import receive_node, send_node
from fastref.autograd.record import DistAutogradContext
from fastref.autograd.share import Share
from fastref.errors import BackwardError, UsageError
from fastref.futures import Future
from fastref.rref import HOW_ASYNC, HOW_SYNC, current_wiring
from fastref.runtime.post import set_thread_context, thread_context
from fastref.wire.kinds import Kind

__all__ = ["Contexts", "current_contexts"]

COUNT_BITS = 48
COUNT_MASK = (1 << COUNT_BITS) - 1
REMEMBERED = 16_384
"""Contexts let go of that are remembered, so that a call which comes late does not make one of them anew."""


class Contexts:
    """What a runtime asks when a context is active, and what the functions of ``fastref.autograd`` act on.

    Parameters
    ----------
    runtime : Runtime
    """

    def __init__(self, runtime: Any) -> None:
        self._runtime: Any = weakref.proxy(runtime)  # which refers to this: its memory goes with its last user
        self.rank: int = runtime.rank
        first = self.rank << COUNT_BITS | runtime.incarnation << 36
        self.largest = self.rank << COUNT_BITS | COUNT_MASK
        self._ids, self._links, self._passes = itertools.count(first + 1), itertools.count(first + 1), itertools.count()
        self._contexts: dict[int, DistAutogradContext] = {}
        self._released: dict[int, None] = {}  # the last ones, in order

    # ---- what programs do

    def new(self) -> DistAutogradContext:
        """Make a context and have the calling thread be in it.

        Raises
        ------
        UsageError
            The thread is in a context.
        """
        if thread_context():
            raise UsageError(f"Already have an autograd context id for this thread: {thread_context()}")
        context = DistAutogradContext(next(self._ids))
        self._contexts[context._context_id()] = context
        set_thread_context(context._context_id())
        return context

    def retrieve(self, context_id: int) -> DistAutogradContext:
        """Return a context that is there.

        Raises
        ------
        UsageError
            It is not.
        """
        context = self._contexts.get(context_id)
        if context is None:
            raise UsageError(f"Could not find autograd context with id: {context_id}")
        return context

    def release(self, context_id: int) -> None:
        """Let go of a context here, and have those let go of it whom this worker has sent it to; again: do nothing.

        A pass that is under way in it fails.
        """
        if thread_context() == context_id:
            set_thread_context(0)
        context = self._contexts.pop(context_id, None)
        self._remember(context_id)
        if context is None:
            return
        context.is_released = True  # first: who calls another worker meanwhile sees it, or is seen below
        for share in list(context.shares.values()):
            share.fail(BackwardError(f"autograd context {context_id} was released during a backward pass"))
        for rank in sorted(context.workers - {self.rank}):
            self._runtime.tell(self._runtime.peers[rank], Kind.CLEANUP_AUTOGRAD_CONTEXT_REQ, None, context_id)
        context.shares.clear()
        context.sends.clear()
        context.receives.clear()

    def _remember(self, context_id: int) -> None:
        self._released[context_id] = None
        while len(self._released) > REMEMBERED:
            self._released.pop(next(iter(self._released)), None)

    def counts(self) -> dict[str, int]:
        """Return torch's counters."""
        contexts = list(self._contexts.values())
        under_way = sum(not share.is_over for context in contexts for share in list(context.shares.values()))
        return {"num_current_backward_passes": under_way, "num_autograd_contexts": len(contexts)}

    # ---- what the runtime asks

    def goes_to(self, context_id: int, rank: int | None) -> bool:
        """Tell whether a context goes along with a message to a worker, with an answer by None: while it is there."""
        context = self._contexts.get(context_id)
        if context is None:
            return False
        if rank is not None:
            context.workers.add(rank)
        return not context.is_released

    def enter(self, context_id: int) -> DistAutogradContext | None:
        """Return a context that came with a message, made if need be; None when it was let go of before."""
        context = self._contexts.get(context_id)
        if context is None and context_id not in self._released:
            context = self._contexts.setdefault(context_id, DistAutogradContext(context_id))
        return context

    def send(self, context_id: int, rank: int, tensors: list[torch.Tensor]) -> int:
        """Note that tensors go to a worker; return the number of their link."""
        link: int = next(self._links)
        context = self._contexts.get(context_id)
        if context is not None:
            context.sends[link] = send_node(tensors)
        return link

    def receive(self, context_id: int, rank: int, link: int, tensors: list[torch.Tensor]) -> None:
        """Make tensors that came from a worker part of the graph here; with their context gone they are leaves."""
        context = self.enter(context_id)
        if context is None:
            for tensor in tensors:
                tensor.requires_grad_()
        else:
            context.receives[link] = receive_node(context_id, rank, link, tensors)

    def worker_died(self, rank: int, error: Exception) -> None:
        """Let go of the contexts that a dead worker made; passes that it ran have ended."""
        for context_id, context in list(self._contexts.items()):
            if context_id >> COUNT_BITS == rank:
                self.release(context_id)
                continue
            for key in [key for key in list(context.shares) if key[0] == rank]:
                self.end_share(context_id, key, error)

    backward_of: Callable[[Any, int, bool], None]  # what ``RRef.backward`` calls

    # ---- passes

    def next_pass(self) -> tuple[int, int]:
        """Return a name for a pass that this worker runs."""
        return self.rank, next(self._passes)

    def share(self, context_id: int, key: tuple[int, int], keep: bool | None = None) -> Share:
        """Return what this worker does in a pass; ``keep``: make it if need be."""
        context = self.retrieve(context_id)
        share = context.shares.get(key)
        if share is not None:
            return share
        if keep is None or key in context.ended:
            raise BackwardError(f"a backward pass in autograd context {context_id} has been given up")
        return context.shares.setdefault(key, Share(self, context, key, keep))

    def end_share(self, context_id: int, key: tuple[int, int], error: BaseException) -> None:
        """A pass has been given up: what this worker does in it ends."""
        context = self._contexts.get(context_id)
        if context is None:
            return
        context.ended.add(key)
        share = context.shares.pop(key, None)
        if share is not None:
            share.fail(error)

    def call(self, rank: int, function: Any, args: tuple, timeout: float = -1.0) -> Future:
        """Call a worker outside of all contexts: what travels is not part of any graph."""
        before = set_thread_context(0)
        try:
            future: Future = self._runtime.rpc_unprofiled(HOW_ASYNC, rank, function, args, None, timeout)
            return future
        finally:
            set_thread_context(before)

    def ask(self, rank: int, function: Any, args: tuple, timeout: float) -> Any:
        """As ``call``, and return the answer; ``interrupt`` ends it early."""
        before = set_thread_context(0)
        try:
            return self._runtime.rpc_unprofiled(HOW_SYNC, rank, function, args, None, timeout)
        finally:
            set_thread_context(before)

    def interrupt(self, thread: int, error: BaseException, is_meant: Callable[[], bool]) -> None:
        """End what a thread asks, while ``is_meant()``."""
        self._runtime.interrupt(thread, error, is_meant)

    def wait_aside(self, lock: Any, timeout_s: float) -> bool:
        """Acquire a lock that another thread releases; False when it does not in time. Negative: wait for ever."""
        got: bool = self._runtime.wait_aside(lock, timeout_s)
        return got

    @property
    def default_timeout_s(self) -> float:
        """Seconds that calls have by default; 0: for ever."""
        timeout: float = self._runtime.default_timeout_s
        return timeout


def current_contexts() -> Contexts:
    """Return the contexts of the current runtime.

    Raises
    ------
    UsageError
        There is none.
    """
    runtime = current_wiring()
    if runtime is None or runtime.autograd is None:
        raise UsageError("Need to initialize distributed autograd using torch.distributed.autograd.init()")
    runtime.check_process()
    contexts: Contexts = runtime.autograd
    return contexts
