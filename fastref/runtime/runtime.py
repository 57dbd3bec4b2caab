"""One worker of a job: joins, links up, serves, and leaves."""

from __future__ import annotations

import atexit
import contextlib
import dataclasses
import errno
import logging
import math
import os
import sys
import threading
import time
import weakref
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from fastref._core import Holder, IdGenerator, ReferenceTable, failpoint
from fastref._version import __version__
from fastref.carriers.warm import warm_figures
from fastref.channels.channel import BELL_UNANNOUNCED, MAX_PEERS, Inbox
from fastref.channels.inproc import InprocChannel
from fastref.channels.shm import RING_SIZE, ShmChannel
from fastref.channels.slots import PeerSlots, ResponseSlots
from fastref.codec import mainmodule
from fastref.errors import CallTimeout, PeerError, RendezvousError, ResourceError, UsageError, WorkerDied
from fastref.identity import forget_loopback_token
from fastref.options import RpcBackendOptions, WorkerInfo, check_worker_name
from fastref.protocol.membership import generations_of
from fastref.rendezvous import (
    LEAVING,
    LINK_FAILED,
    MEMBER_SUFFIX,
    Door,
    Link,
    Listener,
    Membership,
    Segments,
    TcpLink,
    WorkerRecord,
    ask_members,
    check_no_group,
    check_no_job,
    check_numbers,
    check_rank,
    could_not_start,
    group_name,
    is_open,
    job_name,
    join,
    link_all,
    link_members,
    open_door,
    place_of,
    resolve_member_rank,
    take_turn,
    tell_coordinator,
    tell_members,
)
from fastref.rendezvous.fields import read_text
from fastref.runtime.abroad import Abroad, mirror_of
from fastref.runtime.blocks import BlockExchange
from fastref.runtime.groups import GroupKeeper
from fastref.runtime.memory import LAYOUT, SLOTS, OwnMemory, PeerMemory
from fastref.runtime.monitor import PERIOD_S, Monitor
from fastref.runtime.peer import Peer
from fastref.segments import InstanceLock, job_directory, network_identity, run_root, sweep
from fastref.segments.shared import SharedBlock
from fastref.wire.kinds import Kind

__all__ = ["Runtime"]

logger = logging.getLogger("fastref")

LOOPBACK_ROOM = 4096  # records that may be under way to ourselves
LONGEST_SILENCE_S = 1e9  # what is longer is for ever
IDS_BITS = 36  # of a worker's ids are its own count; the bits above tell it from others who had its rank


