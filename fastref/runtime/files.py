"""The memory files of arenas: made, told to peers and given back by their owner; mapped and unmapped by its peers."""

from __future__ import annotations

import errno
import functools
import os
import threading
import time

from fastref._core import Holder, failpoint
from fastref.carriers.arena import Arena
from fastref.carriers.borrow import PeerArena
from fastref.errors import FastrefError, PeerError, ProtocolError, ResourceError
from fastref.rendezvous import Link, Message
from fastref.rendezvous.fields import read_integer
from fastref.segments import allocate, cannot_shrink, create_memfd, seal
from fastref.segments.mapping import Reservation
from fastref.segments.memory import check_size

__all__ = ["FIRST_BYTES", "LARGEST_SPAN", "OwnFiles", "PeerFiles"]

FIRST_BYTES = 4 << 20  # of the file that is there from the beginning, for small traffic, and stays
SPAN_FACTOR, SPAN_MORE = 2, 4 << 30  # files of different sizes come and go, none of them full: addresses for many more
LARGEST_SPAN = 1 << 46
IDLE_S = 5.0  # a file of which nothing was lent for so long is given back
PATIENCE_S = 0.5  # for peers to unmap a file, when memory is wanted that the limit does not allow otherwise

# What an owner says about its files, each message with the offset; and what a peer answers to the second.
FILE, DROP, DROPPED = "arena-file", "arena-drop", "arena-dropped"


def reserve(span_bytes: int, *, writable: bool) -> Reservation:
    """Return addresses for an arena, to be mapped shared.

    Raises
    ------
    ResourceError
        There are not so many.
    """
    try:
        return Reservation(span_bytes, writable)
    except OSError as error:
        raise ResourceError(
            f"cannot reserve {span_bytes} bytes of addresses for shared memory: {error.strerror}"
        ) from error


def reserve_private(span_bytes: int) -> Reservation | None:
    """Return addresses for an arena, to be mapped copy-on-write; None when there are not so many."""
    try:
        return Reservation(span_bytes, True, private=True)
    except OSError as error:
        if error.errno not in (errno.ENOMEM, errno.EAGAIN):
            raise
        return None


