"""Workers of different hosts go on where they were when a connection breaks, and know when it was the end."""

from __future__ import annotations

import os
import re
import signal
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import pytest

from fastref.errors import CallTimeout
from fastref.identity import self_made_certificates
from tests import proxied
from tests.pieces import ASKER, DIRECTIONS
from tests.puppets import PATIENCE_S, Puppet, Troupe, troupe_fixture  # noqa: F401

Start = Callable[..., list[Puppet]]
MOST_DAMAGED = 8  # times that the same record may come damaged
FAR_AWAY_S = 1000.0  # what this would have to be waited for does not happen in a test


@pytest.fixture
def start(troupe: Troupe) -> Iterator[Start]:
    started: list[Puppet] = []

    def start(
        count: int = 2,
        peer_timeout: float = FAR_AWAY_S,
        join: Callable[..., None] = proxied.join_behind_a_proxy,
        scripts: Mapping[int, tuple[object, ...]] | None = None,
        **options: object,
    ) -> list[Puppet]:
        started.extend(troupe.hire(f"w{rank}") for rank in range(count))
        for rank, script in (scripts or {}).items():
            started[rank].do(proxied.begin_with, *script)
        for rank, puppet in enumerate(started):
            puppet.order(join, puppet.name, rank, count, troupe.job, {"peer_timeout": peer_timeout, **options})
        for puppet in started:
            puppet.outcome()
        return list(started)

    yield start
    for puppet in started:
        if puppet.process.is_alive():
            puppet.go_on()
            assert puppet.do(proxied.close_proxy) == []


def assert_each_ran_once(puppet: Puppet, count: int) -> None:
    executions = puppet.do(proxied.executions)
    assert len(executions) == count and set(executions.values()) == {1}


# ---- breaks


@pytest.mark.parametrize("seed", range(4))
def test_a_stream_of_calls_goes_on_over_many_breaks(start: Start, troupe: Troupe, seed: int) -> None:
    alice, bob = start()
    alice.do(proxied.use_script, proxied.cut_often, seed, 5, 40)
    bob.order(proxied.call_from_many_threads, "w0", 3, 100)
    alice.order(proxied.call_in_a_row, "w1", 0, 100)
    bob.outcome()
    alice.outcome()
    assert alice.do(proxied.resumptions) >= 5
    assert_each_ran_once(alice, 300)
    assert_each_ran_once(bob, 100)
    for puppet in (alice, bob):
        puppet.do(proxied.wait_until_clean)
    troupe.leave([alice, bob])


@pytest.mark.parametrize("seed", [0, *(pytest.param(seed, marks=pytest.mark.gates) for seed in range(1, 6))])
def test_a_job_over_tls_goes_on_over_breaks_at_any_byte(
    start: Start, troupe: Troupe, tmp_path: Path, seed: int
) -> None:
    alice, bob = start(tls=self_made_certificates(tmp_path / "tls"))
    alice.do(proxied.use_script, proxied.cut_at_bytes, seed, 1_000_000)
    bob.order(proxied.call_from_many_threads, "w0", 3, 25)
    alice.order(proxied.call_in_a_row, "w1", 0, 25)
    bob.outcome()
    alice.outcome()
    alice.do(proxied.let_all_on)
    assert alice.do(proxied.resumptions) >= 4
    assert_each_ran_once(alice, 75)
    assert_each_ran_once(bob, 25)
    for puppet in (alice, bob):
        puppet.do(proxied.wait_until_clean)
    troupe.leave([alice, bob])


@pytest.mark.parametrize("tls", [False, True], ids=["plain", "TLS"])
def test_the_system_keeps_a_connection_as_long_as_its_worker_after_a_break_too(
    start: Start, troupe: Troupe, tmp_path: Path, tls: bool
) -> None:
    alice, bob = start(
        peer_timeout=40.0, join=proxied.join_over_tcp, tls=self_made_certificates(tmp_path / "tls") if tls else None
    )
    assert [puppet.do(proxied.silences_s) for puppet in (alice, bob)] == [{40.0}, {40.0}]
    bob.do(proxied.hang_up, "w0")
    bob.do(proxied.call_in_a_row, "w0", 0, 5)
    assert alice.do(proxied.resumptions) == 1
    assert [puppet.do(proxied.silences_s) for puppet in (alice, bob)] == [{40.0}, {40.0}]
    troupe.leave([alice, bob])


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_a_cut_anywhere_in_a_record_costs_no_call(start: Start, troupe: Troupe, direction: str) -> None:
    alice, bob = start()
    shares = (0.0, 0.02, 0.5, 0.98, 1.0)
    for number, share in enumerate(shares):  # of a large record, and of a small one
        for first in (0, 1):
            alice.do(proxied.use_script, proxied.cut_next, direction, share)
            bob.do(proxied.call_in_a_row, "w0", 10 * number + 5 * first + first, 2)
    assert alice.do(proxied.resumptions) == 2 * len(shares)
    assert_each_ran_once(alice, 4 * len(shares))
    troupe.leave([alice, bob])


