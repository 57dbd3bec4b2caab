"""The workers with which no memory is shared: their channels, and the thread that reads them."""

from __future__ import annotations

import logging
import mmap
import socket
import threading
import time
from collections.abc import Callable

from fastref._core import MirrorHolder, table_sizes
from fastref.channels.channel import Inbox
from fastref.channels.tcp import TcpChannel, TcpLoop
from fastref.rendezvous import tolerate
from fastref.runtime.post import use_warm_memory

__all__ = ["Abroad", "mirror_of"]

logger = logging.getLogger("fastref")

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
    inbox : Inbox
        Where their records go.
    silence_s : float
        A worker from which nothing comes for so long counts as dead.
    on_gone : callable
        ``on_gone(rank, reason, left)``, on the thread that reads: a connection has ended; ``left``: the worker had said
        that it leaves.
    """

    def __init__(self, inbox: Inbox, silence_s: float, on_gone: Callable[[int, str, bool], None]) -> None:
        self._silence_s = silence_s
        self._loop = TcpLoop(inbox, self._on_break, silence_s)
        use_warm_memory(self._loop)
        self._on_gone = on_gone
        self.channels: dict[int, TcpChannel] = {}
        self._sockets: dict[int, socket.socket] = {}
        self._thread = threading.Thread(target=self._loop.run, name="fastref-tcp", daemon=True)

    def add(self, rank: int, sock: socket.socket, silence_s: float) -> TcpChannel:
        """Make the channel to a worker; nothing is sent or read before ``begin``.

        ``silence_s``: after which that worker, for its part, takes this one for dead.
        """
        self.channels[rank] = TcpChannel(self._loop, rank, silence_s=silence_s)
        tolerate(sock, self._silence_s)
        self._sockets[rank] = sock
        return self.channels[rank]

    def begin(self) -> None:
        """Read from here on, and send what was queued meanwhile."""
        if not self.channels:
            return
        while self._sockets:
            rank, sock = self._sockets.popitem()
            self.channels[rank].attach(sock.detach())
        self._thread.start()

    def leave(self) -> None:
        """Say behind all that was sent that nothing follows, and wait a moment for those who leave too."""
        for channel in self.channels.values():
            channel.leave()
        deadline = time.monotonic() + _FAREWELL_S
        while time.monotonic() < deadline and not all(c.peer_left or c.is_broken for c in self.channels.values()):
            time.sleep(0.002)

    def hang_up(self, rank: int) -> None:
        """Cut the connection to a worker."""
        if rank in self.channels:
            self.channels[rank].shut()

    def close(self) -> None:
        """End the thread and all connections; idempotent."""
        self._loop.stop()
        if self._thread.ident is not None and threading.current_thread() is not self._thread:
            self._thread.join()
        for channel in self.channels.values():
            channel.shut()
        while self._sockets:
            self._sockets.popitem()[1].close()
        self._loop.close()

    def _on_break(self, rank: int, reason: str) -> None:
        channel = self.channels[rank]
        left = channel.peer_left or channel.leaving  # of two that leave one hears the end of the other first
        try:
            self._on_gone(rank, "it closed its link" if left else reason, left)
        except Exception:
            logger.exception("the end of worker %d could not be dealt with", rank)
