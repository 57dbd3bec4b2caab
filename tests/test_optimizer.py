"""One optimizer for parameters of many workers: it steps as one of torch's does, wherever the parameters are."""

from __future__ import annotations

import io
import threading
from typing import Any

import pytest
import torch
from torch import Tensor

import fastref.autograd as autograd
import fastref.rpc as rpc
from fastref.nn import RemoteModule
from fastref.optim import DistributedOptimizer
from fastref.optim.turns import Turns
from tests import optimizing
from tests.jobs import in_job, job_fixtures
from tests.optimizing import Point

jobs, job = job_fixtures(3, [{}, {"transport": "tcp"}])

POINTS = {"w1": (0.5, -1.5), "w2": (2.0, 0.25), "w0": (-0.75, 1.0)}
X = torch.tensor([1.5, -0.5], dtype=torch.float64)

CLASSES: dict[str, tuple[Any, dict[str, Any]]] = {
    "sgd": (torch.optim.SGD, {"lr": 0.1, "momentum": 0.9, "nesterov": True}),
    "adam": (torch.optim.Adam, {"lr": 0.05, "amsgrad": True}),
    "adagrad": (torch.optim.Adagrad, {"lr": 0.1}),
    "rprop": (torch.optim.Rprop, {"lr": 0.1}),
    "rmsprop": (torch.optim.RMSprop, {"lr": 0.05, "centered": True}),
    "groups of its own": (optimizing.by_value, {"lr": 0.1}),
}
classes = pytest.mark.parametrize("name", CLASSES)


class Training:
    """The same modules twice: on workers, and here."""

    def __init__(self, name: str = "sgd", owners: tuple[str, ...] = ("w1", "w2", "w0")) -> None:
        optimizer_class, kwargs = CLASSES[name]
        self.remote = [RemoteModule(owner, Point, POINTS[key]) for owner, key in zip(owners, POINTS, strict=True)]
        self.local = [Point(*values) for values in POINTS.values()]
        self.rrefs = [rref for module in self.remote for rref in module.remote_parameters()]
        self.parameters = [parameter for module in self.local for parameter in module.parameters()]
        self.optimizer = DistributedOptimizer(optimizer_class, self.rrefs, **kwargs)
        self.local_optimizer = optimizer_class(self.parameters, **kwargs)

    def step_remote(self, both: bool = True) -> None:
        with autograd.context() as context_id:
            autograd.backward(context_id, [loss_of(self.remote, both)])
            self.optimizer.step(context_id)

    def step_local(self, both: bool = True) -> None:
        self.local_optimizer.zero_grad()
        loss_of(self.local, both).backward()
        self.local_optimizer.step()

    def values(self) -> list[Tensor]:
        return [rpc.rpc_sync(rref.owner(), optimizing.value_of, (rref,)) for rref in self.rrefs]

    def check(self) -> None:
        for found, expected in zip(self.values(), self.parameters, strict=True):
            assert torch.equal(found, expected)


def loss_of(modules: list[Any], both: bool) -> Tensor:
    x = X
    for module in modules:
        x = module(x, both)
    return x.square().sum()


# ---- steps


@classes
@in_job
def test_it_steps_as_the_same_optimizer_does_in_one_process(name: str) -> None:
    training = Training(name)
    for _ in range(4):
        training.step_remote()
        training.step_local()
        training.check()


@in_job
def test_each_owner_has_one_optimizer() -> None:
    training = Training(owners=("w1", "w2", "w1"))
    assert [rref.owner_name() for rref in training.optimizer.remote_optimizers] == ["w1", "w2"]
    assert training.optimizer.is_functional_optim is False


@in_job
def test_parameters_without_a_gradient_in_the_context_stay_as_they_are() -> None:
    training = Training()
    other = training.rrefs[1]
    rpc.rpc_sync(other.owner(), optimizing.set_grad, (other, torch.full((2,), 5.0, dtype=torch.float64)))
    before = training.values()
    training.step_remote(both=False)
    training.step_local(both=False)
    training.check()
    after = training.values()
    assert all(torch.equal(before[i], after[i]) == (i % 2 == 1) for i in range(6))


@in_job
def test_the_grad_of_a_parameter_is_left_as_it_was() -> None:
    training = Training()
    first, other = training.rrefs[:2]
    rpc.rpc_sync("w1", optimizing.set_grad, (other, torch.full((2,), 5.0, dtype=torch.float64)))
    training.step_remote()
    assert rpc.rpc_sync("w1", optimizing.grad_of, (first,)) is None
    assert rpc.rpc_sync("w1", optimizing.grad_of, (other,)).tolist() == [5.0, 5.0]
    training.step_local()
    training.check()


@in_job
def test_several_passes_of_one_context_are_one_step_with_their_sum() -> None:
    training = Training()
    with autograd.context() as context_id:
        autograd.backward(context_id, [loss_of(training.remote, True)])
        autograd.backward(context_id, [loss_of(training.remote, False)])
        training.optimizer.step(context_id)
    loss_of(training.local, True).backward()
    loss_of(training.local, False).backward()
    training.local_optimizer.step()
    training.check()


@in_job
def test_owners_step_at_the_same_time() -> None:
    modules = [RemoteModule(owner, Point, POINTS[owner]) for owner in ("w1", "w2")]
    rrefs = [rref for module in modules for rref in module.remote_parameters()]
    optimizer = DistributedOptimizer(optimizing.Meeting, rrefs, {"w1": "w2", "w2": "w1"})
    with autograd.context() as context_id:
        autograd.backward(context_id, [loss_of(modules, True)])
        optimizer.step(context_id)


