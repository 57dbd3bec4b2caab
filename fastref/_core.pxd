"""C-level face of the core: ids, fork data, the reference table and its holders."""

from libc.stdint cimport uint8_t, uint16_t, uint32_t, uint64_t, int64_t


cdef extern from "pthread.h" nogil:
    ctypedef struct pthread_mutex_t:
        pass
    int pthread_mutex_init(pthread_mutex_t*, void*)
    int pthread_mutex_destroy(pthread_mutex_t*)
    int pthread_mutex_lock(pthread_mutex_t*)
    int pthread_mutex_trylock(pthread_mutex_t*)
    int pthread_mutex_unlock(pthread_mutex_t*)


cdef extern from "fr_failpoint.h" nogil:
    struct fr_failpoint:
        char* name
        unsigned passed
    struct fr_failpoints:
        int count
        fr_failpoint* point
    fr_failpoints* fr_failpoints_here
    int fr_failpoints_parse(fr_failpoints* all, const char* text)
    void FR_FAILPOINT(const char* name)
    bint FR_FAILS(const char* name)


cdef extern from "fr_table.h" nogil:
    uint64_t FR_BIT_OWNER, FR_BIT_ABROAD, FR_BIT_CLOSED
    uint32_t FR_NO_ENTRY
    enum:
        FR_TABLE_PEERS, FR_HOLD_OFFSET, FR_INLINE_VALUE
        FR_VALUE_PENDING, FR_VALUE_READY, FR_VALUE_FAILED
        FR_FORM_ASK, FR_FORM_INLINE, FR_FORM_BLOCK
        FR_LOST, FR_KEPT, FR_FIRST, FR_LAST, FR_LAST_FLAGGED
    struct fr_descriptor:
        uint32_t generation
        uint32_t state
        int64_t settled_ns
        uint32_t form
    struct fr_block_place "":
        uint64_t offset
        uint32_t index
        uint32_t generation
    struct fr_published:
        uint32_t form
        uint32_t flags
        uint64_t size
        uint64_t* words
        fr_block_place block
    struct fr_bell:
        pass
    struct fr_regions:
        uint64_t* hint
        uint64_t* hold
        uint64_t* dirty
        fr_descriptor* descriptors
        uint32_t capacity
    struct fr_held:
        uint32_t count
        uint32_t generation
    struct fr_holder:
        fr_regions at
        uint64_t bit
        pthread_mutex_t lock
        fr_held* held
        uint64_t entries_held
    bint fr_descriptor_read(fr_descriptor*, fr_published*)
    void fr_descriptor_write(fr_descriptor*, const fr_published*)
    int fr_holder_acquire(fr_holder*, uint32_t, uint32_t)
    int fr_holder_acquire_unpinned(fr_holder*, uint32_t, uint32_t)
    void fr_holder_adopt(fr_holder*, uint32_t, uint32_t)
    int fr_holder_release(fr_holder*, uint32_t)
    void fr_flag_dirty(fr_regions*, uint32_t)
    void fr_hurry(fr_regions*, fr_bell*)
    int fr_table_open(fr_regions*, uint32_t, uint64_t)
    int fr_table_close(fr_regions*, uint32_t)
    int fr_table_clear(fr_regions*, uint32_t, uint64_t)


cdef extern from "fr_atomic.h" nogil:
    uint64_t fr_load_relaxed(uint64_t*)
    uint64_t fr_load_acquire(uint64_t*)
    void fr_store_relaxed(uint64_t*, uint64_t)
    void fr_store_release(uint64_t*, uint64_t)
    uint64_t fr_add_relaxed(uint64_t*, uint64_t)
    uint64_t fr_or(uint64_t*, uint64_t)
    uint64_t fr_and(uint64_t*, uint64_t)
    uint64_t fr_exchange(uint64_t*, uint64_t)
    uint32_t fr_load32_relaxed(uint32_t*)
    uint32_t fr_load32_acquire(uint32_t*)
    void fr_store32_relaxed(uint32_t*, uint32_t)
    void fr_store32_release(uint32_t*, uint32_t)
    uint32_t fr_add32(uint32_t*, uint32_t)
    uint32_t fr_exchange32(uint32_t*, uint32_t)
    bint fr_cas32(uint32_t*, uint32_t, uint32_t)
    void fr_fence()
    void fr_fence_acquire()
    void fr_pause()
    int64_t fr_now_ns()
    uint32_t fr_cpu()
    uint32_t FR_NO_CPU
    int fr_futex_wait(uint32_t*, uint32_t, int64_t)
    void fr_futex_wake(uint32_t*, int)


