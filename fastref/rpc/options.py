"""The options under torch's name."""

from __future__ import annotations

from typing import Any

import torch

from fastref.options import DEFAULT_NUM_WORKER_THREADS, DEFAULT_RPC_TIMEOUT_SEC, RpcBackendOptions

__all__ = ["TensorPipeRpcBackendOptions"]

Device = int | str | torch.device


class TensorPipeRpcBackendOptions(RpcBackendOptions):
    """``RpcBackendOptions`` with the signature that programs for torch use.

    Parameters
    ----------
    num_worker_threads, rpc_timeout, init_method
        As in ``RpcBackendOptions``.
    device_maps : dict of str to dict, optional
        For each callee, which of its devices stands for which of this worker's.
    devices : list, optional
        The CUDA devices that calls use.
    _transports, _channels : list, optional
        Names that only torch's agent knows; ignored.
    **more
        What else ``RpcBackendOptions`` takes.

    Raises
    ------
    TypeError, UsageError
        As in ``RpcBackendOptions``.
    ValueError
        When a device map is not one to one, or ``devices`` has others than CUDA devices.
    """

    def __init__(
        self,
        *,
        num_worker_threads: int = DEFAULT_NUM_WORKER_THREADS,
        rpc_timeout: float = DEFAULT_RPC_TIMEOUT_SEC,
        init_method: str | None = None,
        device_maps: dict[str, dict[Device, Device]] | None = None,
        devices: list[Device] | None = None,
        _transports: list[str] | None = None,
        _channels: list[str] | None = None,
        **more: Any,
    ) -> None:
        super().__init__(rpc_timeout, init_method, num_worker_threads=num_worker_threads, **more)
        self.device_maps = {to: _device_map(device_map) for to, device_map in (device_maps or {}).items()}
        self.devices: list[torch.device] = []
        self.set_devices(devices or [])

    def set_device_map(self, to: str, device_map: dict[Device, Device]) -> None:
        """Add to the device map for one callee.

        Raises
        ------
        ValueError
            When the whole would not be one to one.
        """
        added, known = _device_map(device_map), self.device_maps.setdefault(to, {})
        for mine, theirs in added.items():
            if known.get(mine, theirs) != theirs:
                raise ValueError(
                    f"`set_device_map` only supports 1-to-1 mapping, trying to map {mine} to {theirs} and {known[mine]}"
                )
        known.update(added)

    def set_devices(self, devices: list[Device]) -> None:
        """Say which CUDA devices calls use.

        Raises
        ------
        ValueError
            When one is no CUDA device.
        """
        found = [torch.device(device) for device in devices]
        for device in found:
            if device.type != "cuda":
                raise ValueError(f"`set_devices` expect a list of CUDA devices, but got device type {device.type}.")
        self.devices = found


def _device_map(device_map: dict[Device, Device]) -> dict[torch.device, torch.device]:
    found: dict[torch.device, torch.device] = {}
    back: dict[torch.device, torch.device] = {}
    for mine, theirs in ((torch.device(a), torch.device(b)) for a, b in device_map.items()):
        if theirs in back:
            raise ValueError(
                f"`device_map` only supports 1-to-1 mapping, trying to map {mine} and {back[theirs]} to {theirs}"
            )
        found[mine], back[theirs] = theirs, mine
    return found
