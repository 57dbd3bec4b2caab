"""Functions and classes of ``__main__``: by name between workers of one script, by value between others."""

from __future__ import annotations

import os
import runpy
import subprocess
import sys
import textwrap
import time
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import fastref.rpc as rpc
from tests import work
from tests.jobs import in_job, job_fixtures

ROOT = Path(__file__).resolve().parent.parent
Start = Callable[[Callable[..., object], list[tuple[object, ...]]], Any]

jobs, job = job_fixtures(2)

DEFINITIONS = """
import dataclasses, enum, os, sys
import fastref.rpc as rpc

state = {"calls": 0}
OFFSET = 100

def bump():
    state["calls"] += 1
    return rpc.get_worker_info().name, state["calls"]

def with_offset(value):
    return value + OFFSET

def factorial(n):
    return 1 if n < 2 else n * factorial(n - 1)

double = lambda value: 2 * value

def make_adder(amount):
    def add(value):
        return value + amount
    return add

class Colour(enum.Enum):
    RED = 1

@dataclasses.dataclass
class Point:
    x: float
    y: float = 0.0

    def norm(self):
        return abs(self.x) + abs(self.y)

    @classmethod
    def origin(cls):
        return cls(0.0)

    class Inner:
        value = 5

class Failure(Exception):
    def __init__(self, code, *, reason):
        super().__init__(f"{code} {reason}")
        self.code = code

def fail(code):
    raise Failure(code, reason="of its own")

def is_own(value):
    return type(value) is Point

def rebind():
    global factorial
    factorial = double

def init():
    rank, world_size, init_method = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
    options = rpc.RpcBackendOptions(init_method=init_method)
    return rpc.init_rpc(f"w{rank}", rank=rank, world_size=world_size, rpc_backend_options=options)
"""

# What holds whether objects go by name or by value.
CHECKS = """
    with init():
        if sys.argv[1] == "0":
            def wait_async(*call): return rpc.rpc_async(*call).wait()
            def fetch(*call): return rpc.remote(*call).to_here()
            for how in (rpc.rpc_sync, wait_async, fetch):
                assert how("w1", with_offset, (1,)) == 101
                assert how("w1", factorial, (5,)) == 120
                assert how("w1", double, (4,)) == 8
                assert how("w1", make_adder(3), (4,)) == 7
                assert how("w1", guarded, (1,)) == 1001
                assert how("w1", Point.origin) == Point(0.0)
                assert how("w1", Point(3.0, -4.0).norm) == 7.0
                point = how("w1", Point, (1.0,))
                assert type(point) is Point and point == Point(1.0)
                assert how("w1", type, (Colour.RED,)) is Colour
                assert how("w1", Point.Inner).value == 5
                try:
                    how("w1", fail, (7,))
                except Failure as error:
                    assert "7 of its own" in str(error)
                else:
                    raise AssertionError("nothing was raised")
            rref = rpc.remote("w1", Point, (3.0, 4.0))
            assert rref.rpc_sync().norm() == 7.0
            assert rref.to_here() == Point(3.0, 4.0)
            assert rpc.rpc_sync("w1", lambda ref: ref.local_value().x, (rref,)) == 3.0
            assert state == {"calls": 0}
            check()
            del rref
"""

GUARD = """
if __name__ == "__main__":
    EXTRA = 1000

    def guarded(value):
        return value + EXTRA

    def check():
        {check}
"""

BY_NAME = """\
assert [rpc.rpc_sync("w1", bump) for _ in range(3)] == [("w1", 1), ("w1", 2), ("w1", 3)]
        assert rpc.rpc_sync("w0", bump) == ("w0", 1)
        assert state == {"calls": 1}
        assert rpc.rpc_sync("w1", is_own, (Point(1.0),)) is True
        assert rpc.rpc_sync("w1", factorial, (5,)) == 120
        rpc.rpc_sync("w1", rebind)
        assert rpc.rpc_sync("w1", factorial, (5,)) == 10
        assert factorial(5) == 120
"""

BY_VALUE = """\
assert rpc.rpc_sync("w1", bump) == ("w1", 1)
        assert rpc.rpc_sync("w1", sys.intern, ("where",)) == "where"
        assert rpc.rpc_sync("w1", is_own, (Point(1.0),)) is True
"""


def run_script(path: str, rank: int, world_size: int, init_method: str) -> None:
    """Be what ``python PATH RANK WORLD_SIZE INIT_METHOD`` is, in a process that has torch already."""
    sys.argv = [path, str(rank), str(world_size), init_method]
    runpy.run_path(path, run_name="__main__")


