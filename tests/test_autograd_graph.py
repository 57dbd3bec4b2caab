"""One worker's graph, entered at several places: every node runs once, on the whole of its gradient, in any order."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from torch.autograd.graph import get_gradient_edge

from fastref.autograd.graph import LocalGraph
from fastref.autograd.links import Received, receive_node
from fastref.errors import UsageError

CONTEXT, SENDER = 7, 1


class Counted(torch.autograd.Function):
    """Counts how often its nodes run."""

    runs: dict[int, int] = {}

    @staticmethod
    def forward(ctx: Any, value: torch.Tensor, number: int) -> torch.Tensor:
        ctx.number = number
        return value * 2

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> Any:
        Counted.runs[ctx.number] = Counted.runs.get(ctx.number, 0) + 1
        return gradient * 2, None


class Plot:
    """A graph made at random over leaf and received tensors, with its entries, and gradients for them."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        torch.manual_seed(seed)
        self.leaves = [self.numbers(3).requires_grad_() for _ in range(3)]
        self.received = [self.numbers(3) for _ in range(3)]
        receive_node(CONTEXT, SENDER, 1, self.received[:2])
        receive_node(CONTEXT, SENDER, 2, self.received[2:])
        pool = self.leaves + self.received
        for number in range(self.random.randint(3, 14)):
            pool.append(self.made(self.random.choice(pool), self.random.choice(pool), number))
        count = self.random.randint(1, 4)
        self.entries = [self.random.choices(pool[-6:], k=self.random.randint(1, 2)) for _ in range(count)]
        self.gradients = [[self.numbers(*value.shape) for value in entry] for entry in self.entries]

    def numbers(self, *shape: int) -> torch.Tensor:
        # Whole ones: their sums are the same in every order.
        return torch.randint(-3, 4, shape, dtype=torch.float64)

    def made(self, a: torch.Tensor, b: torch.Tensor, number: int) -> torch.Tensor:
        kind = self.random.choice(("mul", "add", "counted", "stack", "broadcast"))
        if kind == "mul":
            return a * b.sign()
        if kind == "add":
            return a - b
        if kind == "stack":
            return torch.stack((a, b)).sum(0)
        if kind == "broadcast":
            return a + b.sum()
        return Counted.apply(a, number)

    def graph(self, keep: bool = True) -> LocalGraph:
        graph = LocalGraph(CONTEXT, keep)
        for number, entry in enumerate(self.entries):
            edges = [get_gradient_edge(value) for value in entry]
            graph.enter(number, [(edge.node, edge.output_nr) for edge in edges])
        return graph

    def run(self, graph: LocalGraph) -> dict[Any, torch.Tensor | None]:
        """Let gradients come in an order made at random; return what arrives at each end."""
        order = list(range(len(self.entries)))
        self.random.shuffle(order)
        found: dict[Any, torch.Tensor | None] = {}
        for number in order:
            assert graph.arrive(number, self.gradients[number])
            for node, gradients in graph.run():
                is_received = type(node) is Received
                ends = [(node.link, place) for place in range(node.count)] if is_received else [node.variable]
                for end, gradient in zip(ends, gradients, strict=True):
                    assert end not in found
                    found[end] = gradient
        assert graph.is_complete
        return found

    def expected(self) -> list[torch.Tensor | None]:
        values = [value for entry in self.entries for value in entry]
        gradients = [gradient for of_entry in self.gradients for gradient in of_entry]
        ends = self.leaves + self.received
        found = torch.autograd.grad(values, ends, gradients, retain_graph=True, allow_unused=True)
        return list(found)

    def ends(self) -> list[Any]:
        return [*self.leaves, (1, 0), (1, 1), (2, 0)]


