"""The agent for tests and its options."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from fastref import api
from fastref.faults import FaultPlan, FaultyRuntime
from fastref.options import DEFAULT_NUM_WORKER_THREADS, DEFAULT_RPC_TIMEOUT_SEC, RpcBackendOptions
from fastref.rpc.agent import RpcAgent
from fastref.rref import current_wiring

__all__ = ["FaultyTensorPipeAgent", "FaultyTensorPipeRpcBackendOptions"]


class FaultyTensorPipeRpcBackendOptions(RpcBackendOptions):
    """Options of a worker whose messages fail or come late. References go by messages, and each fetch is one.

    Parameters
    ----------
    num_worker_threads, rpc_timeout, init_method
        As in ``RpcBackendOptions``.
    messages_to_fail : list of str
        Messages that fail, by torch's names.
    messages_to_delay : dict of str to float
        Messages that leave later, and by how many seconds. Nobody is held up meanwhile but who waits for the answer.
    num_fail_sends : int
        How often each message to fail does. A control message (``RREF_FORK_REQUEST``, ``RREF_CHILD_ACCEPT``,
        ``RREF_USER_DELETE``) is sent again then, up to five times; of all others the caller gets an error, and a call
        that is made again with equal arguments is the same message.

    Raises
    ------
    UsageError
        For a name that is none, and a number that is out of range.

    Source
    ------
    ``torch.distributed.rpc._testing``. Different on purpose: the same call of two workers is two messages, and a delay
    does not hold up the calling thread.
    """

    runtime_type = FaultyRuntime

    def __init__(
        self,
        num_worker_threads: int = DEFAULT_NUM_WORKER_THREADS,
        rpc_timeout: float = DEFAULT_RPC_TIMEOUT_SEC,
        init_method: str | None = None,
        messages_to_fail: Iterable[str] = (),
        messages_to_delay: Mapping[str, float] = {},
        num_fail_sends: int = 0,
    ) -> None:
        super().__init__(rpc_timeout, init_method, num_worker_threads=num_worker_threads, table_bits=0)
        FaultPlan(messages_to_fail, messages_to_delay, num_fail_sends)  # says here what is wrong with them
        self.messages_to_fail = list(messages_to_fail)
        self.messages_to_delay = dict(messages_to_delay)
        self.num_fail_sends = num_fail_sends


class FaultyTensorPipeAgent(RpcAgent):
    """Join a job over a store, and be the view of its runtime.

    Parameters
    ----------
    store : torch.distributed.Store
    name, rank, world_size
        As in ``init_rpc``.
    opts : FaultyTensorPipeRpcBackendOptions
    reverse_device_map, devices : optional
        As torch has them; ignored.
    """

    def __init__(
        self,
        store: Any,
        name: str,
        rank: int,
        world_size: int | None,
        opts: FaultyTensorPipeRpcBackendOptions,
        reverse_device_map: object = None,
        devices: object = None,
    ) -> None:
        api.join(name, rank, world_size, opts, store)
        super().__init__(current_wiring())
