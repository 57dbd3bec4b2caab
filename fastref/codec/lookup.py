"""Find, on the callee, the function that a number or a name stands for."""

from __future__ import annotations

import importlib
import sys
from typing import Any

from fastref.errors import ProtocolError

__all__ = ["find_callable"]

# torch's sentence, which its users search for.
ADVICE = (
    "Default RPC pickler does not serialize\n"
    "            function code. Ensure that UDFs are defined on both caller and\n"
    "            callee modules."
)


def find_callable(known: dict[int, tuple[str, str]], number: int, caller: Any) -> Any:
    """Return what the caller introduced under ``number``, looked up afresh: a name may have been bound again.

    Raises
    ------
    AttributeError, ImportError
        When this worker has no such module or name.
    """
    try:
        module, qualname = known[number]
    except KeyError:
        raise ProtocolError(f"{caller} calls number {number}, which it never introduced") from None
    home: Any = sys.modules.get(module)
    if home is None:
        home = importlib.import_module(module)
    try:
        return _find(home, qualname)
    except AttributeError as error:
        missing = error
    if getattr(getattr(home, "__spec__", None), "_initializing", False):
        # Another thread imports it right now: it is there, but not whole. import_module waits for that thread.
        try:
            return _find(importlib.import_module(module), qualname)
        except AttributeError as error:
            missing = error
    raise AttributeError(f"{missing}. {ADVICE}") from None


def _find(home: Any, qualname: str) -> Any:
    for part in qualname.split("."):
        home = getattr(home, part)
    return home
