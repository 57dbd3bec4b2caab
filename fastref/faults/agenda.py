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
    """Actions with the times at which they are due. It has no thread: whoever looks at a clock calls ``act``.

    Every step is one operation under the interpreter lock, and nobody waits for another lock: a destructor that sends
    something may run between any two of them.
    """

    def __init__(self) -> None:
        self._numbers = itertools.count()  # of two that are due at once the older one is first
        self._entries: list[tuple[int, int, bool, Callable[[], object]]] = []
        self._acting = threading.Lock()  # held while actions run; nobody waits for it

    def add(self, due_ns: int, action: Callable[[], object], is_control: bool = False) -> None:
        """Have ``action`` called at ``due_ns``. From any thread, from an action too."""
        entry = (due_ns, next(self._numbers), is_control, action)
        heapq.heappush(self._entries, entry)

    def act(self, now_ns: int) -> None:
        """Do what is due, soonest first. Does nothing while another thread does."""
        if not self._acting.acquire(blocking=False):
            return
        try:
            while self.next_ns <= now_ns and (entry := self._pop()) is not None:
                try:
                    entry[3]()
                except PeerError as error:
                    logger.debug("nobody is left for a message that came late: %s", error)
                except Exception:
                    logger.exception("a message that was kept back could not be sent")
        finally:
            self._acting.release()

    def _pop(self) -> tuple[int, int, bool, Callable[[], object]] | None:
        try:
            return heapq.heappop(self._entries)
        except IndexError:  # cleared meanwhile
            return None

    @property
    def next_ns(self) -> int:
        """When the next action is due."""
        try:
            return self._entries[0][0]
        except IndexError:
            return NEVER

    @property
    def controls(self) -> int:
        """How many control messages are waiting."""
        return sum(is_control for _, _, is_control, _ in list(self._entries))

    def clear(self) -> None:
        """Forget everything that has not been done."""
        self._entries.clear()

    def is_empty(self) -> bool:
        """Tell whether nothing is left to do or being done."""
        return not self._entries and not self._acting.locked()
