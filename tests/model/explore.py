"""Search every state of a model, breadth first, for a broken promise.

A model is any object with the methods of `Model`. Its states are
hashable values, its actions are tuples, and nothing else is assumed.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Hashable, Iterable
from typing import NamedTuple, Protocol

__all__ = ["Model", "Result", "explore", "follow"]

Action = tuple


class Model(Protocol):
    """What `explore` asks of a model."""

    def initial(self) -> Hashable:
        """Return the state everything starts from."""

    def enabled(self, state: Hashable) -> Iterable[Action]:
        """Yield what may happen next."""

    def apply(self, state: Hashable, action: Action) -> Hashable:
        """Return the state after an enabled action."""

    def outside(self, action: Action) -> bool:
        """Return whether an action is fate's, so that nobody may wait for it."""

    def violation(self, state: Hashable) -> str | None:
        """Return the safety promise that this state breaks, or None."""

    def unfinished(self, state: Hashable) -> str | None:
        """Return what is left over when nothing more happens by itself, or None."""


class Result(NamedTuple):
    """What a search found.

    Parameters
    ----------
    states : number of different states seen
    finals : number of states in which nothing more happens by itself
    problem : the broken promise, or None when all of them hold
    trace : a shortest sequence of actions that breaks it
    """

    states: int
    finals: int
    problem: str | None
    trace: list[Action]


class _Paths:
    """Every state found, with the action that led there first."""

    def __init__(self, first: Hashable) -> None:
        self.number: dict[Hashable, int] = {first: 0}
        self._parent = [0]
        self._action: list[Action] = [()]

    def add(self, state: Hashable, parent: int, action: Action) -> int:
        index = self.number[state] = len(self._parent)
        self._parent.append(parent)
        self._action.append(action)
        return index

    def to(self, index: int) -> list[Action]:
        trace = []
        while index:
            trace.append(self._action[index])
            index = self._parent[index]
        return trace[::-1]


def explore(model: Model) -> Result:
    """Visit every reachable state and check safety and liveness.

    Safety is checked in every state. Liveness means that the graph of
    states has no cycle, so that every run ends, and that every state from
    which only fate leads on is one the model calls finished.

    Returns
    -------
    Result
        Of the first problem met, which is one with a shortest trace, or
        of the whole search.
    """
    first = model.initial()
    paths, edges, finals = _Paths(first), [], 0
    queue = deque([first])
    while queue:
        state = queue.popleft()
        here = paths.number[state]
        following = []
        final = True
        for action in model.enabled(state):
            final = final and model.outside(action)
            after = model.apply(state, action)
            index = paths.number.get(after)
            if index is None:
                index = paths.add(after, here, action)
                problem = model.violation(after)
                if problem:
                    return Result(len(paths.number), finals, problem, paths.to(index))
                queue.append(after)
            following.append(index)
        edges.append(following)
        if final:
            finals += 1
            problem = model.unfinished(state)
            if problem:
                return Result(len(paths.number), finals, problem, paths.to(here))
    turn = _on_a_cycle(edges)
    if turn is None:
        return Result(len(paths.number), finals, None, [])
    return Result(len(paths.number), finals, "the steps can go round for ever", paths.to(turn))


def follow(model: Model, trace: Iterable[Action]) -> list[Hashable]:
    """Return the states along a trace, the initial one first."""
    states = [model.initial()]
    for action in trace:
        states.append(model.apply(states[-1], action))
    return states


def _on_a_cycle(edges: list[list[int]]) -> int | None:
    """Return a node on a cycle, or None; peels off what nothing leads to."""
    incoming = [0] * len(edges)
    for following in edges:
        for target in following:
            incoming[target] += 1
    bare = [node for node, count in enumerate(incoming) if count == 0]
    peeled = 0
    while bare:
        peeled += 1
        for target in edges[bare.pop()]:
            incoming[target] -= 1
            if incoming[target] == 0:
                bare.append(target)
    if peeled == len(edges):
        return None
    # Every node left has a predecessor that is left: walking back must repeat.
    before = {t: node for node, following in enumerate(edges) if incoming[node] for t in following if incoming[t]}
    node, seen = next(iter(before)), set()
    while node not in seen:
        seen.add(node)
        node = before[node]
    return node
