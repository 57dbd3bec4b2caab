"""The workers with which no memory is shared: their channels, the thread that reads them, and their sessions."""

from __future__ import annotations

import mmap
import os
import socket
import threading
import time
import weakref
from collections.abc import Callable
from typing import Any

from fastref._core import MirrorHolder, table_sizes
from fastref.channels.channel import Inbox
from fastref.channels.tcp import TcpChannel, TcpLoop
from fastref.protocol import session
from fastref.rendezvous import Door, TcpLink, WorkerRecord, leaves_host
from fastref.runtime.post import use_warm_memory
from fastref.runtime.sessions import Sessions

__all__ = ["Abroad", "mirror_of"]

# How long a worker that leaves waits for its last words to be read, and for those of the others.
_FAREWELL_S = 2.0


def mirror_of(capacity: int) -> MirrorHolder:
    """Return what this process holds of the table of a worker with which it shares no memory: nothing yet."""
    hold_bytes, descriptor_bytes = table_sizes(capacity)
    return MirrorHolder(mmap.mmap(-1, hold_bytes), mmap.mmap(-1, descriptor_bytes), capacity)


class Abroad:
    """Channels to workers of other hosts. The thread that reads them exists only when there are some.

    Parameters
    ----------
    record : WorkerRecord
        This worker.
    inbox : Inbox
        Where their records go.
    door : Door
        Where they come again after a break; closed with this.
    peer_timeout_s : float
        A worker that is away, or of which nothing is heard, for so long counts as dead.
    on_gone, on_failure, wake
        As for ``Sessions``; ``wake`` has ``step`` called soon.
    """

    def __init__(
        self,
        record: WorkerRecord,
        inbox: Inbox,
        door: Door,
        peer_timeout_s: float,
        on_gone: Callable[[int, str, bool], None],
        on_failure: Callable[[int, dict[str, Any]], None],
        wake: Callable[[], None],
    ) -> None:
        self._silence_s = peer_timeout_s
        # Half of the time is for the silence; in the other half another connection may bring the worker back.
        self._loop = TcpLoop(inbox, self._on_break, peer_timeout_s / 2)
        use_warm_memory(self._loop)
        self._door = door
        self._sessions = Sessions(record, door, peer_timeout_s, on_gone, on_failure, wake)
        self._channels: dict[int, TcpChannel] = {}
        self._sockets: dict[int, socket.socket] = {}
        self._thread = threading.Thread(target=self._loop.run, name="fastref-tcp", daemon=True)
        self._pid = os.getpid()
        _keep_from_children(self)

    def add(self, link: TcpLink) -> TcpChannel:
        """Make the channel to a worker; nothing is sent or read before ``begin``."""
        rank = link.record.rank
        # After half of its time that worker, for its part, takes this one's silence for a break.
        self._channels[rank] = TcpChannel(self._loop, rank, silence_s=link.record.silence_ms / 2e3)
        self._sessions.add(link.record, self._channels[rank])
        link.tolerate(self._silence_s)
        self._sockets[rank] = link.take_socket()
        return self._channels[rank]

    def begin(self) -> None:
        """Read from here on, and send what was queued meanwhile."""
        while self._sockets:
            rank, sock = self._sockets.popitem()
            self._channels[rank].attach(sock.fileno(), sums=leaves_host(sock))
            sock.detach()
        self._thread.start()

    def fileno(self) -> int:
        """Return the descriptor to watch for reading: ready whenever ``step`` has something to do at once."""
        return self._sessions.fileno()

    def step(self) -> None:
        """Let others in, and look after the sessions, on one thread; ten times a second without an event, too."""
        self._sessions.step()

    def give_up(self, rank: int, reason: str) -> None:
        """Note that a worker counts as dead, whoever has found so: if it comes again it is told."""
        self._sessions.post(rank, session.Ended(reason))

    def leave(self) -> None:
        """Say behind all that was sent that nothing follows, and wait a moment for those who leave too."""
        for channel in self._channels.values():
            channel.leave()
        deadline = time.monotonic() + _FAREWELL_S
        while time.monotonic() < deadline and not all(_has_parted(channel) for channel in self._channels.values()):
            time.sleep(0.002)

    def close(self) -> None:
        """End the thread and all connections, once nobody calls ``step`` any more; idempotent."""
        self._loop.stop()
        if self._thread.ident is not None and threading.current_thread() is not self._thread:
            self._thread.join()
        for channel in self._channels.values():
            channel.shut()
        while self._sockets:
            self._sockets.popitem()[1].close()
        self._loop.close()
        self._sessions.close()
        self._door.close()

    def disown(self) -> None:
        """In a forked child: close its copies of all sockets, which would outlive the parent otherwise."""
        if os.getpid() != self._pid:
            for channel in self._channels.values():
                channel.disown()
            self._sessions.disown()
            self._door.close()

    def _on_break(self, rank: int, reason: str) -> None:
        """A connection has ended; on the thread that reads."""
        channel = self._channels[rank]
        if _has_parted(channel):
            self._sessions.post(rank, session.Left("it closed its link"))
        elif channel.spoilt:
            self._sessions.post(rank, session.Spoilt(reason))
        else:
            since_s = channel.heard_s if channel.silent else time.monotonic()
            self._sessions.post(rank, session.Broke(reason, since_s))


def _has_parted(channel: TcpChannel) -> bool:
    """Tell whether both ends are done: of two that leave one may hear the end of the other first."""
    if channel.peer_left or channel.closed:
        return True
    return channel.leaving and channel.is_broken and channel.is_quiet


_all: weakref.WeakSet[Abroad] = weakref.WeakSet()
_watches_forks: list[bool] = []


def _keep_from_children(abroad: Abroad) -> None:
    _all.add(abroad)
    if not _watches_forks:
        _watches_forks.append(True)
        os.register_at_fork(after_in_child=_disown_all)


def _disown_all() -> None:
    for abroad in list(_all):
        abroad.disown()
