"""Types of the compiled ``fastref.api``."""

from collections.abc import Callable, Mapping, Sequence
from types import TracebackType
from typing import Any, TypeVar

from fastref.futures import Future
from fastref.options import RpcBackendOptions, WorkerInfo
from fastref.rref import RRef

__all__ = [
    "Session",
    "get_worker_info",
    "init_rpc",
    "is_available",
    "remote",
    "rpc_async",
    "rpc_sync",
    "shutdown",
]

_Result = TypeVar("_Result")

class Session:
    def __enter__(self) -> Session: ...
    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...

def is_available() -> bool: ...
def init_rpc(
    name: str,
    backend: Any = None,
    rank: int = -1,
    world_size: int | None = None,
    rpc_backend_options: RpcBackendOptions | None = None,
) -> Session: ...
def join(name: str, rank: int, world_size: int | None, options: RpcBackendOptions, store: Any = None) -> None: ...
def leave(graceful: bool, timeout: float, check: Callable[[bool], None] | None = None) -> None: ...
def shutdown(graceful: bool = True, timeout: float = 0.0) -> None: ...
def get_worker_info(worker_name: str | int | None = None) -> WorkerInfo: ...
def rpc_sync(
    to: str | int | WorkerInfo,
    func: Callable[..., _Result],
    args: Sequence[Any] | None = None,
    kwargs: Mapping[str, Any] | None = None,
    timeout: float = -1.0,
) -> _Result: ...
def rpc_async(
    to: str | int | WorkerInfo,
    func: Callable[..., _Result],
    args: Sequence[Any] | None = None,
    kwargs: Mapping[str, Any] | None = None,
    timeout: float = -1.0,
) -> Future[_Result]: ...
def remote(
    to: str | int | WorkerInfo,
    func: Callable[..., _Result],
    args: Sequence[Any] | None = None,
    kwargs: Mapping[str, Any] | None = None,
    timeout: float = -1.0,
) -> RRef[_Result]: ...
