"""The protocol's commands, performed: the part of a runtime that acts on bookkeeping frames, deaths and the clock."""

from __future__ import annotations

import functools
import logging
import threading
import time
from typing import Any

from fastref import _core
from fastref._core import MirrorHolder
from fastref.codec.stream import decode, encode
from fastref.errors import PeerError, ProtocolError, ResourceError
from fastref.nogc import NoGcLock
from fastref.protocol import forks, removal
from fastref.protocol.rounds import Report, Rounds
from fastref.runtime.peer import Peer
from fastref.runtime.serve import Server
from fastref.segments import process_lives
from fastref.wire.kinds import Kind

__all__ = ["RuleKeeper"]

logger = logging.getLogger("fastref")

FIRST_WINDOW = 32  # entries opened ahead for a peer; doubles each time the peer runs out
AGREE_S = 1.0  # for a death to be seen by all who can see it
DELETES_IN_FRAME = 64
LARGEST_WINDOW = 1024  # more than requests that fit in a ring, so credits are never what limits a burst


class RuleKeeper(Server):
    """A runtime's bookkeeping. Rules decide under one lock, marks are set under it too; all else is done later."""

    bits: int  # ranks below this have a bit in this worker's table
    silence_s: float = 15.0  # after which a worker of another host counts as dead
    main_digest: str  # of the ``__main__`` that this worker runs; empty: none that a peer could share

    def __init__(self, *args: Any, incarnation: int = 0, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.incarnation = incarnation
        uid = incarnation << 16 | self.rank  # as Peer.uid
        self._rules = NoGcLock()
        self._removal = removal.Removal(uid, {uid})
        self._owner_forks = forks.OwnerForks()
        self._user_forks = forks.UserForks()
        self._deleting = threading.RLock()
        self._recalls = 0  # times that others were asked for deletes
        self._recalled: dict[int, int] = {}  # rank -> the last of them that it has answered
        self._short_of: set[Peer] = set()  # who waits for entries that others may have let go of
        self._suspects: dict[tuple[int, int], tuple[float, str]] = {}  # who, to whom: dead here when, why
        self._rounds = Rounds(self.rank, {self.rank})
        self._round_heard = threading.Condition()
        self._greeted = threading.Condition()
        self._acts = {
            Kind.INTERN: self._intern,
            Kind.GRANT: self._granted,
            Kind.CREDIT_REQUEST: self._credits_wanted,
            Kind.RREF_FORK_REQUEST: self._fork_requested,
            Kind.RREF_FORK_ACCEPT: self._fork_accepted,
            Kind.RREF_CHILD_ACCEPT: self._child_accepted,
            Kind.RREF_USER_DELETE: self._user_deleted,
            Kind.DRAIN_ASK: self._drain_asked,
            Kind.DRAIN_DONE: self._drain_done,
            Kind.IDLE_REPORT: self._idle_reported,
            Kind.GREETING: self._greeting,
            Kind.SETTLED: self._settled,
            Kind.DELETES_ASK: self._deletes_asked,
            Kind.DELETES_DONE: self._deletes_done,
            Kind.CLEANUP_AUTOGRAD_CONTEXT_REQ: self._context_released,
        }

    def meet(self, peer: Peer, introduce: bool = True) -> None:
        """Count a worker among those that live; ``introduce``: it may be called."""
        self.add_peer(peer)
        if introduce:
            self.introduce(peer)
        if peer.rank != self.rank:
            with self._rules:
                self._removal.live.add(peer.uid)
                self._rounds.live.add(peer.rank)

    # ---- frames

    def handle_control(self, peer: Peer, kind: int, call: int, payload: bytes, references: list | None) -> None:
        """Act on one bookkeeping frame."""
        if kind == GRANT_MORE:
            self._grant(peer, peer.credit_window)  # when there are none the peer asks, once it has used what it has
            return
        value = decode(payload) if payload else None
        try:
            self._acts[Kind(kind)](peer, call, value)
        except PeerError as error:
            logger.debug("nobody is left for the answer to a %s: %s", Kind(kind).name, error)
        except (TypeError, ValueError, KeyError, ProtocolError) as error:
            logger.exception("a %s from %s that says %r", Kind(kind).name, peer.name, value)
            self.peer_broke(peer.rank, f"a {Kind(kind).name} that says {value!r}: {error}")

    def tell(self, peer: Peer, kind: Kind, value: Any, call: int = 0) -> None:
        """Send one bookkeeping frame; a peer that has died meanwhile need not hear it."""
        payload = encode(value)
        if payload is None:
            raise ProtocolError(f"a {kind.name} cannot say {value!r}")
        try:
            self.send_control(peer, kind, call, payload)
        except PeerError as error:
            logger.debug("%s not told: %s", peer.name, error)

    def _intern(self, peer: Peer, call: int, value: Any) -> None:
        if not self.strict:
            module, qualname = value
            value = (str(module), str(qualname))
        peer.callables[call] = value  # of a strict worker the registered name; calls find out whether it is one

    def _greeting(self, peer: Peer, call: int, value: Any) -> None:
        peer.shares_main = bool(value) and value == self.main_digest
        with self._greeted:
            peer.greeted = True
            self._greeted.notify_all()

    def _context_released(self, peer: Peer, call: int, value: Any) -> None:
        if self.autograd is not None:
            # It ends graphs, and their destructors may do anything.
            self.do_later(functools.partial(self.autograd.release, call))

    # ---- entries and credits

    def _granted(self, peer: Peer, call: int, value: Any) -> None:
        if isinstance(value, str):  # none, and why: whoever waits asks again, and says so if it was in vain
            peer.refuse_credits(value)
            return
        credits = []
        for index, generation, fork in value:
            if fork:
                with self._rules:
                    self._user_forks.granted(peer.rank, (index, generation), fork)
            if isinstance(peer.holder, MirrorHolder):
                peer.holder.note(index, generation, "pending")
            credits.append((index, generation))
        peer.add_credits(credits)

    def _credits_wanted(self, peer: Peer, call: int, value: Any) -> None:
        refused = self._grant(peer, peer.credit_window * 2)
        if refused is None:
            return
        logger.warning("no entries for the remote() calls of %s: %s", peer.name, refused)
        self.tell(peer, Kind.GRANT, refused)  # it asks again, unless others let go of something first
        self._short_of.add(peer)
        self.recall()

    def _grant(self, peer: Peer, window: int) -> str | None:
        """Open entries ahead for a peer, up to ``window`` in all. When there are none: return why."""
        has_bit = self.holds_by_bit(peer)
        granted: list[tuple[int, int, int]] = []
        self.sweep()
        with peer.guard:  # a worker is marked dead under it too: no entry is opened for one whose removal has begun
            if peer.is_dead:
                return None
            window = min(window, LARGEST_WINDOW)
            # Half of the table stays for values: what is open ahead is of use to one peer only.
            room = max(self.table.capacity // 2 - len(self.credit_of), 0 if peer.credits_open else 1)
            wanted = min(window - peer.credits_open, room)
            opened = self.table.open_credits(peer.rank if has_bit else None, wanted)
            if not opened and wanted > 0:
                try:
                    self.more_entries()
                except ResourceError as error:
                    return str(error)
                opened = self.table.open_credits(peer.rank if has_bit else None, wanted)
            for index, generation in opened:
                self.credit_of[index] = peer.rank
                fork = 0
                if not has_bit:
                    fork = self.ids.next()
                    with self._rules:
                        self._owner_forks.made((index, generation), fork, peer.rank)
                granted.append((index, generation, fork))
            peer.credits_open += len(opened)
            peer.credit_window = window
        for start in range(0, max(len(granted), 1), 64):
            self.tell(peer, Kind.GRANT, granted[start : start + 64])
        return None

    def tell_settled(self, peer: Peer, index: int, failed: bool) -> None:
        self.tell(peer, Kind.SETTLED, [index, self.table.holder.generation(index), failed])

    def _settled(self, peer: Peer, call: int, value: Any) -> None:
        index, generation, failed = value
        if not isinstance(peer.holder, MirrorHolder):
            raise ProtocolError("what a worker that shares memory need not say")
        if peer.holder.generation(index) == generation:
            peer.holder.note(index, generation, "failed" if failed else "ready")

    # ---- holders that go by messages

    def fork_made(self, peer: Peer, entry: tuple[int, int], fork_id: int) -> None:
        with self._rules:
            self._mark_and_clear(self._owner_forks.made(entry, fork_id, peer.rank))

    def fork_unmade(self, peer: Peer, entry: tuple[int, int], fork_id: int) -> None:
        with self._rules:
            self._mark_and_clear(self._owner_forks.deleted(entry, (fork_id,), peer.rank))

    def received_abroad(self, peer: Peer, owner: int, index: int, generation: int, fork: int, parent: int) -> None:
        with self._rules:
            commands = self._user_forks.received(owner, (index, generation), fork, parent)
        for command in commands:  # not now: a record of the inbox is being looked at
            self.do_later(functools.partial(self._perform_user, command))

    def _fork_requested(self, peer: Peer, call: int, value: Any) -> None:
        index, generation, fork, number = value
        alive = self.table.holder.generation(index) == generation and self.table.phase_of(index) == "used"
        with self._rules:
            # One who is dead counts until it is removed: what it has published rests on its fork.
            if self._removal.is_cleared(peer.uid):
                return
            commands = self._owner_forks.requested((index, generation), fork, peer.rank, number, alive)
            self._mark_and_clear(commands)
        _core.failpoint("fork.registered")
        for command in commands:
            if isinstance(command, forks.Accept):
                self.tell(peer, Kind.RREF_FORK_ACCEPT, [fork, command.ok])

    def _fork_accepted(self, peer: Peer, call: int, value: Any) -> None:
        fork, ok = value
        with self._rules:
            commands = self._user_forks.accepted(fork, ok)
        _core.failpoint("fork.accepted")
        for command in commands:
            self._perform_user(command)

    def _child_accepted(self, peer: Peer, call: int, value: Any) -> None:
        self.child_is_known(peer, call)
        _core.failpoint("fork.parent_unpinned")

    def _user_deleted(self, peer: Peer, call: int, value: Any) -> None:
        with self._rules:
            for index, generation, gone in value:
                self._mark_and_clear(self._owner_forks.deleted((index, generation), tuple(gone), peer.rank))
        _core.failpoint("delete.applied")

    def _mark_and_clear(self, commands: list) -> None:
        """Under the lock that decided: the mark of an entry must end as its last decision was."""
        for command in commands:
            if isinstance(command, forks.Mark):
                self.table.mark_abroad(command.index)
            elif isinstance(command, forks.Clear):
                self.table.clear_abroad(command.index)

    def _perform_user(self, command: Any) -> None:
        if isinstance(command, forks.Request):
            self.tell(self.peers[command.owner], Kind.RREF_FORK_REQUEST, [*command.entry, command.fork, command.number])
            _core.failpoint("fork.requested")
        elif isinstance(command, forks.ChildAccept):
            self.tell(self.peers[command.parent], Kind.RREF_CHILD_ACCEPT, None, call=command.fork)
        elif isinstance(command, forks.Delete):
            self.tell(self.peers[command.owner], Kind.RREF_USER_DELETE, ((*command.entry, command.forks),))
        elif isinstance(command, forks.Lose):
            logger.warning("a reference to %s ended before it could be taken", self.peers[command.owner].name)

    # ---- deletes

    def delete_what_is_gone(self, peer: Peer) -> None:
        """Tell an owner in whose table we have no bit what this process does not hold any more.

        The deletes go together: behind answers to that owner, and behind its answers; at every tick; and when it asks.
        One thread at a time: who returns knows that all are sent that were due before.
        """
        with self._deleting:
            gone: list[tuple[int, int, tuple[int, ...]]] = []
            while peer.holder.gone:
                index, generation = peer.holder.gone.popleft()
                with self._rules:  # a fork is registered under it after it was counted: none goes that has just come
                    if not peer.holder.count(index):  # else it came back meanwhile
                        for delete in self._user_forks.let_go(peer.rank, (index, generation)):
                            gone.append((*delete.entry, delete.forks))
                _core.failpoint("delete.queued")
            for start in range(0, len(gone), DELETES_IN_FRAME):
                self.tell(peer, Kind.RREF_USER_DELETE, tuple(gone[start : start + DELETES_IN_FRAME]))

    def recall(self) -> tuple[int, set[int]] | None:
        """Ask all who hold by messages for the deletes that they have not sent yet; None when nobody does.

        Returns
        -------
        tuple
            For ``recall_is_over``.
        """
        with self._rules:
            holders = {rank for rank in self._owner_forks.ranks() if not self.peers[rank].is_dead}
            self._recalls = number = self._recalls + 1
        for rank in holders:
            self.tell(self.peers[rank], Kind.DELETES_ASK, None, call=number)
        return (number, holders) if holders else None

    def recall_is_over(self, recall: tuple[int, set[int]]) -> bool:
        """Tell whether all who live have answered, and their deletes been acted upon."""
        number, holders = recall
        return all(self.peers[rank].is_dead or self._recalled.get(rank, 0) >= number for rank in holders)

    def _deletes_asked(self, peer: Peer, call: int, value: Any) -> None:
        self.delete_what_is_gone(peer)
        self.tell(peer, Kind.DELETES_DONE, None, call=call)

    def _deletes_done(self, peer: Peer, call: int, value: Any) -> None:
        self._recalled[peer.rank] = max(call, self._recalled.get(peer.rank, 0))
        waiting, self._short_of = self._short_of, set()
        for other in waiting:
            if self._grant(other, other.credit_window) is not None:
                self._short_of.add(other)

    # ---- deaths

    def on_death(self, rank: int, reason: str) -> None:
        """A worker is gone. Called once for each."""
        peer = self.peers[rank]
        with peer.guard:
            peer.mark_dead(reason)
            peer.lock.notify_all()
        log = logger.debug if peer.left else logger.warning
        log("worker %s (rank %d, pid %d) is gone: %s", peer.name, rank, peer.pid, reason)
        self.slots.wake_waiting()
        self.drop_outgoing(peer)
        peer.free(self.arena)
        self.do_later(lambda: self.fail_pending(rank))
        if self.autograd is not None:
            self.do_later(functools.partial(self.autograd.worker_died, rank, peer.died_error()))
        self.do_later(functools.partial(self._keep_leases, peer))
        with self._rules:
            commands = self._removal.handle(removal.Died(peer.uid))
            user_commands = self._user_forks.owner_lost(rank)
        self.inbox.ring_for_dead(rank)
        with self._round_heard:
            self._rounds.died(rank)
            self._round_heard.notify_all()
        with self._greeted:
            self._greeted.notify_all()
        self._perform_removal(commands)
        for command in user_commands:
            self._perform_user(command)

    def _keep_leases(self, peer: Peer) -> None:
        """What we lease of a dead worker stays as it is. One that lives on and has cut the link will use it again."""
        if not peer.is_far and not peer.left and process_lives(peer.pid):
            peer.detach()

    def peer_broke(self, rank: int, what: str) -> None:
        """A peer sent nonsense: it is not listened to any more."""
        if rank < len(self.peers) and self.peers[rank] is not None and not self.peers[rank].is_dead:
            logger.error("worker %s sent %s; the link to it is cut", self.peers[rank].name, what)
            self.cut(rank, f"it sent {what}")

    def cut(self, rank: int, reason: str) -> None:
        raise NotImplementedError

    def _let_children_go(self, peer: Peer) -> None:
        """Let go of what was handed to a dead worker.

        Not when it dies: what it handed on itself rests on our pin until the owners have read its requests. All live
        workers, the owners among them, have read all that it published when it is removed here.
        """
        while peer.children:
            _, child = peer.children.popitem()
            self.unhold(*child)

    def inbox_drained(self, rank: int) -> None:
        with self._rules:
            if self._user_forks.waits_for_child_of(rank):
                waiting = True
            else:
                waiting = False
                commands = self._removal.handle(removal.Drained(self.peers[rank].uid))
        if waiting:
            self.watched.add(rank)
            return
        self._perform_removal(commands)

    def _drain_asked(self, peer: Peer, call: int, value: Any) -> None:
        self._suspect(_rank_of(call), peer, str(value))
        with self._rules:
            commands = self._removal.handle(removal.Ask(call, peer.uid))
        self._perform_removal(commands)

    def _suspect(self, rank: int, accuser: Peer, reason: str) -> None:
        """A worker of another host takes one for dead that may live here: it lives for all, or for nobody.

        Whoever ended is missed here in a moment too, and for the true reason. Of two that have lost each other, and
        nobody else, both take the other for dead: the higher rank is. The word of a higher rank waits until that of the
        lower one, if it lives, must have come.
        """
        accused = self.peers[rank] if rank < len(self.peers) else None
        if accused is None or accused.is_dead or accused.host == accuser.host or rank == self.rank:
            return
        wait_s = AGREE_S if accuser.rank < rank else AGREE_S + self.silence_s / 3
        said = (time.monotonic() + wait_s, f"worker {accuser.name!r} takes it for dead: {reason[:200]}")
        self._suspects.setdefault((rank, accuser.rank), said)

    def _give_suspects_up(self, now_s: float) -> None:
        for (rank, accuser), (due_s, reason) in list(self._suspects.items()):
            if self.peers[rank].is_dead or self.peers[accuser].is_dead:
                self._suspects.pop((rank, accuser), None)
            elif now_s >= due_s:
                self.cut(rank, reason)

    def _drain_done(self, peer: Peer, call: int, value: Any) -> None:
        with self._rules:
            commands = self._removal.handle(removal.Done(call, peer.uid))
        self._perform_removal(commands)

    def _perform_removal(self, commands: list) -> None:
        for command in commands:
            if isinstance(command, removal.LookAtInbox):
                self.watch_inbox(_rank_of(command.dead))
            elif isinstance(command, removal.SendAsk):
                reason = self.peers[_rank_of(command.dead)].death
                self.tell(self.peers[_rank_of(command.to)], Kind.DRAIN_ASK, reason, call=command.dead)
                _core.failpoint("removal.asked")
            elif isinstance(command, removal.SendDone):
                self.tell(self.peers[_rank_of(command.to)], Kind.DRAIN_DONE, None, call=command.dead)
            elif isinstance(command, removal.Clear):
                self._clear(self.peers[_rank_of(command.dead)])
                _core.failpoint("removal.cleared")

    def _clear(self, peer: Peer) -> None:
        """Take a dead worker out of this one's table."""
        if self.holds_by_bit(peer):
            self.table.remove_peer(peer.rank)
        with self._rules:
            self._mark_and_clear(self._owner_forks.holder_lost(peer.rank))
        self._let_children_go(peer)
        # From here on a frame that names such an entry is told at once that the value is lost.
        unmade = [index for index, rank in self.credit_of.items() if rank == peer.rank]
        for index in unmade:
            del self.credit_of[index]
        begun = [(index, self.owned[index]) for index in unmade if index < len(self.owned) and self.owned[index]]
        self.do_later(functools.partial(self._fail_values, peer, begun))

    def _fail_values(self, dead: Peer, begun: list[tuple[int, Any]]) -> None:
        """Values that a dead worker's remote() should have made, and whose requests never came, never will be."""
        error = self.encode_failure(dead.died_error(), self.info)
        for index, owned in begun:
            if self.owned[index] is owned:
                self.settle_failed(index, error)

    # ---- the clock

    def on_tick(self, now_s: float) -> None:
        """What has to happen every 100 ms at the latest."""
        self.flush_all()
        for peer in self.known_peers():
            peer.free(self.arena)
            self.delete_what_is_gone(peer)
        if self._suspects:
            self._give_suspects_up(now_s)
        self.expire()
        self.give_up_futures()
        if self.table.is_flagged() or self.watched:
            self.wake_leader()

    # ---- the end

    def _idle_reported(self, peer: Peer, call: int, value: Any) -> None:
        sent, served, checks = value
        with self._round_heard:
            self._rounds.heard(peer.rank, Report(call, sent, served, checks))
            self._round_heard.notify_all()


GRANT_MORE = 0xFFFF


def _rank_of(uid: int) -> int:
    return uid & 0xFFFF
