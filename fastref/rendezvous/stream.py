"""One TCP connection between two workers that have proved themselves: the messages of ``Connection``, as a stream."""

from __future__ import annotations

import contextlib
import ipaddress
import os
import socket
import time

from fastref.errors import ProtocolError, UsageError
from fastref.rendezvous.connection import MAX_MESSAGE_BYTES, Connection, Message, parse_message

__all__ = ["StreamConnection", "endpoint_text", "is_loopback", "parse_endpoint", "tune"]

SILENCE_S = 15.0
"""How long a peer may leave what was sent to it without an acknowledgement before the connection has ended."""
_KEEPALIVE_AFTER_S, _KEEPALIVE_EVERY_S = 5, 2
_KEEPALIVE_TIMES = 5  # together with the two above: SILENCE_S
_LONGEST_MS = 2**31 - 1

_HEAD_BYTES = 4
# A message that has been begun has to be finished, whatever the caller's patience; all of it fits into any socket's
# buffer unless the peer has stopped reading long before.
_FINISH_S = 5.0


class StreamConnection(Connection):
    """A TCP socket to a worker; what came before, the proof of who it is, is over.

    A message is JSON behind its length, 4 bytes, big-endian, at most 64 KiB. Not one byte is read beyond the message
    that is received, so the socket can be handed over between two messages. The end of the connection for whatever
    reason, silence too, counts as that of the peer.

    Attributes
    ----------
    pid : int
        What the peer says; 0 until it has. Nobody has vouched for it.
    pidfd : int
        -1.
    carrier : socket.socket
        The TCP socket; another than ``socket`` where TLS is between the two.
    """

    def __init__(self, sock: socket.socket, pid: int = 0, carrier: socket.socket | None = None) -> None:
        super().__init__(sock, pid, -1)
        self.carrier = carrier or sock
        self._received = bytearray()

    def receive_message(self) -> Message | None:
        """Return the next message, None when the connection has ended.

        Raises
        ------
        BlockingIOError
            It is not all there yet.
        ProtocolError
            What came is no message; after a wrong length nothing else can be read any more.
        """
        try:
            if not self._fill(_HEAD_BYTES):
                return None
            size = int.from_bytes(self._received[:_HEAD_BYTES], "big")
            if not 0 < size <= MAX_MESSAGE_BYTES:
                raise ProtocolError(
                    f"process {self.pid} announced a message of {size} bytes, 1 to {MAX_MESSAGE_BYTES} are allowed"
                )
            if not self._fill(_HEAD_BYTES + size):
                return None
        except BlockingIOError:
            raise
        except OSError:  # reset, timed out, no way there any more
            return None
        data = bytes(self._received[_HEAD_BYTES:])
        self._received.clear()
        return parse_message(data, [])

    def tolerate(self, silence_s: float) -> None:
        """Have the system end the connection after this much silence, not before; who reads it may do so sooner."""
        with contextlib.suppress(OSError):  # it has ended, which reading shows
            _tolerate(self.carrier, silence_s)

    def take_socket(self) -> socket.socket:
        """Hand the connected socket, which does not block, over to the caller; nothing is left here to be closed.

        Raises
        ------
        ProtocolError
            Part of a message has been received.
        """
        if self._received:
            raise ProtocolError(f"process {self.pid} has sent half a message")
        taken = socket.socket(fileno=self.socket.detach())
        taken.setblocking(False)
        return taken

    def close(self) -> None:
        """Close the connection; idempotent. The peer still gets what was sent before."""
        if os.getpid() == self._made_by and self.fileno() >= 0:
            with contextlib.suppress(OSError):
                self.socket.shutdown(socket.SHUT_WR)
                # What has come and is not read would make the system reset the connection instead of ending it.
                self.socket.recv(MAX_MESSAGE_BYTES, socket.MSG_DONTWAIT)
        super().close()

    def _send(self, data: bytes, fds: list[int], timeout_s: float) -> None:
        if fds:
            raise UsageError(f"descriptors cannot be sent to process {self.pid}: it is reached over TCP")
        rest = memoryview(len(data).to_bytes(_HEAD_BYTES, "big") + data)
        begun = False
        deadline = time.monotonic() + timeout_s
        while rest:
            try:
                sent = self.socket.send(rest, socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL)
            except BlockingIOError:
                try:
                    self._wait_for_room(deadline, timeout_s)
                except TimeoutError:
                    if begun:
                        self.close()  # what follows would be taken for the rest of this one
                    raise
            except ConnectionError:
                raise
            except OSError as error:  # timed out, no way there any more
                raise ConnectionResetError(f"the connection to process {self.pid} failed: {error.strerror}") from error
            else:
                rest = rest[sent:]
                if not begun:
                    begun, timeout_s = True, max(timeout_s, _FINISH_S)
                    deadline = time.monotonic() + timeout_s

    def _fill(self, size: int) -> bool:
        """Read until ``size`` bytes are there; False when the peer has ended the connection."""
        while len(self._received) < size:
            data = self.socket.recv(size - len(self._received), socket.MSG_DONTWAIT)
            if not data:
                return False
            self._received += data
        return True


def tune(sock: socket.socket) -> None:
    """Set what every TCP connection between workers has: no waiting, no delay, an end after silence."""
    sock.setblocking(False)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, _KEEPALIVE_AFTER_S)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, _KEEPALIVE_EVERY_S)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, _KEEPALIVE_TIMES)
    _tolerate(sock, SILENCE_S)


def _tolerate(sock: socket.socket, silence_s: float) -> None:
    # With this set, the number of probes without an answer does not count.
    longest_ms = min(max(silence_s, SILENCE_S) * 1e3, _LONGEST_MS)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, int(longest_ms))


def endpoint_text(address: str, port: int) -> str:
    """Return ``address:port``, an IPv6 address in brackets."""
    return f"[{address}]:{port}" if ":" in address else f"{address}:{port}"


def is_loopback(endpoint: str) -> bool:
    """Return whether an endpoint can be reached on its own machine alone.

    Raises
    ------
    ProtocolError
        It is none.
    """
    return ipaddress.ip_address(parse_endpoint(endpoint)[0]).is_loopback


def parse_endpoint(endpoint: str) -> tuple[str, int]:
    """Return address and port of an endpoint.

    Raises
    ------
    ProtocolError
        It is none: an endpoint has an IP address, never a name.
    """
    address, _, port = endpoint.rpartition(":")
    if address.startswith("[") and address.endswith("]"):
        address = address[1:-1]
    try:
        ipaddress.ip_address(address)
        number = int(port) if port.isascii() and port.isdecimal() else 0
    except ValueError:
        number = 0
    if not 0 < number < 1 << 16:
        raise ProtocolError(f"an endpoint is an IP address and a port, such as 10.0.0.1:4711, not {endpoint[:100]!r}")
    return address, number
