"""Taking turns with objects: who shares none with those at work does not wait for them."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterable, Iterator

__all__ = ["Turns"]


class Turns:
    """Whose turn it is with which objects. Callable from any thread; a thread must not take a second turn in its first.

    All objects of a turn are taken at once, so that no two can wait for each other.
    """

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._taken: set[int] = set()

    @contextlib.contextmanager
    def take(self, objects: Iterable[object]) -> Iterator[None]:
        """Wait until nobody has any of these objects, and have them all meanwhile.

        Parameters
        ----------
        objects : iterable of object
            Known by identity. They have to live as long as the turn takes.
        """
        wanted = {id(one) for one in objects}
        with self._changed:
            self._changed.wait_for(lambda: wanted.isdisjoint(self._taken))
            self._taken |= wanted
        try:
            yield
        finally:
            with self._changed:
                self._taken -= wanted
                self._changed.notify_all()
