"""The lender's half of the shared carrier: blocks in memory that this process writes and its peers only map."""

from threading import RLock, Thread

from libc.stdint cimport int64_t, uint32_t, uint64_t
from libc.string cimport memcpy

from fastref._core cimport FR_FAILPOINT, FR_FAILS, Holder, failpoints, fr_failpoints_here

from fastref.errors import ResourceError, UsageError

__all__ = ["Arena"]

fr_failpoints_here = failpoints()

cdef extern from "fr_arena.h" nogil:
    enum:
        FR_LENT, FR_WANTS_COMMIT, FR_WANTS_FILE, FR_OVER_LIMIT, FR_NO_MEMORY
    int fr_arena_begin(fr_arena*, uint64_t, uint64_t)
    void fr_arena_end(fr_arena*)
    int fr_arena_lend(fr_arena*, uint64_t, uint64_t*, fr_need*)
    int fr_arena_hold(fr_arena*, uint64_t)
    int fr_arena_give_back(fr_arena*, uint64_t, int)
    uint64_t fr_arena_lent_bytes(fr_arena*, uint64_t)
    int fr_file_plan(fr_arena*, uint64_t, int, fr_file**)
    void fr_file_open(fr_arena*, fr_file*)
    void fr_file_forget(fr_arena*, fr_file*)
    void fr_file_committed(fr_arena*, fr_file*, uint64_t)
    fr_file* fr_file_retire(fr_arena*, int64_t, int64_t)
    uint64_t fr_file_ahead(fr_arena*, fr_file*, uint64_t, fr_need*)
    void fr_file_keep(fr_arena*, fr_file*)
    void fr_file_release(fr_arena*, fr_file*)
    uint64_t fr_file_next_cold(fr_arena*, fr_file*, uint64_t, uint64_t, uint64_t*)
    void fr_file_populated(fr_arena*, fr_file*, uint64_t)

cdef extern from "sys/mman.h" nogil:
    int madvise(void*, size_t, int)

cdef enum:
    POPULATE_WRITE = 23     # MADV_POPULATE_WRITE of Linux 5.14; before, pages come when they are touched
    WARM_STEP = 1024        # pages populated at once
    WARM_LEAST = 16         # for fewer pages a system call costs more than it saves
    AHEAD_LEAST = 256       # pages of a block that has others like it made warm ahead,
    AHEAD_MOST = 32768      # and how many at most


