"""Tensors in memory that several processes write, made on purpose and handed over as what they are."""

from __future__ import annotations

import weakref

import torch

from fastref.errors import UsageError
from fastref.segments.shared import SharedBlock, create_shared_block

__all__ = ["share", "shared_block_of", "shared_blocks_by_address", "shared_empty", "storage_of"]

shared_blocks_by_address: weakref.WeakValueDictionary[int, SharedBlock] = weakref.WeakValueDictionary()
"""Where the storage of a tensor in a block begins -> the block."""


def shared_empty(*size: int | tuple[int, ...], dtype: torch.dtype | None = None) -> torch.Tensor:
    """Return a tensor in memory that all who get it may write.

    Sent in a call, as an argument or a result, or fetched by ``to_here``, it is not copied: the receiver has a tensor
    in the same memory, at the price of a few system calls for the first tensor of it that it gets. What anybody writes
    everybody sees, without any order but what the program itself makes, by a call for example. The memory is that of
    the host, zeros at first, and goes with the last tensor in it, whichever worker has that one and whichever dies.

    Views of it are handed over as views. ``clone()`` is an ordinary tensor again, and so is every result of computing
    with it, unless it is the ``out`` of an operation.

    Parameters
    ----------
    size : ints, or one tuple of ints
        The shape.
    dtype : torch.dtype, optional
        As in ``torch.empty``.

    Raises
    ------
    ResourceError
        There is no memory for it.
    """
    shape = torch.Size(size[0] if len(size) == 1 and not isinstance(size[0], int) else size)  # type: ignore[arg-type]
    kind = torch.get_default_dtype() if dtype is None else dtype
    if not shape.numel():
        return torch.empty(shape, dtype=kind)
    storage = storage_of(create_shared_block(shape.numel() * kind.itemsize))
    return torch.empty(0, dtype=kind).set_(storage).view(shape)


def share(tensor: torch.Tensor) -> torch.Tensor:
    """Return a copy of a tensor, in memory that all who get it may write; see ``shared_empty``.

    One that is in such memory already is returned as it is. A gradient is not required of the copy.

    Raises
    ------
    UsageError
        For a tensor that is not dense, or not in the memory of the host.
    ResourceError
        There is no memory for it.
    """
    if tensor.layout is not torch.strided or not tensor.is_cpu or tensor.is_quantized:
        raise UsageError(f"only dense tensors in the memory of the host can be shared, not {tensor.type()}")
    if shared_block_of(tensor.untyped_storage()) is not None:
        return tensor
    with torch.no_grad():
        return shared_empty(tuple(tensor.shape), dtype=tensor.dtype).copy_(tensor)


def shared_block_of(storage: torch.UntypedStorage) -> SharedBlock | None:
    """Return the block that a storage lies in, if it is one for sharing."""
    return shared_blocks_by_address.get(storage.data_ptr())


def storage_of(block: SharedBlock) -> torch.UntypedStorage:
    """Return a storage in a block, which keeps the block."""
    storage = torch.frombuffer(block, dtype=torch.uint8).untyped_storage()
    shared_blocks_by_address[storage.data_ptr()] = block
    return storage
