"""The agent for tests: which sends fail, how often, what comes late, and what becomes of it."""

from __future__ import annotations

import contextlib
import gc
import math
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

import fastref
import fastref.rpc as rpc
from fastref import debug
from fastref.errors import CallTimeout, PeerError, UsageError, WorkerDied
from fastref.faults import MESSAGES, FaultPlan, FaultyRuntime
from fastref.faults.agenda import Agenda
from fastref.faults.plan import retry_after_s
from fastref.faults.sender import FaultySender
from fastref.rpc import _testing
from fastref.rpc._testing import FaultyTensorPipeAgent, FaultyTensorPipeRpcBackendOptions
from fastref.rref import current_wiring
from fastref.runtime.runtime import Runtime
from tests import puppets, work
from tests.jobs import in_job, job_fixtures
from tests.stopping import stopped

Start = Callable[[Callable[..., object], list[tuple[object, ...]]], Any]

jobs, job = job_fixtures(3, [{"kind": FaultyTensorPipeRpcBackendOptions}])

FAULTY = rpc.BackendType["FAULTY_TENSORPIPE"]
CONTROLS = ["RREF_FORK_REQUEST", "RREF_CHILD_ACCEPT", "RREF_USER_DELETE"]
INTENTIONAL = "RPCErr:2:Send attempt failed intentionally for {} to worker '{}'"
NEVER_MADE = r"RRef creation via rpc.remote\(\) timed out"


@torch.jit.script
def double(tensor: torch.Tensor) -> torch.Tensor:
    return tensor * 2


@contextlib.contextmanager
def faults(fail: list[str] | None = None, delay: dict[str, float] | None = None, sends: int = 1) -> Iterator[FaultPlan]:
    """Have what this worker sends fail or come late."""
    plan = current_wiring().plan = FaultPlan(fail or [], delay or {}, sends)
    try:
        yield plan
    finally:
        current_wiring().plan = FaultPlan()


def set_plan(fail: list[str], delay: dict[str, float], sends: int) -> None:
    current_wiring().plan = FaultPlan(fail, delay, sends)


def counts() -> dict[str, dict[str, int]]:
    found: dict[str, dict[str, int]] = debug.snapshot()["faults"]
    return found


def wait_for(condition: Callable[[], Any]) -> None:
    """Wait for what has to happen; the watchdog ends a test in which it does not."""
    while not condition():
        time.sleep(0.005)


LATER_S = 3600.0  # than any test lasts: such a message goes when `send_late` says so


def send_late() -> None:
    """Have everything sent that is kept back here."""
    current_wiring().agenda.act(time.monotonic_ns() + int(2 * LATER_S * 1e9))


# ---- the plan


def test_a_message_fails_as_often_as_the_plan_says_and_no_other_does() -> None:
    plan = FaultPlan(["PYTHON_CALL"], {}, num_fail_sends=2)
    assert [plan.fails("PYTHON_CALL", b"one") for _ in range(4)] == [True, True, False, False]
    assert plan.fails("PYTHON_CALL", b"two")
    assert not plan.fails("SCRIPT_CALL", b"one")
    assert plan.counts() == {"failed": {"PYTHON_CALL": 3}, "delayed": {}}


def test_a_plan_counts_exactly_when_many_threads_send() -> None:
    plan = FaultPlan(["PYTHON_CALL"], {}, num_fail_sends=1000)
    threads = [threading.Thread(target=lambda: [plan.fails("PYTHON_CALL", b"") for _ in range(500)]) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert plan.counts()["failed"] == {"PYTHON_CALL": 1000}


def test_retries_wait_longer_and_longer_and_end() -> None:
    waits = [retry_after_s(retries) for retries in range(7)]
    assert waits == [1.0, 1.5, 2.25, 3.375, 5.0625, None, None]


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"messages_to_fail": ["PYTHON_CAL"]}, "no such message: 'PYTHON_CAL'; known are PYTHON_CALL, SCRIPT_CALL, "),
        ({"messages_to_delay": {"RREF_ACK": 1}}, "no such message: 'RREF_ACK'; known are .*RREF_USER_DELETE"),
        ({"messages_to_delay": {"PYTHON_CALL": -1}}, "PYTHON_CALL is delayed by a number of seconds, at least 0"),
        ({"messages_to_delay": {"PYTHON_CALL": "1"}}, "PYTHON_CALL is delayed by a number of seconds, at least 0"),
        ({"messages_to_fail": "PYTHON_CALL"}, "messages_to_fail is a list of names"),
        ({"num_fail_sends": -1}, "num_fail_sends is a number of sends, at least 0"),
        ({"num_fail_sends": 0.5}, "num_fail_sends is a number of sends, at least 0"),
    ],
)
def test_options_that_mean_nothing_are_refused(settings: dict[str, Any], text: str) -> None:
    with pytest.raises(UsageError, match=text):
        rpc.construct_rpc_backend_options(FAULTY, **settings)


