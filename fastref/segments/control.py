"""Control segments: named shared memory that loses its name as soon as its descriptor is safe."""

from __future__ import annotations

import errno
import gc
import os
from dataclasses import dataclass
from pathlib import Path

import posix_ipc

from fastref._core import failpoint
from fastref.errors import ResourceError, UsageError
from fastref.segments.budget import check_available
from fastref.segments.identity import InstanceIdentity

__all__ = ["ControlSegment", "create_control"]

SHM_DIRECTORY = Path("/dev/shm")
SHM_PREFIX = "fastref-"


@dataclass
class ControlSegment:
    """A control segment of this process.

    Parameters
    ----------
    fd : int
        Its descriptor, close-on-exec.
    size_bytes : int
        Its size; every page of it is allocated.
    name : str
        Its POSIX name; it exists only until ``unlink``.
    """

    fd: int
    size_bytes: int
    name: str

    def unlink(self) -> None:
        """Remove the name; the memory stays as long as a descriptor or a mapping does. Idempotent."""
        try:
            posix_ipc.unlink_shared_memory(self.name)
        except posix_ipc.ExistentialError:
            pass  # already unlinked, by us or by a sweep

    def close(self) -> None:
        """Close the descriptor; mappings stay. Idempotent."""
        fd, self.fd = self.fd, -1
        if fd >= 0:
            os.close(fd)


def create_control(size_bytes: int, identity: InstanceIdentity, *, keep_name: bool = False) -> ControlSegment:
    """Create a zeroed shared memory segment, all of its pages allocated.

    Parameters
    ----------
    size_bytes : int
        Its size, above zero.
    identity : InstanceIdentity
        Who makes it; the name says so until it is gone.
    keep_name : bool
        Leave the name in place. Peers get the descriptor over a socket, so they do not need it.

    Returns
    -------
    ControlSegment

    Raises
    ------
    ResourceError
        ``/dev/shm`` is full, missing, or has this name already, or memory is short.
    """
    if size_bytes <= 0:
        raise UsageError(f"a control segment needs a size above zero, not {size_bytes}")
    check_available(size_bytes, "a control segment")
    name = f"/{SHM_PREFIX}{identity}-control"
    try:
        memory = posix_ipc.SharedMemory(name, posix_ipc.O_CREX, mode=0o600)
    except (posix_ipc.Error, OSError) as error:
        raise ResourceError(f"cannot create {SHM_DIRECTORY}{name}: {error}") from error
    segment = ControlSegment(memory.fd, size_bytes, name)
    try:
        failpoint("segment.created")
        # Before anybody maps it: a page that is missing when it is touched is a SIGBUS, here it is an error.
        try:
            os.posix_fallocate(segment.fd, 0, size_bytes)
        except OSError:
            gc.collect()  # segments of runtimes that were shut down stay mapped until their last handle is collected
            os.posix_fallocate(segment.fd, 0, size_bytes)
    except BaseException as error:
        segment.unlink()
        segment.close()
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.ENOMEM, errno.EFBIG):
            raise ResourceError(
                f"{SHM_DIRECTORY} has no room for a control segment of {size_bytes} bytes: {_free_bytes()} are free"
            ) from error
        raise
    if not keep_name:
        segment.unlink()
        failpoint("segment.unlinked")
    return segment


def _free_bytes() -> int:
    status = os.statvfs(SHM_DIRECTORY)
    return status.f_bavail * status.f_frsize
