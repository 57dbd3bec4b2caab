"""The TCP door of a worker: who knocks proves himself first; who has is handed on."""

from __future__ import annotations

import logging
import math
import os
import selectors
import time
from collections import deque
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

from fastref.identity import DEFAULT_TIMEOUT_S, find_token, loopback_token, refuse_without_token
from fastref.options import TlsFiles
from fastref.rendezvous.addresses import LOOPBACK, Address, choose_address
from fastref.rendezvous.launchers import all_on_this_host, start_of_all
from fastref.rendezvous.listening import Listener, TcpListener
from fastref.rendezvous.methods import LOCAL, job_name, scheme_of, store_host
from fastref.rendezvous.proving import Credentials, Proving, Provings, Tls, dial
from fastref.rendezvous.stream import StreamConnection, endpoint_text
from fastref.rendezvous.ways import forced_transport

if TYPE_CHECKING:
    from torch.distributed.distributed_c10d import Store

__all__ = ["Door", "open_door"]

MAX_UNPROVED = 64
"""Visitors that may be proving themselves at once; one more and the oldest has to go."""
# So many that those who prove themselves without delay, which takes two rounds more, are not pushed out by each other.
_GREETED_AT_ONCE = MAX_UNPROVED // 4
# After one was turned away, for others to gather: a thousand a second wake a worker two hundred times.
_PAUSE_S = 0.005

_logger = logging.getLogger("fastref")


class Door:
    """A TCP port of this worker.

    For a loop it is what ``Listener`` is: a descriptor to watch, and ``accept``. Strangers never get further than that.

    Parameters
    ----------
    listener : TcpListener
        Closed with this.
    credentials : Credentials
        What visitors have to prove; with the same this worker proves itself to others.
    address : Address
        Where it listens, and why there.
    """

    def __init__(self, listener: TcpListener, credentials: Credentials, address: Address) -> None:
        self.credentials = credentials
        self.address = address
        self._listener = listener
        try:
            self._selector = selectors.EpollSelector()
        except OSError:
            listener.close()
            raise
        self._provings = Provings(self._selector, MAX_UNPROVED)
        self._dialing = Provings(self._selector)
        self._proved: deque[StreamConnection] = deque()
        self._has_turned_away = False
        self._selector.register(listener.fileno(), selectors.EVENT_READ, self._greet)

    @property
    def endpoint(self) -> str:
        """``address:port``."""
        return self._listener.endpoint

    def fileno(self) -> int:
        """Return the descriptor to watch for reading: ready whenever ``accept`` has something to do."""
        return self._selector.fileno()

    def accept(self) -> StreamConnection | None:
        """Go on with those who are proving themselves, and return the next who has, None when there is none.

        To be called also once a second without an event: those who say nothing are dropped here, after five.
        """
        if not self._proved:
            self._provings.expire()
            self._dialing.expire()
            # Those who are there before those who come, who may push them out.
            for key, _ in sorted(self._selector.select(0), key=lambda event: event[0].data == self._greet):
                # An earlier event of this batch may have closed it, and its number may be that of another by now.
                if self._selector.get_map().get(key.fd) is key:
                    key.data()
            if self._has_turned_away and not self._proved:
                self._has_turned_away = False
                time.sleep(_PAUSE_S)
        return self._proved.popleft() if self._proved else None

    def dial(
        self, endpoint: str, proved: Callable[[StreamConnection], None], failed: Callable[[Exception], None]
    ) -> Callable[[], None]:
        """Go to another worker's door; one of the two is called from ``accept``, or ``failed`` at once.

        Returns
        -------
        callable
            Gives it up; neither of the two is called after that.
        """
        try:
            proving = dial(endpoint, self.credentials, math.inf)
        except OSError as error:  # for want of descriptors, too
            failed(error)
            return lambda: None
        self._dialing.start(proving, proved, failed)
        return lambda: self._dialing.drop(proving)

    def watch(self, connection: StreamConnection, callback: Callable[[], None]) -> None:
        """Have ``callback`` called from ``accept`` whenever something has come over a connection, until ``unwatch``."""
        self._selector.register(connection.fileno(), selectors.EVENT_READ, callback)

    def unwatch(self, connection: StreamConnection) -> None:
        """Undo ``watch``, before the connection is closed."""
        self._selector.unregister(connection.fileno())

    def close(self) -> None:
        """Let nobody in any more, and drop those not handed on; a forked child only closes its descriptors."""
        self._listener.close()
        self._provings.close()
        self._dialing.close()
        while self._proved:
            self._proved.popleft().close()
        self._selector.close()

    def _greet(self) -> None:
        for _ in range(_GREETED_AT_ONCE):
            sock = self._listener.accept()
            if sock is None:
                return
            deadline = time.monotonic() + DEFAULT_TIMEOUT_S
            visitor = Proving(sock, self.credentials, asks=False, deadline=deadline)
            self._provings.start(visitor, self._proved.append, self._turn_away)

    def _turn_away(self, error: Exception) -> None:
        self._has_turned_away = True
        _logger.debug("a visitor at %s was turned away: %s", self.endpoint, error)


def open_door(
    listener: Listener,
    init_method: str,
    store: Store | None = None,
    *,
    token: str | None = None,
    address: str | None = None,
    tls: TlsFiles | None = None,
    environ: Mapping[str, str] = os.environ,
) -> Door | None:
    """Return the door for the workers of other hosts, None when this worker needs none.

    ====================================  ================================================================
    ``FASTREF_TRANSPORT=shm``             none
    ``FASTREF_TRANSPORT=tcp``             on loopback for ``local://``, and where no token was given and no store is
                                          elsewhere; else as for other hosts
    ``local://``, or the launcher says    none
    that all workers are on this host
    otherwise                             when the program was given a token; none without
    ====================================  ================================================================

    Parameters
    ----------
    listener : Listener
        Where the workers of this host come; its directory holds the token that they share if they were given none.
    init_method, store
        As for ``join``.
    token, address : str, optional
        Instead of what the environment says.
    tls : TlsFiles, optional
        Encrypt; all workers of a job do, or none.
    environ : mapping
        The environment.

    Raises
    ------
    UsageError
        Listening beyond loopback without a token of the program's; a variable or an option that makes no sense.
    ResourceError
        The port cannot be had.
    """
    forced = forced_transport(environ)
    is_local = scheme_of(init_method) == LOCAL and store is None
    nearby = is_local or all_on_this_host(environ)
    if forced == "shm" or (nearby and forced is None):
        return None
    secret = find_token(token, environ)
    if secret is None and forced is None:
        return None
    host = None if is_local else store_host(init_method, store)
    if is_local or (secret is None and (nearby or not host)):
        chosen = LOOPBACK
    else:
        chosen = choose_address(host, address, environ)
    if secret is None:
        if not chosen.is_loopback:
            refuse_without_token(endpoint_text(chosen.text, 0))
        secret = loopback_token(listener.directory)
    credentials = Credentials(secret, job_name(init_method), start_of_all(environ), Tls(tls) if tls else None)
    door = Door(TcpListener(chosen.text), credentials, chosen)
    _logger.info("listening at %s for workers of other hosts: %s", door.endpoint, chosen.why)
    return door
