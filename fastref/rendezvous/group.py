"""Joining a group whose size is open: newcomers take turns, and each asks and links everybody who is there."""

from __future__ import annotations

import contextlib
import fcntl
import os
import secrets
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastref._core import failpoint
from fastref.errors import ProtocolError, RendezvousError, UsageError, WorkerDied
from fastref.rendezvous import sentences
from fastref.rendezvous.connection import Connection, Message, connect
from fastref.rendezvous.fields import read_list, read_object
from fastref.rendezvous.hellos import CLOSED, GROUP_ASK, LEAVING, MAGIC, Segments, check_same_build, refusal_of
from fastref.rendezvous.links import Link
from fastref.rendezvous.listening import MEMBER_SUFFIX, STATIC_SUFFIX, Listener
from fastref.rendezvous.methods import job_name
from fastref.rendezvous.records import WorkerRecord

if TYPE_CHECKING:
    from torch.distributed.distributed_c10d import Store

__all__ = [
    "answer_ask",
    "ask_members",
    "check_no_group",
    "check_no_job",
    "check_rank",
    "group_name",
    "link_members",
    "read_ask",
    "register",
    "take_turn",
    "unregister",
]

GROUP_ADMIT = "group-admit"
JOINED_SUFFIX = "joined"

MIXED = "RPC group mixes statically and dynamically initialized members which is not supported. "
_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 0.0005, 0.01
_END_GRACE_S = 3.0
_KEY = "fastref_group"


def group_name(init_method: str, store: Store | None) -> str:
    """Return a name for the group that is the same for all of its workers.

    Those who are given a store find each other through it; else the init method is the name, and no store is needed.
    """
    if store is None:
        return job_name(init_method)
    token = store.compare_set(_KEY, "", secrets.token_hex(16)).decode()
    return f"store://{token}"


