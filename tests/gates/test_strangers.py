"""A thousand strangers a second at the door of a job, for a minute: what they cost, and what they get."""

from __future__ import annotations

import contextlib
import socket
import statistics
import time
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection as Pipe
from multiprocessing.context import ForkServerContext
from pathlib import Path

import pytest

import fastref.rpc as rpc
from fastref.rendezvous.stream import endpoint_text
from tests import proxied, puppets
from tests.gates.figures import full, tell
from tests.puppets import Puppet, Troupe, troupe_fixture  # noqa: F401
from tests.strangers import knock
from tests.test_door import own_endpoint, resident_bytes
from tests.watchdog import arm

LIFETIME_S = 900.0
pytestmark = [pytest.mark.gates, pytest.mark.timeout(LIFETIME_S)]

RATE_HZ = 1000
SECONDS = 6.0
ROUNDS = 10
MOST_COST = 0.1
ANSWERS_S = 1.0


def call_for(to: str, seconds: float) -> int:
    """Call as fast as it goes; return how often."""
    end, count = time.monotonic() + seconds, 0
    while time.monotonic() < end:
        assert rpc.rpc_sync(to, puppets.echo, (count,)) == count
        count += 1
    return count


def period(crew: list[Puppet]) -> tuple[float, float, float]:
    """Return calls per second, processor seconds of the owner per second, and of both workers per call."""
    before = [puppet.do(time.process_time) for puppet in crew]
    count = crew[1].do(call_for, "w0", SECONDS)
    spent = [puppet.do(time.process_time) - start for puppet, start in zip(crew, before, strict=True)]
    return count / SECONDS, spent[0] / SECONDS, sum(spent) / count


def be_a_decoy(pipe: Pipe) -> None:
    """Take visitors and drop them, until told to end: what the strangers cost their host, whomever they come to."""
    arm(LIFETIME_S)
    with socket.create_server(("127.0.0.1", 0), backlog=1024) as server:
        pipe.send(endpoint_text(*server.getsockname()))
        server.settimeout(0.1)
        with contextlib.suppress(EOFError):
            while not pipe.poll() or pipe.recv():
                with contextlib.suppress(TimeoutError):
                    server.accept()[0].close()


@pytest.fixture
def decoy(spawn_workers: Callable[..., object], mp_context: ForkServerContext) -> Iterator[str]:
    """Return the address of a process that takes visitors and drops them."""
    pipe, theirs = mp_context.Pipe()
    spawn_workers(be_a_decoy, [(theirs,)])
    theirs.close()
    yield pipe.recv()
    pipe.close()


def test_a_thousand_strangers_a_second_cost_little_and_get_nothing(troupe: Troupe, decoy: str, tmp_path: Path) -> None:
    crew = troupe.start(2, transport="tcp")
    stranger = troupe.hire("stranger")
    for puppet in troupe.all:
        puppet.do(arm, LIFETIME_S)
    doors, tripwire = {"decoy": decoy, "worker": crew[0].do(own_endpoint)}, tmp_path / "unpickled"
    period(crew)
    stranger.do(knock, doors["worker"], RATE_HZ, SECONDS, str(tripwire))
    found: dict[str, list[tuple[float, float, float]]] = {"nobody": [], "decoy": [], "worker": []}
    waits_s, come = [], 0
    started_bytes = crew[0].do(resident_bytes)
    for _ in range(full(ROUNDS)):
        found["nobody"].append(period(crew))
        for door, endpoint in doors.items():
            stranger.order(knock, endpoint, RATE_HZ, SECONDS + 0.5, str(tripwire))
            time.sleep(0.2)
            found[door].append(period(crew))
            began = time.monotonic()
            assert crew[1].do(proxied.visit_with, "w0", "anything", {}, {}) == ("refused", "closed")
            waits_s.append(time.monotonic() - began)
            outcome = stranger.outcome()
            assert not outcome["let in"] and not outcome["late"] > 0.05 * outcome["come"] and not tripwire.exists()
        come += outcome["come"]
    grown = crew[0].do(resident_bytes) - started_bytes

    def median(number: int, door: str, beside: str) -> float:
        pairs = zip(found[door], found[beside], strict=True)
        return statistics.median(one[number] / other[number] for one, other in pairs)

    tell(
        "strangers",
        came=come,
        calls_beside_a_decoy=f"x{median(0, 'worker', 'decoy'):.3f}",
        calls_beside_nobody=f"x{median(0, 'worker', 'nobody'):.3f}",
        calls_decoy_beside_nobody=f"x{median(0, 'decoy', 'nobody'):.3f}",
        processor_per_call_beside_a_decoy=f"x{median(2, 'worker', 'decoy'):.3f}",
        owners_processor=[round(statistics.median(one[1] for one in found[door]), 3) for door in found],
        grown_bytes=grown,
        newcomer_ms=round(1e3 * max(waits_s), 1),
    )
    assert crew[0].do(proxied.resumptions) == 0
    assert grown < 1 << 20
    assert max(waits_s) < ANSWERS_S
    assert median(0, "worker", "decoy") > 1 - MOST_COST
    troupe.leave(crew)
