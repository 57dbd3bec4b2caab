"""Imports point down the table of rows, rooms on one row do not know each other, and importing has no effects."""

from __future__ import annotations

import ast
import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = "fastref"

# Lowest first. A room is a package or a module directly below `fastref`.
ROWS: list[set[str]] = [
    {"errors", "_version"},
    {"_core", "futures", "nogc", "options"},
    {"wire", "rref", "segments", "identity"},
    {"protocol", "channels", "carriers", "rendezvous"},
    {"codec"},
    {"runtime"},
    {"profiling", "autograd"},
    {"api", "faults", "spawn", "debug", "testing"},
    {"__init__"},  # re-exports what programs call
    {"rpc", "nn", "optim"},
    {"compat", "bench"},
    {"cli"},
]
ROW_OF = {room: number for number, row in enumerate(ROWS) for room in row}

SOURCES = sorted(p for p in (ROOT / PACKAGE).rglob("*") if p.suffix in {".py", ".pyi", ".pyx", ".pxd"})
PROGRAMS = sorted(p for folder in ("examples", "asv_bench", "docs") for p in (ROOT / folder).rglob("*.py"))

CYTHON_STRINGS = re.compile(r"'''.*?'''|\"\"\".*?\"\"\"|#[^\n]*", re.DOTALL)
CYTHON_FROM = re.compile(r"^\s*from\s+(?P<module>[\w.]+)\s+c?import\s+(?:\((?P<block>[^)]*)\)|(?P<line>[^;\n]*))", re.M)
CYTHON_IMPORT = re.compile(r"(?:^|[;:])\s*c?import\s+(?P<modules>[^;\n(]*)", re.M)
CYTHON_INCLUDE = re.compile(r"^\s*include\s+['\"](?P<file>[^'\"]+)", re.M)


def room_of(source: Path) -> str:
    """Name the room that a file below the package belongs to."""
    return source.relative_to(ROOT / PACKAGE).parts[0].split(".")[0]


