"""fastref in the place of ``torch.distributed.rpc``: by the command, by ``install()``, and in all that they start."""

from __future__ import annotations

import importlib
import json
import os
import pickle
import subprocess
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.rpc

import fastref.rpc as rpc
from fastref.compat import __main__ as command
from fastref.errors import UsageError
from fastref.rpc import absent

ROOT = Path(__file__).resolve().parent.parent
PATIENCE_S = 100
COMMAND = ["-m", "fastref.compat"]

# Put on PYTHONPATH of a program that is not to be changed: it shows that torch's own agent was not made.
WITHOUT_TORCHS_AGENT = """
import torch

def refuse(*arguments, **options):
    raise AssertionError("torch's own agent was made")

torch._C._distributed_rpc.TensorPipeAgent.__init__ = refuse
"""

# As anybody would have written it for torch.
TWO_WORKERS = """
import os, sys
import torch
import torch.distributed.rpc as rpc
import torch.multiprocessing as mp
from torch.distributed.rpc import RRef, remote, rpc_async, rpc_sync

class Counter:
    def __init__(self, start):
        self.count = torch.tensor(start)

    def add(self, more):
        self.count += more
        return self.count

def total(rref):
    return rref.to_here().count.item() + rref.rpc_sync().add(0).item()

def work(rank, world_size, init_method):
    options = rpc.TensorPipeRpcBackendOptions(num_worker_threads=4, init_method=init_method)
    rpc.init_rpc(f"worker{rank}", rank=rank, world_size=world_size, rpc_backend_options=options)
    if rank == 0:
        counter = remote("worker1", Counter, args=(1,))
        assert isinstance(counter, RRef)
        futures = [counter.rpc_async().add(2) for _ in range(3)]
        torch.futures.wait_all(futures)
        three = rpc_async(1, torch.add, args=(torch.ones(2), 2)).wait()
        print("result", rpc_sync("worker1", total, args=(counter,)), three.tolist(), flush=True)
    rpc.shutdown()

if __name__ == "__main__":
    if "RANK" in os.environ:
        work(int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]), "env://")
    else:
        mp.spawn(work, args=(2, sys.argv[1]), nprocs=2)
"""


@pytest.fixture
def scripts(tmp_path: Path) -> Path:
    """Return a directory for programs."""
    return tmp_path


def run(*arguments: object, at: Path, path: Path | None = None, succeeds: bool = True) -> str:
    """Run the interpreter in a directory and return what it prints."""
    environment = dict(os.environ)
    if path is not None:
        environment["PYTHONPATH"] = os.pathsep.join([str(path), environment["PYTHONPATH"]])
    done = subprocess.run(
        [sys.executable, *map(str, arguments)],
        cwd=at,
        env=environment,
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
        check=False,
    )
    assert (done.returncode == 0) is succeeds, done.stdout + done.stderr
    return done.stdout if succeeds else done.stderr


# ---- the command

# Prints what a program can see of how it was started.
LOOK = """
import json, sys

def own(): ...

print(json.dumps({
    "arguments": sys.argv, "name": __name__, "file": __file__, "path": sys.path, "package": __package__,
    "spec": getattr(__spec__, "name", None), "main": sys.modules["__main__"].own is own,
    "optimize": sys.flags.optimize, "warnings": sys.warnoptions, "X": sys._xoptions,
    "unbuffered": sys.stdout.write_through, "loaded": sorted({"torch", "fastref"} & set(sys.modules)),
}))
"""


@pytest.mark.parametrize(
    "arguments",
    [
        ("look.py", "a", "-b", "--help"),
        ("-m", "folder.look", "-m"),
        ("folder",),  # its __main__.py
    ],
    ids=" ".join,
)
def test_a_program_sees_what_it_would_see_without(scripts: Path, arguments: tuple[str, ...]) -> None:
    (scripts / "folder").mkdir()
    for name in ("look.py", "folder/look.py", "folder/__main__.py"):
        (scripts / name).write_text(LOOK)
    options = ("-OuX", "importtime=0", "-W", "ignore::UserWarning")
    seen = json.loads(run(*options, *COMMAND, *arguments, at=scripts))
    assert seen == json.loads(run(*options, *arguments, at=scripts))
    assert seen["loaded"] == []


