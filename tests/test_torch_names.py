"""torch's names beyond calls and references: what they do here, above all where torch does worse."""

from __future__ import annotations

import copy
import pickle
import time
from typing import Any

import pytest
import torch

import fastref
import fastref.rpc as rpc
from fastref.errors import CallTimeout, PeerError, UsageError
from fastref.rpc import api, internal
from tests import puppets, work
from tests.jobs import in_job, job_fixtures
from tests.puppets import Troupe, troupe_fixture  # noqa: F401

jobs, job = job_fixtures(3)


# ---- collecting futures


@in_job
def test_wait_all_waits_for_every_future_made_inside_also_when_nested() -> None:
    with api._wait_all():
        outer = rpc.rpc_async("w1", work.sleep, (0.2,))
        with api._wait_all():
            inner = rpc.rpc_async("w2", work.sleep, (0.1,))
        assert inner.done()
        last = rpc.rpc_async("w2", work.sleep, (0.1,))
    assert outer.done()
    assert last.done()
    assert not hasattr(api._thread_local_var, "future_list")
    rpc.rpc_async("w1", work.nothing).wait()  # nobody collects it


@in_job
def test_wait_all_raises_what_a_call_raised() -> None:
    with pytest.raises(ZeroDivisionError):
        with api._wait_all():
            rpc.rpc_async("w1", divmod, (1, 0))


# ---- types and creation


def slow_list(seconds: float) -> list[int]:
    time.sleep(seconds)
    return [1]


@in_job
def test_a_type_that_could_not_be_had_in_time_may_be_asked_for_again() -> None:
    rref = rpc.remote("w1", slow_list, (0.5,))
    with pytest.raises(CallTimeout):
        rref._get_type(timeout=0.01)
    assert rref._get_type() is list
    first = rref._get_type(blocking=False)
    assert rref._get_type(blocking=False) is first


@in_job
def test_the_fork_data_of_a_value_names_its_type_as_torch_does() -> None:
    for value, name in [
        (1, "int"),
        (torch.ones(1), "Tensor"),
        ([1.5], "List[float]"),
        ({"a": torch.ones(1)}, "Dict[str, Tensor]"),
        (None, "NoneType"),
        ([], "PyObject"),
        (torch.nn.Linear(1, 1), "PyObject"),
        (work.Counter(), "PyObject"),
    ]:
        rref = rpc.RRef(value)
        fork = rref._serialize()
        assert fork[6] == name
        assert rpc.RRef._deserialize(fork).local_value() is value
    elsewhere = rpc.remote("w1", work.echo, (1,))
    fork = elsewhere._serialize()
    assert fork[6] == "PyObject"
    assert rpc.rpc_sync("w2", fetch_forked, (fork,)) == 1


def fetch_forked(fork: tuple[Any, ...]) -> Any:
    return rpc.RRef._deserialize(fork).to_here()


@pytest.mark.parametrize("data", [(), (1, 2), (0,) * 8], ids=len)
@in_job
def test_what_is_no_fork_data_is_refused(data: tuple[int, ...]) -> None:
    with pytest.raises(UsageError, match="Pickled RRefForkData must contain 7 numbers"):
        rpc.PyRRef._deserialize(data)


@in_job
def test_the_inside_of_torchs_agent_names_itself_when_it_is_used() -> None:
    agent = rpc._get_current_rpc_agent()
    for name, use in (
        ("store", lambda: agent.store.get("key")),
        ("_update_group_membership", lambda: agent._update_group_membership(agent.get_worker_info(), [], {}, True)),
    ):
        with pytest.raises(UsageError, match=f"fastref does not have torch.distributed.rpc.TensorPipeAgent.{name}: "):
            use()


@in_job
def test_the_future_of_a_creation_tells_why_it_failed() -> None:
    assert rpc.remote("w1", work.echo, (1,))._get_future().wait() is None
    assert rpc.RRef(1)._get_future().wait() is None
    with pytest.raises(ZeroDivisionError):
        rpc.remote("w1", divmod, (1, 0))._get_future().wait()


