"""The examples run as a newcomer runs them: as programs, on real data, in processes of their own."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from fastref.segments import run_root, sweep

ROOT = Path(__file__).resolve().parent.parent
EXAMPLES = ROOT / "examples"
PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
# A watchdog, not a promise: a run takes a few seconds.
WATCHDOG_S = 90

backends = pytest.mark.parametrize("backend", ["fastref", "torch"])


class Program:
    """One run of an example, in a session of its own, with its output in files."""

    def __init__(self, directory: Path, *arguments: str, name: str = "parameter_server") -> None:
        self.output = directory / "out"
        self._stdout, self._stderr = directory / "stdout", directory / "stderr"
        command = [sys.executable, str(EXAMPLES / f"{name}.py"), *arguments, "--output", str(self.output)]
        with self._stdout.open("wb") as stdout, self._stderr.open("wb") as stderr:
            self.process = subprocess.Popen(
                command,
                cwd=directory,
                env={**os.environ, "PYTHONPATH": str(ROOT)},
                stdin=subprocess.DEVNULL,
                stdout=stdout,
                stderr=stderr,
                start_new_session=True,
            )

    @property
    def stdout(self) -> str:
        return self._stdout.read_text(errors="replace")

    @property
    def stderr(self) -> str:
        return self._stderr.read_text(errors="replace")

    def finish(self) -> int:
        """Wait for the end of the program and return its exit status."""
        return self.process.wait(WATCHDOG_S)

    def wait_until_training(self) -> None:
        """Wait until the progress bar moves."""
        deadline = time.monotonic() + WATCHDOG_S
        while "accuracy=" not in self.stderr:
            assert self.process.poll() is None, self.stderr
            assert time.monotonic() < deadline, self.stderr
            time.sleep(0.05)

    def workers(self) -> list[psutil.Process]:
        """Return the workers: the children of the fork server, itself a child of the program."""
        program = psutil.Process(self.process.pid)
        return [child for child in program.children(recursive=True) if child.ppid() != program.pid]

    def members(self) -> list[int]:
        """Return the living processes of the program's session."""
        alive = []
        for process in psutil.process_iter():
            try:
                if os.getsid(process.pid) == self.process.pid and process.status() != psutil.STATUS_ZOMBIE:
                    alive.append(process.pid)
            except (ProcessLookupError, psutil.NoSuchProcess):
                continue
        return alive


@pytest.fixture
def start(tmp_path: Path) -> Iterator:
    programs: list[Program] = []

    def start_program(*arguments: str, name: str = "parameter_server") -> Program:
        programs.append(Program(tmp_path, *arguments, name=name))
        return programs[-1]

    yield start_program
    for program in programs:
        # The fork server ends itself when it sees that the program has gone.
        deadline = time.monotonic() + 10
        while (left := program.members()) and time.monotonic() < deadline:
            time.sleep(0.05)
        for pid in left:
            os.kill(pid, signal.SIGKILL)
        program.process.wait()
        assert not left, f"processes outlived the program:\n{program.stderr}"
    sweep(run_root())  # as the next start does: what was killed cannot clean up


def row(table: str, title: str) -> list[float]:
    """Return the numbers in one row of the program's table."""
    (line,) = re.findall(rf"^{re.escape(title)} +(.*)$", table, re.MULTILINE)
    return [float(number.rstrip("%x").replace(",", "")) for number in line.split()]


@backends
def test_parameter_server_learns_the_digits_and_draws_the_curves(start, backend):
    program = start("--backend", backend, "--quick")
    assert program.finish() == 0, program.stderr
    (accuracy,) = row(program.stdout, "test accuracy")
    assert accuracy > 95.0
    (rate,), (seconds,) = row(program.stdout, "steps per second"), row(program.stdout, "seconds")
    # The seconds are printed with two places.
    assert rate * seconds == pytest.approx(2000, rel=0.1)
    picture = (program.output / "curves.png").read_bytes()
    assert picture.startswith(PNG_SIGNATURE) and len(picture) > 10_000
    assert "2000/2000" in program.stderr and "loss=" in program.stderr and "accuracy=" in program.stderr


@backends
def test_a_single_trainer_is_enough(start, backend):
    program = start("--backend", backend, "--trainers", "1", "--steps", "400")
    assert program.finish() == 0, program.stderr
    assert row(program.stdout, "test accuracy")[0] > 90.0


