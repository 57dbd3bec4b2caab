"""Where the workers of a job look for their coordinator: the job directory, or a c10d store."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from fastref.errors import RendezvousError, UsageError
from fastref.rendezvous.fields import parse_object, read_integer, read_object, read_text
from fastref.rendezvous.launchers import start_of_all
from fastref.rendezvous.methods import LOCAL, open_store, scheme_of
from fastref.rendezvous.records import WorkerRecord

if TYPE_CHECKING:
    from torch.distributed.distributed_c10d import Store

__all__ = ["Announcement", "LocalMeeting", "Meeting", "StoreMeeting", "open_meeting"]


@dataclass(frozen=True)
class Announcement:
    """What a coordinator says of itself; it may have died since.

    Parameters
    ----------
    record : WorkerRecord
        The coordinator.
    is_open : bool
        Whether seats are left; False as soon as its job runs.
    """

    record: WorkerRecord
    is_open: bool

    def to_json(self) -> bytes:
        """Return the announcement as JSON text."""
        fields: dict[str, Any] = {"record": self.record.to_fields(), "open": int(self.is_open)}
        return json.dumps(fields, separators=(",", ":")).encode()

    @classmethod
    def from_json(cls, data: bytes) -> Announcement:
        """Return the announcement in a JSON text.

        Raises
        ------
        ProtocolError
            Names the first field that is wrong.
        """
        fields = parse_object(data)
        record = WorkerRecord.from_fields(read_object(fields, "record"))
        return cls(record, bool(read_integer(fields, "open", most=1)))


class Meeting(Protocol):
    """What both places can do."""

    def announce(self, record: WorkerRecord, instead_of: WorkerRecord | None = None) -> None:
        """Make ``record`` known as coordinator, in place of one that is known to be dead if need be."""

    def close_door(self, record: WorkerRecord) -> None:
        """Say that the job of this coordinator has all its workers."""

    def withdraw(self, record: WorkerRecord) -> None:
        """Take the announcement back; idempotent."""

    def look(self) -> list[Announcement]:
        """Return who claims to be coordinator now."""

    def complain(self, coordinator: WorkerRecord, sentence: str, rank: int) -> None:
        """Leave a sentence of the worker of a rank for a coordinator that cannot be reached in any other way."""

    def complaint(self, coordinator: WorkerRecord) -> tuple[str, int] | None:
        """Return the sentence that was left for a coordinator, and by which rank, None when there is none."""


class LocalMeeting:
    """Files in the job directory: ``<instance>.coordinator``, one for each process that claims to be rank 0.

    A file for each and not one for all: so nobody overwrites, or removes with a dead one's file, that of
    another, and two living coordinators see each other.
    """

    def __init__(self, directory: Path) -> None:
        self._directory = directory

    def announce(self, record: WorkerRecord, instead_of: WorkerRecord | None = None) -> None:
        """As ``Meeting``; files of the dead are in nobody's way, the next sweep removes them."""
        self._write(Announcement(record, is_open=True))

    def close_door(self, record: WorkerRecord) -> None:
        """As ``Meeting``."""
        self._write(Announcement(record, is_open=False))

    def withdraw(self, record: WorkerRecord) -> None:
        """As ``Meeting``."""
        self._path(record).unlink(missing_ok=True)

    def look(self) -> list[Announcement]:
        """As ``Meeting``."""
        found = []
        for name in sorted(os.listdir(self._directory)):
            if name.endswith(".coordinator"):
                try:
                    data = (self._directory / name).read_bytes()
                except FileNotFoundError:
                    continue  # withdrawn since
                found.append(Announcement.from_json(data))
        return found

    def complain(self, coordinator: WorkerRecord, sentence: str, rank: int) -> None:
        """Do nothing: here every coordinator can be reached at its socket."""

    def complaint(self, coordinator: WorkerRecord) -> tuple[str, int] | None:
        """As ``Meeting``."""
        return None

    def _write(self, announcement: Announcement) -> None:
        path = self._path(announcement.record)
        unfinished = path.with_name(path.name + ".new")
        unfinished.write_bytes(announcement.to_json())
        unfinished.rename(path)

    def _path(self, record: WorkerRecord) -> Path:
        return self._directory / f"{record.instance}.coordinator"