@in_job
def test_the_future_of_a_creation_that_is_asked_for_too_late_says_that_it_timed_out() -> None:
    rref = rpc.remote("w1", slow_list, (0.3,), timeout=0.001)
    time.sleep(0.01)
    with pytest.raises(CallTimeout, match="RPC ran for more than"):
        rref._get_future().wait()


@in_job
def test_a_value_that_came_after_the_timeout_of_its_creation_is_not_had() -> None:
    late = "RRef creation via rpc.remote\\(\\) timed out"
    for timeout in (-1, 0, 30):
        rref = rpc.remote("w1", slow_list, (0.3,), timeout=0.05)
        with pytest.raises(CallTimeout, match=late):
            rref.to_here(timeout)
        assert not rref.confirmed_by_owner()  # nor is it waited for
    assert rpc.remote("w1", slow_list, (0.1,), timeout=30).to_here() == [1]
    rref = rpc.remote("w1", slow_list, (0.3,), timeout=0.05)
    with pytest.raises(CallTimeout):
        rref._get_future().wait()
    time.sleep(0.5)
    with pytest.raises(CallTimeout, match="RRef creation via rpc.remote\\(\\) timed out"):
        rref.to_here()


@in_job
def test_a_reference_whose_value_came_too_late_is_not_handed_on() -> None:
    late = "RRef creation via rpc.remote\\(\\) timed out"
    for to in ("w1", "w0"):
        rref = rpc.remote(to, slow_list, (0.3,), timeout=0.05)
        time.sleep(0.1)
        for _ in range(2):  # before the value is there, and after
            with pytest.raises(CallTimeout, match=late):
                rpc.rpc_sync("w2", work.echo, (rref,))
            with pytest.raises(CallTimeout, match=late):
                rpc.remote("w1", work.echo, ([rref],)).to_here()
            with pytest.raises(CallTimeout, match=late):
                rref.rpc_async().copy().wait()
            with pytest.raises(CallTimeout, match=late):
                rref._serialize()
            time.sleep(0.4)
        assert rpc.rpc_sync("w2", work.echo, (2,)) == 2


@in_job
def test_a_reference_that_was_handed_over_is_confirmed_at_once() -> None:
    rref = rpc.remote("w1", slow_list, (0.5,))
    assert not rref.confirmed_by_owner()
    assert rpc.rpc_sync("w2", is_confirmed, (rref,))
    rref.to_here()
    assert rref.confirmed_by_owner()


def is_confirmed(rref: rpc.RRef) -> bool:
    return rref.confirmed_by_owner()


# ---- timeouts


@in_job
def test_the_default_timeout_can_be_changed_and_a_negative_one_is_over_at_once() -> None:
    before = rpc.get_rpc_timeout()
    api._set_rpc_timeout(0.05)
    try:
        assert rpc.get_rpc_timeout() == 0.05
        with pytest.raises(CallTimeout, match="50 ms"):
            rpc.rpc_sync("w1", work.sleep, (0.5,))
        assert rpc.rpc_sync("w1", work.sleep, (0.2,), timeout=0) == 0.2
    finally:
        api._set_rpc_timeout(before)
    with pytest.raises(CallTimeout, match="-5000 ms"):
        rpc.rpc_sync("w1", work.sleep, (0.1,), timeout=-5)


# ---- tensors and script functions


@torch.jit.script
def scripted(x: torch.Tensor, factor: float) -> torch.Tensor:
    return x * factor


@in_job
def test_a_script_function_is_found_by_its_name() -> None:
    assert torch.equal(rpc.rpc_sync("w1", scripted, (torch.ones(2), 3.0)), torch.full((2,), 3.0))
    assert torch.equal(rpc.remote("w1", scripted, (torch.ones(2), 3.0)).to_here(), torch.full((2,), 3.0))


