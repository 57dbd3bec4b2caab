"""Anonymous shared memory: memfds that cannot shrink under those who map them."""

from __future__ import annotations

import errno
import fcntl
import os
import stat

from fastref.errors import ProtocolError, ResourceError, UsageError
from fastref.segments.budget import check_available
from fastref.segments.mapping import Mapping

__all__ = ["allocate", "cannot_shrink", "check_size", "create_memfd", "map_fd", "map_private", "seal"]

# <linux/fcntl.h>; Python's fcntl has no name for it before 3.13. Linux 5.1.
F_SEAL_FUTURE_WRITE = 0x10


def create_memfd(label: str, size_bytes: int, *, grow: bool = False) -> int:
    """Create an anonymous file of ``size_bytes`` zero bytes, none of them allocated yet.

    It can never shrink, so that who has checked its size may map it and touch every byte.

    Parameters
    ----------
    label : str
        Shown in ``/proc/<pid>/maps`` after ``memfd:fastref-``.
    size_bytes : int
        Its size.
    grow : bool
        Whether its size may be raised later.

    Returns
    -------
    int
        The descriptor, close-on-exec.

    Raises
    ------
    ResourceError
        No descriptor or no memory is left.
    """
    if size_bytes < 0:
        raise UsageError(f"a memory file cannot have {size_bytes} bytes")
    try:
        fd = os.memfd_create(f"fastref-{label}", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        try:
            os.ftruncate(fd, size_bytes)
            seal(fd, shrink=True, grow=not grow)
        except BaseException:
            os.close(fd)
            raise
    except OSError as error:
        raise ResourceError(
            f"cannot create {size_bytes} bytes of shared memory for {label!r}: {error.strerror}"
        ) from error
    return fd


def allocate(fd: int, offset_bytes: int, size_bytes: int) -> None:
    """Give pages to a range of a memory file, so that touching them cannot fail.

    Raises
    ------
    ResourceError
        The system has no memory left for it.
    """
    check_available(size_bytes, "a segment")
    try:
        os.posix_fallocate(fd, offset_bytes, size_bytes)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.ENOMEM):
            raise ResourceError(f"no room for {size_bytes} bytes of shared memory: {error.strerror}") from error
        raise


def seal(fd: int, *, future_write: bool = False, shrink: bool = True, grow: bool = False) -> None:
    """Forbid changes to a memory file, for everybody and for ever.

    Parameters
    ----------
    fd : int
        The memory file.
    future_write : bool
        No new writable shared mapping and no write call; mappings that exist keep writing. So the
        owner maps it first and seals it then.
    shrink, grow : bool
        The size cannot be lowered; cannot be raised.
    """
    seals = 0
    if future_write:
        seals |= F_SEAL_FUTURE_WRITE
    if shrink:
        seals |= fcntl.F_SEAL_SHRINK
    if grow:
        seals |= fcntl.F_SEAL_GROW
    fcntl.fcntl(fd, fcntl.F_ADD_SEALS, seals)


def cannot_shrink(fd: int) -> bool:
    """Return whether ``fd`` is a memory file that keeps at least its size: then every byte of it can be touched."""
    try:
        return bool(fcntl.fcntl(fd, fcntl.F_GET_SEALS) & fcntl.F_SEAL_SHRINK)
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
        return False  # no memory file at all


def check_size(fd: int, size_bytes: int) -> None:
    """Check that ``fd`` is a file of at least ``size_bytes`` bytes: touching a missing part would be a SIGBUS.

    Raises
    ------
    ProtocolError
        It is not.
    """
    if size_bytes <= 0:
        raise ProtocolError(f"a mapping needs a size above zero, not {size_bytes}")
    status = os.fstat(fd)
    if not stat.S_ISREG(status.st_mode):
        raise ProtocolError("a descriptor that was passed as shared memory is none")
    if status.st_size < size_bytes:
        raise ProtocolError(f"a segment was announced with {size_bytes} bytes and has {status.st_size}")


def map_fd(fd: int, size_bytes: int, *, writable: bool) -> Mapping:
    """Map the first ``size_bytes`` bytes of ``fd``, shared.

    The mapping outlives the descriptor.

    Raises
    ------
    ProtocolError
        The file is shorter than that (touching its missing part would be a SIGBUS), or no file at all.
    ResourceError
        No address space or mapping is left.
    PermissionError
        It is sealed against writing and ``writable`` was asked for.
    """
    check_size(fd, size_bytes)
    try:
        return Mapping(fd, size_bytes, writable)
    except OSError as error:
        if error.errno in (errno.ENOMEM, errno.EMFILE, errno.ENFILE):
            raise ResourceError(f"cannot map {size_bytes} bytes of shared memory: {error.strerror}") from error
        raise


def map_private(fd: int, size_bytes: int) -> Mapping | None:
    """Map a memory file that ``map_fd`` has mapped before a second time, copy-on-write.

    None when the system has no address space for it, or counts memory that may be written as if it were
    (``vm.overcommit_memory=2``).
    """
    try:
        return Mapping(fd, size_bytes, True, private=True)
    except OSError as error:
        if error.errno not in (errno.ENOMEM, errno.EAGAIN):
            raise
        return None
