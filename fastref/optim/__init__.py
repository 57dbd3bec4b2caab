"""Optimizers of parameters that live on several workers, under ``torch.distributed.optim``'s name."""

from fastref.optim.optimizer import DistributedOptimizer

__all__ = ["DistributedOptimizer"]
