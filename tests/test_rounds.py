"""The rounds before shutdown: a job is quiet only when no call is under way."""

from __future__ import annotations

import random

import pytest

from fastref.protocol.rounds import Report, Rounds


def test_a_job_is_quiet_after_two_rounds_with_the_same_totals_and_no_call_under_way():
    rounds = Rounds(0, {0, 1})
    for number, (served, quiet) in enumerate([(2, False), (3, False), (3, True)], 1):
        assert rounds.report(3, 0) == Report(number, 3, 0)
        assert not rounds.is_over() and rounds.missing() == {1}
        rounds.heard(1, Report(number, 0, served))
        assert rounds.is_over() and rounds.is_quiet() is quiet


def test_a_call_under_way_keeps_a_job_awake():
    rounds = Rounds(0, {0, 1})
    for number in (1, 2, 3):
        rounds.report(5, 0)
        rounds.heard(1, Report(number, 0, 4))
        assert not rounds.is_quiet()


def test_a_report_may_come_early_and_twice():
    rounds = Rounds(0, {0, 1})
    for number in (1, 1, 2, 2):
        rounds.heard(1, Report(number, 1, 1))
    for quiet in (False, True):
        rounds.report(0, 0)
        assert rounds.is_over() and rounds.is_quiet() is quiet


def test_nobody_waits_for_the_report_of_a_dead_worker():
    rounds = Rounds(0, {0, 1, 2})
    rounds.report(1, 0)
    rounds.heard(1, Report(1, 0, 0))
    assert rounds.missing() == {2}
    rounds.died(2)
    assert rounds.is_over() and not rounds.is_quiet()
    rounds.report(1, 0)
    rounds.heard(1, Report(2, 0, 0))
    assert rounds.is_quiet(), "what the dead one served is not in the sums any more"


def test_a_worker_alone_is_quiet_at_once():
    rounds = Rounds(0, {0})
    rounds.report(0, 0)
    assert rounds.is_over() and not rounds.is_quiet()
    rounds.report(0, 0)
    assert rounds.is_quiet()


@pytest.mark.parametrize("seed", range(200))
def test_a_job_is_never_called_quiet_while_a_call_is_under_way(seed):
    """Workers call each other, report when they are idle, and reports travel as slowly as they like."""
    choice = random.Random(seed)
    count = choice.randint(2, 4)
    workers = [Rounds(rank, set(range(count))) for rank in range(count)]
    sent, served = [0] * count, [0] * count
    calls: list[tuple[int, int]] = []  # under way: callee, further calls that serving it makes
    reports: list[tuple[int, int, Report]] = []
    waiting = [False] * count
    quiet = [False] * count
    budget = 12
    while not all(quiet):
        rank = choice.randrange(count)
        what = choice.random()
        if what < 0.15 and budget and not waiting[rank] and not quiet[rank]:
            budget -= 1
            sent[rank] += 1
            calls.append((choice.randrange(count), choice.randint(0, 2)))
        elif what < 0.4 and calls:
            callee, more = calls.pop(choice.randrange(len(calls)))
            assert not quiet[callee], "a worker had ended when it was called"
            for _ in range(more):
                sent[callee] += 1
                calls.append((choice.randrange(count), 0))
            served[callee] += 1
        elif what < 0.7 and reports:
            to, start, report = reports.pop(choice.randrange(len(reports)))
            workers[to].heard(start, report)
        elif not quiet[rank] and not waiting[rank]:
            report = workers[rank].report(sent[rank], served[rank])
            reports += [(to, rank, report) for to in range(count) if to != rank]
            waiting[rank] = True
        elif not quiet[rank] and workers[rank].is_over():
            waiting[rank] = False
            quiet[rank] = workers[rank].is_quiet()
            assert not (quiet[rank] and calls), "quiet, and a call was under way"
    assert sum(sent) == sum(served) and not calls