def test_compare_shows_both_backends_and_their_ratio(start):
    program = start("--compare", "--quick")
    assert program.finish() == 0, program.stderr
    assert re.search(r"^ +fastref +torch +ratio$", program.stdout, re.MULTILINE)
    accuracies = row(program.stdout, "test accuracy")
    assert min(accuracies[:2]) > 95.0
    ours, theirs, ratio = row(program.stdout, "steps per second")
    assert ratio == pytest.approx(ours / theirs, rel=0.02)
    assert (program.output / "curves.png").read_bytes().startswith(PNG_SIGNATURE)


@backends
@pytest.mark.parametrize(
    ("arguments", "cause"),
    [
        # The constructor of the server raises, on ps.
        (["--learning-rate", "-1"], "ValueError: Invalid learning rate: -1.0"),
        # 1437 images make shares of 719 and 718: only trainer1 raises, inside a call from trainer0.
        (["--batch-size", "719"], "ValueError: a batch of 719 images does not fit into a share of 718"),
        # trainer0 raises by itself.
        (["--batch-size", "1000"], "ValueError: a batch of 1000 images does not fit into a share of 719"),
    ],
    ids=["server", "trainer1", "trainer0"],
)
def test_a_worker_that_raises_ends_the_program_with_its_traceback(start, backend, arguments, cause):
    program = start("--backend", backend, "--quick", *arguments)
    assert program.finish() == 1
    assert "Traceback (most recent call last)" in program.stderr
    assert cause in program.stderr
    assert "test accuracy" not in program.stdout


@backends
@pytest.mark.parametrize("victim", ["ps", "trainer0", "trainer1"])
def test_a_worker_that_is_killed_ends_the_program(start, backend, victim):
    program = start("--backend", backend, "--steps", "1000000")
    program.wait_until_training()
    # Workers are started in the order of their ranks.
    workers = sorted(program.workers(), key=lambda worker: (worker.create_time(), worker.pid))
    workers[["ps", "trainer0", "trainer1"].index(victim)].kill()
    assert program.finish() == 1
    assert "SIGKILL" in program.stderr or "Traceback" in program.stderr


@backends
def test_a_run_that_misses_its_deadline_is_ended(start, backend):
    program = start("--backend", backend, "--steps", "1000000", "--deadline", "8")
    assert program.finish() == 1
    assert "have not finished within 8 s" in program.stderr


@backends
def test_interrupting_the_program_ends_its_workers(start, backend):
    program = start("--backend", backend, "--steps", "1000000")
    program.wait_until_training()
    os.killpg(program.process.pid, signal.SIGINT)
    assert program.finish() != 0
    assert "KeyboardInterrupt" in program.stderr


def test_wrong_arguments_are_refused_before_anything_starts(start):
    program = start("--trainers", "0")
    assert program.finish() == 2
    assert "0 is not positive" in program.stderr


# ---- training across workers


def check_picture(path: Path) -> None:
    picture = path.read_bytes()
    assert picture.startswith(PNG_SIGNATURE) and len(picture) > 10_000


# Not over torch, whose agent at times does not leave for its timeout of 60 s: see examples/README.md.
def test_a_pipeline_learns_the_digits_however_many_micro_batches_there_are(start):
    program = start("--quick", "--width", "256", name="pipeline")
    assert program.finish() == 0, program.stderr
    assert row(program.stdout, "test accuracy, the lowest")[0] > 85.0
    for splits in (2, 4, 8):
        (alone,), (split,) = (row(program.stdout, f"ms per step, {words}") for words in ("1 split", f"{splits} splits"))
        assert row(program.stdout, f"speed-up by {splits} splits")[0] == pytest.approx(alone / split, abs=0.02)
    assert "100/100" in program.stderr
    check_picture(program.output / "speedup.png")


@backends
def test_actors_and_a_learner_get_better_at_balancing_the_pole(start, backend):
    program = start("--backend", backend, "--quick", name="actor_learner")
    assert program.finish() == 0, program.stderr
    # Who pushes at random keeps the pole up for 22 steps.
    assert row(program.stdout, "return of the policy, at most 500")[0] > 60.0
    assert "12800/12800" in program.stderr
    check_picture(program.output / "returns.png")


@backends
def test_a_table_of_words_and_dense_layers_learn_the_digits_together(start, backend):
    program = start("--backend", backend, "--quick", name="embedding")
    assert program.finish() == 0, program.stderr
    assert row(program.stdout, "test accuracy")[0] > 90.0
    assert "1600/1600" in program.stderr
    check_picture(program.output / "curves.png")


@pytest.mark.parametrize("name", ["pipeline", "actor_learner", "embedding"])
def test_an_example_that_misses_its_deadline_is_ended(start, name):
    program = start("--steps", "1000000", "--deadline", "8", name=name)
    assert program.finish() == 1
    assert "have not finished within 8 s" in program.stderr