cdef extern from *:
    """
    #pragma pack(push, 1)
    struct fr_fork {                    /* 40 bytes on the wire, native byte order: it never leaves the host */
        uint64_t rref_local, fork_local;
        uint16_t rref_created_on, fork_created_on, owner, parent;
        uint32_t index, generation;
        uint16_t type_size;             /* bytes of the type string that follows; 0 stands for "PyObject" */
        uint8_t has_entry, unused[5];
    };
    #pragma pack(pop)
    """
    struct fr_fork:
        uint64_t rref_local
        uint64_t fork_local
        uint16_t rref_created_on
        uint16_t fork_created_on
        uint16_t owner
        uint16_t parent
        uint32_t index
        uint32_t generation
        uint16_t type_size
        uint8_t has_entry


cdef fr_failpoints* failpoints() noexcept nogil


cdef class IdGenerator:
    cdef uint64_t _prefix
    cdef uint64_t _count
    cpdef uint64_t next(self) except? 0xFFFFFFFFFFFFFFFF


cdef class GloballyUniqueId:
    cdef readonly uint16_t created_on
    cdef readonly uint64_t local_id


cdef class ForkData:
    cdef fr_fork data
    cdef readonly str type_str


cdef class Holder:
    cdef fr_holder h
    cdef fr_bell* bell
    cdef object _regions
    cdef public tuple epitaph           # once another worker has the owner's rank: name, rank, pid, reason, left
    cdef readonly object gone           # deque of (index, generation), without a bit: entries whose last count went

    cdef int take(self, uint32_t index, uint32_t generation) noexcept nogil
    cdef int drop(self, uint32_t index) noexcept
    cdef int drop_block(self, uint32_t index) noexcept
    cdef int ring_at(self, object bell) except -1
    cdef int take_unpinned(self, uint32_t index, uint32_t generation) noexcept nogil
    cdef bint has(self, uint32_t index) noexcept nogil
    cdef uint32_t _checked(self, index) except? 0xFFFFFFFF
    cdef bint _taken(self, int result, index, generation) except -1


cdef class MirrorHolder(Holder):
    cdef int show(self, uint32_t index, uint32_t generation, uint32_t state) except -1


cdef class ReferenceTable:
    cdef readonly Holder holder
    cdef fr_regions at
    cdef pthread_mutex_t lock
    cdef uint8_t* phase
    cdef uint32_t* free_queue
    cdef uint32_t free_head, free_count, usable
    cdef uint64_t opened, closed, retired
    cdef object _regions
    cdef readonly uint32_t generation_limit, first_generation

    cdef int64_t open_entry(self, uint64_t bit) noexcept nogil
    cdef bint needs_sweep(self) noexcept nogil
    cdef void publish(self, uint32_t index, fr_published* now) noexcept nogil
    cdef void withdraw(self, uint32_t index) noexcept nogil
    cdef void _push_free(self, uint32_t index) noexcept nogil
    cdef bint _close(self, uint32_t index) noexcept nogil


cdef class PinQueue:
    cdef pthread_mutex_t lock
    cdef void* pins
    cdef uint64_t head, count, room
    cdef dict _kept

    cdef int push(self, uint64_t position, Holder holder, uint32_t index) except -1
    cdef int release_until(self, uint64_t position) noexcept