class Runtime(GroupKeeper):
    """A worker, from joining its job to leaving it.

    Parameters
    ----------
    name : str
        Unique in the job.
    rank : int
        -1: from where the init method has it.
    world_size : int or None
        None, where the init method has none either: a group that workers join and leave.
    options : RpcBackendOptions
    store : torch.distributed.Store, optional
        Instead of the one that the init method leads to.
    count : int
        Jobs that this process joined before.
    before_serving : callable
        Called with the runtime when all links are there and before the first call is served.

    Raises
    ------
    RendezvousError, UsageError, ResourceError
        When the job does not come about; nothing is left behind then.
    """

    def __init__(
        self,
        name: str,
        rank: int,
        world_size: int | None,
        options: RpcBackendOptions,
        store: Any = None,
        count: int = 0,
        before_serving: Callable[[Runtime], None] = lambda runtime: None,
    ) -> None:
        self._before_serving = before_serving
        self.options = options
        self.bits = options.table_bits
        self.main_digest = mainmodule.fingerprint()
        self._links: dict[int, Link] = {}
        self._far_links: dict[int, TcpLink] = {}
        self.silence_s = min(options.peer_timeout, LONGEST_SILENCE_S)
        self._door: Door | None = None
        self._has_looked = False  # whether it needs one
        self._abroad: Abroad | None = None
        self._closing = threading.Lock()
        self._ended = threading.Lock()
        self._monitor: Monitor | None = None
        self._membership: Membership | None = None
        self._listener: Listener | None = None
        self._memory: OwnMemory | None = None
        self.blocks = BlockExchange()
        self._is_open = False  # the group that it wants to join, or has joined
        self._checks = False  # on the way out: this worker wants to look at what others hold
        self._failure: str | None = None  # why another worker gave up while this one waited for it to serve
        with _typed_want_of_descriptors():
            root = run_root()
            sweep(root, clear=forget_loopback_token)
            self._lock = InstanceLock(root)
        try:
            with _typed_want_of_descriptors():
                self._start(name, rank, world_size, store, count)
        except BaseException as error:
            try:
                self._give_up()
                if isinstance(error, Exception) and not self._is_open:
                    self._tell_others(error, name, rank, world_size, store, count)
            finally:
                self._release()
            raise
        _alive.add(self)

    def _start(self, name: str, rank: int, world_size: int | None, store: Any, count: int) -> None:
        options = self.options
        deadline = time.monotonic() + options.rpc_timeout if options.rpc_timeout else math.inf
        self._is_open = is_open(options.init_method, world_size)
        if self._is_open:
            self._start_in_group(name, rank, store, count, deadline)
            return
        directory = job_directory(run_root(), job_name(options.init_method))
        # First of all: over it a worker that fails in what follows can be heard.
        self._listener = Listener(directory, self._lock.instance)
        self._door = open_door(
            self._listener,
            options.init_method,
            store,
            token=options.token,
            address=options.address,
            tls=options.tls,
        )
        self._has_looked = True
        failpoint("rendezvous.listening")
        check_worker_name(name)
        check_numbers(rank, world_size)
        check_no_group(self._listener, has_left_one=count > 0)
        self._memory = OwnMemory(self._lock, options)
        self._membership = join(
            self._describe(name), self._listener, options.init_method, rank, world_size, options.rpc_timeout, store,
            count, self._door,
        )  # fmt: skip
        failpoint("rendezvous.joined")
        self.record = record = self._membership.record
        self._build(record)
        try:
            self._link_up(deadline)
        except WorkerDied as error:
            raise RendezvousError(f"worker {record} cannot start: {error}") from error

    def _start_in_group(self, name: str, rank: int, store: Any, count: int, deadline: float) -> None:
        """Join a group of open size: meet all members one by one, and be known to all of them."""
        options = self.options
        check_worker_name(name)
        rank = resolve_member_rank(options.init_method, rank, has_store=store is not None)
        check_rank(rank, MAX_PEERS)
        directory = job_directory(run_root(), group_name(options.init_method, store))
        self._listener = Listener(directory, self._lock.instance, MEMBER_SUFFIX)
        failpoint("rendezvous.listening")
        self._memory = OwnMemory(self._lock, options)
        record = dataclasses.replace(self._describe(name), rank=rank, world_size=0)
        check_no_job(self._listener, has_left_one=count > 0)
        with take_turn(self._listener, deadline):
            members, used = ask_members(record, self._listener, deadline)
            self.record = record = dataclasses.replace(record, incarnation=used.get(rank, 0))
            self._build(record)
            self._link(lambda segments_for: link_members(record, members, segments_for, deadline))
            self.begin_group(used)
            linked = self._begin_to_serve()
            self.enter_group()
        self._wait_for_greetings(linked, deadline)

    def _build(self, record: WorkerRecord) -> None:
        """Make what a worker has, once it knows who it is."""
        memory, options = self._memory, self.options
        assert memory is not None
        generations = generations_of(record.incarnation) if not record.world_size else range(0xFFFFFFFF)
        table = ReferenceTable(
            memory.hold, memory.descriptors, memory.capacity, memory.usable, generations.stop, generations.start,
            memory.bell,
        )  # fmt: skip
        super().__init__(
            record.rank, WorkerInfo(record.name, record.rank), [], Inbox(memory.bell),
            ResponseSlots(memory.slots, SLOTS), memory.make_arena(table.holder), table,
            IdGenerator(record.rank, record.incarnation << IDS_BITS), options.rpc_timeout,
            thread_cap=options.num_worker_threads, incarnation=record.incarnation, strict=options.strict,
        )  # fmt: skip

    def _give_up(self) -> None:
        """Undo what others may have seen already of a worker that does not start."""
        if self._monitor is not None:  # it serves
            self.close()
            self.stop_threads()
        if self._is_open:
            self.end_group()
            self._say_goodbye()

    def _describe(self, name: str) -> WorkerRecord:
        """Return what this worker tells others about itself; rank and world size are not known yet."""
        assert self._listener is not None
        return WorkerRecord(
            name=name, rank=0, pid=os.getpid(), instance=self._lock.instance, address=str(self._listener.path),
            world_size=1, version=__version__, layout=LAYOUT, bits=self.options.table_bits,
            host=place_of(self._lock.instance), entries=self.options.table_capacity,
            silence_ms=math.ceil(self.silence_s * 1e3), strict=self.options.strict,
            network=network_identity(),
        )  # fmt: skip

    def _tell_others(
        self, error: Exception, name: str, rank: int, world_size: int | None, store: Any, count: int
    ) -> None:
        """Say why this worker does not start to those who would wait for it."""
        cause = f"{type(error).__name__}: {error}"
        try:
            if self._membership is not None:
                self._tell_members(error, cause)
            # What came of the meeting itself has been told there, also when it is raised as something else.
            elif self._listener is not None and not isinstance(error, RendezvousError):
                if not isinstance(error.__cause__, RendezvousError):
                    record, method = self._describe(name), self.options.init_method
                    tell_coordinator(
                        record, self._listener, method, rank, world_size, cause, store, count, self._door,
                        self._has_looked,
                    )  # fmt: skip
        except (OSError, RuntimeError, ValueError) as trouble:
            error.add_note(f"The other workers could not be told: {trouble}")

    def _tell_members(self, error: Exception, cause: str) -> None:
        assert self._membership is not None
        record, members = self._membership.record, self._membership.members
        if isinstance(error, RendezvousError):
            # All members have it from where this worker has it, and wait for an answer of nobody.
            sentence, heard_s = str(error), 0.0
        else:
            job = job_name(self.options.init_method)
            sentence, heard_s = could_not_start(job, record, members[0], cause), 1.0
        for link in self._links.values():
            try:
                link.send_message(LINK_FAILED, {"sentence": sentence[:2000]})
            except PeerError:
                pass  # it has left, or died, before us
        tell_members(record, members, sentence, heard_s, self._door)

    def _link_up(self, deadline: float) -> None:
        """Link to every other worker, start serving, and wait until all of them serve."""
        assert self._membership is not None and self._listener is not None
        listener, membership = self._listener, self._membership
        self._link(
            lambda segments_for: link_all(
                membership.record, membership.members, listener, segments_for, deadline, self._door
            )
        )
        if self._door is not None and not self._far_links:
            self._door.close()  # all have come, and nobody comes again
        self._wait_for_greetings(self._begin_to_serve(), deadline)

    def _link(self, make: Callable[[Callable[[WorkerRecord], Segments]], Mapping[int, Link | TcpLink]]) -> None:
        """Have ``make`` make the links; it is given what makes the segments for one peer, its ring among them."""
        assert self._memory is not None
        memory = self._memory
        rings: dict[int, int] = {}

        def segments_for(peer: WorkerRecord) -> Segments:
            rings[peer.rank], ring = memory.create_ring(peer.rank)
            self.inbox.add_ring(peer.rank, ring, RING_SIZE)
            return memory.for_peer(rings[peer.rank])

        try:
            for rank, link in make(segments_for).items():
                if isinstance(link, TcpLink):
                    self._far_links[rank] = link
                else:
                    self._links[rank] = link
        finally:
            for fd in rings.values():
                os.close(fd)
        failpoint("rendezvous.linked")

    def _begin_to_serve(self) -> list[Peer]:
        """Meet all who are linked, serve them, and greet them; returns them."""
        memory, record = self._memory, self.record
        assert memory is not None and self._listener is not None
        generations = range(self.table.first_generation, self.table.generation_limit)
        arena = memory.files.serve(self.arena, self.table.holder, memory.bell[BELL_UNANNOUNCED])
        arena.belongs_to(self.rank, self.bits, generations)
        myself = Peer(
            self.rank, self.info, os.getpid(), InprocChannel(self.inbox, self.rank, room=LOOPBACK_ROOM),
            PeerSlots(memory.slots, SLOTS), self.table.holder,
            arena, self.bits, record.incarnation, generations, sys.intern(record.host),
        )  # fmt: skip
        self.meet(myself)
        self.peers[self.rank].shares_main = True
        linked = [self.peer_over(link) for link in self._links.values()]
        if self._far_links:
            linked += self._go_abroad()
        for peer in linked:
            self.meet(peer)
        self._monitor = Monitor(
            self._listener,
            on_death=self.on_death,
            on_tick=self.on_tick,
            on_message=self._on_message,
            on_link=self.on_link,
            on_ask=self.on_ask,
            due=lambda: self.next_expiry_ns / 1e9,
        )
        for rank, link in self._links.items():
            self.introduce_memory(rank, link)
            self._monitor.watch(rank, link)
        if self.options.switch_interval is not None:
            sys.setswitchinterval(self.options.switch_interval)
        self._before_serving(self)  # functions that peers call here may make calls of their own
        self.start_threads()
        if self._abroad is not None:
            self._monitor.serve(self._abroad.fileno(), self._abroad.step)
        self._monitor.start()
        if self._abroad is not None:
            self._abroad.begin()
        for peer in linked:
            self.tell(peer, Kind.GREETING, self.main_digest)
        failpoint("rendezvous.greeting")
        return linked

    def _wait_for_greetings(self, awaited: list[Peer], deadline: float) -> None:
        """Wait until those whom this worker has linked serve, and know it."""
        with self._greeted:
            while not self._greeted.wait_for(lambda: self._all_greeted(awaited), timeout=0.1):
                if time.monotonic() > deadline:
                    missing = [peer.name for peer in awaited if not peer.greeted]
                    raise RendezvousError(f"workers {missing} have linked to {self.info} but do not serve")

    def _all_greeted(self, awaited: list[Peer]) -> bool:
        if self._failure is not None:
            raise RendezvousError(self._failure)
        for peer in awaited:
            if not peer.greeted and peer.is_dead and self.is_static:
                raise peer.died_error()
        return all(peer.greeted or peer.is_dead for peer in awaited)

    def peer_over(self, link: Link) -> Peer:
        """Return the worker at the other end of a link, what it handed over mapped."""
        record, theirs = link.record, PeerMemory(link)
        bit = self.rank if self.rank < theirs.bits else None
        holder = Holder(theirs.hold, theirs.descriptors, theirs.capacity, bit, theirs.bell)
        generations = range(0xFFFFFFFF) if record.world_size else generations_of(record.incarnation)
        arena = theirs.files.open(holder)
        arena.belongs_to(record.rank, theirs.bits, generations, theirs.bell[BELL_UNANNOUNCED])
        return Peer(
            record.rank, WorkerInfo(record.name, record.rank), record.pid,
            ShmChannel(theirs.ring, RING_SIZE, theirs.bell, self.rank), PeerSlots(theirs.slots, theirs.slot_count),
            holder, arena, theirs.bits, record.incarnation, generations, sys.intern(record.host),
        )  # fmt: skip

    def _go_abroad(self) -> list[Peer]:
        """Return the workers that are linked over TCP."""
        assert self._door is not None
        self._abroad = abroad = Abroad(
            self.record, self.inbox, self._door, self.silence_s, self._gone_abroad,
            lambda rank, body: self._on_message(rank, LINK_FAILED, body, {}), self._wake_monitor,
        )  # fmt: skip
        return [self._peer_abroad(link, abroad) for link in self._far_links.values()]

    def _wake_monitor(self) -> None:
        if self._monitor is not None:
            self._monitor.wake()

    def _peer_abroad(self, link: TcpLink, abroad: Abroad) -> Peer:
        """Return the worker at the other end of a TCP connection, with which no memory is shared."""
        record = link.record
        # Of two that could share memory, but could not reach each other, each is alone for the other.
        host = record.host if record.host != self.record.host else f"{record.host}:{record.instance}"
        peer = Peer(
            record.rank, WorkerInfo(record.name, record.rank), record.pid,
            abroad.add(link), None, mirror_of(record.entries), None, record.bits, record.incarnation,
            host=sys.intern(host),
        )  # fmt: skip
        peer.way = str(link.way)
        return peer

    def _gone_abroad(self, rank: int, reason: str, left: bool) -> None:
        """The session with a worker of another host is over."""
        if left:
            self.peers[rank].left = True
        if not self.peers[rank].is_dead:
            self.on_death(rank, reason)

    # ---- what the room below asks for

    def expires_sooner(self) -> None:
        if self._monitor is not None and self.next_expiry_ns < time.monotonic_ns() + PERIOD_S * 1e9:
            self._monitor.wake()  # it may sleep longer than that

    def knows_arena(self, peer: Peer) -> bool:
        assert self._memory is not None
        return self._memory.files.knows_all(peer.rank)

    def introduce_memory(self, rank: int, link: Link) -> None:
        """Tell a peer, from here on, of shared memory as it comes and goes."""
        assert self._memory is not None
        self._memory.files.introduce(rank, link)
        self.blocks.introduce(rank, link)

    def hand_blocks(self, peer: Peer, blocks: list[SharedBlock]) -> None:
        assert self._memory is not None
        if blocks and peer.is_far:
            raise UsageError(
                f"memory that several write cannot be shared with worker {peer.name!r}, which is reached over TCP: "
                "send a copy of the tensor (tensor.clone())"
            )
        for block in blocks:
            if not self.blocks.hand(None if peer.rank == self.rank else peer.rank, block):
                self._memory.files.count_unannounced()  # the clock goes on sending

    def take_blocks_back(self, peer: Peer, blocks: list[SharedBlock]) -> None:
        if peer.is_far:
            return
        for block in blocks:
            self.blocks.take_back(None if peer.rank == self.rank else peer.rank, block)

    def claim_block(self, number: int) -> SharedBlock:
        return self.blocks.claim(number)

    def on_death(self, rank: int, reason: str) -> None:
        assert self._memory is not None
        self._memory.files.forget(rank)
        self.blocks.forget(rank)
        super().on_death(rank, reason)

    def on_tick(self, now_s: float) -> None:
        if self._abroad is not None:
            self._abroad.step()
        super().on_tick(now_s)
        if self._memory is not None:
            self._memory.files.tick(now_s)

    def more_entries(self) -> None:
        assert self._memory is not None
        if self._memory.usable == self._memory.capacity:
            raise ResourceError(f"all {self._memory.capacity} entries of the reference table are in use")
        self.table.extend(self._memory.extend_table())

    def cut(self, rank: int, reason: str) -> None:
        with self._closing:
            link = self._links.pop(rank, None)
        if self._monitor is not None and link is not None:
            self._monitor.forget(rank)
            self.peers[rank].detach()  # the peer, if it lives, will use again what we lease
            link.close()
            self.on_death(rank, reason)
        elif self.peers[rank].is_far and self._abroad is not None and not self.peers[rank].is_dead:
            self._abroad.give_up(rank, reason)
            self.on_death(rank, reason)  # closes the channel

    def _on_message(self, rank: int, kind: str, body: dict, descriptors: dict) -> None:
        for fd, _ in descriptors.values():
            os.close(fd)
        if kind == LEAVING:
            self.peers[rank].left = True
        elif kind == LINK_FAILED:
            with self._greeted:
                self._failure = read_text(body, "sentence")
                self._greeted.notify_all()

    def on_link(self, link: Link) -> None:
        if self.is_static:
            logger.warning("worker %s wants to link after all had linked; refused", link.record)
            link.close()
        else:
            super().on_link(link)

    # ---- the end

    def shutdown(
        self,
        graceful: bool = True,
        timeout_s: float = 0.0,
        check: Callable[[bool], None] | None = None,
    ) -> None:
        """Leave the job; idempotent, from any thread.

        Parameters
        ----------
        graceful : bool
            Wait until all workers have called it and no call is under way anywhere. Dead workers are not waited for.
            In a group of open size: wait until what this worker has begun, and what others have asked of it, is done.
        timeout_s : float
            Seconds for all of it; 0: as long as it takes.
        check : callable
            Called when all is quiet, when graceful, and not in a group of open size: looks at what others hold. Its
            argument says whether all workers do that. Those who do not let go of what they hold of others first.

        Raises
        ------
        CallTimeout
            When others have not called it in time; this worker has left then all the same.
        """
        self.check_process()
        if not self._ended.acquire(blocking=False):
            return
        try:
            if graceful and not self.is_static:
                self.leave_group(time.monotonic() + timeout_s if timeout_s else math.inf)
            elif graceful:
                self._wait_and_check(timeout_s, check)
        finally:
            self._leave()

    def _wait_and_check(self, timeout_s: float, check: Callable[[bool], None] | None) -> None:
        deadline = time.monotonic() + timeout_s if timeout_s else math.inf
        self._checks = check is not None
        self.wait_for_all(timeout_s)
        with self._round_heard:
            checking = self._rounds.checking()
        if not checking:
            return
        try:
            if check is None:
                self.delete_user_references()
            else:
                check(len(checking) == self.record.world_size)
        finally:  # nobody leaves before all have looked
            self.wait_for_all(max(deadline - time.monotonic(), 1e-3) if timeout_s else 0.0)

    def wait_for_all(self, timeout_s: float = 0.0) -> None:
        """Wait until all workers have called this and no call is under way anywhere; dead workers are not waited for.

        In a group of open size: until no call of this worker is without an answer.

        Raises
        ------
        CallTimeout
            When others have not called it after ``timeout_s`` seconds, unless that is 0.
        """
        deadline = time.monotonic() + timeout_s if timeout_s else math.inf
        if not self.is_static:
            self.wait_for_own_calls(deadline)
            return
        while True:
            self._wait_until_idle(deadline)
            with self._round_heard:
                report = self._rounds.report(self.calls_sent, self.calls_served, self._checks)
                others = sorted(self._rounds.live - {self.rank})
            for rank in others:
                said = [report.sent, report.served, report.checks]
                self.tell(self.peers[rank], Kind.IDLE_REPORT, said, call=report.number)
            failpoint("shutdown.round")
            with self._round_heard:
                while not self._round_heard.wait_for(self._rounds.is_over, timeout=0.1):
                    if time.monotonic() > deadline:
                        raise self._not_quiet(self._rounds.missing())
                if self._rounds.is_quiet():
                    return

    def _wait_until_idle(self, deadline: float) -> None:
        pause_s = 0.0002
        while self.calls_pending or self.is_busy():
            if time.monotonic() > deadline:
                with self._round_heard:
                    raise self._not_quiet(self._rounds.missing(self._rounds.number + 1) - {self.rank})
            time.sleep(pause_s)
            pause_s = min(pause_s * 2, 0.01)

    def _not_quiet(self, missing: set[int]) -> CallTimeout:
        names = [self.peers[rank].name for rank in sorted(missing)]
        others = f"workers {names} have not called it, or are still busy; " if names else ""
        return CallTimeout(
            f"shutdown: {others}{self.calls_pending} calls of {self.info} have no answer, {self.running} run here, and"
            f" {self.futures_awaited} wait here for the future that their function returned"
        )

    def _loosen_leases(self) -> None:
        """The peers are about to take us out of their tables; what the program still reads must not change then."""
        for peer in self.known_peers():
            peer.detach()

    def _leave(self) -> None:
        _alive.discard(self)
        self._loosen_leases()
        if not self.is_static:
            self.end_group()
        self._say_goodbye()
        failpoint("shutdown.leaving")
        self.close()
        self.stop_threads()
        me = threading.current_thread()
        for thread in self.thread_objects():
            if thread is not me and thread.is_alive():  # one that is about to start ends at once: it has been told to
                thread.join(timeout=2.0)
        self._release()
        if me.name == "fastref-monitor":
            logger.debug("shut down from a callback")

    def _say_goodbye(self) -> None:
        with self._closing:
            for link in self._links.values():
                try:
                    link.send_message(LEAVING, {})
                except PeerError:
                    pass  # it has left, or died, before us
        if self._abroad is not None:
            self._abroad.leave()

    def _release(self) -> None:
        """Give back everything that others could see. What this process has mapped stays while handles use it."""
        if self._monitor is not None:
            self._monitor.stop()
        if self._abroad is not None:
            self._abroad.close()
        for far in self._far_links.values():
            far.close()
        if self._door is not None:
            self._door.close()
        self.send_visitors_away()
        with self._closing:
            for link in self._links.values():
                link.close()
        if self._membership is not None:
            self._membership.close()
        if self._listener is not None:
            self._listener.close()
        if self._memory is not None:
            self._memory.close()
        self.blocks.close()
        self._lock.release()
        # What this runtime mapped should go with its last handle, not when the garbage collector comes round.
        self._monitor = self._abroad = None
        self._links, self._acts = {}, {}
        if self.errands:  # what came after the last thread: steps of this runtime, which refer to it
            self.errands.clear()

    def abandon(self) -> None:
        """The interpreter ends without ``shutdown``: stop the threads and go; peers see a worker that died."""
        if self._ended.acquire(blocking=False) and self.is_ours():
            self._loosen_leases()
            self.close()
            self.stop_threads()
            self._release()

    def snapshot(self) -> dict[str, Any]:
        """Plain figures of everything: tables, rings, calls, segments."""
        return {
            "worker": {"name": self.info.name, "rank": self.rank, "pid": os.getpid(), "closed": bool(self.closed)},
            "calls": {
                "pending": self.calls_pending, "sent": self.calls_sent, "served": self.calls_served,
                "running": self.running, "threads": self.threads, "parked": self.parked,
                "fetched_directly": self.fetched_directly, "fetched_by_message": self.fetched_by_message,
                "forwarded": self.blocks_forwarded, "values_published": self.values_published,
                "values_withdrawn": self.values_withdrawn,
            },
            "slots": self.slots.snapshot(),
            "table": self.table.snapshot(),
            "abroad": {"forks": self._owner_forks.total(), "waiting": self._user_forks.waiting()},
            "arena": self.arena.snapshot(),
            "warm": warm_figures(),
            "rings": self.inbox.snapshot(),
            # Somebody's name may have been that of one who has gone: of the two the living one is shown.
            "peers": {p.name: p.snapshot() for p in sorted(self.known_peers(), key=lambda p: not p.is_dead)},
            "dead": {rank: sorted(waiting) for rank, waiting in self._removal.open_cases().items()},
        }  # fmt: skip


@contextlib.contextmanager
def _typed_want_of_descriptors() -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.EMFILE, errno.ENFILE):
            raise
        raise ResourceError(f"no descriptor is left to start a worker with, see ulimit -n: {error}") from error


_alive: weakref.WeakSet[Runtime] = weakref.WeakSet()


@atexit.register
def _abandon_all() -> None:
    for runtime in list(_alive):
        try:
            runtime.abandon()
        except WorkerDied:
            logger.debug("a peer ended while this process did")
