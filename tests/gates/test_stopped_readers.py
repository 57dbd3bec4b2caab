"""A reader that is stopped at full rate costs bounded memory, and delays nobody else."""

from __future__ import annotations

import statistics
import time

import pytest
import torch

import fastref.rpc as rpc
from tests import puppets
from tests.gates.figures import full, percentile, tell
from tests.puppets import Puppet, Troupe, troupe_fixture  # noqa: F401

pytestmark = [pytest.mark.gates, pytest.mark.timeout(1800)]

READERS = 8
ELEMENTS = 50_000
SECONDS = 2.0


class Server:
    """An owner whose value changes and is read by many."""

    def __init__(self) -> None:
        self.weights = torch.zeros(ELEMENTS)
        self.rref = rpc.RRef(self.weights)

    def reference(self) -> rpc.RRef:
        return self.rref

    def step(self, gradient: torch.Tensor) -> None:
        self.weights += gradient


def work_for(owner: str, seconds: float) -> list[float]:
    """Send gradients and fetch weights; return how long each round took, in microseconds."""
    server = rpc.rpc_sync(owner, the_server)
    weights = server.rpc_sync().reference()
    gradient, found = torch.ones(ELEMENTS), []
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        began = time.perf_counter_ns()
        server.rpc_sync().step(gradient)
        weights.to_here()
        found.append((time.perf_counter_ns() - began) / 1000)
    return found


_server: list[rpc.RRef] = []


def the_server() -> rpc.RRef:
    if not _server:
        _server.append(rpc.RRef(Server()))
    return _server[0]


def let_go_of_server() -> None:
    _server.clear()


def bytes_lent() -> int:
    return puppets.snapshot()["arena"]["bytes_lent"]


def rounds(readers: list[Puppet], owner: Puppet) -> list[float]:
    for reader in readers:
        reader.order(work_for, owner.name, SECONDS)
    return [took for reader in readers for took in reader.outcome()]


def test_a_stopped_reader_costs_bounded_memory_and_delays_nobody(troupe: Troupe) -> None:
    owner, *readers = troupe.start(READERS + 1)
    for reader in readers:
        reader.do(work_for, owner.name, 0.1)
    ratios, lent = [], []
    for _ in range(full(10)):
        before = rounds(readers[1:], owner)
        readers[0].order(work_for, owner.name, SECONDS)
        time.sleep(0.1)
        readers[0].stop()
        during = rounds(readers[1:], owner)
        lent.append(owner.do(bytes_lent))
        readers[0].go_on()
        readers[0].outcome()
        ratios.append(percentile(during, 99) / percentile(before, 99))
    tell(
        "one of 8 readers stopped",
        pairs=len(ratios),
        p99_of_the_others=f"x{statistics.median(ratios):.2f}",
        most_bytes_lent=max(lent),
    )
    # What a stopped reader keeps: what was under way to it, and one value that it was reading.
    assert max(lent) <= (READERS + 2) * 2 * ELEMENTS * 4
    owner.do(let_go_of_server)
