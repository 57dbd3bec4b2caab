"""What a runtime knows of one peer."""

from collections import deque
from threading import Condition, RLock

from libc.stdint cimport uint32_t, uint64_t

from fastref._core cimport FR_NO_CPU, Holder, PinQueue, fr_load32_acquire, fr_store32_release
from fastref.carriers.arena cimport Arena
from fastref.carriers.borrow cimport PeerArena
from fastref.channels.channel cimport Channel
from fastref.channels.slots cimport PeerSlots

from fastref.errors import OwnerDied, WorkerDied

__all__ = ["Peer"]


cdef class Peer:
    """A worker of the job, this one included.

    Parameters
    ----------
    rank, info, pid
        Who it is.
    channel : Channel
        Frames to it.
    slots : PeerSlots or None
        Where its callers wait for answers; None where no memory is shared: answers are messages then.
    holder : Holder
        What this process holds of its table.
    arena : PeerArena or None
        Its arena.
    bits : int
        How many ranks of its host have a bit in its table.
    incarnation : int
        How many workers had its rank before, in a group that workers join and leave.
    generations : range
        Of the entries in its table: no other incarnation has one of them.
    host : str
        Equal for workers that share memory.
    """

    def __init__(self, rank: int, info, pid: int, channel: Channel, slots: PeerSlots | None, holder: Holder,
                 arena: PeerArena | None, bits: int, incarnation: int = 0, generations: range = range(0xFFFFFFFF),
                 host: str = ""):
        self.host, self.is_far, self.way = host, slots is None, "shm"
        self.incarnation, self.serves = incarnation, holder
        self.first_generation, self.generations = generations.start, len(generations)
        self.rank, self.info, self.pid, self.bits = rank, info, pid, bits
        self.channel, self.slots, self.holder, self.arena = channel, slots, holder, arena
        self.pins = PinQueue()
        self.numbers, self.callables, self.children = {}, {}, {}
        self.credits, self.slot_loans, self.loans, self.lent, self.outgoing = [], [], deque(), deque(), deque()
        self.guard = RLock()
        self.lock = Condition(self.guard)
        self.credit_window = 32
        self.cpu = FR_NO_CPU

    @property
    def name(self) -> str:
        return self.info.name

    @property
    def uid(self) -> int:
        """Rank and incarnation as one number: no other worker of the group ever has it."""
        return <uint64_t>self.incarnation << 16 | self.rank

    @property
    def is_dead(self) -> bool:
        """True once its death has been noticed."""
        return fr_load32_acquire(&self.died) != 0

    def mark_dead(self, reason: str) -> None:
        """Note that the process is gone; whoever waits for it sees it from now on."""
        self.death = reason
        self.channel.close()
        fr_store32_release(&self.died, 1)

    def refuse_calls(self) -> None:
        """Note that the peer leaves: what was sent is answered, calls through references are refused from here on."""
        self.serves = None
        self.left = True

    def died_error(self, owner: bool = False) -> WorkerDied:
        """Return the exception for whoever waited for this peer."""
        kind = OwnerDied if owner else WorkerDied
        return kind(self.info.name, self.rank, self.pid, self.death or "", left=self.left)

    def add_credits(self, credits: list) -> None:
        """Take entries that the peer opened for our ``remote()`` calls: (index, generation, fork)."""
        with self.guard:
            self.credits.extend(credits)
            self.credits_asked, self.credits_refused = False, None
            self.lock.notify_all()

    def refuse_credits(self, why: str) -> None:
        """Note that the peer has no entry to open for us at present."""
        with self.guard:
            self.credits_asked, self.credits_refused = False, why

    cdef int release(self, Arena arena) except -1:
        """Let go of pins and blocks that the peer is done with."""
        self.release_pins()
        if self.loans or self.slot_loans:
            self.release_loans(arena)
        if self.lent:
            self.release_lent()
        return 0

    cdef void release_pins(self) noexcept:
        if self.pins.count:
            self.pins.release_until(<uint64_t>0xFFFFFFFFFFFFFFFF if fr_load32_acquire(&self.died) else self.channel.acquired())

    cdef int release_loans(self, Arena arena) except -1:
        cdef bint dead = fr_load32_acquire(&self.died)
        cdef uint64_t consumed = self.channel.consumed()
        while True:
            try:
                position, offset = self.loans.popleft()
            except IndexError:
                break
            if not dead and position > consumed:
                self.loans.appendleft((position, offset))
                break
            arena.give_back(offset)
        if self.slot_loans:
            still = []
            waiting, self.slot_loans = self.slot_loans, still
            for slot, call, offset in waiting:
                if not dead and self.slots.still_reads(slot, call):
                    still.append((slot, call, offset))
                else:
                    arena.give_back(offset)
        return 0

    cdef int lend(self, int64_t position, Encoder body) except -1:
        """Leave a payload that nobody else can reach where it lies until the peer has it."""
        if self.channel.borrows(position):
            body.lent = True
            self.lent.append((position, body))
        return 0

    cdef int release_lent(self) except -1:
        cdef uint64_t consumed = self.channel.consumed()
        if fr_load32_acquire(&self.died):  # so the channel is closed
            consumed = <uint64_t>0xFFFFFFFFFFFFFFFF
        while True:
            try:
                entry = self.lent.popleft()
            except IndexError:
                return 0
            if entry[0] > consumed:
                self.lent.appendleft(entry)
                return 0

    def detach(self) -> None:
        """Make what is leased of its memory independent of it."""
        if self.arena is not None:
            self.arena.detach()

    def free(self, arena: Arena) -> None:
        """Let go of pins and blocks that the peer is done with."""
        self.release(arena)

    def snapshot(self) -> dict:
        """Plain figures."""
        memory = self.channel.snapshot() if self.is_far else self.arena.snapshot()
        return dict(name=self.info.name, pid=self.pid, dead=self.is_dead, way=self.way, far=self.is_far, outgoing=len(self.outgoing), pins=len(self.pins), children=len(self.children),
                    loans=len(self.loans) + len(self.slot_loans), credits=len(self.credits), credits_open=self.credits_open,
                    callables=len(self.callables), entries_held=self.holder.entries_held, **memory)
