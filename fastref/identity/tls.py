"""TLS between two workers: both sides verified, 1.3 at least, over a socket that never blocks."""

from __future__ import annotations

import contextlib
import select
import socket
import ssl
import time

from fastref.errors import IdentityError, UsageError
from fastref.identity.proof import DEFAULT_TIMEOUT_S, in_words, wait_until
from fastref.options import TlsFiles

__all__ = ["TlsConnection", "client_context", "secure", "server_context"]

CHUNK_BYTES = 64 * 1024  # 256 KiB were no faster
_RECORD_BYTES = 16 * 1024  # a TLS record holds at most this much


def client_context(files: TlsFiles) -> ssl.SSLContext:
    """Return the settings for the end that connects.

    The other end's certificate must come from the job's authority. Its names are not looked at, since workers are known
    by the addresses that they tell each other: whoever has a certificate of this authority may be any worker. That it
    is one of this job the handshake over the token shows.

    Raises
    ------
    UsageError
        A file cannot be read, or does not hold what it should.
    """
    return _context(ssl.PROTOCOL_TLS_CLIENT, files)


def server_context(files: TlsFiles) -> ssl.SSLContext:
    """Return the settings for the end that accepts: as for the other one, whose certificate is asked for and verified.

    Raises
    ------
    UsageError
        A file cannot be read, or does not hold what it should.
    """
    context = _context(ssl.PROTOCOL_TLS_SERVER, files)
    context.num_tickets = 0  # nobody resumes
    return context


class TlsConnection:
    """TLS over one connected socket, which it owns and which never blocks.

    ``ssl.SSLSocket`` cannot end one direction and go on reading the other, which this can; and it takes two system
    calls for each record of 16 KiB, where this takes as much as the socket has.

    Parameters
    ----------
    sock : socket.socket
        Connected.
    context : ssl.SSLContext
        Of ``client_context`` or ``server_context``; it says which end this is.
    """

    def __init__(self, sock: socket.socket, context: ssl.SSLContext) -> None:
        sock.setblocking(False)
        self._socket = sock
        self._incoming, self._outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        is_server = context.protocol == ssl.PROTOCOL_TLS_SERVER
        self._tls = context.wrap_bio(self._incoming, self._outgoing, server_side=is_server)
        self._arrived = bytearray(_RECORD_BYTES)  # a stranger is not worth more
        self._unsent = memoryview(b"")
        self._ahead = b""  # decrypted before its time; at most what one chunk holds
        self._failure: ssl.SSLError | None = None  # no more can be received

    def fileno(self) -> int:
        """Return the descriptor of the socket, -1 when closed."""
        return self._socket.fileno()

    def expect_much(self) -> None:
        """Take as much as 64 KiB from the socket at once; for one who has proved himself."""
        self._arrived = bytearray(CHUNK_BYTES)

    def do_handshake(self) -> None:
        """Go on with TLS's own handshake.

        Raises
        ------
        BlockingIOError
            More has to come from the other end first.
        ssl.SSLError
            The other end is refused, or refuses.
        ConnectionError
            It is gone.
        """
        try:
            while True:
                try:
                    self._tls.do_handshake()
                    return
                except ssl.SSLWantReadError:
                    self.flush()
                    self._take_what_arrived()
        finally:
            with contextlib.suppress(OSError):  # the alert that says why, or the last message
                self.flush()

    def send(self, data: bytes | memoryview) -> int:
        """Take all of ``data`` and send what the socket has room for; ``flush`` sends the rest.

        Raises
        ------
        BlockingIOError
            What was taken before is not out yet; nothing was taken.
        ConnectionError, ssl.SSLError
            The connection has ended.
        """
        if not self.flush():
            raise BlockingIOError
        rest = memoryview(data)
        while rest:
            rest = rest[self._tls.write(rest) :]
        self.flush()
        return len(data)

    def recv(self, size_bytes: int) -> bytes:
        """Return at most ``size_bytes`` bytes; none when the other end has said that no more will come.

        Raises
        ------
        BlockingIOError
            Nothing is there yet.
        ConnectionError, ssl.SSLError
            The connection has ended without that, or what came was changed on the way.
        """
        buffer = bytearray(min(size_bytes, _RECORD_BYTES))
        size = self.recv_into(memoryview(buffer))
        return bytes(buffer[:size])

    def recv_into(self, view: memoryview) -> int:
        """As ``recv``, into ``view``, of which it fills as much as has come; return the number of bytes."""
        if self._ahead:
            ready = min(len(view), len(self._ahead))
            view[:ready], self._ahead = self._ahead[:ready], self._ahead[ready:]
            return ready
        self._raise_failure()
        filled = 0
        while filled < len(view):
            try:
                size: int = self._tls.read(len(view) - filled, view[filled:])  # type: ignore[assignment]
            except ssl.SSLZeroReturnError:  # how it says so once this end has said goodbye as well
                size = 0
            except ssl.SSLWantReadError:
                try:
                    self._take_what_arrived()
                except OSError:
                    if not filled:
                        raise
                    break
                continue
            except ssl.SSLError as error:
                self._failure = error
                if filled:
                    break  # what has come first
                self._raise_failure()
            if not size:
                break
            filled += size
        return filled

    def flush(self) -> bool:
        """Send what waits to be sent; return whether nothing waits any more.

        Raises
        ------
        ConnectionError
            The other end is gone.
        """
        while True:
            if not self._unsent:
                if not self._outgoing.pending:
                    return True
                self._unsent = memoryview(self._outgoing.read())
            try:
                self._unsent = self._unsent[self._socket.send(self._unsent) :]
            except BlockingIOError:
                return False

    def end_writing(self) -> None:
        """Tell the other end that no more will come; it can still send."""
        # OpenSSL's goodbye looks for that of the other end, and loses what it meets instead: take that first.
        with contextlib.suppress(ssl.SSLError):
            while data := self._tls.read(CHUNK_BYTES):
                self._ahead += data
        with contextlib.suppress(ssl.SSLError):  # it would like to wait for the answer: no need
            self._tls.unwrap()
        self.flush()

    def close(self, *, for_all: bool = False) -> None:
        """Close the socket; idempotent.

        Parameters
        ----------
        for_all : bool
            End the connection even where a forked child has the socket too.
        """
        if for_all:
            with contextlib.suppress(OSError):  # it has ended already
                self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()

    def _raise_failure(self) -> None:
        if isinstance(self._failure, ssl.SSLEOFError):
            raise ConnectionResetError("the connection ended without the goodbye of TLS") from self._failure
        if self._failure is not None:
            raise self._failure

    def _take_what_arrived(self) -> None:
        size = self._socket.recv_into(self._arrived)
        if size:
            self._incoming.write(memoryview(self._arrived)[:size])
        else:
            self._incoming.write_eof()


