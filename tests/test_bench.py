"""The side-by-side benchmark measures what it says, judges it rightly, and leaves nothing running."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from fastref.bench import ROWS, Comparison, Effort, Group, Reach, Row, Summary, compare
from fastref.bench.__main__ import main
from fastref.bench.backends import BACKENDS
from fastref.bench.caller import Caller
from fastref.bench.group import burner
from fastref.bench.line import LINE_BYTES, Line
from fastref.bench.report import BEGIN, END, format_figure, markdown, text_table, to_json, write_markdown
from fastref.bench.rows import ROW_GROUPS, reached
from fastref.bench.timing import BATCH, summarize, time_each
from fastref.errors import FastrefError, UsageError, WorkerDied

TINY = Effort(seconds=0.02, min_samples=5, warmup=2, windows=2, window=20, exercise_calls=10, settle_s=0.1, idle_s=0.3)


def _alive(pid: int) -> bool:
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return False
    return stat.rpartition(")")[2].split()[0] != "Z"  # an orphan may wait for its adoptive parent


def _wait_until_gone(pids: list[int]) -> None:
    deadline = time.monotonic() + 30
    while left := [pid for pid in pids if _alive(pid)]:
        assert time.monotonic() < deadline, f"{left} of {pids} live on"
        time.sleep(0.02)


def _comparison(**figures: dict[str, list[float]]) -> Comparison:
    """Return a comparison with these medians by row and backend, one for each round."""
    rounds = len(next(iter(next(iter(figures.values())).values())))
    backends = {backend for by_backend in figures.values() for backend in by_backend}
    return Comparison(
        TINY,
        [
            {
                backend: {
                    row: Summary(by_backend[backend][number], 2 * by_backend[backend][number], 0.0, 1)
                    for row, by_backend in figures.items()
                    if backend in by_backend
                }
                for backend in ("torch", "fastref", "pipe", "line")
                if backend in backends
            }
            for number in range(rounds)
        ],
    )


@pytest.fixture(scope="module")
def measured() -> Comparison:
    return compare(("torch", "pipe", "line", "memory"), rounds=1, effort=TINY)


def test_torch_fills_every_row_with_a_positive_figure(measured):
    assert list(measured.rounds[0]["torch"]) == [name for name in ROWS if name not in ROW_GROUPS["wires"]]
    for row, summary in measured.rounds[0]["torch"].items():
        assert summary.p50 > 0 and summary.operations > 0, row


@pytest.mark.parametrize(
    "backends",
    [
        ("torch_tcp", "fastref_tcp", "sockets"),
        pytest.param(("torch_veth", "fastref_veth", "sockets_veth"), marks=pytest.mark.gates),
    ],
)
def test_what_is_held_to_tcp_fills_the_rows_of_wires(backends):
    if "CI" not in os.environ and (reason := BACKENDS[backends[0]].missing()):
        pytest.skip(f"no two hosts here: {reason}")
    compared = compare(backends, ROW_GROUPS["wires"], rounds=1, effort=TINY)
    for backend in backends:
        assert list(compared.rounds[0][backend]) == ROW_GROUPS["wires"]
        assert all(summary.p50 > 0 and summary.operations > 0 for summary in compared.rounds[0][backend].values())


@pytest.mark.parametrize(
    ("backend", "rows"),
    [
        ("pipe", ["call", "call_asleep", "call_burn"]),
        ("line", ["call", "call_burn"]),
        ("memory", ["send_128m", "read_1m", "read_128m", "publish"]),
    ],
)
def test_the_floors_fill_the_rows_that_they_are_floors_of(measured, backend, rows):
    floor = measured.rounds[0][backend]
    assert list(floor) == rows
    assert all(summary.p50 > 0 for summary in floor.values())


def test_a_line_brings_every_number_back():
    memory = bytearray(LINE_BYTES)
    line = Line(memory)
    echo = threading.Thread(target=Line(memory).echo)
    echo.start()
    try:
        for _ in range(1000):
            line.round_trip()
    finally:
        numbers = bytes(memory)
        line.end()
        echo.join()
    assert numbers[0] == numbers[64] == 1000 % 256
    with pytest.raises(FastrefError, match="two cache lines in 64 bytes"):
        Line(bytearray(64))


def test_rows_are_measured_that_were_asked_for_and_no_others():
    told: list[str] = []
    comparison = compare(("pipe",), ["call"], 2, TINY, told.append)
    assert [list(results["pipe"]) for results in comparison.rounds] == [["call"], ["call"]]
    assert [text for text in told if ROWS["call"].title in text] == [
        f"round {number}/2 pipe: {ROWS['call'].title}" for number in (1, 2)
    ]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"backends": ["smoke"]}, "no such backend: smoke"),
        ({"rows": ["smoke"]}, "no such row: smoke"),
        ({"rounds": 0}, "0 rounds"),
        ({"backends": []}, "0 backends"),
        ({"rows": []}, "0 rows"),
    ],
)
def test_a_comparison_of_nothing_or_the_unknown_is_refused(arguments, message):
    with pytest.raises(UsageError, match=message):
        compare(**arguments)


def test_timing_counts_every_operation_and_batches_the_short_ones():
    done = []
    short = time_each(lambda: done.append(None), TINY)
    assert short.operations == len(done) and short.batch == BATCH and short.samples >= TINY.min_samples
    done.clear()
    long = time_each(lambda: (done.append(None), time.sleep(0.001)), TINY)
    assert long.operations == len(done) and long.batch == 1 and long.p50 >= 1000


def test_p99_is_the_bad_tail_of_a_time_and_of_a_rate():
    values = [float(value) for value in range(1, 201)]
    assert (summarize(values).p50, summarize(values).p99) == (100.5, 198.0)
    assert summarize(values, higher_is_better=True).p99 == 3.0
    assert summarize([7.0]).p99 == 7.0
    with pytest.raises(ValueError, match="nothing"):
        summarize([])


def test_calls_that_do_not_arrive_are_no_measurement():
    def lose_work(to, function, args=()):
        return function(*args) if function.__name__ == "calls_served" else None

    with pytest.raises(FastrefError, match="the other end counted 0"):
        Caller(SimpleNamespace(rpc_sync=lose_work)).call(TINY)


def test_figures_are_medians_of_rounds_and_ratios_are_above_one_when_better():
    comparison = _comparison(
        call={"torch": [600.0, 640.0, 9000.0], "fastref": [4.0, 1.0, 5.0]},
        **{"async": {"torch": [4000.0] * 3, "fastref": [200_000.0] * 3}},
    )
    assert comparison.medians("call") == {"torch": 640.0, "fastref": 4.0}
    assert comparison.ratio("call") == 160.0
    assert comparison.ratio("async") == 50.0
    assert comparison.ratio("fetch") is None


@pytest.mark.parametrize(
    ("reach", "medians", "verdict"),
    [
        (Reach(times=150), {"torch": 600.0, "fastref": 4.0}, True),
        (Reach(times=150), {"torch": 600.0, "fastref": 4.1}, False),
        (Reach(times=150), {"fastref": 4.0}, None),
        (Reach(times=150), {"torch": 600.0}, None),
        (Reach(times=1, than="pipe"), {"torch": 600.0, "fastref": 5.0, "pipe": 5.0}, True),
        (Reach(times=1, than="pipe"), {"torch": 600.0, "fastref": 5.1, "pipe": 5.0}, False),
        (Reach(at_most=6), {"fastref": 6.0}, True),
        (Reach(at_most=6), {"fastref": 7.0}, False),
        (Reach(at_most=0.5, strictly=True), {"fastref": 0.5}, False),
        (Reach(at_most=0.5, strictly=True), {"fastref": 0.0}, True),
        (Reach(times=7, within=1.5), {"torch": 70.0, "fastref": 10.0, "memory": 8.0}, True),
        (Reach(times=7, within=1.5), {"torch": 70.0, "fastref": 10.0, "memory": 6.0}, False),
        (Reach(times=7, within=1.5), {"torch": 69.0, "fastref": 10.0, "memory": 8.0}, False),
        (Reach(times=7, within=1.5), {"torch": 70.0, "fastref": 10.0}, None),
        (None, {"torch": 600.0, "fastref": 4.0}, None),
    ],
)
def test_reach_is_judged_by_factor_or_by_bound(reach, medians, verdict):
    assert reached(Row("", "us", reach=reach), medians) is verdict


def test_a_rate_reaches_upwards():
    row = Row("", "1/s", reach=Reach(times=40), higher_is_better=True)
    assert reached(row, {"torch": 1000.0, "fastref": 40_000.0}) is True
    assert reached(row, {"torch": 1000.0, "fastref": 39_000.0}) is False


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, "-"),
        (0.0, "0"),
        (6.0, "6"),
        (1234567.4, "1,234,567"),
        (123.4, "123"),
        (12.34, "12.3"),
        (1.234, "1.23"),
        (0.1234, "0.123"),
        (0.01234, "0.0123"),
    ],
)
def test_figures_read_without_exponents(value, text):
    assert format_figure(value) == text


def test_the_table_shows_both_sides_the_floor_the_ratio_and_the_verdict():
    comparison = _comparison(
        call={"torch": [600.0], "fastref": [4.0], "pipe": [5.0], "line": [0.5]},
        idle_threads={"torch": [39.0], "fastref": [7.0]},
    )
    heading, *lines = text_table(comparison).splitlines()
    floors = "pipe p50 line p50 memory p50"
    assert heading.split() == f"row unit torch p50 p99 fastref p50 p99 {floors} ratio reach reached".split()
    call, threads = (line.split("  ") for line in lines)
    assert [cell.strip() for cell in call if cell] == [
        "empty `rpc_sync`", "us", "600", "1,200", "4", "8", "5", "0.500", "-", "150x", "150x torch", "yes",
    ]  # fmt: skip
    assert [cell.strip() for cell in threads if cell.strip()] == [
        "idle worker, threads", "39", "78", "7", "14", "-", "-", "-", "5.57x", "<= 6", "no",
    ]  # fmt: skip


def test_markdown_has_as_many_cells_in_every_line_and_names_the_machine():
    text = markdown(_comparison(call={"torch": [600.0], "fastref": [4.0]}))
    table = [line for line in text.splitlines() if line.startswith("|")]
    assert len(table) == 3 and len({line.count("|") for line in table}) == 1
    for fact in ("cpu", "cores", "kernel", "python", "torch", "date"):
        assert fact in text


def test_markdown_replaces_the_figures_of_a_page_and_nothing_else(tmp_path):
    page = tmp_path / "page.md"
    page.write_text(f"before\n\n{BEGIN}\nold\n{END}\n\nafter\n")
    for median in (4.0, 3.0):
        write_markdown(_comparison(call={"torch": [600.0], "fastref": [median]}), page)
    text = page.read_text()
    assert text.startswith(f"before\n\n{BEGIN}\n") and text.endswith(f"{END}\n\nafter\n")
    assert "old" not in text and "| 200x |" in text and "| 150x |" not in text


def test_markdown_makes_a_page_but_never_overwrites_a_text(tmp_path):
    comparison = _comparison(call={"torch": [600.0], "fastref": [4.0]})
    write_markdown(comparison, tmp_path / "new.md")
    assert "| 150x |" in (tmp_path / "new.md").read_text()
    mine = tmp_path / "mine.md"
    mine.write_text("my text\n")
    with pytest.raises(UsageError, match="mine.md"):
        write_markdown(comparison, mine)
    assert mine.read_text() == "my text\n"


def test_json_keeps_every_round(measured):
    content = json.loads(to_json(measured))
    assert content["rounds"][0]["torch"]["call"]["p50"] == measured.rounds[0]["torch"]["call"].p50
    assert content["rows"]["call"]["reach"] == "150x torch" and content["rows"]["call"]["reached"] is None
    assert content["machine"]["torch"] and content["effort"]["seconds"] == TINY.seconds


def test_the_command_prints_the_table_and_its_progress(capsys, tmp_path):
    target = tmp_path / "figures.json"
    assert main(["--quick", "--seconds", "0.02", "--backends", "pipe", "--rows", "call", "--json", str(target)]) == 0
    out, err = capsys.readouterr()
    assert ROWS["call"].title in out and "python" in out
    assert "round 1/1 pipe: start" in err
    assert json.loads(target.read_text())["rows"]["call"]["p50"]["pipe"] > 0


@pytest.mark.parametrize("arguments", [["--rows", "smoke"], ["--backends", "smoke"], ["--rounds", "0"]])
def test_the_command_refuses_what_it_does_not_know(arguments, capsys):
    with pytest.raises(SystemExit, match="2"):
        main(arguments)
    assert "smoke" in capsys.readouterr().err or arguments[0] == "--rounds"


def test_no_process_is_left_after_a_group_and_a_burner():
    with Group("pipe") as group, burner() as burning:
        pids = [*group.pids, burning]
        assert len(pids) == 3 and all(map(_alive, pids))
        group.join()
    _wait_until_gone(pids)
    assert group.pids == []


def test_no_process_is_left_when_a_measurement_fails():
    with pytest.raises(FastrefError, match="no attribute 'smoke'"), Group("pipe") as group:
        pids = group.pids
        group.join()
        group.measure("smoke", TINY)
    _wait_until_gone(pids)


def test_a_worker_that_dies_is_named_at_once_though_another_waits_for_it():
    with Group("pipe") as group:
        os.kill(group.pids[1], signal.SIGKILL)
        with pytest.raises(WorkerDied, match=r"pipe worker1.*rank 1, pid \d+"):
            group.join()


def test_a_worker_that_dies_during_a_measurement_is_named():
    with Group("pipe") as group:
        group.join()
        killer = threading.Timer(0.2, os.kill, (group.pids[1], signal.SIGKILL))
        killer.start()
        with pytest.raises(FastrefError, match=r"worker1.*rank 1|other end of the pipe is gone|BrokenPipeError"):
            group.measure("call", replace(TINY, seconds=60.0))
        killer.join()


def test_workers_die_with_a_starter_that_is_killed(tmp_path):
    program = (
        "import time\n"
        "from fastref.bench.group import Group, burner\n"
        "with Group('pipe') as group, burner() as burning:\n"
        "    print(*group.pids, burning, flush=True)\n"
        "    time.sleep(100)\n"
    )
    # What a killed starter cannot clean up goes where pytest does.
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1]), "TMPDIR": str(tmp_path)}
    with subprocess.Popen(
        [sys.executable, "-c", program], stdout=subprocess.PIPE, text=True, env=environment
    ) as starter:
        try:
            pids = [int(pid) for pid in starter.stdout.readline().split()]
            assert len(pids) == 3
        finally:
            starter.kill()
    _wait_until_gone(pids)


def test_a_child_ends_at_its_limit_and_shows_where_it_was():
    child = Path(__file__).parents[1] / "fastref" / "bench" / "child.py"
    ended = subprocess.run(
        [sys.executable, str(child), "burn", str(os.getpid()), "1"], capture_output=True, text=True, timeout=60
    )
    assert ended.returncode == 1 and "in burn" in ended.stderr
