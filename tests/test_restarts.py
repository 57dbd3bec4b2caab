"""Workers of a job that torchrun has restarted: those of one start meet, and none that is left of another gets in.

Each node counts its own restarts, and goes on with those of other counts where one has failed and another has not.
"""

from __future__ import annotations

import itertools
import re
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from fastref.errors import RendezvousError
from fastref.identity import forget_loopback_token
from fastref.rendezvous.meeting import open_meeting
from fastref.segments import run_root, sweep
from tests.workers import Cast, worker

SECRET = "the token of a job that is restarted"
_jobs = itertools.count()


@pytest.fixture
def store(tmp_path: Path) -> str:
    return f"file://{tmp_path}/store"


@pytest.fixture
def cast(no_leaks: None, mp_context: Any, spawn_workers: Callable[..., Any], store: str) -> Iterator[Cast]:
    cast = Cast(mp_context, spawn_workers, store)
    yield cast
    cast.end()
    sweep(run_root(), clear=forget_loopback_token)


def start(cast: Cast, name: str, rank: int, world_size: int, host: str, life: int, node: int, **more: Any) -> Any:
    """Start a worker as torchrun does on one of several nodes."""
    says = {
        "TORCHELASTIC_RUN_ID": "run7",
        "TORCHELASTIC_RESTART_COUNT": str(life),
        "GROUP_RANK": str(node),
        "WORLD_SIZE": str(world_size),
        "LOCAL_WORLD_SIZE": "1",
        "FASTREF_TOKEN": SECRET,
    }
    return cast.start(name, rank, world_size, environment=says, changes={"host": host}, **more)


def told_of_restart(cast: Cast, number: int, name: str, life: int, later: str) -> None:
    kind, told, _ = cast.outcome(number)
    assert kind is RendezvousError
    assert re.search(
        rf"was restarted: worker '{name}' .* of start {life}, and worker '{later}' .*; it cannot join", told
    )


@pytest.mark.parametrize("hosts", [("red", "blue"), ("red", "red")], ids=["on two hosts", "on one host"])
@pytest.mark.parametrize("lives", [(0, 1), (1, 0)])
def test_nodes_that_were_restarted_more_or_less_often_meet(
    cast: Cast, hosts: tuple[str, str], lives: tuple[int, int]
) -> None:
    for rank in (3, 0, 2, 1):
        node = rank // 2
        start(cast, f"w{rank}", rank, 4, hosts[node], lives[node], node)
    assert [outcome[0] for outcome in cast.outcomes()] == [["w0", "w1", "w2", "w3"]] * 4


def test_a_worker_that_its_own_node_has_outlived_makes_room(cast: Cast) -> None:
    start(cast, "w0", 0, 4, "red", 0, 0)
    start(cast, "old", 3, 4, "blue", 1, 1)
    time.sleep(0.3)  # it has its seat, but for bad luck
    start(cast, "w2", 2, 4, "blue", 2, 1)
    told_of_restart(cast, 1, "old", 1, "w2")
    start(cast, "older", 3, 4, "blue", 0, 1)
    told_of_restart(cast, 3, "older", 0, "w2")
    start(cast, "w3", 3, 4, "blue", 2, 1)
    start(cast, "w1", 1, 4, "red", 0, 0)
    assert [cast.outcome(number)[0] for number in (0, 2, 4, 5)] == [["w0", "w1", "w2", "w3"]] * 4


@pytest.mark.parametrize(
    ("scheme", "is_open"), [("local", False), ("file", True)], ids=["whose job runs", "that waits"]
)
def test_a_coordinator_that_its_own_node_has_outlived_is_in_nobodys_way(cast: Cast, scheme: str, is_open: bool) -> None:
    job = f"local://restarted-{next(_jobs)}" if scheme == "local" else cast.init_method
    size = 2 if is_open else 1
    start(cast, "old", 0, size, "red", 0, 0, init_method=job, timeout_s=1.5)
    if not is_open:
        assert cast.outcome(0)[0] == ["old"]
    time.sleep(0.3)
    start(cast, "w1", 1, 2, "red", 1, 0, init_method=job)
    start(cast, "w0", 0, 2, "red", 1, 0, init_method=job)
    assert cast.outcome(1)[0] == cast.outcome(2)[0] == ["w0", "w1"]


def test_a_coordinator_of_an_earlier_start_is_told_by_that_of_a_later_one(cast: Cast) -> None:
    start(cast, "w0", 0, 2, "red", 1, 0)
    time.sleep(0.3)
    start(cast, "old", 0, 2, "red", 0, 0)
    told_of_restart(cast, 1, "old", 0, "w0")
    start(cast, "w1", 1, 2, "blue", 0, 1)
    assert cast.outcome(0)[0] == cast.outcome(2)[0] == ["w0", "w1"]


def test_what_was_left_for_one_coordinator_does_not_concern_the_next(store: str, tmp_path: Path) -> None:
    with worker("w0", store) as one, worker("w0", store) as next_one:
        meeting, _ = open_meeting(tmp_path, store, 0, 2, 5.0, None, 0)
        meeting.announce(one.record)
        meeting.complain(one.record, "it cannot be reached", 1)
        assert meeting.complaint(one.record) == ("it cannot be reached", 1)
        assert meeting.complaint(next_one.record) is None
