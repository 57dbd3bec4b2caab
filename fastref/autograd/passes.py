"""Backward passes: find out what the roots reach on all workers, let gradients travel, wait until all are there."""

from __future__ import annotations

import contextlib
import copy
import functools
import threading
import time
from collections.abc import Sequence
from typing import Any

import torch
from torch.autograd.graph import get_gradient_edge
from torch.autograd.profiler import record_function

from fastref.autograd.contexts import Contexts, current_contexts
from fastref.autograd.record import DistAutogradContext
from fastref.autograd.share import ROOTS, Gradients
from fastref.autograd.torch_names import is_profiled
from fastref.codec.registry import register
from fastref.errors import BackwardError, CallTimeout, PeerError, RemoteError, UsageError
from fastref.futures import Future
from fastref.rref import current_wiring

__all__ = ["backward"]


def backward(
    context_id: int,
    roots: Sequence[torch.Tensor],
    retain_graph: bool = False,
    *,
    all_sent_is_used: bool = False,
    timeout: float = -1.0,
) -> None:
    """Run the backward pass from ``roots`` through all workers; gradients accumulate in the context.

    Parameters
    ----------
    context_id : int
        What ``context()`` gave.
    roots : list of torch.Tensor
        Each of one element.
    retain_graph : bool
        Keep what the pass needs, for another one.
    all_sent_is_used : bool
        The program promises that every tensor that wanted gradients and went to another worker in this context is part
        of what the roots were made of: then the workers need not find out. If one is not the pass ends by its timeout.
    timeout : float
        Seconds for the pass; -1: the default of calls, 0: for ever.

    Raises
    ------
    UsageError
        There is no such context, or a root is not of one element and made by something that wants gradients.
    BackwardError
        A function of the graph raised, on any worker, or the context was released meanwhile.
    WorkerDied, CallTimeout
        A worker that takes part died, or it took too long.

    Source
    ------
    ``torch.distributed.autograd.backward``. Different on purpose: it ends whether everything that was sent is used or
    not (the "smart mode" of its design), and when it fails it does on all workers.
    """
    if not _are_arguments(context_id, roots):
        raise TypeError(
            "backward(): incompatible function arguments. The following argument types are supported: (context_id: int,"
            f" roots: List[Tensor], retain_graph: bool = False); invoked with: {context_id!r}, {roots!r}"
        )
    contexts = current_contexts()
    context = contexts.retrieve(context_id)
    edges = [_edge_of(root) for root in roots]
    if not edges:
        raise UsageError("No tensors provided for gradient computation.")
    one_pass = _Pass(contexts, context, bool(retain_graph), timeout)
    ones = [_one(root) for root in roots]
    if not is_profiled():
        one_pass.run(edges, ones, all_sent_is_used)
        return
    with record_function("torch::distributed::autograd::backward"):
        one_pass.run(edges, ones, all_sent_is_used)


def _are_arguments(context_id: Any, roots: Any) -> bool:
    return (
        isinstance(context_id, int)
        and isinstance(roots, Sequence)
        and all(isinstance(root, torch.Tensor) for root in roots)
    )


def _edge_of(root: torch.Tensor) -> tuple[Any, int]:
    if not root.requires_grad:
        raise UsageError("requires_grad not set on root")
    if root.numel() != 1:
        raise UsageError(f"{root.shape} is not a scalar, all roots need to be scalar")
    if root.grad_fn is None:
        raise UsageError(f"{root.shape} does not have a valid gradient function.")
    edge = get_gradient_edge(root)
    return edge.node, edge.output_nr


def _one(root: torch.Tensor) -> torch.Tensor:
    return torch.ones_like(root, memory_format=torch.contiguous_format, requires_grad=False)


