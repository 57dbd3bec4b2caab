"""The protocol without I/O: removal of the dead, and forks that go by messages.

First sentences, one rule each; then whole jobs in which messages are late and workers die at any moment.
"""

from __future__ import annotations

import copy
import itertools

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from fastref.errors import ProtocolError
from fastref.protocol.forks import Accept, ChildAccept, Clear, Delete, Lose, Mark, OwnerForks, Request, UserForks
from fastref.protocol.removal import Ask, Died, Done, Drained, LookAtInbox, Removal, SendAsk, SendDone
from fastref.protocol.removal import Clear as Remove
from fastref.protocol.seen import SeenNumbers

E1, E2 = (5, 0), (6, 0)  # entries: index and generation
ALICE, BOB, CAROL = 1, 2, 3


# Removal


def test_a_death_makes_everybody_look_and_answer():
    removal = Removal(0, {0, 1, 2, 3})
    assert removal.handle(Died(2)) == [LookAtInbox(2), SendAsk(1, 2), SendAsk(3, 2)]
    assert removal.handle(Drained(2)) == []
    assert removal.handle(Done(2, 1)) == []
    assert removal.open_cases() == {2: {3}} and not removal.is_cleared(2)
    assert removal.handle(Done(2, 3)) == [Remove(2)]
    assert removal.is_cleared(2) and removal.open_cases() == {}


def test_nothing_is_cleared_before_this_inbox_is_drained():
    removal = Removal(0, {1, 2})
    removal.handle(Died(2))
    assert removal.handle(Done(2, 1)) == []
    assert removal.handle(Drained(2)) == [Remove(2)]


def test_the_last_two_ask_nobody():
    removal = Removal(0, {0, 1})
    assert removal.handle(Died(1)) == [LookAtInbox(1)]
    assert removal.handle(Drained(1)) == [Remove(1)]


def test_who_asks_before_we_know_is_answered_once_we_have_drained():
    removal = Removal(0, {1, 2, 3})
    assert removal.handle(Ask(2, 1)) == []
    assert removal.handle(Died(2)) == [LookAtInbox(2), SendAsk(1, 2), SendAsk(3, 2)]
    assert removal.handle(Ask(2, 3)) == []
    assert removal.handle(Drained(2)) == [SendDone(1, 2), SendDone(3, 2)]
    assert removal.handle(Ask(2, 3)) == [SendDone(3, 2)]


def test_all_who_are_dead_are_removed_when_every_question_about_any_is_answered():
    removal = Removal(0, {1, 2, 3})
    removal.handle(Died(2))
    removal.handle(Drained(2))
    removal.handle(Done(2, 1))
    assert removal.handle(Died(3)) == [LookAtInbox(3), SendAsk(1, 3)]  # it may have handed on what 2 gave to it
    assert removal.open_cases() == {2: set(), 3: {1}}
    assert removal.handle(Drained(3)) == []
    assert removal.handle(Done(3, 1)) == [Remove(2), Remove(3)]


def test_from_one_who_is_dead_no_answer_is_awaited():
    removal = Removal(0, {1, 2})
    assert removal.handle(Died(1)) == [LookAtInbox(1), SendAsk(2, 1)]
    assert removal.handle(Died(2)) == [LookAtInbox(2)]
    assert removal.handle(Drained(2)) == []
    assert removal.handle(Drained(1)) == [Remove(1), Remove(2)]


def test_a_death_after_a_removal_has_a_removal_of_its_own():
    removal = Removal(0, {1, 2})
    removal.handle(Died(1))
    removal.handle(Drained(1))
    assert removal.handle(Done(1, 2)) == [Remove(1)]
    removal.handle(Died(2))
    assert removal.handle(Drained(2)) == [Remove(2)]


def test_the_dead_are_not_answered():
    removal = Removal(0, {1, 2, 3})
    removal.handle(Ask(2, 3))
    removal.handle(Died(3))
    removal.handle(Died(2))
    assert removal.handle(Drained(2)) == []