def test_options_are_what_they_were_given() -> None:
    names, delays = list(MESSAGES), {"SCRIPT_CALL": 1.5}
    options = rpc.construct_rpc_backend_options(
        FAULTY,
        7.0,
        "local://x",
        num_worker_threads=8,
        messages_to_fail=names,
        messages_to_delay=delays,
        num_fail_sends=3,
    )
    assert (options.rpc_timeout, options.init_method, options.num_worker_threads) == (7.0, "local://x", 8)
    assert (options.messages_to_fail, options.messages_to_delay, options.num_fail_sends) == (names, delays, 3)
    assert options.table_bits == 0


# ---- the agenda


def test_an_agenda_does_what_is_due_in_order_whatever_fails() -> None:
    agenda, done = Agenda(), []

    def fail() -> None:
        done.append("failed")
        raise ValueError("for a test")

    agenda.add(30, lambda: done.append("third"))
    agenda.add(10, lambda: done.append("first"))
    agenda.add(10, fail, is_control=True)
    assert (agenda.next_ns, agenda.controls, agenda.is_empty()) == (10, 1, False)
    agenda.act(9)
    assert done == []
    agenda.act(29)
    assert done == ["first", "failed"]
    assert (agenda.next_ns, agenda.controls, agenda.is_empty()) == (30, 0, False)
    agenda.act(30)
    assert done == ["first", "failed", "third"]
    assert agenda.is_empty()


def test_an_agenda_is_not_empty_while_something_is_being_done() -> None:
    agenda, seen = Agenda(), []
    agenda.add(0, lambda: seen.append(agenda.is_empty()))
    agenda.act(1)
    assert seen == [False]
    assert agenda.is_empty()


# ---- what fails


@in_job
def test_a_call_fails_as_often_as_it_should_and_then_goes_through() -> None:
    with faults(["PYTHON_CALL"], sends=2) as plan:
        for _ in range(2):
            with pytest.raises(PeerError, match=INTENTIONAL.format("PYTHON_CALL", "w1")) as caught:
                rpc.rpc_sync("w1", work.add, (1, 2))
            assert caught.value.worker == "w1"
        assert rpc.rpc_sync("w1", work.add, (1, 2)) == 3
        for to, arguments in (("w2", (1, 2)), ("w1", (1, 3))):  # other messages
            for _ in range(2):
                future = rpc.rpc_async(to, work.add, arguments)
                with pytest.raises(PeerError, match=INTENTIONAL.format("PYTHON_CALL", to)):
                    future.wait()
            assert rpc.rpc_async(to, work.add, arguments).wait() == sum(arguments)
        assert plan.counts()["failed"] == {"PYTHON_CALL": 6}


