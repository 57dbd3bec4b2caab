"""One optimizer for parameters of many workers: each worker steps its own, all at the same time."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch

from fastref import api, autograd
from fastref.futures import Future
from fastref.optim.local import LocalOptimizer, LocalState, make_local_optimizer
from fastref.options import WorkerInfo
from fastref.rref import RRef

__all__ = ["DistributedOptimizer"]


class DistributedOptimizer:
    """Steps parameters where they live, with the gradients of a distributed autograd context.

    Each owner of parameters has an optimizer of torch's for them. Steps that share a parameter take turns on its owner,
    whoever asks for them; nothing orders a whole round of forward, backward and step of one client against that of
    another. Gradients are the context's alone: nothing adds up from step to step, there is nothing to set to zero, and
    the ``grad`` of a parameter is left as it was.

    Parameters
    ----------
    optimizer_class : type
        A subclass of ``torch.optim.Optimizer``, or a function that returns one.
    params_rref : iterable of RRef
        References to parameters, wherever they are.
    *args, **kwargs
        What ``optimizer_class`` is called with on each owner, beside the parameters.

    Attributes
    ----------
    remote_optimizers : list of RRef
        To the optimizer on each owner.
    is_functional_optim : bool
        False: no optimizer is compiled by TorchScript.

    Raises
    ------
    Exception
        What ``optimizer_class`` raised, with the name of the worker in its text.

    Source
    ------
    ``torch.distributed.optim.DistributedOptimizer``. Different on purpose: every optimizer runs as it is, where torch
    puts others without hooks and state in the place of some; only steps that have a parameter in common wait for each
    other; the state can be saved.
    """

    is_functional_optim = False

    def __init__(
        self,
        optimizer_class: Callable[..., torch.optim.Optimizer],
        params_rref: Iterable[RRef[torch.Tensor]],
        *args: Any,
        **kwargs: Any,
    ) -> None:
        found = list(params_rref)
        self._places: dict[WorkerInfo, list[int]] = {}
        for place, rref in enumerate(found):
            self._places.setdefault(rref.owner(), []).append(place)
        self._size = len(found)
        making = [
            api.rpc_async(
                owner, make_local_optimizer, (optimizer_class, [found[place] for place in places], args, kwargs)
            )
            for owner, places in self._places.items()
        ]
        self.remote_optimizers: list[RRef[LocalOptimizer]] = _wait_for_all(making)

    def step(self, context_id: int) -> None:
        """Step all parameters with the gradients of a context, and return when all owners have done so.

        Parameters
        ----------
        context_id : int
            What ``fastref.autograd.context()`` gave, after ``backward``.

        Raises
        ------
        RuntimeError
            There is no such context.
        Exception
            What the optimizer raised on an owner, with the name of the worker in its text. The others have made their
            step. Of several errors it is the first, and the others are its notes.
        """
        autograd._is_valid_context(context_id)
        _wait_for_all([optimizer.rpc_async().step(context_id) for optimizer in self.remote_optimizers])

    def state_dict(self) -> dict[str, Any]:
        """Return the state of all owners' optimizers as one, in the form of ``torch.optim.Optimizer.state_dict``.

        Parameters are numbered as they were given to the constructor, wherever they live; each owner's are a group. It
        can be saved with ``torch.save``, and loaded by an optimizer whose parameters live elsewhere, or by one of
        torch's. Each owner's part is from between two steps; that no owner is a step ahead is up to the program.
        """
        parts = _wait_for_all([optimizer.rpc_async().state() for optimizer in self.remote_optimizers])
        state: dict[int, Any] = {}
        groups: list[dict[str, Any]] = []
        for places, part in zip(self._places.values(), parts, strict=True):
            state.update((places[place], value) for place, value in part.state.items())
            numbered = enumerate(part.groups)
            groups += [
                {**group, "params": [places[i] for i, other in enumerate(part.group_of) if other == number]}
                for number, group in numbered
            ]
        return {"state": state, "param_groups": groups}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Go on from a state that ``state_dict`` returned, here or of an optimizer with the same parameters.

        Parameters
        ----------
        state_dict : mapping
            Parameters are those with the same numbers. One of torch's own optimizers is as good.

        Raises
        ------
        ValueError
            It is of another number of parameters, or those of one owner had different settings.
        """
        group_of = {
            place: number for number, group in enumerate(state_dict["param_groups"]) for place in group["params"]
        }
        if group_of.keys() != set(range(self._size)):
            raise ValueError(f"a state of {len(group_of)} parameters does not fit an optimizer of {self._size}")
        groups = [
            {name: value for name, value in group.items() if name != "params"} for group in state_dict["param_groups"]
        ]
        loading = []
        for optimizer, places in zip(self.remote_optimizers, self._places.values(), strict=True):
            state = {i: state_dict["state"][place] for i, place in enumerate(places) if place in state_dict["state"]}
            part = LocalState(state, [group_of[place] for place in places], groups)
            loading.append(optimizer.rpc_async().load(part))
        _wait_for_all(loading)


def _wait_for_all(futures: Sequence[Future[Any]]) -> list[Any]:
    """Return the results of all. When some have failed, wait for all the same and raise the first error."""
    results, errors = [], []
    for future in futures:
        try:
            results.append(future.wait())
        except Exception as error:
            errors.append(error)
    if errors:
        for other in errors[1:]:
            errors[0].add_note(f"Besides: {other}")
        raise errors[0]
    return results
