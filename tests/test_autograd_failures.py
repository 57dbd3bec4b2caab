"""What ends a pass ends it on every worker, with the cause, and leaves nothing behind."""

from __future__ import annotations

import threading
import time
from typing import Any

import pytest
import torch

import fastref
import fastref.autograd as autograd
import fastref.rpc as rpc
from fastref.errors import BackwardError, WorkerDied
from fastref.rref import current_wiring
from tests import autograd_work as work
from tests import puppets
from tests.puppets import Puppet, Troupe, troupe_fixture  # noqa: F401

_contexts: list[Any] = []


def run_pass(names: list[str], last: Any, timeout: float = -1.0) -> None:
    """Run a pass through workers one behind the other, with ``last`` at the last."""
    with autograd.context() as context_id:
        a = torch.ones(2, requires_grad=True)
        value = a * 1
        for name in names[:-1]:
            value = rpc.rpc_sync(name, work.mul, (value, 2))
        value = rpc.rpc_sync(names[-1], last, (value,))
        for name in names[:-1]:
            value = rpc.rpc_sync(name, work.mul, (value, value))
        autograd.backward(context_id, [value.sum()], timeout=timeout)


def pass_error(*arguments: Any) -> tuple[type, str]:
    """Run a pass that fails and return of what class it is, and what it says."""
    try:
        run_pass(*arguments)
    except Exception as error:
        return type(error), str(error)
    raise AssertionError("the pass did not fail")


def check_nothing_is_left(crew: list[Puppet]) -> None:
    for puppet in crew:
        puppet.do(work.wait_until_none)


def test_an_error_in_a_backward_function_ends_the_pass_everywhere_and_names_the_worker(troupe: Troupe) -> None:
    crew = troupe.start(3)
    kind, text = crew[0].do(pass_error, ["w1", "w2"], work.broken)
    assert kind is BackwardError
    assert text == "Error on Node 2: a broken gradient"
    check_nothing_is_left(crew)
    kind, text = crew[1].do(pass_error, ["w0", "w2", "w1"], work.broken)
    assert text == "Error on Node 1: a broken gradient"
    check_nothing_is_left(crew)
    troupe.leave(crew)


def test_the_death_of_a_worker_that_takes_part_ends_the_pass_and_names_it(troupe: Troupe) -> None:
    crew = troupe.start(4)
    crew[0].order(pass_error, ["w1", "w2", "w3"], work.held)
    crew[3].do(work.wait_until_reached)
    crew[3].kill()
    kind, text = crew[0].outcome()
    assert issubclass(kind, WorkerDied)
    assert text.startswith("worker 'w3' (rank 3, pid ")
    check_nothing_is_left(crew[:3])


def test_when_the_worker_that_runs_a_pass_dies_the_others_let_go_of_it(troupe: Troupe) -> None:
    crew = troupe.start(3)
    crew[0].order(pass_error, ["w1", "w2"], work.held)
    crew[2].do(work.wait_until_reached)
    crew[0].kill()
    crew[1].do(work.wait_until_none)
    crew[2].do(work.let_go_on)
    check_nothing_is_left(crew[1:])
    assert crew[1].do(pass_error, ["w2"], work.broken)[0] is BackwardError


def test_a_timeout_ends_the_pass_everywhere(troupe: Troupe) -> None:
    crew = troupe.start(3)
    crew[0].order(pass_error, ["w1", "w2"], work.held, 0.5)
    crew[2].do(work.wait_until_reached)
    kind, text = crew[0].outcome()
    assert issubclass(kind, fastref.CallTimeout)
    assert "RPC ran for more than set timeout" in text
    crew[2].do(work.let_go_on)
    check_nothing_is_left(crew)
    troupe.leave(crew)


def release_while_it_runs() -> str:
    """Release a context in the middle of a pass of another thread."""
    a = torch.ones(2, requires_grad=True)
    context = autograd._new_context()
    value = rpc.rpc_sync("w1", work.held, (a,))
    rref = rpc.RRef(value.sum())
    future = rpc.rpc_async("w0", backward_of, (rref, context._context_id()))
    rpc.rpc_sync("w1", work.wait_until_reached)
    autograd._release_context(context._context_id())
    try:
        future.wait()
    except BackwardError as error:
        return str(error)
    finally:
        rpc.rpc_sync("w1", work.let_go_on)
    return "it did not fail"


def backward_of(rref: rpc.RRef, context_id: int) -> None:
    rref.backward(context_id)


def test_a_context_that_is_released_during_a_pass_ends_it(troupe: Troupe) -> None:
    crew = troupe.start(2)
    assert "was released during a backward pass" in crew[0].do(release_while_it_runs)
    check_nothing_is_left(crew)
    troupe.leave(crew)


def run_after_an_error(name: str) -> list[float]:
    """Run a pass, one that fails, and the first again, in one context."""
    a = torch.ones(2, requires_grad=True)
    with autograd.context() as context_id:
        good = rpc.rpc_sync(name, work.mul, (a, 3)).sum()
        bad = rpc.rpc_sync(name, work.broken, (a,)).sum()
        for _ in range(3):
            autograd.backward(context_id, [good], retain_graph=True)
            with pytest.raises(BackwardError):
                autograd.backward(context_id, [bad], retain_graph=True)
        found: list[float] = autograd.get_gradients(context_id)[a].tolist()
        return found


