"""Values that the fast encoding cannot take, by pickle protocol 5 with buffers out of band.

References and large buffers stay outside the pickle: a reference is its number in the frame, a buffer its number in the
payload. cloudpickle is asked only for what pickle cannot do, and for objects of a ``__main__`` that the peer lacks.
"""

from __future__ import annotations

import io
import pickle
from collections.abc import Callable
from types import FunctionType
from typing import Any

import cloudpickle
import torch

from fastref.codec import mainmodule
from fastref.codec.script import reduce_script_function, reduce_script_module
from fastref.codec.sharing import shared_block_of, storage_of
from fastref.codec.tensors import StorageView
from fastref.errors import ProtocolError
from fastref.rref import RRef
from fastref.segments.shared import SharedBlock

__all__ = ["dumps", "loads", "register_reducer"]

_reducers: dict[type, Callable[[Any], Any]] = {
    torch.jit.ScriptFunction: reduce_script_function,
    torch.jit._script.RecursiveScriptModule: reduce_script_module,
}


def register_reducer(kind: type, reducer: Callable[[Any], Any]) -> None:
    """Have ``reducer`` say how values of exactly this class are pickled in calls. The first one for a class counts."""
    _reducers.setdefault(kind, reducer)


def dumps(
    value: Any,
    references: list,
    shares_main: bool = False,
    blocks: list | None = None,
    linked: list | None = None,
) -> tuple[bytes, list[memoryview]]:
    """Pickle a value.

    Parameters
    ----------
    value : object
    references : list
        RRefs met are appended; they are not pickled.
    shares_main : bool
        The receiver runs the same ``__main__`` file, so its functions and classes go by name.
    blocks : list, optional
        Blocks for sharing that tensors lie in are appended, and the receiver has to be handed them; without it such
        tensors are copied as others are.
    linked : list, optional
        Tensors that want gradients are appended, and ``loads`` says which they are; parameters of modules are not among
        them: a copied module has parameters of its own.

    Returns
    -------
    data : bytes
    buffers : list of memoryview
        Contiguous memory that belongs between the pickle's bytes; ``loads`` wants its copies in this order.

    Raises
    ------
    Whatever ``pickle`` raises for a value that neither it nor cloudpickle can take.
    """
    already = [(found, len(found)) for found in (references, blocks, linked) if found is not None]
    try:
        return _dump(_Pickler, value, references, shares_main, blocks, linked)
    except (pickle.PicklingError, AttributeError, TypeError) as error:
        _forget(already)
        try:
            return _dump(_CloudPickler, value, references, shares_main, blocks, linked)
        except Exception:
            _forget(already)
            raise error from None  # what plain pickle says is what users of torch know
    except BaseException:
        _forget(already)
        raise


def loads(
    data: bytes | memoryview,
    buffers: list,
    references: list,
    claim: Callable[[int], SharedBlock] | None = None,
    linked: list | None = None,
) -> Any:
    """Unpickle what ``dumps`` made; ``buffers`` are writable copies of its buffers, ``references`` the frame's.

    ``claim`` returns the block for sharing that has a number. Tensors that ``dumps`` linked are appended to ``linked``,
    in the same order, and want no gradient yet.
    """
    unpickler = _Unpickler(io.BytesIO(data), buffers, references, claim)
    value = unpickler.load()
    for number in range(len(unpickler.linked)):
        if linked is None or number not in unpickler.linked:
            raise ProtocolError(f"a pickle in which linked tensor {number} is missing, or that came without a context")
        linked.append(unpickler.linked[number])
    return value


def _forget(already: list[tuple[list, int]]) -> None:
    for found, count in already:
        del found[count:]


def _dump(
    kind: type, value: Any, references: list, shares_main: bool, blocks: list | None, linked: list | None
) -> tuple[bytes, list[memoryview]]:
    file = io.BytesIO()
    buffers: list[pickle.PickleBuffer] = []
    pickler = kind(file, protocol=5, buffer_callback=buffers.append)
    pickler.references, pickler.shares_main, pickler.storages = references, shares_main, {}
    pickler.blocks, pickler.linked, pickler.owned = blocks, linked, set()
    pickler.dump(value)
    return file.getvalue(), [buffer.raw() for buffer in buffers]


