"""A state of the bell's model that a step may change: memory, store buffers, sleepers and their futex words."""

from __future__ import annotations

__all__ = ["FOLLOWER", "LEADER", "NOBODY", "SERVERS", "Draft"]

NOBODY, LEADER, FOLLOWER = range(3)
SERVERS = 2

_HAS_READ_WORD = {
    LEADER: frozenset(("arm leader", "look before sleep", "look before sleep, favourite", "leader sleeps")),
    FOLLOWER: frozenset(("is there a leader", "is a follower armed", "follower sleeps")),
}
"""Steps at which a thread has read the futex word of a role, and may go on to sleep on it."""


class Draft:
    """A state that a step may change.

    Parameters
    ----------
    state : (memory, threads, taken, left, kills, changes); a thread is (step, bits, whether the futex word
        it has read is an old one, buffer)
    who : the thread whose step it is
    tso : whether plain stores are delayed
    """

    def __init__(self, state: tuple, who: int, tso: bool) -> None:
        memory, threads, taken, left, self.kills, self.changes = state
        self._memory = dict(memory)
        self._threads = list(threads)
        self.taken, self.left = list(taken), list(left)
        self._who, self._tso = who, tso
        self.step, self.bits, self.stale, self.buffer = threads[who]

    def freeze(self) -> tuple:
        self._threads[self._who] = (self.step, self.bits, self.stale, self.buffer)
        counts = tuple(self.taken), tuple(self.left), self.kills, self.changes
        return tuple(self._memory.items()), tuple(self._threads), *counts

    def load(self, name: str) -> int:
        for stored, value in reversed(self.buffer):
            if stored == name:
                return value
        return self._memory[name]

    def store(self, name: str, value: int) -> None:
        if self._tso:
            self.buffer += ((name, value),)
        else:
            self._memory[name] = value

    def drain_store(self) -> None:
        name, value = self.buffer[0]
        self.buffer = self.buffer[1:]
        self._memory[name] = value

    def exchange(self, name: str, value: int) -> int:
        """Read and write in one step; whoever does this has an empty store buffer."""
        before, self._memory[name] = self._memory[name], value
        return before

    def swap(self, name: str, expected: int, value: int) -> bool:
        if self._memory[name] != expected:
            return False
        self._memory[name] = value
        return True

    def set_bits(self, bits: int) -> None:
        self._memory["ready"] |= bits

    def leave_bits(self, bits: int) -> int:
        """Clear all others of `ready` in one step; returns which those were."""
        before = self._memory["ready"]
        self._memory["ready"] = before & bits
        return before & ~bits

    def bump(self, role: int) -> None:
        """Change the futex word of a role: who has read it and means to sleep on it has read an old value."""
        for index, (step, bits, _, buffer) in enumerate(self._threads[:SERVERS]):
            if step in _HAS_READ_WORD[role]:
                self._threads[index] = (step, bits, 1, buffer)

    def wake(self, role: int) -> None:
        asleep, awake = ("leader asleep", "disarm") if role == LEADER else ("follower asleep", "watch")
        for index, (step, bits, stale, buffer) in enumerate(self._threads[:SERVERS]):
            if step == asleep and index != self._who:
                self._threads[index] = (awake, bits, stale, buffer)