@in_job
def test_operators_and_script_functions_are_script_calls_and_all_others_python_calls() -> None:
    tensor = torch.ones(2)
    counter = rpc.remote("w1", work.Counter, (5,))
    with faults(["SCRIPT_CALL", "SCRIPT_REMOTE_CALL"]) as plan:
        for function in (torch.neg, double):
            with pytest.raises(PeerError, match=INTENTIONAL.format("SCRIPT_CALL", "w1")):
                rpc.rpc_sync("w1", function, (tensor,))
            with pytest.raises(PeerError, match=INTENTIONAL.format("SCRIPT_REMOTE_CALL", "w1")):
                rpc.remote("w1", function, (tensor,)).to_here()
        with pytest.raises(PeerError, match=INTENTIONAL.format("SCRIPT_CALL", "w1")):
            rpc.rpc_sync("w1", math.sqrt, (4,))  # TorchScript has it as an operator
        assert rpc.rpc_sync("w1", abs, (-4,)) == 4
        assert torch.equal(rpc.rpc_sync("w1", torch.nn.functional.relu, (tensor,)), tensor)
        assert rpc.rpc_sync("w1", work.add, (1, 2)) == 3
        assert counter.rpc_sync().get() == 5
        assert rpc.remote("w1", work.add, (1, 2)).to_here() == 3
        assert plan.counts()["failed"] == {"SCRIPT_CALL": 3, "SCRIPT_REMOTE_CALL": 2}
    with faults(["PYTHON_CALL", "PYTHON_REMOTE_CALL"]) as plan:
        assert torch.equal(rpc.rpc_sync("w1", double, (tensor,)), tensor * 2)
        with pytest.raises(PeerError, match=INTENTIONAL.format("PYTHON_CALL", "w1")):
            counter.rpc_sync().get()
        with pytest.raises(PeerError, match=INTENTIONAL.format("PYTHON_REMOTE_CALL", "w1")):
            counter.remote().get().to_here()
        assert plan.counts()["failed"] == {"PYTHON_CALL": 1, "PYTHON_REMOTE_CALL": 1}


@in_job
def test_every_use_of_a_reference_that_was_never_made_says_so() -> None:
    for to in ("w1", "w0"):
        with faults(["PYTHON_REMOTE_CALL"]):
            rref = rpc.remote(to, work.Counter, (5,))
            for use in (
                rref.to_here,
                rref._serialize,
                rref._get_type,
                lambda rref=rref: rref._get_future().wait(),
                lambda rref=rref: rref.rpc_sync().get(),
                lambda rref=rref: rref.rpc_async().get(),
                lambda rref=rref: rref.remote().get(),
                lambda rref=rref: rpc.rpc_sync("w2", work.echo, (rref,)),
                lambda rref=rref: rpc.rpc_async("w2", work.echo, ([rref],)),  # at once, not through its future
                lambda rref=rref: rpc.remote("w2", work.echo, (rref,)).to_here(),
            ):
                with pytest.raises(PeerError, match=NEVER_MADE):
                    use()
    assert rref.is_owner()
    assert rpc._rref_context_get_debug_info()["num_pending_users"] == "0"


@in_job
def test_entries_of_references_that_were_never_made_are_used_again() -> None:
    with faults(["PYTHON_REMOTE_CALL"]) as plan:
        kept = [rpc.remote("w1", work.echo, (number,)) for number in range(200)]
        assert plan.counts()["failed"] == {"PYTHON_REMOTE_CALL": 200}
    wait_for(lambda: current_wiring().peers[1].snapshot()["entries_held"] == 0)
    assert [rpc.remote("w1", work.echo, (number,)).to_here() for number in range(100)] == list(range(100))
    del kept


@in_job
def test_fetches_fail_by_the_kind_of_the_value() -> None:
    python, script = rpc.remote("w1", work.add, (1, 2)), rpc.remote("w1", torch.neg, (torch.ones(2),))
    with faults(["SCRIPT_RREF_FETCH_CALL"], sends=2) as plan:
        assert python.to_here() == 3  # a number, which others would read without a message
        for _ in range(2):
            with pytest.raises(PeerError, match=INTENTIONAL.format("SCRIPT_RREF_FETCH_CALL", "w1")):
                script.to_here()
        assert torch.equal(script.to_here(), -torch.ones(2))
        assert plan.counts()["failed"] == {"SCRIPT_RREF_FETCH_CALL": 2}
    with faults(["PYTHON_RREF_FETCH_CALL"]) as plan:
        script.to_here()
        with pytest.raises(PeerError, match=INTENTIONAL.format("PYTHON_RREF_FETCH_CALL", "w1")):
            python.to_here()
        assert python.to_here() == 3
        assert plan.counts()["failed"] == {"PYTHON_RREF_FETCH_CALL": 1}


