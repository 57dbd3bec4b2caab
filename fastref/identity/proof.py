"""The handshake over a connected socket, with one deadline."""

from __future__ import annotations

import contextlib
import select
import socket
import ssl
import time
from collections.abc import Iterator
from typing import Protocol

from fastref.errors import IdentityError
from fastref.identity.handshake import Handshake
from fastref.identity.token import Token

__all__ = ["DEFAULT_TIMEOUT_S", "in_words", "prove", "wait_until"]

DEFAULT_TIMEOUT_S = 5.0
_LONGEST_WAIT_S = 3600.0  # deadlines may be infinite, the argument of poll may not


_IN_WORDS = {
    "WRONG_VERSION_NUMBER": "it does not speak TLS",
    "PACKET_LENGTH_TOO_LONG": "it does not speak TLS",
    "HTTP_REQUEST": "it speaks HTTP",
    "UNSUPPORTED_PROTOCOL": "it speaks no TLS 1.3",
    "TLSV1_ALERT_PROTOCOL_VERSION": "it speaks another version of TLS and refuses this one",
    "PEER_DID_NOT_RETURN_A_CERTIFICATE": "it has no certificate",
    "TLSV13_ALERT_CERTIFICATE_REQUIRED": "it wants a certificate from here",
    "TLSV1_ALERT_UNKNOWN_CA": "it does not know the authority of the certificate here",
}


class Stream(Protocol):
    """What the handshake needs of a connection; ``send`` and ``recv`` raise BlockingIOError where they would wait."""

    def fileno(self) -> int: ...
    def send(self, data: memoryview, /) -> int: ...
    def recv(self, size_bytes: int, /) -> bytes: ...


def prove(
    sock: socket.socket | Stream,
    token: Token,
    *,
    asks: bool,
    job: str,
    epoch: int,
    version: str,
    timeout_s: float = DEFAULT_TIMEOUT_S,
) -> None:
    """Prove to the other end of ``sock`` that this one belongs to the job, and have it prove the same.

    Not one byte beyond the handshake is read. Afterwards the socket has the timeout that it had. When this raises, the
    connection is good for nothing but to be closed.

    Parameters
    ----------
    sock : socket.socket or TlsConnection
        Connected.
    token, asks, job, epoch, version
        As for ``Handshake``.
    timeout_s : float
        Seconds for all of it, however slowly bytes come.

    Raises
    ------
    IdentityError
        The other end is no worker of this job, or takes this one for a stranger: it closed the connection after our
        proof. A listener that ends at that moment cannot be told from one that refuses.
    TimeoutError
        It took longer.
    ConnectionError
        The other end closed the connection before it said who it is.
    UsageError
        As for ``Handshake``.
    """
    deadline = time.monotonic() + timeout_s
    handshake = Handshake(token, asks=asks, job=job, epoch=epoch, version=version)
    try:
        with _never_blocking(sock):
            while not handshake.done:
                _send_all(sock, handshake.to_send(), deadline)
                if handshake.wants:
                    handshake.feed(_receive(sock, handshake, deadline))
    except IdentityError:
        _say_last_words(sock, handshake.to_send())
        raise
    except ssl.SSLError as error:  # with TLS 1.3 a refused certificate shows here
        raise IdentityError(f"TLS with the other end failed: {in_words(error)}") from error
    except ConnectionError as error:
        if asks and handshake.met:
            raise IdentityError(
                "the other end closed the connection when this one had proved itself: its token, job name or restart "
                "count differs, or it has just ended"
            ) from error
        raise


def wait_until(sock: Stream, events: int, deadline: float) -> None:
    """Wait until the socket is ready.

    Parameters
    ----------
    sock : socket.socket or TlsConnection
        Connected.
    events : int
        As for ``poll``.
    deadline : float
        On the clock of ``time.monotonic``.

    Raises
    ------
    TimeoutError
        It was not ready by then.
    """
    poller = select.poll()
    poller.register(sock.fileno(), events)
    left_s = deadline - time.monotonic()
    while left_s > 0:
        if poller.poll(min(left_s, _LONGEST_WAIT_S) * 1e3):
            return
        left_s = deadline - time.monotonic()
    raise TimeoutError("the other end did not prove itself in time")


def in_words(error: ssl.SSLError) -> str:
    """Return what an error of TLS means, for a log."""
    if isinstance(error, ssl.SSLCertVerificationError):
        return f"its certificate is refused: {error.verify_message}"
    reason = error.reason or str(error)
    return f"{_IN_WORDS[reason]} ({reason})" if reason in _IN_WORDS else reason


def _send_all(sock: Stream, data: bytes, deadline: float) -> None:
    rest = memoryview(data)
    while rest:
        try:
            rest = rest[sock.send(rest) :]
        except BlockingIOError:
            wait_until(sock, select.POLLOUT, deadline)


def _receive(sock: Stream, handshake: Handshake, deadline: float) -> bytes:
    """Return the next bytes that the handshake wants, at most 64."""
    size_bytes = handshake.wants
    received = b""
    while len(received) < size_bytes:
        # Looked at on every turn: one who sends a byte at a time keeps the socket ready.
        if time.monotonic() > deadline:
            raise TimeoutError("the other end did not prove itself in time")
        try:
            data = sock.recv(size_bytes - len(received))
        except BlockingIOError:
            wait_until(sock, select.POLLIN, deadline)
        except ConnectionError:
            handshake.end(received)
            raise
        else:
            if not data:
                handshake.end(received)
                raise ConnectionResetError(
                    "the other end closed the connection before it had proved itself: it has ended, or TLS is on there "
                    "and off here"
                )
            received += data
    return received


def _say_last_words(sock: Stream, data: bytes) -> None:
    """Send what one who is refused may know, if there is room for it."""
    if data:
        with contextlib.suppress(OSError):  # he need not know
            sock.send(memoryview(data))


@contextlib.contextmanager
def _never_blocking(sock: socket.socket | Stream) -> Iterator[None]:
    if not isinstance(sock, socket.socket):
        yield
        return
    before = sock.gettimeout()
    sock.settimeout(0)
    try:
        yield
    finally:
        sock.settimeout(before)