@pytest.fixture
def init_method() -> str:
    """Return a local init method that no other test uses."""
    return f"local://main-{os.getpid()}-{time.monotonic_ns()}"


def write(path: Path, check: str, comment: str = "") -> str:
    path.write_text(comment + DEFINITIONS + GUARD.format(check=check) + CHECKS)
    return str(path)


def test_workers_of_one_script_share_its_functions_by_name(
    spawn_workers: Start, tmp_path: Path, init_method: str
) -> None:
    path = write(tmp_path / "script.py", BY_NAME)
    spawn_workers(run_script, [(path, rank, 2, init_method) for rank in range(2)]).join()


def test_workers_of_one_script_in_two_places_share_its_functions_by_name(
    spawn_workers: Start, tmp_path: Path, init_method: str
) -> None:
    paths = [write(tmp_path / name, BY_NAME) for name in ("one.py", "other.py")]
    spawn_workers(run_script, [(path, rank, 2, init_method) for rank, path in enumerate(paths)]).join()


def test_workers_of_two_scripts_send_functions_by_value(spawn_workers: Start, tmp_path: Path, init_method: str) -> None:
    first = write(tmp_path / "first.py", BY_VALUE)
    # It has functions of the same names, which do other things.
    (tmp_path / "second.py").write_text(
        textwrap.dedent("""
            import sys
            import fastref.rpc as rpc

            def with_offset(value): return "another function"
            factorial = bump = with_offset
            class Point: pass

            options = rpc.RpcBackendOptions(init_method=sys.argv[3])
            with rpc.init_rpc("w1", rank=1, world_size=2, rpc_backend_options=options): pass
        """)
    )
    second = str(tmp_path / "second.py")
    spawn_workers(run_script, [(first, 0, 2, init_method), (second, 1, 2, init_method)]).join()


@in_job
def test_functions_typed_into_an_interpreter_go_by_value() -> None:
    main = types.ModuleType("__main__")  # one without a file
    exec("BASE = 10\ndef function(value): return value + BASE\nclass Class: value = 5", main.__dict__)
    previous, sys.modules["__main__"] = sys.modules["__main__"], main
    try:
        for _ in range(2):
            assert rpc.rpc_sync("w1", main.function, args=(1,)) == 11
            assert rpc.remote("w1", main.Class).to_here().value == 5
            assert rpc.rpc_sync("w1", work.echo, args=(main.function,))(2) == 12
        main.BASE = 20
        assert rpc.rpc_sync("w1", main.function, args=(1,)) == 21
    finally:
        sys.modules["__main__"] = previous


def run(path: Path, *arguments: str) -> subprocess.Popen[str]:
    command = [sys.executable, str(path), *arguments]
    return subprocess.Popen(command, stderr=subprocess.PIPE, text=True, cwd=ROOT)


def test_programs_started_on_their_own_share_their_functions(tmp_path: Path, init_method: str) -> None:
    path = tmp_path / "script.py"
    write(path, BY_NAME)
    processes = [run(path, str(rank), "2", init_method) for rank in range(2)]
    for process in processes:
        errors = process.communicate()[1]
        assert process.returncode == 0, errors


def test_children_of_multiprocessing_share_the_functions_of_their_script(tmp_path: Path, init_method: str) -> None:
    path = tmp_path / "script.py"
    path.write_text(
        DEFINITIONS
        + textwrap.dedent("""
            import torch.multiprocessing

            def work(rank):
                sys.argv[1] = str(rank)
                with init():
                    assert bump.__module__ == "__mp_main__"
                    if rank == 1:
                        assert rpc.rpc_sync("w0", bump) == ("w0", 1)
                        assert rpc.rpc_sync("w0", is_own, (Point(1.0),)) is True
                        assert type(rpc.rpc_sync("w0", Point, (1.0,))) is Point

            if __name__ == "__main__":
                def only_here(value):
                    return value + OFFSET

                child = torch.multiprocessing.get_context("spawn").Process(target=work, args=(1,))
                child.start()
                sys.argv[1] = "0"
                with init():
                    assert rpc.rpc_sync("w1", bump) == ("w1", 1)
                    assert rpc.rpc_sync("w1", bump) == ("w1", 2)
                    assert rpc.rpc_sync("w1", is_own, (Point(1.0),)) is True
                    assert rpc.rpc_sync("w1", only_here, (1,)) == 101
                    assert type(rpc.rpc_sync("w1", Point, (1.0,))) is Point
                child.join()
                sys.exit(child.exitcode)
        """)
    )
    process = run(path, "0", "2", init_method)
    errors = process.communicate()[1]
    assert process.returncode == 0, errors
