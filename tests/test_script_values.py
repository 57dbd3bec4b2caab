"""TorchScript functions as targets, and modules: sent as they are, or held in references under their interface."""

from __future__ import annotations

import pytest
import torch

import fastref.rpc as rpc
from fastref.errors import UsageError
from tests import work
from tests.jobs import in_job, job_fixtures

jobs, job = job_fixtures(3, [{}, {"table_bits": 0}])


@torch.jit.interface
class Forward(torch.nn.Module):
    def forward(self, value: torch.Tensor) -> torch.Tensor:  # type: ignore[empty-body]
        pass


@torch.jit.interface
class Backward(torch.nn.Module):
    def backward(self, value: torch.Tensor) -> torch.Tensor:  # type: ignore[empty-body]
        pass


class Scale(torch.nn.Module):
    def __init__(self, by: float) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.tensor(by))

    def forward(self, value: torch.Tensor) -> torch.Tensor:
        return value * self.weight


@torch.jit.script
def twice(value: torch.Tensor) -> torch.Tensor:
    return value + value


def scripted(by: float) -> torch.jit.ScriptModule:
    module: torch.jit.ScriptModule = torch.jit.script(Scale(by))
    return module


def held(by: float) -> rpc.RRef:
    return rpc.RRef(scripted(by), Forward)


def fetch(rref: rpc.RRef) -> None:
    rref.to_here()


def applied(module: torch.nn.Module, value: torch.Tensor) -> torch.Tensor:
    return module(value).detach()


@in_job
def test_a_script_function_is_called_by_its_name() -> None:
    value = torch.tensor([1.0, 2.0])
    assert torch.equal(rpc.rpc_sync("w1", twice, args=(value,)), value * 2)
    assert torch.equal(rpc.rpc_async("w1", twice, args=(value,)).wait(), value * 2)
    assert torch.equal(rpc.remote("w1", twice, args=(value,)).to_here(), value * 2)


@in_job
def test_a_script_module_travels_with_its_parameters() -> None:
    value = torch.tensor([1.0, 2.0])
    assert torch.equal(rpc.rpc_sync("w1", applied, args=(scripted(3.0), value)), value * 3)
    module = rpc.rpc_sync("w1", scripted, args=(4.0,))
    assert isinstance(module, torch.jit.ScriptModule)
    assert torch.equal(module(value).detach(), value * 4)


@in_job
def test_a_script_module_in_a_reference_is_used_where_it_is() -> None:
    value = torch.tensor([1.0, 2.0])
    rref = rpc.rpc_sync("w1", held, args=(5.0,))
    fork = rref._serialize()
    assert fork[6].endswith("Forward")
    assert rpc.PyRRef._deserialize(fork).owner_name() == "w1"
    assert torch.equal(rref.rpc_sync().forward(value).detach(), value * 5)
    assert rref._get_type() is torch.jit.RecursiveScriptModule
    assert isinstance(rpc.rpc_sync("w1", work.value_of, args=(rref,)), torch.jit.ScriptModule)


@in_job
def test_a_script_module_in_a_reference_cannot_be_fetched() -> None:
    rref = rpc.rpc_sync("w1", held, args=(5.0,))
    message = (
        r"^UserRRef\(.*\) is an RRef to a ScriptModule. It can't be sent through RPC from owner, .*w1\), to user, .*w0"
    )
    with pytest.raises(UsageError, match=message):
        rref.to_here()
    with pytest.raises(UsageError, match=r"from owner, .*w1\), to user, .*w2\)"):
        rpc.rpc_sync("w2", fetch, args=(rref,))  # the interface travels with the reference
    own = held(6.0)
    assert torch.equal(own.to_here()(torch.tensor(2.0)), torch.tensor(12.0))


@in_job
def test_a_hint_must_be_an_interface_that_the_module_has() -> None:
    with pytest.raises(UsageError, match="contains a ScriptModule, must provide its ModuleInterface type hint"):
        rpc.RRef(scripted(1.0))
    with pytest.raises(
        UsageError, match="is not a subtype of the type hint: .*Backward, did you pass a valid interface"
    ):
        rpc.RRef(scripted(1.0), Backward)
    with pytest.raises(UsageError, match="is not a subtype of the type hint"):
        rpc.RRef(scripted(1.0), Scale)
    with pytest.raises(UsageError, match="type_hint should only be specified when the RRef being created contains a"):
        rpc.RRef(1, int)


@rpc.functions.async_execution
@torch.jit.script
def twice_without_a_future(value: torch.Tensor) -> torch.Tensor:
    return value + value


@in_job
def test_a_script_function_that_should_answer_later_and_has_no_future_is_told_as_torch_does() -> None:
    for call in (rpc.rpc_sync, lambda *what: rpc.rpc_async(*what).wait(), lambda *what: rpc.remote(*what).to_here()):
        with pytest.raises(RuntimeError, match="Async functions must return an IValue of Future type, but got Tensor"):
            call("w1", twice_without_a_future, (torch.ones(1),))