class _Reducing:
    """What both picklers do before their own rules."""

    references: list
    shares_main: bool
    storages: dict[int, _Storage | _SharedStorage]
    blocks: list | None
    linked: list | None
    owned: set[int]  # ids of parameters that belong to modules

    def reduced(self, value: Any) -> Any:
        kind = type(value)
        if kind is RRef:
            self.references.append(value)
            return _reference, (len(self.references) - 1,)
        if kind in _reducers:
            return _reducers[kind](value)
        if kind is torch.Tensor:
            return self._reduce_linked(value) if self._links(value) else self._reduce_tensor(value, value.requires_grad)
        if kind is torch.nn.Parameter:
            return (
                self._reduce_linked(value) if self._links(value) else self._reduce_parameter(value, value.requires_grad)
            )
        if self.linked is not None and isinstance(value, torch.nn.Module):
            self.owned.update(map(id, value.parameters(recurse=False)))
        if kind is torch.UntypedStorage and value.device.type == "cpu":
            return _untyped, (self._shared(value),)
        if kind is torch.TypedStorage and value._untyped_storage.device.type == "cpu":
            return _rebuild_typed, (self._shared(value._untyped_storage), value.dtype)
        if (
            kind.__module__ == "numpy"
            and kind.__name__ == "ndarray"
            and not value.flags.forc
            and not value.dtype.hasobject
        ):
            return value.copy().__reduce_ex__(5)  # without gaps it stays outside the pickle
        if (kind is FunctionType or isinstance(value, type)) and mainmodule.owns(value):
            if self.shares_main and mainmodule.is_shared(value):
                return mainmodule.find, (value.__qualname__,)
            if not isinstance(self, _CloudPickler):
                raise pickle.PicklingError(f"{value!r} goes by value: the receiver has another __main__")
        if isinstance(value, torch._C.Future):
            raise RuntimeError("Can not pickle torch.futures.Future")
        if kind is memoryview:  # cloudpickle would make bytes of it
            raise TypeError("cannot pickle 'memoryview' object")
        return NotImplemented

    def _shared(self, storage: torch.UntypedStorage) -> _Storage | _SharedStorage:
        known = self.storages.get(storage._cdata)
        if known is None:
            block = self._block_of(storage)
            if block is None:
                known = _Storage(storage)
            else:
                assert self.blocks is not None
                self.blocks.append(block)
                known = _SharedStorage(block)
            self.storages[storage._cdata] = known
        return known

    def _block_of(self, storage: torch.UntypedStorage) -> SharedBlock | None:
        return None if self.blocks is None else shared_block_of(storage)

    def _links(self, tensor: torch.Tensor) -> bool:
        return self.linked is not None and tensor.requires_grad and id(tensor) not in self.owned

    def _reduce_linked(self, tensor: torch.Tensor) -> Any:
        """Have the receiver know a tensor by its number, whatever the order in which a pickle is read."""
        reduce: Any = self._reduce_parameter if type(tensor) is torch.nn.Parameter else self._reduce_tensor
        reduced = reduce(tensor, False)
        if reduced is NotImplemented:
            return reduced
        assert self.linked is not None
        self.linked.append(tensor)
        return _linked, (*reduced, len(self.linked) - 1)

    def _reduce_parameter(self, parameter: torch.nn.Parameter, requires_grad: bool) -> Any:
        state = torch._utils._get_obj_state(parameter)
        return _rebuild_parameter, (parameter.detach(), requires_grad, state or None)

    def _reduce_tensor(self, tensor: torch.Tensor, requires_grad: bool) -> Any:
        if not tensor.is_cpu or tensor.is_quantized or tensor.is_nested:
            return NotImplemented  # torch's own way
        if tensor.layout is not torch.strided:
            return _reduce_sparse(tensor, requires_grad)
        lazy = tensor.is_conj(), tensor.is_neg()
        bare = tensor.detach()
        if lazy != (False, False):  # the elements as they lie there
            bare = torch._neg_view(bare) if lazy[1] else bare
            bare = bare.conj() if lazy[0] else bare
        storage = bare.untyped_storage()
        if _is_sparse_view(bare, storage) and self._block_of(storage) is None:
            bare = bare.clone()
            storage = bare.untyped_storage()
        return _rebuild_tensor, (
            self._shared(storage),
            bare.dtype,
            bare.storage_offset(),
            tuple(bare.shape),
            bare.stride(),
            lazy,
            requires_grad,
        )


class _Pickler(_Reducing, pickle.Pickler):
    def reducer_override(self, value: Any) -> Any:
        return self.reduced(value)


class _CloudPickler(_Reducing, cloudpickle.Pickler):  # type: ignore[misc]  # cloudpickle has no types
    def reducer_override(self, value: Any) -> Any:
        reduced = self.reduced(value)
        return super().reducer_override(value) if reduced is NotImplemented else reduced


class _Unpickler(pickle.Unpickler):
    def __init__(
        self,
        file: io.BytesIO,
        buffers: list,
        references: list,
        claim: Callable[[int], SharedBlock] | None,
    ) -> None:
        super().__init__(file, buffers=buffers)
        self.references, self.claim = references, claim
        self.linked: dict[int, torch.Tensor] = {}

    def find_class(self, module: str, name: str) -> Any:
        if module == __name__:
            if name == "_reference":
                return self.references.__getitem__
            if name == "_shared_storage" and self.claim is not None:
                return self._shared_storage
            if name == "_linked":
                return self._linked
        return super().find_class(module, name)

    def _shared_storage(self, number: int) -> torch.UntypedStorage:
        assert self.claim is not None
        return storage_of(self.claim(number))

    def _linked(self, rebuild: Callable[..., torch.Tensor], arguments: tuple, number: int) -> torch.Tensor:
        tensor = self.linked[number] = rebuild(*arguments)
        return tensor


