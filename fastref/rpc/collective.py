"""All workers of a group give an object and get everybody's: over calls, through the worker whose name comes first."""

from __future__ import annotations

import threading
import time
from collections import defaultdict
from typing import Any
from weakref import WeakKeyDictionary

from fastref.errors import CallTimeout, NotInitialized, PeerError, WorkerDied
from fastref.rref import current_wiring

__all__ = ["Gathering", "Gatherings", "gatherings"]


class Gathering:
    """One round of one group, at one worker."""

    def __init__(self) -> None:
        self.gathered_objects: dict[str, Any] = {}
        self.proceed_signal = threading.Event()
        self.failure: str | None = None  # why the leader gave up

    def wait(self, timeout_s: float | None, missing: Any) -> None:
        """Wait for everybody's objects.

        Raises
        ------
        WorkerDied
            One of ``missing()`` died.
        CallTimeout
            They are not there after ``timeout_s`` seconds.
        PeerError
            The leader has given up, for one of these reasons.
        """
        deadline = None if timeout_s is None else time.monotonic() + timeout_s
        while not self.proceed_signal.wait(0.1 if deadline is None else min(0.1, max(deadline - time.monotonic(), 0))):
            runtime = current_wiring()
            if runtime is None:
                raise NotInitialized("this worker has left the job")
            for name in missing():
                peer = next((peer for peer in runtime.known_peers() if peer.name == name), None)
                if peer is not None and peer.is_dead:
                    raise WorkerDied(peer.name, peer.rank, peer.pid, peer.death or "")
            if deadline is not None and time.monotonic() > deadline:
                raise CallTimeout(f"workers {sorted(missing())} have not joined a collective within {timeout_s:g} s")
        if self.failure is not None:
            raise PeerError(self.failure)


class Gatherings:
    """The rounds of one runtime. Rounds of one group are numbered, so that a fast worker's next is told apart."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._numbers: dict[str, int] = {}
        self._rounds: defaultdict[str, Gathering] = defaultdict(Gathering)

    def begin(self, names: set[str]) -> str:
        """Name the next round of a group."""
        group = "".join(sorted(names))
        with self._lock:
            number = self._numbers.get(group, 0)
            self._numbers[group] = number + 1
        return f"{group}{number}"

    def round(self, name: str) -> Gathering:
        """Return a round that this worker or another has begun."""
        with self._lock:
            return self._rounds[name]

    def end(self, name: str) -> None:
        """Forget a round."""
        with self._lock:
            self._rounds.pop(name, None)


_of_runtimes: WeakKeyDictionary[Any, Gatherings] = WeakKeyDictionary()
_making = threading.Lock()


def gatherings() -> Gatherings:
    """Return the rounds of the current runtime."""
    with _making:
        return _of_runtimes.setdefault(current_wiring(), Gatherings())
