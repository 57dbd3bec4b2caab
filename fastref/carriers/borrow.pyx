"""The borrower's half of the shared carrier: blocks that a peer lends, read in place or leased."""

from functools import partial

cimport cython
from cpython.buffer cimport PyBuffer_FillInfo
from cpython.object cimport PyObject
from cpython.ref cimport Py_DECREF, Py_INCREF
from libc.stdint cimport uint32_t, uint64_t
from libc.stdlib cimport calloc, free, realloc
from libc.string cimport memcpy, memmove

from fastref._core cimport (FR_FAILPOINT, FR_KEPT, FR_LOST, Holder, failpoints, fr_exchange, fr_failpoints_here,
                            fr_fence_acquire, fr_holder, fr_load32_acquire, fr_load32_relaxed, fr_load_relaxed, fr_or)
from fastref.carriers.warm cimport errands, fr_errands
from fastref.nogc cimport nogc_pause, nogc_resume

from fastref.errors import ProtocolError, ReferenceLost

__all__ = ["Lease", "PeerArena"]

cdef extern from "fr_lease.h" nogil:
    struct fr_leases:
        char* base
        uint64_t live, pages_written, stuck
    enum:
        FR_PAGE
    fr_lease* fr_lease_own(char*, size_t, void (*)(void*, uint64_t) noexcept nogil)
    fr_lease* fr_lease_take(fr_leases*, uint64_t, uint64_t, uint32_t, uint32_t, uint32_t, int*, int*)
    void fr_lease_share(fr_lease*)
    void fr_lease_drop(fr_lease*)
    void fr_leases_detach(fr_leases*)
    bint fr_leases_begin(fr_leases*, fr_holder*, char*, size_t, fr_errands*, void (*)(void*) noexcept nogil,
                         void*)
    int fr_leases_any(fr_leases*, uint64_t, uint64_t)
    bint fr_lease_find(fr_leases*, const char*, size_t, uint64_t*, uint64_t*, uint32_t*)
    void fr_leases_end(fr_leases*)
    void fr_leases_watch_forks()

cdef extern from "fr_atomic.h" nogil:
    bint fr_cas(uint64_t*, uint64_t, uint64_t)

cdef extern from "unistd.h" nogil:
    long sysconf(int)
    int _SC_PAGESIZE

cdef extern from "Python.h":
    int Py_IsInitialized() nogil
    int PyGILState_Check() nogil
    int Py_AddPendingCall(int (*)(void*), void*) nogil

fr_failpoints_here = failpoints()
fr_leases_watch_forks()


cdef void drop_lease(fr_lease* lease) noexcept nogil:
    """Let one user of a lease go; any thread, with or without the interpreter lock."""
    fr_lease_drop(lease)


cdef Lease lease_of_own(char* start, uint64_t size_bytes, void (*give)(void*, uint64_t) noexcept nogil):
    """A lease of memory that is the lease's from here on, and ``give``'s after it."""
    cdef Lease lease = Lease.__new__(Lease)
    lease.lease = fr_lease_own(start, size_bytes, give)
    if lease.lease == NULL:
        give(start, size_bytes)
        raise MemoryError()
    lease.start, lease.size_bytes = start, size_bytes
    return lease


cdef enum:
    REFUSED = 1 << 30       # no call could be arranged for what is counted beside it

cdef struct Borrowed:       # what keeps a PeerArena, and is kept by it
    fr_leases leases
    PyObject* arena
    uint64_t unneeded       # references that leases held and need no more, for the interpreter to take back


cdef int _let_go(void* keeper) noexcept:
    """With the interpreter lock: what leases needed is not needed any more, as often as was said meanwhile."""
    cdef Borrowed* borrowed = <Borrowed*>keeper
    cdef PyObject* arena = borrowed.arena
    cdef uint64_t count = fr_exchange(&borrowed.unneeded, 0)  # SYNC: who counts from here on arranges another call
    for _ in range(count):
        Py_DECREF(<object>arena)  # with the last one all of this may go
    return 0


cdef void _let_go_held(void* keeper) noexcept with gil:
    Py_DECREF(<object>(<Borrowed*>keeper).arena)


