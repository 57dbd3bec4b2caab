"""Few descriptors, or none left: only what takes a new one fails, by a typed error, and works again later."""

from __future__ import annotations

import contextlib
import os
import resource
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

import fastref.rpc as rpc
from fastref.rendezvous.stream import parse_endpoint
from fastref.rref import current_wiring
from tests import proxied, puppets
from tests.puppets import PATIENCE_S, Troupe, troupe_fixture  # noqa: F401

ROOT = Path(__file__).resolve().parent.parent
LIMIT = 64
# What starts, calls, dies and breaks, over both ways; the gate has more of it.
SLICE = [
    "tests/test_sessions.py::test_workers_meet_by_a_local_name",
    "tests/test_death.py::test_the_references_of_a_killed_worker_go",
    "tests/test_sessions_tcp.py::test_a_stream_of_calls_goes_on_over_many_breaks[0]",
]
# Not the one that starts so many workers that the links of one, while they are made, take more.
FILES = [f"tests/test_{name}.py" for name in ("calls", "references", "sessions", "death", "tensors_travel")]
_held: list[int] = []


def use_up_descriptors() -> int:
    """Leave this process no descriptor; return the limit that it had."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(map(int, os.listdir("/proc/self/fd"))), hard))
    with contextlib.suppress(OSError):
        while True:
            _held.append(os.dup(0))
    return soft


def allow_descriptors(limit: int) -> None:
    """Undo ``use_up_descriptors``."""
    while _held:
        os.close(_held.pop())
    resource.setrlimit(resource.RLIMIT_NOFILE, (limit, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))


# ---- no descriptors left


def own_doors() -> tuple[str, str]:
    """Return where this worker's host finds it, and where others do."""
    wiring: Any = current_wiring()
    return wiring.record.address, wiring.record.endpoint


def come_and_wait(address: str, endpoint: str, count: int) -> int:
    """Come to both doors of a worker so many times; return how many were sent away."""
    visitors = [socket.create_connection(parse_endpoint(endpoint)) for _ in range(count if endpoint else 0)]
    for _ in range(count):
        visitors.append(socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET))
        visitors[-1].connect(address)
    sent_away = 0
    for visitor in visitors:
        with visitor, contextlib.suppress(ConnectionResetError):
            visitor.settimeout(PATIENCE_S)
            assert not visitor.recv(1)
        sent_away += 1
    return sent_away


@pytest.mark.parametrize("transport", ["shm", "tcp"])
def test_a_worker_without_descriptors_turns_away_who_comes_and_goes_on(troupe: Troupe, transport: str) -> None:
    owner, user = troupe.start(2, transport=transport)
    visitors = troupe.hire("visitors")
    user.do(rpc.rpc_sync, "w0", puppets.nothing)
    limit = owner.do(use_up_descriptors)
    before_s = owner.do(time.process_time)
    assert visitors.do(come_and_wait, *owner.do(own_doors), 20) == (20 if transport == "shm" else 40)
    assert user.do(rpc.rpc_sync, "w0", puppets.echo, (b"x" * 1000,)) == b"x" * 1000
    user.do(puppets.keep_result, "made", rpc.remote, "w0", puppets.Cell, (1,))
    assert user.do(puppets.get_through, "made") == 1
    print(f"{owner.do(time.process_time) - before_s:.3f} s of the processor")
    owner.do(allow_descriptors, limit)
    if transport == "tcp":
        assert user.do(proxied.visit_with, "w0", "anything", {}, {}) == ("refused", "closed")
    user.do(puppets.drop_all)
    troupe.leave([owner, user])


def test_memory_that_comes_while_no_descriptor_is_left_costs_no_link(troupe: Troupe) -> None:
    owner, user = troupe.start(2, transport="shm")
    limit = user.do(use_up_descriptors)
    for size in (1 << 20, 1000, 20 << 20, 10):  # new files of the owner's arena among them
        assert user.do(length_of_result, "w0", size) == size
    user.do(allow_descriptors, limit)
    troupe.leave([owner, user])


def length_of_result(to: str, size: int) -> int:
    """Have another worker make so many bytes."""
    return len(rpc.rpc_sync(to, bytes, (size,)))


def hang_up(rank: int) -> None:
    """Break the connection to a worker of another host."""
    wiring: Any = current_wiring()
    wiring._abroad._channels[rank].hang_up()


@pytest.mark.parametrize("poor", [0, 1], ids=["listener", "asker"])
def test_a_connection_that_breaks_while_no_descriptor_is_left_is_made_again_later(troupe: Troupe, poor: int) -> None:
    crew = troupe.start(2, transport="tcp", peer_timeout=1000.0)
    limit = crew[poor].do(use_up_descriptors)
    crew[poor].do(hang_up, 1 - poor)
    crew[1].order(rpc.rpc_sync, "w0", puppets.echo, (1,))
    assert not crew[1].pipe.poll(0.3)
    if poor == 0:
        crew[0].do(allow_descriptors, limit)
    else:
        resource.prlimit(crew[1].pid, resource.RLIMIT_NOFILE, (limit, limit))  # it is waiting
    assert crew[1].outcome() == 1
    crew[poor].do(allow_descriptors, limit)
    assert [puppet.do(proxied.resumptions) for puppet in crew] == [1, 1]
    troupe.leave(crew)


def start_with_ever_more(transport: str, job: str) -> list[str]:
    """Start a worker with no descriptor, with one, two, ... until it starts; what the others ended with."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    held, troubles = len(os.listdir("/proc/self/fd")), []
    for left in range(100):
        resource.setrlimit(resource.RLIMIT_NOFILE, (held + left, hard))
        try:
            puppets.join_job("w0", 0, 1, f"{job}-{left}", {"transport": transport})
        except Exception as error:
            troubles.append(f"{type(error).__name__}: {error}")
        else:
            rpc.rpc_sync("w0", puppets.nothing)
            rpc.shutdown()
            return troubles
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        assert len(os.listdir("/proc/self/fd")) == held, troubles
    raise AssertionError(troubles)


@pytest.mark.parametrize("transport", ["shm", "tcp"])
def test_a_worker_without_descriptors_enough_does_not_start_says_so_and_leaves_none(
    troupe: Troupe, transport: str
) -> None:
    troubles = troupe.hire("w0").do(start_with_ever_more, transport, troupe.job)
    assert len(troubles) > 5
    for trouble in troubles:
        assert trouble.startswith("ResourceError: ") and "Too many open files" in trouble


# ---- few of them


def run_suite_with_few(transport: str, *what: str) -> None:
    """Run a part of the suite where no process may have more than a few descriptors."""
    options = ["-q", "-p", "no:cacheprovider", "-k", "not random_moments"]
    command = ["sh", "-c", f'ulimit -n {LIMIT} && exec "$@"', "sh", sys.executable, "-m", "pytest", *options, *what]
    environment = {**os.environ, "FASTREF_TRANSPORT": transport}
    result = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment)
    assert result.returncode == 0, f"{result.stdout[-4000:]}\n{result.stderr[-4000:]}"


def test_a_slice_of_the_suite_passes_with_64_descriptors() -> None:
    run_suite_with_few("", *SLICE)


@pytest.mark.gates
@pytest.mark.timeout(900)
@pytest.mark.parametrize("transport", ["", "tcp"], ids=["shm", "tcp"])
def test_whole_files_of_the_suite_pass_with_64_descriptors(transport: str) -> None:
    run_suite_with_few(transport, *FILES)
