"""What a test starts on a host of `tests.hosts`: any program, or a process that waits for orders."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from multiprocessing.connection import Connection
from multiprocessing.context import ForkServerContext
from multiprocessing.reduction import DupFd
from pathlib import Path
from typing import IO, Any, NoReturn

from tests.namespaces import run_inside
from tests.puppets import obey
from tests.watchdog import run_armed

__all__ = ["Hired", "Inside", "Program"]

ENTER = Path(__file__).with_name("enter_host.py")
PATIENCE_S = 60.0


@dataclasses.dataclass(frozen=True)
class Inside:
    """The way into a host: its first process, the kinds of its namespaces, what the environment says there."""

    pidfd: int
    kinds: int
    environment: Mapping[str, str]
    context: ForkServerContext


class Program(subprocess.Popen[bytes]):
    """A program on a host: ``wait`` and ``returncode`` as of any other, signals go to the program itself.

    ``pid`` is that of the process that stands by, ``inner_pid`` the program's own, as the test sees it.
    What it writes goes to a file, so that it never waits for a reader.
    """

    def __init__(self, inside: Inside, command: Sequence[str], environment: Mapping[str, str]) -> None:
        self._file: IO[bytes] = tempfile.TemporaryFile()
        reader, writer = os.pipe()
        with open(reader) as pid_pipe:
            try:
                super().__init__(
                    [
                        sys.executable,
                        "-E",
                        "-S",
                        str(ENTER),
                        str(inside.pidfd),
                        str(inside.kinds),
                        str(writer),
                        *command,
                    ],
                    stdin=subprocess.DEVNULL,
                    stdout=self._file,
                    stderr=subprocess.STDOUT,
                    env={**os.environ, **inside.environment, **environment},
                    pass_fds=[inside.pidfd, writer],
                    start_new_session=True,  # ctrl-C is the test's alone
                )
            finally:
                os.close(writer)
            text = pid_pipe.read()
        if not text:
            self.wait(PATIENCE_S)
            raise RuntimeError(f"cannot start {command[0]} on the host: {self.output}")
        self.inner_pid = int(text)

    @property
    def output(self) -> str:
        """What it has written so far, errors too."""
        return os.pread(self._file.fileno(), os.fstat(self._file.fileno()).st_size, 0).decode(errors="replace")

    def finish(self, timeout_s: float = PATIENCE_S) -> str:
        """Wait until it ends, fail unless it ends well; return the output."""
        code = self.wait(timeout_s)
        assert code == 0, f"ended with {code}:\n{self.output}"
        return self.output

    def send_signal(self, sig: int) -> None:
        """Send the program a signal, unless it has ended."""
        if self.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.inner_pid, sig)

    def close(self) -> None:
        """Close what the test has of it."""
        self._file.close()


class Hired:
    """A process on a host that does what comes over ``pipe``; to a puppet it looks like one of multiprocessing."""

    def __init__(self, inside: Inside, environment: Mapping[str, str]) -> None:
        self.pipe, theirs = inside.context.Pipe()
        way = _Handed(inside.pidfd), inside.kinds, {**inside.environment, **environment}
        self._process = inside.context.Process(target=_play, args=(theirs, *way))
        self._process.start()
        theirs.close()
        self.pid: int = self.pipe.recv()
        self.kill, self.join, self.is_alive = self._process.kill, self._process.join, self._process.is_alive

    @property
    def exitcode(self) -> int | None:
        return self._process.exitcode

    def wait(self, timeout_s: float) -> None:
        """Wait until it ends."""
        self._process.join(timeout_s)
        assert self.exitcode is not None, f"process {self.pid} on a host has not ended for {timeout_s:g} s"

    def close(self) -> None:
        """Close what the test has of it."""
        self._process.close()
        self.pipe.close()


class _Handed:
    """A descriptor on its way into a process that is being started."""

    def __init__(self, descriptor: int) -> None:
        self.descriptor = descriptor

    def __reduce__(self) -> Any:
        return _receive, (DupFd(self.descriptor),)


def _receive(handed: Any) -> int:
    return handed.detach()


def _play(pipe: Connection, host: int, kinds: int, environment: Mapping[str, str]) -> None:
    os.environ.update(environment)

    def program() -> NoReturn:
        run_armed(obey, (pipe,))
        os._exit(0)

    run_inside(host, kinds, pipe.send, program)
