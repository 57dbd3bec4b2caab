"""Ids, fork data and the reference table: what an RRef is made of, safe from any thread and process.

Nothing here opens, maps or starts anything: the table works on memory that it is given.
"""

from collections import deque

cimport cython
from cpython.bytes cimport PyBytes_FromStringAndSize
from libc.errno cimport errno
from libc.stdint cimport UINT32_MAX
from libc.stdlib cimport calloc, free, getenv
from libc.string cimport memcpy, memset

from operator import index as index_of

from fastref.errors import IdsExhausted, ProtocolError, ReferenceLost, UsageError

__all__ = ["IdGenerator", "GloballyUniqueId", "ForkData", "Holder", "MirrorHolder", "ReferenceTable", "PinQueue", "table_sizes",
           "arm_failpoints", "failpoint", "failpoint_passages", "BITS"]

cdef uint64_t COUNT_BITS = 48
cdef uint64_t COUNT_MASK = (<uint64_t>1 << 48) - 1
BITS = FR_TABLE_PEERS

cdef enum:
    PHASE_FREE = 0
    PHASE_USED = 1
    PHASE_CLOSING = 2
    PHASE_RETIRED = 3

_PHASES = ("free", "used", "closing", "retired")
_STATES = ("pending", "ready", "failed")

cdef fr_failpoints _failpoints
_failpoints.count = 0


cdef fr_failpoints* failpoints() noexcept nogil:
    return &_failpoints


def arm_failpoints(text: str | None) -> int:
    """Arm the failpoints named in ``text``, as in ``FASTREF_FAILPOINTS``; returns how many are armed.

    Raises
    ------
    UsageError
        When the text cannot be understood.
    """
    encoded = (text or "").encode()
    armed = fr_failpoints_parse(&_failpoints, encoded)
    if armed < 0:
        raise UsageError(f"cannot understand FASTREF_FAILPOINTS={text!r}; expected name=kill:N;name=stop:S;"
                         "name=delay:S;name=fail:N")
    return armed


def failpoint(name: str) -> None:
    """Mark a place in Python code at which a test may kill, stop or delay the process."""
    cdef const char* place
    if _failpoints.count:
        encoded = name.encode()
        place = encoded
        with nogil:
            FR_FAILPOINT(place)


def failpoint_passages() -> dict:
    """Return how often each armed failpoint has been passed since it was armed."""
    return {_failpoints.point[i].name.decode(): _failpoints.point[i].passed for i in range(_failpoints.count)}


fr_failpoints_here = failpoints()
if getenv(b"FASTREF_FAILPOINTS") != NULL:
    arm_failpoints(getenv(b"FASTREF_FAILPOINTS").decode())


cdef class IdGenerator:
    """Mint the ids of one worker: 16 bits of worker, 48 bits of counter.

    Parameters
    ----------
    worker : int
        Rank of the worker, 0 <= worker < 2**16.
    start : int
        First counter value, 0 <= start <= 2**48.
    """

    def __cinit__(self, worker: int, start: int = 0):
        worker, start = index_of(worker), index_of(start)
        if not 0 <= worker < 1 << 16:
            raise UsageError(f"worker must be in [0, 65536), got {worker}")
        if not 0 <= start <= 1 << 48:
            raise UsageError(f"start must be in [0, 2**48], got {start}")
        self._prefix = <uint64_t>worker << COUNT_BITS
        self._count = start

    cpdef uint64_t next(self) except? 0xFFFFFFFFFFFFFFFF:
        """Return a fresh id: worker << 48 | count. Callable from any thread.

        Raises
        ------
        IdsExhausted
            After 2**48 ids. Ids are never used twice.
        """
        # relaxed: uniqueness is all we need; the id publishes no other data.
        cdef uint64_t count = fr_add_relaxed(&self._count, 1)
        if count > COUNT_MASK:
            fr_store_relaxed(&self._count, COUNT_MASK + 1)
            raise IdsExhausted(f"worker {self._prefix >> COUNT_BITS} minted 2**48 ids")
        return self._prefix | count

    @property
    def minted(self) -> int:
        """How many ids exist so far."""
        return min(fr_load_relaxed(&self._count), COUNT_MASK + 1)


