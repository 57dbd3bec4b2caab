"""References in every order of events that has broken such protocols: each told as a story, frame by frame.

Each story is told with nodes that share tables, with nodes that go by messages, and with some of each.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from fastref.errors import CallTimeout, OwnerDied, ReferenceLost, ResourceError, WorkerDied
from fastref.rref import RRef
from fastref.testing import Network

OWNER, ALICE, BOB, CAROL = range(4)

shelf: list[Any] = []


class Value:
    """Something that its owner alone can give."""

    story: set[int] = set()  # those alive in the story that is told

    def __init__(self, content: Any = None) -> None:
        self.story, self.content = Value.story, content
        self.story.add(id(self))

    def __del__(self) -> None:
        self.story.discard(id(self))

    def read(self) -> Any:
        return self.content

    def __reduce__(self) -> tuple[type, tuple[Any]]:
        return Sent, (self.content,)


class Sent:
    """What a fetch of a ``Value`` gives."""

    def __init__(self, content: Any) -> None:
        self.content = content


def alive() -> int:
    """How many values exist."""
    return len(Value.story)


class Unpicklable:
    def __reduce__(self) -> Any:
        raise TypeError("this does not travel")


def keep(*values: Any) -> None:
    shelf.extend(values)


def give() -> Any:
    return shelf[-1]


def give_with(companion: str) -> Any:
    return shelf[-1], Unpicklable()


def ignore(*values: Any) -> None:
    pass


def fail(*values: Any) -> None:
    raise ValueError("no value")


KINDS = {
    "shared tables": (61, "aaaa"),
    "messages": (0, "aaaa"),
    "one bit": (1, "aaaa"),
    "two bits": (2, "aaaa"),
    "two hosts": (61, "aabb"),
    "four hosts": (61, "abcd"),
}


@pytest.fixture(params=KINDS.values(), ids=KINDS.keys())
def network(request: pytest.FixtureRequest) -> Iterator[Network]:
    """Four nodes; afterwards nothing of any story is left on those that live."""
    shelf.clear()
    Value.story = set()
    bits, hosts = request.param
    network = Network(4, bits=bits, window=4, hosts=hosts)
    for node in network:  # names of functions travel, and entries are opened, before the story begins
        for target in range(4):
            for function in (keep, give, give_with, ignore, fail, Value):
                node.rpc_async(target, function)
            network.run(lambda node=node, target=target: node.remote(target, ignore))
    network.settle()
    yield network
    shelf.clear()
    network.settle()  # without the garbage collector: nothing may wait for it
    left = {node.rank: node.holdings() for node in network if node.alive}
    assert not any(left.values()), left
    assert alive() == 0 or not all(node.alive for node in network)


def give_to(network: Network, target: int, content: Any = "content") -> RRef:
    """A reference of ``target`` to a value of the owner's that nobody else holds."""
    network[OWNER].rpc_async(target, keep, (network[OWNER].new(Value(content)),))
    network.settle()
    return shelf.pop()


# ---- handing on


def test_the_owner_lets_go_while_its_reference_is_under_way(network: Network) -> None:
    network[OWNER].rpc_async(ALICE, keep, (network[OWNER].new(Value(1)),))
    network.tick(OWNER)
    assert alive() == 1
    network.settle()
    assert network.run(shelf[0].to_here).content == 1


def test_a_holder_hands_on_and_lets_go_before_the_frame_arrives(network: Network) -> None:
    rref = give_to(network, ALICE)
    network[ALICE].rpc_async(BOB, keep, (rref,))
    del rref
    for _ in range(3):
        for rank in (ALICE, OWNER):
            network.tick(rank)
        network.deliver(ALICE, OWNER, 9)
    assert alive() == 1
    network.settle()
    assert network.run(shelf[0].to_here).content == "content"


def test_two_holders_hand_the_reference_to_each_other_at_once(network: Network) -> None:
    for_alice = give_to(network, ALICE)
    network[ALICE].rpc_async(BOB, keep, (for_alice,))
    network.settle()
    for_bob = shelf.pop()
    network[ALICE].rpc_async(BOB, keep, (for_alice,))
    network[BOB].rpc_async(ALICE, keep, (for_bob,))
    del for_alice, for_bob
    network.deliver(ALICE, BOB)
    network.deliver(BOB, ALICE)
    network.settle()
    assert alive() == 1
    assert [network.run(rref.to_here).content for rref in shelf] == ["content", "content"]