def python_imports(text: str) -> Iterator[str]:
    """Yield every module that Python source imports, in functions too, as ``module`` or ``module.name``."""
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            module = "." * node.level + (node.module or "")
            yield from (f"{module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
            called = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            if called in {"import_module", "__import__"}:
                yield str(node.args[0].value)


def cython_imports(text: str) -> Iterator[str]:
    """Yield every module that Cython source imports or cimports, as :func:`python_imports` does.

    It reads the import lines only, in a text rid of docstrings and comments. An included file counts as a relative
    import, since neither belongs here.
    """
    text = CYTHON_STRINGS.sub("", text).replace("\\\n", " ")
    for match in CYTHON_FROM.finditer(text):
        names = match["block"] if match["block"] is not None else match["line"]
        yield from (f"{match['module']}.{name.split()[0]}" for name in names.split(",") if name.strip())
    for match in CYTHON_IMPORT.finditer(text):
        yield from (name.split()[0] for name in match["modules"].split(",") if name.strip())
    yield from (f".{match['file']}" for match in CYTHON_INCLUDE.finditer(text))


def imports_of(source: Path) -> list[str]:
    """List what a file imports."""
    scan = cython_imports if source.suffix in {".pyx", ".pxd"} else python_imports
    return list(scan(source.read_text()))


def broken_rules(room: str, imported: str) -> str | None:
    """Say which rule an import in ``room`` breaks, if it breaks one."""
    if imported.startswith("."):
        return f"{imported!r} is relative"
    parts = imported.split(".")
    if parts[0] == "tests":
        return f"{imported!r} is of the tests"
    if parts[0] != PACKAGE:
        return None
    # A name that is not a room comes from the package's own __init__.
    target = parts[1] if len(parts) > 1 and parts[1] in ROW_OF else "__init__"
    if target == room:
        return None
    if ROW_OF[target] > ROW_OF[room]:
        return f"{imported!r} is above"
    if ROW_OF[target] == ROW_OF[room]:
        return f"{imported!r} is another room of the same row"
    return None


def test_every_room_has_a_row() -> None:
    assert {room_of(source) for source in SOURCES} - ROW_OF.keys() == set()


@pytest.mark.parametrize("source", SOURCES, ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_point_down(source: Path) -> None:
    room = room_of(source)
    broken = [rule for imported in imports_of(source) if (rule := broken_rules(room, imported))]
    assert not broken, f"{source.relative_to(ROOT)}, row {ROW_OF[room]}: " + "; ".join(broken)


@pytest.mark.parametrize("source", PROGRAMS, ids=lambda p: str(p.relative_to(ROOT)))
def test_programs_know_nothing_of_the_tests(source: Path) -> None:
    assert not [imported for imported in imports_of(source) if imported.split(".")[0] == "tests"]


@pytest.mark.parametrize(
    ("room", "imported", "reason"),
    [
        ("codec", "fastref.runtime", "above"),
        ("codec", "fastref.runtime.worker.Worker", "above"),
        ("codec", "fastref.init_rpc", "above"),
        ("errors", "fastref", "above"),
        ("channels", "fastref.protocol", "same row"),
        ("channels", ".ring", "relative"),
        ("channels", "tests.watchdog", "tests"),
    ],
)
def test_a_broken_rule_is_named(room: str, imported: str, reason: str) -> None:
    assert reason in (broken_rules(room, imported) or "")


@pytest.mark.parametrize(
    ("room", "imported"),
    [("codec", "fastref.wire"), ("codec", "fastref.codec.callables"), ("rpc", "fastref.init_rpc"), ("errors", "torch")],
)
def test_an_import_that_points_down_is_fine(room: str, imported: str) -> None:
    assert broken_rules(room, imported) is None


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("import fastref.api as a, os", ["fastref.api", "os"]),
        ("def f():\n    from fastref import api, codec\n", ["fastref.api", "fastref.codec"]),
        ("if TYPE_CHECKING:\n    from fastref.api import f\n", ["fastref.api.f"]),
        ("from .api import f", [".api.f"]),
        ("from . import api", ["..api"]),
        ("importlib.import_module('fastref.api')", ["fastref.api"]),
        ("'''import os'''  # import re", []),
    ],
)
def test_every_form_of_python_import_is_seen(text: str, found: list[str]) -> None:
    assert list(python_imports(text)) == found


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("cimport cython\nimport fastref.api as a, os", ["cython", "fastref.api", "os"]),
        ("from fastref._core cimport A, B as C  # the table", ["fastref._core.A", "fastref._core.B"]),
        ("from fastref._core cimport (\n    A,  # one\n    B,\n)", ["fastref._core.A", "fastref._core.B"]),
        ("from fastref cimport \\\n    _core", ["fastref._core"]),
        ("cdef f():\n    from fastref import api", ["fastref.api"]),
        ("cdef f():\n    if x: import fastref.api", ["fastref.api"]),
        ("from . cimport ring", ["..ring"]),
        ("include 'ring.pxi'", [".ring.pxi"]),
        ('"""\nimport os\nfrom fastref import api\n"""', []),
        ('cdef extern from "ring.h" nogil:\n    int important', []),
    ],
)
def test_every_form_of_cython_import_is_seen(text: str, found: list[str]) -> None:
    assert list(cython_imports(text)) == found


# Runs in a fresh interpreter: torch first, then what fastref adds to it.
EFFECTS_OF_IMPORT = """
import importlib, json, os, sys
import torch

def state():
    descriptors = {}
    for number in os.listdir("/proc/self/fd"):
        try:
            descriptors[number] = os.readlink(f"/proc/self/fd/{number}")
        except FileNotFoundError:
            pass  # the listing's own
    with open("/proc/self/maps") as maps:
        shared = sorted(line.split(maxsplit=5)[5] for line in maps if "/dev/shm/" in line or "/memfd:" in line)
    return {
        "descriptors": descriptors,
        "shared memory": shared,
        "threads": sorted(os.listdir("/proc/self/task")),
        "children": open(f"/proc/self/task/{os.getpid()}/children").read(),
        "cuda": torch.cuda.is_initialized(),
        "run directory": sorted(os.listdir(os.environ["FASTREF_RUN_DIR"])),
    }

before = state()
assert importlib.import_module(sys.argv[1]).__file__, "not a package yet"
print(json.dumps([before, state()]))
"""


@pytest.mark.parametrize("module", ["fastref", "fastref.rpc", "fastref.nn"])
def test_importing_opens_maps_and_starts_nothing(module: str) -> None:
    run = subprocess.run(
        [sys.executable, "-c", EFFECTS_OF_IMPORT, module], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stderr
    before, after = json.loads(run.stdout)
    assert after == before
    assert not after["cuda"]