cdef class Arena:
    """Lend blocks of this process's shared memory.

    The memory is a range of addresses in which files come and go, so that what is not used any more can be given back to
    the system. Who maps it learns of a file before any block in it is lent.

    Parameters
    ----------
    memory : writable buffer
        All addresses. Without ``files`` there is memory behind all of them.
    files : object, optional
        ``add(offset, size_bytes)`` makes a file there, whose memory is not made sure of yet; ``commit(offset, size_bytes)``
        makes sure of the memory of a range before it is touched. Either may raise ``ResourceError``. ``make_room()`` is
        called at the limit: True when it has retired a file.
    holder : Holder, optional
        What this process holds of its own table; for blocks that peers lease.
    limit : int
        Bytes that may be committed at once; 0: as many as there are addresses.
    first : int
        Bytes of a file that is there from the beginning, and stays; 0: all of ``memory``.
    """

    def __cinit__(self, memory, files=None, holder: Holder | None = None, limit: int = 0, first: int = 0):
        cdef unsigned char[::1] room = memory
        cdef uint64_t span = room.shape[0] // FR_ARENA_PAGE
        self._memory = memoryview(memory)
        self.base = <char*>&room[0]
        self._files, self._holder = files, holder
        self._growing = RLock()
        self._pinned, self._entries, self._retiring = {}, {}, {}
        if not fr_arena_begin(&self.blocks, span, min(limit // FR_ARENA_PAGE, span) if limit else span):
            raise MemoryError()
        if span:
            self._plan(first // FR_ARENA_PAGE if first else span, True)

    def __dealloc__(self):
        fr_arena_end(&self.blocks)

    cpdef uint64_t lend(self, uint64_t size_bytes) except? 0xFFFFFFFFFFFFFFFF:
        """Return the offset of a block of at least ``size_bytes``, for the caller to fill.

        A multiple of 64; of 4096 when the block has more than 32 KiB.

        Raises
        ------
        ResourceError
            When the arena's limit is reached or the system has no memory for it.
        """
        cdef uint64_t offset
        cdef fr_need need
        if FR_FAILS("arena.lending"):
            raise ResourceError(f"a failpoint refuses a block of {size_bytes} bytes")
        cdef int what = fr_arena_lend(&self.blocks, size_bytes, &offset, &need)
        if what != FR_LENT:
            if what == FR_WANTS_COMMIT:
                fr_file_release(&self.blocks, need.file)  # another thread may be committing it: look again under the lock
            self._grow(size_bytes, &offset, &need)
        if need.cold_pages >= WARM_LEAST:
            self._warm(&need)
        FR_FAILPOINT("arena.lent")
        return offset

    cdef int _grow(self, uint64_t size_bytes, uint64_t* offset, fr_need* need) except -1:
        """Lend a block for which there is more to be had from the system first.

        A destructor that lends a block may run in the midst of this, on the same thread: nothing is left half done where
        Python runs.
        """
        cdef fr_file* file
        cdef uint64_t start, pages
        with self._growing:
            while True:
                what = fr_arena_lend(&self.blocks, size_bytes, offset, need)
                if what == FR_LENT:
                    return 0
                if what == FR_WANTS_COMMIT:
                    file, start, pages = need.file, need.start, need.pages
                    try:
                        if self._files is not None:
                            self._files.commit(start * FR_ARENA_PAGE, pages * FR_ARENA_PAGE)
                        fr_file_committed(&self.blocks, file, start + pages)
                    finally:
                        fr_file_release(&self.blocks, file)
                elif what == FR_WANTS_FILE and self._files is not None:
                    if self._plan(need.pages, False) == FR_OVER_LIMIT:
                        raise self._full(size_bytes)
                elif what == FR_NO_MEMORY:
                    raise MemoryError()
                elif self._files is None or not self._files.make_room():
                    raise self._full(size_bytes)

    cdef object _full(self, uint64_t size_bytes):
        return ResourceError(f"an arena of {self.limit} bytes has no room for a block of {size_bytes}; "
                             f"{self.bytes_lent} bytes are lent now")

    cdef int _plan(self, uint64_t pages, bint exactly) except -1:
        """Have a file in which blocks of so many pages fit, or one of that size."""
        cdef fr_file* file
        cdef int what = fr_file_plan(&self.blocks, pages, exactly, &file)
        if what == FR_NO_MEMORY:
            raise MemoryError()
        if what == FR_LENT:
            try:
                if not exactly:
                    self._files.add(file.start * FR_ARENA_PAGE, <uint64_t>file.pages * FR_ARENA_PAGE)
            except BaseException:
                if self._files.has(file.start * FR_ARENA_PAGE):  # what was raised came from a signal's handler
                    fr_file_open(&self.blocks, file)
                else:
                    fr_file_forget(&self.blocks, file)
                raise
            fr_file_open(&self.blocks, file)
        return what

    cpdef int give_back(self, uint64_t offset) except -1:
        """Take a block back: nobody reads it any more, except who has leased it and holds its entry.

        Raises
        ------
        UsageError
            When no such block is lent.
        """
        index = self._pinned.pop(offset, None) if self._pinned else None
        if index is not None:
            self._holder.drop_block(index)  # whoever holds it last has the entry closed, and `closed` called
        elif not fr_arena_give_back(&self.blocks, offset, False):
            raise UsageError(f"no block is lent at {offset}")
        FR_FAILPOINT("arena.given_back")
        return 0

    def pin(self, offset: int, index: int) -> None:
        """Have a block live as long as a table entry that the caller holds; ``give_back`` lets go of that hold."""
        self.keep_for(offset, index)
        self._pinned[offset] = index
        FR_FAILPOINT("arena.pinned")

    def keep_for(self, offset: int, index: int) -> None:
        """Have a block live as long as a table entry that is held anyway."""
        if not fr_arena_hold(&self.blocks, offset):
            raise UsageError(f"no block is lent at {offset}")
        self._entries[index] = offset

    def closed(self, index: int) -> None:
        """Take back the block of a table entry that nobody holds any more, if it has one."""
        offset = self._entries.pop(index, None)
        if offset is not None:
            fr_arena_give_back(&self.blocks, offset, True)

    def fill(self, offset: int, data) -> None:
        """Copy bytes into a block that is lent."""
        cdef const unsigned char[::1] source = data
        if source.shape[0] > <Py_ssize_t>fr_arena_lent_bytes(&self.blocks, offset):
            raise UsageError(f"{source.shape[0]} bytes do not fit in a block lent at {offset}")
        if source.shape[0]:
            memcpy(self.base + <uint64_t>offset, &source[0], source.shape[0])

    # ---- memory that nobody uses

    def retire(self, now_ns: int, patience_ns: int) -> tuple[int, int] | None:
        """Lend nothing more from a file of which nothing has been lent for ``patience_ns``: (offset, bytes) of it, or None.

        Meant to be called every now and then; a file counts as idle from the first call that finds it so.
        """
        cdef fr_file* file = fr_file_retire(&self.blocks, now_ns, patience_ns)
        if file == NULL:
            return None
        offset = file.start * FR_ARENA_PAGE
        self._retiring[offset] = <size_t>file
        return offset, <uint64_t>file.pages * FR_ARENA_PAGE

    def forget(self, offset: int) -> None:
        """Count a retired file as given back: nobody maps it any more, and its addresses may be used again."""
        fr_file_forget(&self.blocks, <fr_file*><size_t>self._retiring.pop(offset))

    # ---- warm pages

    cdef int _warm(self, fr_need* cold) except -1:
        """Touch the pages of a block that nobody has touched yet, all in one go, and have the next block found warm."""
        cdef char* start = self.base + cold.cold * FR_ARENA_PAGE
        cdef uint64_t pages = cold.cold_pages
        cdef fr_file* file = cold.file
        with nogil:
            madvise(start, pages * FR_ARENA_PAGE, POPULATE_WRITE)
        if pages < AHEAD_LEAST or self._files is None or self._warmer is not None or self._ended:
            return 0
        cdef fr_need need
        cdef uint64_t end = fr_file_ahead(&self.blocks, file, min(pages, <uint64_t>AHEAD_MOST), &need)
        if not end:
            return 0
        fr_file_keep(&self.blocks, file)
        self._warmer = Thread(target=self._warm_ahead, args=(<size_t>file, end, need.start, need.pages),
                              name="fastref-warmer", daemon=True)
        try:
            self._warmer.start()
        except RuntimeError:  # no thread to be had, or the interpreter ends: the next block is as cold as this one
            fr_file_release(&self.blocks, file)
            self._warmer = None
        return 0

    def _warm_ahead(self, which: int, end: int, start: int, missing: int) -> None:
        """Make sure of pages and touch them. On a thread of its own, which ends with it."""
        cdef fr_file* file = <fr_file*><size_t>which
        cdef uint64_t at, pages, until = end
        try:
            if missing:
                with self._growing:
                    if file.start + file.committed == start:
                        self._files.commit(start * FR_ARENA_PAGE, missing * FR_ARENA_PAGE)
                        fr_file_committed(&self.blocks, file, start + missing)
            while not self._ended:
                with nogil:
                    pages = fr_file_next_cold(&self.blocks, file, until, WARM_STEP, &at)
                    if pages and madvise(self.base + at * FR_ARENA_PAGE, pages * FR_ARENA_PAGE, POPULATE_WRITE):
                        pages = 0  # the system does not know it, or has no memory
                    if pages:
                        fr_file_populated(&self.blocks, file, at + pages)
                if not pages:
                    break
                self._populated += pages
        except ResourceError:
            pass  # nothing is done ahead where memory is short
        finally:
            fr_file_release(&self.blocks, file)
            self._warmer = None

    def end(self) -> None:
        """Do nothing ahead any more. What is lent stays."""
        self._ended = True
        warmer = self._warmer
        if warmer is not None and warmer.ident is not None:
            warmer.join()

    # ---- figures

    @property
    def limit(self) -> int:
        """Bytes that may be committed at once."""
        return self.blocks.limit * FR_ARENA_PAGE

    @property
    def bytes_lent(self) -> int:
        """Bytes of all blocks that are lent or held."""
        return self.blocks.lent

    @property
    def growing(self):
        """Held while a file is made: who knows the files under it knows all of them."""
        return self._growing

    def snapshot(self) -> dict:
        """Plain figures: bytes that may be committed; files, and bytes committed in them; of these, bytes that are being
        given back, which do not count for the limit; blocks and bytes lent; bytes given back, and populated ahead, so far.
        """
        return dict(limit=self.limit, committed=self.blocks.committed * FR_ARENA_PAGE, files=self.blocks.files,
                    retiring=self.blocks.leaving * FR_ARENA_PAGE, blocks=self.blocks.blocks, bytes_lent=self.blocks.lent,
                    given_back=self.blocks.given_back * FR_ARENA_PAGE, populated_ahead=self._populated * FR_ARENA_PAGE)
