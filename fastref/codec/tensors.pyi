"""Types of the compiled ``fastref.codec.tensors``."""

import torch
from typing_extensions import Buffer

__all__ = ["StorageView"]

class StorageView(Buffer):
    def __init__(self, storage: torch.UntypedStorage) -> None: ...