def test_a_reference_makes_two_hops_and_those_before_let_go(network: Network) -> None:
    network[OWNER].rpc_async(ALICE, keep, (network[OWNER].new(Value("content")),))
    network.deliver(OWNER, ALICE)
    network[ALICE].rpc_async(BOB, keep, (shelf.pop(),))
    network.deliver(ALICE, BOB)
    network[BOB].rpc_async(ALICE, keep, (shelf.pop(),))
    network.deliver(BOB, ALICE)
    network.tick(BOB)
    network.deliver(BOB, OWNER, 9)
    assert alive() == 1
    network.settle()
    assert network.run(shelf[0].to_here).content == "content"


def test_the_owner_gets_its_own_reference_back(network: Network) -> None:
    rref = give_to(network, ALICE)
    network[ALICE].rpc_async(OWNER, keep, (rref,))
    del rref
    network.settle()
    assert shelf[0].is_owner()
    assert type(shelf[0].local_value()) is Value


def test_a_reference_that_is_dropped_as_it_arrives_is_let_go_of(network: Network) -> None:
    network[OWNER].rpc_async(ALICE, ignore, (network[OWNER].new(Value()),))
    network.settle()
    assert alive() == 0


def test_a_reference_that_comes_twice_lasts_until_both_are_dropped(network: Network) -> None:
    rref = give_to(network, ALICE)
    network[ALICE].rpc_async(BOB, keep, (rref, rref))
    network[ALICE].rpc_async(BOB, keep, (rref,))
    del rref
    network.settle()
    for _ in range(2):
        shelf.pop()
        network.settle()
        assert alive() == 1
    shelf.pop()
    network.settle()
    assert alive() == 0


def test_a_holder_lets_go_before_the_owner_has_heard_of_it(network: Network) -> None:
    rref = give_to(network, ALICE)
    network[ALICE].rpc_async(BOB, keep, (rref,))
    network.deliver(ALICE, BOB)
    shelf.clear()  # the owner has not been asked yet, or has not answered
    network.tick(BOB)
    assert alive() == 1
    del rref
    network.settle()
    assert alive() == 0


def test_a_reference_in_a_result_lasts_while_the_answer_is_under_way(network: Network) -> None:
    shelf.append(give_to(network, ALICE))
    future = network[BOB].rpc_async(ALICE, give)
    network.deliver(BOB, ALICE)
    shelf.clear()
    network.tick(ALICE)
    network.deliver(ALICE, OWNER, 9)
    assert alive() == 1
    network.settle()
    assert network.run(future.value().to_here).content == "content"


def test_values_that_refer_to_each_other_go_one_after_the_other(network: Network) -> None:
    outer = network.run(lambda: network[ALICE].remote(BOB, Value, (network[ALICE].new(Value()),)))
    network.settle()
    assert alive() == 2
    del outer
    network.settle()
    assert alive() == 0


# ---- remote()


def test_a_reference_overtakes_the_request_that_makes_its_value(network: Network) -> None:
    rref = network[ALICE].remote(OWNER, Value, ("content",))
    network[ALICE].rpc_async(BOB, keep, (rref,))
    network.deliver(ALICE, BOB)
    answer = shelf[0].rpc_async().read()
    network.deliver(BOB, OWNER, 9)
    assert not answer.done()
    network.settle()
    assert answer.value() == "content"
    assert network.run(rref.to_here).content == "content"


def test_a_reference_whose_request_died_with_its_maker_is_lost(network: Network) -> None:
    network[ALICE].rpc_async(BOB, keep, (network[ALICE].remote(OWNER, Value),))
    network.deliver(ALICE, BOB)
    before = shelf[0].rpc_async().read()
    network.deliver(BOB, OWNER, 9)
    network.kill(ALICE, lose=True)
    network.settle()
    after = shelf[0].rpc_async().read()
    network.settle()
    for answer in (before, after):
        with pytest.raises((ReferenceLost, WorkerDied)):
            answer.value()


def test_a_request_that_was_published_makes_its_value_though_its_maker_died(network: Network) -> None:
    network[ALICE].rpc_async(BOB, keep, (network[ALICE].remote(OWNER, Value, ("content",)),))
    network.deliver(ALICE, BOB)
    network.kill(ALICE)
    network.settle()
    assert network.run(shelf[0].to_here).content == "content"


def test_who_asks_for_a_value_that_is_not_there_yet_waits_for_it(network: Network) -> None:
    rref = network[ALICE].remote(OWNER, Value, ("content",))
    answers = [rref.rpc_async().read() for _ in range(3)]
    assert network.oldest(ALICE, OWNER) is not None
    network.settle()
    assert [answer.value() for answer in answers] == ["content"] * 3


