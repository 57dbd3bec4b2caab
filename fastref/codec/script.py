"""TorchScript functions by name: the peer has compiled its own when it imported their module."""

from __future__ import annotations

import importlib
from typing import Any

import torch

__all__ = ["find_script_function", "reduce_script_function"]

_PREFIX = "__torch__."


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