cdef class GloballyUniqueId:
    """Name of a reference or a fork in the whole job.

    Parameters
    ----------
    created_on : int
        Rank of the worker that minted it, 0 <= created_on < 2**16.
    local_id : int
        Number on that worker, 0 <= local_id < 2**48.
    """

    def __cinit__(self, created_on: int, local_id: int):
        if not 0 <= created_on < 1 << 16:
            raise UsageError(f"created_on must be in [0, 65536), got {created_on}")
        if not 0 <= local_id < 1 << 48:
            raise UsageError(f"local_id must be in [0, 2**48), got {local_id}")
        self.created_on = created_on
        self.local_id = local_id

    def __eq__(self, other) -> bool:
        if not isinstance(other, GloballyUniqueId):
            return NotImplemented
        return (self.created_on == (<GloballyUniqueId>other).created_on
                and self.local_id == (<GloballyUniqueId>other).local_id)

    def __hash__(self) -> int:
        return hash((self.created_on, self.local_id))

    def __repr__(self) -> str:
        return f"GloballyUniqueId(created_on={self.created_on}, local_id={self.local_id})"

    def __reduce__(self) -> tuple:
        return (GloballyUniqueId, (self.created_on, self.local_id))


cdef class ForkData:
    """What travels when a reference is handed on: torch's seven fields, and the table entry for peers of the host.

    Parameters
    ----------
    owner : int
        Rank of the owner.
    rref_id, fork_id : GloballyUniqueId
        Name of the reference and of this fork of it.
    parent : int
        Rank of the worker that made the fork.
    type_str : str
        Type of the value, "PyObject" unless it is a TorchScript type.
    entry : tuple of (index, generation) or None
        Where the owner's table keeps it.
    """

    def __init__(self, owner: int, rref_id: GloballyUniqueId, fork_id: GloballyUniqueId, parent: int,
                 type_str: str = "PyObject", entry: tuple | None = None):
        if not 0 <= owner < 1 << 16 or not 0 <= parent < 1 << 16:
            raise UsageError(f"owner and parent must be in [0, 65536), got {owner} and {parent}")
        memset(&self.data, 0, sizeof(fr_fork))
        self.data.owner = owner
        self.data.parent = parent
        self.data.rref_created_on, self.data.rref_local = rref_id.created_on, rref_id.local_id
        self.data.fork_created_on, self.data.fork_local = fork_id.created_on, fork_id.local_id
        self.type_str = type_str
        try:
            encoded = b"" if type_str == "PyObject" else type_str.encode()
        except UnicodeEncodeError as error:
            raise UsageError(f"a type string is text, got {type_str!r}") from error
        if not type_str or len(encoded) > 65535:
            raise UsageError(f"a type string has 1 to 65535 bytes, got {len(encoded)}")
        self.data.type_size = len(encoded)
        if entry is not None:
            try:
                self.data.index, self.data.generation = entry
            except (OverflowError, TypeError, ValueError) as error:
                raise UsageError(f"an entry is an index and a generation of 32 bits each, got {entry!r}") from error
            self.data.has_entry = 1

    @property
    def owner(self) -> int:
        return self.data.owner

    @property
    def parent(self) -> int:
        return self.data.parent

    @property
    def rref_id(self) -> GloballyUniqueId:
        return GloballyUniqueId(self.data.rref_created_on, self.data.rref_local)

    @property
    def fork_id(self) -> GloballyUniqueId:
        return GloballyUniqueId(self.data.fork_created_on, self.data.fork_local)

    @property
    def entry(self) -> tuple | None:
        return (self.data.index, self.data.generation) if self.data.has_entry else None

    def as_tuple(self) -> tuple:
        """Return torch's 7-tuple (owner, rref.created_on, rref.local_id, fork.created_on, fork.local_id, parent, type)."""
        return (self.data.owner, self.data.rref_created_on, self.data.rref_local, self.data.fork_created_on,
                self.data.fork_local, self.data.parent, self.type_str)

    def pack(self) -> bytes:
        """Return the bytes that ``unpack`` reads: a fixed part and the type string."""
        fixed = PyBytes_FromStringAndSize(<char*>&self.data, sizeof(fr_fork))
        return fixed + (self.type_str.encode() if self.data.type_size else b"")

    @staticmethod
    def unpack(data: bytes) -> ForkData:
        """Read what ``pack`` made.

        Raises
        ------
        ProtocolError
            When the bytes are not such a record.
        """
        cdef ForkData self = ForkData.__new__(ForkData)
        cdef const char* start = data
        if len(data) < <Py_ssize_t>sizeof(fr_fork):
            raise ProtocolError(f"fork data has {len(data)} bytes, fewer than {sizeof(fr_fork)}")
        memcpy(&self.data, start, sizeof(fr_fork))
        if len(data) != <Py_ssize_t>(sizeof(fr_fork) + self.data.type_size):
            raise ProtocolError(f"fork data has {len(data)} bytes but speaks of {sizeof(fr_fork) + self.data.type_size}")
        if self.data.rref_local > COUNT_MASK or self.data.fork_local > COUNT_MASK or self.data.has_entry > 1:
            raise ProtocolError("fork data with an id beyond 48 bits or an entry flag that is none")
        try:
            self.type_str = data[sizeof(fr_fork):].decode() if self.data.type_size else "PyObject"
        except UnicodeDecodeError as error:
            raise ProtocolError("fork data with a type string that is not text") from error
        return self

    def __eq__(self, other) -> bool:
        if not isinstance(other, ForkData):
            return NotImplemented
        return self.as_tuple() == other.as_tuple() and self.entry == other.entry

    def __hash__(self) -> int:
        return hash((self.as_tuple(), self.entry))

    def __repr__(self) -> str:
        return f"ForkData(owner={self.owner}, rref_id={self.rref_id}, fork_id={self.fork_id}, parent={self.parent}, " \
               f"type_str={self.type_str!r}, entry={self.entry})"


