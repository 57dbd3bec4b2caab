"""The lender's half of the shared carrier: blocks in memory that this process writes and its peers only map."""

from threading import Lock

from libc.stdint cimport int64_t, uint64_t
from libc.string cimport memcpy

from fastref._core cimport FR_FAILPOINT, FR_FAILS, Holder, failpoints, fr_failpoints_here

from fastref.errors import ResourceError, UsageError

__all__ = ["Arena"]

fr_failpoints_here = failpoints()

cdef enum:
    SMALLEST = 4096
    STEPS = 8               # size classes in each doubling: at most 12.5 % of a block is unused
    COMMIT_STEP = 1 << 20   # memory is made sure of in steps of at least this much

cdef extern from *:
    int __builtin_clzll(unsigned long long) nogil


cdef uint64_t _rounded(uint64_t size_bytes) noexcept nogil:
    """The size class that a block of this size comes from."""
    cdef uint64_t step
    if size_bytes <= SMALLEST:
        return SMALLEST
    step = (<uint64_t>1 << (63 - __builtin_clzll(size_bytes - 1))) // STEPS
    return (size_bytes + step - 1) // step * step


cdef class Arena:
    """Lend blocks of this process's shared memory.

    Parameters
    ----------
    memory : writable buffer
        The whole arena; only the part that was committed has pages behind it.
    commit : callable(offset, size_bytes)
        Makes sure of the memory of a range before it is touched, or raises ``ResourceError``.
    holder : Holder, optional
        What this process holds of its own table; for blocks that peers lease.
    """

    def __init__(self, memory, commit, holder: Holder | None = None):
        cdef unsigned char[::1] room = memory
        self._memory = memoryview(memory)
        self.base = <char*>&room[0]
        self.limit = room.shape[0] & ~<uint64_t>4095
        self._commit = commit
        self._lock = Lock()
        self._holder = holder
        self._lent, self._held, self._free, self._pinned, self._entries = {}, {}, {}, {}, {}

    cpdef uint64_t lend(self, uint64_t size_bytes) except? 0xFFFFFFFFFFFFFFFF:
        """Return the offset of a block of at least ``size_bytes``, for the caller to fill; a multiple of 4096.

        Raises
        ------
        ResourceError
            When the arena's limit is reached or the system has no memory for it.
        """
        cdef uint64_t rounded, offset, wanted
        if size_bytes > self.limit:
            raise ResourceError(f"an arena of {self.limit} bytes has no room for a block of {size_bytes}")
        if FR_FAILS("arena.lending"):
            raise ResourceError(f"a failpoint refuses a block of {size_bytes} bytes")
        rounded = _rounded(size_bytes)
        with self._lock:
            waiting = self._free.get(rounded)
            if waiting:
                offset = waiting.pop()
            else:
                if rounded > self.limit - self.top:
                    raise ResourceError(f"an arena of {self.limit} bytes has no room for a block of {size_bytes}; "
                                        f"{self.bytes_lent} bytes are lent now")
                if self.top + rounded > self.committed:
                    wanted = min(max(rounded, <uint64_t>COMMIT_STEP), self.limit - self.committed)
                    wanted = max(wanted, self.top + rounded - self.committed)
                    self._commit(self.committed, wanted)
                    self.committed += wanted
                offset = self.top
                self.top += (rounded + 4095) // 4096 * 4096
            self._lent[offset] = rounded
            self.bytes_lent += rounded
        FR_FAILPOINT("arena.lent")
        return offset

    cpdef int give_back(self, uint64_t offset) except -1:
        """Take a block back: nobody reads it any more, except who has leased it and holds its entry.

        Raises
        ------
        UsageError
            When no such block is lent.
        """
        fresh = []  # made here: under the lock it might start a garbage collection, and code of the program with it
        with self._lock:
            index = self._pinned.pop(offset, None)
            if index is None:
                self._take_back(self._lent, offset, fresh)
        if index is not None:
            self._holder.drop(index)  # whoever holds it last has the entry closed, and `closed` called
        FR_FAILPOINT("arena.given_back")
        return 0

    cdef int _take_back(self, dict blocks, uint64_t offset, list fresh) except -1:
        rounded = blocks.pop(offset, None)
        if rounded is None:
            raise UsageError(f"no block is lent at {offset}")
        self._free.setdefault(rounded, fresh).append(offset)
        self.bytes_lent -= rounded
        return 0

    def pin(self, offset: int, index: int) -> None:
        """Have a block live as long as a table entry that the caller holds; ``give_back`` lets go of that hold."""
        with self._lock:
            self._held[offset] = self._lent.pop(offset)
            self._pinned[offset] = index
            self._entries[index] = offset
        FR_FAILPOINT("arena.pinned")

    def keep_for(self, offset: int, index: int) -> None:
        """Have a block live as long as a table entry that is held anyway."""
        with self._lock:
            self._held[offset] = self._lent.pop(offset)
            self._entries[index] = offset

    def closed(self, index: int) -> None:
        """Take back the block of a table entry that nobody holds any more, if it has one."""
        fresh = []
        with self._lock:
            offset = self._entries.pop(index, None)
            if offset is not None:
                self._take_back(self._held, offset, fresh)

    def fill(self, offset: int, data) -> None:
        """Copy bytes into a block that is lent."""
        cdef const unsigned char[::1] source = data
        if source.shape[0] > self._lent.get(offset, -1):
            raise UsageError(f"{source.shape[0]} bytes do not fit in a block lent at {offset}")
        if source.shape[0]:
            memcpy(self.base + <uint64_t>offset, &source[0], source.shape[0])

    def snapshot(self) -> dict:
        """Plain figures: limit, committed, blocks and bytes lent."""
        with self._lock:
            return dict(limit=self.limit, committed=self.committed, used=self.top, blocks=len(self._lent) + len(self._held),
                        bytes_lent=self.bytes_lent)

