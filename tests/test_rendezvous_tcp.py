"""Workers of several hosts find each other and link over TCP, or everybody learns in time why not."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest

from fastref.segments import run_root, sweep
from tests.workers import Cast

TOKEN = {"FASTREF_TOKEN": "the token of the job in this test"}
_jobs = iter(range(10**6))


@pytest.fixture
def cast(no_leaks: None, mp_context: Any, spawn_workers: Callable[..., Any]) -> Iterator[Cast]:
    cast = Cast(mp_context, spawn_workers, f"local://tcp-{next(_jobs)}")
    yield cast
    cast.end()
    sweep(run_root())


@pytest.mark.parametrize("world_size", [2, 4])
def test_workers_of_one_host_are_linked_over_tcp_when_told_so(cast, world_size):
    for rank in reversed(range(world_size)):
        cast.start(f"w{rank}", rank, world_size, environment={"FASTREF_TRANSPORT": "tcp"})
    for names, _, _, ways in cast.outcomes():
        assert names == [f"w{rank}" for rank in range(world_size)]
        assert ways == ["tcp: FASTREF_TRANSPORT"] * (world_size - 1)


def test_workers_of_two_hosts_share_memory_within_and_talk_over_tcp_between_them(cast, tmp_path):
    for rank in (3, 0, 2, 1):
        host = "red" if rank < 2 else "blue"
        cast.start(f"w{rank}", rank, 4, f"file://{tmp_path}/store", environment=TOKEN, changes={"host": host})
    for number, rank in enumerate((3, 0, 2, 1)):
        names, segments, _, ways = cast.outcome(number)
        assert names == ["w0", "w1", "w2", "w3"]
        beside = rank ^ 1
        assert segments == [f"w{beside} for w{rank}"]
        expected = ["shm" if other == beside else "tcp: another host" for other in range(4) if other != rank]
        assert ways == expected
