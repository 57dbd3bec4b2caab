"""A network card is taken out of a host and put back: in time nothing is lost, and too late its workers are dead."""

from __future__ import annotations

import time
from collections.abc import Iterator
from multiprocessing.context import ForkServerContext

import pytest

import fastref.rpc as rpc
from fastref.errors import OwnerDied, WorkerDied
from tests import proxied, puppets
from tests.hosts import Host, hosts
from tests.puppets import Cell
from tests.world import World

PEER_TIMEOUT_S = 4.0
SILENCE_S = PEER_TIMEOUT_S / 2  # after which a connection counts as broken


@pytest.fixture
def room(mp_context: ForkServerContext) -> Iterator[list[Host]]:
    with hosts(2, mp_context) as two:
        yield two


@pytest.mark.parametrize(
    "away_s",
    [pytest.param(0.3, marks=pytest.mark.gates), SILENCE_S + 0.6],
    ids=["before it is missed", "when it is missed"],
)
def test_all_goes_on_when_a_network_card_is_back_in_time(room: list[Host], away_s: float) -> None:
    world = World(room).join(peer_timeout=PEER_TIMEOUT_S)
    for caller, to in ((0, "w2"), (3, "w1")):
        world[caller].do(puppets.keep_result, "held", rpc.remote, to, Cell, (caller,))
        world[caller].order(proxied.call_for, to, away_s + 1.0)
    time.sleep(0.3)
    room[1].unplug(remove=True)
    time.sleep(away_s)
    room[1].plug()
    for caller, to in ((0, 2), (3, 1)):
        count = world[caller].outcome()
        executions = world[to].do(proxied.executions)
        assert len(executions) == count and set(executions.values()) == {1}
        assert world[caller].do(puppets.get_through, "held") == caller
        assert world[caller].do(proxied.resumptions) > 0 or away_s < SILENCE_S
    for puppet in world.all:
        puppet.do(puppets.drop_all)
    world.check()
    world.leave()


@pytest.mark.gates
def test_a_network_card_that_is_back_too_late_brings_back_nobody(room: list[Host]) -> None:
    world = World(room).join(peer_timeout=PEER_TIMEOUT_S)
    world[0].do(puppets.keep_result, "held", rpc.remote, "w2", Cell, (1,))
    world[0].do(puppets.get_through, "held")
    pids = [puppet.do(puppets.process_id) for puppet in world.all]
    room[1].unplug(remove=True)
    for puppet, lost in zip(world.all, ((2, 3), (2, 3), (0, 1), (0, 1)), strict=True):
        for rank in lost:
            puppet.do(puppets.wait_until_dead, f"w{rank}")
    room[1].plug()
    for caller, lost in ((0, 2), (1, 3), (2, 0), (3, 1)):
        with pytest.raises(WorkerDied, match=f"it has been away for {PEER_TIMEOUT_S:g} s") as told:
            world[caller].do(rpc.rpc_sync, f"w{lost}", puppets.nothing)
        assert (told.value.rank, told.value.pid) == (lost, pids[lost])
        assert world[caller].do(rpc.rpc_sync, f"w{caller ^ 1}", puppets.echo, (1,)) == 1
    with pytest.raises(OwnerDied):
        world[0].do(puppets.get_through, "held")
    world[0].do(puppets.drop_all)
    for side in ((0, 1), (2, 3)):
        world.check(side)
        world.leave(side)