@pytest.mark.parametrize("seed", range(3))
def test_references_are_made_handed_on_and_dropped_over_many_breaks(start: Start, troupe: Troupe, seed: int) -> None:
    alice, bob, carol = start(3)
    for number, puppet in enumerate((alice, bob)):
        puppet.do(proxied.use_script, proxied.cut_often, 10 * seed + number, 3, 25)
    carol.order(proxied.hand_references_round, "w0", "w1", 40)
    carol.outcome()
    assert sum(puppet.do(proxied.resumptions) for puppet in (alice, bob, carol)) >= 5
    assert_each_ran_once(alice, 40)
    for puppet in (alice, bob, carol):
        puppet.do(proxied.wait_until_clean)
    troupe.leave([alice, bob, carol])


@pytest.mark.parametrize("told", DIRECTIONS)
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_one_end_that_has_not_seen_the_break_is_told_by_the_other(
    start: Start, troupe: Troupe, told: str, direction: str
) -> None:
    # Silence, by which it would see for itself, is out of the question: there are minutes to it.
    alice, bob = start()
    alice.do(proxied.use_script, proxied.cut_next, direction, 0.0, (told,))
    bob.do(proxied.call_in_a_row, "w0", 0, 20)
    alice.do(proxied.call_in_a_row, "w1", 0, 20)
    assert alice.do(proxied.resumptions) == bob.do(proxied.resumptions) == 1
    assert_each_ran_once(alice, 20)
    assert_each_ran_once(bob, 20)
    troupe.leave([alice, bob])


@pytest.mark.parametrize(
    ("pair", "scripts"),
    [
        ((0, 1), {0: ("", "w1"), 1: ("w2", "")}),
        ((2, 0), {0: ("w1", "w2")}),
    ],
    ids=["the one that waits to be asked", "the one that asks"],
)
def test_a_break_while_the_other_end_is_not_linked_with_all_yet_is_mended_too(
    start: Start, troupe: Troupe, pair: tuple[int, int], scripts: dict[int, tuple[str, str]]
) -> None:
    # The first of the pair has all its links and misses that to the second, which waits for the third.
    puppets = start(3, scripts={rank: (proxied.start_slowly, *names) for rank, names in scripts.items()})
    first, second = (puppets[rank] for rank in pair)
    first.do(proxied.call_in_a_row, second.name, 0, 5)
    second.do(proxied.call_in_a_row, first.name, 0, 5)
    assert [puppet.do(proxied.resumptions) for puppet in (first, second)] == [1, 1]
    troupe.leave(puppets)


def test_calls_wait_while_the_other_end_is_away_but_not_beyond_their_time(start: Start, troupe: Troupe) -> None:
    alice, bob = start()
    for puppet in (alice, bob):
        puppet.do(proxied.proxy_do, "shut")
    bob.do(proxied.begin_call, "w0", 1, 0.3)
    with pytest.raises(CallTimeout):
        bob.do(proxied.answer)
    bob.do(proxied.begin_call, "w0", 2)
    for puppet in (alice, bob):
        puppet.do(proxied.proxy_do, "open")
    assert bob.do(proxied.answer) == 3
    assert set(alice.do(proxied.executions).values()) == {1}
    troupe.leave([alice, bob])


def test_a_farewell_that_is_cut_off_keeps_nobody(start: Start, troupe: Troupe) -> None:
    alice, bob = start()
    bob.do(proxied.call_in_a_row, "w0", 0, 5)
    alice.do(proxied.use_script, proxied.cut_farewells)
    troupe.leave([alice, bob])
    assert [alice.end(), bob.end()] == [0, 0]


# ---- the end


@pytest.mark.parametrize("killed", [0, 1])
def test_a_killed_worker_is_noticed_because_nothing_listens_there_any_more(start: Start, killed: int) -> None:
    puppets = start()
    survivor = puppets[1 - killed]
    survivor.order(proxied.wait_for_death, f"w{killed}")
    puppets[killed].kill()
    died_s = time.monotonic()
    reason, seen_s = survivor.outcome()
    assert reason.startswith("its process has ended")
    print(f"noticed after {(seen_s - died_s) * 1e3:.1f} ms")
    name, text = survivor.do(proxied.trouble_with, f"w{killed}")
    assert name == "WorkerDied" and f"pid {puppets[killed].pid}" in text


