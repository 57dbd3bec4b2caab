"""Destructors seen from another process: how many have run and when the last one did, in memory that both reach."""

from __future__ import annotations

import os
import struct
import time
import weakref

from fastref.errors import CallTimeout

__all__ = ["Ledger", "record"]

_ENTRY = struct.Struct("=QQ")  # count, nanoseconds of the system-wide monotonic clock
_NAME = "fastref-bench-ledger"
POLL_S = 50e-6
TIMEOUT_S = 10.0


class Ledger:
    """What destructors write down; the process that made it reads it, and it goes with that process."""

    def __init__(self) -> None:
        self._descriptor = os.memfd_create(_NAME)
        os.pwrite(self._descriptor, bytes(_ENTRY.size), 0)
        self.path = f"/proc/{os.getpid()}/fd/{self._descriptor}"  # for `record`, in any process of this user
        self.close = weakref.finalize(self, os.close, self._descriptor)

    @property
    def count(self) -> int:
        """How many destructors have run."""
        return self._read()[0]

    def wait(self, count: int) -> int:
        """Wait until ``count`` destructors have run; return when the last one did, as ``perf_counter_ns`` counts.

        Raises
        ------
        CallTimeout
            They have not after ten seconds.
        """
        deadline = time.monotonic() + TIMEOUT_S
        while (entry := self._read())[0] < count:
            if time.monotonic() > deadline:
                raise CallTimeout(f"a destructor did not run within {TIMEOUT_S:g} s", "")
            time.sleep(POLL_S)
        return entry[1]

    def _read(self) -> tuple[int, int]:
        count, when = _ENTRY.unpack(os.pread(self._descriptor, _ENTRY.size, 0))
        return count, when


def record(path: str) -> None:
    """Write down that a destructor runs now. One process at a time writes into one ledger."""
    now = time.perf_counter_ns()
    try:
        if _NAME not in os.readlink(path):
            return  # another file has the number now
        descriptor = os.open(path, os.O_RDWR)
    except (FileNotFoundError, ProcessLookupError):
        return  # who wanted to know has ended
    try:
        count, _ = _ENTRY.unpack(os.pread(descriptor, _ENTRY.size, 0))
        os.pwrite(descriptor, _ENTRY.pack(count + 1, now), 0)
    finally:
        os.close(descriptor)
