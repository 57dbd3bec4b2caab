"""What is to be done at a later time."""

from __future__ import annotations

import heapq
import itertools
import logging
import threading
from collections.abc import Callable

from fastref.errors import PeerError

__all__ = ["Agenda"]

logger = logging.getLogger("fastref")

NEVER = 0x7FFFFFFFFFFFFFFF


class Agenda:
    """Actions with the times at which they are due. It has no thread: whoever looks at a clock calls ``act``."""

    def __init__(self) -> None:
        self._numbers = itertools.count()  # of two that are due at once the older one is first
        self._entries: list[tuple[int, int, bool, Callable[[], object]]] = []
        self._adding = threading.Lock()  # no action runs under it
        self._acting = threading.Lock()  # held while actions run; nobody waits for it

    def add(self, due_ns: int, action: Callable[[], object], is_control: bool = False) -> None:
        """Have ``action`` called at ``due_ns``. From any thread, from an action too."""
        with self._adding:
            heapq.heappush(self._entries, (due_ns, next(self._numbers), is_control, action))

    def act(self, now_ns: int) -> None:
        """Do what is due, soonest first. Does nothing while another thread does."""
        if not self._acting.acquire(blocking=False):
            return
        try:
            while (action := self._take(now_ns)) is not None:
                try:
                    action()
                except PeerError as error:
                    logger.debug("nobody is left for a message that came late: %s", error)
                except Exception:
                    logger.exception("a message that was kept back could not be sent")
        finally:
            self._acting.release()

    def _take(self, now_ns: int) -> Callable[[], object] | None:
        with self._adding:
            if not self._entries or self._entries[0][0] > now_ns:
                return None
            return heapq.heappop(self._entries)[3]

    @property
    def next_ns(self) -> int:
        """When the next action is due."""
        with self._adding:
            return self._entries[0][0] if self._entries else NEVER

    @property
    def controls(self) -> int:
        """How many control messages are waiting."""
        with self._adding:
            return sum(is_control for _, _, is_control, _ in self._entries)

    def clear(self) -> None:
        """Forget everything that has not been done."""
        with self._adding:
            self._entries.clear()

    def is_empty(self) -> bool:
        """Tell whether nothing is left to do or being done."""
        with self._adding:
            return not self._entries and not self._acting.locked()