def test_who_waits_for_a_value_hears_why_there_is_none(network: Network) -> None:
    rref = network[ALICE].remote(OWNER, fail)
    network[ALICE].rpc_async(BOB, keep, (rref,))
    network.deliver(ALICE, BOB)
    parked = shelf[0].rpc_async().read()
    network.deliver(BOB, OWNER, 9)
    assert not parked.done()
    network.settle()
    with pytest.raises(ValueError, match="no value"):
        parked.value()
    for holder in (rref, shelf[0]):
        with pytest.raises(ValueError, match="no value"):
            network.run(holder.to_here)


def test_a_maker_that_forgets_its_reference_at_once_leaves_nothing(network: Network) -> None:
    network[ALICE].remote(OWNER, Value)
    assert network.under_way(ALICE, OWNER) == 1
    network.settle()
    assert alive() == 0


# ---- deaths


def test_the_sender_is_killed_with_its_reference_in_the_ring(network: Network) -> None:
    rref = give_to(network, ALICE)
    network[ALICE].rpc_async(BOB, keep, (rref,))
    network.kill(ALICE, seen_by=[OWNER])
    for _ in range(3):
        network.tick(OWNER)
    assert alive() == 1
    network.settle()
    assert network.run(shelf[0].to_here).content == "content"


def test_the_sender_is_killed_before_its_reference_is_in_the_ring(network: Network) -> None:
    network[ALICE].rpc_async(BOB, keep, (give_to(network, ALICE),))
    network.kill(ALICE, lose=True)
    network.settle()
    assert not shelf
    assert alive() == 0


def test_the_receiver_is_killed_with_a_reference_in_its_ring(network: Network) -> None:
    rref = give_to(network, ALICE)
    network[ALICE].rpc_async(BOB, keep, (rref,))
    del rref
    network.kill(BOB)
    network.settle()
    assert alive() == 0


def test_the_receiver_of_the_owners_reference_is_killed_before_it_arrives(network: Network) -> None:
    network[OWNER].rpc_async(BOB, keep, (network[OWNER].new(Value()),))
    network.kill(BOB)
    network.settle()
    assert alive() == 0


def test_everybody_between_the_owner_and_the_last_holder_is_killed(network: Network) -> None:
    rref = give_to(network, ALICE)
    network[ALICE].rpc_async(BOB, keep, (rref,))
    network.deliver(ALICE, BOB)
    network.kill(ALICE, seen_by=[OWNER])
    for _ in range(3):
        network.tick(OWNER)
        network.deliver(OWNER, BOB, 9)
    assert alive() == 1
    network.settle()
    assert network.run(shelf[0].to_here).content == "content"
    network.kill(BOB)
    shelf.clear()
    network.settle()
    assert alive() == 0


def test_the_owner_dies_while_its_reference_goes_from_one_to_another(network: Network) -> None:
    rref = give_to(network, ALICE)
    network[ALICE].rpc_async(BOB, keep, (rref,))
    network.kill(OWNER)
    network.deliver(ALICE, BOB)
    for holder in (rref, shelf[0]):
        with pytest.raises(OwnerDied):
            network.run(holder.to_here)


def test_who_waits_for_a_value_hears_of_the_owners_death(network: Network) -> None:
    rref = network[ALICE].remote(OWNER, Value)
    answer = rref.rpc_async().read()
    network.kill(OWNER)
    network.settle()
    with pytest.raises(OwnerDied):
        answer.value()
    with pytest.raises(OwnerDied):
        rref.to_here()


def test_entries_opened_for_a_worker_come_back_when_it_is_killed(network: Network) -> None:
    assert network[ALICE].credits(OWNER) > 0
    network.kill(ALICE)
    network.settle()
    figures = network[OWNER].table.snapshot()
    assert figures["used"] == network[BOB].credits(OWNER) + network[CAROL].credits(OWNER)


def test_both_users_are_killed_and_notice_nothing_of_each_other(network: Network) -> None:
    rref = give_to(network, ALICE)
    network[ALICE].rpc_async(BOB, keep, (rref,))
    network.kill(ALICE, seen_by=[OWNER])
    network.kill(BOB, seen_by=[])
    network.settle()
    assert alive() == 0


def test_two_die_one_after_the_other_and_the_owner_has_not_read_the_second(network: Network) -> None:
    network[ALICE].rpc_async(BOB, keep, (give_to(network, ALICE),))
    network.deliver(ALICE, BOB)  # Bob's own word to the owner is under way
    network.kill(ALICE, seen_by=[OWNER, CAROL])
    network.tick(OWNER)
    network.deliver(OWNER, CAROL, 9)
    network.deliver(CAROL, OWNER, 9)  # for the removal of Alice only Bob's answer is missing
    network[BOB].rpc_async(OWNER, keep, (shelf.pop(),))
    network[OWNER].rpc_async(OWNER, ignore)  # something else to do before it reads what Bob has left
    network.kill(BOB, seen_by=[OWNER])
    network.settle()
    assert network.run(shelf[0].to_here).content == "content"