@pytest.mark.parametrize("killed", [0, 1])
def test_a_child_of_a_killed_worker_does_not_make_it_look_alive(start: Start, killed: int) -> None:
    puppets = start(join=proxied.join_over_tcp)  # the child has the sockets of a proxy, too
    child = puppets[killed].do(proxied.fork_a_child)
    try:
        puppets[killed].kill()
        assert puppets[1 - killed].do(proxied.wait_for_death, f"w{killed}")[0].startswith("its process has ended")
    finally:
        os.kill(child, signal.SIGKILL)


@pytest.mark.parametrize("stopped", [0, 1])
def test_one_that_was_stopped_for_too_long_is_dead_and_told_so_when_it_comes_back(start: Start, stopped: int) -> None:
    puppets = start(peer_timeout=1.0)
    other = puppets[1 - stopped]
    puppets[stopped].stop()
    reason, _ = other.do(proxied.wait_for_death, f"w{stopped}")
    assert "it has been away for 1 s: nothing has come from it for 0.5 s" in reason
    assert other.do(proxied.trouble_with, f"w{stopped}")[0] == "WorkerDied"
    puppets[stopped].go_on()
    name, text = puppets[stopped].do(proxied.trouble_with, f"w{1 - stopped}")
    assert name == "WorkerDied"
    assert re.search(rf"worker 'w{1 - stopped}' .* has given up worker 'w{stopped}' .*: it has been away for 1 s", text)
    assert puppets[stopped].do(proxied.executions) == {}


def test_two_between_which_there_is_no_way_give_each_other_up(start: Start) -> None:
    alice, bob = start(peer_timeout=1.0)
    for puppet in (alice, bob):
        puppet.do(proxied.proxy_do, "shut")
    for puppet, other in ((alice, "w1"), (bob, "w0")):
        assert "it has been away for 1 s" in puppet.do(proxied.wait_for_death, other)[0]


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize(("field", "value"), [(0, 1 << 56), (0, 1 << 40), (1, 64), (2, 1 << 30), (3, 1 << 30), (5, 8)])
def test_nonsense_is_no_break_that_is_mended(start: Start, direction: str, field: int, value: int) -> None:
    alice, bob = start()
    alice.do(proxied.use_script, proxied.talk_nonsense, direction, field, value)
    bob.do(proxied.begin_call, "w0", 1)
    hearer, speaker = (alice, bob) if direction == ASKER else (bob, alice)
    reason = hearer.do(proxied.wait_for_death, speaker.name)[0]
    assert re.search(r"no frame|without a number|left out|never sent|memory", reason)
    told = speaker.do(proxied.wait_for_death, hearer.name)[0]
    assert f"has given up worker '{speaker.name}'" in told and reason in told


# ---- what is damaged on its way


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("at", [1, 7, 8, 16, 24, 33, 36, 42, 47, 48, 60, 0.5, 0.999])
def test_what_is_damaged_on_its_way_is_sent_again(start: Start, troupe: Troupe, direction: str, at: float) -> None:
    alice, bob = start(join=proxied.join_as_over_a_network)
    for number in range(2):  # with a large tensor, and without
        alice.do(proxied.use_script, proxied.damage, direction, at, 2)
        bob.do(proxied.call_in_a_row, "w0", 5 * number + number, 1)
    assert (alice if direction == ASKER else bob).do(proxied.damages) == 4
    assert bob.do(proxied.resumptions) == 4
    assert_each_ran_once(alice, 2)
    troupe.leave([alice, bob])


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("at", [1, 8, 36, 48, 0.5])
def test_what_is_damaged_however_often_it_is_sent_ends_the_session(start: Start, direction: str, at: float) -> None:
    alice, bob = start(join=proxied.join_as_over_a_network)
    alice.do(proxied.use_script, proxied.damage, direction, at, MOST_DAMAGED)
    bob.order(proxied.trouble_with, "w0")
    hearer, speaker = (alice, bob) if direction == ASKER else (bob, alice)
    reason = "what it sends comes damaged, again and again"
    if hearer is alice:
        assert reason in hearer.do(proxied.wait_for_death, speaker.name)[0]
    name, text = bob.outcome()
    assert name == "WorkerDied" and reason in text


