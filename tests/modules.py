"""Modules, and functions about modules, that tests have on other workers."""

from __future__ import annotations

import time
from typing import Any

import torch
from torch import Tensor, nn

import fastref.rpc as rpc
from fastref.nn import RemoteModule
from tests import work


class Affine(nn.Module):
    """``weight * x + bias``, both of them numbers, with a buffer that counts calls."""

    def __init__(self, weight: float = 2.0, bias: float = 1.0) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(weight))
        self.bias = nn.Parameter(torch.tensor(bias))
        self.register_buffer("calls", torch.tensor(0))

    def forward(self, x: Tensor, *, times: int = 1) -> Tensor:
        self.calls += 1
        for _ in range(times):
            x = self.weight * x + self.bias
        return x


class Hooked(Affine):
    """As ``Affine``, with a hook on its result."""

    def __init__(self) -> None:
        super().__init__()
        self.register_forward_hook(lambda module, args, result: -result)


class Slow(Affine):
    """One that takes a while to come into being."""

    def __init__(self, seconds: float) -> None:
        time.sleep(seconds)
        super().__init__()


class Failing(Affine):
    """One that cannot be made."""

    def __init__(self) -> None:
        raise LookupError("no such module")


class Unsendable(Affine):
    """One that cannot leave its worker."""

    def __reduce__(self) -> Any:
        raise TypeError("this module was about to be sent")


class Traced(nn.Module):
    """One that ``work.traced_alive`` counts."""

    def __init__(self) -> None:
        super().__init__()
        self.trace = work.Traced()

    def forward(self, value: Any) -> Any:
        return value


class Nested(nn.Module):
    """Tensors inside of other values, going in and out, beside where they are."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1))

    def forward(self, values: dict[str, Any]) -> tuple[list[str], Any]:
        return [values["tensors"][0].device.type], values


def is_training(module_rref: rpc.RRef) -> bool:
    return module_rref.local_value().training


def attributes_of(remote_module: RemoteModule) -> dict[str, Any]:
    return dict(vars(remote_module))


def call(remote_module: RemoteModule, *args: Any, **kwargs: Any) -> Any:
    return remote_module(*args, **kwargs)


def total(parameters: list[rpc.RRef]) -> float:
    """Return the sum of parameters that live here."""
    return float(sum(rref.local_value().detach().sum() for rref in parameters))
