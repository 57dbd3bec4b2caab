"""Picklers of programs, and references that programs hand over as torch's fork data."""

from __future__ import annotations

import contextlib
import io
import pickle
from collections.abc import Iterator
from typing import Any

import pytest
import torch

import fastref.rpc as rpc
from fastref.errors import UsageError
from fastref.rpc.functions import async_execution
from fastref.rpc.internal import _internal_rpc_pickler, _InternalRPCPickler, deserialize, serialize
from tests import work
from tests.jobs import in_job, job_fixtures

jobs, job = job_fixtures(3, [{}, {"table_bits": 0}])


class Marking(_InternalRPCPickler):
    """Writes a mark before all that it pickles, and reads nothing without it."""

    MARK = b"marked: "

    def __init__(self) -> None:
        self.written = self.read = 0

    def serialize(self, obj: Any) -> tuple[bytes, list[torch.Tensor]]:
        data, tensors = super().serialize(obj)
        self.written += 1
        return self.MARK + data, tensors

    def deserialize(self, binary_data: bytes, tensor_table: list[torch.Tensor]) -> Any:
        assert binary_data.startswith(self.MARK)
        self.read += 1
        return super().deserialize(binary_data.removeprefix(self.MARK), tensor_table)


class Forking(_InternalRPCPickler):
    """Pickles in its own way, with the reducer for references that torch gives to picklers."""

    def serialize(self, obj: Any) -> tuple[bytes, list[torch.Tensor]]:
        file = io.BytesIO()
        pickler = pickle.Pickler(file)
        pickler.dispatch_table = {rpc.RRef: self._rref_reducer, rpc.PyRRef: self._rref_reducer}
        pickler.dump(obj)
        return file.getvalue(), []

    def deserialize(self, binary_data: bytes, tensor_table: list[torch.Tensor]) -> Any:
        return pickle.loads(binary_data)


def get(rref: rpc.RRef) -> int:
    return rref.to_here().get()


class Later(work.Counter):
    @async_execution
    def get_later(self) -> Any:
        future: torch.futures.Future = torch.futures.Future()
        future.set_result(self.get())
        return future


_open = contextlib.ExitStack()


def start_using(kind: type) -> None:
    _open.enter_context(rpc.api._use_rpc_pickler(kind()))


def stop_using() -> None:
    _open.close()


@contextlib.contextmanager
def everywhere(kind: type) -> Iterator[Any]:
    for name in ("w1", "w2"):
        rpc.rpc_sync(name, start_using, args=(kind,))
    try:
        with rpc.api._use_rpc_pickler(kind()):
            yield rpc.api._default_pickler
    finally:
        for name in ("w1", "w2"):
            rpc.rpc_sync(name, stop_using)


@in_job
def test_calls_and_answers_go_through_the_pickler_that_is_set() -> None:
    tensor = torch.arange(6.0).reshape(2, 3)
    with everywhere(Marking) as pickler:
        assert rpc.rpc_sync("w1", work.add, args=(1, 2)) == 3
        assert (pickler.written, pickler.read) == (1, 1)
        assert torch.equal(rpc.rpc_async("w2", work.echo, args=(tensor,)).wait(), tensor)
        rref = rpc.remote("w1", Later, args=(5,))
        assert rref.to_here().get() == 5
        assert rref.rpc_sync().get() == 5
        assert rref.rpc_sync().get_later() == 5
        assert rref.rpc_async().get().wait() == 5
        assert rref.remote().get().to_here() == 5
        assert rpc.rpc_sync("w2", get, args=(rref,)) == 5
        with pytest.raises(ZeroDivisionError):
            rpc.rpc_sync("w1", divmod, args=(1, 0))
        with pytest.raises(ZeroDivisionError):
            rpc.rpc_async("w1", divmod, args=(1, 0)).wait()
        assert pickler.written >= 10
        assert pickler.read >= 8
        written = pickler.written
    assert rpc.rpc_sync("w1", work.add, args=(1, 2)) == 3
    assert pickler.written == written
    assert rpc.api._default_pickler is _internal_rpc_pickler


@in_job
def test_a_pickler_may_hand_references_over_with_the_reducer_that_torch_gives_it() -> None:
    rref = rpc.remote("w1", work.Counter, args=(7,))
    own = rpc.RRef(work.Counter(8))
    with everywhere(Forking):
        for to in ("w1", "w2", "w0"):
            assert rpc.rpc_sync(to, get, args=(rref,)) == 7
            assert rpc.rpc_sync(to, get, args=(own,)) == 8


@in_job
def test_what_one_worker_serialized_another_deserializes() -> None:
    rref, own = rpc.remote("w1", work.Counter, args=(7,)), rpc.RRef(work.Counter(8))
    for to in ("w1", "w2", "w0"):
        pickled = serialize({"far": rref, "near": [own], "tensor": torch.ones(3)})
        assert rpc.rpc_sync(to, read, args=pickled) == (7, 8, 3.0)
    data, tensors = serialize([rref])
    assert deserialize(data, tensors)[0].to_here().get() == 7
    with pytest.raises(UsageError, match="each can be taken once"):
        deserialize(data, tensors)


def read(data: bytes, tensors: list[torch.Tensor]) -> tuple[int, int, float]:
    found = deserialize(data, tensors)
    return found["far"].to_here().get(), found["near"][0].to_here().get(), found["tensor"].sum().item()


@in_job
def test_fork_data_is_torchs_and_holds_the_value_until_it_is_taken() -> None:
    rref = rpc.remote("w1", work.Traced)
    rref.to_here()
    fork = rref._serialize()
    assert fork[:3] == (1, rref.rref_id().created_on, rref.rref_id().local_id)
    assert (fork[3], fork[5], fork[6]) == (0, 0, "PyObject")
    before = rpc.rpc_sync("w1", work.traced_alive)
    del rref
    taken = rpc.rpc_sync("w2", take_and_keep, args=(fork,))
    assert taken == (1, "w1")
    assert rpc.rpc_sync("w1", work.traced_alive) == before
    rpc.rpc_sync("w2", work.drop)
    assert rpc.rpc_sync("w1", work.wait_until_traced, args=(before - 1,)) == before - 1


def take_and_keep(fork: Any) -> tuple[int, str]:
    rref = rpc.PyRRef._deserialize(fork)
    work.keep(rref)
    return rref.owner().id, rref.owner_name()