# ---- what comes late


@in_job
def test_a_late_call_holds_up_nobody_but_who_waits_for_it() -> None:
    with faults(delay={"PYTHON_CALL": LATER_S}) as plan:
        late = rpc.rpc_async("w1", work.echo, ("late",))
        assert plan.counts() == {"failed": {}, "delayed": {"PYTHON_CALL": 1}}
    assert rpc.rpc_sync("w1", work.echo, ("sooner",)) == "sooner"
    assert not late.done()
    send_late()
    assert late.wait() == "late"


@in_job
def test_a_late_call_goes_by_itself_when_its_time_has_come() -> None:
    with faults(delay={"PYTHON_CALL": 0.3}):
        started = time.monotonic()
        assert rpc.rpc_sync("w1", work.echo, ("late",)) == "late"
        assert time.monotonic() - started >= 0.3


@in_job
def test_a_late_call_times_out_like_any_other_and_is_still_run_once() -> None:
    counter = rpc.remote("w1", work.Counter, (0,))
    with faults(delay={"PYTHON_CALL": 0.4}):
        with pytest.raises(CallTimeout, match="RPC ran for more than"):
            counter.rpc_sync(timeout=0.1).add(1)
    wait_for(lambda: counter.rpc_sync().get() == 1)


@in_job
def test_a_late_fetch_times_out_and_the_next_one_succeeds() -> None:
    rref = rpc.remote("w1", work.add, (1, 2))
    with faults(delay={"PYTHON_RREF_FETCH_CALL": 0.3}):
        with pytest.raises(CallTimeout, match="RPC ran for more than"):
            rref.to_here(0.05)
        assert rref.to_here() == 3


@in_job
def test_a_value_that_comes_after_its_time_was_never_made() -> None:
    for to in ("w1", "w0"):
        with faults(delay={"PYTHON_REMOTE_CALL": 0.3}):
            rref = rpc.remote(to, work.add, (1, 2), timeout=0.05)
            with pytest.raises(CallTimeout, match="RPC ran for more than"):
                rref._get_future().wait()
            with pytest.raises(CallTimeout, match=NEVER_MADE):
                rref.to_here()
        wait_for(lambda: current_wiring().agenda.is_empty())
        rpc.rpc_sync(to, work.echo, (1,))
        with pytest.raises(CallTimeout, match=NEVER_MADE):  # it is there now
            rref.to_here()


@in_job
def test_a_late_message_keeps_what_it_carries() -> None:
    traced, mine = rpc.remote("w2", work.Traced), rpc.RRef(work.Traced())
    assert rpc.rpc_sync("w2", work.wait_until_traced, (1,)) == 1
    tensor = torch.arange(1 << 18)
    with faults(delay={"PYTHON_CALL": LATER_S}):
        kept = rpc.rpc_async("w1", work.keep, ([traced, mine],))
        echo = rpc.rpc_async("w1", work.echo, (tensor,))
    tensor.zero_()  # what was sent was sent
    del traced, mine
    gc.collect()
    for _ in range(50):  # positions of later records must not free what an earlier one needs
        rpc.rpc_sync("w1", work.echo, (torch.ones(1 << 15),))
    assert not kept.done()
    assert rpc.rpc_sync("w2", work.traced_alive) == work.traced_alive() == 1
    send_late()
    kept.wait()
    assert torch.equal(echo.wait(), torch.arange(1 << 18))
    assert rpc.rpc_sync("w2", work.traced_alive) == work.traced_alive() == 1
    rpc.rpc_sync("w1", work.drop)
    assert rpc.rpc_sync("w2", work.wait_until_traced, (0,)) == work.wait_until_traced(0) == 0


@pytest.mark.shared_memory("a ring is full sooner than the room of a connection")
@in_job
def test_late_messages_that_find_a_full_ring_wait_for_room() -> None:
    pid = current_wiring().peers[1].pid
    with faults(delay={"PYTHON_CALL": 0.3}):
        futures = [rpc.rpc_async("w1", work.echo, (bytes([number]) * 3000,)) for number in range(60)]
    with stopped(pid):
        time.sleep(0.6)
        assert not current_wiring().agenda.is_empty()
    assert [future.wait() for future in futures] == [bytes([number]) * 3000 for number in range(60)]