def table_sizes(capacity: int) -> tuple:
    """Return (bytes of the hold region, bytes of the descriptor region) for a table of ``capacity`` entries."""
    if capacity <= 0 or capacity % 64 or capacity > 1 << 24:
        raise UsageError(f"a table has a multiple of 64 entries, at most 2**24, got {capacity}")
    return (FR_HOLD_OFFSET + capacity * 8 + capacity // 8, capacity * sizeof(fr_descriptor))


cdef int _regions_at(fr_regions* at, object hold, object descriptors, uint32_t capacity, object keep) except -1:
    """Point at the regions in two buffers; ``keep`` gets the views that keep them mapped."""
    cdef unsigned char[::1] words = hold
    cdef const unsigned char[::1] values = descriptors
    needed = table_sizes(capacity)
    if words.shape[0] < needed[0] or values.shape[0] < needed[1]:
        raise ProtocolError(f"table regions of {words.shape[0]} and {values.shape[0]} bytes are too small for {capacity} entries")
    keep.append(memoryview(hold))
    keep.append(memoryview(descriptors))
    at.hint = <uint64_t*>&words[0]
    at.hold = <uint64_t*>(&words[0] + FR_HOLD_OFFSET)
    at.dirty = <uint64_t*>(&words[0] + FR_HOLD_OFFSET + <size_t>capacity * 8)
    at.descriptors = <fr_descriptor*>&values[0]
    at.capacity = capacity
    return 0


# Not seen by the garbage collector: it would let go of the memory that the regions lie in before the handles that end in
# the same collection have written to it. Nothing in here refers back, so no cycle is missed.
@cython.no_gc
cdef class Holder:
    """What one process holds of one owner's table: private counts beside one bit in each shared word.

    Parameters
    ----------
    hold : buffer
        The owner's hold region, writable.
    descriptors : buffer
        The owner's descriptors; read only.
    capacity : int
        Entries in the table.
    peer : int or None
        Which peer of the owner this process is, 0 <= peer < 61. None: it has no bit and goes by messages.
    bell : writable buffer or None
        The owner's, to be rung when a value has lost its last holder. None: the owner looks when it likes.
    """

    def __cinit__(self, hold, descriptors, capacity: int, peer=None, bell=None):
        self._regions = []
        self.ring_at(bell)
        self.epitaph = None
        _regions_at(&self.h.at, hold, descriptors, capacity, self._regions)
        if peer is not None and not 0 <= peer < BITS:
            raise UsageError(f"a table names peers 0 to {BITS - 1}, got {peer}")
        self.h.bit = 0 if peer is None else <uint64_t>1 << peer
        self.gone = deque()
        self.h.held = <fr_held*>calloc(capacity, sizeof(fr_held))
        if self.h.held == NULL:
            raise MemoryError()
        pthread_mutex_init(&self.h.lock, NULL)

    def __dealloc__(self):
        if self.h.held != NULL:
            free(self.h.held)
            pthread_mutex_destroy(&self.h.lock)

    cdef int ring_at(self, object bell) except -1:
        cdef unsigned char[::1] memory = bell
        if bell is not None:
            if memory.shape[0] < <Py_ssize_t>sizeof(fr_bell):
                raise ProtocolError(f"a bell in {memory.shape[0]} bytes")
            self._regions.append(memoryview(bell))
            self.bell = <fr_bell*>&memory[0]
        return 0

    cdef int take(self, uint32_t index, uint32_t generation) noexcept nogil:
        if index >= self.h.at.capacity:
            return FR_LOST
        return fr_holder_acquire(&self.h, index, generation)

    cdef int take_unpinned(self, uint32_t index, uint32_t generation) noexcept nogil:
        if index >= self.h.at.capacity:
            return FR_LOST
        return fr_holder_acquire_unpinned(&self.h, index, generation)

    cdef int drop(self, uint32_t index) noexcept:
        """Let one count of a value go. The owner lets go of the value soon if it was the last of all."""
        cdef int result = self.drop_block(index)
        if result == FR_LAST_FLAGGED and self.bell != NULL:
            fr_hurry(&self.h.at, self.bell)
        return result

    cdef int drop_block(self, uint32_t index) noexcept:
        """Let one count go; without a bit, note when it was the last: the owner has to be told."""
        cdef uint32_t generation
        cdef int result
        if index >= self.h.at.capacity:
            return FR_LOST
        generation = self.h.held[index].generation  # does not change while we have a count
        result = fr_holder_release(&self.h, index)
        if not self.h.bit and result == FR_LAST:
            self.gone.append((index, generation))
        return result

    cdef bint has(self, uint32_t index) noexcept nogil:
        return index < self.h.at.capacity and self.h.held[index].count != 0

    def acquire(self, index: int, generation: int) -> bool:
        """Take one more handle while somebody's pin keeps the entry open; True if it is this process's first.

        Raises
        ------
        ReferenceLost
            When the process already holds a newer generation of the entry.
        """
        return self._taken(self.take(self._checked(index), generation), index, generation)

    def acquire_unpinned(self, index: int, generation: int) -> bool:
        """Take one more handle with nobody known to hold the entry: it may be too late.

        Raises
        ------
        ReferenceLost
            When the entry was closed or reused; the word is left as it was found.
        """
        return self._taken(self.take_unpinned(self._checked(index), generation), index, generation)

    def adopt(self, index: int, generation: int) -> None:
        """Note a first handle on an entry that the owner opened with this process's bit set."""
        fr_holder_adopt(&self.h, self._checked(index), generation)

    def release(self, index: int) -> bool:
        """Let one handle go; True if it was this process's last.

        Raises
        ------
        UsageError
            When this process holds no handle on the entry.
        """
        result = self.drop(self._checked(index))
        if result == FR_LOST:
            raise UsageError(f"entry {index} is not held by this process")
        return result != FR_KEPT

    def count(self, index: int) -> int:
        """Handles and pins of this process on the entry."""
        return self.h.held[self._checked(index)].count

    def generation(self, index: int) -> int:
        """Generation the owner's descriptor shows now."""
        return fr_load32_acquire(&self.h.at.descriptors[self._checked(index)].generation)

    def state(self, index: int) -> str:
        """What the owner's descriptor says of the value: "pending", "ready" or "failed"."""
        state = fr_load32_acquire(&self.h.at.descriptors[self._checked(index)].state)
        if state > FR_VALUE_FAILED:
            raise ProtocolError(f"descriptor {index} is in state {state}, which is none")
        return _STATES[state]

    def published(self, index: int) -> tuple | None:
        """What the owner has published of an entry, for tests and tools.

        Returns
        -------
        tuple or None
            (form, flags, size in bytes, the data or (offset, entry, generation) of the block); None while holders ask.

        Raises
        ------
        ProtocolError
            When the owner stands still in the middle of a change.
        """
        cdef fr_published seen
        if not fr_descriptor_read(&self.h.at.descriptors[self._checked(index)], &seen):
            raise ProtocolError(f"descriptor {index} is being changed, and stays so")
        if seen.form == FR_FORM_INLINE:
            return "inline", seen.flags, seen.size, PyBytes_FromStringAndSize(<char*>seen.words, min(seen.size, FR_INLINE_VALUE))
        if seen.form == FR_FORM_BLOCK:
            return "block", seen.flags, seen.size, (seen.block.offset, seen.block.index, seen.block.generation)
        return None

    def pending(self) -> int:
        """Count the entries held here whose value is not there yet."""
        cdef uint32_t index
        cdef int count = 0
        with nogil:
            for index in range(self.h.at.capacity):
                if self.h.held[index].count and \
                        fr_load32_acquire(&self.h.at.descriptors[index].state) == FR_VALUE_PENDING:
                    count += 1
        return count

    def let_all_go(self) -> None:
        """Let every handle and pin of this process go at once; those that are let go of one by one afterwards count not."""
        cdef uint32_t index
        for index in range(self.h.at.capacity):
            while self.h.held[index].count:
                self.drop(index)

    def retire(self) -> None:
        """Let everything go, and write to no word of the owner from here on: the bit may come to be another worker's."""
        self.let_all_go()
        pthread_mutex_lock(&self.h.lock)
        self.h.bit = 0  # what is taken from here on is counted and told to nobody
        pthread_mutex_unlock(&self.h.lock)

    @property
    def entries_held(self) -> int:
        """Entries on which this process has a handle or pin."""
        return self.h.entries_held

    cdef uint32_t _checked(self, index) except? 0xFFFFFFFF:
        if not 0 <= index < self.h.at.capacity:
            raise ProtocolError(f"entry {index} is outside the table of {self.h.at.capacity}")
        return index

    cdef bint _taken(self, int result, index, generation) except -1:
        if result == FR_LOST:
            raise ReferenceLost(f"entry {index} generation {generation} is gone")
        return result == FR_FIRST


@cython.no_gc  # as Holder
cdef class MirrorHolder(Holder):
    """What one process holds of the table of an owner with whom it shares no memory.

    It has no bit there, and the two regions are its own: what the owner has said of its values is shown there, for whoever
    would look into the owner's otherwise.

    Parameters
    ----------
    hold, descriptors : writable buffers
        Zeroed, of the sizes that ``table_sizes`` says.
    capacity : int
        Entries in the owner's table.
    """

    def note(self, index: int, generation: int, state: str) -> None:
        """Show what is known of an entry's value: "pending", "ready" or "failed"."""
        self.show(self._checked(index), generation, _STATES.index(state))

    cdef int show(self, uint32_t index, uint32_t generation, uint32_t state) except -1:
        """Note what is known of an entry."""
        cdef fr_descriptor* d = &self.h.at.descriptors[index]
        d.settled_ns = fr_now_ns()
        d.generation = generation
        fr_store32_release(&d.state, state)  # SYNC: as in the owner's own
        return 0


@cython.no_gc  # as Holder
cdef class ReferenceTable:
    """The owner's table: opens entries, closes those that nobody holds, takes the dead out.

    Parameters
    ----------
    hold, descriptors : writable buffers
        The two regions, zeroed, of the sizes that ``table_sizes`` says.
    capacity : int
        Entries, a multiple of 64.
    usable : int or None
        Entries whose memory is there already; ``extend`` adds more. All of them by default.
    generation_limit : int
        An entry is retired instead of reaching this generation.
    first_generation : int
        Of every entry, when it is opened for the first time.
    bell : writable buffer or None
        Our own, for the values that this process itself is the last to hold.
    """

    def __cinit__(self, hold, descriptors, capacity: int, usable=None, generation_limit: int = UINT32_MAX,
                  first_generation: int = 0, bell=None):
        self._regions = []
        memoryview(descriptors).cast("B")[0:0] = b""  # refuses read-only memory
        self.holder = Holder(hold, descriptors, capacity, None, bell)
        self.holder.h.bit = FR_BIT_OWNER
        self.at = self.holder.h.at
        self.generation_limit, self.first_generation = generation_limit, first_generation
        self.phase = <uint8_t*>calloc(capacity, 1)
        self.free_queue = <uint32_t*>calloc(capacity, sizeof(uint32_t))
        if self.phase == NULL or self.free_queue == NULL:
            raise MemoryError()
        pthread_mutex_init(&self.lock, NULL)
        self.extend(capacity if usable is None else usable)

    def __dealloc__(self):
        if self.phase != NULL:
            free(self.phase)
        if self.free_queue != NULL:
            free(self.free_queue)
            pthread_mutex_destroy(&self.lock)

    def extend(self, usable: int) -> None:
        """Make the entries below ``usable`` available; their memory must be there."""
        cdef uint32_t index, wanted
        if not 0 <= usable <= self.at.capacity:
            raise UsageError(f"the table has room for {self.at.capacity} entries, not {usable}")
        wanted = usable
        pthread_mutex_lock(&self.lock)
        for index in range(self.usable, wanted):
            if self.first_generation:  # else what is there is right, and the page need not be touched
                self.at.descriptors[index].generation = self.first_generation
            fr_store_release(&self.at.hold[index], FR_BIT_CLOSED)
            self._push_free(index)
        self.usable = max(self.usable, wanted)
        pthread_mutex_unlock(&self.lock)

    @property
    def capacity(self) -> int:
        """Entries that there is room for."""
        return self.at.capacity

    cdef void _push_free(self, uint32_t index) noexcept nogil:
        self.free_queue[(self.free_head + self.free_count) % self.at.capacity] = index
        self.free_count += 1

    cdef int64_t open_entry(self, uint64_t bit) noexcept nogil:
        """Open a free entry with one holder's bit set; -1 when there is none."""
        cdef uint32_t tries, index
        cdef int64_t found = -1
        cdef fr_descriptor* descriptor
        pthread_mutex_lock(&self.lock)
        for tries in range(self.free_count):
            index = self.free_queue[self.free_head]
            self.free_head = (self.free_head + 1) % self.at.capacity
            self.free_count -= 1
            descriptor = &self.at.descriptors[index]
            fr_store32_relaxed(&descriptor.form, FR_FORM_ASK)
            fr_store32_relaxed(&descriptor.state, FR_VALUE_PENDING)
            if fr_table_open(&self.at, index, bit):  # SYNC: the descriptor before the word
                self.phase[index] = PHASE_USED
                self.opened += 1
                found = index
                break
            self._push_free(index)  # a late visitor is still inside; it will take its bit back
        pthread_mutex_unlock(&self.lock)
        return found

    cdef bint needs_sweep(self) noexcept nogil:
        return fr_load_relaxed(self.at.hint) != 0

    def open(self) -> tuple | None:
        """Open an entry that the owner itself holds once: (index, generation), or None when none is free."""
        found = self.open_entry(FR_BIT_OWNER)
        if found < 0:
            return None
        generation = self.at.descriptors[found].generation
        fr_holder_adopt(&self.holder.h, found, generation)
        return (found, generation)

    def open_credits(self, peer: int | None, count: int) -> list:
        """Open up to ``count`` entries with a peer's bit set, for its future ``remote()`` calls.

        Parameters
        ----------
        peer : int or None
            The peer's place in the table; None for a peer that goes by messages (all of those share one bit).
        """
        if peer is not None and not 0 <= peer < BITS:
            raise UsageError(f"a table names peers 0 to {BITS - 1}, got {peer}")
        bit = FR_BIT_ABROAD if peer is None else <uint64_t>1 << peer
        credits = []
        for _ in range(count):
            found = self.open_entry(bit)
            if found < 0:
                break
            credits.append((found, self.at.descriptors[found].generation))
        return credits

    def mark_abroad(self, index: int) -> None:
        """Note that holders who go by messages exist. Somebody's pin keeps the entry open meanwhile."""
        fr_or(&self.at.hold[self.holder._checked(index)], FR_BIT_ABROAD)

    def clear_abroad(self, index: int) -> None:
        """Note that the last holder who goes by messages has let go."""
        if fr_table_clear(&self.at, self.holder._checked(index), FR_BIT_ABROAD):
            fr_flag_dirty(&self.at, index)

    def sweep(self) -> list:
        """Close every flagged entry that nobody holds and return them; the caller drops the values, then ``free``s."""
        cdef uint32_t word, index
        cdef uint64_t bits
        cdef list closed = []
        if not fr_exchange(self.at.hint, 0):  # SYNC: the hint before the bits
            return closed
        pthread_mutex_lock(&self.lock)
        words = (self.usable + 63) // 64
        pthread_mutex_unlock(&self.lock)
        for word in range(words):
            if not fr_load_relaxed(&self.at.dirty[word]):
                continue
            bits = fr_exchange(&self.at.dirty[word], 0)  # SYNC: the flag before the word
            for index in range(word * 64, word * 64 + 64):
                if bits & 1 and self._close(index):
                    closed.append(index)
                bits >>= 1
        return closed

    cdef bint _close(self, uint32_t index) noexcept nogil:
        cdef bint done = False
        pthread_mutex_lock(&self.lock)
        if self.phase[index] == PHASE_USED and fr_table_close(&self.at, index):
            self.phase[index] = PHASE_CLOSING
            # SYNC: CLOSED before the generation; pairs with a late visitor's OR before it reads the generation.
            fr_store32_release(&self.at.descriptors[index].generation, self.at.descriptors[index].generation + 1)
            self.closed += 1
            done = True
        pthread_mutex_unlock(&self.lock)
        FR_FAILPOINT("table.during_reap")
        return done

    def is_flagged(self) -> bool:
        """True when somebody has flagged an entry since the last sweep."""
        return self.needs_sweep()

    def free(self, index: int) -> None:
        """Make a closed entry available again, after its value has been dropped.

        Raises
        ------
        UsageError
            When the entry is not closed.
        """
        cdef uint32_t entry = self.holder._checked(index)
        cdef bint wrong = False
        FR_FAILPOINT("table.closed_not_freed")
        pthread_mutex_lock(&self.lock)
        if self.phase[entry] != PHASE_CLOSING:
            wrong = True
        elif self.at.descriptors[entry].generation >= self.generation_limit:
            self.phase[entry] = PHASE_RETIRED
            self.retired += 1
        else:
            self.phase[entry] = PHASE_FREE
            self._push_free(entry)
        pthread_mutex_unlock(&self.lock)
        if wrong:
            raise UsageError(f"entry {index} is {_PHASES[self.phase[entry]]}, not closing")

    def remove_peer(self, peer: int) -> int:
        """Take a dead peer's bit out of every word and flag all words in use that are zero then.

        Everything the dead peer published must have been acquired by the living before.

        Returns
        -------
        int
            Entries it held, credits among them.
        """
        cdef uint32_t index
        cdef uint64_t bit, held = 0
        if not 0 <= peer < BITS:
            raise UsageError(f"a table names peers 0 to {BITS - 1}, got {peer}")
        bit = <uint64_t>1 << <int>peer
        with nogil:
            for index in range(self.usable):
                if fr_load_relaxed(&self.at.hold[index]) & bit:
                    held += 1
                    fr_table_clear(&self.at, index, bit)
                    FR_FAILPOINT("table.peer_half_removed")
                # Flagged or not: its owner may have died between its AND and its flag.
                if fr_load_acquire(&self.at.hold[index]) == 0:
                    fr_flag_dirty(&self.at, index)
        return held

    cdef void publish(self, uint32_t index, fr_published* now) noexcept nogil:
        """Let every holder read an encoded value, instead of what was published before; one caller at a time."""
        fr_descriptor_write(&self.at.descriptors[index], now)
        fr_store32_release(&self.at.descriptors[index].state, FR_VALUE_READY)  # SYNC: the value before READY

    def publish_inline(self, index: int, data: bytes, flags: int = 0) -> bool:
        """Let every holder read an encoded value from the descriptor; False when it is too long."""
        cdef fr_published now
        cdef uint32_t entry = self.holder._checked(index)
        if len(data) > FR_INLINE_VALUE:
            return False
        now.form, now.flags, now.size = FR_FORM_INLINE, flags, len(data)
        memcpy(now.words, <const char*>data, len(data))
        self.publish(entry, &now)
        return True

    def publish_block(self, index: int, offset: int, size_bytes: int, entry: int = FR_NO_ENTRY, generation: int = 0,
                      flags: int = 0) -> None:
        """Let every holder read an encoded value from a block of the owner's arena.

        Parameters
        ----------
        index : int
            The value's entry.
        offset, size_bytes : int
            Where it lies.
        entry, generation : int
            What readers hold meanwhile: the entry of the block, which may end before the value's. None by default: the
            block lasts as long as the value's entry.
        flags : int
            How it is encoded.
        """
        cdef fr_published now
        now.form, now.flags, now.size = FR_FORM_BLOCK, flags, size_bytes
        now.block.offset, now.block.index, now.block.generation = offset, entry, generation
        self.publish(self.holder._checked(index), &now)

    cdef void withdraw(self, uint32_t index) noexcept nogil:
        """Have holders ask the owner again. Who has begun to read what was published may end."""
        cdef fr_published now
        memset(&now, 0, sizeof(fr_published))
        now.form = FR_FORM_ASK
        fr_descriptor_write(&self.at.descriptors[index], &now)

    def set_state(self, index: int, state: str) -> None:
        """Tell holders that the value is "ready" or "failed"; they ask the owner for it."""
        cdef fr_descriptor* descriptor = &self.at.descriptors[self.holder._checked(index)]
        fr_store32_release(&descriptor.state, _STATES.index(state))

    def word(self, index: int) -> int:
        """The shared word of an entry."""
        return fr_load_acquire(&self.at.hold[self.holder._checked(index)])

    def phase_of(self, index: int) -> str:
        """"free", "used", "closing" or "retired"."""
        return _PHASES[self.phase[self.holder._checked(index)]]

    def snapshot(self) -> dict:
        """Plain figures: capacity, usable, free, used, opened, closed, retired, and the entries in use."""
        pthread_mutex_lock(&self.lock)
        figures = dict(capacity=self.at.capacity, usable=self.usable, free=self.free_count, opened=self.opened,
                       closed=self.closed, retired=self.retired)
        pthread_mutex_unlock(&self.lock)
        entries = {}
        for index in range(figures["usable"]):
            if self.phase[index] in (PHASE_USED, PHASE_CLOSING):
                entries[index] = dict(generation=self.at.descriptors[index].generation, word=self.word(index),
                                      state=self.holder.state(index), count=self.holder.h.held[index].count)
        figures.update(used=len(entries), entries=entries)
        return figures


cdef struct Pin:
    uint64_t position
    void* holder            # a Holder, kept by the queue
    uint32_t index


cdef class PinQueue:
    """Pins for one receiver: references that messages to it carry, let go once it has acquired them.

    A pin is a private count of the sender, taken before the message is published. Positions only grow.
    """

    def __cinit__(self):
        self._kept = {}
        pthread_mutex_init(&self.lock, NULL)

    def __dealloc__(self):
        free(self.pins)
        pthread_mutex_destroy(&self.lock)

    cdef int push(self, uint64_t position, Holder holder, uint32_t index) except -1:
        cdef Pin* pins
        cdef uint64_t i, room
        if not self.count and len(self._kept) > 1:  # whoever has just popped a pin has a reference of its own
            self._kept.clear()
        self._kept[id(holder)] = holder
        pthread_mutex_lock(&self.lock)
        if self.count == self.room:
            room = self.room * 2 if self.room else 64
            pins = <Pin*>calloc(room, sizeof(Pin))
            if pins == NULL:
                pthread_mutex_unlock(&self.lock)
                raise MemoryError()
            for i in range(self.count):
                pins[i] = (<Pin*>self.pins)[(self.head + i) % self.room]
            free(self.pins)
            self.pins, self.room, self.head = pins, room, 0
        pins = &(<Pin*>self.pins)[(self.head + self.count) % self.room]
        pins.position, pins.holder, pins.index = position, <void*>holder, index
        self.count += 1
        pthread_mutex_unlock(&self.lock)
        return 0

    cdef int release_until(self, uint64_t position) noexcept:
        """Let go of every pin at or before ``position``; returns how many."""
        cdef int released = 0
        cdef Pin pin
        cdef Holder holder
        while self.count:  # relaxed: a pin pushed right now is looked at next time
            pthread_mutex_lock(&self.lock)
            if not self.count or (<Pin*>self.pins)[self.head].position > position:
                pthread_mutex_unlock(&self.lock)
                break
            pin = (<Pin*>self.pins)[self.head]
            self.head = (self.head + 1) % self.room
            self.count -= 1
            pthread_mutex_unlock(&self.lock)
            holder = <Holder>pin.holder  # before anything else can run: an empty queue keeps none
            holder.drop(pin.index)
            released += 1
        return released

    def pin(self, position: int, holder: Holder, index: int, generation: int) -> None:
        """Pin an entry that this process holds until the receiver has passed ``position``."""
        holder.acquire(index, generation)
        self.push(position, holder, index)

    def release(self, position: int) -> int:
        """Let go of every pin at or before ``position``; returns how many."""
        return self.release_until(position)

    def release_all(self) -> int:
        """Let go of every pin: the receiver is dead."""
        return self.release_until(<uint64_t>0xFFFFFFFFFFFFFFFF)

    def __len__(self) -> int:
        return self.count