def secure(sock: socket.socket, context: ssl.SSLContext, *, timeout_s: float = DEFAULT_TIMEOUT_S) -> TlsConnection:
    """Put TLS over a connected socket.

    With TLS 1.3 the end that connects is through before the other one has looked at its certificate: a refusal shows
    when it first receives, which is in ``prove``.

    Parameters
    ----------
    sock : socket.socket
        Connected; it belongs to the connection that is returned, and is closed when this raises.
    context : ssl.SSLContext
        Of ``client_context`` or ``server_context``.
    timeout_s : float
        Seconds for all of it.

    Raises
    ------
    IdentityError
        The other end speaks no TLS 1.3, has no certificate of the job's authority, or refuses the one here.
    TimeoutError
        It took longer.
    ConnectionError
        The other end is gone.
    """
    deadline = time.monotonic() + timeout_s
    connection = TlsConnection(sock, context)
    try:
        while True:
            try:
                connection.do_handshake()
                break
            except BlockingIOError:
                wait_until(connection, select.POLLIN, deadline)
        while not connection.flush():
            wait_until(connection, select.POLLOUT, deadline)
    except ssl.SSLEOFError as error:
        connection.close()
        raise ConnectionResetError("the other end closed the connection during the handshake of TLS") from error
    except ssl.SSLError as error:
        connection.close()
        raise IdentityError(f"TLS with the other end failed: {in_words(error)}") from error
    except BaseException:
        connection.close()
        raise
    return connection


def _context(protocol: int, files: TlsFiles) -> ssl.SSLContext:
    context = ssl.SSLContext(protocol)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_REQUIRED
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    try:
        context.load_cert_chain(files.certificate, files.key, password=_no_passphrase)
    except OSError as error:  # ssl.SSLError too
        raise UsageError(f"TLS: cannot use {files.certificate} with {files.key}: {error.strerror or error}") from error
    try:
        context.load_verify_locations(cafile=files.authority)
    except OSError as error:
        raise UsageError(f"TLS: cannot use {files.authority} as authority: {error.strerror or error}") from error
    return context


def _no_passphrase() -> str:
    raise UsageError(
        "TLS: the private key has a passphrase, and nobody is here to type it: store it without, mode 0600"
    )
