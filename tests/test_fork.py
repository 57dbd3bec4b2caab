"""Children made by fork: they are told, and they harm nothing."""

from __future__ import annotations

import gc
import multiprocessing
import os
import pickle
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import pytest

import fastref.rpc as rpc
from fastref.errors import ForkedProcessError, PeerError
from fastref.rref import current_wiring
from tests import puppets
from tests.puppets import Cell, Troupe, troupe_fixture  # noqa: F401

CHILD_PATIENCE_S = 30.0
# Pins are looked at every 100 ms.
SETTLE_S = 0.3


def run_in_child(function: Callable[[], Any]) -> Any:
    """Run a function in a child made by ``os.fork``; return what it returned, or the type of what it raised."""
    reading, writing = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            outcome: Any = function()
        except BaseException as error:
            outcome = type(error)
        os.write(writing, pickle.dumps(outcome))
        os.close(writing)
        os._exit(0)
    os.close(writing)
    with os.fdopen(reading, "rb") as pipe:
        data = pipe.read()
    _, status = os.waitpid(pid, 0)
    assert os.waitstatus_to_exitcode(status) == 0, f"the child ended with {os.waitstatus_to_exitcode(status)}"
    return pickle.loads(data)


# ---- the state of a worker that has a bit of everything


def own_a_bit_of_everything() -> None:
    """References to a cell, an int and a pending value of w1, to own values, handed on and not."""
    puppets.keep("cell", rpc.remote("w1", Cell, (5,)))
    puppets.keep("number", rpc.remote("w1", puppets.echo, (42,)))
    puppets.keep("pending", rpc.remote("w1", puppets.make_slowly, (600, 1)))
    puppets.keep("mine", rpc.RRef(Cell(7)))
    rpc.rpc_sync("w1", puppets.hold, ("theirs", puppets.kept("mine")))
    puppets.keep("private", rpc.RRef(Cell(8)))
    puppets.keep("future", rpc.rpc_async("w1", puppets.echo, (1,)))
    puppets.kept("future").wait()
    assert puppets.kept("number").to_here() == 42
    assert puppets.kept("cell").rpc_sync().get() == 5


def everything_still_works() -> None:
    assert puppets.kept("cell").rpc_sync().get() == 5
    assert puppets.kept("cell").to_here().value == 5
    assert puppets.kept("number").to_here() == 42
    assert puppets.kept("mine").to_here().value == 7
    assert puppets.kept("private").to_here().value == 8
    assert rpc.rpc_sync("w1", puppets.get_through, ("theirs",)) == 7


TOUCHES: dict[str, Callable[[], Any]] = {
    "rpc_sync": lambda: rpc.rpc_sync("w1", puppets.nothing),
    "rpc_async": lambda: rpc.rpc_async("w1", puppets.nothing),
    "remote": lambda: rpc.remote("w1", puppets.nothing),
    "rpc_sync_self": lambda: rpc.rpc_sync("w0", puppets.nothing),
    "get_worker_info": lambda: rpc.get_worker_info(),
    "get_worker_info_of": lambda: rpc.get_worker_info("w1"),
    "shutdown": lambda: rpc.shutdown(),
    "shutdown_not_graceful": lambda: rpc.shutdown(graceful=False),
    "init_rpc": lambda: rpc.init_rpc("w5", rank=0, world_size=1),
    "RRef": lambda: rpc.RRef(1),
    "snapshot": lambda: current_wiring().check_process(),
    **{
        f"{label}.{what}": (lambda label=label, call=call: call(puppets.kept(label)))
        for label in ("cell", "number", "pending", "mine", "private")
        for what, call in {
            "to_here": lambda r: r.to_here(),
            "rpc_sync": lambda r: r.rpc_sync().get(),
            "rpc_async": lambda r: r.rpc_async().get(),
            "remote": lambda r: r.remote().get(),
            "owner": lambda r: r.owner(),
            "owner_name": lambda r: r.owner_name(),
            "confirmed_by_owner": lambda r: r.confirmed_by_owner(),
        }.items()
    },
    **{
        f"{label}.local_value": (lambda label=label: puppets.kept(label).local_value()) for label in ("mine", "private")
    },
}


def touch_all_in_child() -> dict[str, Any]:
    def touch() -> dict[str, Any]:
        outcomes = {}
        for which, call in TOUCHES.items():
            try:
                outcomes[which] = repr(call())
            except BaseException as error:
                outcomes[which] = type(error)
        return outcomes

    return run_in_child(touch)


