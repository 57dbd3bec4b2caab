"""No test hangs in silence: when one runs too long, the stacks of all its processes are shown, and it fails.

The test process guards each test with a :class:`Watchdog`. A process that a test starts calls :func:`arm` first, which
lets the watchdog ask it for its stacks, and ends it in any case after a while.
"""

from __future__ import annotations

import contextlib
import faulthandler
import os
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import IO

import psutil
import pytest

__all__ = ["Watchdog", "arm", "run_armed"]

STACKS_PATH_VARIABLE = "FASTREF_TEST_STACKS"
DUMP_SIGNAL = signal.SIGUSR2
# Tests of interrupted waits use the signals with names; this one is ours.
INTERRUPT_SIGNAL = signal.SIGRTMAX
# A child outlives the watchdog of the test that started it, so that the watchdog sees the hang whole.
CHILD_LIFETIME_S = 180.0
# Time for the children to write their stacks; formatting some hundred frames takes milliseconds.
DUMP_S = 1.0
# Time for the test to come back once its children are gone and its main thread is interrupted.
GRACE_S = 10.0
MARGIN_S = 5.0

_armed_log: IO[bytes] | None = None


def arm(lifetime_s: float = CHILD_LIFETIME_S) -> None:
    """Let the watchdog ask this process for its stacks, and end it when it is still there after ``lifetime_s``.

    Call it first thing in every process that a test starts. It starts one thread, which runs no Python.
    """
    global _armed_log
    path = os.environ.get(STACKS_PATH_VARIABLE, os.devnull)
    _armed_log = open(path, "ab", buffering=0)  # faulthandler writes to it until the process ends
    faulthandler.enable(_armed_log)
    faulthandler.register(DUMP_SIGNAL, file=_armed_log, all_threads=True)
    faulthandler.dump_traceback_later(lifetime_s, exit=True, file=_armed_log)


def run_armed(target: Callable[..., object], arguments: tuple[object, ...]) -> None:
    """Run ``target(*arguments)`` under :func:`arm`: what a process started by a fixture runs."""
    arm()
    target(*arguments)


class Watchdog:
    """Fail one test, and end its processes, when it runs longer than it may.

    Parameters
    ----------
    test : str
        Its node id, for the report.
    timeout_s : float
        How long it may run, with its fixtures.
    report_fd : int
        Descriptor that gets the report; not one that the test runner captures.
    stacks_path : Path
        File that armed processes write their stacks to.
    """

    def __init__(self, test: str, timeout_s: float, report_fd: int, stacks_path: Path) -> None:
        self._test = test
        self._timeout_s = timeout_s
        self._report_fd = report_fd
        self._stacks_path = stacks_path
        self._finished = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def start(self) -> None:
        """Start to count. Call it on the main thread."""
        self._previous_handler = signal.signal(INTERRUPT_SIGNAL, self._fail)
        # Our own thread cannot run when the test hangs with the GIL held; this one is written in C.
        last_resort_s = self._timeout_s + DUMP_S + GRACE_S + MARGIN_S
        faulthandler.dump_traceback_later(last_resort_s, exit=True, file=self._report_fd)
        self._thread.start()

    def cancel(self) -> None:
        """Stop to count: the test is over."""
        self._finished.set()
        signal.signal(INTERRUPT_SIGNAL, signal.SIG_IGN)  # a test that times out while it ends has ended
        self._thread.join()
        faulthandler.cancel_dump_traceback_later()
        signal.signal(INTERRUPT_SIGNAL, self._previous_handler)

    def _fail(self, signal_number: int, frame: object) -> None:
        pytest.fail(f"{self._test} ran longer than {self._timeout_s:g} s; the stacks are above", pytrace=True)

    def _watch(self) -> None:
        if self._finished.wait(self._timeout_s):
            return
        children = psutil.Process().children(recursive=True)
        self._report(f"\n\n+++ watchdog: {self._test} ran longer than {self._timeout_s:g} s +++\n")
        self._report_children(children)
        self._report(f"\n--- test process {os.getpid()}\n")
        faulthandler.dump_traceback(self._report_fd, all_threads=True)
        for child in children:
            with contextlib.suppress(psutil.NoSuchProcess):
                child.kill()
        signal.pthread_kill(threading.main_thread().ident, INTERRUPT_SIGNAL)
        if not self._finished.wait(GRACE_S):
            self._report(f"\n+++ watchdog: {self._test} cannot be interrupted, giving up +++\n")
            os._exit(1)

    def _report_children(self, children: list[psutil.Process]) -> None:
        offset = self._stacks_path.stat().st_size
        for child in children:
            with contextlib.suppress(psutil.NoSuchProcess):
                armed = _catches(child.pid, DUMP_SIGNAL)
                command = " ".join(child.cmdline())[:160]
                self._report(f"child {child.pid} ({child.status()}, {'armed' if armed else 'not armed'}): {command}\n")
                if armed:
                    child.send_signal(DUMP_SIGNAL)
                    # A stopped process dumps when it goes on.
                    child.send_signal(signal.SIGCONT)
        time.sleep(DUMP_S)
        with self._stacks_path.open("rb") as stacks:
            stacks.seek(offset)
            os.write(self._report_fd, stacks.read())

    def _report(self, text: str) -> None:
        os.write(self._report_fd, text.encode())


def _catches(pid: int, number: signal.Signals) -> bool:
    """Tell whether a process has a handler for a signal, which would end it otherwise."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return False
    caught = next(line for line in status.splitlines() if line.startswith("SigCgt:"))
    return bool(int(caught.split()[1], 16) >> (number - 1) & 1)
