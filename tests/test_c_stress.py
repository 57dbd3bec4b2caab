"""The lock-free structures, driven from C by many threads: as shipped and under sanitizers.

The programs are in ``tests/c``; each says what it tries. A lost wake-up hangs them, since they sleep without a limit.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PROGRAMS = sorted(path.stem for path in (ROOT / "tests" / "c").glob("*.c"))
COMPILER = [os.environ.get("CC", "gcc"), "-std=gnu11", "-g", "-Wall", "-Wextra", "-Werror", "-pthread"]
MODES = {
    "plain": ["-O2"],
    "tsan": ["-O1", "-fsanitize=thread"],
    "asan": ["-O1", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"],
}
ENVIRONMENT = {
    "TSAN_OPTIONS": "halt_on_error=1",
    "ASAN_OPTIONS": "detect_leaks=1",
    "UBSAN_OPTIONS": "print_stacktrace=1",
}


@pytest.fixture(scope="session")
def fixed_addresses() -> list[str]:
    """Return what runs a program without address randomization: the thread sanitizer knows one layout only."""
    command = ["setarch", "-R"]
    if shutil.which("setarch") and subprocess.run([*command, "true"], capture_output=True).returncode == 0:
        return command
    return []


def build(program: str, mode: str, folder: Path) -> Path:
    target = folder / program
    command = [*COMPILER, *MODES[mode], f"-I{ROOT / 'fastref' / '_c'}", str(ROOT / "tests" / "c" / f"{program}.c")]
    done = subprocess.run([*command, "-o", str(target)], capture_output=True, text=True)
    if mode != "plain" and "cannot find" in done.stderr:
        pytest.skip(f"this compiler has no run-time library for {MODES[mode][-1]}")
    assert done.returncode == 0, done.stderr
    return target


def drive(program: str, mode: str, seconds: float, folder: Path, prefix: list[str]) -> None:
    target = build(program, mode, folder)
    command = [*(prefix if mode == "tsan" else []), str(target), str(seconds)]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **ENVIRONMENT})
    assert done.returncode == 0, f"{program} ended with {done.returncode}:\n{done.stdout}{done.stderr}"
    assert done.stdout.startswith(f"{program}: ")
    assert "WARNING" not in done.stderr and "ERROR" not in done.stderr, done.stderr


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("program", PROGRAMS)
def test_structure_holds_under_stress(program: str, mode: str, tmp_path: Path, fixed_addresses: list[str]) -> None:
    drive(program, mode, 0.4, tmp_path, fixed_addresses)


@pytest.mark.gates
@pytest.mark.slow
@pytest.mark.timeout(180)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("program", PROGRAMS)
def test_structure_holds_under_long_stress(program: str, mode: str, tmp_path: Path, fixed_addresses: list[str]) -> None:
    drive(program, mode, 30, tmp_path, fixed_addresses)