def test_messages_about_a_death_may_come_twice():
    removal = Removal(0, {1, 2})
    for event in (Died(2), Ask(2, 1), Drained(2), Done(2, 1)):
        removal.handle(event)
        again = removal.handle(event)
        assert again == ([SendDone(1, 2)] if isinstance(event, Ask) and removal._cases[2].drained else [])
    assert removal.is_cleared(2)
    assert removal.handle(Ask(2, 1)) == [SendDone(1, 2)]  # an answer that was lost can be asked for again


@pytest.mark.parametrize("event", [Died(0), Drained(2), Done(2, 1), Ask(0, 1), Ask(2, 0)])
def test_an_event_that_cannot_be_changes_nothing(event):
    removal = Removal(0, {1, 2})
    before = copy.deepcopy(vars(removal))
    with pytest.raises(ProtocolError):
        removal.handle(event)
    assert vars(removal) == before


class Deaths(RuleBasedStateMachine):
    """A job of workers with the shipped rules; asks and answers are late, inboxes drain when they like.

    What the dead published may sit in any inbox. No worker may clear before every live one has drained.
    """

    @initialize(count=st.integers(2, 5))
    def begin(self, count):
        self.live = set(range(count))
        self.workers = {rank: Removal(rank, set(range(count))) for rank in range(count)}
        self.wire: dict[tuple[int, int], list] = {}
        self.unseen: dict[int, set[int]] = {}  # dead -> who has not seen it yet
        self.to_drain: set[tuple[int, int]] = set()
        self.drained: set[tuple[int, int]] = set()
        self.cleared: list[tuple[int, int]] = []

    def perform(self, me, commands):
        for command in commands:
            if isinstance(command, LookAtInbox):
                self.to_drain.add((me, command.dead))
            elif isinstance(command, Remove):
                assert (me, command.dead) not in self.cleared
                dead = {rank for rank, by in self.unseen.items() if me not in by}  # all that are removed or are now
                assert all((rank, about) in self.drained for rank in self.live for about in dead)
                self.cleared.append((me, command.dead))
            else:
                event = Ask(command.dead, me) if isinstance(command, SendAsk) else Done(command.dead, me)
                assert command.to != me
                self.wire.setdefault((me, command.to), []).append(event)

    def handle(self, me, event):
        self.perform(me, self.workers[me].handle(event))

    def pick(self, things, pick):
        things = sorted(things)
        return things[pick % len(things)] if things else None

    @rule(pick=st.integers(0, 99))
    def die(self, pick):
        if len(self.live) > 1:
            dead = self.pick(self.live, pick)
            self.live.discard(dead)
            self.unseen[dead] = set(self.live)
            for seen in self.unseen.values():
                seen.discard(dead)
            self.to_drain = {(me, about) for me, about in self.to_drain if me != dead}

    @rule(pick=st.integers(0, 99))
    def see(self, pick):
        seen = self.pick([(me, dead) for dead, ranks in self.unseen.items() for me in ranks], pick)
        if seen:
            self.unseen[seen[1]].discard(seen[0])
            self.handle(seen[0], Died(seen[1]))

    @rule(pick=st.integers(0, 99))
    def drain(self, pick):
        """Everything of the dead, their asks and answers too, has been read by then."""
        case = self.pick(self.to_drain, pick)
        if case:
            me, dead = case
            while self.wire.get((dead, me)):
                self.handle(me, self.wire[dead, me].pop(0))
            self.to_drain.discard(case)
            self.drained.add(case)
            self.handle(me, Drained(dead))

    @rule(pick=st.integers(0, 99), twice=st.booleans())
    def deliver(self, pick, twice):
        link = self.pick([link for link, waiting in self.wire.items() if waiting and link[1] in self.live], pick)
        if link:
            event = self.wire[link].pop(0)
            self.handle(link[1], event)
            if twice:
                self.handle(link[1], event)

    @invariant()
    def an_open_case_waits_for_those_whose_death_was_not_seen(self):
        for me in getattr(self, "live", ()):
            for dead, awaited in self.workers[me].open_cases().items():
                assert dead not in self.live and me not in awaited
                assert awaited <= self.live | {rank for rank, by in self.unseen.items() if me in by}

    def teardown(self):
        """Whatever was late comes in the end: every dead worker is removed everywhere, once."""
        for _ in itertools.count():
            before = (len(self.to_drain), sum(map(len, self.unseen.values())), sum(map(len, self.wire.values())))
            self.see(0)
            self.drain(0)
            self.deliver(0, False)
            if before == (0, 0, 0) or not any(
                (self.to_drain, *self.unseen.values(), *(w for (_, to), w in self.wire.items() if to in self.live))
            ):
                break
        dead = set(self.workers) - self.live
        assert {(me, about) for me, about in self.cleared if me in self.live} == set(itertools.product(self.live, dead))


