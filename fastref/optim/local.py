"""What of a distributed optimizer lives with the parameters: an optimizer of torch's, and its state."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch

from fastref import autograd
from fastref.errors import UsageError
from fastref.optim.turns import Turns
from fastref.rref import RRef

__all__ = ["LocalOptimizer", "LocalState", "make_local_optimizer"]

# Of this process: optimizers of several programs may have parameters in common.
_turns = Turns()


class LocalState(NamedTuple):
    """What an optimizer remembers of its parameters, each known by its place among them.

    Parameters
    ----------
    state : dict of int to object
        By parameter; those that were never stepped have none.
    group_of : list of int
        By parameter, which group it is in.
    groups : list of dict
        By group, its settings (learning rate and so on) without its parameters.
    """

    state: dict[int, Any]
    group_of: list[int]
    groups: list[dict[str, Any]]


class LocalOptimizer:
    """Steps parameters of this worker.

    Parameters
    ----------
    optimizer_class : type
        A subclass of ``torch.optim.Optimizer``, or a function that returns one.
    params_rref : sequence of RRef
        References to parameters of this worker.
    args, kwargs
        What ``optimizer_class`` is called with beside the parameters.
    """

    def __init__(
        self,
        optimizer_class: Callable[..., torch.optim.Optimizer],
        params_rref: Sequence[RRef[torch.Tensor]],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> None:
        self._parameters = [rref.local_value() for rref in params_rref]
        self.optimizer = optimizer_class(self._parameters, *args, **kwargs)

    def step(self, context_id: int) -> None:
        """Make one step with the gradients of a context, and leave the ``grad`` of the parameters as it was.

        A parameter that has no gradient in the context has none for the optimizer either, whatever its ``grad`` is.
        """
        gradients = autograd.get_gradients(context_id)
        with _turns.take(self._parameters):
            before = [parameter.grad for parameter in self._parameters]
            try:
                for parameter in self._parameters:
                    parameter.grad = gradients.get(parameter)
                self.optimizer.step()
            finally:
                for parameter, gradient in zip(self._parameters, before, strict=True):
                    parameter.grad = gradient

    def state(self) -> LocalState:
        """Return a copy of the state, between two steps, its tensors on the processor.

        Raises
        ------
        UsageError
            The optimizer keeps something that belongs to none of the parameters.
        """
        with _turns.take(self._parameters):
            packed = _copied(self.optimizer.state_dict())
        places = self._places()
        state = {}
        for key, value in packed["state"].items():
            if not isinstance(key, int):
                raise UsageError(f"{type(self.optimizer).__name__} keeps state under {key!r}, which is no parameter")
            state[places[key]] = value
        groups = packed["param_groups"]
        group_of = {places[key]: number for number, group in enumerate(groups) for key in group.pop("params")}
        return LocalState(state, [group_of[place] for place in range(len(self._parameters))], groups)

    def load(self, saved: LocalState) -> None:
        """Go on from a state.

        Raises
        ------
        ValueError
            Parameters that are one group here had different settings.
        """
        with _turns.take(self._parameters):
            places = self._places()
            packed = self.optimizer.state_dict()
            groups = []
            for group in packed["param_groups"]:
                numbers = sorted({saved.group_of[places[key]] for key in group["params"]})
                first = saved.groups[numbers[0]] if numbers else group
                for number in numbers[1:]:
                    _check_equal(first, saved.groups[number])
                groups.append({**first, "params": group["params"]})
            state = {key: saved.state[place] for key, place in places.items() if place in saved.state}
            self.optimizer.load_state_dict({**packed, "state": state, "param_groups": groups})

    def _places(self) -> dict[int, int]:
        """Return, by torch's number for a parameter in states, its place among the parameters.

        torch numbers them in the order of the groups, which the optimizer's class may have made as it liked.
        """
        place_of = {id(parameter): place for place, parameter in enumerate(self._parameters)}
        ordered = [parameter for group in self.optimizer.param_groups for parameter in group["params"]]
        return {number: place_of[id(parameter)] for number, parameter in enumerate(ordered)}


def make_local_optimizer(
    optimizer_class: Callable[..., torch.optim.Optimizer],
    params_rref: Sequence[RRef[torch.Tensor]],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> RRef[LocalOptimizer]:
    """Return a reference to a new optimizer on this worker."""
    return RRef(LocalOptimizer(optimizer_class, params_rref, args, kwargs))


def _copied(value: Any) -> Any:
    """Return a copy in which no tensor shares memory with an optimizer, or is on a device."""
    if isinstance(value, torch.Tensor):
        return value.detach().to("cpu", copy=True)
    if isinstance(value, Mapping):
        return {key: _copied(item) for key, item in value.items()}
    if type(value) in (list, tuple):
        return type(value)(_copied(item) for item in value)
    return copy.deepcopy(value)


def _check_equal(settings: Mapping[str, Any], others: Mapping[str, Any]) -> None:
    for name in settings.keys() | others.keys():
        one, other = settings.get(name), others.get(name)
        if isinstance(one, torch.Tensor) or isinstance(other, torch.Tensor):
            same = isinstance(one, torch.Tensor) and isinstance(other, torch.Tensor) and torch.equal(one, other)
        else:
            same = bool(one == other)
        if not same:
            raise ValueError(
                f"parameters that are one group of an optimizer here had different settings: {name} was {one!r} and"
                f" {other!r}"
            )