def start_pair(troupe: Troupe, job: str = "") -> list[puppets.Puppet]:
    pair = troupe.start(2, job)
    pair[0].do(own_a_bit_of_everything)
    return pair


def let_go(w0: puppets.Puppet, w1: puppets.Puppet) -> None:
    """Both tables are empty once nobody holds anything: nothing was lost and nothing is held twice."""
    w0.do(puppets.drop, "pending")
    w1.do(puppets.drop_all)
    w0.do(puppets.drop_all)
    w0.do(puppets.wait_until_entries, 0)
    w1.do(puppets.wait_until_entries, 1)  # the value that is still being made: its call holds it


def test_every_call_and_every_method_of_a_reference_is_refused_in_the_child(troupe: Troupe) -> None:
    w0, _ = start_pair(troupe)
    outcomes = w0.do(touch_all_in_child)
    wrong = {which: outcome for which, outcome in outcomes.items() if outcome is not ForkedProcessError}
    assert not wrong
    w0.do(everything_still_works)


def words() -> dict[int, tuple[int, int]]:
    """Word and generation of every entry that is not opened ahead, once what calls held for a moment is let go."""
    time.sleep(SETTLE_S)
    return {index: (entry["word"], entry["generation"]) for index, entry in puppets.snapshot()["held"].items()}


def drop_in_child() -> None:
    def drop() -> None:
        puppets.drop_all()
        gc.collect()

    run_in_child(drop)


def test_references_dropped_in_the_child_change_no_word(troupe: Troupe) -> None:
    w0, w1 = start_pair(troupe)
    before = w0.do(words), w1.do(words)
    for _ in range(20):
        w0.do(drop_in_child)
    assert (w0.do(words), w1.do(words)) == before
    w0.do(everything_still_works)
    let_go(w0, w1)


PROGRAM = """
import os, sys, time
import fastref.rpc as rpc
from fastref.rref import current_wiring

def words():
    return {i: (e["word"], e["generation"]) for i, e in current_wiring().snapshot()["table"]["entries"].items()}

rpc.init_rpc("alone", rank=0, world_size=1, rpc_backend_options=rpc.RpcBackendOptions(init_method=sys.argv[1]))
references = [rpc.remote("alone", list) for _ in range(5)] + [rpc.RRef([])]
values = [reference.to_here() for reference in references]
time.sleep(0.3)
before = words()
assert before
pid = os.fork()
if pid:
    assert os.waitpid(pid, 0)[1] == 0, "the child did not end well"
    assert words() == before
    assert [reference.to_here() for reference in references] == values
    del references
    rpc.shutdown()
    print("all is well")
"""


def test_a_child_that_runs_to_the_end_of_the_program_harms_nothing(troupe: Troupe) -> None:
    """Exit handlers, destruction of modules, destructors of references: all of it in the child."""
    command = [sys.executable, "-c", PROGRAM, f"local://{troupe.job}"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=CHILD_PATIENCE_S)
    assert result.stderr == ""
    assert (result.returncode, result.stdout) == (0, "all is well\n")


def child_of_multiprocessing() -> None:
    for call in TOUCHES.values():
        try:
            call()
        except ForkedProcessError:
            continue
        os._exit(3)
    puppets.drop_all()
    gc.collect()


def run_a_child_of_multiprocessing() -> None:
    child = multiprocessing.get_context("fork").Process(target=child_of_multiprocessing)
    child.start()
    child.join(CHILD_PATIENCE_S)
    assert child.exitcode == 0


def test_a_child_of_multiprocessing_is_refused_and_harms_nothing(troupe: Troupe) -> None:
    w0, w1 = start_pair(troupe)
    before = w0.do(words), w1.do(words)
    for _ in range(5):
        w0.do(run_a_child_of_multiprocessing)
    assert (w0.do(words), w1.do(words)) == before
    w0.do(everything_still_works)
    let_go(w0, w1)


def load_data() -> list[int]:
    """Read a data set by workers that are forked, as programs do while they hold references."""
    import torch

    class Numbers(torch.utils.data.Dataset):
        def __len__(self) -> int:
            return 16

        def __getitem__(self, index: int) -> int:
            try:
                puppets.kept("cell").to_here()
            except ForkedProcessError:
                return index
            return -1

    loader = torch.utils.data.DataLoader(Numbers(), num_workers=2, multiprocessing_context="fork", batch_size=4)
    return sorted(int(i) for batch in loader for i in batch)


def test_workers_of_a_data_loader_are_refused_and_harm_nothing(troupe: Troupe) -> None:
    w0, w1 = start_pair(troupe)
    before = w0.do(words), w1.do(words)
    assert w0.do(load_data) == list(range(16))
    assert (w0.do(words), w1.do(words)) == before
    w0.do(everything_still_works)
    let_go(w0, w1)


