"""The door of a worker that runs: where it listens, and what strangers and a want of descriptors do to it: little."""

from __future__ import annotations

import contextlib
import os
import resource
import socket
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

import fastref.rpc as rpc
from fastref.rendezvous.stream import parse_endpoint
from fastref.rref import current_wiring
from tests import proxied, puppets
from tests.puppets import PATIENCE_S, Puppet, Troupe, troupe_fixture  # noqa: F401
from tests.strangers import knock

_held: list[int] = []


def listens_at(puppet: Puppet) -> list[str]:
    """Return the addresses at which a process listens for TCP."""
    connections = psutil.Process(puppet.pid).net_connections("tcp")
    return [connection.laddr.ip for connection in connections if connection.status == psutil.CONN_LISTEN]


def own_endpoint() -> str:
    """Return where this worker listens for others."""
    wiring: Any = current_wiring()
    return wiring.record.endpoint


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


def resident_bytes() -> int:
    """Return how much memory this process has."""
    return psutil.Process().memory_info().rss


# ---- where it listens


def test_without_a_token_a_job_listens_on_loopback_only_and_on_nothing_once_it_is_over(troupe: Troupe) -> None:
    crew = troupe.start(2, transport="tcp")
    for puppet in crew:
        assert listens_at(puppet) == ["127.0.0.1"]
    troupe.leave(crew)
    assert [listens_at(puppet) for puppet in crew] == [[], []]


def test_with_a_token_a_job_listens_at_the_chosen_address_only(troupe: Troupe, tmp_path: Path) -> None:
    crew = [troupe.hire(f"w{rank}") for rank in range(2)]
    for rank, puppet in enumerate(crew):
        method = {"init_method": f"file://{tmp_path}/store"}
        environment = {"FASTREF_TOKEN": "the token of this test", "FASTREF_ADDRESS": f"127.0.0.{rank + 2}"}
        puppet.order(join_from_store, puppet.name, rank, method, environment)
    for puppet in crew:
        puppet.outcome()
    assert [listens_at(puppet) for puppet in crew] == [["127.0.0.2"], ["127.0.0.3"]]
    troupe.leave(crew)
    assert [listens_at(puppet) for puppet in crew] == [[], []]


def join_from_store(name: str, rank: int, method: dict[str, str], environment: dict[str, str]) -> None:
    """Join a job of two that meets in a store."""
    os.environ.update(environment, FASTREF_TRANSPORT="tcp")
    rpc.init_rpc(name, rank=rank, world_size=2, rpc_backend_options=rpc.RpcBackendOptions(**method))


# ---- strangers


def test_strangers_of_all_kinds_disturb_nobody_and_are_given_nothing(troupe: Troupe, tmp_path: Path) -> None:
    owner, user = troupe.start(2, transport="tcp")
    stranger = troupe.hire("stranger")
    endpoint, tripwire = owner.do(own_endpoint), tmp_path / "unpickled"
    stranger.order(knock, endpoint, 500, 0.5, str(tripwire))
    user.do(proxied.call_in_a_row, "w0", 0, 200)
    for _ in range(5):  # one who has the token gets in meanwhile, and a word
        assert user.do(proxied.visit_with, "w0", "anything", {}, {}) == ("refused", "closed")
    outcome = stranger.outcome()
    assert outcome["come"] > 100 and not outcome["let in"] and not tripwire.exists()
    assert owner.do(proxied.resumptions) == 0
    troupe.leave([owner, user])


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
