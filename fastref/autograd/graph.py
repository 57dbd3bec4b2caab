"""The part of one worker's graph that a backward pass reaches, and in which order gradients that come let it run.

A pass enters a worker's graph at several places: at its roots, and at each send node whose tensors were used elsewhere.
What comes in at one may depend, by way of other workers, on what goes out because of another. So the graph is run in
rounds by torch's engine. A round runs the nodes that lead to an end, a receive node or a leaf tensor, of which all
entries that reach it have their gradients. What goes from these nodes to others is kept, and summed, until their round
comes; every node runs once in a pass, on the sum of all that comes to it.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch.autograd.graph import GradientEdge

from fastref.autograd.links import Received
from fastref.autograd.torch_names import AccumulateGrad, run_engine
from fastref.errors import UsageError

__all__ = ["LocalGraph"]

Edge = tuple[Any, int]  # a node, and which of its inputs
End = tuple[Any, list[Any]]  # a receive node or an AccumulateGrad, and the gradients that have come to it


class LocalGraph:
    """What one pass reaches on one worker.

    Parameters
    ----------
    context_id : int
        Receive nodes of another context cannot be reached.
    keep : bool
        What the nodes have saved stays, for another pass.
    """

    def __init__(self, context_id: int, keep: bool) -> None:
        self._context_id, self._keep = context_id, keep
        self._numbers: dict[Any, int] = {}
        self._nodes: list[Any] = []
        self._next: list[tuple[Edge, ...]] = []
        self._order: list[int] = []  # each behind all that it leads to
        self._is_in_order: list[bool] = []
        self._ends: list[int] = []
        self._entries: dict[int, int] = {}  # key of an entry -> its bit
        self._reached: list[int] = []  # entries that reach a node, a bit for each; made when the first gradients come
        self._roots: list[list[Edge]] = []  # of each entry
        self._arrived = 0
        self._sums: dict[tuple[int, int], Any] = {}
        self._ran: list[bool] = []

    def enter(self, key: int, edges: Iterable[Edge]) -> list[Any]:
        """Add an entry of the pass; return the receive nodes that only it reaches so far."""
        bit = self._entries[key] = len(self._roots)
        self._roots.append([(node, number) for node, number in edges])
        found: list[Any] = []
        for node, _ in self._roots[bit]:
            if node is not None and node not in self._numbers:
                self._visit(node, found)
        return found

    def has(self, key: int) -> bool:
        """Tell whether an entry is known."""
        return key in self._entries

    def _visit(self, start: Any, found: list[Any]) -> None:
        numbers, nodes, following, done = self._numbers, self._nodes, self._next, self._is_in_order
        stack = [start]
        while stack:
            node = stack[-1]
            number = numbers.get(node)
            if number is None:
                number = numbers[node] = len(nodes)
                nodes.append(node)
                done.append(False)
                kind = type(node)
                if kind is Received:
                    if node.context_id != self._context_id:
                        raise UsageError(
                            f"a tensor that came in autograd context {node.context_id} is used in a backward pass of"
                            f" context {self._context_id}"
                        )
                    found.append(node)
                    self._ends.append(number)
                    following.append(())
                elif kind is AccumulateGrad:
                    self._ends.append(number)
                    following.append(())
                else:
                    edges = node.next_functions
                    following.append(edges)
                    ahead = [other for other, _ in edges if other is not None and other not in numbers]
                    if ahead:
                        stack += ahead
                        continue
            stack.pop()
            if not done[number]:
                done[number] = True
                self._order.append(number)

    # ---- gradients

    def arrive(self, key: int, gradients: Iterable[Any]) -> bool:
        """Gradients have come for an entry's edges, None where there is none; False when they had come before."""
        bit = self._entries[key]
        if self._arrived >> bit & 1:
            return False
        self._arrived |= 1 << bit
        for (node, number), gradient in zip(self._roots[bit], gradients, strict=True):
            if node is not None and gradient is not None:
                self._add(self._numbers[node], number, gradient)
        return True

    @property
    def is_complete(self) -> bool:
        """Whether gradients have come for all entries."""
        return self._arrived == (1 << len(self._roots)) - 1

    def _add(self, node: int, number: int, gradient: Any) -> None:
        known = self._sums.get((node, number))
        self._sums[node, number] = gradient if known is None else known + gradient

    def run(self) -> list[End]:
        """Run what can be run; return the ends that have all their gradients now."""
        if self.is_complete:
            ready, self._ends = self._ends, []
            return self._run_round(ready, {})
        if not self._reached:
            self._find_reached()
        missing = ~self._arrived
        ready = [end for end in self._ends if not self._reached[end] & missing]
        if not ready:
            return []
        now = set(ready)
        self._ends = [end for end in self._ends if end not in now]
        return self._run_round(ready, self._running(now))

    def _find_reached(self) -> None:
        reached = self._reached = [0] * len(self._nodes)
        numbers = self._numbers
        for bit, edges in enumerate(self._roots):
            for node, _ in edges:
                if node is not None:
                    reached[numbers[node]] |= 1 << bit
        for number in reversed(self._order):
            mine = reached[number]
            for node, _ in self._next[number]:
                if node is not None:
                    reached[numbers[node]] |= mine
        self._ran = [False] * len(self._nodes)

    def _running(self, ready: set[int]) -> dict[int, list[tuple[int, int, int]]]:
        """Mark the nodes that lead to ``ready`` as run.

        Returns
        -------
        dict
            Node -> (which of its outputs, the node that it goes to, which input there), for all that does not run now.
        """
        numbers, ran = self._numbers, self._ran
        now: list[int] = []
        alive = set(ready)
        for number in self._order:
            if ran[number]:
                continue
            if any(node is not None and numbers[node] in alive for node, _ in self._next[number]):
                alive.add(number)
                now.append(number)
        crossing: dict[int, list[tuple[int, int, int]]] = {}
        for number in now:
            ran[number] = True
            leaving = [
                (output, numbers[node], place)
                for output, (node, place) in enumerate(self._next[number])
                if node is not None and numbers[node] not in alive
            ]
            if leaving:
                crossing[number] = leaving
        for number in ready:
            ran[number] = True
        return crossing

    def _run_round(self, ready: list[int], crossing: dict[int, list[tuple[int, int, int]]]) -> list[End]:
        nodes = self._nodes
        wanted: list[GradientEdge] = []
        for end in ready:
            node = nodes[end]
            count = node.count if type(node) is Received else 1
            wanted += [GradientEdge(node, place) for place in range(count)]
        if self.is_complete:
            sums, self._sums = self._sums, {}
        else:
            sums = {place: self._sums.pop(place) for place in list(self._sums) if self._ran[place[0]]}
        if not sums or not wanted:
            gradients: list[Any] = [None] * len(wanted)
        else:
            gradients = self._engine(sums, wanted, crossing)
        found: list[End] = []
        for end in reversed(ready):
            node = nodes[end]
            count = node.count if type(node) is Received else 1
            found.append((node, gradients[-count:]))
            del gradients[-count:]
        found.reverse()
        return found

    def _engine(self, sums: dict, wanted: list[GradientEdge], crossing: dict) -> list[Any]:
        nodes = self._nodes
        roots = [GradientEdge(nodes[node], place) for node, place in sums]
        values = list(sums.values())
        sums.clear()
        if not crossing:
            return run_engine(roots, values, self._keep, wanted)
        kept: list[tuple[int, int, Any]] = []
        handles = []
        try:
            for number, leaving in crossing.items():
                handles.append(nodes[number].register_hook(_keeper(leaving, kept)))
            return run_engine(roots, values, self._keep, wanted)
        finally:
            for handle in handles:
                handle.remove()
            for node, place, gradient in kept:
                self._add(node, place, gradient)


def _keeper(leaving: list[tuple[int, int, int]], kept: list[tuple[int, int, Any]]) -> Any:
    def keep(inputs: Any, outputs: Any) -> None:  # of the node's forward: what leaves it now are gradients of inputs
        for output, node, place in leaving:
            if inputs[output] is not None:
                kept.append((node, place, inputs[output]))

    return keep
