"""A host that was stopped for 30 s comes back to a job that has given it up: nothing that it still does counts."""

from __future__ import annotations

import time
from collections.abc import Iterator
from multiprocessing.context import ForkServerContext

import pytest

import fastref.rpc as rpc
from fastref.errors import OwnerDied
from tests import puppets
from tests.gates.figures import tell
from tests.hosts import Host, hosts
from tests.puppets import Cell
from tests.test_across_hosts import use_kept
from tests.world import World, wait_until

pytestmark = [pytest.mark.gates, pytest.mark.timeout(600)]

STOPPED_S = 30.0
# So many of so many entries: what is made while they are away lies where theirs was.
HELD, ENTRIES = 3000, 4096


@pytest.fixture
def room(mp_context: ForkServerContext) -> Iterator[list[Host]]:
    with hosts(2, mp_context) as two:
        yield two


def hold_many(owner: str, count: int) -> None:
    """Hold so many values of another worker."""
    rrefs = [rpc.remote(owner, Cell, (number,)) for number in range(count)]
    for rref in rrefs:
        rref.to_here()
    puppets.keep("many", rrefs)


def drop_slowly() -> None:
    """Let go of them one by one."""
    rrefs = puppets.kept("many")
    while rrefs:
        rrefs.pop()
        time.sleep(0.0005)


def held_are_right() -> int:
    """Look at all values that are held here; return how many there are."""
    rrefs = puppets.kept("many")
    assert [rref.to_here().value for rref in rrefs] == list(range(len(rrefs)))
    return len(rrefs)


def test_who_was_stopped_for_30_s_is_told_and_takes_nothing_from_anybody(room: list[Host]) -> None:
    world, count = (
        World(room).join(table_capacity=ENTRIES),
        HELD,
    )  # w0, w1 | w2, w3, with the time that others have by default
    world[2].do(hold_many, "w0", count)
    world[3].do(puppets.keep_result, "held", rpc.remote, "w0", Cell, (1,))
    world[3].do(puppets.call_kept, "held", "to_here")
    world[2].order(drop_slowly)  # what it says of that while it is stopped and afterwards comes too late
    wait_until(lambda: world[0].do(puppets.entries_held) < count)
    room[1].stop()
    stopped_s = time.monotonic()
    for rank in (0, 1):
        for name in ("w2", "w3"):
            world[rank].do(puppets.wait_until_dead, name)
        world[rank].do(puppets.wait_until_removed)
    noticed_s = time.monotonic() - stopped_s
    world[0].do(puppets.wait_until_entries, 0)
    world[1].do(hold_many, "w0", count)
    time.sleep(max(0.0, stopped_s + STOPPED_S - time.monotonic()))
    room[1].cont()
    world[2].outcome()
    for rank in (2, 3):
        for name in ("w0", "w1"):
            world[rank].do(puppets.wait_until_dead, name)
    for use in ("to_here", "rpc_sync"):
        with pytest.raises(OwnerDied, match="w0"):
            world[3].do(use_kept, "held", use)
    for rank in (2, 3):
        world[rank].do(puppets.drop_all)
    assert world[0].do(puppets.entries_held) == count
    assert world[1].do(held_are_right) == count
    tell("a host stopped", seconds=STOPPED_S, given_up_after_s=round(noticed_s, 1), values_lost=0, of=count)
    world[1].do(puppets.drop_all)
    for side in ((0, 1), (2, 3)):
        world.check(side)
        world.leave(side)
