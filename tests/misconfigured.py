"""Jobs that cannot start: what is wrong with each, and what every worker has to be told."""

from __future__ import annotations

import dataclasses
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

import fastref.rpc as rpc
from fastref.errors import FastrefError
from tests.puppets import Ended, Puppet, Troupe

ROOT = Path(__file__).resolve().parent.parent
METHODS = ("local", "env", "tcp", "file")
TIMEOUT_S = 30.0  # of the workers: who is told only by this was not told

# ---- what may be wrong with a worker; called in its process before it joins


def have_version(version: str) -> None:
    import fastref.runtime.runtime as module

    module.__version__ = version


def have_layout(layout: int) -> None:
    import fastref.runtime.runtime as module

    module.LAYOUT = layout


def have_host(host: str) -> None:
    import fastref.runtime.runtime as module

    module.host_identity = lambda: host


def have_run_directory(path: str) -> None:
    os.environ["FASTREF_RUN_DIR"] = path


def lack_memory_for(label: str) -> None:
    """Let the system refuse every memory file of a kind."""
    import errno

    create = os.memfd_create

    def refuse(name: str, flags: int) -> int:
        if name == f"fastref-{label}":
            raise OSError(errno.ENOMEM, os.strerror(errno.ENOMEM))
        return create(name, flags)

    os.memfd_create = refuse


def end_after(delay_s: float, how: str) -> None:
    """End this process in a while, whatever it is doing then."""

    def end() -> None:
        if how == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        os._exit(0)

    threading.Timer(delay_s, end).start()


