"""The lasting links between workers: who may have one, and the segments handed over when it is made."""

from __future__ import annotations

import errno
import os
import select
import socket
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from fastref.errors import CallTimeout, ProtocolError, RendezvousError, ResourceError, WorkerDied
from fastref.rendezvous.connection import Connection, Message, peer_of, socket_address
from fastref.rendezvous.fields import read_integer, read_object, read_text
from fastref.rendezvous.records import WorkerRecord, describe
from fastref.segments.rundir import make_private_directory

__all__ = [
    "CLOSED",
    "GROUP_ASK",
    "HEARD",
    "JOIN_FAILED",
    "LEAVING",
    "LINK_FAILED",
    "MEMBER_SUFFIX",
    "STATIC_SUFFIX",
    "Link",
    "Listener",
    "Segments",
    "check_same_build",
    "read_link_hello",
    "refusal_of",
    "refuse",
]

MAGIC = "fastref"
CLOSED = "closed"
"""The refusal that means: not now, perhaps later."""
HEARD = "heard"
"""The refusal that means: you cannot start, and everybody is told."""
JOIN_FAILED, LINK_FAILED = "join-failed", "link-failed"
"""What a worker that cannot start says: to the coordinator before the members are known, to every member then."""

GROUP_ASK = "group-ask"
"""What a worker says to each member of the group that it wants to join."""
LEAVING = "leaving"
"""What a worker says to all whom it has linked when it leaves."""
STATIC_SUFFIX, MEMBER_SUFFIX = "sock", "member"
"""How the sockets of workers end: of those of a job of fixed size, of those of a group that workers join and leave."""

Segments = Mapping[str, tuple[int, int]]
"""Label -> (descriptor, size in bytes)."""

_BACKLOG = 4096
POST = "post"  # the number of a message that was posted
_READ_AHEAD_S = 1.0  # what is awaited there was sent before; a peer that lies costs so much, once
_READ_AHEAD_STEP_S = 0.005


class Listener:
    """The unix socket at which one instance can be reached: ``<directory>/<instance>.<suffix>``.

    Parameters
    ----------
    directory : Path
        The private directory of the job.
    instance : str
        The id of the instance, sixteen hex digits.
    suffix : str
        Tells what kind of worker it is.
    """

    def __init__(self, directory: Path, instance: str, suffix: str = STATIC_SUFFIX) -> None:
        self.directory = directory
        self.instance = instance
        self.path = directory / f"{instance}.{suffix}"
        self._pid = os.getpid()
        # Given up to take and drop a visitor when no descriptor is left; otherwise it would stay
        # in the queue and the listener would be readable for ever.
        self._spare_fd = os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC)
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_CLOEXEC)
        self.socket.setblocking(False)
        try:
            self._bind()
            self.socket.listen(_BACKLOG)
        except BaseException:
            self.close()
            raise

    def fileno(self) -> int:
        """Return the descriptor to watch for reading, -1 when closed."""
        return self.socket.fileno()

    def accept(self) -> Connection | None:
        """Take the next visitor, None when none is left or it was turned away.

        Turned away, before a byte is read: other users, processes that have ended already, and
        everybody while this process has no descriptor left.
        """
        try:
            sock, _ = self.socket.accept()
        except BlockingIOError:
            return None
        except OSError as error:
            if error.errno not in (errno.EMFILE, errno.ENFILE):
                raise
            self._drop_visitor()
            return None
        try:
            return peer_of(sock)
        except (ProtocolError, ConnectionError):
            sock.close()
            return None
        except OSError as error:
            sock.close()
            if error.errno in (errno.EMFILE, errno.ENFILE):
                return None
            raise

    def close(self) -> None:
        """Stop listening, remove the socket, and the directory with it if it is empty; idempotent.

        A forked child only closes its descriptors.
        """
        self.socket.close()
        spare_fd, self._spare_fd = self._spare_fd, -1
        if spare_fd < 0:
            return
        os.close(spare_fd)
        if os.getpid() != self._pid:
            return
        self.path.unlink(missing_ok=True)
        try:
            self.directory.rmdir()
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOENT):
                raise

    def _bind(self) -> None:
        # A listener that closes, or a sweep, removes the directory when it is empty: make it again then.
        while True:
            make_private_directory(self.directory)
            try:
                with socket_address(self.path) as short:
                    self.socket.bind(short)
                return
            except FileNotFoundError:
                continue

    def _drop_visitor(self) -> None:
        os.close(self._spare_fd)
        try:
            sock, _ = self.socket.accept()
            sock.close()
        except OSError:
            pass  # it left by itself, or another thread took the descriptor: the next event tries again
        self._spare_fd = os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC)


