"""Response slots: waiting for an answer in one's own memory, leaving one in a peer's.

The waiting thread polls its own slot: no thread in between, no queue. It spins for a while without the interpreter
lock, then sleeps on the slot's futex word, in slices, so that deadlines, signals and deaths are noticed.
"""

from libc.stdint cimport int64_t, uint32_t, uint64_t
from libc.stdlib cimport calloc, free

from fastref._core cimport (fr_fence, fr_futex_wait, fr_futex_wake, fr_load32_acquire, fr_load32_relaxed,
                            fr_load_acquire, fr_now_ns, fr_store32_release, fr_store_release, pthread_mutex_destroy,
                            pthread_mutex_init, pthread_mutex_lock, pthread_mutex_unlock)
from fastref.errors import ProtocolError, UsageError

__all__ = ["ResponseSlots", "PeerSlots", "slot_bytes"]

cdef extern from *:
    """
    #include "fr_wait.h"
    #include "fr_slot.h"
    static inline int fr_slot_spin(struct fr_slot *s, uint64_t number, uint32_t *died, struct fr_waiting *w)
    {
        return FR_SPIN_UNTIL(w, fr_slot_is_done(s, number) || fr_load32_relaxed(died));
    }
    static inline int fr_slot_spin_briefly(struct fr_slot *s, uint64_t number, uint32_t *died, struct fr_waiting *w)
    {
        return FR_SPIN_BRIEFLY(w, fr_slot_is_done(s, number) || fr_load32_relaxed(died));
    }
    """
    int fr_slot_spin(fr_slot*, uint64_t, uint32_t*, fr_waiting*) nogil
    int fr_slot_spin_briefly(fr_slot*, uint64_t, uint32_t*, fr_waiting*) nogil
    int __builtin_ctzll(unsigned long long) nogil


def slot_bytes(count: int) -> int:
    """Return the bytes of shared memory that ``count`` response slots need."""
    if not 1 <= count <= 64:
        raise UsageError(f"a process has 1 to 64 response slots, got {count}")
    return count * sizeof(fr_slot)


cdef fr_slot* _slots_in(object memory, object count) except NULL:
    cdef unsigned char[::1] room = memory
    if room.shape[0] < slot_bytes(count):
        raise ProtocolError(f"{count} response slots in {room.shape[0]} bytes of memory")
    return <fr_slot*>&room[0]


