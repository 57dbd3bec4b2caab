"""Programs made at random: over several workers they have the gradients that they have in one process."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch

import fastref.autograd as autograd
import fastref.rpc as rpc
from tests import autograd_work as work
from tests.jobs import in_job, job_fixtures

jobs, job = job_fixtures(4)

NAMES = ["w0", "w1", "w2", "w3"]
LABELS = ["p", "q"]

Plan = list[tuple[Any, ...]]


def plan_of(seed: int, workers: int) -> Plan:
    """Make a program: each step names a worker, what is done there, and values made by steps before it.

    Values are few whole numbers in 64 bits: sums of them are the same in every order.
    """
    chosen = random.Random(seed)
    steps: Plan = []
    for number in range(chosen.randint(3, 16)):
        worker = chosen.randrange(workers)
        kind = chosen.choice(("add", "signed", "kept", "nested", "fork", "remote"))
        a, b = (chosen.randrange(-3, number) for _ in range(2))
        steps.append((kind, worker, chosen.randrange(workers), a, b, chosen.choice(LABELS)))
    return steps


def leaves_of(seed: int, count: int) -> list[torch.Tensor]:
    torch.manual_seed(seed)
    return [torch.randint(-2, 3, (3,), dtype=torch.float64).requires_grad_() for _ in range(count)]


def signed(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return a * b.sign().detach()


def kept_plus(label: str, a: torch.Tensor) -> torch.Tensor:
    return work.kept(label).sum() + a * work.kept(label).sign().detach()


def nested(to: str, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return rpc.rpc_sync(to, signed, (a, b)) + a


def fork(to: str, a: torch.Tensor, b: torch.Tensor) -> list[torch.Tensor]:
    first = rpc.rpc_async(to, work.add, (a, b))
    here = a - b
    return [first.wait() + here, here]


def step_there(step: tuple[Any, ...], a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Do a step where it says."""
    kind, worker, other, _, _, label = step
    to = NAMES[worker]
    if kind == "add":
        return rpc.rpc_sync(to, work.add, (a, b))
    if kind == "signed":
        return rpc.rpc_async(to, signed, (a, b)).wait()
    if kind == "kept":
        return rpc.rpc_sync(to, kept_plus, (label, a))
    if kind == "nested":
        return rpc.rpc_sync(to, nested, (NAMES[other], a, b))
    if kind == "fork":
        return rpc.rpc_sync(to, fork, (NAMES[other], a, b))[0]
    rref = rpc.remote(to, work.add, (a, b))
    return rpc.rpc_sync(NAMES[other], work.of_reference, (rref, b.sign().detach()))


def step_here(step: tuple[Any, ...], a: torch.Tensor, b: torch.Tensor, kept: dict[Any, torch.Tensor]) -> torch.Tensor:
    """Do the same in this process."""
    kind, worker, _, _, _, label = step
    if kind == "add":
        return a + b
    if kind == "signed":
        return signed(a, b)
    if kind == "kept":
        parameter = kept[worker, label]
        return parameter.sum() + a * parameter.sign().detach()
    if kind == "nested":
        return signed(a, b) + a
    if kind == "fork":
        return (a + b) + (a - b)
    return (a + b) * b.sign().detach()


def run_plan(plan: Plan, leaves: list[torch.Tensor], do: Any) -> torch.Tensor:
    values = list(leaves)  # a step's number counts from behind them
    for step in plan:
        values.append(do(step, values[step[3] + 3], values[step[4] + 3]))
    return sum(value.sum() for value in values[-2:])


@in_job
@pytest.mark.parametrize("workers", [2, 3, 4])
@pytest.mark.parametrize("part", range(3))
def test_gradients_of_a_program_over_workers_are_those_of_one_process(workers: int, part: int) -> None:
    for seed in range(part * 1000, part * 1000 + 25):
        leaves = leaves_of(seed, 3)
        kept = {}
        for worker in range(workers):
            for label in LABELS:
                (kept[worker, label],) = leaves_of(seed * 100 + worker * 10 + len(kept), 1)
                rpc.rpc_sync(NAMES[worker], work.parameter, (label, kept[worker, label].tolist()))
        plan = plan_of(seed, workers)
        loss = run_plan(plan, leaves, lambda step, a, b, kept=kept: step_here(step, a, b, kept))
        everything = [*leaves, *kept.values()]
        expected = torch.autograd.grad(loss, everything, allow_unused=True)
        with autograd.context() as context_id:
            far = run_plan(plan, leaves, step_there)
            assert torch.equal(far, loss)
            autograd.backward(context_id, [far])
            found = autograd.get_gradients(context_id)
            mine = [found.get(one) for one in leaves]
            theirs = [
                rpc.rpc_sync(NAMES[worker], work.gradient, (context_id, label)) for worker, label in kept
            ]  # fmt: skip
        for got, want in zip([*mine, *theirs], expected, strict=True):
            assert (got is None) == (want is None), (seed, plan)
            assert want is None or torch.equal(got, want), (seed, plan)
    work.wait_everywhere(*NAMES[1:])
    for name in NAMES:
        rpc.rpc_sync(name, work.forget)


@in_job
def test_a_chain_over_workers_has_the_gradients_of_one_process_to_the_last_bit() -> None:
    torch.manual_seed(0)
    first, second = torch.rand(64, 64), torch.rand(64, 64)
    x = torch.rand(8, 64, requires_grad=True)
    here = ((x @ first).tanh() @ second).sigmoid().sum()
    (expected,) = torch.autograd.grad(here, x)
    with autograd.context() as context_id:
        hidden = rpc.rpc_sync("w1", layer, (x, first))
        far = rpc.rpc_sync("w2", last_layer, (hidden, second))
        assert torch.equal(far, here)
        autograd.backward(context_id, [far])
        assert torch.equal(autograd.get_gradients(context_id)[x], expected)


def layer(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return (x @ weight).tanh()


def last_layer(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return (x @ weight).sigmoid().sum()