@pytest.mark.parametrize("slice_of_seeds", range(8))
def test_gradients_are_those_of_one_pass_and_every_node_runs_once(slice_of_seeds: int) -> None:
    for seed in range(slice_of_seeds * 100, slice_of_seeds * 100 + 100):
        plot = Plot(seed)
        Counted.runs.clear()
        expected = plot.expected()
        once = dict(Counted.runs)
        Counted.runs.clear()
        found = plot.run(plot.graph())
        assert Counted.runs == once, seed
        for end, gradient in zip(plot.ends(), expected, strict=True):
            got = found.get(end)
            assert (got is None) == (gradient is None), seed
            assert gradient is None or torch.equal(got, gradient), seed


@pytest.mark.parametrize("seed", range(60))
def test_hooks_of_tensors_see_the_whole_gradient_once(seed: int) -> None:
    plot = Plot(seed)
    seen: list[tuple[int, torch.Tensor]] = []
    watched = plot.leaves + plot.received + [value for entry in plot.entries for value in entry]
    for number, value in enumerate(watched):

        def note(gradient: torch.Tensor | None, number: int = number) -> None:
            if gradient is not None:  # torch calls hooks of one output with None when another has a gradient
                seen.append((number, gradient.clone()))

        value.register_hook(note)
    plot.expected()
    expected, seen[:] = sorted(seen, key=lambda one: one[0]), []
    plot.run(plot.graph())
    seen.sort(key=lambda one: one[0])
    assert [number for number, _ in seen] == [number for number, _ in expected]
    assert all(torch.equal(a, b) for (_, a), (_, b) in zip(seen, expected, strict=True))


def test_an_end_goes_out_as_soon_as_all_that_reaches_it_has_come() -> None:
    (early, late) = received = [torch.ones(2), torch.ones(2)]
    receive_node(CONTEXT, SENDER, 1, [early])
    receive_node(CONTEXT, SENDER, 2, [late])
    leaf = torch.ones(2, requires_grad=True)
    first, second = (received[0] * leaf).sum(), (received[1] * leaf).sum()
    graph = LocalGraph(CONTEXT, keep=False)
    for number, value in enumerate((first, second)):
        found = graph.enter(number, [(value.grad_fn, 0)])
        assert [node.link for node in found] == [number + 1]
    graph.arrive(0, [torch.ones(())])
    assert [node.link for node, _ in graph.run()] == [1]
    assert graph.run() == []
    graph.arrive(1, [torch.ones(())])
    ends = dict(graph.run())
    assert torch.equal(ends[leaf_node(leaf)][0], torch.full((2,), 2.0))
    assert len(ends) == 2


def leaf_node(leaf: torch.Tensor) -> Any:
    return get_gradient_edge(leaf).node


def test_what_has_no_gradient_is_an_end_without_one() -> None:
    received = [torch.ones(2)]
    receive_node(CONTEXT, SENDER, 1, received)
    value = received[0] * 2
    graph = LocalGraph(CONTEXT, keep=False)
    graph.enter(5, [(value.grad_fn, 0)])
    graph.arrive(5, [None])
    assert [gradients for _, gradients in graph.run()] == [[None]]


def test_gradients_that_come_twice_count_once() -> None:
    leaf = torch.ones(2, requires_grad=True)
    graph = LocalGraph(CONTEXT, keep=False)
    graph.enter(1, [(leaf_node(leaf), 0)])
    assert graph.arrive(1, [torch.ones(2)])
    assert not graph.arrive(1, [torch.ones(2)])
    assert [gradients[0].tolist() for _, gradients in graph.run()] == [[1.0, 1.0]]


def test_a_tensor_of_another_context_is_no_part_of_a_pass() -> None:
    received = [torch.ones(2)]
    receive_node(CONTEXT + 1, SENDER, 1, received)
    with pytest.raises(UsageError, match="came in autograd context 8 is used in a backward pass of context 7"):
        LocalGraph(CONTEXT, keep=False).enter(1, [((received[0] * 2).grad_fn, 0)])


def test_a_local_pass_through_a_received_tensor_says_which_function_to_call() -> None:
    received = [torch.ones(2)]
    receive_node(CONTEXT, SENDER, 1, received)
    with pytest.raises(UsageError, match="run the pass by fastref.autograd.backward"):
        received[0].sum().backward()