# ---- what is sent again


@in_job
def test_control_messages_that_fail_are_sent_again_until_they_arrive() -> None:
    for to in ("w1", "w2"):
        rpc.rpc_sync(to, set_plan, (CONTROLS, {}, 1))
    with faults(CONTROLS) as plan:
        rref = rpc.remote("w1", work.Traced)
        rpc.rpc_sync("w2", work.keep, (rref,))
        wait_for(lambda: not current_wiring().peers[2].snapshot()["children"])  # w2 has asked w1, and told us
        assert rpc.rpc_sync("w2", counts)["failed"] == {"RREF_FORK_REQUEST": 1, "RREF_CHILD_ACCEPT": 1}
        del rref
        wait_for(lambda: plan.counts()["failed"] == {"RREF_USER_DELETE": 1})
        wait_for(lambda: current_wiring().agenda.is_empty())
        assert rpc.rpc_sync("w1", work.traced_alive) == 1
        rpc.rpc_sync("w2", work.drop)
        wait_for(lambda: rpc.rpc_sync("w1", work.traced_alive) == 0)
        deleted = rpc.rpc_sync("w2", counts)["failed"]
        assert deleted == {"RREF_FORK_REQUEST": 1, "RREF_CHILD_ACCEPT": 1, "RREF_USER_DELETE": 1}
    for to in ("w1", "w2"):
        rpc.rpc_sync(to, set_plan, ([], {}, 0))


@in_job
def test_late_control_messages_are_counted_until_they_are_sent() -> None:
    with faults(delay={"RREF_USER_DELETE": LATER_S}):
        rref = rpc.remote("w1", work.Traced)
        rref.to_here()
        del rref
        wait_for(lambda: rpc._rref_context_get_debug_info()["num_pending_futures"] == "1")
        assert current_wiring().is_busy()
        assert rpc.rpc_sync("w1", work.traced_alive) == 1
        send_late()
        assert rpc.rpc_sync("w1", work.wait_until_traced, (0,)) == 0
        assert rpc._rref_context_get_debug_info()["num_pending_futures"] == "0"


# ---- joining and leaving


@pytest.fixture
def name() -> str:
    """Return a local init method that no other test uses."""
    return f"local://faulty-{os.getpid()}-{time.monotonic_ns()}"


_ran: list[str] = []


def leave_with_late_messages(rank: int, init_method: str) -> None:
    options = FaultyTensorPipeRpcBackendOptions(
        init_method=init_method, messages_to_delay=dict.fromkeys(["PYTHON_REMOTE_CALL", *CONTROLS], 0.3)
    )
    rpc.init_rpc(f"w{rank}", rank=rank, world_size=2, rpc_backend_options=options)
    assert type(current_wiring()) is FaultyRuntime
    rpc.remote(f"w{1 - rank}", note_that_it_ran, timeout=1e-6)  # not the time to ask for entries
    rpc.shutdown(timeout=60)
    assert _ran == ["it ran"]


def note_that_it_ran() -> None:
    _ran.append("it ran")


def test_leaving_waits_for_what_comes_late(spawn_workers: Start, name: str) -> None:
    spawn_workers(leave_with_late_messages, [(rank, name) for rank in range(2)]).join()


def die_before_a_late_message(rank: int, init_method: str) -> None:
    options = FaultyTensorPipeRpcBackendOptions(init_method=init_method, messages_to_delay={"PYTHON_CALL": 1.0})
    fastref.init_rpc(f"w{rank}", rank=rank, world_size=2, rpc_backend_options=options)  # the options are enough
    if rank == 1:
        time.sleep(0.2)
        os._exit(0)
    late = rpc.rpc_async("w1", work.echo, (rpc.RRef(1),))
    with pytest.raises(WorkerDied):
        late.wait()
    wait_for(lambda: current_wiring().agenda.is_empty())
    rpc.shutdown(timeout=60)


