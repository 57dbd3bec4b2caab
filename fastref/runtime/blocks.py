"""Blocks of memory that several workers write, on their way from one to another."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable

from fastref.errors import PeerError, ProtocolError
from fastref.rendezvous import Link, Message
from fastref.rendezvous.fields import read_integer
from fastref.segments.shared import SharedBlock, adopt_shared_block, shared_blocks

__all__ = ["BlockExchange"]

# What is said on a link: here is a block, for one message that follows; that message will not come.
BLOCK, WITHDRAWN = "shared-block", "shared-block-withdrawn"
PATIENCE_S = 5.0  # a block is sent before the message that names it, but may wait until its receiver has read others


class BlockExchange:
    """Hand blocks to peers ahead of the messages that name them, and have those that came ready for who reads these.

    The descriptor of a block goes over the socket of a link, with each message: it costs a few system calls, and who
    gets it need not be asked whether it has it already. A block is kept here until the message is read for which it
    came.
    """

    def __init__(self) -> None:
        self._lock = threading.RLock()  # a destructor of the program may run at any line, and hand over another
        # Number -> the block, and for how many messages it has come;
        self._come: dict[int, tuple[SharedBlock, int]] = {}
        # and how many messages were read before it came for them, by who had it already.
        self._owed: dict[int, int] = {}
        self._links: dict[int, Link] = {}
        self._unsent: list[tuple[Link, SharedBlock]] = []  # the descriptor must stay open until then

    def introduce(self, rank: int, link: Link) -> None:
        """Exchange blocks with a peer from here on."""
        link.handlers |= {BLOCK: self._arrived, WITHDRAWN: self._withdrawn}
        self._links[rank] = link

    def forget(self, rank: int) -> None:
        """Expect nothing more of a peer that has gone."""
        self._links.pop(rank, None)
        with self._lock:
            self._owed.clear()  # it may have been the one; who is not will be kept for nobody until we leave

    def hand(self, rank: int | None, block: SharedBlock) -> bool:
        """Send a block ahead of a message; None: to ourselves. False when it waits until the peer has read others.

        Raises
        ------
        PeerError
            The peer is gone.
        """
        if rank is None:
            self._keep(block)
            return True
        link = self._links.get(rank)
        if link is None:
            return True  # the message will find out why
        with self._lock:
            self._unsent = [(to, what) for to, what in self._unsent if to.is_behind]
        if link.post_message(BLOCK, {"number": block.number}, {"block": (block.fd, block.size_bytes)}):
            return True
        with self._lock:
            self._unsent.append((link, block))
        return False

    def take_back(self, rank: int | None, block: SharedBlock) -> None:
        """The message for which a block was handed over cannot be sent."""
        if rank is None:
            self._let_go(block.number)
            return
        link = self._links.get(rank)
        if link is not None:
            try:
                link.post_message(WITHDRAWN, {"number": block.number})
            except PeerError:
                pass  # it is gone, and with it what it had

    def claim(self, number: int) -> SharedBlock:
        """Return the block that a message names.

        Raises
        ------
        ProtocolError
            No peer has sent it.
        """
        deadline = time.monotonic() + PATIENCE_S
        while (block := self._let_go(number)) is None:
            for link in list(self._links.values()):
                link.read_ahead(_one_look())
            if number in self._come:
                continue
            # It waits in its sender's hands until we have read others.
            with self._lock:
                block = shared_blocks.get(number)
                if block is not None:
                    self._owed[number] = self._owed.get(number, 0) + 1
                    return block
            if time.monotonic() > deadline:
                raise ProtocolError(f"a message names the shared block {number:#x}, which nobody has sent")
            time.sleep(0.001)
        return block

    def close(self) -> None:
        """Let go of what came for messages that nobody will read."""
        with self._lock:
            come, self._come, self._unsent = self._come, {}, []
            self._links.clear()
        come.clear()

    def _arrived(self, message: Message) -> None:
        descriptors = dict(message.descriptors)
        try:
            if set(descriptors) != {"block"}:
                raise ProtocolError(f"a shared block came as {sorted(descriptors)}")
            number = read_integer(message.body, "number")
            self._keep(adopt_shared_block(*descriptors.pop("block"), number))
        finally:
            for fd, _ in descriptors.values():
                os.close(fd)

    def _withdrawn(self, message: Message) -> None:
        message.close()
        self._let_go(read_integer(message.body, "number"))

    def _keep(self, block: SharedBlock) -> None:
        number = block.number
        with self._lock:
            owed = self._owed.pop(number, 0)
            if owed:
                if owed > 1:
                    self._owed[number] = owed - 1
                return
            _, count = self._come.get(number, (block, 0))
            self._come[number] = (block, count + 1)

    def _let_go(self, number: int) -> SharedBlock | None:
        with self._lock:
            block, count = self._come.pop(number, (None, 0))
            if block is not None and count > 1:
                self._come[number] = (block, count - 1)
        return block


def _one_look() -> Callable[[], bool]:
    """Return what has enough when everything was read that was there."""
    looks = iter((False,))
    return lambda: next(looks, True)
