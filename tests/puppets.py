"""Workers on strings: processes that run, one after the other, what a test tells them to run.

The test process itself joins no job, so its own threads, descriptors and memory stay out of the picture.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.connection import Connection as Pipe
from typing import Any

import pytest

import fastref.rpc as rpc
from fastref._core import arm_failpoints
from fastref.rref import current_wiring
from tests.stopping import stop

PATIENCE_S = 60.0

_kept: dict[str, Any] = {}


class Ended(Exception):
    """The puppet's process has ended."""


class Puppet:
    """One process that waits for orders.

    Parameters
    ----------
    name : str
    process : multiprocessing.Process
    pipe : Connection
        Orders out, outcomes in.
    """

    def __init__(self, name: str, process: Any, pipe: Pipe) -> None:
        self.name, self.process, self.pipe = name, process, pipe

    @property
    def pid(self) -> int:
        return self.process.pid

    def order(self, function: Callable[..., Any], *arguments: Any) -> None:
        """Have ``function(*arguments)`` run on the process's main thread; ``outcome`` gets what comes of it."""
        try:
            self.pipe.send((function, arguments))
        except (BrokenPipeError, ConnectionResetError):
            raise Ended(f"{self.name} has ended") from None

    def outcome(self, patience_s: float = PATIENCE_S) -> Any:
        """Return the result of the oldest order without one, or raise what it raised."""
        try:
            if not self.pipe.poll(patience_s):
                raise TimeoutError(f"{self.name} has not done what it was told for {patience_s:g} s")
            value, error = self.pipe.recv()
        except (EOFError, ConnectionResetError):
            raise Ended(f"{self.name} has ended") from None
        if error is not None:
            raise error
        return value

    def do(self, function: Callable[..., Any], *arguments: Any, patience_s: float = PATIENCE_S) -> Any:
        """``order`` and ``outcome``."""
        self.order(function, *arguments)
        return self.outcome(patience_s)

    def kill(self) -> None:
        """End the process by SIGKILL and wait until it is gone."""
        os.kill(self.pid, signal.SIGKILL)
        self.process.join()

    def stop(self) -> None:
        """Stop the process by SIGSTOP and wait until every thread of it has stopped."""
        stop(self.pid)

    def go_on(self) -> None:
        """Continue after ``stop``."""
        os.kill(self.pid, signal.SIGCONT)

    def end(self) -> int:
        """Tell the process to return from its main function; its exit code."""
        self.pipe.send(None)
        self.process.join()
        return self.process.exitcode


class Troupe:
    """Puppets of one test, and the job that they join."""

    def __init__(self, context: Any, spawn: Callable[..., Any], job: str) -> None:
        self._context, self._spawn = context, spawn
        self.job = job
        self.all: list[Puppet] = []

    def hire(self, name: str) -> Puppet:
        """Start one more process; it joins nothing yet."""
        mine, theirs = self._context.Pipe()
        (process,) = self._spawn(obey, [(theirs,)])
        theirs.close()
        puppet = Puppet(name, process, mine)
        self.all.append(puppet)
        return puppet

    def start(
        self, count: int, job: str = "", failpoints: dict[int, str] | None = None, **options: Any
    ) -> list[Puppet]:
        """Start ``count`` workers w0, w1, ... that have joined one job; ``failpoints``: by rank."""
        puppets = [self.hire(f"w{rank}") for rank in range(count)]
        self.join(puppets, job, **options)
        for rank, text in (failpoints or {}).items():
            puppets[rank].do(arm_failpoints, text)
        return puppets

    def join(self, puppets: Sequence[Puppet], job: str = "", **options: Any) -> None:
        """Have puppets join a job in the order of their ranks."""
        for rank, puppet in enumerate(puppets):
            puppet.order(join_job, puppet.name, rank, len(puppets), job or self.job, options)
        for puppet in puppets:
            puppet.outcome()

    def leave(self, puppets: Sequence[Puppet]) -> None:
        """Have puppets shut down gracefully, all at once."""
        for puppet in puppets:
            puppet.order(rpc.shutdown, True, PATIENCE_S)
        for puppet in puppets:
            puppet.outcome()

    def close(self) -> None:
        """Close the pipes; the fixture under this one ends the processes."""
        for puppet in self.all:
            puppet.pipe.close()


@pytest.fixture(name="troupe")
def troupe_fixture(
    mp_context: Any, spawn_workers: Callable[..., Any], request: pytest.FixtureRequest
) -> Iterator[Troupe]:
    """Return a :class:`Troupe`; its processes are killed after the test and what they leave behind is swept."""
    one = Troupe(mp_context, spawn_workers, f"puppets-{os.getpid()}-{abs(hash(request.node.nodeid)) % 10**8}")
    yield one
    one.close()
    for puppet in one.all:
        if puppet.process.is_alive():
            puppet.process.kill()  # a stopped one too
        puppet.process.join()
    sweep_up()


def sweep_up() -> None:
    """Do what the next start of a worker does first: remove what the dead left behind."""
    from fastref.identity import forget_loopback_token
    from fastref.segments import run_root, sweep

    sweep(run_root(), clear=forget_loopback_token)


