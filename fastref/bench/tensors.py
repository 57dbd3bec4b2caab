"""What worker 0 measures with large tensors: sent, fetched, read, published, and with an owner that is busy."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch

from fastref.bench import work
from fastref.bench.caller import CALLEE, PAUSE_S, THIRD, Caller, worker_name
from fastref.bench.timing import Effort, Summary, summarize, time_apart, time_each
from fastref.errors import FastrefError

__all__ = ["LARGE_BYTES", "PUBLISHED_BYTES", "READERS", "TensorCaller"]

LARGE_BYTES = 128 << 20
PUBLISHED_BYTES = 4 << 20
READERS = 8
ELEMENT_BYTES = 4  # all tensors are float32


class TensorCaller(Caller):
    """The measurements with tensors, over the same modules; what was fetched is looked at, not only counted."""

    def send_first(self, effort: Effort) -> Summary:
        """Microseconds for the first tensor of 128 MiB that this process sends, summed where it arrives."""
        send = self._sending(torch.ones(LARGE_BYTES // ELEMENT_BYTES))
        began = time.perf_counter()
        send()
        return summarize([(time.perf_counter() - began) * 1e6])

    def send_128m(self, effort: Effort) -> Summary:
        """Microseconds for a call that sends a tensor of 128 MiB and sums it there."""
        return time_each(self._sending(torch.ones(LARGE_BYTES // ELEMENT_BYTES)), effort)

    def onward_16m(self, effort: Effort) -> Summary:
        """Microseconds for a tensor of 16 MiB to a worker that hands it on to another, where it is summed."""
        tensor = torch.ones((1 << 24) // ELEMENT_BYTES)

        def send() -> None:
            total = self._rpc.rpc_sync(CALLEE, work.total_at, (self._rpc.__name__, THIRD, tensor))
            if total != tensor.numel():
                raise FastrefError(f"a sum of {tensor.numel()} ones came to {total}")

        return time_each(send, effort)

    def drop_1k(self, effort: Effort) -> Summary:
        """Microseconds for ``to_here`` of a tensor of 1 KiB that only the reference holds, and letting go of it."""
        return time_each(self._fetching(1 << 10), effort)

    def drop_64k(self, effort: Effort) -> Summary:
        """Microseconds for the same with 64 KiB."""
        return time_each(self._fetching(1 << 16), effort)

    def drop_1m(self, effort: Effort) -> Summary:
        """Microseconds for the same with 1 MiB."""
        return time_each(self._fetching(1 << 20), effort)

    def drop_16m(self, effort: Effort) -> Summary:
        """Microseconds for the same with 16 MiB."""
        return time_each(self._fetching(1 << 24), effort)

    def drop_128m(self, effort: Effort) -> Summary:
        """Microseconds for the same with 128 MiB."""
        return time_each(self._fetching(LARGE_BYTES), effort)

    def drop_1m_asleep(self, effort: Effort) -> Summary:
        """Microseconds for the same with 1 MiB when the owner has gone to sleep before each."""
        fetch = self._fetching(1 << 20)

        def fetch_and_drop() -> None:
            fetch()

        return time_apart(fetch_and_drop, effort, before=partial(time.sleep, PAUSE_S))

    def read_1m(self, effort: Effort) -> Summary:
        """Microseconds for ``to_here`` of 1 MiB, the sum of its elements, and letting go of it."""
        fetch = self._fetching(1 << 20)
        return time_each(lambda: fetch().sum(), effort)

    def read_128m(self, effort: Effort) -> Summary:
        """Microseconds for the same with 128 MiB."""
        fetch = self._fetching(LARGE_BYTES)
        return time_each(lambda: fetch().sum(), effort)

    def usable_1m(self, effort: Effort) -> Summary:
        """Microseconds for ``to_here`` of 1 MiB; letting go of it is off the clock."""
        return time_apart(self._fetching(1 << 20), effort)

    def usable_128m(self, effort: Effort) -> Summary:
        """Microseconds for the same with 128 MiB."""
        return time_apart(self._fetching(LARGE_BYTES), effort)

    def busy_int(self, effort: Effort) -> Summary:
        """Microseconds for ``to_here`` of an int while a thread of its owner computes in Python."""
        reference = self._rpc.remote(CALLEE, work.answer)
        reference.to_here()
        with self._computing():
            return time_each(reference.to_here, effort)

    def busy_1m(self, effort: Effort) -> Summary:
        """Microseconds for the same with a tensor of 1 MiB."""
        fetch = self._fetching(1 << 20)
        with self._computing():
            return time_each(fetch, effort)

    def publish(self, effort: Effort) -> Summary:
        """Microseconds from a new version of 4 MiB until all of eight readers have fetched and looked at it.

        Where references have ``publish``, the owner publishes the version; elsewhere ``to_here`` asks it for the
        present one.
        """
        rpc = self._rpc
        readers = [worker_name(rank) for rank in range(1, READERS + 1)]
        tensor = torch.zeros(PUBLISHED_BYTES // ELEMENT_BYTES)
        reference = rpc.RRef(tensor)
        announce: Callable[[], object] = getattr(reference, "publish", lambda: None)
        for reader in readers:
            rpc.rpc_sync(reader, work.keep, (reference,))
        version = 0

        def write() -> None:
            nonlocal version
            version += 1
            tensor.fill_(version)

        def give_out() -> list[bool]:
            announce()
            return torch.futures.wait_all([rpc.rpc_async(reader, work.read_version, (version,)) for reader in readers])

        def check(seen: list[bool]) -> None:
            if not all(seen):
                raise FastrefError(f"{seen.count(False)} of {READERS} readers did not get version {version} whole")

        return time_apart(give_out, effort, before=write, after=check)

    def _sending(self, tensor: torch.Tensor) -> Callable[[], None]:
        def send() -> None:
            total = self._rpc.rpc_sync(CALLEE, work.total, (tensor,))
            if total != tensor.numel():
                raise FastrefError(f"a sum of {tensor.numel()} ones came to {total}")

        return send

    def _fetching(self, size_bytes: int) -> Callable[[], Any]:
        count = size_bytes // ELEMENT_BYTES
        fetch: Callable[[], Any] = self._rpc.remote(CALLEE, work.ones, (count,)).to_here
        fetched = fetch()
        if (total := float(fetched.sum())) != count:
            raise FastrefError(f"the sum of {count} fetched ones came to {total}")
        return fetch

    @contextmanager
    def _computing(self) -> Iterator[None]:
        self._rpc.rpc_sync(CALLEE, work.start_computing)
        try:
            yield
        finally:
            self._rpc.rpc_sync(CALLEE, work.stop_computing)
