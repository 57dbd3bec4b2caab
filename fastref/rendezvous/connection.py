"""One unix socket between two processes of one user: bounded JSON messages and descriptors, never pickle."""

from __future__ import annotations

import array
import contextlib
import errno
import json
import os
import select
import socket
import struct
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fastref.errors import ProtocolError, ResourceError, UsageError
from fastref.rendezvous.fields import parse_object, read_integer, read_list, read_object, read_text

__all__ = ["MAX_MESSAGE_BYTES", "Connection", "Message", "connect", "parse_message", "peer_of", "socket_address"]

MAX_MESSAGE_BYTES = 64 * 1024
MAX_DESCRIPTORS = 16
MAX_LABEL_CHARACTERS = 64

_MAX_ADDRESS_BYTES = 107
_LONGEST_WAIT_S = 3600.0  # deadlines may be infinite, the argument of poll may not
_UCRED = struct.Struct("iII")


@dataclass(frozen=True)
class Message:
    """One message; whoever receives it owns its descriptors.

    Parameters
    ----------
    kind : str
        What it is.
    body : dict
        Its fields, not checked yet.
    descriptors : dict
        Label -> (descriptor, size in bytes as announced by the sender).
    """

    kind: str
    body: dict[str, Any]
    descriptors: dict[str, tuple[int, int]] = field(default_factory=dict)

    def close(self) -> None:
        """Close the descriptors, for a message that nobody wants."""
        for fd, _ in self.descriptors.values():
            os.close(fd)
        self.descriptors.clear()


class Connection:
    """A socket to a process of the same user, and a descriptor that tells when that process ends.

    Both are needed: a forked child of the peer keeps the socket open after the peer died, and a peer
    that closed its socket may live on. Of a process on another host, ``StreamConnection``, there is no descriptor, -1.
    """

    def __init__(self, sock: socket.socket, pid: int, pidfd: int) -> None:
        self.socket = sock
        self.pid = pid
        self.pidfd = pidfd
        self._made_by = os.getpid()

    def fileno(self) -> int:
        """Return the descriptor of the socket, -1 when closed."""
        return self.socket.fileno()

    def send_message(
        self,
        kind: str,
        body: Mapping[str, Any],
        descriptors: Mapping[str, tuple[int, int]] | None = None,
        *,
        timeout_s: float = 0.0,
    ) -> None:
        """Send one message, whole or not at all.

        Parameters
        ----------
        kind, body
            What to say; ``body`` must be JSON.
        descriptors : mapping, optional
            Label -> (descriptor, size in bytes); the peer gets copies.
        timeout_s : float
            How long to wait for room, in seconds.

        Raises
        ------
        ConnectionError
            The peer is gone.
        TimeoutError
            There was no room: the peer does not read.
        UsageError
            The message is too large.
        """
        descriptors = descriptors or {}
        envelope = {"kind": kind, "body": body, "descriptors": [[label, d[1]] for label, d in descriptors.items()]}
        data = json.dumps(envelope, separators=(",", ":"), allow_nan=False).encode()
        if len(data) > MAX_MESSAGE_BYTES or len(descriptors) > MAX_DESCRIPTORS:
            raise UsageError(
                f"a {kind!r} message of {len(data)} bytes and {len(descriptors)} descriptors is too large: "
                f"{MAX_MESSAGE_BYTES} and {MAX_DESCRIPTORS} are allowed"
            )
        self._send(data, [fd for fd, _ in descriptors.values()], timeout_s)

    def receive_message(self) -> Message | None:
        """Return the next message, None when the peer has closed its end.

        Raises
        ------
        BlockingIOError
            Nothing is there yet.
        ProtocolError
            What came is no message; its descriptors are closed.
        """
        try:
            data, ancillary, flags, _ = self._receive()
        except ConnectionResetError:
            # The peer closed without reading all of ours, which the kernel says once. What it sent
            # before that is still to be had.
            data, ancillary, flags, _ = self._receive()
        fds = _received_descriptors(ancillary)
        try:
            if not data:
                if fds:
                    raise ProtocolError(f"process {self.pid} sent descriptors without a message")
                return None
            if flags & socket.MSG_TRUNC:
                raise ProtocolError(f"process {self.pid} sent a message of more than {MAX_MESSAGE_BYTES} bytes")
            if flags & socket.MSG_CTRUNC:
                raise ProtocolError(
                    f"descriptors that process {self.pid} sent were lost: more than {MAX_DESCRIPTORS}, "
                    "or this process has too many files open"
                )
            return parse_message(data, fds)
        except BaseException:
            for fd in fds:
                os.close(fd)
            raise

    def wait_message(self, deadline: float) -> Message | None:
        """As ``receive_message``, but wait for it.

        Parameters
        ----------
        deadline : float
            On the clock of ``time.monotonic``.

        Raises
        ------
        TimeoutError
            Nothing came. A peer that died counts as closed even if a child of it holds the socket.
        """
        while True:
            try:
                return self.receive_message()
            except BlockingIOError:
                left_s = deadline - time.monotonic()
                if left_s <= 0:
                    raise TimeoutError(f"process {self.pid} did not answer in time") from None
                poller = select.poll()
                poller.register(self.socket.fileno(), select.POLLIN)
                if self.pidfd >= 0:
                    poller.register(self.pidfd, select.POLLIN)
                ready = dict(poller.poll(min(left_s, _LONGEST_WAIT_S) * 1e3))
                if self.pidfd in ready and self.socket.fileno() not in ready:
                    return None

    def is_gone(self) -> bool:
        """Return whether the peer has closed its end or its process has ended."""
        poller = select.poll()
        poller.register(self.socket.fileno(), select.POLLRDHUP)
        if self.pidfd >= 0:
            poller.register(self.pidfd, select.POLLIN)
        return bool(poller.poll(0))

    def close(self) -> None:
        """Close both descriptors; idempotent. The peer sees the end, even if a forked child has the socket too."""
        if os.getpid() == self._made_by:  # in a child it would end the parent's connection
            with contextlib.suppress(OSError):
                self.socket.shutdown(socket.SHUT_RDWR)
        self.socket.close()
        pidfd, self.pidfd = self.pidfd, -1
        if pidfd >= 0:
            os.close(pidfd)

    def _send(self, data: bytes, fds: list[int], timeout_s: float) -> None:
        """Send a message that has been checked, as ``send_message`` does."""
        rights = array.array("i", fds)
        ancillary = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, rights)] if rights else []
        deadline = time.monotonic() + timeout_s
        while True:
            try:
                self.socket.sendmsg([data], ancillary, socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL)
                return
            except BlockingIOError:
                self._wait_for_room(deadline, timeout_s)
            except OSError as error:
                if error.errno == errno.ETOOMANYREFS:
                    raise ResourceError(f"too many descriptors are on their way to process {self.pid}") from error
                raise

    def _wait_for_room(self, deadline: float, timeout_s: float) -> None:
        left_s = deadline - time.monotonic()
        if left_s <= 0:
            raise TimeoutError(f"process {self.pid} has not read its messages for {timeout_s:g} s") from None
        poller = select.poll()
        poller.register(self.socket.fileno(), select.POLLOUT)
        poller.poll(min(left_s, _LONGEST_WAIT_S) * 1e3)

    def _receive(self) -> tuple[bytes, list[tuple[int, int, bytes]], int, Any]:
        return self.socket.recvmsg(
            MAX_MESSAGE_BYTES,
            socket.CMSG_SPACE(MAX_DESCRIPTORS * array.array("i").itemsize),
            socket.MSG_DONTWAIT | socket.MSG_CMSG_CLOEXEC,
        )


