"""A module that lives on another worker and is called like one that lives here."""

from __future__ import annotations

import warnings
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NoReturn

import torch
from torch import nn

from fastref import api
from fastref.codec.pickling import register_reducer
from fastref.errors import NotInitialized, UsageError
from fastref.futures import Future
from fastref.nn.place import parse_place
from fastref.rref import RRef, current_wiring

__all__ = ["RemoteModule"]

# What a remote module consists of, in torch's order and under torch's names. It travels with these.
_REMOTE_MODULE_PICKLED_ATTRIBUTES = (
    "on",
    "device",
    "is_device_map_set",
    "is_scriptable",
    "generated_methods",
    "module_rref",
)
# Made anew where it arrives, or nothing to a module without parameters of its own. "training" is what was last set
# from here.
_REMOTE_MODULE_ATTRIBUTES_IGNORE_FOR_PICKLING = ("forward_async", "forward", *vars(nn.Module()))


class _RemoteModule(nn.Module):
    """What ``RemoteModule`` is, with the one parameter that it does not show."""

    on: str | int
    device: str
    is_device_map_set: bool
    is_scriptable: bool
    generated_methods: tuple[Callable[..., Any], ...]
    module_rref: RRef[nn.Module]
    forward: Callable[..., Any]
    forward_async: Callable[..., Future[Any]]

    def __init__(
        self,
        remote_device: str,
        module_cls: Callable[..., nn.Module],
        args: Sequence[Any] | None = None,
        kwargs: Mapping[str, Any] | None = None,
        _module_interface_cls: Any = None,
    ) -> None:
        super().__init__()
        on, device = self._find_place(remote_device, _module_interface_cls)
        rref = api.remote(on, _create_module, (module_cls, tuple(args or ()), dict(kwargs or {}), device))
        self._connect(on, device, rref)

    @staticmethod
    def init_from_module_rref(
        remote_device: str, module_rref: RRef[nn.Module], _module_interface_cls: Any = None
    ) -> RemoteModule:
        """Return a remote module for a module that exists already, so that several share it.

        Parameters
        ----------
        remote_device : str
            Where the module is, as for ``RemoteModule``. Calls go to the owner of the reference, whatever it says.
        module_rref : RRef
            Of the module, as ``get_module_rref`` returns it.

        Raises
        ------
        NotInitialized
            Before ``init_rpc``.
        """
        on, device = _RemoteModule._find_place(remote_device, _module_interface_cls)
        remote_module = object.__new__(RemoteModule)
        remote_module._connect(on, device, module_rref)
        return remote_module

    @staticmethod
    def _find_place(remote_device: str, interface: Any) -> tuple[str | int, str]:
        if interface is not None:
            raise UsageError(
                "fastref does not make remote modules for TorchScript: leave out _module_interface_cls, and call them"
                " from Python. The module itself may be a script module"
            )
        if current_wiring() is None:
            raise NotInitialized("RemoteModule only works in RPC. Call init_rpc before you make one")
        worker, device = parse_place(remote_device)
        return api.get_worker_info().name if worker is None else worker, str(device)

    def _connect(self, on: str | int, device: str, module_rref: RRef[nn.Module]) -> None:
        """Set the attributes that torch's remote modules have, in its order."""
        self.on, self.device = on, device
        maps: Mapping[str, Any] = getattr(current_wiring().options, "device_maps", {})
        self.is_device_map_set = bool(maps.get(api.get_worker_info(on).name))
        self.is_scriptable = False
        self.generated_methods = (_forward_async, _forward)
        self.module_rref = module_rref
        self._bind()

    def _bind(self) -> None:
        # Of the reference, not of this object: a cycle would keep the module alive until the collector finds it.
        place = self.module_rref, torch.device(self.device), self.is_device_map_set
        self.forward_async = partial(_forward_async, *place)
        self.forward = partial(_forward, *place)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """As ``forward``: hooks are with the module, where it is."""
        return self.forward(*args, **kwargs)

    def get_module_rref(self) -> RRef[nn.Module]:
        """Return the reference to the module."""
        return self.module_rref

    def remote_parameters(self, recurse: bool = True) -> list[RRef[nn.Parameter]]:
        """Return references to the parameters of the module, for ``DistributedOptimizer``.

        Parameters
        ----------
        recurse : bool
            With those of its submodules.
        """
        return api.rpc_sync(self.module_rref.owner(), _parameters, (self.module_rref, recurse))

    def remote_state_dict(self) -> OrderedDict[str, Any]:
        """Return a copy of the module's ``state_dict``, its tensors on the processor, for ``torch.save``."""
        return api.rpc_sync(self.module_rref.owner(), _state_dict, (self.module_rref,))

    def load_remote_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True) -> Any:
        """Load a ``state_dict`` into the module, in place: references to its parameters stay what they are.

        Parameters
        ----------
        state_dict : mapping of str to object
            Of this module, or of one like it here.
        strict : bool
            Whether its keys have to be those of the module.

        Returns
        -------
        named tuple
            ``missing_keys`` and ``unexpected_keys``, as of ``torch.nn.Module.load_state_dict``.

        Raises
        ------
        RuntimeError
            The keys, or the shapes of the tensors, are not those of the module.
        """
        return api.rpc_sync(self.module_rref.owner(), _load_state_dict, (self.module_rref, dict(state_dict), strict))

    def train(self, mode: bool = True) -> _RemoteModule:
        """Have the module behave as in training, or not, and return this remote module. The module stays where it is.

        Raises
        ------
        ValueError
            ``mode`` is no boolean.
        """
        if not isinstance(mode, bool):
            raise ValueError("training mode is expected to be boolean")
        api.rpc_sync(self.module_rref.owner(), _set_training, (self.module_rref, mode))
        self.training = mode
        return self

    def eval(self) -> _RemoteModule:
        """As ``train(False)``."""
        return self.train(False)

    def __getstate__(self) -> NoReturn:
        raise RuntimeError(
            "Cannot pickle RemoteModule in python pickler. RemoteModule can only be pickled when using RPC"
        )

    def __setstate__(self, state: object) -> NoReturn:
        raise RuntimeError(
            "Cannot unpickle RemoteModule in python pickler. RemoteModule can only be unpickled when using RPC"
        )

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.module_rref.owner_name()}/{self.device})"


