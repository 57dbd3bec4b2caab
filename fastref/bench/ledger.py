"""Destructors seen from another process: how many have run and when the last one did, in memory that both map."""

from __future__ import annotations

import mmap
import os
import struct
import time
from functools import lru_cache

from fastref.errors import CallTimeout

__all__ = ["Ledger", "record"]

_ENTRY = struct.Struct("=QQ")  # count, nanoseconds of the system-wide monotonic clock
POLL_S = 50e-6
TIMEOUT_S = 10.0


class Ledger:
    """What destructors write down; the process that made it reads it.

    The memory goes with the process: no name is left behind.
    """

    def __init__(self) -> None:
        self._descriptor = os.memfd_create("fastref-bench-ledger")
        os.ftruncate(self._descriptor, _ENTRY.size)
        self._memory = mmap.mmap(self._descriptor, _ENTRY.size)
        self.path = f"/proc/{os.getpid()}/fd/{self._descriptor}"  # for `record`, in any process of this user

    @property
    def count(self) -> int:
        """How many destructors have run."""
        return int(_ENTRY.unpack_from(self._memory)[0])

    def wait(self, count: int) -> int:
        """Wait until ``count`` destructors have run; return when the last one did, as ``perf_counter_ns`` counts.

        Raises
        ------
        CallTimeout
            They have not after ten seconds.
        """
        deadline = time.monotonic() + TIMEOUT_S
        while self.count < count:
            if time.monotonic() > deadline:
                raise CallTimeout(f"a destructor did not run within {TIMEOUT_S:g} s", "")
            time.sleep(POLL_S)
        return int(_ENTRY.unpack_from(self._memory)[1])

    def close(self) -> None:
        """Give the memory back."""
        self._memory.close()
        os.close(self._descriptor)


def record(path: str) -> None:
    """Write down that a destructor runs now. One process writes into one ledger."""
    memory = _opened(path)
    count, _ = _ENTRY.unpack_from(memory)
    _ENTRY.pack_into(memory, 0, count, time.perf_counter_ns())  # whoever sees the count sees its time
    _ENTRY.pack_into(memory, 0, count + 1, _ENTRY.unpack_from(memory)[1])


@lru_cache
def _opened(path: str) -> mmap.mmap:
    with open(path, "r+b") as file:
        return mmap.mmap(file.fileno(), _ENTRY.size)
