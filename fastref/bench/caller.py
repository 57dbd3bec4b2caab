"""What worker 0 measures: one method for each row that is a call, over any module with torch's RPC names."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from types import ModuleType

import torch

from fastref.bench import work
from fastref.bench.timing import Effort, Summary, summarize, time_apart, time_each
from fastref.errors import FastrefError

__all__ = ["CALLEE", "PAUSE_S", "THIRD", "Caller", "check_count", "rate_of", "worker_name"]

# Ahead of an operation on a peer that shall sleep: longer than anybody spins.
PAUSE_S = 0.002
FETCHES_IN_FLIGHT = 100


def worker_name(rank: int) -> str:
    """Return the name of the worker with this rank."""
    return f"worker{rank}"


CALLEE = worker_name(1)
THIRD = worker_name(2)


class Caller:
    """The measurements of one worker that calls others.

    Each method takes an ``Effort`` and returns a ``Summary``, and proves by counters kept at the other end
    that every operation was done.

    Parameters
    ----------
    rpc : module
        ``torch.distributed.rpc`` or one with its names, joined already as worker 0 of 3.
    """

    def __init__(self, rpc: ModuleType) -> None:
        self._rpc = rpc

    def exercise(self, effort: Effort) -> None:
        """Call the other two workers in turn."""
        for number in range(effort.exercise_calls):
            self._rpc.rpc_sync((CALLEE, THIRD)[number % 2], work.nothing)

    def call(self, effort: Effort) -> Summary:
        """Microseconds for ``rpc_sync`` of an empty function."""
        return self._served(CALLEE, partial(self._rpc.rpc_sync, CALLEE, work.nothing), effort)

    def call_asleep(self, effort: Effort) -> Summary:
        """Microseconds for the same when nothing was going on before, so that the callee has gone to sleep."""
        operation = partial(self._rpc.rpc_sync, CALLEE, work.nothing)
        return self._served(CALLEE, operation, effort, partial(time.sleep, PAUSE_S))

    def method(self, effort: Effort) -> Summary:
        """Microseconds for an empty method called through a reference."""
        reference = self._rpc.remote(CALLEE, work.make_counter)
        before = reference.rpc_sync().touches()
        summary = time_each(lambda: reference.rpc_sync().touch(), effort)
        check_count(summary.operations, reference.rpc_sync().touches() - before - 1)
        return summary

    def remote(self, effort: Effort) -> Summary:
        """Microseconds for ``remote`` of a function that returns an int, and ``to_here`` of it."""
        rpc = self._rpc
        return self._served(CALLEE, lambda: rpc.remote(CALLEE, work.answer).to_here(), effort)

    def fetch(self, effort: Effort) -> Summary:
        """Microseconds for ``to_here`` of an int, again and again through one reference."""
        reference = self._rpc.remote(CALLEE, work.answer)
        summary = time_each(reference.to_here, effort)
        value = reference.to_here()
        if value != work.ANSWER:
            raise FastrefError(f"a fetch brought {value!r} instead of {work.ANSWER}")
        return summary

    def own(self, effort: Effort) -> Summary:
        """Microseconds for a reference to a local value to be made and dropped; nobody else is told."""
        summary = time_each(partial(self._rpc.RRef, work.ANSWER), effort)
        value = self._rpc.RRef(work.ANSWER).local_value()
        if value != work.ANSWER:
            raise FastrefError(f"a reference holds {value!r} instead of {work.ANSWER}")
        return summary

    def hand_on(self, effort: Effort) -> Summary:
        """Microseconds for a call that passes a reference to a worker that is neither owner nor caller."""
        reference = self._rpc.remote(CALLEE, work.make_counter)
        reference.rpc_sync().touch()  # the owner has it: what follows does not wait for its making
        return self._served(THIRD, partial(self._rpc.rpc_sync, THIRD, work.take, (reference,)), effort)

    def async_rate(self, effort: Effort) -> Summary:
        """Empty calls per second by ``rpc_async``, a window of them in flight at a time."""
        rpc_async, wait_all = self._rpc.rpc_async, torch.futures.wait_all

        def window() -> None:
            wait_all([rpc_async(CALLEE, work.nothing) for _ in range(effort.window)])

        return self._rate(window, effort.window, effort)

    def remote_rate(self, effort: Effort) -> Summary:
        """References made by ``remote`` and their values fetched, per second, a hundred of them at a time."""
        remote = self._rpc.remote

        def window() -> None:
            for reference in [remote(CALLEE, work.answer) for _ in range(FETCHES_IN_FLIGHT)]:
                reference.to_here()

        return self._rate(window, FETCHES_IN_FLIGHT, effort)

    def echo_1k(self, effort: Effort) -> Summary:
        """Microseconds for a call that sends a tensor of 1 KiB and gets it back."""
        return self._echo(1 << 10, effort)

    def echo_64k(self, effort: Effort) -> Summary:
        """Microseconds for a call that sends a tensor of 64 KiB and gets it back."""
        return self._echo(1 << 16, effort)

    def echo_1m(self, effort: Effort) -> Summary:
        """Microseconds for a call that sends a tensor of 1 MiB and gets it back."""
        return self._echo(1 << 20, effort)

    def echo_1m_asleep(self, effort: Effort) -> Summary:
        """Microseconds for the same when the callee has gone to sleep before each."""
        return self._echo(1 << 20, effort, partial(time.sleep, PAUSE_S))

    def _echo(self, size_bytes: int, effort: Effort, before: Callable[[], object] | None = None) -> Summary:
        tensor = torch.arange(size_bytes // 4, dtype=torch.int32)
        echo = partial(self._rpc.rpc_sync, CALLEE, work.echo, (tensor,))
        summary = self._served(CALLEE, echo, effort, before)
        if not torch.equal(echo(), tensor):
            raise FastrefError(f"a tensor of {size_bytes} bytes did not come back as it was sent")
        return summary

    def _served(
        self,
        worker: str,
        operation: Callable[[], object],
        effort: Effort,
        before: Callable[[], object] | None = None,
    ) -> Summary:
        served = self._rpc.rpc_sync(worker, work.calls_served)
        summary = time_apart(operation, effort, before=before) if before else time_each(operation, effort)
        check_count(summary.operations, self._rpc.rpc_sync(worker, work.calls_served) - served - 1)
        return summary

    def _rate(self, window: Callable[[], None], size: int, effort: Effort) -> Summary:
        before = self._rpc.rpc_sync(CALLEE, work.calls_served)
        summary = rate_of(window, size, effort)
        check_count(summary.operations, self._rpc.rpc_sync(CALLEE, work.calls_served) - before - 1)
        return summary


def rate_of(window: Callable[[], None], size: int, effort: Effort) -> Summary:
    """Return the operations per second of windows of ``size`` operations each; the first is the warm-up."""
    clock = time.perf_counter
    rates: list[float] = []
    deadline = clock() + effort.seconds
    limit = clock() + effort.seconds * effort.stretch
    while len(rates) < 2 or clock() < deadline or (len(rates) < effort.windows + 1 and clock() < limit):
        began = clock()
        window()
        rates.append(size / (clock() - began))
    return replace(summarize(rates[1:], higher_is_better=True), operations=len(rates) * size, first=rates[0])


def check_count(made: int, served: int) -> None:
    """Refuse a figure for operations that were not all done.

    Raises
    ------
    FastrefError
        The other end counted another number.
    """
    if made != served:
        raise FastrefError(f"{made} operations were timed, but the other end counted {served}")
