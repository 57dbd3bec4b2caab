"""fastref in torch's place in a new process, once that process has imported torch.

Runs before the process has a path to fastref, and in processes that never want it: the standard library only, and
little of that.
"""

from __future__ import annotations

import importlib
import os
import sys
from typing import Any

__all__ = ["reach_children", "wait_for_torch"]

_CHILD = "__fastref_child__"  # the name under which a child of multiprocessing runs this file
_OWN_KEY = "fastref.compat"


def wait_for_torch() -> None:
    """Install as soon as torch has been imported, or at once when it has been."""
    if "torch" in sys.modules:
        _install()
    else:
        sys.meta_path.insert(0, _Watcher())


def reach_children() -> None:
    """Have every process that multiprocessing will start do as ``wait_for_torch``. A forked one has it anyhow.

    What multiprocessing tells a child about its parent is the one thing that reaches it before its main module is
    imported whatever starts it, also a forkserver that was there before.
    """
    from multiprocessing import spawn  # it takes milliseconds, which who starts no children need not spend

    tell = spawn.get_preparation_data
    if hasattr(tell, "reaches_children"):
        return

    def tell_all(name: str) -> dict[str, Any]:
        return {_OWN_KEY: _Arrival(), **tell(name)}

    tell_all.reaches_children = True  # type: ignore[attr-defined]
    spawn.get_preparation_data = tell_all


class _Arrival:
    """Runs this file in the process where it is unpickled, which may not find fastref yet."""

    def __reduce__(self) -> tuple[Any, ...]:
        import runpy

        return runpy.run_path, (os.path.abspath(__file__), None, _CHILD)


class _Watcher:
    """Finds torch as the finders behind it do, and installs when torch has been executed.

    fastref imports torch itself: then it is installed when fastref is there.
    """

    def __init__(self) -> None:
        self._under_way = 0

    def find_spec(self, fullname: str, path: Any = None, target: Any = None) -> Any:
        """Return the specification of a module, None when it is not one of those to wait for."""
        if fullname not in ("torch", "fastref"):
            return None
        finders = list(sys.meta_path)
        behind = finders[finders.index(self) + 1 :] if self in finders else []
        for finder in behind:  # another of these among them asks those behind itself in turn
            spec = finder.find_spec(fullname, path, target)
            if spec is not None:
                if spec.loader is not None:
                    self._watch(spec.loader)
                return spec
        return None

    def _watch(self, loader: Any) -> None:
        execute = loader.exec_module

        def execute_and_install(module: Any) -> None:
            self._under_way += 1
            try:
                execute(module)
            finally:
                self._under_way -= 1
            if not self._under_way and "torch" in sys.modules and self in sys.meta_path:
                sys.meta_path.remove(self)
                _install()

        loader.exec_module = execute_and_install


def _install() -> None:
    try:
        importlib.import_module("fastref")
    except ModuleNotFoundError as error:
        if error.name != "fastref":
            raise
        # From a checkout, that is: behind all else, where it hides nothing.
        sys.path.append(os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__)))))
    importlib.import_module("fastref.compat").install()


if __name__ == _CHILD:
    reach_children()
    wait_for_torch()
