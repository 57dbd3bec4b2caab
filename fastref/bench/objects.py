"""The same work for every library with objects in other processes: made, called, sent tensors, passed, let go of."""

from __future__ import annotations

import time
from collections.abc import Callable
from types import ModuleType
from typing import Any, Protocol

import torch

from fastref.bench import work
from fastref.bench.caller import CALLEE, THIRD, check_count, rate_of
from fastref.bench.ledger import Ledger
from fastref.bench.timing import Effort, Summary, sample_each, time_apart, time_each
from fastref.errors import FastrefError

__all__ = ["OBJECT_ROWS", "ObjectCaller", "Peer", "RpcPeer"]

WINDOW = 200  # calls in flight: a library without batches takes a while for more


class Peer(Protocol):
    """One library, used the way its documentation says, from the process that measures.

    What ``create`` returns, a *thing*, refers to a ``work.Thing`` in another process.
    """

    def create(self, ledger: str) -> Any:
        """Make a ``work.Thing(ledger)`` in another process."""

    def touch(self, thing: Any) -> None:
        """Call its empty method and wait for the answer."""

    def touches(self, thing: Any) -> int:
        """Return how often a method of it was called, this call included."""

    def touch_many(self, thing: Any, count: int) -> None:
        """Call its empty method so many times, many calls in flight where the library can, and wait for all."""

    def echo(self, thing: Any, tensor: torch.Tensor) -> torch.Tensor:
        """Send a tensor and get it back."""

    def fetcher(self, thing: Any) -> Callable[[], torch.Tensor]:
        """Return what brings the tensor that it holds."""

    def pass_on(self, thing: Any) -> None:
        """Give a third process the reference, which calls the empty method; wait for that."""

    def release(self, thing: Any) -> None:
        """Let go of it, so that it is destroyed; need not wait."""


class ObjectCaller:
    """The rows that are measured over any ``Peer``.

    Parameters
    ----------
    peer : Peer
        The library, joined already.
    """

    def __init__(self, peer: Peer) -> None:
        self._peer = peer
        self._ledger = Ledger()

    def exercise(self, effort: Effort) -> None:
        """Call a method again and again."""
        thing = self._peer.create(self._ledger.path)
        self._peer.touch_many(thing, effort.exercise_calls)
        self._peer.release(thing)

    def object_create(self, effort: Effort) -> Summary:
        """Microseconds until an object was made in another process and a method of it has answered."""
        peer, path = self._peer, self._ledger.path

        def create() -> Any:
            thing = peer.create(path)
            peer.touch(thing)
            return [thing]

        return time_apart(create, effort, after=lambda created: peer.release(created.pop()))

    def object_call(self, effort: Effort) -> Summary:
        """Microseconds for an empty method of an object in another process."""
        thing = self._peer.create(self._ledger.path)
        before = self._peer.touches(thing)
        summary = time_each(lambda: self._peer.touch(thing), effort)
        check_count(summary.operations, self._peer.touches(thing) - before - 1)
        self._peer.release(thing)
        return summary

    def object_rate(self, effort: Effort) -> Summary:
        """Empty methods per second."""
        thing = self._peer.create(self._ledger.path)
        before = self._peer.touches(thing)
        summary = rate_of(lambda: self._peer.touch_many(thing, WINDOW), WINDOW, effort)
        check_count(summary.operations, self._peer.touches(thing) - before - 1)
        self._peer.release(thing)
        return summary

    def object_echo_1k(self, effort: Effort) -> Summary:
        """Microseconds for a method that gets a tensor of 1 KiB and returns it."""
        return self._object_echo(1 << 10, effort)

    def object_echo_64k(self, effort: Effort) -> Summary:
        """Microseconds for the same with 64 KiB."""
        return self._object_echo(1 << 16, effort)

    def object_echo_1m(self, effort: Effort) -> Summary:
        """Microseconds for the same with 1 MiB."""
        return self._object_echo(1 << 20, effort)

    def object_echo_16m(self, effort: Effort) -> Summary:
        """Microseconds for the same with 16 MiB."""
        return self._object_echo(1 << 24, effort)

    def object_fetch_1m(self, effort: Effort) -> Summary:
        """Microseconds until a tensor of 1 MiB that another process holds is here, and dropped."""
        thing = self._peer.create(self._ledger.path)
        fetch = self._peer.fetcher(thing)
        summary = time_each(fetch, effort)
        count = work.FETCHED_BYTES // 4
        if (total := float(fetch().sum())) != count:
            raise FastrefError(f"the sum of {count} fetched ones came to {total}")
        self._peer.release(thing)
        return summary

    def object_pass(self, effort: Effort) -> Summary:
        """Microseconds until a third process has got a reference and called a method through it."""
        thing = self._peer.create(self._ledger.path)
        before = self._peer.touches(thing)
        summary = time_each(lambda: self._peer.pass_on(thing), effort)
        check_count(summary.operations, self._peer.touches(thing) - before - 1)
        self._peer.release(thing)
        return summary

    def object_release(self, effort: Effort) -> Summary:
        """Microseconds from letting go of an object until its destructor runs."""
        # Objects of the other rows may still end: a ledger of its own.
        ledger = Ledger()

        def sample() -> float:
            count = ledger.count
            things = [self._peer.create(ledger.path)]
            self._peer.touch(things[0])
            began = time.perf_counter_ns()
            self._peer.release(things.pop())
            return (ledger.wait(count + 1) - began) / 1e3

        summary = sample_each(sample, effort)
        check_count(summary.operations, ledger.count)
        ledger.close()
        return summary

    def _object_echo(self, size_bytes: int, effort: Effort) -> Summary:
        thing = self._peer.create(self._ledger.path)
        tensor = torch.arange(size_bytes // 4, dtype=torch.int32)
        summary = time_each(lambda: self._peer.echo(thing, tensor), effort)
        if not torch.equal(self._peer.echo(thing, tensor), tensor):
            raise FastrefError(f"a tensor of {size_bytes} bytes did not come back as it was sent")
        self._peer.release(thing)
        return summary


OBJECT_ROWS = frozenset(name for name in vars(ObjectCaller) if name.startswith("object_"))


class RpcPeer:
    """torch's RPC, or any module with its names.

    Parameters
    ----------
    rpc : module
        Joined already as worker 0 of 3.
    """

    def __init__(self, rpc: ModuleType) -> None:
        self._rpc = rpc

    def create(self, ledger: str) -> Any:
        return self._rpc.remote(CALLEE, work.Thing, (ledger,))

    def touch(self, thing: Any) -> None:
        thing.rpc_sync().touch()

    def touches(self, thing: Any) -> int:
        return int(thing.rpc_sync().touches())

    def touch_many(self, thing: Any, count: int) -> None:
        torch.futures.wait_all([thing.rpc_async().touch() for _ in range(count)])

    def echo(self, thing: Any, tensor: torch.Tensor) -> torch.Tensor:
        return thing.rpc_sync().echo(tensor)  # type: ignore[no-any-return]

    def fetcher(self, thing: Any) -> Callable[[], torch.Tensor]:
        return self._rpc.remote(CALLEE, work.ones, (work.FETCHED_BYTES // 4,)).to_here  # type: ignore[no-any-return]

    def pass_on(self, thing: Any) -> None:
        self._rpc.rpc_sync(THIRD, work.touch_through, (thing,))

    def release(self, thing: Any) -> None:
        """Nothing to say: the reference ends with the last variable that holds it."""
