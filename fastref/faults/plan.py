"""Which messages fail and which come late, by name. No clock, no thread, no I/O."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping

from fastref.errors import UsageError

__all__ = ["MESSAGES", "FaultPlan"]

MESSAGES = (
    "PYTHON_CALL",  # a call of a function, or of a method of a reference
    "SCRIPT_CALL",  # one of a builtin operator or a ScriptFunction
    "PYTHON_REMOTE_CALL",
    "SCRIPT_REMOTE_CALL",
    "PYTHON_RREF_FETCH_CALL",  # to_here()
    "SCRIPT_RREF_FETCH_CALL",  # the same, of a value that a builtin operator or a ScriptFunction makes
    "RREF_FORK_REQUEST",
    "RREF_CHILD_ACCEPT",
    "RREF_USER_DELETE",
    "CLEANUP_AUTOGRAD_CONTEXT_REQ",
)

# torch's, in RpcRetryOptions (torch/csrc/distributed/rpc/rpc_agent.h).
MAX_RETRIES = 5
FIRST_RETRY_S = 1.0
RETRY_BACKOFF = 1.5


class FaultPlan:
    """What happens to which messages.

    Parameters
    ----------
    messages_to_fail : iterable of str
        Messages whose first ``num_fail_sends`` sends fail, each one's: one that is sent again after it has failed so
        often goes through.
    messages_to_delay : mapping of str to float
        Messages that leave later, and by how many seconds.
    num_fail_sends : int

    Raises
    ------
    UsageError
        For a name that is none, and a number that is out of range.

    Source
    ------
    ``FaultyTensorPipeAgent`` of ``torch/csrc/distributed/rpc/testing``. Different on purpose: there the same bytes for
    two workers are one message, and the bytes of a call with references are never the same.
    """

    def __init__(
        self, messages_to_fail: Iterable[str] = (), messages_to_delay: Mapping[str, float] = {}, num_fail_sends: int = 0
    ) -> None:
        if isinstance(messages_to_fail, str):
            raise UsageError(f"messages_to_fail is a list of names, got {messages_to_fail!r}")
        self._failing = frozenset(map(_checked, messages_to_fail))
        self._delays_s = {_checked(name): _seconds(name, delay) for name, delay in messages_to_delay.items()}
        if isinstance(num_fail_sends, bool) or not isinstance(num_fail_sends, int) or num_fail_sends < 0:
            raise UsageError(f"num_fail_sends is a number of sends, at least 0, got {num_fail_sends!r}")
        self._num_fail_sends = num_fail_sends
        # Each is changed by one operation under the interpreter lock: a destructor may send in between.
        self._sends: dict[tuple[str, bytes], Iterator[int]] = {}
        self._failed: list[str] = []
        self._delayed: list[str] = []

    def may_fail(self, name: str) -> bool:
        """Tell whether messages of this name fail at all."""
        return name in self._failing

    def fails(self, name: str, content: bytes) -> bool:
        """Tell whether one send fails, and count it if so. ``content``: equal for all sends of one message."""
        if name not in self._failing:
            return False
        if next(self._sends.setdefault((name, content), itertools.count())) >= self._num_fail_sends:
            return False
        self._failed.append(name)
        return True

    def delay_s(self, name: str) -> float:
        """Return how long a message is kept back, in seconds, and count it if it is."""
        delay = self._delays_s.get(name, 0.0)
        if delay:
            self._delayed.append(name)
        return delay

    def counts(self) -> dict[str, dict[str, int]]:
        """Return how many sends have failed and how many messages were kept back, by name."""
        return {"failed": dict(Counter(self._failed)), "delayed": dict(Counter(self._delayed))}


def retry_after_s(retries: int) -> float | None:
    """Return how long after a failure a control message is sent again, in seconds; None when it is given up.

    ``retries``: how often it has been sent again already.
    """
    return FIRST_RETRY_S * RETRY_BACKOFF**retries if retries < MAX_RETRIES else None


def _checked(name: str) -> str:
    if name not in MESSAGES:
        raise UsageError(f"no such message: {name!r}; known are {', '.join(MESSAGES)}")
    return name


def _seconds(name: str, delay: float) -> float:
    if isinstance(delay, bool) or not isinstance(delay, (int, float)) or not 0 <= delay < float("inf"):
        raise UsageError(f"{name} is delayed by a number of seconds, at least 0, got {delay!r}")
    return float(delay)
