"""The lasting links between workers, and what was handed over when they were made."""

from __future__ import annotations

import os
import select
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from typing import Any

from fastref.errors import CallTimeout, ProtocolError, RendezvousError, ResourceError
from fastref.rendezvous.connection import Connection, Message
from fastref.rendezvous.fields import read_object, read_text
from fastref.rendezvous.hellos import MAGIC, LinkMaking, Segments, check_pid
from fastref.rendezvous.listening import Listener, Spare
from fastref.rendezvous.records import WorkerRecord
from fastref.rendezvous.stream import StreamConnection
from fastref.rendezvous.ways import SHM, TCP, Way

__all__ = ["POST", "Link", "TcpLink", "read_link_hello", "read_stream_hello"]

POST = "post"  # the number of a message that was posted
_READ_AHEAD_S = 1.0  # what is awaited there was sent before; a peer that lies costs so much, once
_READ_AHEAD_STEP_S = 0.005


class Link(LinkMaking):
    """A connection to one worker of the job, and what it handed over.

    It takes the place of the connection it is made from: of the two, only one is to be closed.

    Attributes
    ----------
    record : WorkerRecord
        The worker at the other end.
    way : Way
        How it is reached, and why so.
    descriptors : dict
        Label -> (descriptor, size in bytes) as received; ``take`` moves one out, ``close`` closes the rest.
    handlers : dict
        Kind -> ``handler(message)`` for messages that are acted upon as they are read, in their order, by whichever
        thread reads; it owns the descriptors. ``receive_message`` returns the others.
    spare : Spare, optional
        Makes room for the descriptor of a message: without it the last one would cost the link.
    """

    def __init__(self, connection: Connection, record: WorkerRecord, way: Way = SHM) -> None:
        super().__init__(connection.socket, connection.pid, connection.pidfd)
        self.record = record
        self.way = way
        self.descriptors: dict[str, tuple[int, int]] = {}
        self.handlers: dict[str, Callable[[Message], None]] = {}
        self.spare: Spare | None = None
        # Both may be taken again by the thread that holds them: a destructor of the program may run at any line.
        self._reading, self._posting = threading.RLock(), threading.RLock()
        self._set_aside: deque[Message] = deque()
        self._posts: deque[tuple[str, Mapping[str, Any], Segments | None]] = deque()
        self._posted = self._handled = 0

    def post_message(self, kind: str, body: Mapping[str, Any], descriptors: Segments | None = None) -> bool:
        """Send one message now, or later, when the peer has read others; ``flush_posts`` tries again.

        The descriptors must stay open until then. Messages arrive in the order in which they were posted.

        Returns
        -------
        bool
            Whether nothing waits.

        Raises
        ------
        WorkerDied
            The peer is gone.
        """
        with self._posting:
            self._posted += 1
            self._posts.append((kind, {**body, POST: self._posted}, descriptors))
            return self.flush_posts()

    def flush_posts(self) -> bool:
        """Send what was posted and not sent yet, as far as there is room; True when nothing is left.

        Raises
        ------
        WorkerDied
            The peer is gone.
        """
        with self._posting:
            while self._posts:
                try:
                    self.send_message(*self._posts[0])
                except (CallTimeout, ResourceError):  # no room; or too many descriptors are on their way to it
                    return False
                self._posts.popleft()  # a signal handler may raise before this: its number tells that it comes twice
        return True

    @property
    def is_behind(self) -> bool:
        """Whether messages wait until the peer has read others."""
        return bool(self._posts)

    def receive_message(self) -> Message | None:
        """As ``Connection.receive_message``, for messages without a handler; those before are acted upon."""
        with self._reading:
            if self._set_aside:
                return self._set_aside.popleft()
            while True:
                message = super().receive_message()
                if message is None or message.kind not in self.handlers:
                    return message
                self._handle(message)

    def read_ahead(self, enough: Callable[[], bool]) -> None:
        """Act on messages that have a handler until ``enough()``; set the others aside for ``receive_message``.

        For a thread that has been told by other means that the peer has sent something. Returns also when the peer has
        closed its end or its process has ended, and after a second.
        """
        deadline = time.monotonic() + _READ_AHEAD_S
        while not enough():
            gone = self.fileno() < 0 or self.is_gone()  # before the reading: what it sent before its end is there
            with self._reading:
                self._read_waiting()
            if enough() or gone or time.monotonic() > deadline:
                return
            poller = select.poll()
            poller.register(self.pidfd, select.POLLIN)  # who reads the socket may be another thread
            poller.poll(_READ_AHEAD_STEP_S * 1e3)

    def _handle(self, message: Message) -> None:
        number = message.body.get(POST)
        if isinstance(number, int):
            if number <= self._handled:
                message.close()
                return
            self._handled = number
        self.handlers[message.kind](message)
        if self.spare is not None:
            self.spare.take_back()

    def _read_waiting(self) -> None:
        while self.fileno() >= 0:
            try:
                message = super().receive_message()
            except OSError:  # nothing is there; or what is wrong with it will be seen by who watches it
                return
            if message is None:
                return
            if message.kind in self.handlers:
                self._handle(message)
            else:
                self._set_aside.append(message)

    def _receive(self) -> tuple[bytes, list[tuple[int, int, bytes]], int, Any]:
        if self.spare is None:
            return super()._receive()
        self.spare.give_up()
        try:
            received = super()._receive()
        except OSError:
            self.spare.take_back()
            raise
        if not received[1]:  # otherwise it is for whoever handles the message to make room again
            self.spare.take_back()
        return received

    def take(self, label: str) -> tuple[int, int]:
        """Move a received descriptor to the caller, who closes it: (descriptor, size in bytes).

        Raises
        ------
        ProtocolError
            The peer handed over no such segment.
        """
        try:
            return self.descriptors.pop(label)
        except KeyError:
            raise ProtocolError(f"worker {self.record} handed over no segment {label!r}") from None

    def close(self) -> None:
        """Close the connection and the descriptors that nobody took; idempotent."""
        super().close()
        self.handlers.clear()  # whose they are should go with its last user, not with a garbage collection
        self._posts.clear()
        while self._set_aside:
            self._set_aside.popleft().close()
        while self.descriptors:
            os.close(self.descriptors.popitem()[1][0])


