"""A worker whose messages fail or come late. References go by messages, and each fetch is one."""

from __future__ import annotations

import functools
import logging
import time
from collections.abc import Callable
from typing import Any

from fastref.faults.plan import FaultPlan, retry_after_s
from fastref.faults.sender import FaultySender
from fastref.runtime.peer import Peer
from fastref.runtime.runtime import Runtime
from fastref.wire.kinds import Kind

__all__ = ["FaultyRuntime"]

logger = logging.getLogger("fastref")

# What nobody waits for: it fails unseen, and is sent again.
CONTROLS = frozenset(
    {Kind.RREF_FORK_REQUEST, Kind.RREF_CHILD_ACCEPT, Kind.RREF_USER_DELETE, Kind.CLEANUP_AUTOGRAD_CONTEXT_REQ}
)


class FaultyRuntime(FaultySender, Runtime):
    """As ``Runtime``.

    Requests of the program fail at once: the error goes to the caller, to the future, or to whoever uses the reference.
    A control message that fails is sent again after 1 s, then 1.5 times that, and so on; the sixth failure is its end.

    Parameters
    ----------
    name, rank, world_size, store, count, before_serving
        As in ``Runtime``.
    options : RpcBackendOptions
        With ``table_bits`` of 0, and ``messages_to_fail``, ``messages_to_delay`` and ``num_fail_sends``.
    """

    def __init__(
        self,
        name: str,
        rank: int,
        world_size: int | None,
        options: Any,
        store: Any = None,
        count: int = 0,
        before_serving: Callable[[Runtime], None] = lambda runtime: None,
    ) -> None:
        self.plan = FaultPlan(options.messages_to_fail, options.messages_to_delay, options.num_fail_sends)
        super().__init__(name, rank, world_size, options, store, count, before_serving)

    def send_control(self, peer: Peer, kind: int, call: int, payload: bytes) -> None:
        """As ``Post.send_control``, at once or later; what comes later is sent or lost without a word."""
        if kind in CONTROLS:
            self._try_control(peer, Kind(kind), call, payload, 0)
        else:
            super().send_control(peer, kind, call, payload)

    def _try_control(self, peer: Peer, kind: Kind, call: int, payload: bytes, retries: int) -> None:
        if peer.is_dead:
            raise peer.died_error()
        if self.plan.fails(kind.name, f"{peer.rank} {call} ".encode() + payload):
            wait_s = retry_after_s(retries)
            if wait_s is None:
                logger.error("a %s to %s has failed %d times and is given up", kind.name, peer.name, retries + 1)
                return
            again = functools.partial(self._try_control, peer, kind, call, payload, retries + 1)
        else:
            wait_s = self.plan.delay_s(kind.name)
            again = functools.partial(super().send_control, peer, kind, call, payload)
            if not wait_s:
                again()
                return
        self.agenda.add(time.monotonic_ns() + int(wait_s * 1e9), again, is_control=True)
        self.look_sooner()

    def expire(self) -> None:
        """As ``Caller.expire``; send what is due."""
        super().expire()
        self.agenda.act(time.monotonic_ns())
        self.next_expiry_ns = min(self.next_expiry_ns, self.agenda.next_ns)

    def is_busy(self) -> bool:
        """As ``Server.is_busy``; True, too, while a message is kept back."""
        return super().is_busy() or not self.agenda.is_empty()

    def reference_counts(self) -> dict[str, int]:
        """As ``Runtime.reference_counts``; ``num_pending_futures`` counts control messages that are kept back, too."""
        counts = super().reference_counts()
        return {**counts, "num_pending_futures": counts["num_pending_futures"] + self.agenda.controls}

    def _release(self) -> None:
        super()._release()
        self.agenda.clear()  # lost, as what a worker has not sent when it ends

    def snapshot(self) -> dict[str, Any]:
        """As ``Runtime.snapshot``, with ``faults``: sends that have ``failed`` and messages ``delayed``, by name."""
        return {**super().snapshot(), "faults": self.plan.counts()}
