"""What two workers say when one asks the other for a link, over whatever connection, and how one is refused."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fastref.errors import CallTimeout, ProtocolError, RendezvousError, WorkerDied
from fastref.rendezvous.connection import Connection, Message
from fastref.rendezvous.fields import read_integer, read_object, read_text
from fastref.rendezvous.records import WorkerRecord, describe
from fastref.rendezvous.ways import Way

__all__ = [
    "CLOSED",
    "GROUP_ASK",
    "HEARD",
    "JOIN_FAILED",
    "LEAVING",
    "LINK_FAILED",
    "MAGIC",
    "SESSION_CALL",
    "SESSION_RESUME",
    "LinkMaking",
    "Segments",
    "check_pid",
    "check_same_build",
    "join_hello",
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

SESSION_RESUME, SESSION_CALL = "session-resume", "session-call"
"""What a worker says whose link over TCP has broken: that it comes again, or that the other one should."""

GROUP_ASK = "group-ask"
"""What a worker says to each member of the group that it wants to join."""
LEAVING = "leaving"
"""What a worker says to all whom it has linked when it leaves."""

Segments = Mapping[str, tuple[int, int]]
"""Label -> (descriptor, size in bytes)."""


class LinkMaking(Connection):
    """A connection on which a link is being made, or was, to the worker of a record.

    Attributes
    ----------
    record : WorkerRecord
        The worker at the other end.
    way : Way
        Which way was chosen to it, and why.
    descriptors : dict
        Label -> (descriptor, size in bytes) as received.
    """

    record: WorkerRecord
    way: Way
    descriptors: dict[str, tuple[int, int]]

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


def check_pid(connection: Connection, record: WorkerRecord) -> None:
    """Check that a record is that of the process at the other end; over TCP there is only its word for it.

    Raises
    ------
    ProtocolError
        It is of another process.
    """
    if connection.pidfd < 0:
        connection.pid = record.pid
    elif record.pid != connection.pid:
        raise ProtocolError(f"field 'pid' says {record.pid}, the process at the other end is {connection.pid}")


def join_hello(record: WorkerRecord, job: str) -> dict[str, Any]:
    """Return the body of the message with which a worker asks for its seat."""
    return {**_build_fields(record), "job": job, "record": record.to_fields()}


def _build_fields(record: WorkerRecord) -> dict[str, Any]:
    return {"magic": MAGIC, "version": record.version, "layout": record.layout}
