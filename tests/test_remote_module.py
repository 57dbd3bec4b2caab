"""Remote modules: made where they are to live, called from everywhere, kept and let go of as their references are."""

from __future__ import annotations

import copy
import gc
import io
import pickle
import re

import pytest
import torch
from torch import nn

import fastref.rpc as rpc
from fastref.errors import NotInitialized, UsageError
from fastref.nn import RemoteModule
from fastref.nn.place import parse_place
from fastref.nn.remote_module import _NOT_SUPPORTED, _RemoteModule
from tests import modules, work
from tests.jobs import in_job, job_fixtures

jobs, job = job_fixtures(3, [{}, {"transport": "tcp"}])

ONES = torch.ones(2)


# ---- where it lives


@pytest.mark.parametrize(
    ("text", "worker", "device"),
    [
        ("w1", "w1", "cpu"),
        ("w1/cpu", "w1", "cpu"),
        ("w1/cuda:0", "w1", "cuda:0"),
        ("rank:1", 1, "cpu"),
        ("rank:12/cuda:1", 12, "cuda:1"),
        ("cpu", None, "cpu"),
        ("cuda:0", None, "cuda:0"),
        ("train:w1/cpu", "train:w1", "cpu"),
        ("rank:one", "rank:one", "cpu"),
    ],
)
def test_a_place_is_a_worker_or_a_rank_and_a_device(text: str, worker: str | int | None, device: str) -> None:
    assert parse_place(text) == (worker, torch.device(device))


@pytest.mark.parametrize("text", ["", "/", "/cuda:0", "w1/cuda:0/cuda:1"])
def test_a_place_of_another_form_is_refused_as_torch_does(text: str) -> None:
    expected = f"Could not parse remote_device: {text}. The valid format is '<workername>/<device>'"
    with pytest.raises(ValueError, match=re.escape(expected)):
        parse_place(text)


@pytest.mark.parametrize(("text", "says"), [("w1/", "must not be empty"), ("w1/abc", "device type at start")])
def test_a_device_that_there_is_not_is_refused(text: str, says: str) -> None:
    with pytest.raises(RuntimeError, match=says):
        parse_place(text)


def test_a_place_that_is_no_string_is_refused() -> None:
    with pytest.raises(TypeError, match="Invalid type for remote_device"):
        parse_place(3)  # type: ignore[arg-type]


def test_without_a_job_there_is_no_remote_module() -> None:
    with pytest.raises(NotInitialized, match="RemoteModule only works in RPC"):
        RemoteModule("w1", modules.Affine)


@in_job
def test_it_lives_where_it_was_said() -> None:
    for place, owner in (("w1/cpu", "w1"), ("w2", "w2"), ("rank:1/cpu", "w1"), ("rank:2", "w2"), ("cpu", "w0")):
        remote = RemoteModule(place, modules.Affine)
        assert remote.get_module_rref() is remote.module_rref
        assert remote.get_module_rref().owner_name() == owner
        assert repr(remote) == f"RemoteModule({owner}/cpu)"
        assert remote(ONES).tolist() == [3.0, 3.0]


@in_job
def test_a_worker_that_there_is_not_is_named() -> None:
    with pytest.raises(RuntimeError, match="w7"):
        RemoteModule("w7/cpu", modules.Affine)


# ---- how it is made and called


@in_job
def test_it_is_made_with_arguments_and_called_with_arguments() -> None:
    remote = RemoteModule("w1", modules.Affine, (3.0,), {"bias": 5.0})
    assert remote.forward(ONES).tolist() == [8.0, 8.0]
    assert remote.forward(ONES, times=2).tolist() == [29.0, 29.0]
    assert remote.forward_async(ONES, times=2).wait().tolist() == [29.0, 29.0]
    assert remote(ONES, times=2).tolist() == [29.0, 29.0]
    assert nn.Sequential(nn.Identity(), remote)(ONES).tolist() == [8.0, 8.0]


@in_job
def test_calls_overlap_its_construction() -> None:
    remote = RemoteModule("w1", modules.Slow, (0.3,))
    futures = [remote.forward_async(torch.tensor(float(number))) for number in range(5)]
    assert [future.wait().item() for future in futures] == [1.0, 3.0, 5.0, 7.0, 9.0]


@in_job
def test_hooks_of_the_module_run() -> None:
    assert RemoteModule("w1", modules.Hooked)(ONES).tolist() == [-3.0, -3.0]


