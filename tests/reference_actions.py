"""What can happen in a ``World``, each choice as a plain number: for random walks, and for hypothesis to make small."""

from __future__ import annotations

import random
from collections.abc import Sequence

from tests.reference_world import Handle, World

__all__ = ["Actions", "CHOICES", "walk"]

CHOICES = 1 << 16  # a choice is below it, and taken modulo what there is to choose from


class Actions:
    """One method per action. All take (who, to, choice, variant), and ignore what they need not."""

    # How often a walk takes each. Frames arrive a little more slowly than they are sent.
    weights = {
        "new": 6, "remote": 6, "child": 3, "hand_on": 8, "give_away": 10, "ask_for": 5, "call_method": 4, "fetch": 2,
        "drop": 6, "clear_shelf": 4, "deliver": 20, "deliver_mail": 8, "tick": 8, "settle": 1,
        "kill": 1, "give_all_and_die": 2, "notice": 3,
    }  # fmt: skip

    def __init__(self, world: World) -> None:
        self.world = world

    def take(self, action: str, who: int, to: int, choice: int, variant: int) -> None:
        """Take an action, then hold the account against what there is."""
        getattr(self, action)(who, to, choice, variant)
        self.world.check()

    def new(self, who: int, to: int, choice: int, variant: int) -> None:
        self.world.new(self._node(who))

    def remote(self, who: int, to: int, choice: int, variant: int) -> None:
        rank = self._node(who)
        self.world.remote(rank, self._node(to), self._handles(rank, choice, variant % 3), variant // 3 % 3)

    def child(self, who: int, to: int, choice: int, variant: int) -> None:
        rank = self._node(who)
        for handle in self._handles(rank, choice, 1):
            self.world.child(rank, handle)

    def hand_on(self, who: int, to: int, choice: int, variant: int) -> None:
        rank = self._node(who)
        handles = self._handles(rank, choice, 1 + variant % 3)
        self.world.hand_on(rank, self._node(to), handles, variant // 3 % 3, refused=variant // 9 % 8 == 7)

    def give_away(self, who: int, to: int, choice: int, variant: int) -> None:
        """Hand on all that a node can use, and keep none of it: only the frame carries it then."""
        rank = self._node(who)
        self.world.hand_on(rank, self._node(to), self.world.within_reach(rank), variant % 3, refused=False)
        self.world.variables[rank].clear()
        self.world.clear_shelf(rank)

    def ask_for(self, who: int, to: int, choice: int, variant: int) -> None:
        self.world.ask_for(self._node(who), self._node(to), choice % 4, variant % 3)

    def call_method(self, who: int, to: int, choice: int, variant: int) -> None:
        rank = self._node(who)
        for handle in self._handles(rank, choice, 1):
            self.world.call_method(rank, handle)

    def fetch(self, who: int, to: int, choice: int, variant: int) -> None:
        rank = self._node(who)
        for handle in self._handles(rank, choice, 1):
            self.world.fetch(rank, handle)

    def drop(self, who: int, to: int, choice: int, variant: int) -> None:
        rank = self._node(who)
        if held := self.world.variables[rank]:
            self.world.drop(rank, choice % len(held))

    def clear_shelf(self, who: int, to: int, choice: int, variant: int) -> None:
        self.world.clear_shelf(self._node(who))

    def deliver(self, who: int, to: int, choice: int, variant: int) -> None:
        if pairs := self.world.network.pairs_under_way():
            self.world.network.deliver(*pairs[choice % len(pairs)], 1 + variant % 3)

    def deliver_mail(self, who: int, to: int, choice: int, variant: int) -> None:
        self.world.deliver_mail(choice, again=variant % 3 == 0)

    def tick(self, who: int, to: int, choice: int, variant: int) -> None:
        self.world.network.tick(self._node(who))

    def settle(self, who: int, to: int, choice: int, variant: int) -> None:
        self.world.check_settled()

    def kill(self, who: int, to: int, choice: int, variant: int) -> None:
        """End a node, unless it is the last; ``choice`` says who notices at once."""
        if len(self.world.living()) > 1:
            rank = self._node(who)
            seen_by = [other for other in self.world.living() if other != rank and choice >> other & 1]
            self.world.kill(rank, bool(variant % 2), seen_by)

    def give_all_and_die(self, who: int, to: int, choice: int, variant: int) -> None:
        """Only frames of a dead node carry its references then."""
        living = self.world.living()
        if len(living) > 1:
            heir = living[(who % len(living) + 1 + to % (len(living) - 1)) % len(living)]
            self.give_away(who, living.index(heir), choice, variant)
            self.kill(who, to, choice, 0)

    def notice(self, who: int, to: int, choice: int, variant: int) -> None:
        if unseen := self.world.network.unseen():
            self.world.network.notice(*unseen[choice % len(unseen)])

    def _node(self, choice: int) -> int:
        living = self.world.living()
        return living[choice % len(living)]

    def _handles(self, rank: int, choice: int, most: int) -> Sequence[Handle]:
        reach = self.world.within_reach(rank)
        start = choice % len(reach) if reach else 0
        return reach[start : start + most]


def walk(seed: int, bits: int, steps: int, bad_mail: bool = False, hosts: str = "a") -> None:
    """Take actions at random, then let go of everything.

    The same seed takes the same actions; only the threads of those that wait (``fetch``, ``remote`` without an entry)
    may meet the frames in another order.
    """
    rng = random.Random(seed)
    world = World(rng.randrange(2, 5), bits, rng.choice([64, 128]), bad_mail, hosts)
    actions = Actions(world)
    try:
        for action in rng.choices(list(actions.weights), list(actions.weights.values()), k=steps):
            actions.take(action, *(rng.randrange(CHOICES) for _ in range(4)))
        world.close()
    except BaseException as error:
        error.add_note(f"again: walk({seed}, bits={bits}, steps={steps}, bad_mail={bad_mail}, hosts={hosts!r})")
        raise
