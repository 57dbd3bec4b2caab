"""Where a worker can be reached: a unix socket for those of its host, a TCP port for others."""

from __future__ import annotations

import contextlib
import errno
import os
import socket
import time
from pathlib import Path

from fastref.errors import ProtocolError, ResourceError
from fastref.identity import forget_loopback_token
from fastref.identity.token import LOOPBACK_TOKEN_NAME
from fastref.rendezvous.connection import Connection, peer_of, socket_address
from fastref.rendezvous.stream import endpoint_text, tune
from fastref.segments.rundir import make_private_directory

__all__ = ["MEMBER_SUFFIX", "STATIC_SUFFIX", "Listener", "Spare", "TcpListener"]

STATIC_SUFFIX, MEMBER_SUFFIX = "sock", "member"
"""How the sockets of workers end: of those of a job of fixed size, of those of a group that workers join and leave."""

_BACKLOG = 4096
_TIMES_TO_FORGET = 100
_NO_DESCRIPTOR_S = 0.01
# What accept says of a visitor that has gone again; the next one may be fine.
_GONE_AGAIN = (errno.ECONNABORTED, errno.ENETDOWN, errno.EPROTO, errno.EHOSTUNREACH, errno.ENETUNREACH)


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
        self._queue = _Queue(socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_CLOEXEC))
        self.socket = self._queue.socket
        try:
            self._bind()
            self.socket.listen(_BACKLOG)
        except BaseException:
            self.close()
            raise

    def fileno(self) -> int:
        """Return the descriptor to watch for reading, -1 when closed."""
        return self.socket.fileno()

    @property
    def spare(self) -> Spare:
        """The descriptor that this worker keeps for when no other is left."""
        return self._queue.spare

    def accept(self) -> Connection | None:
        """Take the next visitor, None when none is left or it was turned away.

        Turned away, before a byte is read: other users, processes that have ended already, and
        everybody while this process has no descriptor left.
        """
        sock = self._queue.take()
        if sock is None:
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
        if not self._queue.close() or os.getpid() != self._pid:
            return
        self.path.unlink(missing_ok=True)
        for _ in range(_TIMES_TO_FORGET):
            is_clear = forget_loopback_token(self.directory)
            try:
                self.directory.rmdir()
            except OSError as error:
                if error.errno not in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOENT):
                    raise
            # Another one who leaves may be looking whether he is the last, and have seen the socket from here still.
            if is_clear or not self._is_last():
                return
            time.sleep(0.001)

    def _is_last(self) -> bool:
        try:
            names = os.listdir(self.directory)
        except FileNotFoundError:
            return False
        return bool(names) and all(name.partition(".")[0] == LOOPBACK_TOKEN_NAME for name in names)

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


class TcpListener:
    """A TCP port of this host. Who comes has proved nothing yet.

    Parameters
    ----------
    address : str
        An IP address of this host; the port is open on no other.
    port : int
        0: any that is free.

    Raises
    ------
    ResourceError
        The port cannot be had.
    """

    def __init__(self, address: str, port: int = 0) -> None:
        try:
            family, kind, protocol, _, target = socket.getaddrinfo(
                address, port, type=socket.SOCK_STREAM, flags=socket.AI_NUMERICHOST | socket.AI_PASSIVE
            )[0]
            self._queue = _Queue(socket.socket(family, kind | socket.SOCK_CLOEXEC, protocol))
        except OSError as error:
            raise ResourceError(f"cannot listen at {address!r}: {error}") from error
        try:
            if family == socket.AF_INET6:
                self._queue.socket.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
            self._queue.socket.bind(target)
            self._queue.socket.listen(_BACKLOG)
        except OSError as error:
            self._queue.close()
            raise ResourceError(f"cannot listen at {endpoint_text(address, port)}: {error.strerror}") from error
        self.endpoint = endpoint_text(address, self._queue.socket.getsockname()[1])

    def fileno(self) -> int:
        """Return the descriptor to watch for reading, -1 when closed."""
        return self._queue.socket.fileno()

    def accept(self) -> socket.socket | None:
        """Take the next visitor, None when none is left or it was turned away for want of descriptors."""
        sock = self._queue.take()
        if sock is not None:
            try:
                tune(sock)
            except OSError:  # it has gone again
                sock.close()
                return self.accept()
        return sock

    def close(self) -> None:
        """Stop listening; idempotent. A forked child only closes its descriptors."""
        self._queue.close()


class Spare:
    """A descriptor that is kept for when no other is left: given up for a moment, it makes room for one."""

    def __init__(self) -> None:
        # No lock: a destructor, or a forked child, may come here at any line. A second one does no harm.
        self._fds = [self._open()]
        self._is_closed = False

    def give_up(self) -> bool:
        """Make room for one descriptor, until ``take_back``; False when there is none to be given up."""
        try:
            os.close(self._fds.pop())
        except IndexError:
            return False
        return True

    def take_back(self) -> None:
        """Have it again, unless somebody else has taken the last one meanwhile."""
        with contextlib.suppress(OSError):
            if not self._fds and not self._is_closed:
                self._fds.append(self._open())

    def close(self) -> None:
        """Have none any more; idempotent."""
        self._is_closed = True
        while self.give_up():
            pass

    @staticmethod
    def _open() -> int:
        return os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC)


class _Queue:
    """A listening socket whose visitors are taken without waiting, also when no descriptor is left."""

    def __init__(self, sock: socket.socket) -> None:
        self.socket = sock
        self.socket.setblocking(False)
        self.spare = Spare()

    def take(self) -> socket.socket | None:
        """Return the next visitor, None when none is left or it was turned away."""
        try:
            return self.socket.accept()[0]
        except BlockingIOError:
            return None
        except OSError as error:
            if error.errno in _GONE_AGAIN:
                return None
            if error.errno not in (errno.EMFILE, errno.ENFILE):
                raise
            self._drop_visitor()
            return None

    def close(self) -> bool:
        """Close both descriptors; False when they have been closed before."""
        was_open = self.socket.fileno() >= 0
        self.socket.close()
        self.spare.close()
        return was_open

    def _drop_visitor(self) -> None:
        """Take and drop a visitor: otherwise it would stay in the queue, and the listener be readable for ever."""
        if not self.spare.give_up():
            time.sleep(_NO_DESCRIPTOR_S)  # and so it is, but nobody has to spin for that
        try:
            sock, _ = self.socket.accept()
            sock.close()
        except OSError:
            pass  # it left by itself, or another thread took the descriptor: the next event tries again
        self.spare.take_back()
