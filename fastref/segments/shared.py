"""Memory that several processes write. It goes with its last user, however that one ends: nothing has its name."""

from __future__ import annotations

import os
import weakref

from fastref.errors import ProtocolError
from fastref.segments.mapping import Mapping
from fastref.segments.memory import allocate, cannot_shrink, create_memfd

__all__ = ["SharedBlock", "adopt_shared_block", "create_shared_block", "shared_blocks"]

shared_blocks: weakref.WeakValueDictionary[int, SharedBlock] = weakref.WeakValueDictionary()
"""Number -> the block, of all that this process has mapped: one that comes twice is mapped once."""


class SharedBlock(Mapping):
    """A memory file mapped for reading and writing, and its descriptor, by which others get it.

    Attributes
    ----------
    number : int
        The same in every process that has it; 63 random bits.
    fd : int
        Open as long as the block is mapped here.
    """

    number: int
    fd: int

    def __del__(self) -> None:
        fd, self.fd = self.fd, -1
        if fd >= 0:
            os.close(fd)


def create_shared_block(size_bytes: int) -> SharedBlock:
    """Make a block of zeros.

    Raises
    ------
    ResourceError
        No memory or no descriptor is left.
    """
    fd = create_memfd("shared", max(size_bytes, 1))
    try:
        allocate(fd, 0, max(size_bytes, 1))
    except BaseException:
        os.close(fd)
        raise
    return _mapped(fd, max(size_bytes, 1), int.from_bytes(os.urandom(8), "little") >> 1)


def adopt_shared_block(fd: int, size_bytes: int, number: int) -> SharedBlock:
    """Map a block that a peer handed over, unless it is mapped here already. The descriptor is taken over.

    Raises
    ------
    ProtocolError
        It is no memory file that keeps its size, or smaller than announced.
    """
    known = shared_blocks.get(number)
    if known is not None:
        os.close(fd)
        if known.size_bytes != size_bytes:
            raise ProtocolError(f"a shared block of {known.size_bytes} bytes comes again with {size_bytes}")
        return known
    try:
        if not cannot_shrink(fd) or not 0 < size_bytes <= os.fstat(fd).st_size:
            raise ProtocolError(f"a shared block of {size_bytes} bytes is no memory file of that size")
    except BaseException:
        os.close(fd)
        raise
    return _mapped(fd, size_bytes, number)


def _mapped(fd: int, size_bytes: int, number: int) -> SharedBlock:
    try:
        block = SharedBlock(fd, size_bytes, True)
    except OSError as error:
        os.close(fd)
        raise ProtocolError(f"a shared block cannot be mapped: {error.strerror}") from error
    block.number, block.fd = number, fd
    shared_blocks[number] = block
    return block