@in_job
def test_the_order_of_a_tensors_elements_in_memory_survives() -> None:
    small_gaps = torch.arange(25.0).reshape(5, 5).narrow(1, 2, 2)
    for tensor in (
        torch.randn(40, 30).t(),
        torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last),
        torch.randn(3, 4, 5).permute(2, 0, 1),
        torch.randn(300, 400).t(),
        small_gaps,
    ):
        for answer in (rpc.rpc_sync("w1", work.echo, (tensor,)), rpc.remote("w1", work.echo, (tensor,)).to_here()):
            assert answer.stride() == tensor.stride()
            assert torch.equal(answer, tensor)
    large_gaps = torch.zeros(1000, 1000)[:, :2]
    assert rpc.rpc_sync("w1", work.echo, (large_gaps,)).is_contiguous()  # 4 MB of gaps do not travel


# ---- counters


@in_job
def test_the_counters_count_what_others_hold() -> None:
    zero = {"num_owner_rrefs": "0", "num_forks": "0", "num_pending_users": "0", "num_pending_futures": "0"}
    assert rpc._rref_context_get_debug_info() == zero
    mine = rpc.RRef(1)
    assert rpc._rref_context_get_debug_info() == zero
    for to in ("w1", "w2"):
        rpc.rpc_sync(to, work.keep, (mine,))
    assert rpc._rref_context_get_debug_info() == {**zero, "num_owner_rrefs": "1", "num_forks": "2"}
    pending = rpc.remote("w1", slow_list, (0.3,))
    assert rpc._rref_context_get_debug_info()["num_pending_users"] == "1"
    pending.to_here()
    assert rpc._rref_context_get_debug_info()["num_pending_users"] == "0"
    for to in ("w1", "w2"):
        rpc.rpc_sync(to, work.drop)
    while rpc._rref_context_get_debug_info() != zero:
        time.sleep(0.01)
    agent = rpc._get_debug_info()
    assert {"agent.thread_pool_size", "agent.client_active_calls", "agent.server_active_async_calls"} <= set(agent)
    assert {"num_autograd_contexts": 0, "num_current_backward_passes": 0}.items() <= agent.items()


# ---- backends


def test_a_registered_backend_is_there_under_every_name_of_the_class() -> None:
    known, before = rpc.BackendType, len(rpc.BackendType)
    member = rpc.register_backend("ONE_MORE", lambda timeout, method, **more: (timeout, method), lambda **more: None)
    try:
        assert rpc.BackendType is known
        assert rpc.BackendType.ONE_MORE is rpc.BackendType["ONE_MORE"] is member
        assert rpc.BackendType.TENSORPIPE in list(rpc.BackendType)
        assert list(reversed(rpc.BackendType)) == list(rpc.BackendType)[::-1]
        assert rpc.BackendType(member.value) is member
        assert len(rpc.BackendType) == before + 1
        assert (member.name, member.value.init_backend_handler()) == ("ONE_MORE", None)
        assert isinstance(member, rpc.BackendType)
        assert repr(member) == "BackendType.ONE_MORE"
        assert pickle.loads(pickle.dumps(member)) is copy.deepcopy(member) is copy.copy(member) is member
        assert rpc.construct_rpc_backend_options(member, 5, "x") == (5, "x")
        assert rpc.backend_registered("ONE_MORE")
        assert not rpc.backend_registered("ANOTHER")
        with pytest.raises(UsageError, match="RPC backend ONE_MORE: already registered"):
            rpc.register_backend("ONE_MORE", print, print)
    finally:
        del rpc.BackendType.__members__["ONE_MORE"]
    with pytest.raises(UsageError, match="ONE_MORE is not registered in this process"):
        copy.copy(member)
    with pytest.raises(AttributeError):
        rpc.BackendType.ONE_MORE  # noqa: B018


def test_backends_are_as_fixed_as_members_of_an_enum() -> None:
    member = rpc.BackendType.TENSORPIPE
    for change in (
        lambda: setattr(member, "name", "x"),
        lambda: setattr(member, "value", None),
        lambda: setattr(rpc.BackendType, "TENSORPIPE", None),
        lambda: delattr(rpc.BackendType, "TENSORPIPE"),
    ):
        with pytest.raises(AttributeError):
            change()
    assert rpc.BackendType.TENSORPIPE is member
    assert member.name == "TENSORPIPE"
    with pytest.raises(ValueError, match="'TENSORPIPE' is not a valid BackendType"):
        rpc.BackendType("TENSORPIPE")


