"""The processes of one measured run: started, driven, watched while idle, and gone at the end."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from multiprocessing import Pipe
from multiprocessing.connection import Connection, wait
from pathlib import Path
from types import TracebackType
from typing import IO, Any

import fastref.errors
from fastref.bench import child, costs
from fastref.bench.backends import BACKENDS
from fastref.bench.caller import worker_name
from fastref.bench.hosts import Hosts, two_hosts
from fastref.bench.timing import Effort, Summary, summarize
from fastref.bench.worker import Join, Leave, Load, Measure
from fastref.errors import CallTimeout, FastrefError, WorkerDied

__all__ = ["Group", "burner"]

ANSWER_TIMEOUT_S = 120.0
LEAVE_TIMEOUT_S = 20.0
CHILD_LIMIT_S = 600
BURNING_S = 0.1  # CPU time that a burning process has used when it is past its start-up
STDERR_TAIL_BYTES = 4000
# -c rather than a path as the program: Python would put the directory of that path first on sys.path.
_RUN_CHILD = ("-c", f"import runpy; runpy.run_path({child.__file__!r}, run_name='__main__')")
_IMPORT_ROOT = str(Path(fastref.errors.__file__).parents[1])


class Group:
    """Workers of one backend, each a process of its own, all ended by ``stop``.

    Start and stop it from one thread, as a context or by hand: the workers die with the thread that started
    them.

    Parameters
    ----------
    backend : str
        A key of ``BACKENDS``.
    limit_s : int
        Seconds after which the workers end themselves, whatever happens.
    workers : int, optional
        How many workers, if not the backend's own number.

    Raises
    ------
    WorkerDied, CallTimeout, FastrefError
        From every method, when a worker ends, does not answer or fails; the message ends with its stderr or
        its traceback.
    """

    def __init__(self, backend: str, limit_s: int = CHILD_LIMIT_S, workers: int | None = None) -> None:
        self._backend = BACKENDS[backend]
        self._workers = workers or self._backend.world_size
        self._limit_s = limit_s
        self._members: list[_Member] = []
        self._cleanup = ExitStack()
        self._address = ""
        self._bases: list[int] = []  # bytes, by rank

    @property
    def pids(self) -> list[int]:
        """Process ids, by rank; empty before ``start`` and after ``stop``."""
        return [member.pid for member in self._members]

    def start(self) -> None:
        """Start the processes; return when all have imported torch and the backend."""
        try:
            self._address = self._cleanup.enter_context(self._backend.address())
            hosts = self._cleanup.enter_context(two_hosts()) if self._backend.apart else Hosts()
            for rank in range(self._workers):
                member = _Member(rank, self._backend.name, self._limit_s, hosts)
                self._cleanup.callback(member.end)
                self._members.append(member)
            self._answers()
            with_torch = self._memory()
            self._ask_all("go on")
            self._ask_all(Load(self._backend.name))
            self._bases = with_torch if self._backend.import_counts else self._memory()
        except BaseException:
            self.stop()
            raise

    def join(self) -> Summary:
        """Let the workers find each other; return the seconds from the word to the last that was ready."""
        began = time.perf_counter()
        for rank, member in enumerate(self._members):
            member.send(Join(rank, self._workers, self._address))
        self._answers()
        return summarize([time.perf_counter() - began])

    def measure(self, what: str, effort: Effort) -> Any:
        """Return what one measurement of worker 0 came to (None for ``exercise``)."""
        caller, *others = self._members
        caller.send(Measure(what, effort))
        (result,) = _collect([caller], ANSWER_TIMEOUT_S + effort.seconds, watched=others)
        return result

    def memory(self) -> Summary:
        """Return MiB per worker beyond the import of torch: the median worker, and as ``p99`` the largest."""
        grown = [now - base for now, base in zip(self._memory(), self._bases, strict=True)]
        return summarize([size_bytes / (1 << 20) for size_bytes in grown])

    def idle(self, effort: Effort) -> dict[str, Summary]:
        """Watch the workers do nothing.

        Returns
        -------
        dict
            ``idle_cpu`` (percent of one core), ``idle_threads`` and ``idle_descriptors``: of the median
            worker, and as ``p99`` of the worst.
        """
        time.sleep(effort.settle_s)
        began, used = time.perf_counter(), [costs.cpu_seconds(pid) for pid in self.pids]
        time.sleep(effort.idle_s)
        elapsed = time.perf_counter() - began
        percent = [
            100 * (costs.cpu_seconds(pid) - before) / elapsed for pid, before in zip(self.pids, used, strict=True)
        ]
        return {
            "idle_cpu": summarize(percent),
            "idle_threads": summarize([costs.thread_count(pid) for pid in self.pids]),
            "idle_descriptors": summarize([costs.descriptor_count(pid) for pid in self.pids]),
        }

    def leave(self) -> None:
        """Let the workers leave in order and end by themselves."""
        for member in self._members:
            member.send(Leave())
        self._answers(LEAVE_TIMEOUT_S)
        for member in self._members:
            member.exited()

    def stop(self) -> None:
        """End every process of the group, however far it came. May be called again."""
        self._members = []
        self._cleanup.close()

    def __enter__(self) -> Group:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def _ask_all(self, request: object) -> None:
        for member in self._members:
            member.send(request)
        self._answers()

    def _answers(self, timeout_s: float = ANSWER_TIMEOUT_S) -> None:
        _collect(self._members, timeout_s)

    def _memory(self) -> list[int]:
        return [costs.memory_bytes(pid) for pid in self.pids]


class _Member:
    """The starter's end of one worker process."""

    def __init__(self, rank: int, backend: str, limit_s: int, hosts: Hosts) -> None:
        self._rank, self._name = rank, f"{backend} {worker_name(rank)}"
        self._stderr: IO[bytes] = tempfile.TemporaryFile()
        self.requests: Connection
        self.requests, theirs = Pipe()
        with theirs:
            self._process = _start_child(
                "work", limit_s, theirs.fileno(), self._stderr, hosts.commands[rank > 0], hosts.environment
            )
        self.pid = self._process.pid

    def send(self, request: object) -> None:
        """Ask for something; ``answer`` fetches the result."""
        try:
            self.requests.send(request)
        except BrokenPipeError:
            raise self._died() from None

    def answer(self) -> Any:
        """Return the result of the request sent before; waits for it."""
        try:
            status, result = self.requests.recv()
        except (EOFError, ConnectionResetError):
            raise self._died() from None
        if status == "failed":
            raise FastrefError(f"{self._name} failed:\n{result}")
        return result

    def late(self, timeout_s: float) -> CallTimeout:
        """Return the error that says that no answer came."""
        return CallTimeout(f"{self._name} did not answer within {timeout_s:g} s{self._tail()}", self._name)

    def exited(self) -> None:
        """Wait for the process to end as it should."""
        try:
            status = self._process.wait(LEAVE_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            raise CallTimeout(f"{self._name} left, but lives on after {LEAVE_TIMEOUT_S:g} s", self._name) from None
        if status != 0:
            raise self._died(f"it left in order, but ended with status {status}")

    def end(self) -> None:
        """Kill the process and those that it started, whatever they do, and reap it."""
        with suppress(ProcessLookupError):  # all of them have ended
            os.killpg(self.pid, signal.SIGKILL)
        self._process.wait()
        self.requests.close()
        self._stderr.close()

    def _died(self, how: str = "it hung up") -> WorkerDied:
        return WorkerDied(self._name, self._rank, self.pid, how + self._tail())

    def _tail(self) -> str:
        size = self._stderr.seek(0, os.SEEK_END)
        self._stderr.seek(max(0, size - STDERR_TAIL_BYTES))
        text = self._stderr.read().decode(errors="replace").strip()
        return f"; its stderr ends:\n{text}" if text else ""


def _collect(expected: list[_Member], timeout_s: float, watched: Sequence[_Member] = ()) -> list[Any]:
    """Return the answers of some members, while those and the ``watched`` ones live."""
    results: dict[_Member, Any] = {}
    deadline = time.monotonic() + timeout_s
    while left := [member for member in expected if member not in results]:
        # All at once: one that died must be noticed even when another waits for it in vain.
        by_connection = {member.requests: member for member in [*left, *watched]}
        ready = wait(list(by_connection), max(0.0, deadline - time.monotonic()))
        if not ready:
            raise left[0].late(timeout_s)
        for connection in ready:
            member = by_connection[connection]  # type: ignore[index]
            results[member] = member.answer()  # raises for one that was only watched: it hung up
    return [results[member] for member in expected]


@contextmanager
def burner(limit_s: int = CHILD_LIMIT_S) -> Iterator[int]:
    """Run a process that keeps one core busy while the context lasts; yield its pid."""
    process = _start_child("burn", limit_s)
    try:
        began, deadline = costs.cpu_seconds(process.pid), time.monotonic() + ANSWER_TIMEOUT_S
        while costs.cpu_seconds(process.pid) - began < BURNING_S:
            if process.poll() is not None or time.monotonic() > deadline:
                raise FastrefError(f"the process that should burn a core does not (pid {process.pid})")
            time.sleep(0.01)
        yield process.pid
    finally:
        process.kill()
        process.wait()


def _start_child(
    role: str,
    limit_s: int,
    fd: int | None = None,
    stderr: IO[bytes] | None = None,
    command: Sequence[str] = (),
    environment: Mapping[str, str] | None = None,
) -> subprocess.Popen[bytes]:
    search = [_IMPORT_ROOT, *filter(None, [os.environ.get("PYTHONPATH")])]
    arguments = [role, str(os.getpid()), str(limit_s), *([] if fd is None else [str(fd)])]
    return subprocess.Popen(
        [*command, sys.executable, *_RUN_CHILD, *arguments],
        env={**os.environ, **(environment or {}), "PYTHONPATH": os.pathsep.join(search)},
        stdin=subprocess.DEVNULL,
        stdout=stderr,
        stderr=stderr,
        pass_fds=() if fd is None else (fd,),
        start_new_session=True,  # Ctrl-C reaches the starter alone, which then ends them all
    )
