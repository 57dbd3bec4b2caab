"""The watchdog and the leak check catch what they are there for; shown by runs of pytest on tests that misbehave."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


def run_pytest(directory: Path, text: str, *options: str) -> subprocess.CompletedProcess[str]:
    """Run pytest with this project's settings and fixtures on one file of tests."""
    path = directory / "test_misbehaving.py"
    path.write_text(text)
    plugin = ["-p", "tests.conftest", "-p", "no:cacheprovider", "-c", str(ROOT / "pyproject.toml")]
    return subprocess.run(
        [sys.executable, "-m", "pytest", *plugin, *options, str(path)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
        # A run that is ended the hard way cannot remove its own files.
        env={**os.environ, "FASTREF_TEST_SCRATCH": str(directory)},
    )


@pytest.mark.parametrize(
    ("leak", "named"),
    [
        ("kept.append(socket.socket())", "descriptor socket:"),
        ("kept.append(os.memfd_create('x'))", "descriptor /memfd:x"),
        ("kept.append(os.pidfd_open(os.getpid()))", "descriptor anon_inode:[pidfd]"),
        ("open(os.path.join(os.environ['FASTREF_RUN_DIR'], 'x'), 'w').close()", "/run/x"),
        ("kept.append(subprocess.Popen(['sleep', '10']))", "sleep 10"),
        ("threading.Thread(target=time.sleep, args=(10,), name='fastref-x', daemon=True).start()", "fastref-x"),
    ],
)
def test_what_a_test_leaves_behind_is_named(tmp_path: Path, leak: str, named: str) -> None:
    imports = "import os, socket, subprocess, threading, time, pytest\nkept = []\n"
    ended = (
        "@pytest.fixture(scope='module', autouse=True)\n"
        "def end_processes():\n"
        "    yield\n"
        "    [p.kill() or p.wait() for p in kept if isinstance(p, subprocess.Popen)]\n"
    )
    tests = f"def test_leaks(): {leak}\n@pytest.mark.leaks('on purpose')\ndef test_may_leak(): {leak}\n"
    run = run_pytest(tmp_path, imports + ended + tests)
    assert "2 passed, 1 error" in run.stdout, run.stdout
    assert named in run.stdout.partition("the test left behind:")[2]


def test_a_hanging_worker_is_shown_with_its_stack_and_ended(tmp_path: Path) -> None:
    text = (
        "import time\n"
        "def never_ending_story(): time.sleep(1000)\n"
        "def test_hangs(spawn_workers): spawn_workers(never_ending_story, [()]).join()\n"
        "def test_next(): pass\n"
    )
    run = run_pytest(tmp_path, text, "--timeout=10")
    assert "in never_ending_story" in run.stderr
    assert "ran longer than 10 s" in run.stdout
    assert "1 failed, 1 passed" in run.stdout


def test_a_test_that_hangs_with_the_gil_held_is_shown_and_ended(tmp_path: Path) -> None:
    text = "import ctypes\ndef test_hangs(): ctypes.PyDLL(None).sleep(1000)\n"
    run = run_pytest(tmp_path, text, "--timeout=1")
    assert run.returncode == 1
    assert "in test_hangs" in run.stderr
