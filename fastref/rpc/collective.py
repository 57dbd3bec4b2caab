"""All workers of a group give an object and get everybody's: over calls, through the worker whose name comes first."""

from __future__ import annotations

import threading
import time
from typing import Any
from weakref import WeakKeyDictionary

from fastref.errors import CallTimeout, NotInitialized, PeerError, UsageError, WorkerDied
from fastref.rref import current_wiring

__all__ = ["Gathering", "Gatherings", "gatherings"]


class Gathering:
    """One round of one group, at one worker."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.gathered_objects: dict[str, Any] = {}
        self.proceed_signal = threading.Event()
        self.failure: str | None = None  # why the leader gave up
        self.is_over = False  # the leader, here, has given up; others may still come
        self._lock = threading.Lock()

    def add(self, worker_name: str, obj: Any, worker_names: set[str]) -> None:
        """On the leader: note what one worker gives.

        Raises
        ------
        UsageError
            It has given something already.
        PeerError
            The leader has given up; who comes after that hears of it here.
        """
        with self._lock:
            if self.is_over:
                raise PeerError(str(self.failure))
            if worker_name in self.gathered_objects:
                raise UsageError(f"{worker_name} reported intent sequence id {self.name} twice.")
            self.gathered_objects[worker_name] = obj
            if worker_names == set(self.gathered_objects):
                self.proceed_signal.set()

    def give_up(self, failure: str) -> set[str]:
        """On the leader: say why there will be nothing; returns who came before that, and has to be told."""
        with self._lock:
            self.failure, self.is_over = failure, True
            names, self.gathered_objects = set(self.gathered_objects), {}
        return names

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
        self._rounds: dict[str, Gathering] = {}

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
            return self._rounds.setdefault(name, Gathering(name))

    def settle(self, name: str, objects: dict[str, Any], failure: str | None = None) -> None:
        """On a follower: note what the leader says, unless it waits no more."""
        with self._lock:
            gathering = self._rounds.get(name)
        if gathering is not None:
            gathering.gathered_objects, gathering.failure = objects, failure
            gathering.proceed_signal.set()

    def end(self, name: str) -> None:
        """Forget a round, unless others may still come and have to hear that it was given up."""
        with self._lock:
            if not self._rounds[name].is_over:
                del self._rounds[name]


_of_runtimes: WeakKeyDictionary[Any, Gatherings] = WeakKeyDictionary()
_making = threading.Lock()


def gatherings() -> Gatherings:
    """Return the rounds of the current runtime."""
    with _making:
        return _of_runtimes.setdefault(current_wiring(), Gatherings())