@pytest.mark.parametrize(
    ("line", "options"),
    [
        ("-m fastref.compat x.py -m", []),
        ("-O -X dev -m fastref.compat x.py -m", ["-O", "-X", "dev"]),
        ("-Om fastref.compat x.py -m", ["-O"]),
        ("-u -Omfastref.compat x.py -m", ["-u", "-O"]),
        ("-mfastref.compat x.py -m", []),
    ],
)
def test_however_the_module_is_spelled_the_interpreter_keeps_its_options(
    monkeypatch: pytest.MonkeyPatch, line: str, options: list[str]
) -> None:
    monkeypatch.setattr(sys, "orig_argv", ["python", *line.split()])
    assert command.interpreter_options(2) == options


def test_the_command_says_how_it_is_used(scripts: Path) -> None:
    assert "script.py [argument ...]" in run(*COMMAND, "--help", at=scripts)
    assert "does not look" in run("-E", *COMMAND, "-c", "pass", at=ROOT, succeeds=False)


def test_a_program_for_torch_runs_unchanged(scripts: Path) -> None:
    (scripts / "program.py").write_text(TWO_WORKERS)
    guard = scripts / "guard"
    guard.mkdir()
    (guard / "sitecustomize.py").write_text(WITHOUT_TORCHS_AGENT)
    meeting = f"file://{scripts}/meeting"
    assert run(*COMMAND, "program.py", meeting, at=scripts, path=guard) == "result 14 [3.0, 3.0]\n"
    assert "torch's own agent was made" in run("program.py", f"{meeting}2", at=scripts, path=guard, succeeds=False)