def test_what_the_dead_asked_for_counts_until_all_have_read_what_they_published(network: Network) -> None:
    network[ALICE].rpc_async(BOB, keep, (give_to(network, ALICE),))
    network.deliver(ALICE, BOB)
    network[BOB].rpc_async(CAROL, keep, (shelf.pop(),))
    network.kill(ALICE, seen_by=[OWNER, CAROL])
    network.tick(OWNER)
    network.deliver(OWNER, CAROL, 9)  # she has read what Alice published, and says so
    network.kill(BOB, seen_by=[OWNER])
    network.deliver(CAROL, OWNER, 9)
    network.tick(OWNER)
    assert alive() == 1
    network.settle()
    assert network.run(shelf[0].to_here).content == "content"


@pytest.mark.parametrize(("parent", "child"), [(ALICE, BOB), (BOB, ALICE)], ids=["read first", "read last"])
def test_who_handed_on_to_the_dead_holds_until_the_owner_has_read_what_they_published(
    network: Network, parent: int, child: int
) -> None:
    network[parent].rpc_async(child, keep, (give_to(network, parent),))
    network.deliver(parent, child)
    network[child].rpc_async(CAROL, keep, (shelf.pop(),))
    network.kill(child, seen_by=[parent])
    network.tick(parent)
    network[parent].rpc_async(OWNER, ignore)  # something to do for the owner between the words of the two
    network.deliver(parent, OWNER, 9)
    assert alive() == 1
    network.settle()
    assert network.run(shelf[0].to_here).content == "content"


# ---- frames that are never sent


def test_a_call_whose_arguments_cannot_travel_takes_nothing_with_it(network: Network) -> None:
    rref = give_to(network, ALICE)
    before = network[ALICE].holdings(), network[OWNER].holdings()
    with pytest.raises(TypeError, match="this does not travel"):
        network[ALICE].rpc_async(BOB, keep, (rref, Unpicklable()))
    network.settle()
    assert (network[ALICE].holdings(), network[OWNER].holdings()) == before


def test_a_remote_call_whose_arguments_cannot_travel_gives_its_entry_back(network: Network) -> None:
    rref = give_to(network, ALICE)
    free = network[BOB].table.snapshot()["free"]
    before = network[BOB].holdings()
    for _ in range(10):
        with pytest.raises(TypeError, match="this does not travel"):
            network.run(lambda: network[ALICE].remote(BOB, keep, (rref, Unpicklable())))
        network.settle()
    assert network[BOB].holdings() == before
    opened = sum(network[rank].credits(BOB) for rank in (OWNER, ALICE, CAROL))
    figures = network[BOB].table.snapshot()
    assert figures["used"] == opened
    assert figures["free"] + figures["used"] == figures["capacity"] >= free


def test_a_result_that_cannot_travel_is_an_error_and_keeps_no_reference(network: Network) -> None:
    shelf.append(give_to(network, ALICE))
    future = network[BOB].rpc_async(ALICE, give_with, ("a reference",))
    network.settle()
    with pytest.raises(TypeError, match="this does not travel"):
        future.value()
    shelf.clear()
    network.settle()
    assert alive() == 0


def test_a_frame_that_is_too_large_lets_its_references_go(network: Network) -> None:
    rref = give_to(network, ALICE)
    before = network[ALICE].holdings(), network[OWNER].holdings()
    if network[ALICE].host is not network[BOB].host:  # there no frame is too large for an arena: it arrives
        network[ALICE].rpc_async(BOB, ignore, (rref, bytes(1 << 23)))
        network.settle()
        assert (network[ALICE].holdings(), network[OWNER].holdings()) == before
        return
    with pytest.raises(ResourceError, match="no room for a block"):
        network[ALICE].rpc_async(BOB, keep, (rref, bytes(1 << 23)))
    network.settle()
    assert (network[ALICE].holdings(), network[OWNER].holdings()) == before


def test_a_frame_for_which_there_is_no_room_lets_its_references_go() -> None:
    Value.story = set()
    network = Network(3, room=2)
    rref = network[OWNER].new(Value())
    network[OWNER].rpc_async(ALICE, ignore, (rref,))
    with pytest.raises(CallTimeout):
        network[OWNER].rpc_async(ALICE, ignore, (rref,), timeout=0.02).value()
    assert network[OWNER].holdings()["pins"] == 1
    network.settle()
    del rref
    network.settle()
    assert network[OWNER].holdings() == network[ALICE].holdings() == {}
    assert alive() == 0
