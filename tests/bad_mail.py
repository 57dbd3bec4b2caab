"""A network on which what holders without a bit tell each other is late, comes in any order, and comes again.

Calls and what rides with them go through the channels as ever. Requests for forks, answers, confirmations and deletes
go by a post that keeps each until the test lets it arrive: what was lost on the way and sent again looks no different.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

from fastref.codec.stream import encode
from fastref.runtime.peer import Peer
from fastref.testing import Network, Node
from fastref.wire import Kind

__all__ = ["BadMailNetwork"]

POSTED = {Kind.RREF_FORK_REQUEST, Kind.RREF_FORK_ACCEPT, Kind.RREF_CHILD_ACCEPT, Kind.RREF_USER_DELETE}


class Letter(NamedTuple):
    source: int
    target: int
    kind: Kind
    value: Any
    call: int
    is_copy: bool = False


class BadMailNetwork(Network):
    """As ``Network``, with a post beside its channels."""

    def __init__(
        self, count: int, bits: int = 61, capacity: int = 256, room: int = 1024, window: int = 32,
        hosts: Sequence[str] | None = None,
    ) -> None:  # fmt: skip
        super().__init__(count, bits, capacity, room, window, hosts)
        self.mail: list[Letter] = []
        self.settled = 0
        for node in self:
            node.tell = functools.partial(self._post, node, node.tell)  # type: ignore[method-assign]

    def deliver_mail(self, choice: int, again: bool) -> None:
        """Let one letter arrive; ``again``: a copy of it stays, and comes at another time."""
        if not self.mail:
            return
        letter = self.mail.pop(choice % len(self.mail))
        if again and not letter.is_copy:
            self.mail.append(letter._replace(is_copy=True))
        self._arrive(letter)

    def settle(self) -> None:
        """Deliver everything, every third letter twice and in an order of their own, until nothing is left to do."""
        super().settle()
        while self.mail:
            self.settled += 1
            self.deliver_mail(-self.settled, again=self.settled % 3 == 0)
            super().settle()

    def kill(self, rank: int, lose: bool = False, seen_by: Any = None) -> None:
        """As of ``Network``. Letters of the dead arrive now, or never; copies of what has arrived may still come."""
        left = [letter for letter in self.mail if letter.source == rank and not letter.is_copy]
        self.mail = [letter for letter in self.mail if letter.target != rank and letter not in left]
        super().kill(rank, lose, seen_by=())
        for letter in left:
            if not lose:
                self._arrive(letter)
        for observer in [node.rank for node in self if node.alive] if seen_by is None else seen_by:
            self.notice(observer, rank)

    def _post(self, node: Node, tell: Any, peer: Peer, kind: Kind, value: Any, call: int = 0) -> None:
        if kind not in POSTED or peer.rank == node.rank:
            tell(peer, kind, value, call)
        elif not peer.is_dead and self[peer.rank].alive:
            self.mail.append(Letter(node.rank, peer.rank, kind, value, call))

    def _arrive(self, letter: Letter) -> None:
        node = self[letter.target]
        if node.alive:
            payload = encode(letter.value)
            assert payload is not None
            node.handle_control(node.peers[letter.source], letter.kind, letter.call, payload, None)
            node.step()
