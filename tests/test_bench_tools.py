"""The command, the picture and the counts of instructions."""

from __future__ import annotations

import mmap
import shutil
import time

import pytest

from fastref import cli
from fastref.bench import Comparison, Effort, Summary
from fastref.bench.__main__ import main
from fastref.bench.bare import BareRing
from fastref.bench.counting import is_counted
from fastref.bench.instructions import count_instructions, missing, parse_dump
from fastref.bench.parts import PARTS
from fastref.bench.plot import plot
from fastref.bench.rows import ROW_GROUPS
from fastref.bench.timing import sample_each, time_apart, time_each
from fastref.channels.shm import RING_SIZE, ring_bytes
from fastref.errors import FastrefError, UsageError

TINY = Effort(seconds=0.02, min_samples=5, warmup=2)


def _summary(figure: float) -> Summary:
    return Summary(figure, figure, figure, 1, first=2 * figure)


def test_the_command_has_a_subcommand_that_measures(capsys):
    assert cli.main(["bench", "--quick", "--seconds", "0.02", "--backends", "pipe", "--rows", "call"]) == 0
    assert "empty `rpc_sync`" in capsys.readouterr().out


def test_the_help_of_a_subcommand_names_it(capsys):
    with pytest.raises(SystemExit, match="0"):
        cli.main(["bench", "--help"])
    assert capsys.readouterr().out.startswith("usage: fastref bench")


@pytest.mark.parametrize("arguments", [[], ["smoke"]])
def test_the_command_refuses_what_it_does_not_know(arguments, capsys):
    with pytest.raises(SystemExit, match="2"):
        cli.main(arguments)
    assert "bench" in capsys.readouterr().err


def test_a_group_of_rows_stands_for_all_of_them(monkeypatch):
    asked = []
    monkeypatch.setattr("fastref.bench.__main__.compare", lambda backends, rows, *rest: asked.extend(rows) or None)
    monkeypatch.setattr("fastref.bench.__main__.text_table", lambda comparison: "")
    assert main(["--rows", "tensors,call"]) == 0
    assert asked == [*ROW_GROUPS["tensors"], "call"]


def test_the_picture_has_a_panel_for_each_row_that_two_backends_filled(tmp_path):
    pytest.importorskip("matplotlib")
    comparison = Comparison(
        TINY,
        [
            {
                "torch": {"call": _summary(200.0), "async": _summary(4000.0), "own": _summary(1.5)},
                "fastref": {"call": _summary(1.5), "async": _summary(200_000.0), "idle_cpu": _summary(0.1)},
            }
        ],
    )
    plot(comparison, tmp_path / "table.svg")
    text = (tmp_path / "table.svg").read_text()
    assert "<!-- empty rpc_sync, us -->" in text and "<!-- async calls, 1/s (more is better) -->" in text
    assert "<!-- 200,000 -->" in text and "idle worker" not in text and "make and drop" not in text


def test_a_picture_of_nothing_is_refused(tmp_path):
    pytest.importorskip("matplotlib")
    with pytest.raises(UsageError, match="no row was filled by two backends"):
        plot(Comparison(TINY, [{"torch": {"call": _summary(1.0)}}]), tmp_path / "table.svg")
    assert not (tmp_path / "table.svg").exists()


def test_the_first_operation_is_told_apart():
    taken = iter([0.03, *[0.0] * 1000])
    assert time_each(lambda: time.sleep(next(taken, 0.001)), TINY).first >= 30_000
    figures = iter([7.0, *[1.0] * 10_000_000])
    summary = sample_each(lambda: next(figures), TINY)
    assert (summary.first, summary.p50) == (7.0, 1.0)


def test_what_comes_before_and_after_is_off_the_clock_and_counted():
    events: list[str] = []

    def operation() -> str:
        events.append("operation")
        return "result"

    summary = time_apart(
        operation, TINY, before=lambda: (events.append("before"), time.sleep(0.002)), after=events.append
    )
    assert events == ["before", "operation", "result"] * summary.operations
    assert summary.p50 < 2000


def test_a_slow_operation_is_sampled_less_often_than_asked_for():
    hasty = Effort(seconds=0.01, stretch=2.0, min_samples=10_000, warmup=10_000)
    summary = time_each(lambda: time.sleep(0.001), hasty)
    assert 5 <= summary.samples < 10_000 and summary.operations < 10_000


def test_the_bare_ring_turns_more_often_than_it_has_room():
    ring = BareRing(mmap.mmap(-1, ring_bytes()), RING_SIZE)
    for _ in range(3 * RING_SIZE // 6400):
        ring.turn()


def test_parts_do_what_is_counted():
    for name, part in PARTS.items():
        turn = part.prepare()
        for _ in range(20):
            turn()
        assert part.operations >= 1, name
    assert not is_counted()


def test_a_dump_is_read_by_its_name_and_sum():
    assert parse_dump("desc: Trigger: Client Request: ring\n\nevents: Ir\n1 2\ntotals: 1234\n") == ("ring", 1234)
    with pytest.raises(FastrefError, match="neither a name nor a sum"):
        parse_dump("desc: Trigger: Program termination\ntotals: 3\n")


def test_without_valgrind_the_reason_is_said(monkeypatch):
    monkeypatch.setattr(shutil, "which", lambda name: None)
    assert missing() == "valgrind is not installed"
    with pytest.raises(UsageError, match="valgrind is not installed"):
        count_instructions()


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_instructions_are_counted_and_do_not_wobble():
    if (reason := missing()) is not None:
        pytest.skip(reason)
    once, again = count_instructions(), count_instructions()
    assert set(once) == set(PARTS) - {"nothing"} and all(count > 0 for count in once.values())
    assert once["ring"] == pytest.approx(again["ring"], rel=1e-3)