TestDeaths = Deaths.TestCase
TestDeaths.settings = settings(
    max_examples=200, stateful_step_count=50, deadline=None, suppress_health_check=list(HealthCheck)
)


# Forks, the owner's half


def test_the_first_fork_marks_an_entry_and_the_last_clears_it():
    owner = OwnerForks()
    assert owner.made(E1, 10, ALICE) == [Mark(5)]
    assert owner.requested(E1, 11, BOB, 1, alive=True) == [Accept(BOB, E1, 11, True)]
    assert owner.made(E2, 12, ALICE) == [Mark(6)]
    assert (owner.count(E1), owner.count(E2), owner.total()) == (2, 1, 3)
    assert owner.deleted(E1, (10,), ALICE) == []
    assert owner.deleted(E1, (11,), BOB) == [Clear(5)]
    assert owner.deleted(E2, (12,), ALICE) == [Clear(6)]
    assert owner.total() == 0


def test_a_fork_of_an_entry_that_is_gone_is_refused():
    owner = OwnerForks()
    assert owner.requested(E1, 10, ALICE, 1, alive=False) == [Accept(ALICE, E1, 10, False)]
    assert owner.total() == 0


def test_a_refusal_that_was_lost_is_repeated():
    owner = OwnerForks()
    for alive in (False, True):  # by now there is another object, which has nothing to do with it
        assert owner.requested(E1, 10, ALICE, 1, alive=alive) == [Accept(ALICE, E1, 10, False)]


def test_a_fork_that_was_deleted_stays_deleted_when_its_request_comes_again():
    owner = OwnerForks()
    owner.made(E1, 9, BOB)
    owner.requested(E1, 10, ALICE, 1, alive=True)
    owner.deleted(E1, (10,), ALICE)
    assert owner.requested(E1, 10, ALICE, 1, alive=True) == [Accept(ALICE, E1, 10, False)]  # nobody waits for it
    assert owner.count(E1) == 1


def test_it_stays_deleted_however_much_has_happened_since():
    """No number of forks that are gone may push out the memory of one: the request may be as late as it likes."""
    owner = OwnerForks()
    owner.made(E1, 9, BOB)
    for number in range(1, 100_001):
        owner.requested(E1, 100 + number, ALICE, number, alive=True)
        owner.deleted(E1, (100 + number,), ALICE)
    owner.requested(E1, 101, ALICE, 1, alive=True)
    assert owner.count(E1) == 1
    assert owner.unmet() == 0  # and nothing of them is kept


def test_requests_that_overtake_each_other_are_all_dealt_with_once():
    owner = OwnerForks()
    for number in (3, 1, 2, 3, 2, 1):
        assert owner.requested(E1, 10 + number, ALICE, number, alive=True)[-1].ok
    assert owner.count(E1) == 3 and owner.unmet() == 0


def test_a_delete_takes_nothing_from_another_holder():
    owner = OwnerForks()
    owner.made(E1, 10, ALICE)
    assert owner.deleted(E1, (10,), BOB) == [] and owner.count(E1) == 1


def test_who_comes_after_a_lost_holder_numbers_its_requests_anew():
    owner = OwnerForks()
    owner.requested(E1, 10, ALICE, 1, alive=True)
    assert owner.holder_lost(ALICE) == [Clear(5)]
    assert owner.requested(E2, 11, ALICE, 1, alive=True) == [Mark(6), Accept(ALICE, E2, 11, True)]


