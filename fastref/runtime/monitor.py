"""The thread that waits for what happens to peers: their death, their messages, new links, and time."""

from __future__ import annotations

import logging
import os
import select
import threading
import time
from collections.abc import Callable
from typing import Any, Protocol

from fastref.errors import FastrefError, ForkedProcessError
from fastref.rendezvous import CLOSED, GROUP_ASK, Connection, Link, Listener, Message, read_link_hello, refuse

__all__ = ["PERIOD_S", "Monitor"]

PERIOD_S = 0.1

# A visitor that says nothing for this long is sent away: it holds two descriptors.
_VISITOR_PATIENCE_S = 5.0
_NEVER = float("inf")
# What epoll takes is less than the time that some events are away.
_LONGEST_SLEEP_S = 86400.0

_logger = logging.getLogger("fastref")


class OnMessage(Protocol):
    """Called for every message of a watched peer; the descriptors are the callee's to close."""

    def __call__(self, rank: int, kind: str, body: dict[str, Any], descriptors: dict[str, tuple[int, int]]) -> None: ...


class Monitor:
    """One daemon thread that sleeps until something happens.

    Rule 1: a death is reported once per watched link, whether the end of the socket or of the process comes
    first, and after all messages that the peer had sent.
    Rule 2: callbacks run on this thread, one at a time, under no lock. One that raises is logged; the thread goes on.
    Rule 3: it owns no link and no listener; ``stop`` closes only what it made itself.
    Rule 4: in a forked child nothing happens: the child shares the epoll object with its parent and must not touch it.

    Parameters
    ----------
    listener : Listener
        Where visitors come in. They are asked what they want: a link goes to ``on_link``, a worker that wants
        to join is told that the job is full.
    on_death : callable
        ``on_death(rank, reason)``.
    on_tick : callable
        ``on_tick(now_s)``, on the clock of ``time.monotonic``.
    on_message : callable
        ``on_message(rank, kind, body, descriptors)``.
    on_link : callable
        ``on_link(link)``: neither granted nor refused yet; the callee owns it.
    on_ask : callable
        ``on_ask(visitor, message)``: somebody wants to join a group that is running; the callee owns both.
    period_s : float or None
        Seconds between ticks; None: only ``wake`` and ``due`` make one.
    due : callable
        ``due()``: when the next tick has to be, on the clock of ``time.monotonic``, if before the period is over.
        Asked before each sleep: ``wake`` when it has become earlier.
    """

    def __init__(
        self,
        listener: Listener,
        *,
        on_death: Callable[[int, str], None],
        on_tick: Callable[[float], None],
        on_message: OnMessage,
        on_link: Callable[[Link], None],
        on_ask: Callable[[Connection, Message], None] = lambda visitor, message: refuse(visitor, CLOSED),
        period_s: float | None = PERIOD_S,
        due: Callable[[], float] = lambda: _NEVER,
    ) -> None:
        self._listener = listener
        self._on_death = on_death
        self._on_tick = on_tick
        self._on_message = on_message
        self._on_link = on_link
        self._on_ask = on_ask
        self._period_s = period_s
        self._due = due
        self._pid = os.getpid()
        # Guards the three tables and the registrations that mirror them. No callback runs under it.
        self._lock = threading.Lock()
        self._links: dict[int, Link] = {}
        self._ranks: dict[int, int] = {}
        self._visitors: dict[int, tuple[Connection, float]] = {}
        self._served: dict[int, Callable[[], None]] = {}
        self._stopping = threading.Event()
        self._epoll = select.epoll()
        self._wake_fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._epoll.register(self._wake_fd, select.EPOLLIN)
        self._epoll.register(listener.fileno(), select.EPOLLIN)
        self._listener_fd = listener.fileno()
        self._thread = threading.Thread(target=self._run, name="fastref-monitor", daemon=True)

    def start(self) -> None:
        """Start the thread."""
        self._check_process()
        self._thread.start()

    def watch(self, rank: int, link: Link) -> None:
        """Report messages and the death of the peer behind ``link``, until ``forget`` or its death.

        It must not be closed before.
        """
        self._check_process()
        with self._lock:
            if rank in self._links:
                raise ValueError(f"rank {rank} is watched already")
            self._links[rank] = link
            link.spare = self._listener.spare
            for fd in (link.fileno(), link.pidfd):
                self._ranks[fd] = rank
                self._epoll.register(fd, select.EPOLLIN)

    def serve(self, fd: int, callback: Callable[[], None]) -> None:
        """Call back whenever a descriptor is readable, before ``start``; it must not be closed before ``stop``."""
        self._served[fd] = callback
        self._epoll.register(fd, select.EPOLLIN)

    def forget(self, rank: int) -> None:
        """Stop watching a peer; no report about it starts after this. Idempotent."""
        if os.getpid() == self._pid:
            self._remove(rank)

    def set_period(self, period_s: float | None) -> None:
        """Change the seconds between ticks; None ends them."""
        self._check_process()
        self._period_s = period_s
        self.wake()

    def wake(self) -> None:
        """Have ``on_tick`` called now, whatever the period. From any thread."""
        if os.getpid() != self._pid:
            return
        with self._lock:
            if not self._stopping.is_set():
                os.eventfd_write(self._wake_fd, 1)

    def stop(self, join: bool = True) -> None:
        """End the thread; idempotent.

        Parameters
        ----------
        join : bool
            Wait until it has ended; not done when a callback calls it.
        """
        if os.getpid() != self._pid:
            return
        with self._lock:
            if not self._stopping.is_set():
                self._stopping.set()
                os.eventfd_write(self._wake_fd, 1)
        if self._thread.ident is None:
            self._close()
        elif join and threading.current_thread() is not self._thread:
            self._thread.join()

    def _run(self) -> None:
        try:
            next_tick = self._next_tick()
            while not self._stopping.is_set():
                woken = False
                for fd, _ in self._epoll.poll(self._timeout_s(next_tick)):
                    if self._stopping.is_set():
                        return
                    if fd == self._wake_fd:
                        os.eventfd_read(fd)
                        woken = True
                    else:
                        self._guard(self._handle, fd)
                if self._stopping.is_set():
                    return
                self._send_silent_visitors_away()
                if woken or time.monotonic() >= next_tick:
                    self._guard(self._on_tick, time.monotonic())
                    next_tick = self._next_tick()
        finally:
            self._close()

    def _handle(self, fd: int) -> None:
        with self._lock:
            rank = self._ranks.get(fd)
            visitor = self._visitors.get(fd)
            link = self._links[rank] if rank is not None else None
        if rank is not None and link is not None:
            self._handle_peer(rank, link, fd)
        elif visitor is not None:
            self._handle_visitor(fd, visitor[0])
        elif fd == self._listener_fd:
            self._greet_visitors()
        elif fd in self._served:
            self._served[fd]()
        # Otherwise an earlier event of this batch has ended it.

    def _handle_peer(self, rank: int, link: Link, fd: int) -> None:
        ended = fd == link.pidfd and _is_readable(fd)
        while True:
            try:
                message = link.receive_message()
            except BlockingIOError:
                if ended:
                    self._report_death(rank, link, "its process has ended")
                return
            except (OSError, FastrefError) as error:
                self._report_death(rank, link, f"its link failed: {error}")
                return
            if message is None:
                self._report_death(rank, link, "its process has ended" if ended else "it closed its link")
                return
            self._guard(self._on_message, rank, message.kind, message.body, message.descriptors)
            with self._lock:
                if self._links.get(rank) is not link:
                    return  # the callback has had enough of it
            if not ended:
                return  # what else has come makes the next event, after those of the others

    def _report_death(self, rank: int, link: Link, reason: str) -> None:
        if self._remove(rank, link):
            self._guard(self._on_death, rank, reason)

    def _remove(self, rank: int, link: Link | None = None) -> bool:
        """Take a peer out of the tables; False when it, or this very link of it, is not there."""
        with self._lock:
            if rank not in self._links or (link is not None and self._links[rank] is not link):
                return False
            del self._links[rank]
            for fd in [fd for fd, owner in self._ranks.items() if owner == rank]:
                del self._ranks[fd]
                if not self._epoll.closed:
                    self._epoll.unregister(fd)
            return True

    def _greet_visitors(self) -> None:
        while (visitor := self._listener.accept()) is not None:
            with self._lock:
                self._visitors[visitor.fileno()] = (visitor, time.monotonic() + _VISITOR_PATIENCE_S)
                self._epoll.register(visitor.fileno(), select.EPOLLIN)

    def _handle_visitor(self, fd: int, visitor: Connection) -> None:
        self._release_visitor(fd)
        message: Message | None = None
        try:
            message = visitor.receive_message()
            if message is None:
                visitor.close()
                return
            if message.kind == GROUP_ASK:
                self._on_ask(visitor, message)
                return
            link = read_link_hello(visitor, message, self._listener)
        except (OSError, FastrefError) as error:
            if message is not None:
                message.close()
            refuse(visitor, CLOSED if message is not None and message.kind == "join-hello" else str(error))
            return
        try:
            self._on_link(link)
        except BaseException:
            link.close()
            raise

    def _send_silent_visitors_away(self) -> None:
        now = time.monotonic()
        for fd, (visitor, patience_ends) in list(self._visitors.items()):
            if now >= patience_ends:
                self._release_visitor(fd)
                refuse(visitor, "it said nothing")

    def _release_visitor(self, fd: int) -> None:
        with self._lock:
            del self._visitors[fd]
            self._epoll.unregister(fd)

    def _timeout_s(self, next_tick: float) -> float | None:
        times = [patience_ends for _, patience_ends in self._visitors.values()]
        if next_tick != _NEVER:
            times.append(next_tick)
        return min(max(0.0, min(times) - time.monotonic()), _LONGEST_SLEEP_S) if times else None

    def _next_tick(self) -> float:
        # Counted from now: after a long callback there is one tick, not a burst.
        return min(self._due(), _NEVER if self._period_s is None else time.monotonic() + self._period_s)

    def _guard(self, callback: Callable[..., None], *arguments: Any) -> None:
        try:
            callback(*arguments)
        except Exception:
            _logger.exception("%s failed in the monitor", getattr(callback, "__qualname__", callback))

    def _close(self) -> None:
        with self._lock:
            self._stopping.set()
            for visitor, _ in self._visitors.values():
                visitor.close()
            self._visitors.clear()
            self._epoll.close()
            wake_fd, self._wake_fd = self._wake_fd, -1
            if wake_fd >= 0:
                os.close(wake_fd)

    def _check_process(self) -> None:
        if os.getpid() != self._pid:
            raise ForkedProcessError("this process was forked from one that uses fastref; it has no monitor")


def _is_readable(fd: int) -> bool:
    """Look again: the event may be about a descriptor that had this number before."""
    poller = select.poll()
    poller.register(fd, select.POLLIN)
    return bool(poller.poll(0))
