"""What the test process holds of the system, so that a test that leaves something behind fails."""

from __future__ import annotations

import contextlib
import gc
import multiprocessing
import os
import threading
import time
from collections import Counter
from pathlib import Path

import psutil

__all__ = ["Holdings", "take_holdings", "wait_for_return"]

Holdings = Counter[str]

SHARED_MEMORY = Path("/dev/shm")
DESCRIPTOR_KINDS = ("/memfd:", "socket:", "anon_inode:[pidfd]")
# Servers of the standard library: one of each for the whole session, on purpose.
SESSION_SERVERS = ("from multiprocessing.forkserver import main", "from multiprocessing.resource_tracker import main")


def take_holdings() -> Holdings:
    """Count what would be a leak if it were still here after the test: each thing by a line that describes it."""
    return Counter([*_files(), *_processes(), *_threads(), *_descriptors()])


def wait_for_return(before: Holdings, patience_s: float = 2.0) -> list[str]:
    """Return what is here and was not ``before``, once it has had ``patience_s`` to go away.

    Processes that end, and what they held, go in their own time; cycles go when they are collected.
    """
    deadline = time.monotonic() + patience_s
    while left := take_holdings() - before:
        if time.monotonic() > deadline:
            break
        gc.collect()
        time.sleep(0.02)
    return sorted(left.elements())


def _files() -> list[str]:
    run_directory = Path(os.environ["FASTREF_RUN_DIR"])
    files = [*SHARED_MEMORY.glob("fastref*"), *run_directory.rglob("*")]
    return [f"file {path}" for path in files]


def _processes() -> list[str]:
    multiprocessing.active_children()  # collects those that have ended
    found = []
    me = psutil.Process()
    for child in me.children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess, psutil.ZombieProcess):
            command = " ".join(child.cmdline())
            # A forkserver's own children have its command line, but not its parent.
            if child.ppid() != me.pid or not any(server in command for server in SESSION_SERVERS):
                found.append(f"process {child.pid} {command[:120]}")
    return found


def _threads() -> list[str]:
    names = {thread.native_id: thread.name for thread in threading.enumerate()}
    for task in Path("/proc/self/task").iterdir():
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            names.setdefault(int(task.name), (task / "comm").read_text().strip())
    return [f"thread {tid} {name}" for tid, name in names.items() if name.startswith("fastref-")]


def _descriptors() -> list[str]:
    targets = []
    for descriptor in Path("/proc/self/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):
            targets.append(os.readlink(descriptor))
    return [f"descriptor {target}" for target in targets if target.startswith(DESCRIPTOR_KINDS)]
