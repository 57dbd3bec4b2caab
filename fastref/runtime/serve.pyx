"""Calls in: the threads that serve, draining, taking references.

The thread that holds the drain token reads the rings. It acts on bookkeeping at once, and never runs code of the
program while it holds the token: not a function, not an unpickling, not a callback, not a destructor; the collector, which
would run some, is off meanwhile.
"""

from collections import deque
import logging
import os
import threading
import weakref

from cpython.bytes cimport PyBytes_FromStringAndSize
from libc.stdint cimport int64_t, uint32_t, uint64_t
from libc.string cimport memcpy, memset

from fastref._core cimport (FR_FAILPOINT, FR_FIRST, FR_LOST, FR_NO_CPU, FR_VALUE_READY, MirrorHolder, failpoints, fr_failpoints_here, fr_fork,
                            fr_now_ns, fr_store32_relaxed)
from fastref.carriers.borrow cimport Lease, lease_of_own
from fastref.channels.channel cimport Arrival, Bulk
from fastref.codec.payload cimport Encoder
from fastref.nogc cimport nogc_begin, nogc_end
from fastref.rref cimport OwnedValue, RRef, forks_so_far, make_rref
from fastref.runtime.calls cimport Pending
from fastref.runtime.execute cimport Executor, Job
from fastref.runtime.peer cimport Peer
from fastref.runtime.post cimport fr_thread, this_thread
from fastref.wire.frame cimport (FLAG_BLOCK, FLAG_ERROR, FLAG_FORKS_IN_BLOCK, FLAG_FORWARDED, FLAG_METHOD, FLAG_PICKLED, INTERN, NO_SLOT,
                                 PYTHON_CALL, PYTHON_REMOTE_CALL, PYTHON_RET, RREF_FETCH_CALL, FrameView, fr_block, fr_frame, next_fork,
                                 parse_frame)

from fastref.errors import PeerError, ProtocolError, ReferenceLost

__all__ = ["Server"]

fr_failpoints_here = failpoints()

logger = logging.getLogger("fastref")

cdef enum:
    IDLE = 0
    LOST = 1
    BATCH = 64              # answers that are settled together, so that the token is passed on once for all of them
    BASE_THREADS = 2        # always there; measured: four eager threads halve the rate of short functions
    CONVERSATION = 256      # waits in a row for which the leader keeps the interpreter lock
    IDLE_SLICES = 8         # of 100 ms each, after which a thread that was started for blocked ones ends
    SHORTEST_NAP_NS = 50000     # between looks at a peer's full ring
    LONGEST_NAP_NS = 10000000
    GRANT_MORE = 0xFFFF     # no frame: an entry of `controls` that this process makes itself


cdef int64_t FOREVER_NS = 1000000000000000000