def test_the_holders_forks_go_with_it():
    owner = OwnerForks()
    for entry, fork, holder in ((E1, 10, ALICE), (E1, 11, BOB), (E2, 12, ALICE), (E2, 13, ALICE)):
        owner.made(entry, fork, holder)
    assert owner.holder_lost(ALICE) == [Clear(6)]
    assert owner.holder_lost(ALICE) == []
    assert owner.holder_lost(BOB) == [Clear(5)]


def test_every_message_to_an_owner_may_come_twice():
    owner = OwnerForks()
    owner.requested(E1, 10, ALICE, 1, alive=True)
    assert owner.requested(E1, 10, ALICE, 1, alive=True) == [Accept(ALICE, E1, 10, True)]
    assert owner.count(E1) == 1
    assert owner.deleted(E1, (10,), ALICE) == [Clear(5)]
    assert owner.deleted(E1, (10,), ALICE) == []


# Numbers


@given(st.lists(st.integers(1, 12), max_size=40))
def test_a_number_comes_first_once(numbers):
    seen, met = SeenNumbers(), set()
    for number in numbers:
        assert seen.first(number) == (number not in met)
        met.add(number)
        missing = set(range(1, max(met) + 1)) - met
        assert seen.gaps() == sum(each - 1 not in missing for each in missing)  # no more than is missing


def test_a_number_may_claim_anything():
    seen = SeenNumbers()
    assert seen.first(1 << 62) and seen.gaps() == 1
    with pytest.raises(ProtocolError, match="0 is not the number of a message"):
        seen.first(0)


# Forks, the user's half


def test_a_fork_that_the_owner_made_needs_no_request():
    user = UserForks()
    assert user.received(0, E1, 10, parent=0) == []
    user.granted(0, E1, 11)
    assert user.let_go(0, E1) == [Delete(0, E1, (10, 11))]
    assert user.let_go(0, E1) == []


def test_a_fork_that_a_user_made_is_asked_for_and_its_parent_told():
    user = UserForks()
    assert user.received(0, E1, 10, parent=BOB) == [Request(0, E1, 10, 1)]
    assert user.waiting() == 1 and user.waits_for_child_of(BOB) and not user.waits_for_child_of(CAROL)
    assert user.accepted(10, True) == [ChildAccept(BOB, 10)]
    assert user.accepted(10, True) == []  # twice
    assert user.waiting() == 0 and not user.waits_for_child_of(BOB)
    assert user.let_go(0, E1) == [Delete(0, E1, (10,))]


def test_a_fork_that_is_let_go_before_the_answer_is_deleted_after_it():
    user = UserForks()
    user.received(0, E1, 10, parent=BOB)
    assert user.let_go(0, E1) == []
    user.check()
    assert user.accepted(10, True) == [ChildAccept(BOB, 10), Delete(0, E1, (10,))]
    assert user.let_go(0, E1) == []


def test_a_refused_fork_is_lost_and_its_parent_still_told():
    user = UserForks()
    user.received(0, E1, 10, parent=BOB)
    assert user.accepted(10, False) == [ChildAccept(BOB, 10), Lose(0, E1)]


def test_a_fork_that_comes_while_another_is_given_back_is_its_own():
    user = UserForks()
    user.received(0, E1, 10, parent=BOB)
    user.let_go(0, E1)
    user.received(0, E1, 11, parent=CAROL)
    assert user.accepted(10, True) == [ChildAccept(BOB, 10), Delete(0, E1, (10,))]
    assert user.accepted(11, True) == [ChildAccept(CAROL, 11)]
    assert user.let_go(0, E1) == [Delete(0, E1, (11,))]


def test_an_owners_death_frees_the_parents():
    user = UserForks()
    user.received(0, E1, 10, parent=BOB)
    user.received(0, E2, 11, parent=0)
    user.received(9, E1, 12, parent=BOB)
    assert user.owner_lost(0) == [ChildAccept(BOB, 10)]
    assert user.owner_lost(0) == [] and user.waiting() == 1
    assert user.let_go(0, E2) == []
    assert user.accepted(10, True) == []


