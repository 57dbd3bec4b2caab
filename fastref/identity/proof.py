"""The handshake over a connected socket, with one deadline."""

from __future__ import annotations

import select
import socket
import ssl
import time

from fastref.errors import IdentityError
from fastref.identity.handshake import Handshake
from fastref.identity.token import Token

__all__ = ["DEFAULT_TIMEOUT_S", "prove", "wait_until"]

DEFAULT_TIMEOUT_S = 5.0
_LONGEST_WAIT_S = 3600.0  # deadlines may be infinite, the argument of poll may not


def prove(
    sock: socket.socket,
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
    sock : socket.socket
        Connected; of TLS too.
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
    before = sock.gettimeout()
    sock.settimeout(0)
    try:
        while not handshake.done:
            _send_all(sock, handshake.to_send(), deadline)
            if handshake.wants:
                handshake.feed(_receive_exactly(sock, handshake.wants, deadline))
    except IdentityError:
        _say_last_words(sock, handshake.to_send())
        raise
    except (ConnectionError, ssl.SSLError) as error:
        if isinstance(error, ssl.SSLError):
            raise IdentityError(f"TLS failed during the handshake: {error.reason or error}") from error
        if asks and handshake.met:
            raise IdentityError(
                "the other end closed the connection when this one had proved itself: its token, job name or restart "
                "count differs, or it has just ended"
            ) from error
        raise
    finally:
        sock.settimeout(before)


def wait_until(sock: socket.socket, events: int, deadline: float) -> None:
    """Wait until the socket is ready.

    Parameters
    ----------
    sock : socket.socket
        Any.
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


def _send_all(sock: socket.socket, data: bytes, deadline: float) -> None:
    rest = memoryview(data)
    while rest:
        try:
            rest = rest[sock.send(rest) :]
        except (BlockingIOError, ssl.SSLWantWriteError):
            wait_until(sock, select.POLLOUT, deadline)
        except ssl.SSLWantReadError:
            wait_until(sock, select.POLLIN, deadline)


def _receive_exactly(sock: socket.socket, size_bytes: int, deadline: float) -> bytes:
    """Return the next bytes, at most the 64 that the handshake ever asks for."""
    received = b""
    while len(received) < size_bytes:
        # Looked at on every turn: one who sends a byte at a time keeps the socket ready.
        if time.monotonic() > deadline:
            raise TimeoutError("the other end did not prove itself in time")
        try:
            data = sock.recv(size_bytes - len(received))
        except (BlockingIOError, ssl.SSLWantReadError):
            wait_until(sock, select.POLLIN, deadline)
        except ssl.SSLWantWriteError:
            wait_until(sock, select.POLLOUT, deadline)
        else:
            if not data:
                raise ConnectionResetError("the other end closed the connection before it had proved itself")
            received += data
    return received


def _say_last_words(sock: socket.socket, data: bytes) -> None:
    """Send what one who is refused may know, if there is room for it."""
    if data:
        try:
            sock.send(data)
        except OSError:
            return  # he need not know
