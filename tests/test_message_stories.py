"""Stories of references whose holders have no bit, or are taken for dead: each was found by a search of the models."""

from __future__ import annotations

import threading
from typing import Any

import pytest

from fastref.errors import ReferenceLost, ResourceError
from fastref.protocol.forks import Clear
from fastref.testing import Network
from tests.bad_mail import BadMailNetwork

OWNER, ALICE, BOB, CAROL = range(4)

shelf: list[Any] = []
existing: set[int] = set()


class Value:
    """Something that its owner alone can give."""

    def __init__(self) -> None:
        existing.add(id(self))

    def __del__(self) -> None:
        existing.discard(id(self))

    def ask(self) -> str:
        return "here"


def keep(*values: Any) -> None:
    shelf.extend(values)


@pytest.fixture(autouse=True)
def _nothing_is_left_of_other_stories() -> None:
    shelf.clear()
    existing.clear()


def test_the_owner_hands_on_while_the_last_fork_is_deleted() -> None:
    """The new fork was registered after the delete was decided and before the mark was cleared: it lost its mark."""
    network = Network(2, bits=0)
    owner = network[OWNER]
    mine = [owner.new(Value())]
    owner.rpc_async(ALICE, keep, tuple(mine))
    network.settle()
    handing_on = threading.Thread(target=lambda: owner.rpc_async(ALICE, keep, tuple(mine)))
    mark_and_clear = owner._mark_and_clear

    def perform(commands: list) -> None:
        if any(isinstance(command, Clear) for command in commands):
            owner._mark_and_clear = mark_and_clear  # type: ignore[method-assign]
            handing_on.start()
            handing_on.join(0.5)  # as far as it comes
        mark_and_clear(commands)

    owner._mark_and_clear = perform  # type: ignore[method-assign]
    shelf.clear()
    network.tick(ALICE)
    network.deliver(ALICE, OWNER)
    handing_on.join()
    mine.clear()
    network.settle()
    assert len(existing) == 1
    assert network.run(lambda: shelf[0].rpc_sync().ask()) == "here"


def test_two_die_whose_own_requests_never_come() -> None:
    """Bob's fork rested on Alice's, and Carol's on Bob's. Alice went when the owner had read what Bob had sent."""
    network = BadMailNetwork(4, bits=0)
    network[OWNER].rpc_async(ALICE, keep, (network[OWNER].new(Value()),))
    network.settle()
    network[ALICE].rpc_async(BOB, keep, (shelf.pop(),))
    network.deliver(ALICE, BOB, 9)
    network[BOB].rpc_async(CAROL, keep, (shelf.pop(),))
    network.deliver(BOB, CAROL, 9)
    network.kill(ALICE)
    Network.settle(network)  # all but the mail
    network.kill(BOB, lose=True)
    Network.settle(network)
    assert len(existing) == 1
    network.settle()
    assert network.run(lambda: shelf[0].rpc_sync().ask()) == "here"
    shelf.clear()
    network.settle()
    assert not existing and not network[OWNER].holdings() and not network[CAROL].holdings()


@pytest.mark.parametrize("bits", [61, 0], ids=["shared tables", "messages"])
def test_who_is_taken_for_dead_reads_no_other_value(bits: int) -> None:
    """Its entry was given away before it noticed, and it reads values without asking."""
    network = Network(3, bits=bits, capacity=64, window=4)
    owner = network[OWNER]
    owner.rpc_async(ALICE, keep, (owner.new("the first"),))
    network.settle()
    reference = shelf.pop()
    assert reference.to_here() == "the first"
    for other in (OWNER, BOB):
        network[other].on_death(ALICE, "its link was cut")
    network.settle()
    with pytest.raises(ResourceError):
        while True:  # until every entry that can be is in use again
            owner.rpc_async(BOB, keep, (owner.new("another"),))
    with pytest.raises(ReferenceLost, match="worker 'worker0' has let go of the value"):
        reference.to_here()
