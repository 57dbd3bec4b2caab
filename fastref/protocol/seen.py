"""Which messages of a sender have come: told by their numbers, in any order; only what is missing is remembered."""

from __future__ import annotations

from bisect import bisect_right

from fastref.errors import ProtocolError

__all__ = ["SeenNumbers"]


class SeenNumbers:
    """The numbers of one sender, who counts 1, 2, 3, ... and may repeat, reorder and delay what it sends.

    Kept are the next number and the gaps below it. A gap is what the sender has sent and still waits for, so both ends
    remember the same few; nothing that was seen is forgotten, however long ago.
    """

    def __init__(self) -> None:
        self._next = 1
        self._gaps: list[tuple[int, int]] = []  # first and last number of each, ascending

    def first(self, number: int) -> bool:
        """Return whether a number comes for the first time, and count it as seen.

        Raises
        ------
        ProtocolError
            When it is no such number.
        """
        if number < 1:
            raise ProtocolError(f"{number} is not the number of a message")
        if number >= self._next:
            if number > self._next:
                self._gaps.append((self._next, number - 1))
            self._next = number + 1
            return True
        at = bisect_right(self._gaps, number, key=lambda gap: gap[0]) - 1
        if at < 0 or number > self._gaps[at][1]:
            return False
        start, end = self._gaps[at]
        self._gaps[at : at + 1] = [gap for gap in ((start, number - 1), (number + 1, end)) if gap[0] <= gap[1]]
        return True

    def gaps(self) -> int:
        """How many stretches of numbers have not come although later ones have."""
        return len(self._gaps)