cdef class Server(Executor):
    """The serving half of a runtime."""

    def __init__(self, *args, thread_cap: int = 16, **kwargs):
        super().__init__(*args, **kwargs)
        self.serving.bell, self.serving.listener = self.inbox.bell, &self.inbox.listener
        self.serving.hint = self.table.at.hint
        self.thread_cap = thread_cap
        self.queue, self.controls = deque(), deque()
        self.completions, self.errands = [], deque()
        self.watched = set()
        self._threads = weakref.WeakSet()
        self.credit_of = {}

    # ---- threads

    def start_threads(self) -> None:
        """Start the threads that are always there."""
        for _ in range(BASE_THREADS):
            self._start_thread()

    def _start_thread(self) -> None:
        self.threads += 1
        self.parked += 1  # counted from here on, so that the starter need not wait for it
        thread = threading.Thread(target=self._serve, name=f"fastref-serve-{self.threads}", daemon=True)
        self._threads.add(thread)
        try:
            thread.start()
        except RuntimeError:  # the system has no more threads: go on with those there are
            self.threads -= 1
            self.parked -= 1
            logger.exception("cannot start a serving thread; %d are there", self.threads)

    def thread_objects(self) -> list:
        """The serving threads."""
        return list(self._threads)

    def is_busy(self) -> bool:
        """True while a call is in this process: running, queued, not answered, or not read yet."""
        return bool(self.running or self.queue or self.completions or self.errands or self.controls
                    or self.futures_awaited)

    def is_ours(self) -> bool:
        """False in a child that ``os.fork`` made."""
        return self.fork_count == forks_so_far()

    def _serve(self) -> None:
        cdef fr_thread* me = this_thread()
        cdef int64_t slice_ns = self.slice_ns
        cdef bint mine
        cdef int64_t nap_ns = slice_ns, woken_ns
        cdef int idle_slices = 0
        cdef int status
        cdef uint64_t taken = 0
        cdef unsigned in_a_row = 0
        while not self.serving.stopping:
            with nogil:
                mine = fr_serve_follow(&self.serving, slice_ns)
            if not mine:
                idle_slices += 1
                if self.threads > BASE_THREADS and self.parked > 1 and idle_slices > IDLE_SLICES:
                    break
                continue
            idle_slices = 0
            self.parked -= 1
            me.leading = True
            while not self.serving.stopping:
                try:
                    status = self.lead()
                except BaseException:
                    logger.exception("the serving thread goes on after an error of its own")
                    status = IDLE if me.leading else LOST
                if status == LOST:
                    break
                if self.flushed:
                    nap_ns = slice_ns
                else:  # nobody rings when a full ring has room again: look, less and less often
                    nap_ns = SHORTEST_NAP_NS if nap_ns == slice_ns else min(nap_ns * 2, LONGEST_NAP_NS)
                # With the interpreter lock held only while records come in, and not for long: other threads want it.
                if self.inbox.taken != taken and in_a_row < CONVERSATION and fr_serve_wait_briefly(&self.serving):
                    taken = self.inbox.taken
                    in_a_row += 1
                    continue
                in_a_row = 0
                with nogil:
                    fr_serve_wait_leader(&self.serving, nap_ns)
                    woken_ns = fr_now_ns() if self.gil_is_profiled else 0
                if woken_ns:
                    self.gil_waits += 1
                    self.gil_waited_ns += fr_now_ns() - woken_ns
            if me.leading:
                me.leading = False
                fr_store32_relaxed(&self.serving.token, 0)
            self.parked += 1
        self.parked -= 1
        self.threads -= 1

    def step(self) -> bool:
        """Act on everything that has arrived, on the calling thread; True if there was something. For tests."""
        cdef fr_thread* me = this_thread()
        cdef bint work
        if not fr_serve_take_token(&self.serving):
            return False
        work = self.inbox.has_any() or bool(self.queue or self.errands or self.controls or self.completions)
        self.parked += 1  # the caller stands for all serving threads: no other is started
        me.leading = True
        try:
            self.lead()
        finally:
            self.parked -= 1
            me.leading = False
            fr_store32_relaxed(&self.serving.token, 0)
        return work

    def abandon_handles(self) -> None:
        """Let no handle of this runtime touch a shared word any more, as if its process had been killed."""
        self.fork_count += 1000000

    def stop_threads(self) -> None:
        """Tell all serving threads to end once they are out of user code."""
        with nogil:
            fr_serve_stop(&self.serving)

    cdef void blocked(self, bint yes) noexcept:
        cdef fr_thread* me = this_thread()
        if not me.running:
            return
        if yes:
            self.running -= 1
            if me.away:
                fr_serve_block(&self.serving)
            self.count_queue()
        else:
            self.running += 1
            if me.away:
                fr_serve_unblock(&self.serving)
            self.count_queue()

    cdef void count_queue(self) noexcept:
        """Publish how many queued calls may run now, and wake somebody for them."""
        cdef uint32_t runnable = len(self.queue) if self.running < self.thread_cap else 0
        fr_store32_relaxed(&self.serving.queued, runnable)
        if runnable:
            fr_serve_kick(&self.serving)

    cdef int unpark(self, list jobs) except -1:
        self.queue.extend(jobs)
        self.count_queue()
        return 0

    cdef void answered_to(self, uint32_t cpu) noexcept:
        fr_store32_relaxed(&self.serving.partner_cpu, cpu)

    # ---- the leader

    cdef int lead(self) except -1:
        """Drain and run until nothing is left (IDLE) or another thread has the token (LOST)."""
        cdef fr_thread* me = this_thread()
        cdef int status
        nogc_begin()
        try:
            status = self._lead()
            if status == IDLE:
                self.flushed = self.flush_all()
            return status
        finally:
            if me.leading:  # else ``run`` has ended it
                nogc_end()

    cdef int _lead(self) except -1:
        cdef Job job
        while not self.serving.stopping:
            job = None
            fr_store32_relaxed(&self.serving.errands, 0)
            if self.queue and self.running < self.thread_cap:
                job = self.queue.popleft()
                self.count_queue()
            else:
                job = self.drain(True)
            if self.table.needs_sweep():
                self.sweep()
            if self.watched and job is None:
                self._look_at_the_dead()
            if job is None and not self.completions and not self.errands:
                return IDLE
            if not self.run(job, True):
                while self.queue and self.running < self.thread_cap:
                    job = self.queue.popleft()
                    self.count_queue()
                    self.run(job, False)
                return LOST
        return IDLE

    def do_later(self, errand) -> None:
        """Have a callable run by a serving thread, without the drain token."""
        self.errands.append(errand)
        self.wake_leader()

    def do_at_rest(self, kind: int, what) -> None:
        """Have ``handle_control`` called with a kind that is no frame's, by the thread that reads the rings, between two
        records.
        """
        self.controls.append((self.peers[self.rank], 0, kind, b"", [what]))
        self.wake_leader()

    def wake_leader(self) -> None:
        """Have the leader look round: at errands, the table, the dead."""
        fr_store32_relaxed(&self.serving.errands, 1)
        with nogil:
            fr_serve_kick(&self.serving)

    def watch_inbox(self, rank: int) -> None:
        """Report through ``inbox_drained`` when nothing of a dead worker is left to read."""
        self.watched.add(rank)
        self.wake_leader()

    def _look_at_the_dead(self) -> None:
        for rank in list(self.watched):
            if self.inbox.is_empty(rank):
                self.watched.discard(rank)
                self.inbox_drained(rank)

    cdef int drain_while_waiting(self) except -1:
        """Take in what has arrived, without running anything: for a thread that waits for room or credits."""
        cdef fr_thread* me = this_thread()
        if me.draining:
            return 0
        if me.leading:
            self.drain(False)
        elif fr_serve_take_token(&self.serving):
            me.leading = True
            nogc_begin()
            try:
                self.drain(False)
            finally:
                nogc_end()
                self.inbox.put_back()
                me.leading = False
                fr_store32_relaxed(&self.serving.token, 0)
                self.count_queue()
                fr_serve_kick(&self.serving)
        return 0

    cdef Job drain(self, bint run_calls):
        """Read records until there is a call to run. Calls that may not run now are queued."""
        cdef Arrival arrival
        cdef Job job
        cdef int found
        cdef fr_thread* me = this_thread()
        cdef Peer peer
        while True:
            if self.controls and not me.draining:
                peer, head_call, kind, payload, references = self.controls.popleft()
                self.handle_control(peer, kind, head_call, payload, references)
                continue
            found = self.inbox.next(&arrival)
            if not found:
                return None
            peer = self.peers[arrival.source] if arrival.source < len(self.peers) else None
            if found < 0 or peer is None:
                self.peer_broke(arrival.source, "a damaged record")
                continue
            me.draining = True
            try:
                job = self.accept(&arrival, peer)
            except BaseException as error:
                self.inbox.done()
                logger.exception("a frame from %s could not be read", peer.name)
                if isinstance(error, ProtocolError):
                    self.peer_broke(arrival.source, str(error))
                continue
            finally:
                me.draining = False
            if job is None:
                continue
            if job.head.kind == PYTHON_RET:
                self.completions.append(job)
                if len(self.completions) >= BATCH and run_calls:
                    return None
            elif run_calls and self.running < self.thread_cap:
                return job
            else:
                self.queue.append(job)
                self.count_queue()

    cdef Job accept(self, Arrival* arrival, Peer peer):
        """Turn one record into a job, or into an entry of ``controls``. The record is done with afterwards."""
        cdef FrameView view
        cdef Job job
        cdef fr_block block
        cdef const char* payload
        cdef uint64_t size
        cdef list references = []
        cdef Lease lease = None
        cdef int64_t left_ns
        FR_FAILPOINT("ring.reader_holds")
        if not parse_frame(arrival.data, arrival.size, &view):
            raise ProtocolError(f"worker {peer.info.name!r} sent {arrival.size} bytes that are not a frame")
        payload, size = view.payload, view.payload_size
        if peer.is_far:
            lease = self._bulk_of(&view, peer)
            if view.head.deadline_ns:  # what is left of it: clocks differ
                left_ns = view.head.deadline_ns
                view.head.deadline_ns = fr_now_ns() + min(max(left_ns, <int64_t>1), FOREVER_NS)
        elif view.head.slot != NO_SLOT and view.head.kind != PYTHON_RET:
            fr_serve_expect(&self.serving)
            peer.slots.expect(view.head.slot)
        if view.head.flags & FLAG_BLOCK:
            memcpy(&block, payload, sizeof(fr_block))
            if not peer.is_far:
                lease = peer.arena.take(block.offset, block.size, block.index, block.generation,
                                        self.site_of(&view.head))
            payload = <const char*>lease.start if lease is not None else peer.arena.borrow(block.offset, block.size)
            size = block.size
            if view.head.flags & FLAG_FORKS_IN_BLOCK:
                if view.head.block_forks > size:
                    raise ProtocolError(f"worker {peer.info.name!r} claims {view.head.block_forks} bytes of references in {size}")
                view.forks, view.payload = payload, payload + view.head.block_forks
                payload, size = view.payload, size - view.head.block_forks
        lost = self.take_references(&view, peer, references) if view.head.references else 0
        if not view.head.flags & FLAG_FORWARDED:  # else its sender holds what it points to until the record is done with
            self.inbox.acquired()
        FR_FAILPOINT("fork.received")
        if view.head.kind > RREF_FETCH_CALL:
            data = PyBytes_FromStringAndSize(payload, size)
            self.inbox.done()
            FR_FAILPOINT("ring.reader_released")
            self.controls.append((peer, view.head.call if view.head.kind != INTERN else view.head.callable,
                                  view.head.kind, data, references))
            return None
        if len(references) < _references_needed(&view.head):
            raise ProtocolError(f"worker {peer.info.name!r} sent a frame of kind {view.head.kind} with {len(references)} references")
        job = Job.__new__(Job)
        job.head, job.peer, job.references = view.head, peer, references
        try:
            if lost:
                raise ReferenceLost(f"{lost} of the references that worker {peer.info.name!r} sent ended on the way",
                                    peer.info.name)
            if view.head.flags & (FLAG_PICKLED | FLAG_ERROR):
                if lease is None:
                    job.payload = PyBytes_FromStringAndSize(payload, size)
                job.lease, job.start, job.size = lease, payload, size
            elif view.head.flags & FLAG_FORWARDED:
                job.body = self.decode_forwarded(payload, size, view.head.flags, references, lease, self.site_of(&view.head))
            elif size:
                job.body = self.decode_any(payload, size, view.head.flags, references, lease)
        except Exception as error:
            job.failure = error
        self.inbox.done()
        FR_FAILPOINT("ring.reader_released")
        if view.head.kind == PYTHON_REMOTE_CALL:
            self._register_remote(job)
        return job

    cdef Lease _bulk_of(self, FrameView* view, Peer peer):
        """The payload that came along with a frame, None when there is none. Its memory is ours from here on."""
        cdef fr_block block
        cdef Bulk bulk = self.inbox.take_bulk()
        cdef Lease lease = None
        if bulk.start != NULL:
            lease = lease_of_own(bulk.start, bulk.size, bulk.give)
        memset(&block, 0, sizeof(block))
        if view.head.flags & FLAG_BLOCK:
            memcpy(&block, view.payload, sizeof(fr_block))
        if view.head.flags & FLAG_FORWARDED or block.size != bulk.size or bool(view.head.flags & FLAG_BLOCK) != (lease is not None):
            raise ProtocolError(f"worker {peer.info.name!r}, with whom no memory is shared, sent a frame with flags "
                                f"{view.head.flags:#x}, {block.size} bytes behind it, and {bulk.size} came")
        return lease

    cdef uint32_t site_of(self, fr_frame* head):
        """What a block that comes with a frame is used for."""
        if head.kind != PYTHON_RET:
            return head.callable
        pending = self.pending.get(head.call)
        return 0 if pending is None else (<Pending>pending).site

    cdef int take_references(self, FrameView* view, Peer peer, list references) except -1:
        """Take every reference of a frame, before the cursor moves and before anything runs; returns how many are lost."""
        cdef fr_fork fork
        cdef const char* at = view.forks
        cdef const char* following
        cdef Peer owner
        cdef OwnedValue owned
        cdef int i, taken, lost = 0
        for i in range(view.head.references):
            following = next_fork(at, view.payload, &fork)
            if following == NULL:
                raise ProtocolError(f"worker {peer.info.name!r} changed a frame while it was read")
            type_str = None
            if fork.type_size:
                type_str = (following - fork.type_size)[:fork.type_size].decode()
            at = following
            owner = self.peers[fork.owner] if fork.owner < len(self.peers) else None
            owned = None
            if owner is None or not fork.has_entry or fork.index >= owner.holder.h.at.capacity \
                    or fork.generation - owner.first_generation >= owner.generations:  # of another who had its rank
                lost += 1
                references.append(None)
                continue
            if fork.owner == self.rank:
                if fork.index < len(self.owned):
                    owned = self.owned[fork.index]
                # Without a value it must be an entry that was opened for a remote(). That request may still be on its
                # way: a reference to its result can overtake it through another worker's ring.
                if owned is None and fork.index not in self.credit_of:
                    lost += 1
                    references.append(None)
                    continue
                if self.table.at.descriptors[fork.index].generation != fork.generation:
                    lost += 1
                    references.append(None)
                    continue
            taken = owner.holder.take(fork.index, fork.generation)
            if taken == FR_LOST:
                lost += 1
                references.append(None)
                continue
            if owner.is_far and taken == FR_FIRST:  # whether the value is there only its owner can say: fetches ask
                (<MirrorHolder>owner.holder).show(fork.index, fork.generation, FR_VALUE_READY)
            if fork.owner == self.rank and owned is None:
                owned = OwnedValue.__new__(OwnedValue)
                owned.name = <uint64_t>fork.rref_created_on << 48 | fork.rref_local
                self.own(fork.index, owned)
            elif not owner.holder.h.bit:
                self.received_abroad(peer, fork.owner, fork.index, fork.generation,
                                     <uint64_t>fork.fork_created_on << 48 | fork.fork_local, fork.parent)
            references.append(make_rref(self, owner.holder, &fork, owned, type_str))
        return lost

    def _register_remote(self, job: Job) -> None:
        """The peer has used one of the entries that were opened for it."""
        FR_FAILPOINT("remote.received")
        if job.references and job.references[0] is not None:
            index = (<RRef>job.references[0]).fork.index
            if self.credit_of.pop(index, None) is not None:
                job.peer.credits_open -= 1
                if job.peer.credits_open < job.peer.credit_window // 2:
                    self.controls.append((job.peer, 0, GRANT_MORE, b"", None))  # grant more, once the inbox is at rest

    # ---- running

    cdef int run(self, Job job, bint leading) except -1:
        """Settle answers, drop values, run a call and answer it. Returns whether this thread still leads."""
        cdef fr_thread* me = this_thread()
        cdef Encoder body = None
        cdef int flags = 0
        cdef int64_t outer_deadline = me.deadline_ns
        if leading:
            self.inbox.put_back()
            if job is not None and self.parked == 0:
                self._start_thread()
            me.leading, me.away = False, True
            nogc_end()
            fr_serve_pass_token(&self.serving)
        try:
            while leading and self.completions:
                batch, self.completions = self.completions, []
                for done in batch:
                    self.complete(<Job>done)
                    if _owes_deletes((<Job>done).peer):
                        self.delete_what_is_gone((<Job>done).peer)
                batch = None
            while leading and self.errands:
                errand = self.errands.popleft()
                try:
                    errand()
                except Exception:
                    logger.exception("an errand failed")
                errand = None
            if job is not None:
                self.running += 1
                if self.queue:
                    self.count_queue()  # this may have been the last one that may run
                me.running += 1
                me.deadline_ns = job.head.deadline_ns
                fr_store32_relaxed(&self.serving.partner_cpu, FR_NO_CPU)
                FR_FAILPOINT("call.running")
                try:
                    body = self.execute(job, &flags)
                    if self.fork_count != forks_so_far():
                        os._exit(0)  # a child that the function forked has come back here: it must touch nothing of ours
                finally:
                    me.running -= 1
                    self.running -= 1
                    me.deadline_ns = outer_deadline
        finally:
            if leading:
                me.away = False
                me.leading = leading = fr_serve_retake_token(&self.serving)
                if leading:
                    nogc_begin()
        if self.queue:
            self.count_queue()
        if job is not None and not job.parked:
            self.calls_served += 1
        if body is not None:
            FR_FAILPOINT("call.encoded")
            try:
                self.answer(job, body, flags)
            except PeerError as error:
                logger.debug("nobody is left to answer: %s", error)
            self.encoder_done(body)
            FR_FAILPOINT("call.sent")
            if _owes_deletes(job.peer):
                self.delete_what_is_gone(job.peer)
        return leading

    def sweep(self) -> None:
        """Close what nobody holds. Values are let go of on a serving thread, for destructors may do anything.

        Compiled: no signal handler may raise between the closing of an entry and its freeing.
        """
        dropped = []
        for index in self.table.sweep():
            owned = self.owned[index] if index < len(self.owned) else None
            if owned is not None:
                dropped.append(owned)
                self.owned[index] = None
                self.forget_copy(owned)
            self.arena.closed(index)
            rank = self.credit_of.pop(index, None)
            if rank is not None:
                (<Peer>self.peers[rank]).credits_open -= 1
            self.table.free(index)
        if dropped:
            self.do_later(dropped.clear)

    # ---- what the runtime above decides

    def handle_control(self, peer, kind: int, call: int, payload: bytes, references: list | None) -> None:
        raise NotImplementedError

    def peer_broke(self, rank: int, what: str) -> None:
        raise NotImplementedError

    def received_abroad(self, peer, owner: int, index: int, generation: int, fork: int, parent: int) -> None:
        raise NotImplementedError

    def inbox_drained(self, rank: int) -> None:
        raise NotImplementedError

    def delete_what_is_gone(self, peer) -> None:
        raise NotImplementedError


cdef inline bint _owes_deletes(Peer peer) except -1:
    """Whether this process has let go of what it held of a peer by messages, and has not said so."""
    return not peer.holder.h.bit and len(peer.holder.gone) > 0


cdef int _references_needed(const fr_frame* head) noexcept:
    """What a call makes, whose value it fetches, and whose method it is: they come first."""
    if head.kind == PYTHON_RET:
        return 0
    return (head.kind != PYTHON_CALL) + (head.kind != RREF_FETCH_CALL and head.flags & FLAG_METHOD != 0)
