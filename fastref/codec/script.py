"""TorchScript values: functions go by name, since the peer compiled its own; modules as torch saves them."""

from __future__ import annotations

import importlib
import io
from typing import Any

import torch

from fastref.errors import UsageError

__all__ = [
    "ANY_TYPE",
    "find_script_function",
    "load_script_module",
    "reduce_script_function",
    "reduce_script_module",
    "type_name",
    "type_string",
]

_PREFIX = "__torch__."
ANY_TYPE = "PyObject"


def reduce_script_function(function: torch.jit.ScriptFunction) -> Any:
    """Say how a script function is pickled."""
    return find_script_function, (function.qualified_name,)


def find_script_function(qualified_name: str) -> Any:
    """Return the script function of that name, importing its module if need be.

    Raises
    ------
    AttributeError
        There is none here.
    """
    unit: Any = torch.jit._state._python_cu
    found = unit.find_function(qualified_name)
    module = qualified_name.removeprefix(_PREFIX).rpartition(".")[0]
    if found is None and module:
        try:
            importlib.import_module(module)
        except ImportError as error:
            raise AttributeError(f"no script function {qualified_name}: {error}") from error
        found = unit.find_function(qualified_name)
    if found is None:
        raise AttributeError(f"no script function {qualified_name}; its module must define it on the callee too")
    return found


def reduce_script_module(module: torch.jit.ScriptModule) -> Any:
    """Say how a script module is pickled: code and parameters, which the receiver needs nothing else for."""
    file = io.BytesIO()
    torch.jit.save(module, file)
    return load_script_module, (file.getvalue(),)


def load_script_module(data: bytes) -> Any:
    """Return the script module that ``reduce_script_module`` was given."""
    return torch.jit.load(io.BytesIO(data))


def type_name(value: Any) -> str:
    """Return what TorchScript calls the type of a value; ``ANY_TYPE`` when it has none for it."""
    inferred: Any = torch._C._jit_try_infer_type(value)
    name: str = inferred.type().annotation_str if inferred.success() else ANY_TYPE
    return name


def type_string(value: Any, type_hint: Any) -> str | None:
    """Return the name of the interface under which a reference to a script module goes; None for other values.

    Raises
    ------
    UsageError
        A script module without a hint, with one that it does not implement, or another value with a hint.

    Source
    ------
    ``torch.distributed.rpc.RRef``.
    """
    if not isinstance(value, torch.jit.ScriptModule):
        if type_hint is not None:
            raise UsageError("type_hint should only be specified when the RRef being created contains a ScriptModule.")
        return None
    if type_hint is None:
        raise UsageError("The RRef being created contains a ScriptModule, must provide its ModuleInterface type hint. ")
    unit: Any = torch.jit._state._python_cu
    interface = unit.get_interface(torch._jit_internal._qualified_name(type_hint))
    kind = value._c._type()
    if interface is None or not kind.isSubtypeOf(interface):
        named = type_hint if interface is None else interface.annotation_str
        raise UsageError(f"{kind} is not a subtype of the type hint: {named}, did you pass a valid interface type?")
    name: str = interface.annotation_str
    return name