cdef class ResponseSlots:
    """The slots of this process, in which callees leave small answers.

    Parameters
    ----------
    memory : writable buffer
        ``slot_bytes(count)`` zeroed bytes, mapped by the peers too.
    count : int
        1 to 64. When all are taken, answers come as messages; nobody waits for a slot.
    """

    def __cinit__(self, memory, count: int):
        self._memory = memoryview(memory)
        self.slots = _slots_in(memory, count)
        self.count = count
        self.free_mask = (<uint64_t>0xFFFFFFFFFFFFFFFF) >> (64 - count)
        self.numbers = <uint64_t*>calloc(count, sizeof(uint64_t))
        self.died = <uint32_t**>calloc(count, sizeof(uint32_t*))
        if self.numbers == NULL or self.died == NULL:
            raise MemoryError()
        pthread_mutex_init(&self.lock, NULL)

    def __dealloc__(self):
        free(self.numbers)
        free(self.died)
        pthread_mutex_destroy(&self.lock)

    cdef int begin(self, uint64_t number, uint32_t* died) noexcept nogil:
        """Take a slot for call ``number``, to a peer whose death flag is ``died``; -1 when all are taken."""
        cdef int slot = -1
        pthread_mutex_lock(&self.lock)
        if self.abandoned:
            self._collect_abandoned()
        if self.free_mask:
            slot = __builtin_ctzll(self.free_mask)
            self.free_mask &= self.free_mask - 1
            self.numbers[slot] = number
            self.died[slot] = died
        pthread_mutex_unlock(&self.lock)
        if slot >= 0:
            fr_slot_begin(&self.slots[slot], number)
        return slot

    cdef void _collect_abandoned(self) noexcept nogil:
        """Take back slots whose late callee has noticed, or has died."""
        cdef uint64_t left = self.abandoned, bit
        cdef int slot
        while left:
            slot = __builtin_ctzll(left)
            bit = <uint64_t>1 << slot
            left &= left - 1
            if (fr_slot_state(fr_load_acquire(&self.slots[slot].state)) == FR_SLOT_FREE
                    or fr_load32_acquire(self.died[slot])):
                self.abandoned &= ~bit
                self.free_mask |= bit

    cdef bint wait_briefly(self, int slot) noexcept nogil:
        """Wait for about 2 us, for a caller that keeps the interpreter lock; True when the answer is there."""
        cdef fr_slot* s = &self.slots[slot]
        fr_slot_spin_briefly(s, self.numbers[slot], self.died[slot], &self.briefly)
        return fr_slot_is_done(s, self.numbers[slot])

    cdef int wait(self, int slot, int64_t deadline_ns, int64_t slice_ns) noexcept nogil:
        """Wait for the answer: WAIT_DONE, or why there is none yet.

        ``deadline_ns`` 0: none. ``slice_ns`` 0: spin only, negative: sleep without slices.
        """
        cdef fr_slot* s = &self.slots[slot]
        cdef uint32_t* died = self.died[slot]
        cdef uint64_t number = self.numbers[slot]
        cdef int64_t left
        if not slice_ns:
            fr_slot_spin(s, number, died, &self.waiting)
        elif not fr_slot_has_answer(s, number):
            self.waiting.slept += 1
            if deadline_ns:
                left = deadline_ns - fr_now_ns()
                if left <= 0:
                    return WAIT_DONE if fr_slot_has_answer(s, number) else WAIT_TIMED_OUT
                if slice_ns < 0 or left < slice_ns:
                    slice_ns = left
            fr_store32_release(&s.sleeping, 1)
            fr_fence()  # SYNC: sleeping before done; pairs with the callee's done before sleeping
            if not fr_slot_has_answer(s, number) and not fr_load32_relaxed(died) and not fr_load32_relaxed(&self.stopped):
                fr_futex_wait(&s.sleeping, 1, slice_ns)
            fr_store32_release(&s.sleeping, 0)
        return self.look(slot)

    cdef int look(self, int slot) noexcept nogil:
        """How things stand with the answer, without waiting."""
        if fr_slot_has_answer(&self.slots[slot], self.numbers[slot]):
            return WAIT_DONE
        if fr_load32_acquire(self.died[slot]):
            return WAIT_PEER_DIED
        if fr_load32_relaxed(&self.stopped):
            return WAIT_STOPPED
        return WAIT_INTERRUPTED

    cdef void end(self, int slot) noexcept nogil:
        """The answer has been read: the slot is free again."""
        fr_store_release(&self.slots[slot].state, fr_slot_word(self.numbers[slot], FR_SLOT_FREE))
        pthread_mutex_lock(&self.lock)
        self.free_mask |= <uint64_t>1 << slot
        pthread_mutex_unlock(&self.lock)

    cdef int give_up(self, int slot, bint dead) noexcept nogil:
        """Stop waiting: WAIT_DONE when the answer came after all (and must be read and ended), else the slot is gone."""
        cdef int result = fr_slot_give_up(&self.slots[slot], self.numbers[slot])
        if result == 0:
            return WAIT_DONE
        pthread_mutex_lock(&self.lock)
        # Not for one who is known to be dead: nobody looks at its flag again once it has been replaced.
        if result < 0 and not dead and not fr_load32_acquire(self.died[slot]):
            self.abandoned |= <uint64_t>1 << slot
        else:
            self.free_mask |= <uint64_t>1 << slot
        pthread_mutex_unlock(&self.lock)
        return WAIT_TIMED_OUT

    cdef void finish_here(self, int slot, uint64_t number, uint32_t flags) noexcept nogil:
        """The answer of call ``number`` came as a message: this process finishes the slot itself."""
        if fr_slot_claim(&self.slots[slot], number):
            self.slots[slot].size = 0
            self.slots[slot].flags = flags
            fr_slot_finish(&self.slots[slot], number)

    cdef bint waits_for(self, int slot, uint64_t number) noexcept nogil:
        """True while the caller of ``number`` has not read or given up its answer."""
        cdef uint64_t state = fr_load_acquire(&self.slots[slot].state)
        return fr_slot_number(state) == number and fr_slot_state(state) == FR_SLOT_DONE

    cdef void wake_all(self) noexcept nogil:
        """Let every waiting thread look at its peer's death flag."""
        cdef unsigned slot
        for slot in range(self.count):
            # Whatever `sleeping` says: a callee may have been killed between clearing it and its wake-up.
            fr_store32_release(&self.slots[slot].sleeping, 0)
            fr_futex_wake(&self.slots[slot].sleeping, 1)

    def stop(self) -> None:
        """Tell every waiting thread that no answer will come."""
        fr_store32_release(&self.stopped, 1)
        self.wake_all()

    def wake_waiting(self) -> None:
        """Let every waiting thread look at its peer's death flag."""
        self.wake_all()

    def is_idle(self) -> bool:
        """True when nobody waits in a slot; those that were given up do not count."""
        cdef bint idle
        pthread_mutex_lock(&self.lock)
        idle = (self.free_mask | self.abandoned) == (<uint64_t>0xFFFFFFFFFFFFFFFF) >> (64 - self.count)
        pthread_mutex_unlock(&self.lock)
        return idle

    def collect_abandoned(self) -> None:
        """Take back what was given up on the dead: from here on nothing points to the flags that say so."""
        pthread_mutex_lock(&self.lock)
        self._collect_abandoned()
        pthread_mutex_unlock(&self.lock)

    def snapshot(self) -> dict:
        """Plain figures: slots, free, abandoned, and how waits ended."""
        return dict(count=self.count, free=self.free_mask.bit_count(), abandoned=self.abandoned.bit_count(),
                    spun=self.waiting.spun, slept=self.waiting.slept)


cdef class PeerSlots:
    """A peer's response slots, in which this process leaves answers.

    Parameters
    ----------
    memory : writable buffer
        The peer's slots.
    count : int
        How many there are.
    """

    def __cinit__(self, memory, count: int):
        self._memory = memoryview(memory)
        self.slots = _slots_in(memory, count)
        self.count = count

    cdef void expect(self, unsigned slot) noexcept nogil:
        """An answer will be written to this slot soon."""
        if slot < self.count:
            fr_slot_expect(&self.slots[slot])

    cdef fr_slot* claim(self, unsigned slot, uint64_t number) noexcept nogil:
        """The slot to write the answer of call ``number`` to, or NULL when the caller has given up."""
        if slot >= self.count or not fr_slot_claim(&self.slots[slot], number):
            return NULL
        return &self.slots[slot]

    cdef bint still_reads(self, unsigned slot, uint64_t number) noexcept nogil:
        """True while the caller of ``number`` may still read what the answer points to."""
        cdef uint64_t state = fr_load_acquire(&self.slots[slot].state)
        return fr_slot_number(state) == number and fr_slot_state(state) != FR_SLOT_FREE
