"""A member's list of a group that workers join and leave: who may come, who waits, and as whom."""

from __future__ import annotations

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from fastref.errors import ProtocolError
from fastref.protocol.membership import (
    GENERATIONS,
    INCARNATIONS,
    Admit,
    Asks,
    Gone,
    GroupMembers,
    Met,
    Refuse,
    Removed,
    generations_of,
)
from fastref.protocol.removal import Ask, Died, Done, Drained, Removal, SendDone

ME = Met("w0", 0, 0)


@pytest.fixture
def members() -> GroupMembers:
    return GroupMembers({}, [ME, Met("w1", 1, 0)])


def test_a_rank_that_nobody_has_had_is_free(members: GroupMembers) -> None:
    assert members.handle(Asks(7, "w2", 2)) == [Admit(7, {0: 1, 1: 1})]
    assert members.handle(Met("w2", 2, 0)) == []


@pytest.mark.parametrize(("name", "rank"), [("w2", 1), ("w1", 2), ("w0", 3), ("w3", 0)])
def test_name_and_rank_of_the_living_are_refused(members: GroupMembers, name: str, rank: int) -> None:
    (refusal,) = members.handle(Asks(7, name, rank))
    assert isinstance(refusal, Refuse) and "is not unique" in refusal.sentence


def test_who_wants_the_rank_of_one_who_has_gone_waits_until_it_is_removed(members: GroupMembers) -> None:
    members.handle(Gone(1))
    assert members.handle(Asks(7, "w1", 1)) == []
    assert members.handle(Removed(1)) == [Admit(7, {0: 1, 1: 1})]
    assert members.handle(Met("w1", 1, 1)) == []
    assert members.handle(Asks(8, "other", 2)) == [Admit(8, {0: 1, 1: 2})]


def test_a_name_is_free_as_soon_as_its_worker_has_gone(members: GroupMembers) -> None:
    members.handle(Gone(1))
    assert members.handle(Asks(7, "w1", 2)) == [Admit(7, {0: 1, 1: 1})]


def test_who_gives_up_is_not_answered(members: GroupMembers) -> None:
    members.handle(Gone(1))
    members.handle(Asks(7, "w1", 1))
    members.withdraw(7)
    assert members.handle(Removed(1)) == []


def test_what_the_others_had_heard_of_counts(members: GroupMembers) -> None:
    late = GroupMembers({5: 3}, [ME])
    assert late.handle(Asks(7, "w5", 5)) == [Admit(7, {0: 1, 5: 3})]
    with pytest.raises(ProtocolError, match="has been"):
        late.handle(Met("w5", 5, 2))
    assert late.handle(Met("w5", 5, 3)) == []


def test_what_cannot_be_changes_nothing(members: GroupMembers) -> None:
    for event in (Gone(9), Removed(9), Removed(1), Met("w5", 1, 1)):
        with pytest.raises(ProtocolError):
            members.handle(event)
    members.handle(Gone(1))
    with pytest.raises(ProtocolError):
        members.handle(Met("w1", 1, 1))


def test_incarnations_end() -> None:
    full = GroupMembers({2: INCARNATIONS}, [ME])
    (refusal,) = full.handle(Asks(7, "w2", 2))
    assert isinstance(refusal, Refuse) and "take another" in refusal.sentence


def test_no_two_incarnations_share_a_generation() -> None:
    assert generations_of(0).start == 0
    assert all(generations_of(n).stop == generations_of(n + 1).start for n in range(INCARNATIONS - 1))
    assert len(generations_of(INCARNATIONS - 1)) == GENERATIONS - 1
    assert generations_of(INCARNATIONS - 1).stop == 0xFFFFFFFF


class Group(RuleBasedStateMachine):
    """A member, and all that it has been told."""

    def __init__(self) -> None:
        super().__init__()
        self.members = GroupMembers({}, [ME])
        self.living = {0: "w0"}
        self.leaving: set[int] = set()  # gone, not removed
        self.had: dict[int, int] = {0: 1}
        self.waiting: dict[int, tuple[str, int]] = {}
        self.visits = 0

    @rule(name=st.sampled_from("abc"), rank=st.integers(0, 3))
    def ask(self, name: str, rank: int) -> None:
        self.visits += 1
        commands = self.members.handle(Asks(self.visits, name, rank))
        if rank in self.living or name in self.living.values():
            assert [type(command) for command in commands] == [Refuse]
        elif rank in self.leaving:
            assert commands == []
            self.waiting[self.visits] = (name, rank)
        else:
            assert commands == [Admit(self.visits, self.had)]
            self.meet(name, rank)

    @precondition(lambda self: len(self.living) > 1)
    @rule(data=st.data())
    def go(self, data: st.DataObject) -> None:
        rank = data.draw(st.sampled_from(sorted(set(self.living) - {0})))
        assert self.members.handle(Gone(rank)) == []
        del self.living[rank]
        self.leaving.add(rank)

    @precondition(lambda self: self.leaving)
    @rule(data=st.data())
    def remove(self, data: st.DataObject) -> None:
        rank = data.draw(st.sampled_from(sorted(self.leaving)))
        self.leaving.discard(rank)
        waiting = {visit: name for visit, (name, wanted) in self.waiting.items() if wanted == rank}
        for visit in waiting:
            del self.waiting[visit]
        answered = {command.visitor: command for command in self.members.handle(Removed(rank))}
        assert set(answered) == set(waiting)
        for visit, name in waiting.items():
            assert isinstance(answered[visit], Refuse if name in self.living.values() else Admit)
        # Newcomers come one at a time: of those who waited, one links.
        for visit, name in waiting.items():
            if isinstance(answered[visit], Admit):
                self.meet(name, rank)
                break

    def meet(self, name: str, rank: int) -> None:
        incarnation = self.had.get(rank, 0)
        assert self.members.handle(Met(name, rank, incarnation)) == []
        self.living[rank], self.had[rank] = name, incarnation + 1

    @invariant()
    def free_is_what_nobody_has_and_nothing_is_left_of(self) -> None:
        assert [self.members.is_free(rank) for rank in range(4)] == [
            rank not in self.living and rank not in self.leaving for rank in range(4)
        ]


TestGroup = Group.TestCase
TestGroup.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)


# ---- what membership means for the removal of those who have gone


def test_of_one_who_was_never_met_everything_has_been_read() -> None:
    removal = Removal(0, {0, 1})
    assert removal.handle(Ask(5, 1)) == [SendDone(1, 5)]


def test_of_one_who_lives_here_still_nothing_is_said_yet() -> None:
    removal = Removal(0, {0, 1, 5})
    assert removal.handle(Ask(5, 1)) == []


def test_one_who_was_removed_can_be_forgotten_and_is_still_answered_for() -> None:
    removal = Removal(0, {0, 1, 5})
    with pytest.raises(ProtocolError):
        removal.forget(5)
    removal.handle(Died(5))
    with pytest.raises(ProtocolError):
        removal.forget(5)
    removal.handle(Drained(5))
    removal.handle(Done(5, 1))
    removal.forget(5)
    assert removal.open_cases() == {}
    assert removal.handle(Ask(5, 1)) == [SendDone(1, 5)]
