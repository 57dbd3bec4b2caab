"""Run something on several threads at once, or on another one, and have here what came of it there."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

__all__ = ["Other", "in_threads"]


def in_threads(count: int, body: Callable[[int], object]) -> None:
    """Run ``body(number)`` on ``count`` threads that start together; raise the first error of any."""
    errors: list[BaseException] = []
    barrier = threading.Barrier(count)

    def run(number: int) -> None:
        try:
            barrier.wait()
            body(number)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=(number,)) for number in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]


class Other(threading.Thread):
    """Runs the other end of something; ``outcome`` gives what it returned or raised."""

    def __init__(self, target: Callable[[], object]) -> None:
        super().__init__()
        self._call, self._outcome = target, None
        self.start()

    def run(self) -> None:
        try:
            self._outcome = self._call()
        except Exception as error:
            self._outcome = error

    @property
    def outcome(self) -> Any:
        self.join()
        return self._outcome