class Forks(RuleBasedStateMachine):
    """One owner, three users without a bit: references are handed about by messages that are late or come twice.

    Messages come in any order, and all but those that bring a reference may come again at any time. The entry must stay
    marked as long as any user has a handle or a message carries one, and be cleared in the end.
    """

    users = st.integers(1, 3)

    @initialize()
    def begin(self):
        self.owner = OwnerForks()
        self.user = {rank: UserForks() for rank in (1, 2, 3)}
        self.handles = dict.fromkeys((1, 2, 3), 0)  # pins for children included
        self.children: dict[int, int] = {}  # fork -> its parent, who is pinned
        self.forks = itertools.count(100)
        self.wire: dict[tuple[int, int], list] = {}
        self.marked = False

    def send(self, start, end, message):
        self.wire.setdefault((start, end), []).append(message)

    def owner_performs(self, commands):
        for command in commands:
            if isinstance(command, Mark):
                assert not self.marked
                self.marked = True
            elif isinstance(command, Clear):
                assert self.marked
                self.marked = False
            else:
                self.send(0, command.holder, command)

    def user_performs(self, me, commands):
        for command in commands:
            assert not isinstance(command, Lose), "the owner lost an entry that somebody held"
            to = command.parent if isinstance(command, ChildAccept) else command.owner
            self.send(me, to, command)

    def drop(self, me):
        self.handles[me] -= 1
        if self.handles[me] == 0:
            self.user_performs(me, self.user[me].let_go(0, E1))

    @rule(to=users)
    def owner_hands_on(self, to):
        fork = next(self.forks)
        self.owner_performs(self.owner.made(E1, fork, to))
        self.send(0, to, ("fork", fork, 0))

    @rule(giver=users, to=users)
    def user_hands_on(self, giver, to):
        if giver != to and self.handles[giver]:
            fork = next(self.forks)
            self.handles[giver] += 1
            self.children[fork] = giver
            self.send(giver, to, ("fork", fork, giver))

    @rule(me=users)
    def let_go(self, me):
        if self.handles[me] > sum(parent == me for parent in self.children.values()):
            self.drop(me)

    @rule(pick=st.integers(0, 99), twice=st.booleans())
    def deliver(self, pick, twice):
        links = sorted(link for link, waiting in self.wire.items() if waiting)
        if not links:
            return
        start, end = links[pick % len(links)]
        waiting = self.wire[start, end]
        message = waiting.pop(pick // len(links) % len(waiting))
        if twice and not isinstance(message, tuple):
            waiting.append(message)
        self.receive(start, end, message)

    def receive(self, start, end, message):
        if isinstance(message, tuple):
            self.handles[end] += 1
            self.user_performs(end, self.user[end].received(0, E1, message[1], message[2]))
        elif isinstance(message, Request):
            self.owner_performs(self.owner.requested(E1, message.fork, start, message.number, alive=self.marked))
        elif isinstance(message, Delete):
            self.owner_performs(self.owner.deleted(E1, message.forks, start))
        elif isinstance(message, Accept):
            self.user_performs(end, self.user[end].accepted(message.fork, message.ok))
        elif self.children.pop(message.fork, None) is not None:
            self.drop(end)

    @invariant()
    def the_entry_is_open_while_anybody_has_it(self):
        travelling = any(isinstance(m, tuple) for waiting in getattr(self, "wire", {}).values() for m in waiting)
        if travelling or any(getattr(self, "handles", {}).values()):
            assert self.marked
        for user in getattr(self, "user", {}).values():
            user.check()

    def teardown(self):
        while any(self.wire.values()):
            self.deliver(0, False)
        for me in (1, 2, 3):
            while self.handles[me]:
                self.drop(me)
        while any(self.wire.values()):
            self.deliver(0, False)
        assert not self.marked and self.owner.total() == 0 and not self.children
        assert all(user.waiting() == 0 for user in self.user.values())


TestForks = Forks.TestCase
TestForks.settings = settings(
    max_examples=200, stateful_step_count=50, deadline=None, suppress_health_check=list(HealthCheck)
)
