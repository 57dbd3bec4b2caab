"""Functions and classes of ``__main__``: by name where both ends run the same script, by value elsewhere.

Two workers started from one script (``torchrun``, ``multiprocessing``) both have its functions; there a name means the
same on both sides, and globals stay each worker's own, as with any module. In a notebook, or between two scripts, a
name of ``__main__`` means nothing to the other side.
"""

from __future__ import annotations

import ast
import functools
import hashlib
import sys
from types import ModuleType
from typing import Any

__all__ = ["fingerprint", "owns", "is_shared", "find"]

_NAMES = ("__main__", "__mp_main__")  # the second is what multiprocessing calls it in a child


def fingerprint() -> str:
    """Return a digest of the file that is ``__main__``, empty when there is none (an interactive session)."""
    path = getattr(_main(), "__file__", None)
    return _digest(path) if path else ""


def owns(value: Any) -> bool:
    """True for a function or class that says it was defined in ``__main__``."""
    return getattr(value, "__module__", None) in _NAMES


def is_shared(value: Any) -> bool:
    """True when another process that runs the same file has the object under the same name.

    Objects made inside functions, or under ``if __name__ == "__main__":``, exist in one process only.
    """
    path = getattr(_main(), "__file__", None)
    name = value.__qualname__
    if not path or name.split(".")[0] not in _top_level_names(path):
        return False
    try:
        return find(name) is value
    except AttributeError:
        return False


def find(qualname: str) -> Any:
    """Return the object of this process's ``__main__`` that has the name."""
    found: Any = _main()
    for part in qualname.split("."):
        found = getattr(found, part)
    return found


def _main() -> ModuleType | None:
    return sys.modules.get("__main__")


@functools.lru_cache(maxsize=8)
def _digest(path: str) -> str:
    try:
        with open(path, "rb") as file:
            return hashlib.sha256(file.read()).hexdigest()
    except OSError:
        return ""


@functools.lru_cache(maxsize=8)
def _top_level_names(path: str) -> frozenset[str]:
    try:
        with open(path, "rb") as file:
            tree = ast.parse(file.read())
    except (OSError, SyntaxError, ValueError):
        return frozenset()
    return frozenset(_defined(tree.body))


def _defined(statements: list[ast.stmt]) -> set[str]:
    names: set[str] = set()
    for statement in statements:
        if isinstance(statement, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            names.add(statement.name)
        elif isinstance(statement, ast.Assign):
            names.update(target.id for target in statement.targets if isinstance(target, ast.Name))
        elif isinstance(statement, ast.If) and not _is_main_guard(statement.test):
            names |= _defined(statement.body) & _defined(statement.orelse)
    return names


def _is_main_guard(test: ast.expr) -> bool:
    return any(isinstance(node, ast.Name) and node.id == "__name__" for node in ast.walk(test))
