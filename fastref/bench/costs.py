"""What another process costs the machine, read from /proc and its clock."""

from __future__ import annotations

import os
import time
from pathlib import Path

from fastref.errors import FastrefError

__all__ = ["cpu_seconds", "descriptor_count", "memory_bytes", "thread_count"]

CPUCLOCK_SCHED = 2  # <linux/posix-timers.h>: the scheduler's own sum, in nanoseconds


def cpu_seconds(pid: int) -> float:
    """Return the CPU time that all threads of a process have used, ended ones included, to the nanosecond.

    Source: ``clock_getcpuclockid(3)``, whose encoding of a pid as a clock this is. The figures in
    ``/proc/<pid>/stat`` come in ticks of 10 ms, too coarse for an idle process.
    """
    return time.clock_gettime((~pid << 3) | CPUCLOCK_SCHED)


def thread_count(pid: int) -> int:
    """Return how many threads a process has, the main one included."""
    return len(os.listdir(f"/proc/{pid}/task"))


def descriptor_count(pid: int) -> int:
    """Return how many descriptors a process has open."""
    return len(os.listdir(f"/proc/{pid}/fd"))


def memory_bytes(pid: int) -> int:
    """Return the proportional set size: what is mapped and present, each shared page divided by its sharers.

    Raises
    ------
    FastrefError
        When the kernel does not tell.
    """
    for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
        if line.startswith("Pss:"):
            return int(line.split()[1]) * 1024
    raise FastrefError(f"/proc/{pid}/smaps_rollup has no line 'Pss:'")