@contextlib.contextmanager
def take_turn(listener: Listener, deadline: float) -> Iterator[None]:
    """Be the only newcomer of the group within the block.

    The lock is one on the directory itself: nothing is left of it when its holder dies.

    Raises
    ------
    RendezvousError
        Others have been joining until the deadline.
    """
    fd = os.open(listener.directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        pause_s = _FIRST_PAUSE_S
        while True:
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > deadline:
                    raise RendezvousError("another worker has been joining the group for all the time") from None
                time.sleep(pause_s)
                pause_s = min(pause_s * 2, _LONGEST_PAUSE_S)
        failpoint("group.turn_taken")
        try:
            yield
        finally:
            fcntl.flock(fd, fcntl.LOCK_UN)  # a child that was forked meanwhile has the descriptor too
    finally:
        os.close(fd)


def check_no_job(listener: Listener, has_left_one: bool) -> None:
    """Raise ``RendezvousError`` when workers of a job of fixed size use the same init method.

    Parameters
    ----------
    listener : Listener
        Where this worker is reached.
    has_left_one : bool
        This process was in a job before: whoever is there may be about to leave it too, and gets some seconds.
    """
    _check_nobody(listener, STATIC_SUFFIX, has_left_one)


def check_no_group(listener: Listener, has_left_one: bool) -> None:
    """As ``check_no_job``, for workers of a group of open size."""
    _check_nobody(listener, MEMBER_SUFFIX, has_left_one)


def _check_nobody(listener: Listener, suffix: str, has_left_one: bool) -> None:
    deadline = time.monotonic() + (_END_GRACE_S if has_left_one else 0.0)
    while any(_is_there(path) for path in listener.directory.glob(f"*.{suffix}")):
        if time.monotonic() > deadline:
            raise RendezvousError(MIXED)
        time.sleep(_LONGEST_PAUSE_S)


def _is_there(path: Path) -> bool:
    try:
        connect(str(path)).close()
    except ConnectionError:
        return False
    return True


def register(listener: Listener, record: WorkerRecord) -> None:
    """Let newcomers know of this worker from now on."""
    path = _joined(listener)
    unfinished = path.with_name(path.name + ".new")
    unfinished.write_bytes(record.to_json())
    unfinished.rename(path)


def unregister(listener: Listener) -> None:
    """Let newcomers not ask this worker any more; idempotent."""
    _joined(listener).unlink(missing_ok=True)


def ask_members(record: WorkerRecord, listener: Listener, deadline: float) -> tuple[list[WorkerRecord], dict[int, int]]:
    """Ask everybody who is there whether this worker may come.

    A member answers when nothing is left of a worker that had the rank before. To be called in one's turn.

    Parameters
    ----------
    record : WorkerRecord
        The newcomer; which incarnation it is, is not known yet.
    listener : Listener
        Where it is reached, in the directory of the group.
    deadline : float
        On the clock of ``time.monotonic``.

    Returns
    -------
    members : list of WorkerRecord
    used : dict
        Rank -> how many workers have had it.

    Raises
    ------
    RendezvousError
        Name or rank are not unique, or somebody does not answer.
    """
    asked: list[tuple[WorkerRecord, Connection]] = []
    members: list[WorkerRecord] = []
    used: dict[int, int] = {}
    try:
        for member in _registered(listener):
            try:
                connection = connect(member.address)
            except ConnectionError:
                continue  # it has died, or left
            asked.append((member, connection))
            with contextlib.suppress(ConnectionError):
                connection.send_message(GROUP_ASK, _ask_fields(record))
        failpoint("group.asked")
        for member, connection in asked:
            message = _answer(connection, member, deadline)
            if message is None:
                continue
            members.append(member)
            for rank, count in _read_used(message):
                used[rank] = max(used.get(rank, 0), count)
    finally:
        for _, connection in asked:
            connection.close()
    return members, used


def link_members(
    record: WorkerRecord,
    members: Sequence[WorkerRecord],
    segments_for: Callable[[WorkerRecord], Segments],
    deadline: float,
) -> dict[int, Link]:
    """Make a link to every member that is still there, after ``ask_members``.

    Parameters
    ----------
    record : WorkerRecord
        The newcomer.
    members : sequence of WorkerRecord
    segments_for : callable
        As for ``link_all``.
    deadline : float
        On the clock of ``time.monotonic``.

    Returns
    -------
    dict
        Rank -> link. The caller closes them.

    Raises
    ------
    RendezvousError
        A member refuses, or does not answer.
    """
    links: dict[int, Link] = {}
    try:
        for member in members:
            try:
                link = Link(connect(member.address), member)
            except ConnectionError:
                continue
            links[member.rank] = link
            try:
                link.send_hello(record, segments_for(member))
            except WorkerDied:
                links.pop(member.rank).close()
            failpoint("group.half_linked")
        for member in members:
            if member.rank in links:
                message = _answer(links[member.rank], member, deadline)
                if message is None:
                    links.pop(member.rank).close()
                    continue
                try:
                    links[member.rank].read_welcome(message, record)
                except BaseException:
                    message.close()
                    raise
        return links
    except BaseException:
        for link in links.values():
            link.close()
        raise


def read_ask(visitor: Connection, message: Message, mine: WorkerRecord) -> WorkerRecord:
    """Return the record of a visitor that wants to join.

    Raises
    ------
    RendezvousError
        It has another version, or is strict and this worker is not, or the other way round.
    ProtocolError
        It is not who it says.
    """
    check_same_build(message.body, mine)
    record = WorkerRecord.from_fields(read_object(message.body, "record"))
    if record.pid != visitor.pid:
        raise ProtocolError(f"field 'pid' says {record.pid}, the process at the other end is {visitor.pid}")
    if record.strict != mine.strict:
        raise RendezvousError(sentences.strictness_differs(record, mine))
    return record


def answer_ask(visitor: Connection, used: dict[int, int]) -> None:
    """Tell a visitor that it may link, and hang up. One that is gone already need not be told."""
    with contextlib.suppress(ConnectionError, TimeoutError):
        visitor.send_message(GROUP_ADMIT, {"used": [[rank, count] for rank, count in sorted(used.items())]})
    visitor.close()


def _answer(connection: Connection, member: WorkerRecord, deadline: float) -> Message | None:
    """Wait for what a member says; None when it has died, left or leaves."""
    try:
        message = connection.wait_message(deadline)
    except ConnectionError:
        return None
    except TimeoutError:
        raise RendezvousError(f"worker {member}, a member of the group, does not answer a newcomer") from None
    if message is None:
        return None
    if message.kind == LEAVING:  # it had linked us already, and left before it said so
        message.close()
        return None
    if message.kind == "refused":
        sentence = refusal_of(message)
        if sentence == CLOSED:
            return None
        raise RendezvousError(f"worker {member} does not let this worker join: {sentence}")
    return message


def _read_used(message: Message) -> Iterator[tuple[int, int]]:
    message.close()
    if message.kind != GROUP_ADMIT:
        raise ProtocolError(f"a member answered a newcomer with {message.kind!r}")
    for item in read_list(message.body, "used", most=1 << 16):
        if not isinstance(item, list) or len(item) != 2 or not all(isinstance(n, int) and n >= 0 for n in item):
            raise ProtocolError("field 'used' must be a list of [rank, count]")
        yield item[0], item[1]


def _ask_fields(record: WorkerRecord) -> dict[str, Any]:
    return {"magic": MAGIC, "version": record.version, "layout": record.layout, "record": record.to_fields()}


def _registered(listener: Listener) -> list[WorkerRecord]:
    found = []
    for path in sorted(listener.directory.glob(f"*.{JOINED_SUFFIX}")):
        try:
            record = WorkerRecord.from_json(path.read_bytes())
        except FileNotFoundError:
            continue  # it has left since
        if record.instance != listener.instance:
            found.append(record)
    return found


def _joined(listener: Listener) -> Path:
    return listener.directory / f"{listener.instance}.{JOINED_SUFFIX}"


def check_rank(rank: int, most: int) -> None:
    """Raise ``UsageError`` when a group cannot have a worker of that rank."""
    if not 0 <= rank < most:
        raise UsageError(f"the ranks of a group of open size go from 0 to {most - 1}, got {rank}")