class TcpLink(LinkMaking, StreamConnection):
    """A TCP connection to one worker of the job, up to the point where its channel takes the socket.

    It takes the place of the connection it is made from: of the two, only one is to be closed. Nothing is handed over
    with it.
    """

    def __init__(self, connection: StreamConnection, record: WorkerRecord, way: Way = TCP) -> None:
        StreamConnection.__init__(self, connection.socket, record.pid, connection.carrier)
        self.record = record
        self.way = way
        self.descriptors: dict[str, tuple[int, int]] = {}


def read_link_hello(connection: Connection, message: Message, listener: Listener) -> Link:
    """Return the link that a visitor of this host asks for; it is neither granted nor refused yet.

    Raises
    ------
    RendezvousError
        The hello is for another instance, that had this address before.
    ProtocolError
        It is no hello, or its record is not that of the process at the other end.
    """
    link = Link(connection, _read_hello(connection, message, listener))
    link.descriptors = dict(message.descriptors)
    return link


def read_stream_hello(connection: StreamConnection, message: Message, listener: Listener) -> TcpLink:
    """Return the link that a visitor of another host asks for, as ``read_link_hello``; who he is, is his word."""
    return TcpLink(connection, _read_hello(connection, message, listener))


def _read_hello(connection: Connection, message: Message, listener: Listener) -> WorkerRecord:
    if message.kind != "link-hello":
        raise ProtocolError(f"expected a link-hello, got {message.kind!r}")
    if read_text(message.body, "magic") != MAGIC:
        raise ProtocolError("field 'magic' is wrong")
    record = WorkerRecord.from_fields(read_object(message.body, "record"))
    check_pid(connection, record)
    to_instance = read_text(message.body, "to_instance", most=64)
    if to_instance != listener.instance:
        raise RendezvousError(f"worker {record} wants instance {to_instance}, this is instance {listener.instance}")
    return record
