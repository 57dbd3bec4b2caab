"""Where a remote module is to live, read from the one string that torch writes it in."""

from __future__ import annotations

from typing import NamedTuple

import torch

__all__ = ["Place", "parse_place"]

_RANK = "rank:"


class Place(NamedTuple):
    """A worker and a device of it.

    Parameters
    ----------
    worker : str, int or None
        Name or rank; None: the worker that asks.
    device : torch.device
    """

    worker: str | int | None
    device: torch.device


def parse_place(text: str) -> Place:
    """Read ``"worker/device"``, ``"worker"``, ``"rank:0/device"``, ``"rank:0"`` or ``"device"``.

    A word that is a device is one of this worker, and a device that is left out is the processor.

    Raises
    ------
    ValueError
        It has none of these forms.
    RuntimeError
        What stands behind the slash is no device.
    TypeError
        It is no string.

    Source
    ------
    ``torch.distributed._remote_device``. Different on purpose: a worker's name may contain colons, as elsewhere.
    """
    if not isinstance(text, str):
        raise TypeError(f"Invalid type for remote_device: {type(text)}")
    worker, slash, device = text.partition("/")
    if "/" in device or (slash and not worker) or not text:
        raise ValueError(
            f"Could not parse remote_device: {text}. The valid format is '<workername>/<device>' or"
            " 'rank:<rank>/<device>' or '<device>'"
        )
    if not slash:
        if _is_device(worker):
            return Place(None, torch.device(worker))
        device = "cpu"
    number = worker.removeprefix(_RANK)
    is_rank = worker.startswith(_RANK) and number.isascii() and number.isdigit()
    return Place(int(number) if is_rank else worker, torch.device(device))


def _is_device(text: str) -> bool:
    try:
        torch.device(text)
    except RuntimeError:
        return False
    return True
