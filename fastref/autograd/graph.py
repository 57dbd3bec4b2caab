"""The part of one worker's graph that a backward pass reaches, and in which order gradients that come let it run.

A pass enters a worker's graph at several places: at its roots, and at each send node whose tensors were used elsewhere.
What comes in at one may depend, by way of other workers, on what goes out because of another. So the graph is run in
rounds. A round begins when an end, a receive node or a leaf tensor, has the gradients of all entries that reach it, and
runs all nodes of which that is true. What goes from these to others is kept, and summed, until their round comes: every
node runs once in a pass, on the sum of all that comes to it.

torch's engine runs a round in one go, unless something is left over for a node within the graph, or for a leaf tensor
with hooks: it would not compute that, or call the hooks for a part of the sum. Then it runs the nodes one by one.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch.autograd.graph import GradientEdge

from fastref.autograd.links import Received
from fastref.autograd.torch_names import AccumulateGrad, has_tensor_hooks, run_engine, run_node
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

    def is_apart_from(self, nodes: Iterable[Any]) -> bool:
        """Tell whether nothing that nodes lead to has been reached."""
        seen: set[Any] = set()
        stack = list(nodes)
        while stack:
            node = stack.pop()
            if node is None or node in seen:
                continue
            if node in self._numbers:
                return False
            seen.add(node)
            if type(node) is not Received:
                stack += [other for other, _ in node.next_functions]
        return True

    @property
    def entries(self) -> int:
        """How many entries are known."""
        return len(self._roots)

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
            sums, self._sums = self._sums, {}
            return self._paired(ready, self._engine(sums, self._edges_of(ready)))
        if not self._reached:
            self._find_reached()
        missing = ~self._arrived
        ready = [end for end in self._ends if not self._reached[end] & missing]
        if not ready:
            return []
        left = set(self._ends) - set(ready)
        self._ends = [end for end in self._ends if end in left]
        return self._paired(ready, self._run_round(ready))

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

    def _run_round(self, ready: list[int]) -> list[Any]:
        """Run the nodes of which all entries that reach them have come; what they give to others is kept."""
        nodes, numbers, reached, missing = self._nodes, self._numbers, self._reached, ~self._arrived
        ran = self._ran
        now = [
            node for node in reversed(self._order) if self._next[node] and not (reached[node] & missing or ran[node])
        ]
        partial = {
            numbers[node] for number in now for node, _ in self._next[number] if node is not None
            if reached[numbers[node]] & missing
        }  # fmt: skip
        for number in now:
            ran[number] = True
        if all(type(nodes[end]) is AccumulateGrad and not has_tensor_hooks(nodes[end]) for end in partial):
            return self._run_by_engine(now, ready, sorted(partial))
        for number in now:
            self._step(number)
        return self._engine(self._take(ready), self._edges_of(ready))

    def _run_by_engine(self, now: list[int], ready: list[int], partial: list[int]) -> list[Any]:
        """Run nodes that lead nowhere but to ends; parts of sums at leaf tensors, without hooks, are kept."""
        wanted = self._edges_of(ready)
        found = self._engine(self._take([*now, *ready]), [*wanted, *self._edges_of(partial)])
        for end, gradient in zip(partial, found[len(wanted) :], strict=True):
            if gradient is not None:
                self._add(end, 0, gradient)
        del found[len(wanted) :]
        return found

    def _step(self, number: int) -> None:
        """Run one node, all of whose gradients are there."""
        sums = self._take([number])
        if not sums:
            return
        edges = [GradientEdge(self._nodes[node], place) for node, place in sums]
        found = run_node(self._nodes[number], edges, list(sums.values()), self._keep)
        for (node, place), gradient in zip(self._next[number], found, strict=True):
            if node is not None and gradient is not None:
                self._add(self._numbers[node], place, gradient)

    def _take(self, numbers: list[int]) -> dict[tuple[int, int], Any]:
        """Take what has come to nodes out of the sums."""
        wanted = set(numbers)
        return {place: self._sums.pop(place) for place in list(self._sums) if place[0] in wanted}

    def _edges_of(self, ends: list[int]) -> list[GradientEdge]:
        return [GradientEdge(self._nodes[end], place) for end in ends for place in range(_width(self._nodes[end]))]

    def _engine(self, sums: dict[tuple[int, int], Any], wanted: list[GradientEdge]) -> list[Any]:
        if not sums or not wanted:
            return [None] * len(wanted)
        roots = [GradientEdge(self._nodes[node], place) for node, place in sums]
        values = list(sums.values())
        sums.clear()
        return run_engine(roots, values, self._keep, wanted)

    def _paired(self, ends: list[int], gradients: list[Any]) -> list[End]:
        """Return each end with its gradients, which nothing else holds."""
        found: list[End] = []
        gradients.reverse()
        for end in ends:
            node = self._nodes[end]
            found.append((node, [gradients.pop() for _ in range(_width(node))]))
        return found


def _width(end: Any) -> int:
    """Return how many gradients come to a receive node, or to a leaf tensor."""
    return end.count if type(end) is Received else 1
