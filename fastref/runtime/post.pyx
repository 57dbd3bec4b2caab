"""Frames out: payloads, blocks, full rings."""

from libc.stdint cimport int64_t, uint16_t, uint32_t, uint64_t
from libc.string cimport memcpy, memset

from fastref._core cimport (FR_FAILPOINT, Holder, failpoints, fr_add_relaxed, fr_failpoints_here, fr_load32_acquire,
                            fr_now_ns)
from fastref.carriers.arena cimport FR_ARENA_PAGE
from fastref.carriers.borrow cimport LEASE_FROM, NO_ENTRY
from fastref.carriers.warm cimport give_memory, take_memory
from fastref.channels.channel cimport SENT_FULL, SENT_TOO_LARGE, Bulk, iovec
from fastref.channels.tcp cimport TcpLoop
from fastref.codec.payload cimport Encoder
from fastref.nogc cimport nogc_pause, nogc_resume
from fastref.rref cimport RRef, forks_so_far
from fastref.runtime.entries cimport Entries
from fastref.runtime.peer cimport Peer
from fastref.wire.frame cimport (FLAG_BLOCK, FLAG_FORKS_IN_BLOCK, FLAG_FORWARDED, NO_SLOT, PYTHON_CALL,
                                 PYTHON_REMOTE_CALL, RREF_FETCH_CALL, fr_block, fr_frame)

from fastref.errors import CallTimeout, OwnerDied, ResourceError, UsageError
from fastref.options import UNSET_RPC_TIMEOUT, WorkerInfo

__all__ = ["Post", "set_thread_context", "thread_context", "use_warm_memory"]

fr_failpoints_here = failpoints()

cdef extern from *:
    """
    static __thread struct fr_thread fr_this_thread;
    """
    fr_thread fr_this_thread

cdef extern from "time.h" nogil:
    struct timespec:
        long tv_sec
        long tv_nsec
    int nanosleep(const timespec*, timespec*)

cdef enum:
    INLINE_LIMIT = 4096     # larger payloads go through the arena; measured: a block costs about 1.5 us more
    MOST_PIECES = 64        # payloads in more pieces are copied before they are sent
    HEAD_ROOM = 1024        # header and references that fit on the stack
    FOREVER_S = 1000000000  # longer timeouts, infinite ones too, are none: in nanoseconds they might not fit into 64 bits

cdef uint64_t NUMBER_MASK = (<uint64_t>1 << 48) - 1    # call numbers have 48 bits


cdef fr_thread* this_thread() noexcept nogil:
    return &fr_this_thread


def thread_context() -> int:
    """Return the id of the autograd context that calls of this thread belong to; 0 outside of all."""
    return fr_this_thread.context


def set_thread_context(context: int) -> int:
    """Have calls of this thread belong to a context from here on, to none by 0; return what they belonged to."""
    before = fr_this_thread.context
    fr_this_thread.context = context
    return before


cdef class Bulky:
    """Memory for a payload that goes along with its frame. A channel that takes it over leaves NULL behind."""

    def __dealloc__(self):
        if self.bulk.start != NULL:
            self.bulk.give(self.bulk.start, self.bulk.size)


cdef Bulky _bulky(uint64_t size):
    cdef Bulky bulky = Bulky.__new__(Bulky)
    bulky.bulk.start = <char*>take_memory(size)
    if bulky.bulk.start == NULL:
        raise ResourceError(f"no memory for a payload of {size} bytes")
    bulky.bulk.size, bulky.bulk.give = size, give_memory
    return bulky


cdef Bulky _copied_together(Encoder body):
    cdef Bulky bulky = _bulky(body.total())
    cdef int depth = nogc_pause()
    with nogil:
        body.copy_to(bulky.bulk.start)
    nogc_resume(depth)
    return bulky


cdef inline Bulk* _bulk_of(Bulky bulky) noexcept:
    return NULL if bulky is None else &bulky.bulk


def use_warm_memory(loop: TcpLoop) -> None:
    """Have what comes along with records put into memory that is kept warm."""
    loop.take, loop.give = take_memory, give_memory