class _Pass:
    """One pass, on the worker that runs it."""

    def __init__(self, contexts: Contexts, context: DistAutogradContext, keep: bool, timeout: float) -> None:
        self._contexts, self._context, self._keep = contexts, context, keep
        self._id = context._context_id()
        self.key = contexts.next_pass()
        timeout_s = contexts.default_timeout_s if timeout == -1.0 else timeout
        self._deadline_s = time.monotonic() + timeout_s if timeout_s else 0.0
        self._timeout_s = timeout_s
        self._share = contexts.share(self._id, self.key, keep)
        self._others: list[int] = []
        self._found: set[tuple[int, int]] = set()  # (rank, link) of all that is used
        self._pending: list[Future] = []
        self._asking = 0  # the thread that asks the only other worker, while it does

    def run(self, edges: list[tuple[Any, int]], ones: list[torch.Tensor], all_used: bool) -> None:
        share, origin = self._share, None
        try:
            share.when_failed = self._fail
            if all_used:
                share.explore(None)
            found = share.begin(edges)
            share.held_back = {}
            gradients: Gradients = [(ROOTS, list(ones))]
            ones.clear()
            if not all_used and self._is_of_one_other(found):
                found, gradients = self._ask_the_other(found, gradients)
            self._explore(found, all_used)
            share.take(gradients)
            first, share.held_back = share.held_back, None
            share.close()
            self._wait([self._call(rank, take_part, first.pop(rank, [])) for rank in list(self._others)])
        except BaseException as error:
            self._give_up(error)
            origin = _of_origin(error)
            if origin is error:
                del origin  # it remembers this frame
                raise
        finally:
            self._context.shares.pop(self.key, None)
            share.when_failed = None
            self._pending.clear()
        if origin is not None:  # out here, so that it does not refer to what it is the cause of
            try:
                raise origin
            finally:
                del origin

    def _call(self, rank: int, function: Any, *arguments: Any) -> Future:
        future = self._contexts.call(rank, function, (self._id, self.key, *arguments), self._left_s())
        self._pending.append(future)
        return future

    def _left_s(self) -> float:
        if not self._deadline_s:
            return 0.0
        return max(self._deadline_s - time.monotonic(), 1e-6)

    # ---- when one other worker is all that the roots reach

    def _is_of_one_other(self, found: list[tuple[int, int]]) -> bool:
        """Whether the roots reach one other worker, and nothing that gradients of what was sent from here reach."""
        ranks = {rank for rank, _ in found}
        return len(ranks) == 1 and self._contexts.rank not in ranks and self._share.is_apart()

    def _ask_the_other(
        self, found: list[tuple[int, int]], gradients: Gradients
    ) -> tuple[list[tuple[int, int]], Gradients]:
        """Run what the roots reach here, and have the other worker find out what is used and do its share, by one call.

        Returns
        -------
        found, gradients
            What the other has found here, and its gradients: none if it could not do its share yet.
        """
        share, (rank, _) = self._share, found[0]
        share.is_open = True  # more may come
        share.take(gradients)
        assert share.held_back is not None
        first = share.held_back.pop(rank, [])
        self._others.append(rank)
        share.check()
        arguments = (self._id, self.key, self._keep, [link for _, link in found], first)
        self._asking = threading.get_ident()
        try:
            share.check()  # once more: from here on it is interrupted when it fails
            is_done, answer = self._contexts.ask(rank, explore_and_run, arguments, self._left_s())
        finally:
            self._asking = 0
        if not is_done:
            return answer, []
        self._others.remove(rank)
        self._found.update(found)
        return [(self._contexts.rank, link) for link, _ in answer], answer

    # ---- which workers, and what of their graphs

    def _explore(self, found: list[tuple[int, int]], all_used: bool) -> None:
        """Ask worker by worker, in waves, until nothing new is reached."""
        share, own = self._share, self._contexts.rank
        if all_used:
            found = [(rank, 0) for rank in {node.rank for node in self._context.receives.values()} - {own}]
        while found:
            wave: dict[int, list[int]] = {}
            for rank, link in found:
                if (rank, link) not in self._found:
                    self._found.add((rank, link))
                    wave.setdefault(rank, []).append(link)
            found = []
            here = wave.pop(own, None)
            self._others += [rank for rank in wave if rank not in self._others]
            futures = [
                self._call(rank, explore, self._keep, None if all_used else links) for rank, links in wave.items()
            ]
            if here is not None and not all_used:
                found += share.explore(here)
            for future in futures:
                found += future.wait()

    # ---- the end

    def _wait(self, futures: list[Future]) -> None:
        """Wait until all shares are done, or one has failed: no other one may be able to go on then."""
        for future in futures if len(futures) > 1 else ():
            future.add_done_callback(self._look)
        for future in futures:
            future.wait()
        share = self._share
        if not share.is_over and not self._contexts.wait_aside(share.over, self._left_s() or -1.0):
            raise CallTimeout(
                f"RPCErr:1:RPC ran for more than set timeout ({self._timeout_s * 1000:.0f} ms) and will now be marked"
                f" with an error: a backward pass in autograd context {self._id}"
            )
        share.check()

    def _look(self, future: Any) -> None:
        """A worker has done its share, or it has failed there."""
        try:
            future.value()
        except Exception as error:
            self._fail(error.with_traceback(None))  # which holds this frame

    def _fail(self, error: BaseException) -> None:
        """A share has failed: nobody need wait for another."""
        if self._asking:
            self._contexts.interrupt(self._asking, copy.copy(error), lambda: bool(self._asking))
        for other in list(self._pending):
            other._pending.give_up(error)
        self._share.fail(error)

    def _give_up(self, error: BaseException) -> None:
        """End the pass on all workers."""
        others, self._others = self._others, []
        self._share.fail(BackwardError(f"a backward pass has been given up: {error}"))  # a new one, without frames
        for rank in others:
            with contextlib.suppress(PeerError):  # it has ended with its worker
                self._contexts.call(rank, give_up, (self._id, self.key, str(error)))