cdef void _emptied(void* keeper) noexcept nogil:
    cdef uint64_t* unneeded = &(<Borrowed*>keeper).unneeded
    cdef uint64_t before
    if not Py_IsInitialized():
        return
    if PyGILState_Check():
        _let_go_held(keeper)
        return
    while True:
        before = fr_load_relaxed(unneeded)  # relaxed: the exchange looks again
        if fr_cas(unneeded, before, (before & ~<uint64_t>REFUSED) + 1):
            break
    # One call is under way at most; who did not arrange it touches nothing from here on, for it may be over already.
    if (before == 0 or before & REFUSED) and Py_AddPendingCall(_let_go, keeper):
        fr_or(unneeded, REFUSED)  # the next lease that ends tries again, else the mapping stays: no more than that


@cython.no_gc
cdef class Lease:
    """A block that a peer may not use again while this lives; a buffer, whose bytes are this process's own to change.

    Made by ``PeerArena.lease``.
    """

    cdef fr_lease* share(self) noexcept nogil:
        """One more user, for ``drop_lease`` to let go."""
        fr_lease_share(self.lease)
        return self.lease

    def __dealloc__(self):
        if self.lease != NULL:
            fr_lease_drop(self.lease)

    def __len__(self) -> int:
        return self.size_bytes

    def __getbuffer__(self, Py_buffer* view, int flags):
        PyBuffer_FillInfo(view, self, self.start, self.size_bytes, False, flags)


