"""TCP connections whose two ends have not both proved themselves: driven from a loop, few at a time, not for long."""

from __future__ import annotations

import contextlib
import errno
import functools
import os
import select
import selectors
import socket
import ssl
import time
from collections.abc import Callable
from dataclasses import dataclass

from fastref.errors import IdentityError
from fastref.identity import DEFAULT_TIMEOUT_S, Handshake, TlsConnection, Token, client_context, relay, server_context
from fastref.identity.proof import in_words
from fastref.options import TlsFiles
from fastref.rendezvous.stream import StreamConnection, parse_endpoint, tune

__all__ = ["Credentials", "Proving", "Provings", "dial", "visit"]

PROTOCOL = "tcp 1"
"""What two workers have to have in common to talk at all; that they run the same version is said in what follows."""

_LONGEST_WAIT_S = 3600.0  # deadlines may be infinite, the argument of poll may not


class Tls:
    """What TLS needs, read from files once.

    Raises
    ------
    UsageError
        A file cannot be read, or does not hold what it should.
    """

    def __init__(self, files: TlsFiles) -> None:
        self._client, self._server = client_context(files), server_context(files)

    def context(self, *, asks: bool) -> ssl.SSLContext:
        """Return the settings for the end that connects, or that accepts."""
        return self._client if asks else self._server


@dataclass(frozen=True)
class Credentials:
    """What both ends of a connection have to have.

    Parameters
    ----------
    token : Token
        The secret of the job.
    job : str
        Its name.
    epoch : int
        How often it was restarted.
    tls : Tls, optional
        All workers of a job have TLS around their connections, or none.
    """

    token: Token
    job: str
    epoch: int
    tls: Tls | None = None

    def handshake(self, *, asks: bool) -> Handshake:
        """Return a new proof for one connection."""
        return Handshake(self.token, asks=asks, job=self.job, epoch=self.epoch, version=PROTOCOL)