cdef class Post(Entries):
    """The sending half of a runtime."""

    def __init__(self, rank: int, info, peers: list, inbox, slots, arena, table, ids, default_timeout_s: float,
                 strict: bool = False):
        super().__init__(rank, info, peers, table, ids, strict)
        for peer in peers:
            self.add_arena(peer)
        self.names, self.ranks = {}, []
        self.inbox, self.slots, self.arena = inbox, slots, arena
        self.default_timeout_s = default_timeout_s
        self.fork_count = forks_so_far()
        self.slice_ns = 100_000_000

    def add_peer(self, peer: Peer) -> None:
        """Make a worker known, for frames from it and for references to its values."""
        while len(self.peers) <= peer.rank:
            self.peers.append(None)
            self.ranks.append(None)
        self.peers[peer.rank] = peer
        self.add_arena(peer)

    def add_arena(self, peer: Peer) -> None:
        while len(self.arenas) <= peer.rank:
            self.arenas.append(None)
        self.arenas[peer.rank] = peer.arena

    def dismiss(self, peer: Peer) -> None:
        """Let a worker be called no more by name and rank, unless another has them by now."""
        if self.ranks[peer.rank] is peer:
            self.ranks[peer.rank] = None
        if self.names.get(peer.info.name) is peer:
            del self.names[peer.info.name]

    def introduce(self, peer: Peer) -> None:
        """Let a worker be called by name and rank."""
        self.ranks[peer.rank] = self.names[peer.info.name] = peer

    def known_peers(self) -> list:
        """The workers that were met, this one and the dead among them, without the gaps between ranks."""
        return [peer for peer in self.peers if peer is not None]

    cdef uint64_t new_call(self) noexcept nogil:
        return (fr_add_relaxed(&self.last_call, 1) + 1) & NUMBER_MASK

    cdef int64_t deadline(self, double timeout_s) noexcept:
        """When a call that starts now has to be over; 0: never. A nested call inherits what is left of the outer one's."""
        cdef int64_t inherited = fr_this_thread.deadline_ns
        cdef int64_t own
        if timeout_s == -1.0:
            own = _deadline(self.default_timeout_s)
            return own if own and (not inherited or own < inherited) else inherited
        return _deadline(timeout_s)

    cdef object worker(self, uint16_t rank):
        peer = self.peers[rank] if rank < len(self.peers) else None
        return peer.info if peer is not None else WorkerInfo(f"unknown-{rank}", rank)

    cdef Peer peer_of(self, object to):
        """The peer that ``to`` names: a name, a rank or a WorkerInfo."""
        found = None
        if isinstance(to, str):
            found = self.names.get(to)
        elif isinstance(to, WorkerInfo):
            found = self.names.get(to.name)
        elif isinstance(to, int):
            if 0 <= to < len(self.ranks):
                found = self.ranks[to]
        else:
            raise ValueError(f"Cannot get WorkerInfo from name {to}")
        if found is None:
            for peer in self.known_peers():
                if (peer.left or peer.is_dead) and to in (peer.rank, peer.info.name, peer.info):
                    raise peer.died_error()
            what = f"id {to}" if isinstance(to, int) else f"name {to.name if isinstance(to, WorkerInfo) else to}"
            raise UsageError(f"name:{self.info.name},rank:{self.rank} could not find destination {what}")
        return <Peer>found

    cdef Peer owner_of(self, RRef rref):
        """The worker where the value of a reference lives, for a call to it."""
        cdef Peer peer = <Peer>self.peers[rref.fork.owner]
        if peer.serves is not rref.holder:
            if rref.holder.epitaph is not None:
                raise OwnerDied(*rref.holder.epitaph)
            raise peer.died_error(True)
        return peer

    cdef int64_t post(self, Peer peer, fr_frame* head, Encoder body, int64_t deadline_ns, bint lends=False) except -1:
        """Send one frame: ``head`` with the references and payload of ``body``.

        ``lends``: the caller leaves ``body`` and what it is about as they are until it has asked ``take_back`` for them.

        Every reference is pinned before the frame is visible; all is undone when it cannot be sent. When the ring is
        full a call waits for room; an answer or a bookkeeping frame never does, it is kept and sent in its turn, for the
        thread that sends it may be the one that drains. What is kept so is bounded by the calls that the peer has sent.

        Returns
        -------
        int
            The frame's position, 0 when it was kept.
        """
        cdef char stack[HEAD_ROOM]
        cdef char* start = stack
        cdef Encoder whole = None, forks = None
        cdef uint64_t size = body.total() if body is not None else 0, head_size
        cdef const char* payload = NULL
        cdef fr_block block
        cdef int64_t position
        cdef int64_t lent = -1
        cdef uint32_t in_block = 0
        cdef list pinned = None
        cdef Bulky bulky = None
        cdef Bulk along
        cdef Bulk* goes_along = NULL
        cdef iovec[MOST_PIECES] pieces
        cdef bint handed = False
        cdef int depth
        if fr_load32_acquire(&peer.died):
            raise peer.died_error()
        try:
            head.references = head.forks_size = 0
            if body is not None and body.references:
                forks, pinned = self.encoder(), []
                self._pack_forks(peer, body.references, head.kind == PYTHON_REMOTE_CALL, deadline_ns, forks, pinned)
                FR_FAILPOINT("fork.reserved")
                head.references, head.forks_size = len(body.references), forks.size
            if body is not None and body.forwarded:
                if pinned is None:
                    pinned = []
                self._pin_forwarded(body.forwarded, pinned)
                head.flags |= FLAG_FORWARDED
            if body is not None and body.blocks:
                handed = True
                self.hand_blocks(peer, body.blocks)
            if head.forks_size > INLINE_LIMIT:  # hundreds of references: they go into the block too
                in_block = (forks.size + 63) // 64 * 64  # buffers in the payload begin at a multiple of 64
                memset(forks.grow(in_block - forks.size), 0, in_block - head.forks_size)
                head.forks_size, head.block_forks = 0, in_block
                head.flags |= FLAG_FORKS_IN_BLOCK
                size += in_block
            if peer.is_far and (size > INLINE_LIMIT or in_block):
                along.start, along.size, along.pieces, along.piece_count = NULL, size, pieces, 0
                if peer.channel.borrowing and size >= LENT_FROM and not in_block:
                    along.piece_count = body.pieces(pieces, MOST_PIECES)
                if along.piece_count:
                    goes_along = &along
                else:
                    bulky = _bulky(size)
                    if in_block:
                        memcpy(bulky.bulk.start, forks.data, in_block)
                    depth = nogc_pause()
                    with nogil:
                        body.copy_to(bulky.bulk.start + in_block)
                    nogc_resume(depth)
                memset(&block, 0, sizeof(block))
                block.size, block.index = size, NO_ENTRY
                payload, size = <const char*>&block, sizeof(fr_block)
                head.flags |= FLAG_BLOCK
            elif size > INLINE_LIMIT or in_block:
                if self.lend(peer, body, size, &block):
                    lent = block.offset
                elif in_block:
                    raise ResourceError(f"no room for {head.references} references in a block of {size} bytes")
            if lent >= 0:
                if in_block:
                    memcpy(self.arena.base + lent, forks.data, in_block)
                depth = nogc_pause()
                with nogil:
                    body.copy_to(self.arena.base + lent + in_block)
                nogc_resume(depth)
                payload, size = <const char*>&block, sizeof(fr_block)
                head.flags |= FLAG_BLOCK
            elif payload == NULL and size and not body.segment_count:
                payload = body.data
            head_size = sizeof(fr_frame) + head.forks_size
            if head_size > HEAD_ROOM or (size and payload == NULL):  # many references, or a tensor inside a small payload
                whole = self.encoder()
                start = whole.grow(head_size + size)
                if payload == NULL:
                    body.copy_to(start + head_size)
                else:
                    memcpy(start + head_size, payload, size)
                head_size += size
                payload, size = NULL, 0
            head.payload = size if payload != NULL else head_size - sizeof(fr_frame) - head.forks_size
            memcpy(start, head, sizeof(fr_frame))
            if peer.is_far and head.deadline_ns:  # its clock is another one: what is left goes
                (<fr_frame*>start).deadline_ns = max(head.deadline_ns - fr_now_ns(), <int64_t>1)
            if head.forks_size:
                memcpy(start + sizeof(fr_frame), forks.data, head.forks_size)
            if bulky is not None:
                goes_along = &bulky.bulk
            position = SENT_FULL
            if not peer.outgoing or self.flush(peer):
                position = peer.channel.try_send_bulk(start, head_size, payload, size, goes_along)
            if position <= 0 and _may_wait(head.kind):
                position = self._wait_for_room(peer, start, head_size, payload, size, goes_along, deadline_ns)
            elif position < 0:
                self._cannot_send(peer, position, head_size + size)
            elif not position:
                if goes_along == &along:
                    bulky = _copied_together(body)
                peer.outgoing.append((start[:head_size] + (payload[:size] if size else b""), pinned, lent, bulky))
                if not fr_this_thread.leading:
                    self.wake_leader()  # it may sleep already, and it alone sends what was kept
        except BaseException:
            if handed:
                self.take_blocks_back(peer, body.blocks)
            if pinned is not None:
                self._unpin(peer, pinned)
            if lent >= 0:
                self.arena.give_back(lent)
            raise
        if goes_along == &along and position and not lends:
            self.take_back(peer, position, body)
        if _may_wait(head.kind):
            self.calls_sent += 1
        if position:
            self._sent(peer, position, pinned, lent)
        if forks is not None:
            self.encoder_done(forks)
        if whole is not None:
            self.encoder_done(whole)
        peer.release(self.arena)
        return position

    cdef int take_back(self, Peer peer, int64_t position, Encoder body) except -1:
        """Have the memory of a payload again that was lent for sending. What the peer has not confirmed is copied."""
        cdef Bulky bulky
        cdef timespec pause
        cdef int depth
        if not peer.channel.borrows(position):
            return 0
        try:
            bulky = _copied_together(body)
        except ResourceError:  # so it cannot be had before the peer has it all
            pause.tv_sec, pause.tv_nsec = 0, 1000000
            while peer.channel.borrows(position) and not fr_load32_acquire(&peer.died):
                depth = nogc_pause()
                with nogil:
                    nanosleep(&pause, NULL)
                nogc_resume(depth)
            return 0
        peer.channel.give_back(position, &bulky.bulk)
        return 0

    def send_control(self, peer: Peer, kind: int, call: int, payload: bytes) -> None:
        """Send one bookkeeping frame.

        Raises
        ------
        PeerError
            When the peer is dead.
        """
        cdef fr_frame head
        cdef Encoder body = self.encoder()
        memset(&head, 0, sizeof(fr_frame))
        head.kind, head.slot, head.call = kind, NO_SLOT, call
        body.raw(<const char*>payload, len(payload))
        try:
            self.post(peer, &head, body, 0)
        finally:
            self.encoder_done(body)

    cdef int _sent(self, Peer peer, int64_t position, list pinned, int64_t lent) except -1:
        """A frame is visible: its pins and its block are let go of when the peer has passed it."""
        if lent >= 0:
            peer.loans.append((position, lent))
        if pinned is not None:
            FR_FAILPOINT("fork.sent")
            for holder, index, _, _ in pinned:
                if holder is not None:
                    peer.pins.push(position, <Holder>holder, index)
        return 0

    cdef bint flush(self, Peer peer) except -1:
        """Send what waits for room, in order; True when nothing is left."""
        cdef int64_t position
        cdef Bulky bulky
        if peer.flushing:
            return False
        peer.flushing = True
        try:
            while peer.outgoing:
                record, pinned, lent, bulky = peer.outgoing[0]
                position = peer.channel.try_send_bulk(<const char*>(<bytes>record), len(record), NULL, 0, _bulk_of(bulky))
                if position <= 0:
                    break
                peer.outgoing.popleft()
                self._sent(peer, position, pinned, lent)
        finally:
            peer.flushing = False
        return not peer.outgoing

    def flush_all(self) -> bool:
        """Send what waits for room, to all peers; True when nothing is left."""
        empty = True
        for peer in self.peers:
            if peer is not None and (<Peer>peer).outgoing:
                empty = self.flush(<Peer>peer) and empty
        return empty

    def drop_outgoing(self, peer) -> None:
        """Undo what was still to be sent to a peer that has died."""
        while (<Peer>peer).outgoing:
            _, pinned, lent, _ = (<Peer>peer).outgoing.popleft()
            if pinned is not None:
                self._unpin(peer, pinned)
            if lent >= 0:
                self.arena.give_back(lent)

    cdef object _cannot_send(self, Peer peer, int64_t why, uint64_t size):
        if why == SENT_TOO_LARGE:
            raise ResourceError(f"a frame of {size} bytes to {peer.info.name!r} does not fit in a ring that carries at most "
                                f"{peer.channel.largest}")
        raise peer.died_error()

    cdef bint lend(self, Peer peer, Encoder body, uint64_t size, fr_block* block) except -1:
        """Describe a block for a payload, to be filled; False when there is none and it can go through the ring.

        A block with large buffers gets a table entry of its own: the peer may lease it, and go on reading when its loan
        has ended. Not when half of the arena is in use: peers may keep what they lease, and a full arena refuses calls.
        """
        cdef uint64_t offset
        if self.arena.unannounced and not self.knows_arena(peer):
            if size + HEAD_ROOM <= peer.channel.largest:
                return False
            raise ResourceError(f"worker {peer.info.name!r} has not read what it was sent about shared memory, and "
                                f"{size} bytes need some")
        if body.largest_in_place >= LEASE_FROM:
            peer.release(self.arena)
            if self.table.needs_sweep():  # the blocks that leases gave back are the warm ones
                self.sweep()
        try:
            offset = self.lend_to_all(size)
        except ResourceError:
            if size + HEAD_ROOM <= peer.channel.largest:
                return False
            raise
        block.offset, block.size, block.index, block.generation = offset, size, NO_ENTRY, 0
        if body.largest_in_place >= LEASE_FROM and self.arena.blocks.lent <= self.arena.blocks.limit * (FR_ARENA_PAGE // 2) \
                and (peer.rank == self.rank or self.has_bit(self.rank, peer.rank)):
            try:
                block.index, block.generation = self.open_entry()
                self.arena.pin(offset, block.index)
                self.table.set_state(block.index, "ready")  # nothing will be made for it
            except ResourceError:
                pass  # all entries are in use: the peer copies
            except BaseException:  # of a signal's handler
                self.arena.give_back(offset)
                raise
        return True

    cdef uint64_t lend_to_all(self, uint64_t size) except? 0xFFFFFFFFFFFFFFFF:
        """A block of the arena. When there is none, what others are done with is taken back, and copies are withdrawn."""
        try:
            return self.arena.lend(size)
        except ResourceError:
            for other in self.peers:
                if other is not None:
                    (<Peer>other).release(self.arena)
            self.sweep()
        try:
            return self.arena.lend(size)
        except ResourceError:
            self.withdraw_copies()
            self.sweep()
        return self.arena.lend(size)

    def withdraw_copies(self) -> None:
        """Let go of copies of values that only spare their readers a question."""
        raise NotImplementedError

    def hand_blocks(self, peer, blocks: list) -> None:
        """Send blocks for sharing ahead of the message that names them. Within one process there is nothing to send."""

    def take_blocks_back(self, peer, blocks: list) -> None:
        """The message that names them cannot be sent."""

    def knows_arena(self, peer) -> bool:
        """Whether a peer has been told of all files of this worker's arena."""
        raise NotImplementedError

    cdef int64_t _wait_for_room(self, Peer peer, const char* head, uint64_t head_size, const char* body, uint64_t body_size,
                                Bulk* along, int64_t deadline_ns) except -1:
        """The ring is full: drain our own inbox meanwhile, so that two full rings cannot wait for each other."""
        cdef int64_t position = SENT_FULL
        cdef int64_t nap_ns = 20000
        while True:
            position = SENT_FULL
            if not peer.outgoing or self.flush(peer):
                position = peer.channel.try_send_bulk(head, head_size, body, body_size, along)
            if position > 0:
                return position
            if position < 0 or fr_load32_acquire(&peer.died):
                self._cannot_send(peer, position, head_size + body_size)
            if deadline_ns and fr_now_ns() > deadline_ns:
                raise CallTimeout(f"RPCErr:1:RPC ran for more than set timeout and will now be marked with an error: "
                                  f"worker {peer.info.name!r} has not read its ring", peer.info.name)
            nap_ns = self._nap(nap_ns)

    cdef bint inherits(self, double timeout_s, int64_t deadline_ns) noexcept:
        """Whether a call of this thread has to be over when the one around it has, and not by a timeout of its own."""
        return timeout_s == -1.0 and deadline_ns and deadline_ns == fr_this_thread.deadline_ns

    cdef object raise_timeout(self, Peer peer, what, double timeout_s, bint inherited):
        shown = self.default_timeout_s if timeout_s == UNSET_RPC_TIMEOUT else timeout_s
        limit = "that of the call it was made in" if inherited else f"{shown * 1000:.0f} ms"
        raise CallTimeout(f"RPCErr:1:RPC ran for more than set timeout ({limit}) and will now be marked with "
                          f"an error: {what} on worker {peer.info.name!r}", peer.info.name)


cdef int64_t _deadline(double timeout_s) noexcept:
    if timeout_s == 0 or timeout_s >= FOREVER_S:
        return 0
    if not timeout_s > 0:  # negative, or no number: over at once
        return 1
    return fr_now_ns() + <int64_t>(timeout_s * 1e9)


cdef bint _may_wait(unsigned kind) noexcept:
    return kind == PYTHON_CALL or kind == PYTHON_REMOTE_CALL or kind == RREF_FETCH_CALL