@cython.no_gc  # as Holder, which it refers to: leases end when they end
cdef class PeerArena:
    """Read and lease blocks that a peer lends.

    Parameters
    ----------
    memory : buffer
        All addresses of the peer's arena; its files are mapped there read-only.
    private : buffer, optional
        The same, with the files mapped copy-on-write. Without it nothing is leased.
    holder : Holder, optional
        What this process holds of the peer's table. Without it nothing is leased.
    look : callable, optional
        ``look(has)`` reads what the peer has sent about its files until ``has()`` or nothing more comes. Without it there
        is one file, behind all addresses.
    """

    def __cinit__(self, memory, private=None, holder: Holder | None = None, look=None):
        cdef const unsigned char[::1] room = memory
        cdef unsigned char[::1] own
        cdef Borrowed* borrowed
        self._memory = memoryview(memory)
        self.base = <const char*>&room[0]
        self.size_bytes = room.shape[0]
        self._look = look
        if look is None:
            self.add_file(0, self.size_bytes)
        if private is None or holder is None or sysconf(_SC_PAGESIZE) != FR_PAGE:
            return
        own = private
        if own.shape[0] != self.size_bytes:
            raise ProtocolError(f"an arena of {self.size_bytes} bytes is mapped again with {own.shape[0]}")
        self._private, self._holder = memoryview(private), holder
        borrowed = <Borrowed*>calloc(1, sizeof(Borrowed))
        if borrowed == NULL:
            raise MemoryError()
        borrowed.arena = <PyObject*>self
        if not fr_leases_begin(&borrowed.leases, &holder.h, <char*>&own[0], self.size_bytes, errands(), _emptied, borrowed):
            free(borrowed)
            raise MemoryError()
        self.leases = borrowed

    def __dealloc__(self):
        if self.leases != NULL:
            fr_leases_end(<fr_leases*>self.leases)
            free(self.leases)
        free(self.parts)

    def belongs_to(self, rank: int, bits: int, generations: range, unannounced=None) -> None:
        """Say whose it is, so that third workers can hand on what they have leased from it.

        Parameters
        ----------
        rank, bits, generations
            Of the owner, as in ``Peer``.
        unannounced : buffer of 4 bytes or None
            Where the owner says whether it has files that somebody was not told of yet.
        """
        cdef const unsigned char[::1] word
        self.owner, self.bits = rank, bits
        self.first_generation, self.generations = generations.start, len(generations)
        if unannounced is not None:
            word = unannounced
            self._word, self.unannounced = memoryview(unannounced), <const uint32_t*>&word[0]

    def add_file(self, offset: int, size_bytes: int) -> None:
        """Note that a file is mapped from ``offset`` on.

        Raises
        ------
        ProtocolError
            When it reaches beyond the addresses, or another is there already.
        """
        cdef uint64_t start = offset, size = size_bytes
        cdef int i
        if start > self.size_bytes or size > self.size_bytes - start:
            raise ProtocolError(f"a file of {size_bytes} bytes at {offset} is outside an arena of {self.size_bytes}")
        for i in range(self.part_count):
            if start < self.parts[i].end and self.parts[i].start < start + size:
                raise ProtocolError(f"a file of {size_bytes} bytes at {offset} lies where another one is")
        more = <Part*>realloc(self.parts, (self.part_count + 1) * sizeof(Part))
        if more == NULL:
            raise MemoryError()
        self.parts = more
        more[self.part_count].start, more[self.part_count].end = start, start + size
        self.part_count += 1

    def remove_file(self, offset: int) -> int:
        """Note that a file is about to be unmapped; returns its size.

        Raises
        ------
        ProtocolError
            When there is none, or something in it is still leased.
        """
        cdef int i
        cdef uint64_t size
        for i in range(self.part_count):
            if self.parts[i].start == <uint64_t>offset:
                size = self.parts[i].end - self.parts[i].start
                if self.leases != NULL and fr_leases_any(<fr_leases*>self.leases, offset, size):
                    raise ProtocolError(f"the file at {offset} is taken away while some of it is leased")
                self.part_count -= 1
                memmove(self.parts + i, self.parts + i + 1, (self.part_count - i) * sizeof(Part))
                return size
        raise ProtocolError(f"no file begins at {offset}")

    def covers(self, offset: int, size_bytes: int) -> bool:
        """Whether a range lies in a file that is mapped."""
        return self.has(offset, size_bytes)

    cdef bint has(self, uint64_t offset, uint64_t size_bytes) noexcept:
        cdef int i
        for i in range(self.part_count):
            if self.parts[i].start <= offset <= self.parts[i].end:
                if size_bytes <= self.parts[i].end - offset:
                    return True
        return False

    cdef bint finds(self, uint64_t offset, uint64_t size_bytes) except -1:
        """Whether a block lies in a file that is mapped. The peer may have sent one that nobody has read of: waits for it."""
        if self.has(offset, size_bytes):
            return True
        if offset > self.size_bytes or size_bytes > self.size_bytes - offset:
            raise ProtocolError(f"a block of {size_bytes} bytes at {offset} is outside an arena of {self.size_bytes}")
        if self._look is not None:
            self._look(partial(self.covers, offset, size_bytes))
        return self.has(offset, size_bytes)

    cdef int check(self, uint64_t offset, uint64_t size_bytes) except -1:
        if not self.finds(offset, size_bytes):
            raise ProtocolError(f"a block of {size_bytes} bytes at {offset} is outside the files of an arena of "
                                f"{self.size_bytes}")
        return 0

    cdef const char* borrow(self, uint64_t offset, uint64_t size_bytes) except NULL:
        """The bytes of a block whose sender still pins it."""
        self.check(offset, size_bytes)
        FR_FAILPOINT("arena.borrowed")
        return self.base + offset

    cdef Lease take(self, uint64_t offset, uint64_t size_bytes, uint32_t index, uint32_t generation, uint32_t site):
        """Lease a block whose sender still pins it; None when it has to be copied.

        ``site``: any number for the use of the block. Where blocks are written, those that follow are copied.
        """
        cdef Lease lease
        cdef int why, first
        if index == NO_ENTRY or self.leases == NULL:
            return None
        self.check(offset, size_bytes)
        lease = Lease.__new__(Lease)
        lease.lease = fr_lease_take(<fr_leases*>self.leases, offset, size_bytes, index, generation, site, &why, &first)
        if lease.lease == NULL:
            if why == 1:
                raise MemoryError()
            if why == 2:
                raise ProtocolError(f"a block comes with entry {index} of generation {generation}, which is not open")
            return None
        if first:
            Py_INCREF(self)
        lease.start, lease.size_bytes = <char*>(<fr_leases*>self.leases).base + offset, size_bytes
        return lease

    # ---- blocks that a third worker hands on

    cdef bint find(self, const char* start, uint64_t size_bytes, unsigned receiver, Place* place) noexcept nogil:
        """Whether bytes here are leased from this arena, unwritten, and ``receiver`` can lease them too: then where they lie."""
        cdef fr_leases* leases = <fr_leases*>self.leases
        if leases == NULL or <int>receiver >= self.bits or self.unannounced != NULL and fr_load32_acquire(self.unannounced):
            return False
        if not fr_lease_find(leases, start, size_bytes, &place.offset, &place.size, &place.index):
            return False
        place.inner = start - (leases.base + place.offset)
        place.generation = self._holder.h.held[place.index].generation  # held by the lease of what is sent
        place.owner, place.unused = self.owner, 0
        return True

    cdef bint pin(self, const Place* place) noexcept:
        """Hold a block that ``find`` has found, for a message."""
        return self._holder.take(place.index, place.generation) == FR_KEPT

    cdef int check_forwarded(self, const Place* place, uint64_t size_bytes) except -1:
        if place.inner > place.size or size_bytes > place.size - place.inner or place.index >= self._holder.h.at.capacity:
            raise ProtocolError(f"{size_bytes} bytes at {place.inner} of a block of {place.size} bytes with entry {place.index}")
        if place.generation - self.first_generation >= self.generations:
            raise ReferenceLost("memory that was handed on belonged to a worker that has left")
        self.check(place.offset, place.size)
        return 0

    cdef Lease take_forwarded(self, const Place* place, uint32_t site):
        """Lease a block that a third worker hands on, which pins it; None when it has to be copied."""
        self.check_forwarded(place, 0)
        if not self._holder.h.bit or fr_load32_acquire(&self._holder.h.at.descriptors[place.index].generation) != place.generation:
            return None
        return self.take(place.offset, place.size, place.index, place.generation, site)

    cdef int copy_forwarded(self, const Place* place, uint64_t size_bytes, char* target) except -1:
        """Copy bytes of a block that a third worker hands on.

        Also when its owner is dead, or has been cut off and uses the block again: then the generation of its entry, which
        we cannot hold any more, tells.
        """
        cdef const uint32_t* generation
        cdef bint held
        cdef int depth
        self.check_forwarded(place, size_bytes)
        generation = &self._holder.h.at.descriptors[place.index].generation
        held = self._holder.take_unpinned(place.index, place.generation) != FR_LOST
        depth = nogc_pause()
        with nogil:
            memcpy(target, self.base + place.offset + place.inner, size_bytes)
        nogc_resume(depth)
        fr_fence_acquire()  # SYNC: the bytes before the generation; pairs with the owner's new generation before new bytes
        lost = fr_load32_relaxed(<uint32_t*>generation) != place.generation
        if held:
            self._holder.drop_block(place.index)
        if lost:
            raise ReferenceLost("memory that was handed on is not held for this worker any more")
        return 0

    def view(self, offset: int, size_bytes: int) -> memoryview:
        """Return a read-only view of a block.

        Raises
        ------
        ProtocolError
            When it is not inside the arena.
        """
        if offset < 0 or size_bytes < 0:
            raise ProtocolError(f"a block of {size_bytes} bytes at {offset}")
        self.borrow(offset, size_bytes)
        return memoryview(self._memory).cast("B")[offset:offset + size_bytes].toreadonly()

    def lease(self, offset: int, size_bytes: int, index: int, generation: int, site: int = 0) -> Lease | None:
        """Lease a block whose sender still pins it; None when it can only be viewed, or had better be copied.

        Raises
        ------
        ProtocolError
            When the entry is not open.
        """
        return self.take(offset, size_bytes, index, generation, site)

    def detach(self) -> None:
        """Make what is leased now independent of the peer, page by page; nothing is leased from here on."""
        if self.leases != NULL:
            with nogil:
                fr_leases_detach(<fr_leases*>self.leases)

    def snapshot(self) -> dict:
        """Plain figures: leases that live, pages written under leases that have ended, leases that cannot end."""
        cdef fr_leases* leases = <fr_leases*>self.leases
        if leases == NULL:
            return dict(leases=0, pages_written=0, stuck=0)
        return dict(leases=leases.live, pages_written=leases.pages_written, stuck=leases.stuck)