def connect(address: str) -> Connection:
    """Connect to the listener at ``address``.

    Raises
    ------
    ConnectionError
        Nobody listens there any more: no file, no listener, or its process has ended.
    ProtocolError
        The listener belongs to another user.
    """
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_CLOEXEC)
    # A unix socket connects at once or, when the queue of the listener is full, not at all: never wait here.
    sock.setblocking(False)
    try:
        with socket_address(Path(address)) as short:
            sock.connect(short)
        return peer_of(sock)
    except (FileNotFoundError, BlockingIOError) as error:
        sock.close()
        raise ConnectionRefusedError(f"nobody takes visitors at {address}") from error
    except BaseException:
        sock.close()
        raise


def peer_of(sock: socket.socket) -> Connection:
    """Return the connection over a connected socket, after looking who is at the other end.

    Raises
    ------
    ProtocolError
        Another user; nothing was read.
    ConnectionError
        Its process has ended already.
    """
    sock.setblocking(False)
    pid, uid, _ = _UCRED.unpack(sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _UCRED.size))
    if uid != os.geteuid():
        raise ProtocolError(f"process {pid} of uid {uid} is at the other end, only uid {os.geteuid()} is let in")
    if pid <= 0:
        raise ProtocolError("the process at the other end is not visible here: it runs in another pid namespace")
    try:
        pidfd = os.pidfd_open(pid)
    except ProcessLookupError as error:
        raise ConnectionResetError(f"process {pid} has ended") from error
    return Connection(sock, pid, pidfd)


@contextlib.contextmanager
def socket_address(path: Path) -> Iterator[str]:
    """Give a name for ``path`` that fits into a socket address, valid within the block.

    Long paths go by way of an open descriptor of their directory, since an address ends at 107 bytes.
    """
    if len(os.fsencode(path)) <= _MAX_ADDRESS_BYTES:
        yield str(path)
        return
    directory = os.open(path.parent, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        yield f"/proc/self/fd/{directory}/{path.name}"
    finally:
        os.close(directory)


def parse_message(data: bytes, fds: list[int]) -> Message:
    """Return the message in a JSON text and the descriptors that came with it.

    Raises
    ------
    ProtocolError
        Names the first field that is wrong; the descriptors are the caller's to close.
    """
    envelope = parse_object(data)
    kind = read_text(envelope, "kind", most=64)
    body = read_object(envelope, "body")
    announced = read_list(envelope, "descriptors", most=MAX_DESCRIPTORS)
    if len(announced) != len(fds):
        raise ProtocolError(f"field 'descriptors' names {len(announced)} descriptors, {len(fds)} came")
    descriptors: dict[str, tuple[int, int]] = {}
    for item, fd in zip(announced, fds, strict=True):
        if not isinstance(item, list) or len(item) != 2:
            raise ProtocolError("field 'descriptors' must be a list of [label, size in bytes]")
        parts = {"label": item[0], "size": item[1]}
        label = read_text(parts, "label", most=MAX_LABEL_CHARACTERS)
        if label in descriptors:
            raise ProtocolError(f"field 'descriptors' has the label {label!r} twice")
        descriptors[label] = (fd, read_integer(parts, "size"))
    return Message(kind, body, descriptors)


def _received_descriptors(ancillary: list[tuple[int, int, bytes]]) -> list[int]:
    fds = array.array("i")
    for level, kind, data in ancillary:
        if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
            fds.frombytes(data[: len(data) - len(data) % fds.itemsize])
    return list(fds)