@pytest.mark.parametrize("seed", [0, 1, *(pytest.param(seed, marks=pytest.mark.gates) for seed in range(2, 12))])
def test_calls_go_on_over_a_network_that_damages(start: Start, troupe: Troupe, seed: int) -> None:
    alice, bob = start(join=proxied.join_as_over_a_network)
    alice.do(proxied.use_script, proxied.damage_often, seed, 4_000_000)
    bob.order(proxied.call_from_many_threads, "w0", 3, 100)
    alice.order(proxied.call_in_a_row, "w1", 0, 100)
    bob.outcome()
    alice.outcome()
    assert sum(puppet.do(proxied.damages) for puppet in (alice, bob)) >= 5
    alice.do(proxied.let_all_on)
    assert_each_ran_once(alice, 300)
    assert_each_ran_once(bob, 100)
    for puppet in (alice, bob):
        puppet.do(proxied.wait_until_clean)
    troupe.leave([alice, bob])


def test_who_writes_what_is_being_sent_breaks_a_connection_at_most(start: Start, troupe: Troupe) -> None:
    alice, bob = start(join=proxied.join_as_over_a_network)
    assert bob.do(proxied.write_while_it_is_sent, "w0", 2.0) > 100
    assert alice.do(proxied.damages) <= 1
    troupe.leave([alice, bob])


# ---- what is sent from where it lies


TOTAL = sum(range(proxied.LENT))


def lose_what_is_under_way(alice: Puppet) -> None:
    alice.do(proxied.proxy_do, "cut")
    alice.do(proxied.proxy_do, "go_on")


def test_a_caller_that_leaves_early_has_its_arguments_for_itself(start: Start, troupe: Troupe) -> None:
    alice, bob = start()
    alice.do(proxied.proxy_do, "stall")
    assert bob.do(proxied.lend_and_leave, "w0") == 1
    lose_what_is_under_way(alice)
    assert alice.do(proxied.noted_total) == TOTAL
    assert alice.do(proxied.resumptions) == 1
    troupe.leave([alice, bob])


def test_a_caller_that_does_not_wait_may_change_its_arguments(start: Start, troupe: Troupe) -> None:
    alice, bob = start()
    alice.do(proxied.proxy_do, "stall")
    assert bob.do(proxied.lend_and_go_on, "w0") == 0
    lose_what_is_under_way(alice)
    assert alice.do(proxied.noted_total) == TOTAL
    bob.do(proxied.answer)
    troupe.leave([alice, bob])


@pytest.mark.parametrize(("what", "lent"), [("kept", 0), ("dropped", 1)])
def test_an_answer_is_lent_only_while_nobody_can_change_it(start: Start, troupe: Troupe, what: str, lent: int) -> None:
    alice, bob = start()
    bob.do(proxied.begin_fetching, "w0", what)
    assert alice.do(proxied.change_what_was_given) == lent
    lose_what_is_under_way(alice)
    assert bob.do(proxied.answer_total) == TOTAL
    alice.do(proxied.wait_until_nothing_is_lent)
    troupe.leave([alice, bob])


# ---- strangers at the door


@pytest.mark.parametrize(
    ("kind", "changes", "record_changes", "sentence"),
    [
        ("session-resume", {"to_instance": "0" * 16}, {}, "wants instance 0000000000000000, this is worker 'w0'"),
        ("session-resume", {}, {"instance": "0" * 16}, "is not one to which worker 'w0' .* is linked over TCP"),
        ("session-resume", {}, {"rank": 7}, "is not one to which worker 'w0' .* is linked over TCP"),
        ("session-resume", {"received": -1}, {}, "received"),
        ("session-resume", {"attempt": "first"}, {}, "attempt"),
        ("session-call", {}, {}, "the higher rank comes again, the lower rank calls for it"),
        ("join-hello", {}, {}, "^closed$"),
        ("link-hello", {}, {}, "^closed$"),
        ("anything", {}, {}, "^closed$"),
    ],
)
def test_who_has_the_token_but_no_session_here_is_refused(
    start: Start, troupe: Troupe, kind: str, changes: dict, record_changes: dict, sentence: str
) -> None:
    alice, bob = start()
    answer, text = bob.do(proxied.visit_with, "w0", kind, changes, record_changes)
    assert answer == "refused" and re.search(sentence, text)
    bob.do(proxied.call_in_a_row, "w0", 0, 5)
    assert alice.do(proxied.resumptions) == 0
    troupe.leave([alice, bob])


def test_one_who_claims_to_have_what_was_never_sent_is_given_up(start: Start) -> None:
    alice, bob = start()
    bob.do(proxied.visit_with, "w0", "session-resume", {"received": 10**6}, {})
    assert "it claims what cannot be" in alice.do(proxied.wait_for_death, "w1")[0]
    assert "has given up worker 'w1'" in bob.do(proxied.wait_for_death, "w0")[0]