@pytest.mark.parametrize(("name", "kind"), [(5, TypeError), (None, TypeError), ("", ValueError), ("mro", ValueError)])
def test_a_backend_has_a_name_under_which_it_can_be_found(name: Any, kind: type[Exception]) -> None:
    with pytest.raises(kind, match=f"name.* {name!r}"):
        rpc.register_backend(name, print, print)
    assert not rpc.backend_registered(name)


class OtherOptions(rpc.RpcBackendOptions):
    """Of no backend."""


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({"backend": "TENSORPIPE"}, "Argument backend must be a member of BackendType"),
        ({"rpc_backend_options": 1}, "Argument rpc_backend_options must be an instance of RpcBackendOptions"),
        ({"rpc_backend_options": OtherOptions()}, "Could not infer backend for options"),
        (
            {"backend": rpc.BackendType.TENSORPIPE, "rpc_backend_options": OtherOptions()},
            "`rpc_backend_options` must be a `TensorPipeRpcBackendOptions`",
        ),
    ],
)
def test_a_backend_and_options_that_do_not_go_together_are_refused(arguments: dict[str, Any], text: str) -> None:
    with pytest.raises(TypeError, match=text):
        rpc.init_rpc("w0", rank=0, world_size=1, **arguments)


def test_device_maps_are_one_to_one() -> None:
    options = rpc.TensorPipeRpcBackendOptions(
        device_maps={"w1": {"cuda:0": "cuda:1"}}, _transports=["uv"], table_bits=4
    )
    assert options.table_bits == 4
    options.set_device_map("w1", {"cuda:1": "cuda:0"})
    assert len(options.device_maps["w1"]) == 2
    with pytest.raises(ValueError, match="only supports 1-to-1 mapping"):
        options.set_device_map("w1", {"cuda:0": "cuda:5"})
    with pytest.raises(ValueError, match="only supports 1-to-1 mapping"):
        options.set_device_map("w2", {"cuda:0": "cuda:1", "cuda:2": "cuda:1"})
    with pytest.raises(ValueError, match="expect a list of CUDA devices"):
        options.set_devices(["cpu"])
    with pytest.raises(TypeError, match="incompatible constructor arguments"):
        rpc.TensorPipeRpcBackendOptions(rpc_timeout="soon")


def test_values_become_bytes_and_tensors_and_values_again() -> None:
    value = {"a": [torch.arange(5), "text"], "b": (None, torch.nn.Linear(3, 2))}
    data, tensors = internal.serialize(value)
    assert isinstance(data, bytes)
    again = internal.deserialize(data, tensors)
    assert torch.equal(again["a"][0], value["a"][0])
    assert torch.equal(again["b"][1].weight, value["b"][1].weight)


# ---- collectives, and the way out


def gather_number(names: list[str] | None = None, timeout: float = -1.0) -> dict[str, int]:
    return api._all_gather(rpc.get_worker_info().id, names, timeout)


def test_all_give_and_all_get(troupe: Troupe) -> None:
    crew = troupe.start(3)
    for _ in range(3):
        for puppet in crew:
            puppet.order(gather_number)
        assert [puppet.outcome() for puppet in crew] == [{"w0": 0, "w1": 1, "w2": 2}] * 3
    for puppet in crew[1:]:
        puppet.order(gather_number, ["w1", "w2"])
    assert [puppet.outcome() for puppet in crew[1:]] == [{"w1": 1, "w2": 2}] * 2
    with pytest.raises(CallTimeout, match="workers \\['w1', 'w2'\\] have not joined"):
        crew[0].do(gather_number, None, 0.2)
    troupe.leave(crew)


