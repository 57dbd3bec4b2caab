"""Entries of the table for values that are handed on, and the holds under references that go out."""

from cpython.bytes cimport PyBytes_AS_STRING
from libc.stdint cimport int64_t, uint16_t, uint32_t, uint64_t

from fastref._core cimport FR_LOST, Holder, fr_fork, fr_now_ns
from fastref.carriers.borrow cimport PeerArena, Place
from fastref.codec.payload cimport Encoder
from fastref.nogc cimport nogc_pause, nogc_resume
from fastref.rref cimport VALUE_READY, OwnedValue, RRef
from fastref.runtime.payloads cimport Payloads
from fastref.runtime.peer cimport Peer

from fastref.errors import OwnerDied, ProtocolError, ResourceError, UsageError

__all__ = ["Entries"]

cdef extern from "time.h" nogil:
    struct timespec:
        long tv_sec
        long tv_nsec
    int nanosleep(const timespec*, timespec*)

cdef extern from "Python.h":
    int PyErr_CheckSignals() except -1

cdef enum:
    RECALL_NS = 1000000000  # for others to send the deletes that they have not sent yet

cdef uint64_t NUMBER_MASK = (<uint64_t>1 << 48) - 1    # ids have 48 bits


cdef class Entries(Payloads):
    """What a runtime keeps for others: which values it has handed on, and what it holds for receivers until they do."""

    def __init__(self, rank: int, info, peers: list, table, ids, strict: bool):
        super().__init__(info, strict)
        self.rank, self.peers, self.table, self.ids = rank, peers, table, ids
        self.owned = []

    # ---- values

    cdef int share(self, RRef rref, int64_t deadline_ns) except -1:
        """Open an entry for a local value that is handed on for the first time."""
        entry = self.open_entry_for_value(deadline_ns)
        if rref.holder is not None:  # another thread has handed it on while we waited
            self.table.holder.drop(entry[0])
            return 0
        rref.fork.index, rref.fork.generation = entry
        rref.fork.has_entry = 1
        self.own(rref.fork.index, rref.owned)
        rref.holder = self.table.holder
        if rref.owned.settled == VALUE_READY:
            self.publish(rref.owned, rref.fork.index)
        return 0

    def own(self, index: int, owned) -> None:
        """Keep a value under an entry."""
        while len(self.owned) <= index:
            self.owned.append(None)
        self.owned[index] = owned

    cdef int publish(self, OwnedValue owned, uint32_t index) except -1:
        raise NotImplementedError

    cdef tuple open_entry(self):
        """Open an entry that this process itself holds. Compiled: no signal handler raises when it is open."""
        while True:
            entry = self.table.open()
            if entry is not None:
                return entry
            self.release_pins()
            self.sweep()
            entry = self.table.open()
            if entry is not None:
                return entry
            self.more_entries()

    cdef tuple open_entry_for_value(self, int64_t deadline_ns):
        """As ``open_entry``. When there is none left, those who hold by messages are asked for what they have let go of.

        They say so in their own time otherwise, and an entry that only looks as if it were held is no reason to refuse.
        """
        cdef int64_t give_up_ns = fr_now_ns() + RECALL_NS
        cdef int64_t nap_ns = 20000
        cdef bint over
        try:
            return self.open_entry()
        except ResourceError as error:
            asked = self.recall()
            if asked is None:
                raise
            shortage = error
        if deadline_ns:
            give_up_ns = min(give_up_ns, deadline_ns)
        while True:
            over = fr_now_ns() > give_up_ns or self.recall_is_over(asked)  # before the table is looked at
            self.sweep()
            entry = self.table.open()
            if entry is not None:
                return entry
            if over:
                raise shortage
            nap_ns = self._nap(nap_ns)

    def recall(self):
        """Ask all who hold by messages for the deletes that they have not sent yet; None when nobody does."""
        raise NotImplementedError

    def recall_is_over(self, recall) -> bool:
        """Tell whether all who were asked have answered."""
        raise NotImplementedError

    def more_entries(self) -> None:
        """Make room for more entries in the table, or raise ``ResourceError``."""
        raise NotImplementedError

    def sweep(self) -> None:
        """Close the entries that nobody holds."""
        raise NotImplementedError

    # ---- references that go out

    cdef int _pack_forks(self, Peer peer, list references, bint first_is_new, int64_t deadline_ns, Encoder forks,
                         list pinned) except -1:
        """Write the fork data of references to ``forks`` and pin each.

        ``first_is_new``: the first is what a remote() makes; it goes under the ids that it was given. ``pinned`` says what
        to undo: for each the holder and index of our pin, the fork if the peer holds it by messages, and the entry if that
        is ours.
        """
        cdef RRef rref
        cdef fr_fork fork
        cdef uint64_t fork_id
        for item in references:
            rref = <RRef>item
            if not first_is_new:
                self.check_creation(rref)
            if self.users_deleted and rref.owned is None:
                rref._serialize()  # says so
            if rref.wiring is not self:
                raise UsageError(f"{rref!r} belongs to another runtime, or to one that was shut down")
            if rref.holder is None:
                self.share(rref, deadline_ns)
            elif rref.holder.epitaph is not None:
                raise OwnerDied(*rref.holder.epitaph)
            if rref.holder.take(rref.fork.index, rref.fork.generation) == FR_LOST:
                raise ProtocolError(f"{rref!r} is not held")
            fork = rref.fork
            if first_is_new:
                fork_id = <uint64_t>fork.fork_created_on << 48 | fork.fork_local
                first_is_new = False
            else:
                fork_id = self.ids.next()
                fork.fork_created_on, fork.fork_local = self.rank, fork_id & NUMBER_MASK
                fork.parent = self.rank
            pinned.append((rref.holder, fork.index, 0, None))
            if peer.rank != fork.owner and not self.has_bit(fork.owner, peer.rank):
                self._fork_abroad(peer, fork_id, rref.holder, &fork, pinned)
            encoded = b"" if rref.type_str is None else rref.type_str.encode()
            fork.type_size = len(encoded)
            forks.raw(&fork, sizeof(fr_fork))
            if encoded:
                forks.raw(<const char*>encoded, len(encoded))
        return 0

    cdef bint has_bit(self, uint16_t owner, uint16_t holder) except -1:
        """Whether a worker has a bit in another one's table; else it holds references by messages."""
        cdef Peer peer = <Peer>self.peers[owner]
        return holder < peer.bits and (peer.host is (<Peer>self.peers[holder]).host)

    def holds_by_bit(self, peer: Peer) -> bool:
        """Whether a worker has a bit in this one's table."""
        return self.has_bit(self.rank, peer.rank)

    cdef int _fork_abroad(self, Peer peer, uint64_t fork_id, Holder holder, fr_fork* fork, list pinned) except -1:
        """A reference goes to a peer that has no bit in its owner's table.

        A fork that the owner makes holds the entry by itself; that of another rests on our pin until the owner knows it. A
        signal handler may raise wherever Python runs: what undoes a fork is in ``pinned`` before there is one.
        """
        cdef Py_ssize_t last = len(pinned) - 1
        entry = (fork.index, fork.generation)
        with peer.guard:
            if peer.is_dead:
                raise peer.died_error()
            if fork.owner != self.rank:
                peer.children[fork_id] = (holder, fork.index)
                pinned[last] = (None, 0, fork_id, None)
                return 0
            pinned[last] = (holder, fork.index, fork_id, entry)
            self.fork_made(peer, entry, fork_id)
        pinned[last] = (None, 0, fork_id, entry)
        holder.release(fork.index)
        return 0

    def fork_made(self, peer, entry: tuple, fork_id: int) -> None:
        """Note that a peer without a bit holds an entry of ours."""
        raise NotImplementedError

    def fork_unmade(self, peer, entry: tuple, fork_id: int) -> None:
        """Undo that, also if it was done in part, or not at all."""
        raise NotImplementedError

    def child_is_known(self, peer, fork_id: int) -> None:
        """Let go of the pin that a fork of another's value rests on."""
        child = (<Peer>peer).children.pop(fork_id, None)
        if child is not None:
            self.unhold(*child)

    cdef int _pin_forwarded(self, list forwarded, list pinned) except -1:
        """Hold the blocks of others that a frame points to, for its receiver."""
        cdef PeerArena arena
        cdef const Place* place
        for item, encoded in forwarded:
            arena, place = <PeerArena>item, <const Place*>PyBytes_AS_STRING(<bytes>encoded)
            if not arena.pin(place):
                raise ProtocolError(f"entry {place.index} of worker {place.owner} is leased, but not held")
            pinned.append((arena._holder, place.index, 0, None))
            self.blocks_forwarded += 1
        return 0

    def _unpin(self, peer, pinned: list) -> None:
        for holder, index, fork_id, entry in pinned:
            if entry is not None:
                self.fork_unmade(peer, entry, fork_id)
            elif fork_id:
                self.child_is_known(peer, fork_id)
            if holder is not None:
                self.unhold(holder, index)

    def unhold(self, holder, index: int) -> None:
        """Let a pin go; after ``users_deleted`` those on other tables have gone already."""
        if not self.users_deleted or holder is self.table.holder:
            holder.release(index)

    cdef void release_pins(self) noexcept:
        if self.peers is not None:  # a handle may outlive what the collector has emptied
            for peer in self.peers:
                if peer is not None:
                    (<Peer>peer).release_pins()

    # ---- waiting

    cdef int64_t _nap(self, int64_t nap_ns) except -1:
        """Do what is due while a peer is waited for, and sleep a moment; return how long to sleep next time."""
        cdef timespec pause
        cdef int depth
        PyErr_CheckSignals()
        self.check()
        self.drain_while_waiting()
        pause.tv_sec, pause.tv_nsec = 0, nap_ns
        depth = nogc_pause()
        with nogil:
            nanosleep(&pause, NULL)
        nogc_resume(depth)
        return min(nap_ns * 2, 1000000)

    cdef int drain_while_waiting(self) except -1:
        raise NotImplementedError

    def wake_leader(self) -> None:
        raise NotImplementedError