def obey(pipe: Pipe) -> None:
    """Run orders from a pipe, one after the other, until it closes or says so."""
    while (order := _receive(pipe)) is not None:
        function, arguments = order
        value = error = None
        try:
            value = function(*arguments)
        except BaseException as trouble:
            error = trouble
        try:
            pipe.send((value, error))
        except Exception as trouble:  # neither result nor error of an order need be picklable
            pipe.send((None, TypeError(f"the outcome {value!r} {error!r} cannot be sent: {trouble}")))
        del value, error, order, function, arguments  # between two orders nothing of them is held


def _receive(pipe: Pipe) -> Any:
    try:
        return pipe.recv()
    except EOFError:
        return None


# ---- orders that many tests give


def join_job(name: str, rank: int, world_size: int, job: str, options: dict[str, Any]) -> None:
    """Join ``local://job``; among the options ``transport`` is what ``FASTREF_TRANSPORT`` says."""
    options = dict(options)
    if transport := options.pop("transport", ""):
        os.environ["FASTREF_TRANSPORT"] = transport
    rpc.init_rpc(
        name,
        rank=rank,
        world_size=world_size,
        rpc_backend_options=rpc.RpcBackendOptions(init_method=f"local://{job}", **options),
    )


def keep(label: str, value: Any) -> None:
    """Keep a value in this process under a label."""
    _kept[label] = value


def kept(label: str) -> Any:
    """Return what is kept under a label."""
    return _kept[label]


def get_through(label: str) -> Any:
    """Return what ``get`` of the kept reference's value returns."""
    return _kept[label].rpc_sync().get()


def drop(label: str) -> None:
    """Forget what is kept under a label."""
    del _kept[label]


def drop_all() -> None:
    """Forget everything."""
    _kept.clear()


def call_kept(label: str, method: str, *arguments: Any) -> Any:
    """Call a method of what is kept."""
    return getattr(_kept[label], method)(*arguments)


def keep_result(label: str, function: Callable[..., Any], *arguments: Any) -> None:
    """Keep what a function returns."""
    _kept[label] = function(*arguments)


def hold(label: str, reference: Any) -> None:
    """Take a reference that was sent here, and keep it."""
    _kept[label] = reference


def hand_on(label: str, to: str, under: str | None = None) -> None:
    """Give what is kept here to another worker, which keeps it too."""
    rpc.rpc_sync(to, hold, (under or label, _kept[label]))


def snapshot() -> dict[str, Any]:
    """Figures of this process's runtime, with the entries that are not credits counted as ``held``."""
    wiring = current_wiring()
    figures = wiring.snapshot()
    credits = set(wiring.credit_of)
    figures["held"] = {index: e for index, e in figures["table"].pop("entries").items() if index not in credits}
    return figures


def entries_held() -> int:
    """Entries of this process's table that somebody holds, apart from those opened ahead."""
    return len(snapshot()["held"])


def wait_until_entries(count: int, patience_s: float = 20.0) -> float:
    """Wait until the table has ``count`` entries that are not opened ahead; return the seconds it took."""
    started = time.monotonic()
    while (held := entries_held()) != count:
        if time.monotonic() - started > patience_s:
            raise AssertionError(f"{held} entries after {patience_s:g} s, not {count}: {snapshot()}")
        time.sleep(0.005)
    return time.monotonic() - started


def wait_until_dead(name: str, patience_s: float = 20.0) -> None:
    """Wait until this process's runtime knows that a worker died."""
    deadline = time.monotonic() + patience_s
    while not snapshot()["peers"][name]["dead"]:
        assert time.monotonic() < deadline, f"{name} still counts as alive"
        time.sleep(0.002)


def wait_until_removed(patience_s: float = 20.0) -> None:
    """Wait until nothing of those known to be dead is left in this process."""
    deadline = time.monotonic() + patience_s
    while waiting := snapshot()["dead"]:
        assert time.monotonic() < deadline, f"the dead are not removed; who has not answered about whom: {waiting}"
        time.sleep(0.01)


def interrupt_after(delay_s: float, number: int = signal.SIGINT) -> None:
    """Send this process a signal in a while, from a thread."""
    threading.Timer(delay_s, os.kill, (os.getpid(), number)).start()


# ---- what they call on each other


class Cell:
    """A mutable value, so that its owner has to be asked."""

    def __init__(self, value: Any = None) -> None:
        self.value = value

    def get(self) -> Any:
        return self.value

    def put(self, value: Any) -> None:
        self.value = value

    def get_slowly(self, delay_s: float) -> Any:
        time.sleep(delay_s)
        return self.value


def echo(value: Any) -> Any:
    return value


def nothing() -> None:
    return None


def nothing_with(value: Any) -> None:
    return None


def sleep(seconds: float) -> float:
    time.sleep(seconds)
    return seconds


def make_slowly(delay_s: float, value: Any) -> Any:
    time.sleep(delay_s)
    return value


def make_reference(value: Any) -> rpc.RRef:
    return rpc.RRef(Cell(value))


def process_id() -> int:
    return os.getpid()
