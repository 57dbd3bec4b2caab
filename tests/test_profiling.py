"""What torch's profilers show of calls: ranges of the caller, operators of the callee, arrows between them."""

from __future__ import annotations

import gzip
import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.autograd.profiler_legacy import profile as legacy_profile
from torch.profiler import profile

import fastref.rpc as rpc
from fastref.profiling import attach
from fastref.rpc.functions import async_execution
from fastref.rref import current_wiring
from fastref.runtime.references import use_profiler_flag
from tests import work
from tests.jobs import in_job, job_fixtures

jobs, job = job_fixtures(3, [{}])

SLACK_US = 2000.0  # between the clocks of torch's profiler and ours


def relu(value: torch.Tensor) -> torch.Tensor:
    return torch.relu(value)


def on(to: str, function: Callable[..., Any], *args: Any) -> Any:
    return rpc.rpc_sync(to, function, args)


@async_execution
def on_later(to: str, function: Callable[..., Any], *args: Any) -> Any:
    return rpc.rpc_async(to, function, args)


def divide(a: int, b: int) -> float:
    return a / b


def profile_yourself() -> list[str]:
    with profile() as own:
        torch.ones(2)
    return [event.name for event in own.events()]


def trace_of(profiled: profile, suffix: str = ".json") -> list[dict[str, Any]]:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"trace{suffix}"
        profiled.export_chrome_trace(str(path))
        data = gzip.decompress(path.read_bytes()) if suffix.endswith(".gz") else path.read_bytes()
    events: list[dict[str, Any]] = json.loads(data)["traceEvents"]
    return events


def named(events: list[Any], name: str) -> Any:
    found = [event for event in events if event.name == name]
    assert len(found) == 1, (name, sorted(event.name for event in events))
    return found[0]


@pytest.mark.parametrize("kind", [profile, legacy_profile])
@in_job
def test_calls_are_ranges_with_the_names_that_torch_gives_them(kind: Any) -> None:
    kept = rpc.remote("w1", work.Counter, args=(3,))
    kept.to_here()
    with kind() as profiled:
        rpc.rpc_sync("w1", work.add, args=(1, 2))
        rpc.rpc_async("w2", torch.add, args=(torch.ones(1), 1)).wait()
        rref = rpc.remote("w1", relu, args=(torch.ones(2),))
        rref.to_here()
        rref._get_profiling_future().wait()
        kept.rpc_sync().get()
        kept._get_type()
    events = list(profiled.function_events if kind is legacy_profile else profiled.events())
    for name in (
        "rpc_sync#add(w0 -> w1)",
        "rpc_async#aten::add(w0 -> w2)",
        "rpc_remote#relu(w0 -> w1)",
        "to_here#(w0)->(w1)",
        "rpc_sync#get(w0 -> w1)",
        "rpc_async#_rref_typeof_on_owner(w0 -> w1)",
    ):
        assert named(events, name).time_range.elapsed_us() > 0
        assert not named(events, name).is_remote
    for name, rank in (
        ("rpc_async#aten::add(w0 -> w2)#remote_op: aten::add", 2),
        ("rpc_remote#relu(w0 -> w1)#remote_op: aten::relu", 1),
    ):
        assert named(events, name).is_remote
        assert named(events, name).node_id == rank


@in_job
def test_a_trace_has_what_callees_did_and_arrows_from_the_calls_to_it() -> None:
    with profile() as profiled:
        rpc.rpc_sync("w1", on, args=("w2", relu, torch.ones(2)))
        rpc.rpc_async("w1", on_later, args=("w2", relu, torch.ones(2))).wait()
    events = trace_of(profiled)
    names = {event["pid"]: event["args"]["name"] for event in events if event["name"] == "process_name"}
    assert {"w1", "w2"} <= set(names.values())
    tails = {event["id"]: event for event in events if event["ph"] == "s" and event["cat"] == "rpc"}
    heads = {event["id"]: event for event in events if event["ph"] == "f" and event["cat"] == "rpc"}
    assert len(tails) == 4
    assert tails.keys() == heads.keys()
    ranges = [event for event in events if event["ph"] == "X"]

    def at(end: dict[str, Any], category: str) -> dict[str, Any]:
        found = [e for e in ranges if e["cat"] == category and e["ts"] == end["ts"] and e["tid"] == end["tid"]]
        assert len(found) == 1, found
        return found[0]

    arrows = []
    for number, tail in tails.items():
        call, function = at(tail, "user_annotation"), at(heads[number], "rpc")
        assert call["ts"] - SLACK_US <= function["ts"]
        assert function["ts"] <= call["ts"] + call["dur"] + SLACK_US
        arrows.append((call["name"], function["name"], names[function["pid"]]))
    assert sorted(arrows) == [
        ("rpc_async#on_later(w0 -> w1)", "on_later", "w1"),
        ("rpc_async#relu(w1 -> w2)", "relu", "w2"),
        ("rpc_sync#on(w0 -> w1)", "on", "w1"),
        ("rpc_sync#relu(w1 -> w2)", "relu", "w2"),
    ]
    assert [names[event["pid"]] for event in ranges if event["name"] == "aten::relu"] == ["w2", "w2"]