@pytest.mark.parametrize(
    "launch",
    [
        ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", *COMMAND),
        (*COMMAND, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"),
    ],
    ids=["torchrun runs the command", "the command runs torchrun"],
)
def test_a_program_for_torch_runs_unchanged_under_torchrun(scripts: Path, launch: tuple[str, ...]) -> None:
    (scripts / "program.py").write_text(TWO_WORKERS)
    guard = scripts / "guard"
    guard.mkdir()
    (guard / "sitecustomize.py").write_text(WITHOUT_TORCHS_AGENT)
    assert run(*launch, "program.py", at=scripts, path=guard) == "result 14 [3.0, 3.0]\n"


def test_a_child_of_the_command_has_it_and_one_without_torch_loads_nothing(scripts: Path) -> None:
    (scripts / "parent.py").write_text(
        "import os, subprocess, sys\n"
        "with_torch = 'import torch.distributed.rpc as rpc; print(rpc.__name__)'\n"
        'without = \'import sys; print(sorted({"torch", "fastref", "multiprocessing"} & set(sys.modules)))\'\n'
        "fastref_first = 'import fastref.api; import torch.distributed.rpc as rpc; print(rpc.__name__)'\n"
        "only_looks = 'import importlib.util as u; assert u.find_spec(\"torch\"); ' + with_torch\n"
        "for program in (with_torch, without, fastref_first, only_looks):\n"
        "    subprocess.run([sys.executable, '-c', program], check=True)\n"
    )
    assert run(*COMMAND, "parent.py", at=scripts) == "fastref.rpc\n[]\nfastref.rpc\nfastref.rpc\n"


def test_a_checkout_that_is_on_no_path_is_found(scripts: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (scripts / "program.py").write_text("import torch.distributed.rpc as rpc; print(rpc.__name__)")
    monkeypatch.setenv("PYTHONPATH", "")
    assert run(*COMMAND, scripts / "program.py", at=ROOT) == "fastref.rpc\n"


# ---- install()


def test_installing_replaces_what_torch_has_loaded_and_those_who_hold_it_find_fastref(scripts: Path) -> None:
    program = """
import torch, torch.nn.parallel.distributed
import torch.distributed.rpc as held
import torch.distributed.rpc.api as held_api
import torch.distributed.autograd as held_autograd
from torch.distributed.rpc import init_rpc, rpc_sync
from fastref import compat
import fastref.rpc

compat.install()
compat.install()
import torch.distributed.rpc as rpc
from torch.distributed import rpc as again
import torch.distributed.rpc.api as api
import torch.distributed.autograd
import torch.distributed.nn, torch.distributed.optim
from torch.distributed.optim import ZeroRedundancyOptimizer

assert rpc is again is torch.distributed.rpc is fastref.rpc and api is fastref.rpc.api
assert torch._jit_internal.RRef is torch._jit_internal.PyRRef is rpc.RRef
assert torch.nn.parallel.distributed.RRef is rpc.RRef
assert held.rpc_sync is rpc.rpc_sync and held.api is api and held_api.shutdown is api.shutdown
held_api._ignore_rref_leak = False
assert api._ignore_rref_leak is False
assert torch.distributed.autograd is fastref.autograd and held_autograd.backward is fastref.autograd.backward
for function in (lambda: init_rpc("w", rank=0, world_size=1), lambda: rpc_sync("w", print)):
    try:
        function()
    except RuntimeError as error:
        assert "before fastref took its place" in str(error), error
    else:
        raise AssertionError("torch's function ran")
with rpc.init_rpc("w", rank=0, world_size=1, rpc_backend_options=rpc.RpcBackendOptions(init_method="local://one")):
    assert held.rpc_sync("w", divmod, (7, 2)) == (3, 1)
"""
    run("-c", program, at=scripts)


def test_installing_after_torchs_init_rpc_is_refused(scripts: Path) -> None:
    program = f"""
import torch.distributed.rpc as rpc
options = rpc.TensorPipeRpcBackendOptions(init_method="file://{scripts}/meeting", num_worker_threads=1)
rpc.init_rpc("w", rank=0, world_size=1, rpc_backend_options=options)
from fastref import compat
try:
    compat.install()
finally:
    rpc.shutdown()
"""
    assert "UsageError: fastref cannot take the place" in run("-c", program, at=scripts, succeeds=False)


# A program that installs where only the first process passes, unless it is run by the command, and asks children what
# they have.
CHILDREN = """
import multiprocessing, os, sys

def which(queue=None, *rest):
    import torch.distributed.rpc as rpc
    torch = sys.modules["torch"]
    name = f"{rpc.__name__} {torch.distributed.rpc.__name__}"
    print(name, flush=True) if queue is None else queue.put(name)

def by(context, target=which):
    queue = context.Queue()
    child = context.Process(target=target, args=(queue,))
    child.start()
    print(queue.get(), flush=True)
    child.join()

def grandchild(queue):
    assert "torch" not in sys.modules
    context = multiprocessing.get_context("spawn")
    inner = context.Process(target=which, args=(queue,))
    inner.start()
    inner.join()

def of_torch(rank):
    which()

def preloaded(queue):
    import preloaded
    queue.put(f"{preloaded.rpc.rpc_sync.__module__} {preloaded.rpc.shutdown.__module__}")

if __name__ == "__main__":
    way = sys.argv[1]
    context = multiprocessing.get_context(way.partition(",")[0].split()[0])
    if way.startswith("forkserver, warm"):
        context.set_forkserver_preload(["preloaded"])
        from multiprocessing import forkserver
        forkserver.ensure_running()
    if "command" not in sys.argv:
        from fastref import compat
        compat.install()
    if way == "spawn of torch":
        import torch.multiprocessing
        torch.multiprocessing.spawn(of_torch)
    elif way == "spawn of spawn":
        by(context, grandchild)
    elif way == "forkserver, warm":
        by(context, preloaded)
    else:
        by(context)
"""


@pytest.mark.parametrize("way", ["fork", "spawn", "forkserver", "forkserver, warm", "spawn of spawn", "spawn of torch"])
def test_children_have_it_however_they_are_started(scripts: Path, way: str) -> None:
    (scripts / "program.py").write_text(CHILDREN)
    (scripts / "preloaded.py").write_text("import torch.distributed.rpc as rpc\n")
    expected = "fastref.api fastref.rpc.api\n" if "warm" in way else "fastref.rpc fastref.rpc\n"
    assert run("program.py", way, at=scripts) == expected
    assert run(*COMMAND, "program.py", way, "command", at=scripts) == expected


def test_a_program_whose_children_import_torch_first_of_all_runs_unchanged(scripts: Path) -> None:
    (scripts / "program.py").write_text(TWO_WORKERS.replace('print("result"', "print(rpc.__name__"))
    assert run(*COMMAND, "program.py", f"file://{scripts}/meeting", at=scripts) == "fastref.rpc 14 [3.0, 3.0]\n"


# ---- names


def test_every_name_that_torch_publishes_is_there() -> None:
    assert torch.distributed.rpc.__name__ == "torch.distributed.rpc"  # torch's own
    for name in torch.distributed.rpc.__all__:
        assert not isinstance(getattr(rpc, name), absent.Absent), name
    for module in ("api", "backend_registry", "constants", "functions", "internal", "options", "rref_proxy"):
        for name in getattr(importlib.import_module(f"torch.distributed.rpc.{module}"), "__all__", []):
            assert hasattr(importlib.import_module(f"fastref.rpc.{module}"), name), f"{module}.{name}"


def test_every_function_and_class_of_torch_is_there_or_listed_as_absent() -> None:
    for name, value in vars(torch.distributed.rpc).items():
        if getattr(value, "__module__", "").startswith("torch.distributed.rpc"):
            assert hasattr(rpc, name), name


def test_what_is_listed_as_absent_is_in_torch_and_not_here() -> None:
    for module, names in absent.ABSENT.items():
        theirs = importlib.import_module(module)
        for name in names:
            assert hasattr(theirs, name), f"{module}.{name}"
    assert not [name for name in absent.ABSENT["torch.distributed.rpc"] if name in vars(rpc)]


def test_factories_of_methods_make_methods_of_references() -> None:
    assert rpc.method_factory("owner_name", "A name.").__doc__ == "A name."
    with rpc.init_rpc("w", rank=0, world_size=1, rpc_backend_options=rpc.RpcBackendOptions(init_method="local://one")):
        assert rpc.new_method(rpc.RRef(5)) == 5
        assert rpc.method_factory("owner_name", "")(rpc.RRef(5)) == "w"


ABSENT_NAMES = [(module, name) for module, names in absent.ABSENT.items() for name in names]


@pytest.mark.parametrize(("module", "name"), ABSENT_NAMES, ids=".".join)
def test_what_is_absent_can_be_imported_and_names_itself_when_used(module: str, name: str) -> None:
    found: Any = getattr(absent.AbsentModule(module), name)
    assert name in repr(found)
    assert not isinstance(5, found)
    assert not issubclass(int, found)
    assert not hasattr(found, "__wrapped__")

    def enter() -> None:
        with found:
            pass

    uses = (
        found,
        enter,
        lambda: found(1, a=2),
        lambda: found.method,
        lambda: found[int],
        lambda: list(found),
        lambda: types.new_class("Own", (found,)),
        lambda: pickle.dumps(found),
    )
    for use in uses:
        with pytest.raises(UsageError, match=f"fastref does not have {module}.{name}: "):
            use()


def test_a_name_that_torch_does_not_have_either_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="has no attribute 'rpc_snyc'"):
        rpc.rpc_snyc  # noqa: B018
