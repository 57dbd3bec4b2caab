"""Instructions of the single-threaded parts, counted by callgrind: figures that no neighbour on the machine changes."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import fastref.errors
from fastref.bench.counting import CAN_COUNT
from fastref.bench.parts import EMPTY, PARTS, TURNS
from fastref.errors import CallTimeout, FastrefError, UsageError

__all__ = ["count_instructions", "missing"]

LIMIT_S = 600
_NAME = re.compile(r"^desc: Trigger: Client Request: (?P<name>\w+)$", re.M)
_TOTAL = re.compile(r"^totals: (?P<total>\d+)$", re.M)
_IMPORT_ROOT = str(Path(fastref.errors.__file__).parents[1])


def missing() -> str | None:
    """Say in a sentence why instructions cannot be counted here, None when they can."""
    if shutil.which("valgrind") is None:
        return "valgrind is not installed"
    if not CAN_COUNT:
        return "fastref was compiled without valgrind/callgrind.h"
    return None


def count_instructions() -> dict[str, float]:
    """Return how many instructions each part takes, by name, the loop around it not counted.

    Source: callgrind's event ``Ir``, over a thousand turns after as many that are not counted, each part by itself.
    Where the interpreter has a share, two runs may differ by about 1 %; the ring by itself comes out the same.

    Raises
    ------
    UsageError
        When valgrind or its header is missing.
    CallTimeout, FastrefError
        When the counted process does not end, or fails.
    """
    if (reason := missing()) is not None:
        raise UsageError(f"instructions cannot be counted: {reason}")
    with tempfile.TemporaryDirectory(prefix="fastref-bench-") as directory:
        _run(directory)
        totals = dict(parse_dump(dump.read_text()) for dump in Path(directory).glob("dump.*"))
    if absent := [name for name in PARTS if name not in totals]:
        raise FastrefError(f"callgrind wrote nothing down for {', '.join(absent)}")
    loop = totals[EMPTY]
    return {name: (totals[name] - loop) / (TURNS * part.operations) for name, part in PARTS.items() if name != EMPTY}


def parse_dump(text: str) -> tuple[str, int]:
    """Return the name and the sum of what callgrind wrote down at a client request.

    Raises
    ------
    FastrefError
        It is not such a text.
    """
    name, total = _NAME.search(text), _TOTAL.search(text)
    if name is None or total is None:
        raise FastrefError(f"callgrind wrote neither a name nor a sum: {text[:200]!r}")
    return name["name"], int(total["total"])


def _run(directory: str) -> None:
    command = [
        "valgrind",
        "--tool=callgrind",
        "--instr-atstart=no",
        f"--callgrind-out-file={directory}/dump",
        sys.executable,
        "-m",
        "fastref.bench.parts",
    ]
    search = [_IMPORT_ROOT, *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(search), "PYTHONHASHSEED": "0"}
    try:
        done = subprocess.run(
            command, env=environment, capture_output=True, text=True, timeout=LIMIT_S, check=False, cwd=directory
        )
    except subprocess.TimeoutExpired:
        raise CallTimeout(f"callgrind did not end within {LIMIT_S} s", "callgrind") from None
    if done.returncode != 0:
        raise FastrefError(f"callgrind ended with status {done.returncode}:\n{done.stderr[-2000:]}")
