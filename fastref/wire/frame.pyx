"""Read frames: copy the header once, check it, and only then use it."""

from libc.string cimport memcpy

from fastref._core cimport fr_fork
from fastref.errors import ProtocolError
from fastref.wire.kinds import Kind

__all__ = ["describe"]

cdef uint64_t LOCAL_ID_LIMIT = <uint64_t>1 << 48


cdef int parse_frame(const char* data, uint64_t size, FrameView* view) noexcept nogil:
    """Fill ``view`` from the bytes of a record; False when they are not a frame.

    The bytes lie in memory that the sender can still write, so nothing is read from them twice.
    """
    cdef int i
    cdef fr_fork fork
    cdef const char* at
    cdef const char* end
    if size < sizeof(fr_frame):
        return False
    memcpy(&view.head, data, sizeof(fr_frame))
    if view.head.kind < PYTHON_CALL or view.head.kind > CLEANUP_AUTOGRAD_CONTEXT_REQ:
        return False
    if sizeof(fr_frame) + <uint64_t>view.head.forks_size + view.head.payload != size:
        return False
    view.forks = data + sizeof(fr_frame)
    view.payload = view.forks + view.head.forks_size
    view.payload_size = view.head.payload
    if view.head.flags & FLAG_BLOCK and view.payload_size != sizeof(fr_block):
        return False
    if view.head.flags & FLAG_LOCAL:
        return False
    if view.head.flags & FLAG_FORKS_IN_BLOCK:  # they are checked one by one as they are taken
        return view.head.flags & FLAG_BLOCK and not view.head.forks_size
    at, end = view.forks, view.payload
    for i in range(view.head.references):
        at = next_fork(at, end, &fork)
        if at == NULL:
            return False
    return at == end


cdef const char* next_fork(const char* forks, const char* end, fr_fork* fork) noexcept nogil:
    """Copy one reference out and return where the next one begins; NULL when it is damaged."""
    if <size_t>(end - forks) < sizeof(fr_fork):
        return NULL
    memcpy(fork, forks, sizeof(fr_fork))
    forks += sizeof(fr_fork)
    if <size_t>(end - forks) < fork.type_size or fork.has_entry > 1:
        return NULL
    if fork.rref_local >= LOCAL_ID_LIMIT or fork.fork_local >= LOCAL_ID_LIMIT:
        return NULL
    return forks + fork.type_size


def describe(frame: bytes) -> dict:
    """Return a frame's header as plain values, for logs, snapshots and tests.

    Raises
    ------
    ProtocolError
        When the bytes are not a frame.
    """
    cdef FrameView view
    if not parse_frame(frame, len(frame), &view):
        raise ProtocolError(f"{len(frame)} bytes that are not a frame")
    return dict(kind=Kind(view.head.kind), flags=view.head.flags, references=view.head.references, slot=view.head.slot,
                call=view.head.call, deadline_ns=view.head.deadline_ns, callable=view.head.callable,
                payload=bytes(view.payload[:view.payload_size]))