class Proving:
    """One connection until both ends have proved themselves. It never waits.

    Parameters
    ----------
    sock : socket.socket
        Does not block. It may still be connecting.
    credentials : Credentials
    asks : bool
        Whether this end has connected.
    deadline : float
        On the clock of ``time.monotonic``; whoever drives it looks at it.
    """

    def __init__(self, sock: socket.socket, credentials: Credentials, *, asks: bool, deadline: float) -> None:
        self.socket = sock
        self.deadline = deadline
        self._asks = asks
        self._context = None if credentials.tls is None else credentials.tls.context(asks=asks)
        self._tls: TlsConnection | None = None
        self._is_secure = self._context is None
        self._handshake = credentials.handshake(asks=asks)
        self._outgoing = b""
        self._incoming = b""
        self._connecting = asks
        self._all_out = True  # of what TLS has taken
        self._made_by = os.getpid()

    def fileno(self) -> int:
        """Return the descriptor of the socket, -1 when closed."""
        return self.socket.fileno()

    @property
    def events(self) -> int:
        """What to wait for before ``advance``, as for selectors."""
        waits = self._connecting or self._outgoing or (self._tls is not None and not self._all_out)
        return selectors.EVENT_WRITE if waits else selectors.EVENT_READ

    @property
    def is_connected(self) -> bool:
        """Whether there is somebody, or at least his system, at the other end."""
        return not self._connecting

    def advance(self) -> bool:
        """Go on as far as possible without waiting; True when both ends have proved themselves.

        Not one byte beyond the handshake is read.

        Raises
        ------
        IdentityError
            The other end has not proved itself, or does not take the proof of this one.
        ConnectionError
            The connection cannot be made, or has ended before the other end said who it is.
        """
        try:
            if self._connecting and not self._connect():
                return False
            done = (self._is_secure or self._secure()) and self._shake_hands()
            self._all_out = self._tls is None or self._tls.flush()
            return done and self._all_out
        except IdentityError:
            if last_words := self._handshake.to_send():  # one who is refused may know which version runs here
                with contextlib.suppress(OSError):
                    (self._tls or self.socket).send(last_words)
            raise
        except ssl.SSLEOFError as error:
            raise ConnectionResetError("the other end closed the connection during the handshake of TLS") from error
        except ssl.SSLError as error:
            raise IdentityError(f"TLS with the other end failed: {in_words(error)}") from error
        except OSError as error:
            if self._asks and self._handshake.met:
                raise IdentityError(
                    "the other end closed the connection when this one had proved itself: its token, job name or "
                    "restart count differs, or it has just ended"
                ) from error
            if isinstance(error, ConnectionError):
                raise
            raise ConnectionAbortedError(error.strerror or str(error)) from error

    def connection(self) -> StreamConnection:
        """Return the connection, once both ends have proved themselves; it takes the place of this."""
        if self._tls is None:
            return StreamConnection(self.socket)
        return StreamConnection(relay(self._tls), carrier=self.socket)

    def close(self) -> None:
        """Hang up without a word; idempotent."""
        if os.getpid() == self._made_by:
            with contextlib.suppress(OSError):
                self.socket.shutdown(socket.SHUT_RDWR)
        self.socket.close()

    def _connect(self) -> bool:
        poller = select.poll()
        poller.register(self.socket.fileno(), select.POLLOUT)
        if not poller.poll(0):
            return False
        trouble = self.socket.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
        if trouble:
            raise OSError(trouble, os.strerror(trouble))
        self._connecting = False
        return True

    def _secure(self) -> bool:
        if self._tls is None and self._context is not None:
            self._tls = TlsConnection(self.socket, self._context)
        if self._tls is not None:
            try:
                self._tls.do_handshake()
            except BlockingIOError:
                return False
        self._is_secure = True
        return True

    def _shake_hands(self) -> bool:
        stream = self._tls or self.socket
        try:
            while True:
                self._outgoing += self._handshake.to_send()
                while self._outgoing:
                    self._outgoing = self._outgoing[stream.send(self._outgoing) :]
                if self._handshake.done:
                    return True
                missing = self._handshake.wants - len(self._incoming)
                received = stream.recv(missing)
                if not received:
                    self._handshake.end(self._incoming)
                    raise ConnectionResetError(
                        "the other end closed the connection before it had proved itself: it has ended, or TLS is on "
                        "there and off here"
                    )
                self._incoming += received
                if len(received) == missing:
                    whole, self._incoming = self._incoming, b""
                    self._handshake.feed(whole)
        except BlockingIOError:
            return False


