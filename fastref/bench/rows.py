"""The rows of the comparison and how far each is meant to reach, as data."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["IDLE_ROWS", "ROWS", "Reach", "Row", "better_by", "reached"]


@dataclass(frozen=True)
class Reach:
    """What a row aims at: a factor over another backend, or a bound in the row's unit.

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
    """

    times: float | None = None
    than: str = "torch"
    at_most: float | None = None
    strictly: bool = False

    def __str__(self) -> str:
        if self.times is not None:
            return f"{self.times:g}x {self.than}"
        return f"{'<' if self.strictly else '<='} {self.at_most:g}"


@dataclass(frozen=True)
class Row:
    """One line of the table.

    Parameters
    ----------
    title : str
        For people.
    unit : str
        Of the figures.
    reach : Reach, optional
        What the row aims at.
    measure : str
        The measurement of worker 0 that fills the row; empty for what is read off the whole group.
    burner : bool
        Whether another process burns one core meanwhile.
    higher_is_better : bool
        Whether the row is a rate.
    """

    title: str
    unit: str
    reach: Reach | None = None
    measure: str = ""
    burner: bool = False
    higher_is_better: bool = False


ROWS: dict[str, Row] = {
    "call": Row("empty `rpc_sync`", "us", Reach(times=150), "call"),
    "method": Row("method of a reference", "us", Reach(times=120), "method"),
    "remote": Row("`remote().to_here()`", "us", Reach(times=80), "remote"),
    "fetch": Row("`to_here` of an int, repeated", "us", Reach(times=250), "fetch"),
    "own": Row("make and drop a reference of one's own", "us", None, "own"),
    "pass": Row("pass a reference to a third worker", "us", Reach(times=80), "hand_on"),
    "async": Row("async calls", "1/s", Reach(times=40), "async_rate", higher_is_better=True),
    "echo_1k": Row("echo a tensor of 1 KiB", "us", None, "echo_1k"),
    "echo_64k": Row("echo a tensor of 64 KiB", "us", None, "echo_64k"),
    "echo_1m": Row("echo a tensor of 1 MiB", "us", None, "echo_1m"),
    "call_burn": Row("empty `rpc_sync`, one core burning", "us", Reach(times=1, than="pipe"), "call", burner=True),
    "idle_cpu": Row("idle worker, CPU", "%", Reach(at_most=0.5, strictly=True)),
    "idle_threads": Row("idle worker, threads", "", Reach(at_most=6)),
    "idle_descriptors": Row("idle worker, descriptors", "", Reach(at_most=40)),
    "start": Row("start of 3 workers after import", "s", Reach(at_most=0.15)),
    "memory": Row("memory per worker beyond torch's import", "MiB", Reach(at_most=16)),
}

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
    if reach.at_most is not None:
        return value < reach.at_most if reach.strictly else value <= reach.at_most
    other = medians.get(reach.than)
    if other is None or reach.times is None:
        return None
    return better_by(row, value, other) >= reach.times