@in_job
def test_what_its_constructor_raises_comes_with_the_first_use() -> None:
    remote = RemoteModule("w1", modules.Failing)
    for use in (lambda: remote(ONES), remote.remote_parameters, remote.train, remote.remote_state_dict):
        with pytest.raises(LookupError, match="no such module"):
            use()


@in_job
def test_what_is_no_module_is_refused_with_torchs_text() -> None:
    says = (
        r"Expect `module_cls\(\*args, \*\*kwargs\)` returns an instance of <class nn.Module>, but it returns .*Counter"
    )
    with pytest.raises(ValueError, match=says):
        RemoteModule("w1", work.Counter).forward()


@in_job
def test_an_error_in_forward_is_the_callers() -> None:
    remote = RemoteModule("w1", nn.Linear, (2, 3))
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        remote(torch.ones(1, 5))


@in_job
def test_a_script_module_may_be_a_remote_one() -> None:
    remote = RemoteModule("w1", torch.jit.script, (nn.Linear(2, 3),))
    assert remote(torch.ones(1, 2)).shape == (1, 3)


@in_job
def test_an_interface_for_torchscript_is_refused() -> None:
    with pytest.raises(UsageError, match="leave out _module_interface_cls"):
        _RemoteModule("w1", modules.Affine, _module_interface_cls=object)


@in_job
def test_tensors_move_to_its_device_and_back_wherever_they_are() -> None:
    # "meta" stands for a device that values cannot be moved back from.
    remote = RemoteModule("w1/meta", modules.Nested)
    with pytest.raises(NotImplementedError, match="Cannot copy out of meta tensor"):
        remote({"tensors": [ONES]})
    # The same way, to a device from which they can.
    assert rpc.rpc_sync("w1", moved_there_and_back, (remote.module_rref,)) == "meta"


def moved_there_and_back(module_rref: rpc.RRef) -> str:
    from fastref.nn.remote_module import _forward_on_device, _moved

    values = {"tensors": [ONES, (ONES, 3)], "named": torch.return_types.max((ONES, ONES)), "word": "x"}
    (there,), back = _forward_on_device(module_rref, torch.device("meta"), True, (values,), {})
    assert back["tensors"][0].is_meta and back["tensors"][1][0].is_meta and back["tensors"][1][1] == 3
    assert back["word"] == "x"
    assert _moved(values, torch.device("cpu"))["tensors"][1][0] is ONES
    return there


# ---- parameters and state


@in_job
def test_references_to_its_parameters_are_to_those_that_it_uses() -> None:
    remote = RemoteModule("w1", nn.Sequential, (nn.Linear(1, 1), nn.Linear(1, 1)))
    parameters = remote.remote_parameters()
    assert [rref.owner_name() for rref in parameters] == ["w1"] * 4
    assert all(isinstance(rref.to_here(), nn.Parameter) for rref in parameters)
    assert remote.remote_parameters(recurse=False) == []
    before = rpc.rpc_sync("w1", modules.total, (parameters,))
    remote.load_remote_state_dict({name: value + 1 for name, value in remote.remote_state_dict().items()})
    assert rpc.rpc_sync("w1", modules.total, (parameters,)) == pytest.approx(before + 4)


@in_job
def test_its_state_goes_out_and_in() -> None:
    remote, other = RemoteModule("w1", modules.Affine, (7.0,)), RemoteModule("w2", modules.Affine)
    remote(ONES)
    state = remote.remote_state_dict()
    assert {name: value.item() for name, value in state.items()} == {"weight": 7.0, "bias": 1.0, "calls": 1}
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    assert other.load_remote_state_dict(torch.load(file)).missing_keys == []
    assert other(ONES).tolist() == [8.0, 8.0]
    local = modules.Affine()
    local.load_state_dict(state)
    assert local(ONES).tolist() == [8.0, 8.0]
    state["weight"].fill_(0.0)  # a copy
    assert remote(ONES).tolist() == [8.0, 8.0]


@in_job
def test_a_state_that_does_not_fit_is_refused() -> None:
    remote = RemoteModule("w1", modules.Affine)
    with pytest.raises(RuntimeError, match='Missing key.*"bias"'):
        remote.load_remote_state_dict({"weight": torch.tensor(1.0)})
    keys = remote.load_remote_state_dict({"weight": torch.tensor(4.0), "more": ONES}, strict=False)
    assert (keys.missing_keys, keys.unexpected_keys) == (["bias", "calls"], ["more"])
    assert remote(ONES).tolist() == [5.0, 5.0]