def test_a_context_goes_on_after_a_pass_that_failed(troupe: Troupe) -> None:
    crew = troupe.start(2)
    assert crew[0].do(run_after_an_error, "w1") == [9.0, 9.0]
    check_nothing_is_left(crew)
    troupe.leave(crew)


def keep_context(name: str) -> None:
    """Enter a context and leave it open."""
    _contexts.append(autograd.context())
    _contexts[-1].__enter__()
    rpc.rpc_sync(name, work.mul, (torch.ones(2, requires_grad=True), 2))


def test_contexts_of_a_worker_that_died_are_let_go_of(troupe: Troupe) -> None:
    crew = troupe.start(2)
    crew[0].do(keep_context, "w1")
    assert crew[1].do(work.counts)["num_autograd_contexts"] == 1
    crew[0].kill()
    crew[1].do(work.wait_until_none)


def test_a_worker_that_leaves_with_a_context_open_leaves_none_behind_in_its_next_job(troupe: Troupe) -> None:
    crew = troupe.start(2)
    crew[0].do(keep_context, "w1")
    troupe.leave(crew)
    troupe.join(crew, troupe.job + "-again")
    for puppet in crew:
        assert puppet.do(work.counts) == {"num_current_backward_passes": 0, "num_autograd_contexts": 0}
        assert not puppet.do(work.has_context)
    troupe.leave(crew)


def keep_tensor_of_another_context(name: str) -> str:
    """Have a worker use what came in one context in another, and run a pass through it."""
    a = torch.ones(2, requires_grad=True)
    with autograd.context():
        rpc.rpc_sync(name, keep_product, (a,))
    with autograd.context() as context_id:
        value = rpc.rpc_sync(name, use_product, (a,))
        try:
            autograd.backward(context_id, [value.sum()])
        except fastref.UsageError as error:
            return str(error)
        return "it did not fail"


def keep_product(value: torch.Tensor) -> None:
    _contexts.append(value * 2)


def use_product(value: torch.Tensor) -> torch.Tensor:
    return value * _contexts[-1]


def test_what_came_in_another_context_ends_a_pass_before_anything_is_run(troupe: Troupe) -> None:
    crew = troupe.start(2)
    assert "is used in a backward pass of context" in crew[0].do(keep_tensor_of_another_context, "w1")
    check_nothing_is_left(crew)
    troupe.leave(crew)


def run_passes_until_one_fails() -> tuple[type, str]:
    """Run passes of many branches, one after the other."""
    while True:
        try:
            with autograd.context() as context_id:
                a = torch.ones(2, requires_grad=True)
                value = a * 1
                for name in ("w1", "w2", "w3", "w2"):
                    value = rpc.rpc_sync(name, work.through, ("w1", work.mul, value, value)) + value
                autograd.backward(context_id, [value.sum()])
        except Exception as error:
            return type(error), str(error)


@pytest.mark.parametrize("delay_s", [0.005, 0.02, 0.05, 0.1])
def test_a_death_at_any_moment_ends_the_pass_and_leaves_nothing_behind(troupe: Troupe, delay_s: float) -> None:
    crew = troupe.start(4)
    crew[0].order(run_passes_until_one_fails)
    time.sleep(delay_s)
    crew[2].kill()
    kind, text = crew[0].outcome()
    assert issubclass(kind, WorkerDied), text
    assert "worker 'w2' (rank 2, pid " in text
    check_nothing_is_left([crew[0], crew[1], crew[3]])


def interrupted_call(is_meant: bool) -> float | str:
    """Interrupt a synchronous call of this thread from another one."""
    wiring, thread = current_wiring(), threading.get_ident()
    timer = threading.Timer(0.1, wiring.interrupt, (thread, BackwardError("enough"), lambda: is_meant))
    timer.start()
    try:
        value: float = rpc.rpc_sync("w1", puppets.sleep, (0.5,))
    except BackwardError as error:
        return str(error)
    finally:
        timer.join()
    return value


def test_a_synchronous_call_is_interrupted_only_while_it_is_the_one_that_is_meant(troupe: Troupe) -> None:
    crew = troupe.start(2)
    assert crew[0].do(interrupted_call, True) == "enough"
    assert crew[0].do(interrupted_call, False) == 0.5
    troupe.leave(crew)


@pytest.mark.parametrize("options", [{"strict": True}, {"transport": "tcp"}, {"table_bits": 1}], ids=str)
def test_passes_run_in_jobs_that_are(troupe: Troupe, options: dict[str, Any]) -> None:
    crew = troupe.start(3, **options)
    check_nothing_is_left(crew)  # and all have imported what is registered
    assert crew[0].do(run_of_registered) == [8.0, 48.0]
    check_nothing_is_left(crew)
    troupe.leave(crew)


def run_of_registered() -> list[float]:
    a = torch.tensor([1.0, 3.0], requires_grad=True)
    with autograd.context() as context_id:
        value = rpc.rpc_sync("w1", work.squared_at, ("w2", a))
        value = rpc.rpc_sync("w1", work.doubled, (value,))
        autograd.backward(context_id, [(value * torch.tensor([1.0, 2.0])).sum()])
        found: list[float] = autograd.get_gradients(context_id)[a].tolist()
        return found