@in_job
def test_compressed_traces_and_results_have_the_same() -> None:
    with profile(record_shapes=True, profile_memory=True) as profiled:
        rpc.rpc_sync("w1", torch.ones, args=(1000, 3))
    assert any(event["name"] == "aten::ones" and event["cat"] == "cpu_op" for event in trace_of(profiled, ".json.gz"))
    event = named(profiled.events(), "rpc_sync#aten::ones(w0 -> w1)#remote_op: aten::ones")
    assert event.cpu_memory_usage == 12_000
    assert "rpc_sync#aten::ones(w0 -> w1)#remote_op: aten::ones" in {average.key for average in profiled.key_averages()}


@in_job
def test_profiles_that_follow_each_other_show_their_own_calls() -> None:
    profiles = []
    for count in (1, 2, 3):
        with profile() as profiled:
            for _ in range(count):
                rpc.rpc_sync("w1", relu, args=(torch.ones(2),))
        profiles.append(profiled)
    for count, profiled in enumerate(profiles, 1):
        name = "rpc_sync#relu(w0 -> w1)#remote_op: aten::relu"
        assert sum(event.name == name for event in profiled.events()) == count
        assert sum(event["ph"] == "s" for event in trace_of(profiled)) == count


@pytest.mark.parametrize("kind", [profile, legacy_profile])
@in_job
def test_errors_come_through_as_without_a_profiler(kind: Any) -> None:
    with kind() as profiled:
        with pytest.raises(ZeroDivisionError):
            rpc.rpc_sync("w1", divide, args=(1, 0))
        with pytest.raises(ZeroDivisionError):
            rpc.rpc_async("w1", divide, args=(1, 0)).wait()
        rref = rpc.remote("w1", divide, args=(1, 0))
        with pytest.raises(ZeroDivisionError):
            rref.to_here()
        rref._get_profiling_future().wait()
        with pytest.raises(RuntimeError, match="failed to match any schema"):
            rpc.rpc_sync("w1", torch.add, args=())
        with pytest.raises(TypeError, match="function should be callable"):
            rpc.rpc_sync("w1", 3)  # type: ignore[arg-type]
    names = [e.name for e in (profiled.function_events if kind is legacy_profile else profiled.events())]
    for mode in ("sync", "async", "remote"):
        assert f"rpc_{mode}#divide(w0 -> w1)" in names


@in_job
def test_waiting_for_all_waits_for_the_results_of_profiled_calls() -> None:
    futures = []
    with profile(), rpc.api._wait_all():
        futures += [rpc.rpc_async("w1", work.sleep_and_echo, args=(0.05, number)) for number in range(4)]
    assert [future.done() for future in futures] == [True] * 4
    assert [future.value() for future in futures] == [0, 1, 2, 3]


@in_job
def test_a_function_may_profile_itself_for_a_caller_who_profiles() -> None:
    with profile() as profiled:
        assert "aten::ones" in rpc.rpc_sync("w1", profile_yourself)
        assert rpc.rpc_sync("w1", relu, args=(torch.ones(1),)) == 1
    names = [event.name for event in profiled.events()]
    assert "rpc_sync#profile_yourself(w0 -> w1)#remote_op: aten::ones" not in names
    assert "rpc_sync#relu(w0 -> w1)#remote_op: aten::relu" in names


@in_job
def test_calls_to_oneself_are_seen_too() -> None:
    with profile() as profiled:
        rpc.rpc_sync("w0", relu, args=(torch.ones(2),))
    assert named(profiled.events(), "rpc_sync#relu(w0 -> w0)#remote_op: aten::relu").node_id == 0
    assert sum(event["ph"] == "s" for event in trace_of(profiled)) == 1


@in_job
def test_a_worker_profiles_all_that_it_serves() -> None:
    outer = rpc.remote("w1", rpc._server_process_global_profile)
    outer.rpc_sync().__enter__()
    rpc.rpc_sync("w1", relu, args=(torch.ones(2),))
    with profile() as profiled:
        rpc.rpc_sync("w1", on, args=("w2", torch.mul, torch.ones(2), 2))
    outer.rpc_sync().__exit__(None, None, None)
    rpc.rpc_sync("w1", torch.sub, args=(torch.ones(2), 1))  # after it
    found = outer.to_here()
    names = [[event.name for event in events] for events in found.process_global_function_events]
    assert any("aten::relu" in group for group in names)
    assert any("rpc_sync#aten::mul(w1 -> w2)#remote_op: aten::mul" in group for group in names)
    assert "rpc_sync#on(w0 -> w1)#remote_op: rpc_sync#aten::mul(w1 -> w2)" in {e.name for e in profiled.events()}
    assert not any("aten::sub" in group for group in names)
    assert "aten::relu" in {average.key for average in found.key_averages()}


@in_job
def test_what_nobody_profiles_leaves_no_trace() -> None:
    rpc.rpc_sync("w1", relu, args=(torch.ones(2),))
    with profile() as profiled:
        torch.ones(1)
    rpc.rpc_sync("w1", relu, args=(torch.ones(2),))
    assert not [event.name for event in profiled.events() if "rpc" in event.name]
    assert not [event for event in trace_of(profiled) if event.get("cat") == "rpc"]


@in_job
def test_calls_are_seen_by_a_torch_whose_flag_has_another_name() -> None:
    use_profiler_flag(0)
    try:
        assert rpc.rpc_sync("w1", relu, args=(torch.ones(1),)) == 1
        with profile() as profiled:
            rpc.rpc_sync("w1", relu, args=(torch.ones(1),))
    finally:
        attach(current_wiring())
    assert named(profiled.events(), "rpc_sync#relu(w0 -> w1)#remote_op: aten::relu").is_remote
