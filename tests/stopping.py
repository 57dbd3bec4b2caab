"""Stop a process by SIGSTOP, and know that it has stopped: the call that sends the signal does not wait for that."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

__all__ = ["stop", "stopped"]


def stop(pid: int) -> None:
    """Stop a process; return when every thread of it has stopped."""
    os.kill(pid, signal.SIGSTOP)
    while _states(pid) - set("TtZX"):
        time.sleep(0.001)


@contextlib.contextmanager
def stopped(pid: int) -> Iterator[None]:
    """Have a process stopped, and let it go on afterwards."""
    try:
        stop(pid)
        yield
    finally:
        os.kill(pid, signal.SIGCONT)


def _states(pid: int) -> set[str]:
    states = set()
    for thread in Path(f"/proc/{pid}/task").glob("*/stat"):
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):  # it has ended meanwhile
            states.add(thread.read_text().rpartition(")")[2].split()[0])
    return states