def _reference(number: int) -> RRef:
    """Stand in the pickle for a reference of the frame; the unpickler puts its own list in this place."""
    raise pickle.UnpicklingError(f"reference {number} outside a call")


def _shared_storage(number: int) -> torch.UntypedStorage:
    """Stand in the pickle for a block for sharing, as ``_reference`` for a reference."""
    raise pickle.UnpicklingError(f"shared memory {number:#x} outside a call")


def _linked(rebuild: Callable[..., torch.Tensor], arguments: tuple, number: int) -> torch.Tensor:
    """Stand in the pickle for a tensor whose gradient goes back, as ``_reference`` for a reference."""
    raise pickle.UnpicklingError(f"linked tensor {number} outside a call")


class _SharedStorage:
    """Memory that sender and receiver both write."""

    def __init__(self, block: SharedBlock) -> None:
        self._number = block.number

    def __reduce__(self) -> Any:
        return _shared_storage, (self._number,)


class _Storage:
    """Memory that tensors of one message lie in. It is pickled once, however many they are."""

    def __init__(self, storage: torch.UntypedStorage) -> None:
        self._storage = storage

    def __reduce__(self) -> Any:
        if not self._storage.nbytes():
            return torch.UntypedStorage, (0,)
        return _rebuild_storage, (pickle.PickleBuffer(StorageView(self._storage)),)


def _rebuild_storage(memory: Any) -> torch.UntypedStorage:
    return torch.frombuffer(memory, dtype=torch.uint8).untyped_storage()


def _untyped(storage: torch.UntypedStorage) -> torch.UntypedStorage:
    return storage


def _rebuild_typed(storage: torch.UntypedStorage, dtype: torch.dtype) -> torch.TypedStorage:
    return torch.TypedStorage(wrap_storage=storage, dtype=dtype, _internal=True)


def _is_sparse_view(tensor: torch.Tensor, storage: torch.UntypedStorage) -> bool:
    """Tell whether a tensor is so little of its memory that its elements had better travel alone.

    Source: ``cloneSparseTensors`` of torch's RPC, its figures included, which decide what tensors share afterwards.
    """
    used = tensor.numel() * tensor.element_size()
    return storage.nbytes() >= 8192 and storage.nbytes() >= 2 * used


def _rebuild_tensor(
    storage: torch.UntypedStorage,
    dtype: torch.dtype,
    offset: int,
    shape: tuple,
    strides: tuple,
    lazy: tuple[bool, bool],
    requires_grad: bool,
) -> torch.Tensor:
    tensor = torch.empty(0, dtype=dtype).set_(storage, offset, shape, strides)
    if lazy != (False, False):
        is_conj, is_neg = lazy
        tensor = tensor.conj() if is_conj else tensor
        tensor = torch._neg_view(tensor) if is_neg else tensor
    return tensor.requires_grad_(requires_grad)


def _rebuild_parameter(data: torch.Tensor, requires_grad: bool, state: Any) -> torch.nn.Parameter:
    parameter = torch.nn.Parameter(data, requires_grad)
    return torch._utils._set_obj_state(parameter, state) if state else parameter


def _reduce_sparse(tensor: torch.Tensor, requires_grad: bool) -> Any:
    """Take a sparse tensor apart. Torch's own way keeps all that it ever rebuilt, for ``torch.load`` to look at."""
    bare = tensor.detach()
    if tensor.layout is torch.sparse_coo:
        parts = bare._indices(), bare._values(), tuple(bare.shape), bare.is_coalesced()
        return _rebuild_coo, (*parts, requires_grad)
    if tensor.layout in (torch.sparse_csr, torch.sparse_bsr):
        places = bare.crow_indices(), bare.col_indices()
    elif tensor.layout in (torch.sparse_csc, torch.sparse_bsc):
        places = bare.ccol_indices(), bare.row_indices()
    else:
        return NotImplemented
    return _rebuild_compressed, (*places, bare.values(), tuple(bare.shape), bare.layout, requires_grad)


def _rebuild_coo(
    indices: torch.Tensor, values: torch.Tensor, shape: tuple, is_coalesced: bool, requires_grad: bool
) -> torch.Tensor:
    tensor = torch.sparse_coo_tensor(indices, values, shape, is_coalesced=is_coalesced, check_invariants=False)
    return tensor.requires_grad_(requires_grad)


def _rebuild_compressed(
    compressed: torch.Tensor,
    plain: torch.Tensor,
    values: torch.Tensor,
    shape: tuple,
    layout: torch.layout,
    requires_grad: bool,
) -> torch.Tensor:
    tensor = torch.sparse_compressed_tensor(compressed, plain, values, shape, layout=layout, check_invariants=False)
    return tensor.requires_grad_(requires_grad)