def hand_over(label: str, damage: str) -> None:
    """Hand peers a damaged segment in place of a good one."""
    from fastref.runtime.memory import OwnMemory

    for_peer = OwnMemory.for_peer

    def damaged(self: OwnMemory, ring_fd: int) -> dict[str, tuple[int, int]]:
        segments = for_peer(self, ring_fd)
        fd, size_bytes = segments[label]
        if damage == "truncated":
            fd = os.memfd_create("truncated")
            os.ftruncate(fd, size_bytes // 2)
        elif damage == "smaller":
            size_bytes = 16
        elif damage == "no memory":
            fd = os.pipe()[0]
        elif damage == "unsealed":
            fd = os.memfd_create("unsealed")
            os.ftruncate(fd, size_bytes)
        elif damage == "no file at all":
            fd = os.open("/", os.O_RDONLY)
        elif damage == "missing":
            return {name: segment for name, segment in segments.items() if name != label}
        return {**segments, label: (fd, size_bytes)}

    OwnMemory.for_peer = damaged


def damage_header(offset: int, data: bytes) -> None:
    """Write into the header of the control segment before any peer sees it."""
    from fastref.runtime.memory import OwnMemory

    make = OwnMemory.__init__

    def damaged(self: OwnMemory, *arguments: Any) -> None:
        make(self, *arguments)
        memoryview(self.control)[offset : offset + len(data)] = data

    OwnMemory.__init__ = damaged


# ---- the table


@dataclass(frozen=True)
class Part:
    """One worker of a job.

    Parameters
    ----------
    name, rank, world_size
        What it says to ``init_rpc``.
    error : str
        The class of its error, "" when its process ends, "joined" when it gets in.
    quirks : tuple
        (function, arguments), called in its process first.
    options : dict
        For ``RpcBackendOptions``.
    shm : str
        The size of its /dev/shm, for one that runs in a namespace of its own.
    after : bool
        Starts only when those before it have joined, or had time to.
    """

    name: Any
    rank: Any
    world_size: Any
    error: str = "RendezvousError"
    quirks: tuple[tuple[Callable[..., None], tuple[Any, ...]], ...] = ()
    options: dict[str, Any] = field(default_factory=dict)
    shm: str = ""
    after: bool = False


@dataclass(frozen=True)
class Case:
    """A job with something wrong.

    Parameters
    ----------
    parts : list of Part
        Its workers.
    told : str
        What is found, as a regular expression, in the error of every worker.
    methods : tuple of str
        The init methods with which it can happen.
    alone : bool
        Every worker finds out by itself, in a sentence of its own; otherwise all are told the same.
    """

    parts: list[Part]
    told: str
    methods: tuple[str, ...] = METHODS
    alone: bool = False


W0, W1, W2 = (rf"'w{rank}' \(rank {rank}, pid \d+\)" for rank in range(3))
COULD_NOT = rf"worker {W1} of job '.*', coordinator {W0}, could not start: "
LATE = "runs already with coordinator"


def trio(*, w0: Part | None = None, w1: Part | None = None) -> list[Part]:
    """Return three workers, one or two of which are others than they should be."""
    return [w0 or Part("w0", 0, 3), w1 or Part("w1", 1, 3), Part("w2", 2, 3)]


CASES: dict[str, Case] = {
    "same_name": Case(
        [Part("w0", 0, 3), Part("w1", 1, 3), Part("w1", 2, 3)], "two workers .* the name 'w1', .*: .* and "
    ),
    "name_of_the_coordinator": Case([Part("w0", 0, 2), Part("w0", 1, 2)], "two workers .* the name 'w0', .*: .* and "),
    "same_rank": Case(
        trio()[:2] + [Part("w2", 1, 3)], "two workers .* claim rank 1, which is not unique: 'w.' .* and 'w.' "
    ),
    "two_coordinators": Case(
        [Part("w0", 0, 2), Part("w1", 0, 2)], "two workers .* rank 0, .*: 'w.' .* and 'w.' ", ("local", "file")
    ),
    "two_coordinators_at_one_port": Case(
        [Part("w0", 0, 2), Part("w0", 0, 2)],
        "RendezvousError.*EADDRINUSE|^rank 0 .*EADDRINUSE",
        ("env", "tcp"),
        alone=True,
    ),
    "larger_world": Case([Part("w0", 0, 2), Part("w1", 1, 3)], f"differ in world_size: {W1} says 3, {W0} says 2"),
    "smaller_world": Case([Part("w0", 0, 3), Part("w1", 1, 2)], f"differ in world_size: {W1} says 2, {W0} says 3"),
    "rank_beyond_world": Case([Part("w0", 0, 2), Part("w1", 5, 2, "UsageError")], "'w1' .* is out of range"),
    "missing_rank": Case(
        trio(w1=Part("w1", -1, 3, "UsageError|ValueError")),
        r"'w1' \(rank unknown, pid .*could not start.*(rank|RANK)|^[^']*(rank|RANK)",
    ),
    "negative_world": Case(trio(w1=Part("w1", 1, -3, "UsageError")), f"({COULD_NOT}.*|^)world_size must be 1 or more"),
    "no_world": Case(trio(w1=Part("w1", 1, 0, "UsageError")), f"({COULD_NOT}.*|^)world_size is missing"),
    "no_world_of_the_coordinator": Case(
        trio(w0=Part("w0", 0, 0, "UsageError")), f"(coordinator {W0} .* could not start: .*|^)world_size is missing"
    ),
    "other_version": Case(
        trio(w1=Part("w1", 1, 3, quirks=((have_version, ("0.0.0",)),))), f"{W1} has fastref 0.0.0 .*{W0} has fastref"
    ),
    "other_layout": Case(
        trio(w1=Part("w1", 1, 3, quirks=((have_layout, (99,)),))), f"{W1} has .*memory layout 99.*{W0} has .*layout"
    ),
    "one_is_strict": Case(
        trio(w1=Part("w1", 1, 3, options={"strict": True})), f"{W1} is strict and worker {W0} is not; all workers of"
    ),
    "other_host": Case(
        trio(w1=Part("w1", 1, 3, quirks=((have_host, ("elsewhere:0:1",)),))), f"{W1} runs on elsewhere:0:1 and .*{W0}"
    ),
    "name_too_long": Case(
        trio(w1=Part("x" * 128, 1, 3, "UsageError")), f"(coordinator {W0}, could not start: .*|^)Worker name must match"
    ),
    "arena_beyond_the_system": Case(
        trio(w1=Part("w1", 1, 3, "ResourceError", options={"arena_limit": 1 << 62})),
        f"({COULD_NOT}.*|^)an arena of {1 << 62} bytes is larger than any memory",
    ),
    "full_shm": Case(trio(w1=Part("w1", 1, 3, "ResourceError", shm="8k")), f"({COULD_NOT}.*|^)/dev/shm has no room"),
    "full_shm_of_the_coordinator": Case(
        trio(w0=Part("w0", 0, 3, "ResourceError", shm="8k")),
        f"(coordinator {W0} .* could not start: .*|^)/dev/shm has no room",
    ),
    "no_memory_for_a_ring": Case(
        trio(w1=Part("w1", 1, 3, "ResourceError", quirks=((lack_memory_for, ("ring",)),))),
        f"({COULD_NOT}.*|^)cannot create .* for 'ring'",
    ),
    "killed_while_joining": Case(
        trio()[:1] + [Part("w1", 1, 3, "", ((end_after, (1.5, "kill")),))],
        f"{W1} .* died or left .*; worker {W0} gives up",
    ),
    "exits_while_joining": Case(
        trio()[:1] + [Part("w1", 1, 3, "", ((end_after, (1.5, "exit")),))],
        f"{W1} .* died or left .*; worker {W0} gives up",
    ),
    "coordinator_killed_while_joining": Case(
        [Part("w0", 0, 3, "", ((end_after, (1.5, "kill")),)), Part("w1", 1, 3)],
        f"{W0} .* died or left .*; worker {W1} gives up",
    ),
    "old_worker_in_a_running_job": Case(
        [Part("w0", 0, 2, "joined"), Part("w1", 1, 2, "joined"), Part("w1", 1, 2, after=True)],
        f"{LATE} {W0} and all its workers; {W1} cannot join it",
    ),
    "second_job_of_that_name": Case(
        [Part("w0", 0, 1, "joined"), Part("w0", 0, 2, after=True), Part("w1", 1, 2, after=True)],
        f"{LATE} {W0}.* {W0} cannot start it a second time|{LATE} {W0} and all its workers; {W1} cannot join it",
        ("local", "file"),  # the port of a store is the first job's own
        alone=True,  # in a file only the first coordinator can be seen
    ),
    "unknown_scheme": Case(
        [Part("w0", 0, 2), Part("w1", 1, 2)],
        "found no c10d store by carrier://.*: No .* handler",
        ("carrier",),
        alone=True,
    ),
    "run_directory_open_to_others": Case(
        [Part(f"w{rank}", rank, 2, "UsageError", ((have_run_directory, ("OPEN",)),)) for rank in range(2)],
        r"is open to others \(mode 750\)",
        ("local",),
    ),
    "run_directory_of_another_user": Case(
        [Part(f"w{rank}", rank, 2, "UsageError", ((have_run_directory, ("FOREIGN",)),)) for rank in range(2)],
        "belongs to uid 12345, not to uid 0",
        ("local",),
    ),
    "run_directory_that_cannot_be_made": Case(
        [Part(f"w{rank}", rank, 2, "ResourceError", ((have_run_directory, ("/proc/x",)),)) for rank in range(2)],
        "cannot make the run directory /proc/x",
        ("local",),
    ),
    "run_directory_with_a_name_too_long": Case(
        [
            Part(f"w{rank}", rank, 2, "ResourceError", ((have_run_directory, ("/tmp/" + "x" * 300,)),))
            for rank in range(2)
        ],
        "cannot make the run directory .*: File name too long",
        ("local",),
    ),
    "never_full": Case(
        [Part("w0", 0, 3, options={"rpc_timeout": 4.0}), Part("w1", 1, 3)],
        f"only 2 of 3 workers .*{W0}, {W1}; missing ranks: 2",
    ),
}

DAMAGED: dict[str, Part] = {
    f"{label}_{damage.replace(' ', '_')}": Part("w1", 1, 3, quirks=((hand_over, (label, damage)),))
    for label, damage in [
        *(("control", damage) for damage in ("truncated", "smaller", "no memory", "no file at all", "missing")),
        *(("hold", damage) for damage in ("truncated", "smaller", "unsealed")),
        *(("descriptors", "smaller"), ("descriptors", "unsealed"), ("arena", "truncated"), ("arena", "no memory")),
        *(("ring", "smaller"), ("ring", "missing"), ("ring", "unsealed")),
    ]
} | {
    "magic": Part("w1", 1, 3, quirks=((damage_header, (0, b"FASTREF")),)),
    "layout": Part("w1", 1, 3, quirks=((damage_header, (8, b"\x63")),)),
    "slots": Part("w1", 1, 3, quirks=((damage_header, (12, b"\xff")),)),
    "capacity": Part("w1", 1, 3, quirks=((damage_header, (16, b"\x01")),)),
    "bits": Part("w1", 1, 3, quirks=((damage_header, (20, b"\x3f")),)),
    "arena_of_half_a_page": Part("w1", 1, 3, quirks=((damage_header, (24, b"\x01")),)),
    "arena_beyond_all_addresses": Part("w1", 1, 3, quirks=((damage_header, (30, b"\xff")),)),
}


# ---- playing them


@dataclass(frozen=True)
class Outcome:
    """What became of a worker: the class of its error or "joined", what was said, when it started and was told."""

    error: str
    text: str
    started: float
    ended: float


def init_method(method: str, job: str, port: int, directory: Path) -> str:
    """Return an init method of a kind, and set what ``env://`` reads."""
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    for variable in ("RANK", "WORLD_SIZE"):
        os.environ.pop(variable, None)
    return {
        "local": f"local://{job}",
        "env": "env://",
        "tcp": f"tcp://127.0.0.1:{port}",
        "file": f"file://{directory}/store",
        "carrier": f"carrier://{job}",
    }[method]


def take_part(part: Part, method: str, place: tuple[str, int, Path]) -> Outcome:
    """Join as told, in this process, and say what came of it."""
    for quirk, arguments in part.quirks:
        quirk(*arguments)
    options = rpc.RpcBackendOptions(
        **{"rpc_timeout": TIMEOUT_S, "init_method": init_method(method, *place), **part.options}
    )
    started = time.monotonic()
    try:
        rpc.init_rpc(part.name, rank=part.rank, world_size=part.world_size, rpc_backend_options=options)
    except (FastrefError, ValueError) as error:
        return Outcome(type(error).__name__, str(error), started, time.monotonic())
    return Outcome("joined", "", started, time.monotonic())


def take_part_in_small_shm(part: Part, method: str, place: tuple[str, int, Path]) -> Outcome:
    """As ``take_part``, in a process whose /dev/shm is tiny."""
    program = f"""
        from pathlib import Path, PosixPath
        from tests.misconfigured import Outcome, Part, take_part
        outcome = take_part(Part({part.name!r}, {part.rank!r}, {part.world_size!r}), {method!r}, {place!r})
        print(repr(outcome))
    """
    command = f'mount -t tmpfs -o size={part.shm} none /dev/shm && exec "$0" -c "$1"'
    whole = ["unshare", "-rm", "sh", "-c", command, sys.executable, textwrap.dedent(program)]
    done = subprocess.run(whole, capture_output=True, text=True, timeout=60, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    return eval(done.stdout)


def play(
    troupe: Troupe, parts: list[Part], method: str, place: tuple[str, int, Path]
) -> tuple[list[Puppet], list[Outcome]]:
    """Have every part played, and return the players and what became of each; one that ended has no outcome."""
    if any(part.shm for part in parts) and not can_unshare():
        pytest.skip("no user and mount namespaces here, so no small /dev/shm")
    players = [troupe.hire(f"player{number}") for number in range(len(parts))]
    outcomes: dict[int, Outcome] = {}
    for number, (player, part) in enumerate(zip(players, parts, strict=True)):
        if part.after:
            for other in range(number):
                if parts[other].error == "joined" and other not in outcomes:
                    outcomes[other] = players[other].outcome()
        player.order(take_part_in_small_shm if part.shm else take_part, part, method, place)
    # Those that end by themselves first: when they do is when the others can begin to notice.
    for number in sorted(set(range(len(parts))) - set(outcomes), key=lambda number: bool(parts[number].error)):
        try:
            outcomes[number] = players[number].outcome()
        except Ended:
            outcomes[number] = Outcome("", "", time.monotonic(), time.monotonic())
    return players, [outcomes[number] for number in range(len(parts))]


def prepared(case: Case, directory: Path) -> Case:
    """Make the run directories that a case wants, and name them."""
    if "FOREIGN" in str(case.parts) and os.geteuid() != 0:
        pytest.skip("only root can give a directory away")
    for name, mode, owner in (("OPEN", 0o750, -1), ("FOREIGN", 0o700, 12345)):
        made = directory / name
        made.mkdir()
        made.chmod(mode)
        if owner >= 0 and os.geteuid() == 0:
            os.chown(made, owner, -1)
    return dataclasses.replace(case, parts=[_placed(part, directory) for part in case.parts])


def _placed(part: Part, directory: Path) -> Part:
    quirks = tuple(
        (quirk, tuple(str(directory / one) if one in ("OPEN", "FOREIGN") else one for one in arguments))
        for quirk, arguments in part.quirks
    )
    return dataclasses.replace(part, quirks=quirks)


def check(case: Case, outcomes: list[Outcome]) -> float:
    """Check what everybody was told; return how long the last one waited after all had started or ended, in seconds."""
    for part, outcome in zip(case.parts, outcomes, strict=True):
        assert re.fullmatch(part.error, outcome.error), outcomes
        if part.error not in ("", "joined"):
            assert re.search(case.told, outcome.text), outcome.text
    said = {outcome.text for outcome in outcomes if outcome.error == "RendezvousError"}
    assert case.alone or len(said) <= 1, said
    failed = [outcome for outcome in outcomes if outcome.error not in ("", "joined")]
    return max(outcome.ended for outcome in failed) - max(outcome.started for outcome in outcomes)


def can_unshare() -> bool:
    """Return whether a process may have a /dev/shm of its own here."""
    return (
        bool(shutil.which("unshare")) and not subprocess.run(["unshare", "-rm", "true"], capture_output=True).returncode
    )


def free_port() -> int:
    """Return a port that nobody listens on."""
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])
