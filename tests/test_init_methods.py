"""What an init method, the arguments and the environment say of rank and size, before anything is opened."""

from __future__ import annotations

from typing import Any

import pytest

from fastref.errors import UsageError
from fastref.rendezvous import resolve_member_rank, resolve_rank


@pytest.fixture(autouse=True)
def empty_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for variable in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(variable, raising=False)


@pytest.mark.parametrize(("method", "rank"), [("local://x", -1), ("tcp://x:1", -2)])
def test_a_missing_rank_is_a_usage_error_that_says_what_to_do(method: str, rank: int) -> None:
    with pytest.raises(UsageError, match=f"{method} needs a rank of 0 or more: pass rank= to init_rpc or set RANK"):
        resolve_rank(method, rank, 2)


@pytest.mark.parametrize("rank", [None, "0", 0.0, True])
def test_a_rank_that_is_no_integer_is_refused(rank: Any) -> None:
    with pytest.raises(UsageError, match=f"rank is an integer, got {rank!r}"):
        resolve_rank("local://x", rank, 1)
    with pytest.raises(UsageError, match=f"rank is an integer, got {rank!r}"):
        resolve_member_rank("local://x", rank)


@pytest.mark.parametrize("size", [None, 0])
def test_a_world_without_a_size_is_refused(size: int | None) -> None:
    with pytest.raises(UsageError, match="world_size is missing"):
        resolve_rank("local://x", 0, size)


def test_a_negative_size_is_refused() -> None:
    with pytest.raises(UsageError, match="must be 1 or more"):
        resolve_rank("local://x", 0, -2)


@pytest.mark.parametrize("method", ["", "local", "local://", "://x"])
def test_a_method_that_names_no_place_is_refused(method: str) -> None:
    with pytest.raises(UsageError, match="init_method must look like|needs the name"):
        resolve_rank(method, 0, 1)


def test_a_rank_in_the_environment_that_is_no_number_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "first")
    with pytest.raises(UsageError, match="rank must be an integer, it is 'first'"):
        resolve_rank("env://", -1, 2)


def test_rank_and_size_come_from_the_query_the_arguments_and_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    assert resolve_rank("tcp://x:1?rank=1&world_size=3") == (1, 3)
    assert resolve_rank("local://x", 0, 1) == (0, 1)
    monkeypatch.setenv("RANK", "2")
    monkeypatch.setenv("WORLD_SIZE", "4")
    assert resolve_rank("local://x") == (2, 4)