class OwnFiles:
    """The files of this worker's arena.

    A file is announced to all linked peers before a block in it is lent, over the socket and so without their help:
    their reading threads find the message when they meet such a block. An idle file is given back in steps: the arena
    lends nothing of it any more, all live peers unmap it and say so, it is unmapped and closed here. One at a time:
    what a stopped peer can keep from the system, beyond the limit, is one file.

    Parameters
    ----------
    limit_bytes : int
        How much may be committed; whole pages.
    idle_s : float
        How long a file must have been idle.
    """

    def __init__(self, limit_bytes: int, idle_s: float = IDLE_S) -> None:
        self.limit_bytes = limit_bytes
        self.first_bytes = min(FIRST_BYTES, limit_bytes)
        self.span_bytes = limit_bytes * SPAN_FACTOR + SPAN_MORE
        self.idle_s = idle_s
        if self.span_bytes > LARGEST_SPAN:
            raise ResourceError(f"an arena of {limit_bytes} bytes is larger than any memory")
        self.shared = reserve(self.span_bytes, writable=True)
        self.private = reserve_private(self.span_bytes)
        self._fds: dict[int, tuple[int, int]] = {}
        self._links: dict[int, Link] = {}
        self._told: dict[int, set[int]] = {}  # rank -> the files that it was told of
        self._arena: Arena | None = None
        self._own: PeerArena | None = None
        self._word: memoryview | None = None
        self._case: tuple[int, int, set[int]] | None = None  # the file being given back; who has not unmapped it yet
        self._finishing = threading.RLock()  # as those of Link: a destructor may run at any line
        self.add(0, self.first_bytes)

    # ---- what the arena asks for

    def add(self, offset: int, size_bytes: int) -> None:
        """Make a file, map it, and announce it.

        Raises
        ------
        ResourceError
            No descriptor, mapping or memory is left.
        """
        fd = create_memfd("arena", size_bytes)
        try:
            self._map(fd, offset, size_bytes)
            # Peers can never map it writable; this process's own mapping is older than the seal.
            seal(fd, future_write=True)
            if self._own is not None:
                if self._own.covers(offset, size_bytes):
                    self._own.remove_file(offset)  # a signal handler raised here before
                self._own.add_file(offset, size_bytes)
            if self._arena is not None:
                self._say_unannounced(1)
        except BaseException:
            os.close(fd)
            raise
        self._fds[offset] = (fd, size_bytes)  # from here on it exists, and peers will be told whatever is raised
        failpoint("file.made")
        for rank, link in list(self._links.items()):
            self._tell(rank, link)
        self.count_unannounced()
        failpoint("file.announced")

    def has(self, offset: int) -> bool:
        """Whether there is a file, made to the end."""
        return offset in self._fds

    def _map(self, fd: int, offset: int, size_bytes: int) -> None:
        try:
            self.shared.place(fd, offset, size_bytes)
            if self.private is not None:
                self.private.place(fd, offset, size_bytes)
        except OSError as error:
            self.shared.clear(offset, size_bytes)
            raise ResourceError(f"cannot map {size_bytes} bytes of shared memory: {error.strerror}") from error

    def commit(self, offset: int, size_bytes: int) -> None:
        """Make sure of the memory of a range, which lies in one file."""
        start = max((start for start in list(self._fds) if start <= offset), default=None)
        if start is None:
            raise ResourceError("the arena is closed: its worker has left")
        allocate(self._fds[start][0], offset - start, size_bytes)

    # ---- peers

    @property
    def first(self) -> tuple[int, int]:
        """Descriptor and size of the file that every peer is handed with the link."""
        return self._fds[0]

    def serve(self, arena: Arena, holder: Holder, unannounced: memoryview) -> PeerArena:
        """Be the files of ``arena``; returns what this process reads of itself.

        ``unannounced``: four bytes that peers can read, for how many of them have to be told more.
        """
        self._word = unannounced.cast("I")
        self._own = PeerArena(self.shared, self.private, holder, lambda enough: None)
        self._own.add_file(0, self.first_bytes)
        self._arena = arena
        return self._own

    def introduce(self, rank: int, link: Link) -> None:
        """Tell a peer of all files that exist, and of each new one from here on. It has the first one already."""
        assert self._arena is not None
        link.handlers[DROPPED] = functools.partial(self._dropped, rank)
        with self._arena.growing:
            self._told[rank] = set()
            self._links[rank] = link
            self._tell(rank, link)
            self.count_unannounced()

    def forget(self, rank: int) -> None:
        """Count no more on a peer that has died."""
        self._links.pop(rank, None)
        self._told.pop(rank, None)
        case = self._case
        if case is not None:
            case[2].discard(rank)
        self.count_unannounced()

    def knows_all(self, rank: int, wait: bool = True) -> bool:
        """Whether a peer has been sent all that there is to know; tries to, and may ``wait`` while the arena grows."""
        link = self._links.get(rank)
        if link is None:
            return True
        if self._untold(rank):
            assert self._arena is not None
            if not self._arena.growing.acquire(blocking=wait):
                return False
            try:
                self._tell(rank, link)
            finally:
                self._arena.growing.release()
        return link.flush_posts()

    def _untold(self, rank: int) -> list[int]:
        """Return the files, but the first one and one that is being given back, that a peer has not been told of."""
        told, leaving = self._told.get(rank, self._fds), self._case[0] if self._case else 0
        return [offset for offset in sorted(self._fds) if offset not in told and offset not in (0, leaving)]

    def _tell(self, rank: int, link: Link) -> None:
        """Tell a peer of files. A signal handler may raise here at any time: then it is told twice of one."""
        for offset in self._untold(rank):
            self._post(link, FILE, offset, {"file": self._fds[offset]})
            told = self._told.get(rank)
            if told is not None:  # it has not died
                told.add(offset)

    def _post(self, link: Link, kind: str, offset: int, descriptors: dict[str, tuple[int, int]] | None = None) -> None:
        try:
            link.post_message(kind, {"offset": offset}, descriptors)
        except PeerError:
            pass  # its end will be noticed by who watches it

    def count_unannounced(self) -> None:
        """Note how many peers have to be told more when they have read what they were told before."""
        if self._arena is not None:
            links = list(self._links.items())
            self._say_unannounced(sum(link.is_behind or bool(self._untold(rank)) for rank, link in links))

    def _say_unannounced(self, count: int) -> None:
        assert self._arena is not None and self._word is not None
        self._arena.unannounced = self._word[0] = count

    # ---- giving back

    def tick(self, now_s: float) -> None:
        """Send what peers had no room for, and give back what is idle; on one thread."""
        assert self._arena is not None
        if self._arena.unannounced:
            for rank in list(self._links):
                try:
                    self.knows_all(rank, wait=False)  # this thread sees who dies
                except PeerError:
                    pass  # as above
            self.count_unannounced()
        if self._case is not None and not self._case[2]:
            self._finish(self._case)
        # Under the lock, so that a newcomer is told of a file and asked for it, or neither; never waiting for it, since
        # this thread sees who dies.
        if self._case is None and self._arena.growing.acquire(blocking=False):
            try:
                self._retire(now_s, self.idle_s)
            finally:
                self._arena.growing.release()

    def make_room(self) -> bool:
        """Begin to give back a file that is idle now; for a thread that makes no other.

        Returns
        -------
        bool
            False when there is none, or another is on its way and some peer does not say that it has unmapped it.
        """
        case = self._case
        if case is not None:
            self._hasten(case[2])
            if case[2]:
                return False
            self._finish(case)
        return self._case is None and self._retire(time.monotonic(), 0.0)

    def _hasten(self, waiting: set[int]) -> None:
        """Read what the peers say that have been asked to unmap a file, for a while."""
        deadline = time.monotonic() + PATIENCE_S
        for rank in sorted(waiting):
            link = self._links.get(rank)
            if link is not None:
                link.read_ahead(lambda rank=rank: rank not in waiting or time.monotonic() > deadline)  # type: ignore[misc]

    def _retire(self, now_s: float, idle_s: float) -> bool:
        assert self._arena is not None
        found = self._arena.retire(int(now_s * 1e9), int(idle_s * 1e9))
        if found is None:
            return False
        offset = found[0]
        waiting = {rank for rank, told in list(self._told.items()) if offset in told}
        self._case = (*found, waiting)
        failpoint("file.retired")
        for rank in sorted(waiting):
            link = self._links.get(rank)
            if link is None:  # it has died meanwhile
                waiting.discard(rank)
            else:
                self._post(link, DROP, offset)
        self.count_unannounced()
        failpoint("file.asked_back")
        return True

    def _dropped(self, rank: int, message: Message) -> None:
        offset = read_integer(message.body, "offset")
        case = self._case
        if case is None or case[0] != offset or rank not in case[2]:
            raise ProtocolError(f"it has unmapped the file at {offset}, which it was not asked for")
        case[2].discard(rank)

    def _finish(self, case: tuple[int, int, set[int]]) -> None:
        assert self._arena is not None and self._own is not None
        offset, size_bytes, _ = case
        with self._finishing:
            if self._case is not case:
                return  # another thread has done it
            self._own.remove_file(offset)
            self.shared.clear(offset, size_bytes)
            if self.private is not None:
                self.private.clear(offset, size_bytes)
            for told in list(self._told.values()):
                told.discard(offset)
            os.close(self._fds.pop(offset)[0])
            self._arena.forget(offset)  # from here on another may be made there
            self._case = None
        failpoint("file.given_back")

    def close(self) -> None:
        """Close the descriptors; what is mapped stays until its last user is gone. Idempotent."""
        if self._arena is not None:
            self._arena.end()
        self._arena = self._own = None  # they know this
        self._links.clear()
        while self._fds:
            os.close(self._fds.popitem()[1][0])