class StoreMeeting:
    """Keys in a c10d store that all workers can reach.

    Parameters
    ----------
    store : torch.distributed.Store
        Already prefixed for this start of the job.
    """

    _COORDINATOR = "coordinator"
    _COMPLAINT = "complaint-"

    def __init__(self, store: Store) -> None:
        self._store = store

    def announce(self, record: WorkerRecord, instead_of: WorkerRecord | None = None) -> None:
        """As ``Meeting``; a store that outlived its job may hold the announcement of a dead one."""
        expected = b"" if instead_of is None else Announcement(instead_of, is_open=True).to_json()
        self._swap(expected, Announcement(record, is_open=True))
        if instead_of is not None:
            self._swap(Announcement(instead_of, is_open=False).to_json(), Announcement(record, is_open=True))

    def close_door(self, record: WorkerRecord) -> None:
        """As ``Meeting``."""
        self._swap(Announcement(record, is_open=True).to_json(), Announcement(record, is_open=False))

    def withdraw(self, record: WorkerRecord) -> None:
        """Do nothing: the next coordinator finds out that this one is dead, and the store may be gone by now."""

    def look(self) -> list[Announcement]:
        """As ``Meeting``."""
        data = self._get(self._COORDINATOR)
        return [] if data is None else [Announcement.from_json(data)]

    def complain(self, coordinator: WorkerRecord, sentence: str, rank: int) -> None:
        """As ``Meeting``; the store may serve a later start of the job, which this does not concern."""
        try:
            self._store.set(self._COMPLAINT + coordinator.instance, json.dumps({"sentence": sentence, "rank": rank}))
        except RuntimeError as error:
            raise _store_failed(error) from error

    def complaint(self, coordinator: WorkerRecord) -> tuple[str, int] | None:
        """As ``Meeting``."""
        data = self._get(self._COMPLAINT + coordinator.instance)
        if data is None:
            return None
        fields = parse_object(data)
        return read_text(fields, "sentence"), read_integer(fields, "rank", least=-1)

    def _get(self, key: str) -> bytes | None:
        try:
            # Asking first, since getting a key that is not there waits, and not even Ctrl-C ends that.
            return self._store.get(key) if self._store.check([key]) else None
        except RuntimeError as error:
            raise _store_failed(error) from error

    def _swap(self, expected: bytes, announcement: Announcement) -> None:
        try:
            self._store.compare_set(self._COORDINATOR, expected.decode(), announcement.to_json().decode())
        except RuntimeError as error:
            raise _store_failed(error) from error


def open_meeting(
    directory: Path, init_method: str, rank: int, world_size: int, timeout_s: float, store: Store | None, count: int
) -> tuple[Meeting, Store | None]:
    """Return where the workers of a job meet, and the c10d store behind it if there is one.

    Parameters
    ----------
    directory : Path
        The job directory, where ``local://`` jobs meet.
    init_method, rank, world_size, store, count
        As ``join``; rank 0 may come to host the store. A store that outlives a restart of all workers has other keys
        for those who come after it, where all know the number of their start.
    timeout_s : float
        How long the store may take to be there, in seconds; may be infinite.

    Raises
    ------
    RendezvousError, UsageError, ValueError
        As ``open_store``; the rank is missing.
    """
    if scheme_of(init_method) == LOCAL and store is None:
        return LocalMeeting(directory), None
    if store is None:
        store = open_store(init_method, rank, world_size, timeout_s)
    if rank < 0:
        raise UsageError("a job over a store of one's own needs a rank of 0 or more")
    return StoreMeeting(_prefixed(store, count)), store


def _prefixed(store: Store, count: int) -> Store:
    from torch.distributed.distributed_c10d import PrefixStore

    epoch = start_of_all()
    return PrefixStore(f"rpc_prefix_{count}_restart_{epoch}" if epoch else f"rpc_prefix_{count}", store)


def _store_failed(error: RuntimeError) -> RendezvousError:
    return RendezvousError(f"the c10d store that the workers meet at failed: {error}")
