"""Modules that live on other workers, under ``torch.distributed.nn``'s name."""

from fastref.nn.remote_module import RemoteModule

__all__ = ["RemoteModule"]
