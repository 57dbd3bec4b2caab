"""Backends by name. fastref is the one there is; programs may register others of their own."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, NoReturn

from fastref.errors import UsageError
from fastref.options import DEFAULT_INIT_METHOD, DEFAULT_RPC_TIMEOUT_SEC

__all__ = [
    "BackendType",
    "BackendValue",
    "backend_registered",
    "construct_rpc_backend_options",
    "init_backend",
    "register_backend",
]


class BackendValue(NamedTuple):
    """What makes a backend's options, and what starts it."""

    construct_rpc_backend_options_handler: Callable[..., Any]
    init_backend_handler: Callable[..., Any]


class _Registry(type):
    """Members by attribute, ``[name]`` and value, like those of an enum, but one class for good however many come."""

    __members__: dict[str, BackendType]

    def __call__(cls, value: BackendValue) -> BackendType:
        for member in cls:
            if member.value == value:
                return member
        raise ValueError(f"{value!r} is not a valid BackendType")

    def __getitem__(cls, name: str) -> BackendType:
        return cls.__members__[name]

    def __getattr__(cls, name: str) -> BackendType:
        try:
            return cls.__members__[name]
        except KeyError:
            raise AttributeError(f"no RPC backend {name}") from None

    def __setattr__(cls, name: str, value: object) -> None:
        if name in cls.__members__:
            raise AttributeError(f"cannot reassign member {name!r}")
        super().__setattr__(name, value)

    def __iter__(cls) -> Iterator[BackendType]:
        return iter(cls.__members__.values())

    def __reversed__(cls) -> Iterator[BackendType]:
        return reversed(cls.__members__.values())

    def __len__(cls) -> int:
        return len(cls.__members__)


class BackendType(metaclass=_Registry):
    """A registered backend; ``BackendType.TENSORPIPE`` is fastref, under the name that programs for torch give it."""

    __members__: dict[str, BackendType] = {}

    name: str
    value: BackendValue

    def __setattr__(self, name: str, value: object) -> NoReturn:
        raise AttributeError(f"cannot set {name!r} of {self!r}")

    def __repr__(self) -> str:
        return f"BackendType.{self.name}"

    def __reduce__(self) -> tuple[Callable[[str], BackendType], tuple[str]]:
        return _member, (self.name,)  # in copies and in other processes too a backend is the registered one


def _member(name: str) -> BackendType:
    if not backend_registered(name):
        raise UsageError(f"RPC backend {name} is not registered in this process")
    return BackendType[name]


def backend_registered(backend_name: str) -> bool:
    """Return whether there is a backend of that name."""
    return backend_name in BackendType.__members__


def register_backend(
    backend_name: str,
    construct_rpc_backend_options_handler: Callable[..., Any],
    init_backend_handler: Callable[..., Any],
) -> BackendType:
    """Add a backend.

    Parameters
    ----------
    backend_name : str
    construct_rpc_backend_options_handler : callable
        Called with ``rpc_timeout``, ``init_method`` and the keywords that ``construct_rpc_backend_options`` gets.
    init_backend_handler : callable
        Called with ``store``, ``name``, ``rank``, ``world_size`` and ``rpc_backend_options``; returns the agent.

    Raises
    ------
    UsageError
        When there is one of that name.
    TypeError, ValueError
        For a name that is no string, and one by which ``BackendType`` could not have it.
    """
    if not isinstance(backend_name, str):
        raise TypeError(f"an RPC backend's name is a string, got {backend_name!r}")
    if backend_registered(backend_name):
        raise UsageError(f"RPC backend {backend_name}: already registered")
    if not backend_name or hasattr(BackendType, backend_name):
        raise ValueError(f"no RPC backend can have the name {backend_name!r}")
    member = object.__new__(BackendType)
    value = BackendValue(construct_rpc_backend_options_handler, init_backend_handler)
    vars(member).update(name=backend_name, value=value)
    BackendType.__members__[backend_name] = member
    return member


def construct_rpc_backend_options(
    backend: BackendType,
    rpc_timeout: float = DEFAULT_RPC_TIMEOUT_SEC,
    init_method: str = DEFAULT_INIT_METHOD,
    **kwargs: Any,
) -> Any:
    """Return the options of a backend."""
    return backend.value.construct_rpc_backend_options_handler(rpc_timeout, init_method, **kwargs)


def init_backend(backend: BackendType, *args: Any, **kwargs: Any) -> Any:
    """Start a backend and return its agent."""
    return backend.value.init_backend_handler(*args, **kwargs)
