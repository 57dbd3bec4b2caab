"""The names of torch that distributed autograd uses and torch does not promise: this torch has them all."""

from __future__ import annotations

import operator

import pytest
import torch
from torch.autograd.graph import get_gradient_edge

from fastref.autograd import torch_names
from fastref.autograd.links import Received, receive_node, send_node


@pytest.mark.parametrize("name", torch_names.PRIVATE)
def test_this_torch_has(name: str) -> None:
    operator.attrgetter(name.removeprefix("torch."))(torch)


def test_the_graph_ends_in_nodes_that_know_their_leaf_and_take_hooks() -> None:
    leaf = torch.ones(2, requires_grad=True)
    node = get_gradient_edge(leaf).node
    assert type(node) is torch_names.AccumulateGrad
    assert node.variable is leaf
    assert node.next_functions == ()
    before, behind = torch_names.hooks_of(node)
    assert not before and not behind
    handles = node.register_prehook(print), node.register_hook(print)
    assert [list(hooks.values()) for hooks in torch_names.hooks_of(node)] == [[print], [print]]
    for handle in handles:
        handle.remove()
    assert not before and not behind


def test_the_engine_brings_gradients_to_inner_edges_and_runs_nothing_behind_them() -> None:
    leaf = torch.ones(2, requires_grad=True)
    inner = leaf * 2
    inner.register_hook(lambda gradient: gradient * 10)
    loss = (inner * 3).sum()
    edges = [get_gradient_edge(loss)]
    found = torch_names.run_engine(edges, [torch.ones(())], False, [get_gradient_edge(inner)])
    assert [one.tolist() for one in found] == [[30.0, 30.0]]
    assert leaf.grad is None


def test_one_node_runs_alone_and_what_it_gives_is_of_the_right_shape() -> None:
    row, scalar = torch.ones(3, requires_grad=True), torch.ones((), requires_grad=True)
    total = row * 1 + scalar * 1
    edge = get_gradient_edge(total)
    found = torch_names.run_node(edge.node, [edge], [torch.ones(3)], False)
    assert [one.tolist() for one in found] == [[1.0, 1.0, 1.0], 3.0]
    assert row.grad is None and scalar.grad is None
    total.sum().backward()  # the hook that stopped it is gone
    assert scalar.grad is not None


def test_send_and_receive_nodes_have_torchs_names_and_hold_their_tensors_places() -> None:
    leaf = torch.ones(2, requires_grad=True)
    made = leaf * 2
    node = send_node([leaf, made])
    assert node.name() == "torch::distributed::autograd::SendRpcBackward"
    assert [other for other, _ in node.next_functions] == [get_gradient_edge(leaf).node, made.grad_fn]
    tensors = [torch.ones(2), torch.nn.Parameter(torch.ones(3), requires_grad=False), torch.eye(2).to_sparse()]
    received = receive_node(1, 2, 3, tensors)
    assert type(received) is Received
    assert received.name() == "torch::distributed::autograd::RecvRpcBackward"
    assert [tensor.grad_fn is received and tensor.output_nr for tensor in tensors] == [0, 1, 2]
    assert (received.context_id, received.rank, received.link, received.count) == (1, 2, 3, 3)