class Link(Connection):
    """A connection to one worker of the job, and what it handed over.

    It takes the place of the connection it is made from: of the two, only one is to be closed.

    Attributes
    ----------
    record : WorkerRecord
        The worker at the other end.
    descriptors : dict
        Label -> (descriptor, size in bytes) as received; ``take`` moves one out, ``close`` closes the rest.
    handlers : dict
        Kind -> ``handler(message)`` for messages that are acted upon as they are read, in their order, by whichever
        thread reads; it owns the descriptors. ``receive_message`` returns the others.
    """

    def __init__(self, connection: Connection, record: WorkerRecord) -> None:
        super().__init__(connection.socket, connection.pid, connection.pidfd)
        self.record = record
        self.descriptors: dict[str, tuple[int, int]] = {}
        self.handlers: dict[str, Callable[[Message], None]] = {}
        # Both may be taken again by the thread that holds them: a destructor of the program may run at any line.
        self._reading, self._posting = threading.RLock(), threading.RLock()
        self._set_aside: deque[Message] = deque()
        self._posts: deque[tuple[str, Mapping[str, Any], Segments | None]] = deque()
        self._posted = self._handled = 0

    def send_message(
        self,
        kind: str,
        body: Mapping[str, Any],
        descriptors: Segments | None = None,
        *,
        timeout_s: float = 0.0,
    ) -> None:
        """Send one message, as ``Connection.send_message``.

        Raises
        ------
        WorkerDied
            The peer is gone.
        CallTimeout
            There was no room within ``timeout_s``: the peer does not read.
        """
        try:
            super().send_message(kind, body, descriptors, timeout_s=timeout_s)
        except ConnectionError as error:
            record = self.record
            raise WorkerDied(record.name, record.rank, record.pid, "its socket is closed") from error
        except TimeoutError as error:
            raise CallTimeout(f"worker {self.record}: {error}", self.record.name) from error

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

    def send_hello(self, mine: WorkerRecord, segments: Segments) -> None:
        """Ask the worker at the other end for a link, and hand it ``segments``."""
        body = {**_build_fields(mine), "record": mine.to_fields(), "to_instance": self.record.instance}
        self.send_message("link-hello", body, segments)

    def send_welcome(self, mine: WorkerRecord, segments: Segments) -> None:
        """Grant the link that was asked for, and hand over ``segments``."""
        self.send_message("link-welcome", {**_build_fields(mine), "record": mine.to_fields()}, segments)

    def read_welcome(self, message: Message, mine: WorkerRecord) -> None:
        """Take the answer to ``send_hello``.

        Raises
        ------
        RendezvousError
            It was refused, with the sentence that the peer gave.
        ProtocolError
            It is no answer, or another worker than the one asked gave it.
        """
        if message.kind == "refused":
            raise RendezvousError(f"worker {self.record} refused a link: {refusal_of(message)}")
        if message.kind != "link-welcome":
            raise ProtocolError(f"worker {self.record} answered a link-hello with {message.kind!r}")
        check_same_build(message.body, mine)
        record = WorkerRecord.from_fields(read_object(message.body, "record"))
        if record != self.record:
            raise ProtocolError(f"worker {record} answered in place of worker {self.record}")
        self.descriptors = dict(message.descriptors)


def read_link_hello(connection: Connection, message: Message, listener: Listener) -> Link:
    """Return the link that a visitor asks for; it is neither granted nor refused yet.

    Raises
    ------
    RendezvousError
        The hello is for another instance, that had this address before.
    ProtocolError
        It is no hello, or its record is not that of the process at the other end.
    """
    if message.kind != "link-hello":
        raise ProtocolError(f"expected a link-hello, got {message.kind!r}")
    if read_text(message.body, "magic") != MAGIC:
        raise ProtocolError("field 'magic' is wrong")
    record = WorkerRecord.from_fields(read_object(message.body, "record"))
    if record.pid != connection.pid:
        raise ProtocolError(f"field 'pid' says {record.pid}, the process at the other end is {connection.pid}")
    to_instance = read_text(message.body, "to_instance", most=64)
    if to_instance != listener.instance:
        raise RendezvousError(f"worker {record} wants instance {to_instance}, this is instance {listener.instance}")
    link = Link(connection, record)
    link.descriptors = dict(message.descriptors)
    return link


def check_same_build(body: dict[str, Any], mine: WorkerRecord) -> None:
    """Check that a peer has our version and layout, before anything else of its message is looked at.

    Raises
    ------
    RendezvousError
        They differ; the text names both sides.
    ProtocolError
        The fields that say so are missing.
    """
    if read_text(body, "magic") != MAGIC:
        raise ProtocolError("field 'magic' is wrong")
    version, layout = read_text(body, "version", most=64), read_integer(body, "layout")
    if (version, layout) != (mine.version, mine.layout):
        theirs = describe(read_object(body, "record"))
        raise RendezvousError(
            f"worker {theirs} has fastref {version} (memory layout {layout}), worker {mine} has fastref "
            f"{mine.version} (memory layout {mine.layout}); all workers of a job need the same version"
        )


def refuse(connection: Connection, sentence: str) -> None:
    """Tell a visitor why it gets nothing, and hang up. One that is gone already need not be told."""
    try:
        # Called as Connection, since a link would name a worker that died in the error.
        Connection.send_message(connection, "refused", {"sentence": sentence[:4000]})
    except (ConnectionError, TimeoutError):
        pass
    connection.close()


def refusal_of(message: Message) -> str:
    """Return the sentence in a refusal."""
    return read_text(message.body, "sentence")


def _build_fields(record: WorkerRecord) -> dict[str, Any]:
    return {"magic": MAGIC, "version": record.version, "layout": record.layout}