def test_a_late_message_to_one_who_died_ends_with_its_call(spawn_workers: Start, name: str) -> None:
    spawn_workers(die_before_a_late_message, [(rank, name) for rank in range(2)]).join()
    puppets.sweep_up()  # what the dead left


def join_over_a_store(rank: int, path: str) -> None:
    store = torch.distributed.FileStore(path, 2)
    options = rpc.construct_rpc_backend_options(FAULTY, messages_to_fail=["SCRIPT_CALL"], num_fail_sends=1)
    agent = rpc.init_backend(FAULTY, store=store, name=f"w{rank}", rank=rank, world_size=2, rpc_backend_options=options)
    assert isinstance(agent, FaultyTensorPipeAgent)
    assert agent == rpc._get_current_rpc_agent()
    with pytest.raises(PeerError, match=INTENTIONAL.format("SCRIPT_CALL", f"w{1 - rank}")):
        rpc.rpc_sync(f"w{1 - rank}", torch.neg, (torch.ones(1),))
    rpc.shutdown(timeout=60)


def test_the_backend_starts_over_a_store_as_torchs_does(spawn_workers: Start, tmp_path: Any) -> None:
    spawn_workers(join_over_a_store, [(rank, str(tmp_path / "store")) for rank in range(2)]).join()


@pytest.mark.parametrize(
    ("backend", "options", "text"),
    [
        (rpc.BackendType.TENSORPIPE, FaultyTensorPipeRpcBackendOptions(), "must be a `TensorPipeRpcBackendOptions`"),
        (FAULTY, rpc.TensorPipeRpcBackendOptions(), "must be a `FaultyTensorPipeRpcBackendOptions`"),
        (FAULTY, rpc.RpcBackendOptions(), "must be a `FaultyTensorPipeRpcBackendOptions`"),
    ],
)
def test_options_of_another_backend_are_refused(backend: rpc.BackendType, options: Any, text: str) -> None:
    with pytest.raises(TypeError, match=text):
        rpc.init_rpc("w0", backend, 0, 1, options)
    with pytest.raises(TypeError, match="must be a"):
        rpc.init_backend(
            FAULTY, store=None, name="w0", rank=0, world_size=1, rpc_backend_options=rpc.RpcBackendOptions()
        )


def join_as_usual(rank: int, init_method: str) -> None:
    rpc.init_rpc(
        f"w{rank}", rank=rank, world_size=2, rpc_backend_options=rpc.RpcBackendOptions(init_method=init_method)
    )
    assert type(current_wiring()) is Runtime
    assert not isinstance(current_wiring(), FaultySender)
    assert "faults" not in debug.snapshot()
    rref = rpc.remote(f"w{1 - rank}", work.add, (1, 2))
    rref._get_future().wait()
    before = current_wiring().snapshot()["calls"]
    assert rref.to_here() == 3
    after = current_wiring().snapshot()["calls"]
    assert after["fetched_directly"] == before["fetched_directly"] + 1  # published, and no message
    rpc.shutdown(timeout=60)


@pytest.mark.shared_memory("published values are read there")
def test_jobs_with_other_options_know_nothing_of_it(spawn_workers: Start, name: str) -> None:
    spawn_workers(join_as_usual, [(rank, name) for rank in range(2)]).join()


AS_TORCH = """
import sys
from fastref import compat
compat.install()
import torch.distributed.rpc as rpc
import torch.distributed.rpc._testing as testing
from torch.distributed.rpc._testing import FaultyTensorPipeAgent, faulty_agent_backend_registry
import torch.distributed.rpc._testing.faulty_agent_backend_registry as registry
import fastref.rpc._testing
assert testing is fastref.rpc._testing and testing.is_available()
assert registry is faulty_agent_backend_registry
assert rpc.BackendType.FAULTY_TENSORPIPE.name == "FAULTY_TENSORPIPE"
"""


def test_programs_for_torch_find_it_under_torchs_name() -> None:
    run = subprocess.run([sys.executable, "-c", AS_TORCH], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    assert _testing.faulty_agent_backend_registry.__name__ == "fastref.rpc._testing.faulty_agent_backend_registry"