class RemoteModule(_RemoteModule):
    """A module that lives on another worker; its ``forward`` runs there.

    It holds a reference to the module, and can be sent in calls: who receives it has a remote module of the same
    module. Inside ``fastref.autograd.context()`` gradients find their way through it. ``get_module_rref()``,
    ``remote_parameters()`` and ``remote_state_dict()`` are what stands here for ``parameters()`` and the like, which
    raise ``ValueError`` with torch's text.

    Parameters
    ----------
    remote_device : str
        Where it is to live: ``"worker/device"``, ``"worker"``, ``"rank:0/device"``, ``"rank:0"``, or ``"device"`` for
        one of this worker. Without a device it is the processor.
    module_cls : type
        Of the module, or a function that returns one. It is called there, while this constructor returns; if it
        raises, whatever first uses the module does.
    args : sequence, optional
    kwargs : mapping of str to object, optional
        What it is called with.

    Raises
    ------
    NotInitialized
        Before ``init_rpc``.
    ValueError
        ``remote_device`` has none of these forms. From its first use on: ``module_cls`` did not return a module.

    Source
    ------
    ``torch.distributed.nn.RemoteModule``. Different on purpose: ``train`` and ``eval`` do not send the module back, and
    ``train(False)`` is heeded; hooks of the module run; one that was received, or made by ``init_from_module_rref``,
    can be called itself; a module on a device that is not the processor returns what it returns, tensors moved wherever
    they are in it, where torch's makes a tuple of a tensor's rows; a device of this worker works.
    """

    def __init__(
        self,
        remote_device: str,
        module_cls: Callable[..., nn.Module],
        args: Sequence[Any] | None = None,
        kwargs: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__(remote_device, module_cls, args, kwargs)


# ---- what a module that lives elsewhere cannot do, and what does it

_NOT_SUPPORTED: dict[str, str] = {
    **dict.fromkeys(
        (
            "add_module", "apply", "bfloat16", "buffers", "children", "cpu", "cuda", "double", "extra_repr", "float",
            "get_buffer", "get_submodule", "half", "ipu", "modules", "named_buffers", "named_children",
            "named_modules", "register_backward_hook", "register_buffer", "register_forward_hook",
            "register_forward_pre_hook", "register_full_backward_hook", "register_full_backward_pre_hook",
            "register_module", "register_parameter", "requires_grad_", "share_memory", "to", "to_empty", "type", "xpu",
            "zero_grad",
        ),
        "",
    ),
    "get_parameter": "remote_parameters",
    "load_state_dict": "load_remote_state_dict",
    "named_parameters": "remote_parameters",
    "parameters": "remote_parameters",
    "state_dict": "remote_state_dict",
}  # fmt: skip


def _refusing(name: str, instead: str) -> Callable[..., NoReturn]:
    advice = f". Please use ``{instead}`` instead." if instead else ""

    def method(self: _RemoteModule, *args: Any, **kwargs: Any) -> NoReturn:
        raise ValueError(f"Method ``{name}`` not supported for RemoteModule{advice}")

    method.__name__ = name
    method.__qualname__ = f"_RemoteModule.{name}"
    return method


for _name, _instead in _NOT_SUPPORTED.items():
    setattr(_RemoteModule, _name, _refusing(_name, _instead))


# ---- forward: the module itself is called, so that its hooks, and what normalizes its weights by them, run


def _forward_async(
    module_rref: RRef[nn.Module], device: torch.device, is_device_map_set: bool, /, *args: Any, **kwargs: Any
) -> Future[Any]:
    """Start a call of the module and return a future of what it returns."""
    if device.type == "cpu":
        result: Future[Any] = module_rref.rpc_async().__call__(*args, **kwargs)
        return result
    moving = module_rref, device, is_device_map_set, args, kwargs
    return api.rpc_async(module_rref.owner(), _forward_on_device, moving)


def _forward(
    module_rref: RRef[nn.Module], device: torch.device, is_device_map_set: bool, /, *args: Any, **kwargs: Any
) -> Any:
    """Call the module and return what it returns."""
    if device.type == "cpu":
        return module_rref.rpc_sync().__call__(*args, **kwargs)
    moving = module_rref, device, is_device_map_set, args, kwargs
    return api.rpc_sync(module_rref.owner(), _forward_on_device, moving)


def _forward_on_device(
    module_rref: RRef[nn.Module],
    device: torch.device,
    is_device_map_set: bool,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> Any:
    """On the owner: call the module with arguments on its device, and give back what can travel."""
    result = module_rref.local_value()(*_moved(args, device), **_moved(kwargs, device))
    return result if is_device_map_set else _moved(result, torch.device("cpu"))


def _moved(value: Any, device: torch.device) -> Any:
    """Return a value with the tensors in it on a device. It looks into tuples, lists and dicts, as they come."""
    if isinstance(value, torch.Tensor):
        return value.to(device)
    kind = type(value)
    if kind is tuple or kind is list:
        return kind(_moved(item, device) for item in value)
    if kind is dict:
        return {key: _moved(item, device) for key, item in value.items()}
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return kind(*(_moved(item, device) for item in value))
    return value


# ---- what runs on the owner


def _create_module(
    module_cls: Callable[..., nn.Module], args: tuple[Any, ...], kwargs: dict[str, Any], device: str
) -> nn.Module:
    module = module_cls(*args, **kwargs)
    if not isinstance(module, nn.Module):
        raise ValueError(
            "Expect `module_cls(*args, **kwargs)` returns an instance of <class nn.Module>, but it returns an instance"
            f" of {type(module)}."
        )
    return module.to(device)


def _parameters(module_rref: RRef[nn.Module], recurse: bool) -> list[RRef[nn.Parameter]]:
    return [RRef(parameter) for parameter in module_rref.local_value().parameters(recurse)]


def _state_dict(module_rref: RRef[nn.Module]) -> OrderedDict[str, Any]:
    state: Any = module_rref.local_value().state_dict()
    for name, value in state.items():  # in place: what torch keeps beside the entries stays with them
        state[name] = _moved(value, torch.device("cpu"))
    found: OrderedDict[str, Any] = state
    return found


def _load_state_dict(module_rref: RRef[nn.Module], state_dict: Mapping[str, Any], strict: bool) -> Any:
    return module_rref.local_value().load_state_dict(state_dict, strict)


def _set_training(module_rref: RRef[nn.Module], mode: bool) -> None:
    module_rref.local_value().train(mode)


# ---- how it travels


def _reduce(remote_module: RemoteModule) -> tuple[Any, ...]:
    """Say how a remote module is pickled in calls: by its reference."""
    attributes = vars(remote_module)
    for name in attributes:
        if name not in _REMOTE_MODULE_PICKLED_ATTRIBUTES and name not in _REMOTE_MODULE_ATTRIBUTES_IGNORE_FOR_PICKLING:
            warnings.warn(f"the attribute {name!r} of a RemoteModule does not travel with it", stacklevel=2)
    return _receive, tuple(attributes[name] for name in _REMOTE_MODULE_PICKLED_ATTRIBUTES)


def _receive(*attributes: Any) -> RemoteModule:
    remote_module = object.__new__(RemoteModule)
    for name, value in zip(_REMOTE_MODULE_PICKLED_ATTRIBUTES, attributes, strict=True):
        setattr(remote_module, name, value)
    remote_module._bind()
    return remote_module


register_reducer(RemoteModule, _reduce)