@pytest.mark.parametrize("dead", [0, 2])
def test_nobody_waits_in_a_collective_for_the_dead(troupe: Troupe, dead: int) -> None:
    crew = troupe.start(3)
    live = [puppet for puppet in crew if puppet is not crew[dead]]
    for puppet in live:
        puppet.order(gather_number)
    time.sleep(0.2)
    crew[dead].kill()
    for puppet in live:
        # The leader sees it itself; the others wait for the leader, who dies or tells them.
        with pytest.raises(PeerError, match=f"w{dead}"):
            puppet.outcome()
    for puppet in live:
        puppet.do(rpc.shutdown, False)


def test_who_joins_a_collective_that_was_given_up_is_told_so(troupe: Troupe) -> None:
    crew = troupe.start(3)
    crew[2].kill()
    for puppet in crew[:2]:  # the leader first; it is done with the round when the other one comes
        with pytest.raises(PeerError, match="w2"):
            puppet.do(gather_number)
    with pytest.raises(CallTimeout, match="have not joined"):
        crew[0].do(gather_number, ["w0", "w1"], 0.1)
    with pytest.raises(PeerError, match=r"w0 has given up: workers \['w1'\] have not joined"):
        crew[1].do(gather_number, ["w0", "w1"])
    crew[1].order(gather_number, ["w0", "w1"])
    assert crew[0].do(gather_number, ["w0", "w1"]) == crew[1].outcome() == {"w0": 0, "w1": 1}
    for puppet in crew[:2]:
        puppet.do(rpc.shutdown, False)


def leave_and_check(keeps: bool) -> None:
    """Leave as torch's own tests do, with leaks told; ``keeps``: without letting go first."""
    api._ignore_rref_leak = False
    let_go = api._delete_all_user_and_unforked_owner_rrefs
    if keeps:
        api._delete_all_user_and_unforked_owner_rrefs = lambda: None
    try:
        rpc.shutdown()
    finally:
        api._ignore_rref_leak, api._delete_all_user_and_unforked_owner_rrefs = True, let_go


def use_after_leaving(label: str) -> None:
    for use in (puppets.kept(label).to_here, puppets.kept(label)._serialize):
        with pytest.raises(UsageError, match="has been deleted. Cannot call (to_here\\(\\)|fork an UserRRef)"):
            use()


def test_leaving_lets_go_of_what_lives_elsewhere_and_finds_no_leak(troupe: Troupe) -> None:
    crew = troupe.start(2)
    crew[1].do(puppets.keep_result, "a", rpc.remote, "w0", puppets.Cell, (1,))
    for puppet in crew:
        puppet.order(leave_and_check, False)
    for puppet in crew:
        puppet.outcome()
    crew[1].do(use_after_leaving, "a")


def test_the_dead_are_not_waited_for_by_those_who_look_for_leaks(troupe: Troupe) -> None:
    crew = troupe.start(3)
    crew[2].do(puppets.keep_result, "a", rpc.remote, "w0", puppets.Cell, (1,))
    crew[2].kill()
    for puppet in crew[:2]:
        puppet.order(leave_and_check, False)
    for puppet in crew[:2]:
        puppet.outcome()


def test_a_value_that_others_hold_at_the_end_is_told(troupe: Troupe) -> None:
    crew = troupe.start(2)
    crew[1].do(puppets.keep_result, "a", rpc.remote, "w0", puppets.Cell, (1,))
    for puppet in crew:
        puppet.order(leave_and_check, True)
    with pytest.raises(UsageError, match="Leaking RRef GloballyUniqueId\\(created_on=1, local_id=0\\), held by w1"):
        crew[0].outcome()
    crew[1].outcome()


def test_one_worker_alone_may_ask_for_leaks(troupe: Troupe) -> None:
    crew = troupe.start(3)
    crew[1].do(puppets.keep_result, "a", rpc.remote, "w0", puppets.Cell, (1,))
    crew[0].order(leave_and_check, False)  # the others let go for it
    crew[1].order(rpc.shutdown)
    crew[2].order(fastref.shutdown)
    for puppet in crew:
        puppet.outcome()
    crew[1].do(use_after_leaving, "a")
