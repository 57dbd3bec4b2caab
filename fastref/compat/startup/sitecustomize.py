"""What a Python started below ``python -m fastref.compat`` does first, and then what it would have done without."""

import importlib.machinery
import importlib.util
import os
import sys

_HERE = os.path.dirname(os.path.abspath(__file__))


def _load(spec):  # type: ignore[no-untyped-def]
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


sys.path[:] = [entry for entry in sys.path if entry != _HERE]  # as it would be; children have PYTHONPATH
_load(
    importlib.util.spec_from_file_location("_fastref_late", os.path.join(os.path.dirname(_HERE), "late.py"))
).wait_for_torch()
_next = importlib.machinery.PathFinder.find_spec("sitecustomize", sys.path)
if _next is not None and _next.loader is not None:
    _load(_next)
