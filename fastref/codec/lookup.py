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
    found: Any = sys.modules.get(module)
    # A module that another thread imports right now is there, but not whole: import_module waits for that thread.
    if found is None or getattr(getattr(found, "__spec__", None), "_initializing", False):
        found = importlib.import_module(module)
    try:
        for part in qualname.split("."):
            found = getattr(found, part)
    except AttributeError as error:
        raise AttributeError(f"{error}. {ADVICE}") from None
    return found