@in_job
def test_steps_of_several_clients_with_one_parameter_take_turns() -> None:
    parameter = RemoteModule("w1", Point, POINTS["w1"]).remote_parameters()[0]
    futures = [rpc.rpc_async(worker, step_often, (parameter,)) for worker in ("w0", "w1", "w2", "w2")]
    for future in futures:
        future.wait()


def step_often(parameter: rpc.RRef) -> None:
    optimizer = DistributedOptimizer(optimizing.Alone, [parameter], lr=1.0)
    for _ in range(20):
        with autograd.context() as context_id:
            autograd.backward(context_id, [parameter.to_here().sum()])
            optimizer.step(context_id)


def test_turns_with_objects_in_common_follow_each_other_and_others_do_not_wait() -> None:
    turns, one, two, three = Turns(), object(), object(), object()
    began, ended = threading.Event(), threading.Event()

    def second() -> None:
        with turns.take([two, three]):
            began.set()
        ended.set()

    with turns.take([one, two]):
        thread = threading.Thread(target=second)
        thread.start()
        with turns.take([three]):
            pass
        assert not began.wait(0.05)
    assert ended.wait(30.0)
    thread.join()
    with pytest.raises(LookupError), turns.take([one]):
        raise LookupError
    with turns.take([one]):
        pass


# ---- errors


@in_job
def test_an_error_of_a_constructor_names_its_worker() -> None:
    rrefs = [RemoteModule(owner, Point, (1.0,) * size).remote_parameters()[0] for owner, size in (("w1", 1), ("w2", 3))]
    with pytest.raises(LookupError, match=r"(?s)w2.*three values are too many"):
        DistributedOptimizer(optimizing.Refusing, rrefs, lr=0.1)


@in_job
def test_an_error_of_a_step_names_its_worker_and_the_others_have_stepped() -> None:
    modules = [RemoteModule(owner, Point, (1.0,) * size) for owner, size in (("w1", 2), ("w2", 1), ("w0", 2))]
    rrefs = [module.remote_parameters()[0] for module in modules]
    optimizer = DistributedOptimizer(optimizing.Refusing, rrefs, lr=0.1)
    with autograd.context() as context_id:
        autograd.backward(context_id, [rref.to_here().sum() for rref in rrefs])
        with pytest.raises(ArithmeticError, match=r"(?s)w1.*two values are too many") as caught:
            optimizer.step(context_id)
    (note,) = caught.value.__notes__
    assert "w0" in note and "two values are too many" in note
    assert [rref.to_here().tolist() for rref in rrefs] == [[1.0, 1.0], [0.9], [1.0, 1.0]]


@in_job
def test_a_step_without_its_context_is_refused() -> None:
    training = Training()
    with autograd.context() as context_id:
        pass
    with pytest.raises(RuntimeError, match=str(context_id)):
        training.optimizer.step(context_id)


# ---- state


@classes
@in_job
def test_training_goes_on_from_a_saved_state_wherever_the_parameters_are(name: str) -> None:
    first = Training(name)
    for _ in range(3):
        first.step_remote()
    file = io.BytesIO()
    state = [module.remote_state_dict() for module in first.remote]
    torch.save((state, first.optimizer.state_dict()), file)
    for _ in range(2):
        first.step_remote()

    file.seek(0)
    state, optimizer_state = torch.load(file)
    second = Training(name, owners=("w2", "w0", "w2"))
    for module, saved in zip(second.remote, state, strict=True):
        module.load_remote_state_dict(saved)
    second.optimizer.load_state_dict(optimizer_state)
    for _ in range(2):
        second.step_remote()
    for found, expected in zip(second.values(), first.values(), strict=True):
        assert torch.equal(found, expected)


@pytest.mark.parametrize("name", ["sgd", "adam"])
@in_job
def test_states_are_exchanged_with_torchs_own_optimizers(name: str) -> None:
    training = Training(name)
    for _ in range(3):
        training.step_remote()
        training.step_local()
    there, here = training.optimizer.state_dict(), training.local_optimizer.state_dict()
    assert there["state"].keys() == here["state"].keys()
    training.optimizer.load_state_dict(here)
    # torch wants as many groups as there are here, one, and all of them are alike.
    there["param_groups"] = [{**there["param_groups"][0], "params": list(range(6))}]
    training.local_optimizer.load_state_dict(there)
    for _ in range(2):
        training.step_remote()
        training.step_local()
    training.check()


@in_job
def test_settings_of_a_loaded_state_count() -> None:
    training = Training()
    training.step_remote()
    state = training.optimizer.state_dict()
    for group in state["param_groups"]:
        group["lr"] = 0.0
    training.optimizer.load_state_dict(state)
    before = training.values()
    training.step_remote()
    assert all(torch.equal(a, b) for a, b in zip(before, training.values(), strict=True))


@in_job
def test_a_state_is_a_copy() -> None:
    training = Training()
    training.step_remote()
    training.step_local()
    for value in training.optimizer.state_dict()["state"].values():
        value["momentum_buffer"].fill_(1e6)
    training.step_remote()
    training.step_local()
    training.check()


@in_job
def test_a_state_that_does_not_fit_is_refused() -> None:
    training = Training()
    training.step_remote()
    state = training.optimizer.state_dict()
    fewer = {**state, "param_groups": state["param_groups"][:1]}
    with pytest.raises(ValueError, match="a state of 2 parameters does not fit an optimizer of 6"):
        training.optimizer.load_state_dict(fewer)
    state["param_groups"][0]["lr"] = 0.5
    two = Training(owners=("w1", "w1", "w1"))
    with pytest.raises(ValueError, match=r"(?s)w1.*had different settings: lr was 0.5 and 0.1"):
        two.optimizer.load_state_dict(state)