@in_job
def test_training_and_evaluation_do_not_send_the_module() -> None:
    remote = RemoteModule("w1", modules.Unsendable)
    for change, expected in (
        (remote.eval, False),
        (remote.train, True),
        (lambda: remote.train(False), False),
        (lambda: nn.Sequential(remote).train(), True),
        (lambda: nn.Sequential(remote).eval(), False),
    ):
        change()
        assert rpc.rpc_sync("w1", modules.is_training, (remote.module_rref,)) is expected
        assert remote.training is expected
    assert remote.train() is remote and remote.eval() is remote
    with pytest.raises(ValueError, match="training mode is expected to be boolean"):
        remote.train("yes")  # type: ignore[arg-type]


@in_job
def test_methods_that_would_be_about_an_empty_module_here_are_refused() -> None:
    remote = RemoteModule("w1", modules.Affine)
    assert {"parameters", "state_dict", "to", "zero_grad", "extra_repr"} <= _NOT_SUPPORTED.keys()
    for name, instead in _NOT_SUPPORTED.items():
        assert hasattr(nn.Module, name), name
        with pytest.raises(ValueError, match=f"^Method ``{name}`` not supported for RemoteModule") as refused:
            getattr(remote, name)()
        assert not instead or f"Please use ``{instead}`` instead." in str(refused.value)
        assert not instead or hasattr(remote, instead)


# ---- sent to others


@in_job
def test_it_can_be_sent_and_called_there() -> None:
    remote = RemoteModule("w1", modules.Affine, (4.0,))
    assert rpc.rpc_sync("w2", modules.call, (remote, ONES), {"times": 2}).tolist() == [21.0, 21.0]
    assert rpc.rpc_sync("w1", modules.call, (remote, ONES)).tolist() == [5.0, 5.0]
    attributes = rpc.rpc_sync("w2", modules.attributes_of, (remote,))
    assert attributes["on"] == "w1" and attributes["module_rref"].owner_name() == "w1"
    back = rpc.rpc_sync("w2", work.echo, (remote,))
    assert isinstance(back, RemoteModule) and back is not remote
    assert back.remote_state_dict()["weight"].item() == 4.0
    assert back.eval() is back and back(ONES).tolist() == [5.0, 5.0]


@in_job
def test_what_was_hung_onto_it_stays_behind_with_a_warning() -> None:
    remote = RemoteModule("w1", modules.Affine)
    remote.note = "mine"
    with pytest.warns(UserWarning, match="'note' of a RemoteModule does not travel"):
        attributes = rpc.rpc_sync("w2", modules.attributes_of, (remote,))
    assert "note" not in attributes


@in_job
def test_outside_of_calls_it_cannot_be_pickled_or_copied() -> None:
    remote = RemoteModule("w1", modules.Affine)
    for use in (pickle.dumps, copy.copy, copy.deepcopy, lambda module: torch.save(module, io.BytesIO())):
        with pytest.raises(RuntimeError, match="RemoteModule can only be pickled when using RPC"):
            use(remote)


@in_job
def test_several_remote_modules_share_a_module_by_its_reference() -> None:
    first = RemoteModule("w1", modules.Affine)
    second = RemoteModule.init_from_module_rref("w1/cpu", first.get_module_rref())
    third = rpc.rpc_sync("w2", RemoteModule.init_from_module_rref, ("w1", first.get_module_rref()))
    for remote in (first, second, third):
        remote(ONES)
    assert first.remote_state_dict()["calls"].item() == 3
    second.load_remote_state_dict({"weight": torch.tensor(9.0)}, strict=False)
    assert third(ONES).tolist() == [10.0, 10.0]
    assert [len(remote.remote_parameters()) for remote in (second, third)] == [2, 2]


@in_job
def test_the_module_goes_with_the_last_remote_module_without_a_collector() -> None:
    gc.disable()
    try:
        remote = RemoteModule("w1", modules.Traced)
        assert rpc.rpc_sync("w2", modules.call, (remote, 5)) == 5
        assert rpc.rpc_sync("w1", work.traced_alive) == 1
        del remote
        assert rpc.rpc_sync("w1", work.wait_until_traced, (0,)) == 0
    finally:
        gc.enable()
