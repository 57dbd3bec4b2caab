"""A session whose connection breaks goes on over another one, or ends for both ends, and for a reason."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastref.errors import ProtocolError
from fastref.protocol.session import (
    Accept,
    Answer,
    Broke,
    Called,
    Came,
    Command,
    Denied,
    Deny,
    Dial,
    Ended,
    Event,
    GiveUp,
    HangUp,
    Heard,
    Left,
    Missed,
    Refused,
    Resumed,
    Session,
    Spoilt,
    Tick,
)

PATIENCE_S = 15.0


class Drive:
    """A session, and the clock that it sees."""

    def __init__(self, asks: bool) -> None:
        self.session = Session(asks, PATIENCE_S)
        self.now_s = 100.0

    def handle(self, event: Event, after_s: float = 0.0) -> list[Command]:
        self.now_s += after_s
        return self.session.handle(event, self.now_s)

    def breaks(self, after_s: float = 0.0) -> list[Command]:
        self.now_s += after_s
        return self.handle(Broke("reset", self.now_s))


@pytest.fixture
def asker() -> Drive:
    return Drive(asks=True)


@pytest.fixture
def listener() -> Drive:
    return Drive(asks=False)


def either(test):
    return pytest.mark.parametrize("drive", [Drive(asks=True), Drive(asks=False)], ids=["asker", "listener"])(test)


def test_the_asker_dials_at_once_and_then_after_pauses_that_grow_to_a_second(asker):
    assert asker.breaks() == [Dial(1)]
    pauses = []
    for attempt in range(2, 10):
        assert asker.handle(Missed("no way there")) == []
        pauses.append(round(asker.session.due_s - asker.now_s, 3))
        assert asker.handle(Tick(), pauses[-1] / 2) == []
        assert asker.handle(Tick(), pauses[-1] / 2 + 1e-9) == [Dial(attempt)]
    assert pauses == [0.05, 0.1, 0.2, 0.4, 0.8, 1.0, 1.0, 1.0]


@either
def test_who_is_away_for_too_long_is_given_up(drive):
    drive.breaks()
    drive.handle(Missed("no way there"))
    assert drive.handle(Tick(), PATIENCE_S) == [
        GiveUp("it has been away for 15 s: reset; then no way there"),
    ]
    assert drive.session.due_s == math.inf


@either
def test_silence_before_the_break_counts_as_time_away(drive):
    drive.handle(Broke("nothing has come from it for 7.5 s", drive.now_s - 7.5))
    assert drive.session.due_s == drive.now_s + 7.5
    assert isinstance(drive.handle(Tick(), 7.5)[0], GiveUp)


@either
def test_one_that_was_silent_for_all_of_its_time_is_given_up_at_once(drive):
    assert drive.handle(Broke("silence", drive.now_s - 16)) == [GiveUp("it has been away for 15 s: silence")]


@either
def test_one_where_nothing_listens_any_more_is_dead_at_once(drive):
    drive.breaks()
    assert drive.handle(Refused()) == [GiveUp("its process has ended: nothing listens where it did (reset)")]


@either
def test_nonsense_is_death_at_once_whatever_the_state(drive):
    assert drive.handle(Spoilt("no frame")) == [GiveUp("no frame")]
    assert drive.breaks() == []


@either
def test_one_who_says_farewell_is_not_waited_for(drive):
    assert drive.handle(Left("it closed its link")) == [GiveUp("it closed its link", left=True)]
    assert drive.breaks() == []


@either
def test_for_whom_this_end_is_over_it_is_over_here_too(drive):
    drive.breaks()
    assert drive.handle(Denied("you were given up")) == [GiveUp("you were given up")]


def test_who_comes_back_after_he_was_given_up_is_told_why(listener, asker):
    listener.handle(Ended("it sent nonsense"))
    assert listener.handle(Came(1)) == [Deny("it sent nonsense")]
    asker.handle(Spoilt("no frame"))
    assert asker.handle(Called(0)) == [Deny("no frame")]


def test_the_session_goes_on_when_the_asker_has_come(listener):
    assert listener.breaks() == [Dial(0)]
    assert listener.handle(Came(1)) == [Accept()]
    assert listener.handle(Resumed()) == []
    assert listener.session.state == "connected" and listener.session.due_s == math.inf


def test_a_listener_that_has_seen_no_break_hangs_up_first(listener):
    assert listener.handle(Came(1)) == [HangUp()]
    assert listener.breaks() == [Accept()]
    listener.handle(Resumed())
    assert listener.breaks(after_s=5) == [Dial(1)]


def test_an_attempt_that_arrives_behind_a_later_one_is_turned_away(listener):
    listener.breaks()
    assert listener.handle(Came(2)) == [Accept()]
    listener.handle(Resumed())
    assert listener.handle(Came(1)) == [Deny("it has come again since")]
    assert listener.session.state == "connected"


def test_a_listener_goes_on_asking_whether_the_asker_lives(listener):
    listener.breaks()
    assert listener.handle(Heard()) == []
    assert listener.handle(Tick(), 0.06) == [Dial(0)]
    assert isinstance(listener.handle(Refused())[0], GiveUp)


def test_an_asker_that_has_seen_no_break_hangs_up_when_it_is_called(asker):
    assert asker.handle(Called(0)) == [Answer(), HangUp()]
    assert asker.breaks() == [Dial(1)]


def test_a_call_about_an_earlier_connection_changes_nothing(asker):
    asker.breaks()
    asker.handle(Resumed())
    assert asker.handle(Called(0)) == [Answer()]
    assert asker.handle(Called(1)) == [Answer(), HangUp()]


def test_a_call_ends_the_pause(asker):
    asker.breaks()
    assert asker.handle(Called(0)) == [Answer()]  # it is dialing
    asker.handle(Missed("no way there"))
    assert asker.handle(Called(0)) == [Answer(), Dial(2)]


def test_connections_that_do_not_last_are_not_asked_for_without_a_pause(asker):
    asker.breaks()
    for _ in range(5):
        asker.handle(Resumed())
        assert asker.breaks(after_s=0.01) == []
        assert asker.session.due_s == asker.now_s + 0.05
        assert isinstance(asker.handle(Tick(), 1.0)[0], Dial)
    asker.handle(Resumed())
    assert isinstance(asker.breaks(after_s=1.0)[0], Dial)
    asker.handle(Missed("no way there"))
    assert asker.session.due_s == asker.now_s + 0.05


def test_each_end_does_only_its_own_part(listener, asker):
    with pytest.raises(ProtocolError, match="the higher rank comes again"):
        asker.handle(Came(1))
    with pytest.raises(ProtocolError, match="the higher rank comes again"):
        listener.handle(Called(1))
    assert asker.session.state == listener.session.state == "connected"


EVENTS = st.sampled_from(
    [
        Broke("reset", 0.0),
        Spoilt("nonsense"),
        Left("farewell"),
        Ended("cut"),
        Refused(),
        Missed("no way"),
        Denied("over"),
        Heard(),
        Resumed(),
        Tick(),
        Came(1),
        Came(2),
        Called(0),
        Called(1),
    ]  # fmt: skip
)


@given(st.booleans(), st.lists(st.tuples(EVENTS, st.floats(0, 3)), max_size=40))
def test_a_session_is_given_up_once_and_never_lives_again(asks, events):
    drive, ends = Drive(asks), 0
    for event, after_s in events:
        if isinstance(event, Broke):
            event = Broke("reset", drive.now_s + after_s)
        if isinstance(event, Came | Called) and isinstance(event, Called) is not asks:
            continue
        was_over = drive.session.state == "over"
        commands = drive.handle(event, after_s)
        ends += sum(isinstance(command, GiveUp) for command in commands)
        assert not was_over or all(isinstance(command, Deny) for command in commands)
        # Whoever is away has something to wait for: a dial that is under way, or a time.
        assert (drive.session.due_s < math.inf) == (drive.session.state == "away")
    assert ends <= 1