class PeerFiles:
    """The files of a peer's arena, mapped read-only and, if the system lets us, copy-on-write.

    Parameters
    ----------
    span_bytes : int
        As the peer says; whole pages.
    link : Link
        To the peer. What it says of its files is acted upon as it is read, whichever thread reads.
    """

    def __init__(self, span_bytes: int, link: Link) -> None:
        self.shared = reserve(span_bytes, writable=False)
        self.private = reserve_private(span_bytes)
        self._link = link
        self._inodes: dict[int, int] = {}  # where a file begins -> which one it is
        self._arena: PeerArena | None = None

    def open(self, holder: Holder) -> PeerArena:
        """Map the first file, which came with the link, and return the arena.

        Raises
        ------
        ProtocolError
            It is no file that keeps its size.
        """
        self._arena = PeerArena(self.shared, self.private, holder, self._link.read_ahead)
        self._place(0, *self._link.take("arena"))
        self._link.handlers |= {FILE: self._add, DROP: self._drop}
        return self._arena

    def _add(self, message: Message) -> None:
        descriptors = dict(message.descriptors)
        try:
            if set(descriptors) != {"file"}:
                raise ProtocolError(f"a file of an arena came as {sorted(descriptors)}")
            self._place(read_integer(message.body, "offset"), *descriptors.pop("file"))
        finally:
            for fd, _ in descriptors.values():
                os.close(fd)

    def _place(self, offset: int, fd: int, size_bytes: int) -> None:
        """Map a file; closes the descriptor."""
        assert self._arena is not None
        try:
            if offset % 4096 or size_bytes % 4096 or not size_bytes:
                raise ProtocolError(f"{size_bytes} bytes at {offset} are no whole pages")
            if not cannot_shrink(fd):
                raise ProtocolError("it is no memory file that keeps its size")
            check_size(fd, size_bytes)
            inode = os.fstat(fd).st_ino
            if offset and self._inodes.get(offset) == inode:
                return  # told twice, see OwnFiles._tell
            self._inodes[offset] = inode
            self.shared.place(fd, offset, size_bytes)
            if self.private is not None:
                self.private.place(fd, offset, size_bytes)
            self._arena.add_file(offset, size_bytes)  # now others may look there
            failpoint("file.mapped")
        except (ProtocolError, OSError, ValueError) as error:
            raise ProtocolError(f"the segment 'arena' of worker {self._link.record} is damaged: {error}") from error
        finally:
            os.close(fd)

    def _drop(self, message: Message) -> None:
        assert self._arena is not None
        message.close()
        offset = read_integer(message.body, "offset")
        self._inodes.pop(offset, None)
        size_bytes = self._arena.remove_file(offset)
        self.shared.clear(offset, size_bytes)
        if self.private is not None:
            self.private.clear(offset, size_bytes)
        failpoint("file.unmapped")
        try:
            self._link.post_message(DROPPED, {"offset": offset})
        except PeerError:
            pass  # it has died, and needs no answer
        except FastrefError as error:
            raise ProtocolError(f"worker {self._link.record} does not read its messages: {error}") from error
