"""The rows of the comparison and how far each is meant to reach, as data."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["IDLE_ROWS", "ROWS", "ROW_GROUPS", "Reach", "Row", "better_by", "reached"]


@dataclass(frozen=True)
class Reach:
    """What a row aims at: a factor over another backend, a bound in the row's unit, nearness to a floor.

    Parameters
    ----------
    times : float, optional
        How many times better than ``than`` the median is meant to be.
    than : str
        The backend compared with.
    at_most : float, optional
        What the median must not exceed.
    strictly : bool
        Whether it must stay below the bound.
    within : float, optional
        How many times the median of ``floor`` it may be, whatever else it reaches.
    floor : str
        The backend that does only what cannot be left out.
    """

    times: float | None = None
    than: str = "torch"
    at_most: float | None = None
    strictly: bool = False
    within: float | None = None
    floor: str = "memory"

    def __str__(self) -> str:
        parts = []
        if self.times is not None:
            parts.append(f"{self.times:g}x {self.than}")
        if self.at_most is not None:
            parts.append(f"{'<' if self.strictly else '<='} {self.at_most:g}")
        if self.within is not None:
            parts.append(f"within {self.within:g}x {self.floor}")
        return ", ".join(parts)


@dataclass(frozen=True)
class Row:
    """One line of the table.

    Parameters
    ----------
    title : str
        For people.
    unit : str
        Of the figures.
    group : str
        What rows it is asked for with.
    reach : Reach, optional
        What the row aims at.
    measure : str
        The measurement of worker 0 that fills the row; empty for what is read off the whole group.
    burner : bool
        Whether another process burns one core meanwhile.
    higher_is_better : bool
        Whether the row is a rate.
    workers : int, optional
        How many workers it takes, when not as many as the backend runs in any case.
    """

    title: str
    unit: str
    group: str = ""
    reach: Reach | None = None
    measure: str = ""
    burner: bool = False
    higher_is_better: bool = False
    workers: int | None = None


_CALLS = {
    "call": Row("empty `rpc_sync`", "us", "calls", Reach(times=150), "call"),
    "call_asleep": Row("empty `rpc_sync`, the callee asleep", "us", "calls", None, "call_asleep"),
    "method": Row("method of a reference", "us", "calls", Reach(times=120), "method"),
    "remote": Row("`remote().to_here()`", "us", "calls", Reach(times=80), "remote"),
    "fetch": Row("`to_here` of an int, repeated", "us", "calls", Reach(times=250), "fetch"),
    "own": Row("make and drop a reference of one's own", "us", "calls", None, "own"),
    "pass": Row("pass a reference to a third worker", "us", "calls", Reach(times=80), "hand_on"),
    "async": Row("async calls", "1/s", "calls", Reach(times=50), "async_rate", higher_is_better=True),
    "remote_rate": Row("`remote` and fetch", "1/s", "calls", Reach(times=25), "remote_rate", higher_is_better=True),
    "echo_1k": Row("echo a tensor of 1 KiB", "us", "calls", None, "echo_1k"),
    "echo_64k": Row("echo a tensor of 64 KiB", "us", "calls", None, "echo_64k"),
    "echo_1m": Row("echo a tensor of 1 MiB", "us", "calls", None, "echo_1m"),
    "echo_1m_asleep": Row("echo 1 MiB, the callee asleep", "us", "calls", None, "echo_1m_asleep"),
    "call_burn": Row(
        "empty `rpc_sync`, one core burning", "us", "calls", Reach(times=1, than="pipe"), "call", burner=True
    ),
}

# The cold row comes first: it is about a process that has not sent anything of this size before.
_TENSORS = {
    "send_first_128m": Row("send 128 MiB the first time, sum it there", "us", "tensors", Reach(times=1), "send_first"),
    "send_128m": Row("send 128 MiB, sum it there", "us", "tensors", Reach(times=3.5, within=1.3), "send_128m"),
    "onward_16m": Row("send 16 MiB through a worker to another, sum it there", "us", "tensors", None, "onward_16m"),
    "drop_1k": Row("fetch 1 KiB and drop it", "us", "tensors", Reach(times=100), "drop_1k"),
    "drop_64k": Row("fetch 64 KiB and drop it", "us", "tensors", Reach(times=60), "drop_64k"),
    "drop_1m": Row("fetch 1 MiB and drop it", "us", "tensors", Reach(times=30), "drop_1m"),
    "drop_16m": Row("fetch 16 MiB and drop it", "us", "tensors", Reach(times=30), "drop_16m"),
    "drop_128m": Row("fetch 128 MiB and drop it", "us", "tensors", Reach(times=60), "drop_128m"),
    "drop_1m_asleep": Row("fetch 1 MiB and drop it, the owner asleep", "us", "tensors", None, "drop_1m_asleep"),
    "read_1m": Row("fetch 1 MiB and sum it", "us", "tensors", Reach(times=10, within=1.6), "read_1m"),
    "read_128m": Row("fetch 128 MiB and sum it", "us", "tensors", Reach(times=7, within=1.6), "read_128m"),
    "usable_1m": Row("until 1 MiB is there, dropped later", "us", "tensors", Reach(at_most=15), "usable_1m"),
    "usable_128m": Row("until 128 MiB are there, dropped later", "us", "tensors", Reach(at_most=50), "usable_128m"),
    "busy_int": Row("fetch an int while its owner computes", "us", "tensors", Reach(times=2000), "busy_int"),
    "busy_1m": Row("fetch 1 MiB while its owner computes", "us", "tensors", Reach(times=300), "busy_1m"),
    "publish": Row(
        "a new version of 4 MiB until 8 readers have it", "us", "tensors", Reach(within=2), "publish", workers=9
    ),
}

# The same work for every library that has objects in other processes.
_PEERS = {
    "object_create": Row("make an object and call it once", "us", "peers", None, "object_create"),
    "object_call": Row("empty method", "us", "peers", None, "object_call"),
    "object_rate": Row("empty methods, many in flight", "1/s", "peers", None, "object_rate", higher_is_better=True),
    "object_echo_1k": Row("method that echoes 1 KiB", "us", "peers", None, "object_echo_1k"),
    "object_echo_64k": Row("method that echoes 64 KiB", "us", "peers", None, "object_echo_64k"),
    "object_echo_1m": Row("method that echoes 1 MiB", "us", "peers", None, "object_echo_1m"),
    "object_echo_16m": Row("method that echoes 16 MiB", "us", "peers", None, "object_echo_16m"),
    "object_fetch_1m": Row("fetch a tensor of 1 MiB", "us", "peers", None, "object_fetch_1m"),
    "object_pass": Row("pass to a third process, call there", "us", "peers", None, "object_pass"),
    "object_release": Row("let go until the destructor runs", "us", "peers", None, "object_release"),
}

# Between hosts, measured on one: only backends that are held to TCP have these.
_WIRES = {
    "wire_call": Row("empty method over TCP", "us", "wires", None, "wire_call"),
    "wire_rate": Row(
        "empty methods over TCP, many in flight", "1/s", "wires", None, "wire_rate", higher_is_better=True
    ),
    "wire_echo_64": Row("method that echoes 64 B over TCP", "us", "wires", None, "wire_echo_64"),
    "wire_echo_4k": Row("method that echoes 4 KiB over TCP", "us", "wires", None, "wire_echo_4k"),
    "wire_echo_1m": Row("method that echoes 1 MiB over TCP", "us", "wires", None, "wire_echo_1m"),
    "wire_echo_64m": Row("method that echoes 64 MiB over TCP", "us", "wires", None, "wire_echo_64m"),
}

# What is left when the same step in one process is subtracted.
_TRAINING = {
    "step_small": Row(
        "training step over two workers, 512 B of activations", "us", "training", Reach(times=20), "step_small"
    ),
    "step_16m": Row(
        "training step over two workers, 16 MiB of activations", "us", "training", Reach(times=3), "step_16m"
    ),
}

_COSTS = {
    "idle_cpu": Row("idle worker, CPU", "%", "costs", Reach(at_most=0.5, strictly=True)),
    "idle_threads": Row("idle worker, threads", "", "costs", Reach(at_most=6)),
    "idle_descriptors": Row("idle worker, descriptors", "", "costs", Reach(at_most=40)),
    "start": Row("start of 3 workers after import", "s", "costs", Reach(at_most=0.15)),
    "memory": Row("memory per worker beyond torch's import", "MiB", "costs", Reach(at_most=16)),
}

ROWS: dict[str, Row] = {**_CALLS, **_TENSORS, **_PEERS, **_WIRES, **_TRAINING, **_COSTS}
ROW_GROUPS: dict[str, list[str]] = {}
for _name, _row in ROWS.items():
    ROW_GROUPS.setdefault(_row.group, []).append(_name)

IDLE_ROWS = frozenset({"idle_cpu", "idle_threads", "idle_descriptors"})


def better_by(row: Row, value: float, other: float) -> float:
    """Return how many times better ``value`` is than ``other``; above 1 is better, whatever the row's unit."""
    best, worst = (value, other) if row.higher_is_better else (other, value)
    return best / worst if worst else float("inf")


def reached(row: Row, medians: dict[str, float], backend: str = "fastref") -> bool | None:
    """Say whether a backend reaches what a row aims at.

    Parameters
    ----------
    row : Row
        The row.
    medians : dict
        The row's medians by backend.
    backend : str
        The backend judged.

    Returns
    -------
    bool or None
        None when the row aims at nothing or what it needs was not measured.
    """
    reach, value = row.reach, medians.get(backend)
    if reach is None or value is None:
        return None
    verdicts: list[bool] = []
    if reach.at_most is not None:
        verdicts.append(value < reach.at_most if reach.strictly else value <= reach.at_most)
    if reach.times is not None:
        if reach.than not in medians:
            return None
        verdicts.append(better_by(row, value, medians[reach.than]) >= reach.times)
    if reach.within is not None:
        if reach.floor not in medians:
            return None
        verdicts.append(value <= reach.within * medians[reach.floor])
    return all(verdicts)