def test_a_data_loader_works_inside_a_called_function(troupe: Troupe) -> None:
    w0, w1 = start_pair(troupe)
    assert w1.do(rpc.rpc_sync, "w0", load_data) == list(range(16))
    w0.do(everything_still_works)
    let_go(w0, w1)


def fork_and(ending: str) -> int:
    """A served function whose child does not leave by ``os._exit``."""
    parent = os.getpid()
    pid = os.fork()
    if pid == 0:
        if ending == "raise":
            raise ValueError("the child's")
        if ending == "exit":
            sys.exit(5)
        return -1
    assert os.getpid() == parent
    deadline = time.monotonic() + CHILD_PATIENCE_S
    while os.waitpid(pid, os.WNOHANG) == (0, 0):
        if time.monotonic() > deadline:
            os.kill(pid, 9)
            os.waitpid(pid, 0)
            raise AssertionError("the child lives on")
        time.sleep(0.01)
    return pid


@pytest.mark.parametrize("ending", ["return", "raise", "exit"])
def test_a_child_forked_in_a_served_function_answers_nothing(troupe: Troupe, ending: str) -> None:
    """It has a copy of the serving thread, which comes back from the function too."""
    w0, w1 = start_pair(troupe)
    for _ in range(3):
        assert w1.do(rpc.rpc_sync, "w0", fork_and, (ending,)) > 0
    assert w1.do(rpc.rpc_sync, "w0", puppets.process_id) == w0.pid
    w0.do(everything_still_works)
    let_go(w0, w1)


def fork_a_child_that_stays() -> int:
    pid = os.fork()
    if pid == 0:
        time.sleep(60)
        os._exit(0)
    return pid


def end_child(pid: int) -> None:
    os.kill(pid, 9)
    os.waitpid(pid, 0)


def test_a_worker_that_leaves_while_its_child_lives_is_seen_to_leave(troupe: Troupe) -> None:
    """The child keeps a copy of every socket open."""
    w0, w1 = troupe.start(2)
    child = w0.do(fork_a_child_that_stays)
    w0.do(rpc.shutdown, False)
    w1.do(puppets.wait_until_dead, "w0")
    with pytest.raises(PeerError):
        w1.do(rpc.rpc_sync, "w0", puppets.nothing)
    w0.do(end_child, child)


def test_a_worker_killed_while_its_child_lives_is_seen_to_die(troupe: Troupe) -> None:
    w0, w1 = troupe.start(2)
    child = w0.do(fork_a_child_that_stays)
    w0.kill()
    w1.do(puppets.wait_until_dead, "w0")
    os.kill(child, 9)


def test_a_child_that_outlives_shutdown_does_not_disturb_the_next_job(troupe: Troupe) -> None:
    pair = troupe.start(2)
    child = pair[0].do(fork_a_child_that_stays)
    troupe.leave(pair)
    troupe.join(pair)
    assert pair[1].do(rpc.rpc_sync, "w0", puppets.process_id) == pair[0].pid
    troupe.leave(pair)
    pair[0].do(end_child, child)


def call_while_forking(count: int) -> int:
    """Fork from one thread while others call, take and drop references."""
    import threading

    ended = threading.Event()
    calls = [0, 0]

    def work(which: int) -> None:
        while not ended.is_set():
            assert rpc.rpc_sync("w1", puppets.echo, (which,)) == which
            assert rpc.remote("w1", puppets.echo, ("x",)).to_here() == "x"
            calls[which] += 1

    threads = [threading.Thread(target=work, args=(which,)) for which in range(2)]
    for thread in threads:
        thread.start()
    for _ in range(count):
        drop_in_child_only()
    ended.set()
    for thread in threads:
        thread.join()
    return min(calls)


def drop_in_child_only() -> None:
    """As ``drop_in_child``, with locks of other threads in whatever state they were."""
    pid = os.fork()
    if pid == 0:
        puppets.drop_all()
        gc.collect()
        os._exit(0)
    deadline = time.monotonic() + CHILD_PATIENCE_S
    while os.waitpid(pid, os.WNOHANG) == (0, 0):
        assert time.monotonic() < deadline, "the child waits for a lock"
        time.sleep(0.001)


def test_forking_under_load_harms_nothing(troupe: Troupe) -> None:
    w0, w1 = start_pair(troupe)
    assert w0.do(call_while_forking, 20) > 0
    w0.do(everything_still_works)
    let_go(w0, w1)
