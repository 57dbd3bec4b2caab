"""Other processes that claim to be rank 0: dead ones are buried, a living one means that a job cannot start."""

from __future__ import annotations

import functools
import selectors
import time
from collections.abc import Callable, Iterator

from fastref.rendezvous import sentences
from fastref.rendezvous.connection import Connection, connect
from fastref.rendezvous.door import Door
from fastref.rendezvous.hellos import CLOSED, join_hello, refusal_of
from fastref.rendezvous.meeting import Meeting
from fastref.rendezvous.proving import Provings, dial
from fastref.rendezvous.records import WorkerRecord

__all__ = ["RIVAL_GRACE_S", "Rivals"]

# How long another coordinator of a full job is given to end before it counts as a second job of that name.
RIVAL_GRACE_S = 2.0
_RETRY_S = 0.05
# A rival on a host that nothing comes back from is buried before its time is over.
_MARGIN_S = 0.5


class Rivals:
    """The other coordinators that are announced, until it is known what became of each.

    Parameters
    ----------
    record : WorkerRecord
        The coordinator that asks.
    job : str
    meeting : Meeting
        Where they are announced.
    selector : BaseSelector
        Of the coordinator's loop; it holds callables.
    provings : Provings
        In that loop.
    door : Door or None
        With whose credentials those of other hosts are asked.
    fail : callable
        ``fail(sentence)``: a rival lives.
    """

    def __init__(
        self,
        record: WorkerRecord,
        job: str,
        meeting: Meeting,
        selector: selectors.BaseSelector,
        provings: Provings,
        door: Door | None,
        fail: Callable[[str], None],
    ) -> None:
        self._record = record
        self._job = job
        self._meeting = meeting
        self._selector = selector
        self._provings = provings
        self._door = door
        self._fail = fail
        self._waiting: dict[str, WorkerRecord] = {}
        self._calls: dict[str, Connection | None] = {}  # None: it is being reached over TCP
        self._buried: set[str] = set()
        self._retry = self._deadline = 0.0

    def __iter__(self) -> Iterator[WorkerRecord]:
        return iter(self._waiting.values())

    def __bool__(self) -> bool:
        return bool(self._waiting)

    def begin(self) -> None:
        """Find and ask them."""
        self._find()
        self._deadline = time.monotonic() + RIVAL_GRACE_S
        self._call(time.monotonic())

    @property
    def patience_s(self) -> float:
        """How long the loop may wait until ``call_again``, in seconds."""
        return _RETRY_S if self._waiting else float("inf")

    def is_over(self, now: float) -> bool:
        """Return whether one is left that had time to end."""
        return bool(self._waiting) and now >= self._deadline

    def call_again(self, now: float) -> bool:
        """Ask those who are left again, if it is time to; whether it was."""
        if not self._waiting or now < self._retry:
            return False
        self._call(now)
        return True

    def close(self) -> None:
        """Hang up; the loop's selector is about to be closed."""
        for call in self._calls.values():
            if call is not None:
                call.close()

    def _find(self) -> None:
        for announcement in self._meeting.look():
            rival = announcement.record
            if rival.instance == self._record.instance or rival.instance in self._buried:
                continue
            self._waiting[rival.instance] = rival
            if rival.is_outlived_by(self._record):  # whether it lives does not matter
                self._bury(rival)

    def _call(self, now: float) -> None:
        self._retry = now + _RETRY_S
        for rival in list(self._waiting.values()):
            if rival.instance not in self._calls:
                try:
                    self._reach(rival)
                except (ConnectionError, PermissionError):
                    self._bury(rival)

    def _reach(self, rival: WorkerRecord) -> None:
        if rival.host == self._record.host or self._door is None or not rival.endpoint:
            self._ask(rival, connect(rival.address))
            return
        self._calls[rival.instance] = None
        try:
            proving = dial(rival.endpoint, self._door.credentials, self._deadline - _MARGIN_S)
        except ConnectionError:
            del self._calls[rival.instance]
            raise
        self._provings.start(proving, functools.partial(self._ask, rival), functools.partial(self._miss, rival))

    def _ask(self, rival: WorkerRecord, call: Connection) -> None:
        self._calls[rival.instance] = call
        try:
            call.send_message("join-hello", join_hello(self._record, self._job))
        except ConnectionError:
            pass  # it ended this moment, which reading its answer shows
        self._selector.register(call.fileno(), selectors.EVENT_READ, functools.partial(self._read, rival, call))

    def _miss(self, rival: WorkerRecord, error: Exception) -> None:
        del self._calls[rival.instance]
        if not isinstance(error, TimeoutError):  # nobody listens there any more, or somebody else does
            self._bury(rival)

    def _read(self, rival: WorkerRecord, call: Connection) -> None:
        try:
            message = call.receive_message()
        except BlockingIOError:
            return  # not all of it has come
        except BaseException:
            self._hang_up(rival, call)
            raise
        self._hang_up(rival, call)
        if message is None:
            return  # it ended or left: the next call finds out
        message.close()
        duplicate = sentences.duplicate(self._job, self._record, rival)
        sentence = refusal_of(message) if message.kind == "refused" else duplicate
        # Closed: its job is full. It may be about to end, and this is the next job of that name.
        if sentence != CLOSED:
            self._fail(sentence)

    def _hang_up(self, rival: WorkerRecord, call: Connection) -> None:
        del self._calls[rival.instance]
        self._selector.unregister(call.fileno())
        call.close()

    def _bury(self, rival: WorkerRecord) -> None:
        del self._waiting[rival.instance]
        self._buried.add(rival.instance)
        self._meeting.announce(self._record, instead_of=rival)
        # A store has one place, and a third process may have taken it first.
        self._find()