class Provings:
    """The provings that are under way in somebody's loop, whose selector holds callables.

    Beyond ``most`` the oldest is dropped: nobody can keep others out by saying nothing.
    """

    def __init__(self, selector: selectors.BaseSelector, most: int | None = None) -> None:
        self._selector = selector
        self._most = most
        self._under_way: dict[Proving, Callable[[Exception], None]] = {}

    def start(
        self,
        proving: Proving,
        proved: Callable[[StreamConnection], None],
        failed: Callable[[Exception], None] = lambda error: None,
    ) -> None:
        """Have one of the two called: with the connection, or, it being closed, with the reason; it may be at once."""
        if proving.is_connected:
            try:
                # Most strangers have said by now why they are refused: they push nobody out.
                done = proving.advance()
            except (IdentityError, OSError) as error:
                proving.close()
                failed(error)
                return
            if done:  # its messages came as fast as they were asked for: there may be no other event
                self._hand_on(proving, proved, failed)
                return
        if self._most is not None and len(self._under_way) >= self._most:
            self._end(next(iter(self._under_way)), ConnectionAbortedError("others came after it"))
        self._under_way[proving] = failed
        # No function that knows itself: it, and all that ``proved`` refers to, would wait for the garbage collector.
        go_on = functools.partial(self._go_on, proving, proved)
        self._selector.register(proving.fileno(), proving.events, go_on)

    def drop(self, proving: Proving) -> None:
        """Have nothing called about one that is under way, and close it; nothing when it is not any more."""
        if self._under_way.pop(proving, None) is not None:
            self._selector.unregister(proving.fileno())
            proving.close()

    def expire(self) -> None:
        """Drop those who have had their time."""
        now = time.monotonic()
        for proving in [proving for proving in self._under_way if now >= proving.deadline]:
            connected = proving.is_connected
            trouble = TimeoutError("the other end did not prove itself in time")
            self._end(proving, trouble if connected else ConnectionAbortedError("nothing answers there"))

    def close(self) -> None:
        """Drop all, also in a forked child, which does not touch the selector that it shares with its parent."""
        for proving in self._under_way:
            proving.close()
        self._under_way.clear()

    def _go_on(self, proving: Proving, proved: Callable[[StreamConnection], None]) -> None:
        try:
            if not proving.advance():
                go_on = functools.partial(self._go_on, proving, proved)
                self._selector.modify(proving.fileno(), proving.events, go_on)
                return
        except (IdentityError, OSError) as error:
            self._end(proving, error)
            return
        failed = self._under_way.pop(proving)
        self._selector.unregister(proving.fileno())
        self._hand_on(proving, proved, failed)

    @staticmethod
    def _hand_on(
        proving: Proving, proved: Callable[[StreamConnection], None], failed: Callable[[Exception], None]
    ) -> None:
        try:
            connection = proving.connection()
        except OSError as error:  # what stands in for TLS takes two descriptors more
            proving.close()
            failed(error)
        else:
            proved(connection)

    def _end(self, proving: Proving, error: Exception) -> None:
        failed = self._under_way.pop(proving)
        self._selector.unregister(proving.fileno())
        proving.close()
        failed(error)


def dial(endpoint: str, credentials: Credentials, deadline: float) -> Proving:
    """Begin to connect and to prove oneself to the worker that listens at ``endpoint``.

    Parameters
    ----------
    endpoint : str
        ``address:port``.
    credentials : Credentials
    deadline : float
        On the clock of ``time.monotonic``; five seconds have to do in any case.

    Raises
    ------
    ConnectionError
        It is known at once that nobody can be reached there.
    ProtocolError
        It is no endpoint.
    """
    address, port = parse_endpoint(endpoint)
    family, kind, protocol, _, target = socket.getaddrinfo(
        address, port, type=socket.SOCK_STREAM, flags=socket.AI_NUMERICHOST
    )[0]
    sock = socket.socket(family, kind | socket.SOCK_CLOEXEC, protocol)
    try:
        tune(sock)
        trouble = sock.connect_ex(target)
        if trouble not in (0, errno.EINPROGRESS):
            raise ConnectionRefusedError(trouble, f"{os.strerror(trouble)}: {endpoint}")
        limit = time.monotonic() + DEFAULT_TIMEOUT_S
        return Proving(sock, credentials, asks=True, deadline=min(deadline, limit))
    except BaseException:
        sock.close()
        raise


def visit(endpoint: str, credentials: Credentials, deadline: float) -> StreamConnection:
    """Connect to the worker at ``endpoint`` and wait until both have proved themselves.

    Parameters
    ----------
    endpoint, credentials, deadline
        As for ``dial``.

    Raises
    ------
    IdentityError, ConnectionError
        As ``Proving.advance``.
    TimeoutError
        The connection was made, but the other end did not prove itself within the time.
    """
    proving = dial(endpoint, credentials, deadline)
    try:
        while not proving.advance():
            left_s = proving.deadline - time.monotonic()
            if left_s <= 0 and not proving.is_connected:
                raise ConnectionAbortedError(f"nothing answers at {endpoint}")
            if left_s <= 0:
                raise TimeoutError(f"who listens at {endpoint} did not prove himself in time")
            poller = select.poll()
            poller.register(
                proving.fileno(), select.POLLOUT if proving.events == selectors.EVENT_WRITE else select.POLLIN
            )
            poller.poll(min(left_s, _LONGEST_WAIT_S) * 1e3)
        return proving.connection()
    except BaseException:
        proving.close()
        raise
