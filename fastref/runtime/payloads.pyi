"""Types of the compiled ``fastref.runtime.payloads``."""

from collections.abc import Callable
from typing import Any

from fastref.options import WorkerInfo
from fastref.rref import Wiring
from fastref.segments.shared import SharedBlock

__all__ = ["Payloads"]

class Payloads(Wiring):
    autograd: Any
    encode_failure: Callable[[BaseException, Any], bytes]
    decode_failure: Callable[[bytes], BaseException]

    def __init__(self, info: WorkerInfo, strict: bool) -> None: ...
    @property
    def info(self) -> WorkerInfo: ...
    @property
    def strict(self) -> bool: ...
    def claim_block(self, number: int) -> SharedBlock: ...
