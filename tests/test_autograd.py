"""Gradients come back over every kind of call, and accumulate in the context of the pass."""

from __future__ import annotations

import gc
import threading
from typing import Any

import pytest
import torch

import fastref
import fastref.autograd as autograd
import fastref.rpc as rpc
from fastref.errors import BackwardError, UsageError
from tests import autograd_work as work
from tests.jobs import in_job, job_fixtures

jobs, job = job_fixtures(4)


def leaf(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64, requires_grad=True)


def check(found: dict[torch.Tensor, torch.Tensor], expected: dict[torch.Tensor, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    for tensor, gradient in expected.items():
        assert torch.equal(found[tensor], gradient)


def local(loss: torch.Tensor, *leaves: torch.Tensor) -> dict[torch.Tensor, torch.Tensor]:
    return dict(zip(leaves, torch.autograd.grad(loss, leaves), strict=True))


# ---- kinds of calls


@in_job
@pytest.mark.parametrize("kind", ["sync", "async", "remote", "self"])
def test_gradients_come_back_over(kind: str) -> None:
    a, b = leaf(1, 2), leaf(3, 5)
    with autograd.context() as context_id:
        if kind == "async":
            result = rpc.rpc_async("w1", work.mul, (a, b)).wait()
        elif kind == "remote":
            result = rpc.remote("w1", work.mul, (a, b)).to_here()
        else:
            result = rpc.rpc_sync("w0" if kind == "self" else "w1", work.mul, (a, b))
        autograd.backward(context_id, [(result * result).sum()])
        check(autograd.get_gradients(context_id), local((a * b * a * b).sum(), a, b))
    assert a.grad is None and b.grad is None


@in_job
@pytest.mark.parametrize("how", ["rpc_sync", "rpc_async", "remote"])
def test_gradients_come_back_through_methods_of_references(how: str) -> None:
    x = leaf(1, 2)
    rref = rpc.remote("w1", work.Layer, ([3.0, 4.0],))
    with autograd.context() as context_id:
        result = getattr(rref, how)().forward(x)
        if how != "rpc_sync":
            result = result.wait() if how == "rpc_async" else result.to_here()
        autograd.backward(context_id, [result.sum()])
        weight = leaf(3, 4)
        expected = local((weight * x).tanh().sum(), x, weight)
        check(autograd.get_gradients(context_id), {x: expected[x]})
        assert torch.equal(rref.rpc_sync().gradient(context_id), expected[weight])


@in_job
def test_tensors_are_linked_wherever_they_are_in_arguments_and_results() -> None:
    a, b, c = leaf(1, 2), leaf(3, 5), leaf(7, 8)
    with autograd.context() as context_id:
        result = rpc.rpc_sync("w1", work.parts, kwargs={"value": {"a": [a, c.detach()], "b": b}})
        loss = (result["sum"] * result["both"][0] * result["both"][1][0]).sum()
        autograd.backward(context_id, [loss])
        check(autograd.get_gradients(context_id), local(((a + b) * a * b * 2).sum(), a, b))


class Opaque:
    def __init__(self, value: Any) -> None:
        self.value = value


def inside(one: Opaque) -> Opaque:
    return Opaque([one.value * 2])


@in_job
def test_tensors_are_linked_in_what_takes_pickle_too() -> None:
    a = leaf(1, 2)
    view = (a * 3)[:1]
    with autograd.context() as context_id:
        result = rpc.rpc_sync("w1", inside, (Opaque(a),))
        shared = rpc.rpc_sync("w1", work.echo, ({"all": a, "view": view, "none": {1, 2}},))
        autograd.backward(context_id, [result.value[0].sum() + shared["all"].sum() + shared["view"].sum()])
        check(autograd.get_gradients(context_id), {a: torch.tensor([6.0, 3.0], dtype=torch.float64)})


@in_job
def test_a_tensor_met_twice_arrives_once_and_gets_the_sum() -> None:
    a = leaf(1, 2)
    with autograd.context() as context_id:
        result = rpc.rpc_sync("w1", work.mul, (a, a))
        autograd.backward(context_id, [result.sum()])
        check(autograd.get_gradients(context_id), local((a * a).sum(), a))


@in_job
def test_nested_calls_inherit_the_context_and_bring_gradients_back() -> None:
    a, b = leaf(1, 2), leaf(3, 5)
    with autograd.context() as context_id:
        assert rpc.rpc_sync("w1", work.through, ("w2", work.context_of_thread)) == context_id
        result = rpc.rpc_sync("w1", work.through, ("w2", work.through, "w3", work.mul, a, b))
        autograd.backward(context_id, [result.sum()])
        check(autograd.get_gradients(context_id), local((a * b).sum(), a, b))
        # There and back through each.
        links = [rpc.rpc_sync(name, work.links, (context_id,)) for name in ("w1", "w2", "w3")]
        assert links == [(2, 2), (2, 2), (1, 1)]
    work.wait_everywhere("w1", "w2", "w3")


@in_job
def test_a_nested_call_may_come_back_to_who_began() -> None:
    a, b = leaf(1, 2), leaf(3, 5)
    with autograd.context() as context_id:
        result = rpc.rpc_sync("w1", work.through, ("w0", work.mul, a, b))
        result = rpc.rpc_sync("w1", work.mul, (result, a + result))
        autograd.backward(context_id, [result.sum()])
        check(autograd.get_gradients(context_id), local((a * b * (a + a * b)).sum(), a, b))


@in_job
def test_branches_of_several_workers_come_together() -> None:
    a = leaf(1, 2)
    with autograd.context() as context_id:
        result = rpc.rpc_sync("w1", work.through_futures, (["w0", "w2", "w3"], a))
        autograd.backward(context_id, [(result * a).sum()])
        check(autograd.get_gradients(context_id), local((6 * a * a).sum(), a))


@in_job
def test_functions_that_answer_later_keep_the_context() -> None:
    a, b = leaf(1, 2), leaf(3, 5)
    with autograd.context() as context_id:
        result = rpc.rpc_sync("w1", work.later, ("w2", a, b))
        again = rpc.rpc_sync("w1", work.later_twice, ("w2", "w3", a))
        autograd.backward(context_id, [(result * again).sum()])
        check(autograd.get_gradients(context_id), local(((a * b + a) * (3 * a * a)).sum(), a, b))
        assert rpc.rpc_sync("w3", work.links, (context_id,)) == (1, 1)


@in_job
def test_a_thread_that_served_a_context_is_in_none_afterwards() -> None:
    with autograd.context():
        assert rpc.rpc_sync("w1", work.has_context)
        assert rpc.rpc_async("w1", work.has_context).wait()
    for _ in range(20):
        assert not rpc.rpc_sync("w1", work.has_context)


@in_job
def test_three_workers_that_share_a_reference_add_to_one_gradient() -> None:
    rref = rpc.remote("w1", work.Layer, ([2.0, 3.0],))
    x = leaf(1, 1)
    with autograd.context() as context_id:
        results = [
            rpc.rpc_sync(name, work_with, (rref, x))
            for name in ("w0", "w2", "w3")
        ]  # fmt: skip
        autograd.backward(context_id, [sum(result.sum() for result in results)])
        weight = leaf(2, 3)
        expected = local(3 * (weight * x).tanh().sum(), x, weight)
        assert torch.allclose(autograd.get_gradients(context_id)[x], expected[x], rtol=1e-14)
        assert torch.allclose(rref.rpc_sync().gradient(context_id), expected[weight], rtol=1e-14)


def work_with(rref: rpc.RRef, x: torch.Tensor) -> torch.Tensor:
    return rref.rpc_sync().forward(x)


# ---- what is not linked


@in_job
def test_outside_of_contexts_and_without_gradients_nothing_is_linked() -> None:
    a = leaf(1, 2)
    result = rpc.rpc_sync("w1", work.mul, (a, a))
    assert result.is_leaf and result.requires_grad
    with autograd.context() as context_id:
        assert rpc.rpc_sync("w1", work.mul, (a.detach(), 2)).requires_grad is False
        rpc.rpc_sync("w1", work.add, (1, 2))
        with torch.no_grad():
            rpc.rpc_sync("w1", work.mul, (a, 2))
        assert work.links(context_id)[0] == 0
        assert autograd._current_context()._known_worker_ids() == {1}


def module_gradients(module: torch.nn.Module, x: torch.Tensor) -> torch.Tensor:
    assert all(parameter.is_leaf for parameter in module.parameters())
    return module(x)


@in_job
def test_a_module_travels_as_a_copy_with_parameters_of_its_own() -> None:
    module, x = torch.nn.Linear(2, 1), torch.ones(1, 2, requires_grad=True)
    with autograd.context() as context_id:
        result = rpc.rpc_sync("w1", module_gradients, (module, x))
        autograd.backward(context_id, [result.sum()])
        check(autograd.get_gradients(context_id), local(module(x).sum(), x))


@in_job
def test_a_parameter_by_itself_is_linked_and_stays_a_parameter() -> None:
    weight = torch.nn.Parameter(torch.ones(2))
    with autograd.context() as context_id:
        assert rpc.rpc_sync("w1", is_parameter, (weight,))
        result = rpc.rpc_sync("w1", work.mul, (weight, torch.tensor([2.0, 3.0])))
        autograd.backward(context_id, [result.sum()])
        check(autograd.get_gradients(context_id), {weight: torch.tensor([2.0, 3.0])})


def is_parameter(value: Any) -> bool:
    return type(value) is torch.nn.Parameter and value.requires_grad


def publish(rref: rpc.RRef) -> None:
    rref.publish()


@in_job
def test_a_published_value_that_wants_gradients_is_fetched_from_its_owner_inside_a_context() -> None:
    rpc.rpc_sync("w1", work.parameter, ("p", [2.0, 3.0]))
    rref = rpc.remote("w1", work.kept, ("p",))
    rpc.rpc_sync("w1", publish, (rref,))
    rref.to_here()
    direct = work.fetched_directly()
    assert torch.equal(rref.to_here(), torch.tensor([2.0, 3.0], dtype=torch.float64))
    assert work.fetched_directly() == direct + 1 or rpc.get_worker_info().id == 0
    with autograd.context() as context_id:
        value = rref.to_here()
        assert work.fetched_directly() <= direct + 1
        autograd.backward(context_id, [(value * value).sum()])
        assert rpc.rpc_sync("w1", work.gradient, (context_id, "p")).tolist() == [4.0, 6.0]
    rpc.rpc_sync("w1", work.forget)


# ---- passes


@in_job
def test_a_tensor_that_was_sent_and_not_used_holds_nothing_up() -> None:
    a, b = leaf(1, 2), leaf(3, 5)
    with autograd.context() as context_id:
        rpc.rpc_sync("w1", work.mul, (a, b))
        rpc.rpc_sync("w2", work.through, ("w3", work.mul, a, a))
        unused = rpc.rpc_sync("w1", work.echo, ({"used": a, "not": b},))
        autograd.backward(context_id, [(unused["used"] * 3).sum()])
        check(autograd.get_gradients(context_id), {a: torch.full((2,), 3.0, dtype=torch.float64)})
        assert autograd._get_debug_info()["num_current_backward_passes"] == 0
        assert rpc.rpc_sync("w1", work.counts)["num_current_backward_passes"] == 0


@in_job
def test_who_promises_that_all_is_used_need_not_have_it_found_out() -> None:
    a, b = leaf(1, 2), leaf(3, 5)
    with autograd.context() as context_id:
        result = rpc.rpc_sync("w1", work.through, ("w2", work.mul, a, b))
        autograd.backward(context_id, [result.sum()], all_sent_is_used=True)
        check(autograd.get_gradients(context_id), local((a * b).sum(), a, b))
        rpc.rpc_sync("w1", work.mul, (a, b))  # a promise that is broken
        again = rpc.rpc_sync("w1", work.mul, (a, b))
        with pytest.raises(fastref.CallTimeout):
            autograd.backward(context_id, [again.sum()], all_sent_is_used=True, timeout=0.3)
    work.wait_everywhere("w1", "w2")


@in_job
def test_passes_of_one_context_add_up_and_those_of_another_do_not() -> None:
    a = leaf(1, 2)
    with autograd.context() as context_id:
        result = rpc.rpc_sync("w1", work.mul, (a, a)).sum()
        autograd.backward(context_id, [result], retain_graph=True)
        autograd.backward(context_id, [result], retain_graph=True)
        autograd.backward(context_id, [a.sum() * 1, result])
        check(autograd.get_gradients(context_id), {a: torch.tensor([7.0, 13.0], dtype=torch.float64)})
    with autograd.context() as context_id:
        assert autograd.get_gradients(context_id) == {}


@in_job
def test_a_second_pass_over_a_graph_that_was_not_retained_is_an_error_there() -> None:
    a = leaf(1, 2)
    with autograd.context() as context_id:
        result = rpc.rpc_sync("w1", work.mul, (a, a)).sum()
        autograd.backward(context_id, [result])
        with pytest.raises(BackwardError, match="^Error on Node 1: Trying to backward through the graph a second time"):
            autograd.backward(context_id, [result])
    work.wait_everywhere("w1")


@in_job
def test_sparse_gradients_come_back_and_add_up() -> None:
    table = torch.nn.Embedding(5, 2, sparse=True)
    places = torch.tensor([1, 3, 3])
    with autograd.context() as context_id:
        for _ in range(2):
            result = rpc.rpc_sync("w1", work.mul, (table(places), 2.0))
            autograd.backward(context_id, [result.sum()])
        found = autograd.get_gradients(context_id)[table.weight]
        assert found.is_sparse
        expected = torch.zeros(5, 2)
        expected[1], expected[3] = 4.0, 8.0
        assert torch.equal(found.to_dense(), expected)
        with torch.no_grad():
            sparse = torch.eye(2, dtype=torch.float64).to_sparse()
        sparse.requires_grad_()
        result = rpc.rpc_sync("w1", work.add, (sparse, sparse))
        autograd.backward(context_id, [torch.sparse.sum(result)])
        (expected,) = torch.autograd.grad(torch.sparse.sum(sparse + sparse), sparse)
        assert torch.equal(autograd.get_gradients(context_id)[sparse].to_dense(), expected.to_dense())


@in_job
def test_hooks_of_the_nodes_that_accumulate_run_before_and_behind() -> None:
    a = leaf(1, 2)
    b = a * 1
    node = b.grad_fn.next_functions[0][0]
    seen: list[Any] = []
    node.register_prehook(lambda gradients: (gradients[0] * 10,))
    node.register_hook(lambda inputs, outputs: seen.append(outputs[0].tolist()))
    with autograd.context() as context_id:
        autograd.backward(context_id, [rpc.rpc_sync("w1", work.mul, (b, 2)).sum()])
        assert autograd.get_gradients(context_id)[a].tolist() == [20.0, 20.0]
        assert seen == [[20.0, 20.0]]


@in_job
def test_a_reference_runs_a_pass_where_its_value_lives() -> None:
    a = leaf(1, 2)
    with autograd.context() as context_id:
        total = rpc.remote("w1", torch.sum, (rpc.rpc_sync("w2", work.mul, (a, a)),))
        total.backward(context_id, retain_graph=True)
        total.backward(context_id)
        check(autograd.get_gradients(context_id), {a: torch.tensor([4.0, 8.0], dtype=torch.float64)})
        with pytest.raises(UsageError, match="User RRefs require 'dist_autograd_ctx_id' to be specified"):
            total.backward()


@in_job
def test_many_threads_and_workers_run_passes_at_once() -> None:
    errors: list[BaseException] = []
    for name in ("w0", "w1", "w2", "w3"):
        rpc.rpc_sync(name, work.parameter, ("p", [2.0, 3.0]))

    def run() -> None:
        try:
            for _ in range(5):
                theirs, mine = work.own_sum(["w1", "w2", "w3"], "p")
                for found in [*theirs, mine]:
                    assert found.tolist() == [8.0, 27.0]
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=run) for _ in range(4)]
    futures = [rpc.rpc_async(name, work.own_sum, (["w0", "w1", "w2"], "p")) for name in ("w1", "w2", "w3")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    once, twice = [8.0, 27.0], [16.0, 54.0]  # who calls itself too has two parts in the product
    expected = ([once, twice, once, twice], [once, once, twice, twice], [once, once, once, once])
    for future, gradients in zip(futures, expected, strict=True):
        theirs, mine = future.wait()
        assert [found.tolist() for found in [*theirs, mine]] == gradients
    assert errors == []
    work.wait_everywhere("w1", "w2", "w3")
    for name in ("w0", "w1", "w2", "w3"):
        rpc.rpc_sync(name, work.forget)


@in_job
@pytest.mark.parametrize("passes", ["no pass", "one", "several", "one that fails"])
def test_graphs_are_gone_on_all_workers_without_a_collector_when_their_context_is(passes: str) -> None:
    gc.disable()
    try:
        a = leaf(1, 2)
        with autograd.context() as context_id:
            value = rpc.rpc_sync("w1", work.through, ("w2", work.marked, a * 2))
            value = rpc.rpc_sync("w1", work.marked, (work.marked(value),))
            if passes == "one that fails":
                with pytest.raises(BackwardError):
                    autograd.backward(context_id, [rpc.rpc_sync("w2", work.broken, (value,)).sum()])
            elif passes != "no pass":
                autograd.backward(context_id, [value.sum()], retain_graph=passes == "several")
            if passes == "several":
                autograd.backward(context_id, [value.sum()])
            del value
        counts = [rpc.rpc_sync(name, work.wait_until_graphs_are_gone) for name in ("w0", "w1", "w2")]
        assert counts == [1, 1, 1]
    finally:
        gc.enable()


# ---- contexts


@in_job
def test_a_context_is_of_one_thread_and_gone_everywhere_afterwards() -> None:
    seen: list[bool] = []
    with autograd.context() as context_id:
        assert context_id >> 48 == 0 and context_id <= autograd._get_max_id()
        thread = threading.Thread(target=lambda: seen.append(work.has_context()))
        thread.start()
        thread.join()
        assert seen == [False]
        with pytest.raises(UsageError, match="Already have an autograd context id for this thread"):
            autograd.context().__enter__()
        rpc.rpc_sync("w1", work.through, ("w2", work.through, "w3", work.add, 1, 2))
        assert rpc.rpc_sync("w3", work.counts)["num_autograd_contexts"] == 1
    work.wait_everywhere("w1", "w2", "w3")
    with pytest.raises(UsageError, match=f"Could not find autograd context with id: {context_id}"):
        autograd.get_gradients(context_id)


@in_job
def test_a_call_that_comes_after_its_context_has_been_released_does_not_bring_it_back() -> None:
    a = leaf(1, 2)
    with autograd.context():
        futures = [rpc.rpc_async("w1", work.through, ("w2", work.mul, a, number)) for number in range(50)]
    for future in futures:
        assert future.wait().requires_grad
    work.wait_everywhere("w1", "w2")


@in_job
def test_wrong_arguments_are_refused_as_torch_refuses_them() -> None:
    with autograd.context() as context_id:
        for arguments in ((context_id, None), (None, None), (context_id, [1])):
            with pytest.raises(TypeError, match="incompatible function arguments"):
                autograd.backward(*arguments)
        for roots, what in (
            ([], "No tensors provided for gradient computation"),
            ([torch.ones(1)], "requires_grad not set on"),
            ([leaf(1, 2) * 1], "is not a scalar, all roots need to be scalar"),
            ([leaf(1)], "does not have a valid gradient function"),
        ):
            with pytest.raises(UsageError, match=what):
                autograd.backward(context_id, roots)
    with pytest.raises(UsageError, match="Could not find autograd context with id: 100"):
        autograd.backward(100, [leaf(1) * 1])


def test_without_a_job_there_are_no_contexts() -> None:
    with pytest.raises(UsageError, match="Need to initialize distributed autograd"), autograd.context():
        pass