def _of_origin(error: BaseException) -> BaseException:
    """Return what ended a pass, without the way on which it came here but for a note of it."""
    cause = error.__cause__
    if not isinstance(error, RemoteError) or not isinstance(cause, BackwardError | PeerError):
        return error
    cause = copy.copy(cause)  # a future keeps the other one, and must not come to hold who raises it
    if not getattr(cause, "__notes__", None):
        cause.add_note(error.remote_traceback)
    return cause


# ---- on the other workers


@register
def explore(context_id: int, key: tuple[int, int], keep: bool, links: list[int] | None) -> list[tuple[int, int]]:
    """Find out what a pass reaches behind tensors that were sent; behind all that were by None.

    Returns
    -------
    list of (rank, link)
        What was received from whom, of all that is reached; of all that was received by None, once for each worker.
    """
    contexts = current_contexts()
    share = contexts.share(context_id, key, keep)
    found = share.explore(links)
    if links is None:
        return [(node.rank, 0) for node in list(contexts.retrieve(context_id).receives.values())]
    return found


@register
def explore_and_run(
    context_id: int, key: tuple[int, int], keep: bool, links: list[int], gradients: Gradients
) -> tuple[bool, Any]:
    """As ``explore``, of the only other worker that the roots of a pass reach.

    Returns
    -------
    is_done : bool
        This worker has sent nothing else, and reaches nobody but who asks: so it has done its share.
    answer : list
        The gradients of the asking worker's tensors; else what ``explore`` returns.
    """
    contexts = current_contexts()
    share = contexts.share(context_id, key, keep)
    found = share.explore(links)
    if not share.knows_all() or any(rank != key[0] for rank, _ in found):
        share.put(gradients)
        return False, found
    share.held_back = {}
    share.take(gradients)
    contexts.retrieve(context_id).shares.pop(key, None)
    share.check()
    return True, share.held_back.get(key[0], [])


@register
def take_part(context_id: int, key: tuple[int, int], gradients: Gradients) -> Future:
    """Take the first gradients, which came with this call; the answer comes when the share in the pass is done."""
    contexts = current_contexts()
    share = contexts.share(context_id, key)
    share.take(gradients)
    share.outcome.add_done_callback(functools.partial(_forget, context_id, key))
    return share.outcome


take_part._wrapped_async_rpc_function = take_part  # type: ignore[attr-defined]  # as `async_execution` does


def _forget(context_id: int, key: tuple[int, int], _: Any) -> None:
    contexts = current_wiring().autograd
    context = contexts._contexts.get(context_id)
    if context is not None:
        context.shares.pop(key, None)


@register
def give_up(context_id: int, key: tuple[int, int], why: str) -> None:
    """The pass has ended with an error."""
    current_contexts().end_share(context_id, key, BackwardError(f"a backward pass has been given up: {why}"))
