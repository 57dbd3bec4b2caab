"""Who takes part in a search of the reference rules, and how often each thing may happen."""

from __future__ import annotations

from collections.abc import Hashable
from typing import NamedTuple

from tests.model.world import ANN, BEN, CAY, OWNER

__all__ = ["QUICK", "SCENARIOS", "SHOWN_BY", "Scenario"]


class Scenario(NamedTuple):
    """Bounds of one search.

    Parameters
    ----------
    limits : what may happen -> how often
    entries : number of entries of the owner's table
    holders : (process, entry) pairs that hold a handle at the start
    users : processes beside the owner
    abroad : users without a bit of their own
    wrap : number of generations the table can tell apart
    """

    limits: dict[Hashable, int]
    entries: int = 1
    holders: tuple[tuple[int, int], ...] = ()
    users: tuple[int, ...] = (ANN, BEN)
    abroad: tuple[int, ...] = ()
    wrap: int = 1 << 32


def _send(*routes: tuple[int, int, int]) -> dict[Hashable, int]:
    return {("send", source, target): times for source, target, times in routes}


_THREE = (ANN, BEN, CAY)

SCENARIOS = {
    "hand over and back": Scenario(
        {**_send((ANN, BEN, 2), (BEN, ANN, 1)), "kill": 1}, holders=((ANN, 0), (BEN, 0))),
    "two hops, two deaths": Scenario(
        {**_send((ANN, BEN, 1), (BEN, CAY, 1)), "kill": 2}, holders=((ANN, 0),), users=_THREE),
    "message that cannot be sent": Scenario(
        {**_send((ANN, BEN, 2), (OWNER, BEN, 1)), "fail": 1, "kill": 1}, holders=((ANN, 0), (OWNER, 0))),
    "owner sends, gets it back": Scenario(
        {**_send((OWNER, ANN, 1), (ANN, OWNER, 1), (ANN, BEN, 1)), "kill": 1}, holders=((OWNER, 0),)),
    "index reused": Scenario(
        {**_send((ANN, BEN, 2)), "kill": 1, "start": 1}, holders=((ANN, 0), (BEN, 0))),
    "credit": Scenario({("grant", ANN): 1, **_send((ANN, BEN, 1)), "kill": 1}),
    "credits and reuse": Scenario({("grant", ANN): 2, ("grant", BEN): 1, **_send((ANN, BEN, 1)), "kill": 1}),
    "credits, index reused": Scenario({("grant", ANN): 2, **_send((ANN, BEN, 1)), "kill": 1, "start": 1}),
    "two entries": Scenario(
        {("grant", ANN): 1, ("grant", BEN): 1, **_send((ANN, BEN, 1), (BEN, ANN, 1)), "kill": 1}, entries=2),
    "republish": Scenario({"publish": 3, ("read", BEN): 2, "kill": 1}, entries=2, users=(BEN,)),
    "republish beside credits": Scenario(
        {"publish": 2, ("read", BEN): 1, ("grant", BEN): 1, "kill": 1}, entries=2, users=(BEN,)),
    "generations wrap": Scenario({"publish": 5, ("read", BEN): 1}, entries=2, users=(BEN,), wrap=2),
    "to one without a bit": Scenario(
        {**_send((ANN, BEN, 2)), "kill": 2}, holders=((ANN, 0),), abroad=(BEN,)),
    "to one without a bit and on": Scenario(
        {**_send((ANN, BEN, 1), (BEN, CAY, 1)), "kill": 1}, holders=((ANN, 0),), users=_THREE, abroad=(BEN,)),
    "owner to one without a bit": Scenario(
        {**_send((OWNER, BEN, 2), (BEN, OWNER, 1)), "fail": 1, "kill": 1},
        holders=((OWNER, 0),), users=(BEN,), abroad=(BEN,)),
    "credit of one without a bit": Scenario(
        {("grant", BEN): 2, **_send((BEN, ANN, 1)), "kill": 1, "start": 1}, abroad=(BEN,)),
    "between two without a bit": Scenario(
        {**_send((OWNER, ANN, 1), (ANN, BEN, 1)), "kill": 1}, holders=((OWNER, 0),), abroad=(ANN, BEN)),
    "two deaths around one without a bit": Scenario(
        {**_send((ANN, BEN, 1), (ANN, CAY, 1)), "kill": 2}, holders=((ANN, 0),), users=_THREE, abroad=(CAY,)),
    "a chain of deaths without bits": Scenario(
        {**_send((ANN, BEN, 1), (BEN, CAY, 1)), "kill": 2}, holders=((ANN, 0),), users=_THREE, abroad=(BEN, CAY)),
    "a chain of deaths, all without bits": Scenario(
        {**_send((OWNER, ANN, 1), (ANN, BEN, 1), (BEN, CAY, 1)), "kill": 2},
        holders=((OWNER, 0),), users=_THREE, abroad=(ANN, BEN, CAY)),
    "a ring of deaths": Scenario(
        {**_send((ANN, BEN, 1), (BEN, CAY, 1), (CAY, OWNER, 1)), "kill": 3},
        holders=((ANN, 0),), users=_THREE, abroad=(BEN, CAY)),
    "late request of one without a bit": Scenario(
        {**_send((ANN, BEN, 1)), ("grant", ANN): 1, "kill": 2}, holders=((ANN, 0),), abroad=(BEN,)),
}  # fmt: skip
"""Every scenario of the whole search, by name."""

_LARGE = (
    "two hops, two deaths", "two entries", "republish", "two deaths around one without a bit",
    "a chain of deaths, all without bits", "a ring of deaths",
)  # fmt: skip

QUICK = tuple(name for name in SCENARIOS if name not in _LARGE)
"""Scenarios small enough for every run of the tests."""

SHOWN_BY = {
    "private_lock": "index reused",
    "dirty_after_and": "owner to one without a bit",
    "clear_dirty_first": "between two without a bit",
    "close_by_cas": "republish",
    "bump_before_free": "late request of one without a bit",
    "reopen_by_cas": "republish beside credits",
    "retire_wrapped": "generations wrap",
    "owner_bit": "owner to one without a bit",
    "look_after_or": "republish",
    "undo_own_only": "republish beside credits",
    "undo_flags": "generations wrap",
    "sender_pin": "owner sends, gets it back",
    "acquire_before_cursor": "owner sends, gets it back",
    "pins_follow_receiver": "index reused",
    "create_pins": "credit",
    "roll_back": "message that cannot be sent",
    "peers_drain_first": "credit",
    "owner_drains_too": "credit",
    "ask_everybody": "index reused",
    "sweep_all_zeros": "credit",
    "slot_after_removal": "credits, index reused",
    "grant_excludes_removal": "credit",
    "fork_before_send": "owner to one without a bit",
    "child_accept": "to one without a bit and on",
    "fork_by_fork": "owner to one without a bit",
    "forks_follow_holder": "credit of one without a bit",
    "ack_after_accept": "to one without a bit and on",
}
"""For each rule a scenario that ends badly without it."""
