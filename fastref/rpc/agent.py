"""The agent: what programs for torch ask of the runtime behind their calls."""

from __future__ import annotations

from typing import Any

import torch

from fastref.errors import NotInitialized
from fastref.options import WorkerInfo
from fastref.rpc.absent import INSIDE, Absent
from fastref.rref import current_wiring

__all__ = ["RpcAgent", "TensorPipeAgent"]


class RpcAgent:
    """A view of the current runtime. All views of one runtime are equal."""

    store = Absent("torch.distributed.rpc.TensorPipeAgent.store", INSIDE)
    _update_group_membership = Absent("torch.distributed.rpc.TensorPipeAgent._update_group_membership", INSIDE)

    def __init__(self, runtime: Any) -> None:
        self._runtime = runtime

    def __eq__(self, other: object) -> bool:
        return isinstance(other, RpcAgent) and other._runtime is self._runtime

    def __hash__(self) -> int:
        return id(self._runtime)

    @property
    def is_static_group(self) -> bool:
        """Whether nobody joins or leaves."""
        static: bool = self._runtime.is_static
        return static

    def get_worker_info(self, worker_name: str | int | None = None) -> WorkerInfo:
        """Return name and rank of a worker, of this one by default."""
        info: WorkerInfo = self._runtime.info if worker_name is None else self._runtime.find(worker_name)
        return info

    def get_worker_infos(self) -> list[WorkerInfo]:
        """Return name and rank of all workers; in a group that workers join and leave, of those who are there now."""
        return [peer.info for peer in self._runtime.ranks if peer is not None]

    def get_debug_info(self) -> dict[str, str]:
        """Return torch's counters of threads and calls."""
        runtime = self._runtime
        figures = {
            "agent.thread_pool_size": runtime.thread_cap,
            "agent.num_idle_threads": max(runtime.thread_cap - runtime.running, 0),
            "agent.client_active_calls": runtime.calls_pending,
            "agent.server_active_calls": runtime.running,
            "agent.server_active_async_calls": runtime.futures_awaited,
        }
        if runtime.gil_is_profiled:
            figures["agent.gil_average_wait_time_us"] = runtime.gil_waited_ns // max(runtime.gil_waits, 1) // 1000
        return {name: str(figure) for name, figure in figures.items()}

    def get_metrics(self) -> dict[str, str]:
        """As ``get_debug_info``."""
        return self.get_debug_info()

    def join(self, shutdown: bool = False, timeout: float = 0) -> None:
        """Wait until all workers have called it and no call is under way anywhere."""
        self._runtime.wait_for_all(timeout)

    def sync(self) -> None:
        """As ``join``."""
        self.join()

    def shutdown(self) -> None:
        """Leave the job without waiting for anybody."""
        self._runtime.shutdown(graceful=False)

    def _get_device_map(self, worker: WorkerInfo) -> dict[torch.device, torch.device]:
        """Return which devices of a worker stand for which of this one's."""
        found: dict = getattr(self._runtime.options, "device_maps", {}).get(worker.name, {})
        return dict(found)

    def _get_backend_options(self) -> Any:
        return self._runtime.options


TensorPipeAgent = RpcAgent


def current_agent() -> RpcAgent:
    """Return the agent of the current runtime.

    Raises
    ------
    NotInitialized
        Before ``init_rpc``.
    """
    runtime = current_wiring()
    if runtime is None:
        raise NotInitialized(
            "Current RPC agent is not set! Did you initialize the RPC framework (e.g. by calling `rpc.init_rpc`)?"
        )
    runtime.check_process()
    return RpcAgent(runtime)
