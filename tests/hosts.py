"""Real hosts, as far as the kernel can make them: each with its own network, processes, name and shared memory.

They stand in one room with a switch, addresses 10.77.0.1 and up, names host0 and up. What is below them, and why
nothing of it stays behind, is in `tests.host_switch`. It takes root, or a kernel that lets ordinary users make
namespaces.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import multiprocessing
import os
import pickle
import select
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from multiprocessing.context import ForkServerContext
from typing import Any, NoReturn

import pytest

from tests.host_processes import Hired, Inside, Program
from tests.puppets import Puppet

__all__ = ["Host", "Impossible", "hosts"]

PATIENCE_S = 60.0
RUN_PICKLED = (
    "import pickle, sys; from tests.watchdog import run_armed; run_armed(*pickle.loads(bytes.fromhex(sys.argv[1])))"
)


class Impossible(OSError):
    """The kernel refused; the text says what."""


@contextlib.contextmanager
def hosts(count: int, context: ForkServerContext | None = None) -> Iterator[list[Host]]:
    """Give ``count`` hosts that reach each other; end them, and all that runs on them, at the end.

    ``context`` is what :meth:`Host.hire` forks from: the fixture ``mp_context``, whose processes start in milliseconds.
    Where there can be none the test is skipped with the reason; it fails where the environment says ``CI``.

    Yields
    ------
    list of Host
    """
    if importlib.util.find_spec("pyroute2") is None:
        _refuse("pyroute2 is not installed")
    with contextlib.ExitStack() as stack:
        refusal = ""
        try:
            room = _start(count, context or multiprocessing.get_context("forkserver"), stack)
        except Impossible as error:
            refusal = f"{error} (it takes root with CAP_SYS_ADMIN and CAP_NET_ADMIN, or user namespaces for all)"
        if refusal:
            _refuse(refusal)
        yield room


class Host:
    """One host.

    Parameters
    ----------
    index : int
        Its place at the switch.
    name, address : str
    switch, own : _Line
        To the switch and to the host's first process.
    inside : Inside
        The way into its namespaces.
    """

    def __init__(self, index: int, name: str, address: str, switch: _Line, own: _Line, inside: Inside) -> None:
        self.name, self.address = name, address
        self.processes: list[Program | Hired] = []
        self._index, self._switch, self._own, self._inside = index, switch, own, inside
        self._is_alive = True

    def run(self, program: str, args: Sequence[str] = (), env: Mapping[str, str] | None = None) -> Program:
        """Start a program; ``env`` comes on top of the environment of the test."""
        assert self._is_alive, f"{self.name} was killed"
        self.processes.append(Program(self._inside, [program, *args], env or {}))
        return self.processes[-1]

    def python(self, function: Callable[..., object], *args: Any, env: Mapping[str, str] | None = None) -> Program:
        """Start a Python that runs a function of an importable module; what it prints is the output."""
        return self.run(sys.executable, ["-c", RUN_PICKLED, pickle.dumps((function, args)).hex()], env)

    def hire(self, name: str, env: Mapping[str, str] | None = None) -> Puppet:
        """Start a process that waits for the test's orders, which go over no network."""
        assert self._is_alive, f"{self.name} was killed"
        self.processes.append(Hired(self._inside, env or {}))
        return Puppet(name, self.processes[-1], self.processes[-1].pipe)

    def unplug(self, remove: bool = False) -> None:
        """Pull the cable: what is sent from now on, both ways, is lost in silence. Address and connections stay.

        With ``remove`` the network card goes too, with its address: who sends on the host is told so.
        """
        self._switch.ask("unplug", self._index, remove)

    def plug(self) -> None:
        """Put the cable back, and the network card with the same address if need be; return when the way is open."""
        self._switch.ask("plug", self._index)
        self._own.ask("configure")

    def kill(self) -> None:
        """End all processes at once by SIGKILL; their sockets say so to others unless the cable was pulled before."""
        if not self._is_alive:
            return
        self._is_alive = False
        with contextlib.suppress(ProcessLookupError):
            signal.pidfd_send_signal(self._inside.pidfd, signal.SIGKILL)
        # The first process of a pid namespace is gone when all are.
        select.select([self._inside.pidfd], [], [], PATIENCE_S)
        os.close(self._inside.pidfd)
        self._own.close()
        for process in self.processes:
            process.wait(PATIENCE_S)

    def stop(self) -> None:
        """Stop all processes by SIGSTOP; return when every thread has stopped. The kernel goes on acknowledging."""
        self._own.ask("signal", signal.SIGSTOP)

    def cont(self) -> None:
        """Continue after ``stop``."""
        self._own.ask("signal", signal.SIGCONT)

    def listening(self) -> list[str]:
        """List the addresses on which somebody listens for TCP, ``127.0.0.1:80`` or ``[::]:80``."""
        return self._own.ask("listening")

    def close(self) -> None:
        """``kill``, and forget what was started."""
        self.kill()
        for one in self.processes:
            one.close()


class _Line:
    """Orders to a process of `tests.host_switch`, and what comes of them."""

    def __init__(self, own: socket.socket) -> None:
        own.settimeout(PATIENCE_S)
        self.socket = own
        self.close = own.close

    def ask(self, name: str, *arguments: object) -> Any:
        self.socket.send(json.dumps([name, *arguments]).encode())
        return self.read(self.socket.recv(65536)).get("result")

    @staticmethod
    def read(message: bytes) -> dict[str, Any]:
        if not message:
            raise RuntimeError("a process of tests.host_switch has ended; its own words are in the captured stderr")
        answer = json.loads(message)
        if "impossible" in answer:
            raise Impossible(answer["impossible"])
        return answer


def _start(count: int, context: ForkServerContext, stack: contextlib.ExitStack) -> list[Host]:
    # The directory that tests have for it is there; a program that is no test has a fresh one.
    run_directory = os.environ.get("FASTREF_RUN_DIR") or stack.enter_context(tempfile.TemporaryDirectory())
    addresses = {f"host{index}": f"10.77.0.{index + 1}" for index in range(count)}
    pairs = [socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET) for _ in range(1 + count)]
    lines = [_Line(mine) for mine, _ in pairs]
    theirs = [theirs.fileno() for _, theirs in pairs]
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.host_switch", run_directory, json.dumps(addresses), *map(str, theirs)],
        stdin=subprocess.DEVNULL,
        pass_fds=theirs,
        start_new_session=True,
    )
    stack.callback(process.wait, PATIENCE_S)
    for line in lines:
        stack.callback(line.close)  # the switch ends when its line is closed
    for _, other in pairs:
        other.close()
    switch, *own = lines
    kinds = switch.read(switch.socket.recv(65536))["kinds"]
    room = []
    for index, (line, named) in enumerate(zip(own, addresses.items(), strict=True)):
        message, pidfds, _, _ = socket.recv_fds(line.socket, 65536, 1)
        line.read(message)
        inside = Inside(pidfds[0], kinds, {"FASTREF_RUN_DIR": run_directory}, context)
        room.append(Host(index, *named, switch, line, inside))
        stack.callback(room[-1].close)
    for host in room:
        host.plug()
    return room


def _refuse(reason: str) -> NoReturn:
    sentence = f"no hosts of network namespaces here: {reason}"
    if os.environ.get("CI"):
        pytest.fail(sentence, pytrace=False)
    pytest.skip(sentence)
