"""Large tensors that are handed on lie where they lay: the third worker reads them in the memory of the first."""

from __future__ import annotations

import gc
import os
import random
import struct
import threading
import time
from typing import Any

import pytest
import torch

import fastref.rpc as rpc
from fastref.codec.stream import decode, encode
from fastref.errors import FastrefError, ProtocolError
from fastref.rref import current_wiring
from tests import puppets, work
from tests.jobs import in_job, job_fixtures
from tests.puppets import Troupe, troupe_fixture  # noqa: F401

pytestmark = pytest.mark.shared_memory("what is handed on stays where it lies")

jobs, job = job_fixtures(3)

SIZE = 100_000  # elements of four bytes

_kept: list[Any] = []


def figures() -> dict[str, Any]:
    return current_wiring().snapshot()


def forwarded(worker: str) -> int:
    """Count the blocks that a worker has handed on where they lie."""
    return rpc.rpc_sync(worker, _forwarded)


def _forwarded() -> int:
    return figures()["calls"]["forwarded"]


def make(value: float) -> torch.Tensor:
    return torch.full((SIZE,), value)


def hand_on(to: str, value: Any) -> Any:
    return rpc.rpc_sync(to, work.echo, args=(value,))


def total(value: Any) -> float:
    if isinstance(value, torch.Tensor):
        return float(value.sum())
    return sum(total(part) for part in (value.values() if isinstance(value, dict) else value))


def total_of(to: str, value: Any) -> float:
    return rpc.rpc_sync(to, total, args=(value,))


@in_job
def test_a_third_worker_reads_the_first_ones_memory() -> None:
    before = forwarded("w1")
    tensor = make(3.0)
    assert rpc.rpc_sync("w1", total_of, args=("w2", tensor)) == 3 * SIZE
    assert forwarded("w1") == before + 1


@in_job
def test_what_comes_back_to_its_owner_is_read_there() -> None:
    before = forwarded("w1")
    tensor = make(3.0)
    back = rpc.rpc_sync("w1", work.echo, args=(tensor,))
    assert forwarded("w1") == before + 1
    assert figures()["peers"]["w0"]["leases"] == 1
    back += 1
    tensor += 5
    assert back[0] == 4 and torch.equal(back, make(4.0)) and torch.equal(tensor, make(8.0))


@in_job
def test_results_and_values_of_references_are_handed_on_too() -> None:
    for ask in (lambda: rpc.rpc_async("w1", hand_on, args=("w2", make(2.0))).wait(), fetched_from_a_third):
        assert torch.equal(ask(), make(2.0))
    assert forwarded("w1") >= 1


def fetched_from_a_third() -> torch.Tensor:
    return rpc.remote("w1", hand_on, args=("w2", make(2.0))).to_here()


def write_and_hand_on(to: str, tensor: torch.Tensor, at: int) -> tuple[float, int]:
    before = _forwarded()
    tensor[at] = 100
    return rpc.rpc_sync(to, total, args=(tensor,)), _forwarded() - before


@in_job
@pytest.mark.parametrize("at", [0, SIZE // 2, SIZE - 1])
def test_what_was_written_is_copied(at: int) -> None:
    assert rpc.rpc_sync("w1", write_and_hand_on, args=("w2", make(1.0), at)) == (SIZE - 1 + 100, 0)


def hand_on_and_write(to: str, tensor: torch.Tensor) -> tuple[bool, float]:
    future = rpc.rpc_async(to, slowly, args=(tensor,))
    tensor.fill_(7)
    return future.wait(), float(tensor[0])


def slowly(tensor: torch.Tensor) -> bool:
    first = tensor.clone()
    time.sleep(0.05)
    tensor -= 1
    return torch.equal(first, make(1.0)) and torch.equal(tensor, make(0.0))


@in_job
def test_nobody_sees_what_another_writes() -> None:
    tensor = make(1.0)
    assert rpc.rpc_sync("w1", hand_on_and_write, args=("w2", tensor)) == (True, 7.0)
    assert torch.equal(tensor, make(1.0))


@in_job
def test_views_and_parts_of_containers_are_handed_on() -> None:
    parts = [make(1.0), {"a": make(2.0), "b": torch.ones(5)}]
    before = forwarded("w1")
    back = rpc.rpc_sync("w1", work.echo, args=(parts,))
    assert total(back) == 3 * SIZE + 5
    assert forwarded("w1") == before + 2, "both lie in one block"
    back[0] += 1
    assert torch.equal(back[1]["a"], make(2.0))
    assert rpc.rpc_sync("w1", half_of, args=("w2", make(1.0))) == SIZE // 2


def half_of(to: str, tensor: torch.Tensor) -> float:
    before = _forwarded()
    result = rpc.rpc_sync(to, total, args=(tensor[SIZE // 2 :].view(2, -1),))
    assert _forwarded() == before + 1
    return result


@in_job
def test_one_tensor_handed_on_twice_is_two_tensors() -> None:
    assert rpc.rpc_sync("w1", twice, args=("w2", make(1.0)))


def twice(to: str, tensor: torch.Tensor) -> bool:
    for _ in range(2):
        rpc.rpc_sync(to, keep, args=(tensor,))
    return rpc.rpc_sync(to, are_apart)


def keep(value: Any) -> None:
    _kept.append(value)


def are_apart() -> bool:
    one, other = _kept
    _kept.clear()
    one += 1
    return torch.equal(one, make(2.0)) and torch.equal(other, make(1.0))


@in_job
def test_small_tensors_and_pickled_values_are_copied() -> None:
    before = forwarded("w1")
    assert rpc.rpc_sync("w1", total_of, args=("w2", torch.ones(100))) == 100
    assert rpc.rpc_sync("w1", attribute_of, args=("w2", work.Box(make(1.0)))) == SIZE
    assert forwarded("w1") == before


def attribute_of(to: str, holder: Any) -> float:
    return rpc.rpc_sync(to, total_of_attribute, args=(holder,))


def total_of_attribute(holder: Any) -> float:
    return float(holder.content.sum())


@in_job
def test_memory_comes_back_when_the_last_worker_has_let_go() -> None:
    for _ in range(50):
        assert rpc.rpc_sync("w1", total_of, args=("w2", make(1.0))) == SIZE
    deadline = time.monotonic() + 20
    while figures()["arena"]["blocks"]:
        assert time.monotonic() < deadline, figures()["arena"]
        gc.collect()
        time.sleep(0.01)


@in_job
def test_many_at_once_are_whole() -> None:
    threads = [threading.Thread(target=check_some, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not _kept


def check_some(seed: int) -> None:
    chance = random.Random(seed)
    for _ in range(60):
        number = chance.randrange(1000)
        tensor = make(float(number))
        way = chance.sample(["w0", "w1", "w2"], 3)
        back = rpc.rpc_sync(way[0], along, args=(way[1:], tensor, chance.random() < 0.3))
        if not (back == back[0]).all() or int(back[0]) - number not in (0, 1, 2):
            _kept.append((number, back))


def along(way: list[str], tensor: torch.Tensor, writes: bool) -> torch.Tensor:
    """Hand a tensor on from worker to worker, each of which may add one to it before and after."""
    if writes:
        tensor += 1
    back = rpc.rpc_sync(way[0], along, args=(way[1:], tensor, False)) if way else tensor
    assert (back == back[0]).all()
    return back


# ---- deaths


def take_and_hand_on(owner: str, to: str) -> None:
    keep(rpc.rpc_sync(owner, make, args=(4.0,)))


def hand_kept_on(to: str) -> float:
    return rpc.rpc_sync(to, total, args=(_kept[0],))


def test_it_is_handed_on_when_its_owner_is_dead(troupe: Troupe) -> None:
    owner, middle, last = troupe.start(3)
    middle.do(take_and_hand_on, owner.name, last.name)
    owner.kill()
    assert middle.do(hand_kept_on, last.name) == 4 * SIZE
    middle.do(puppets.wait_until_dead, owner.name)
    assert middle.do(hand_kept_on, last.name) == 4 * SIZE


def hold_up(seconds: float) -> None:
    time.sleep(seconds)


def send_behind(to: str) -> None:
    """Send what was kept, to a worker that does not read at present."""
    keep(rpc.rpc_async(to, total, args=(_kept[0],)))


def outcome_of_last() -> float | str:
    try:
        return _kept[-1].wait()
    except FastrefError as error:
        return type(error).__name__


def test_its_owner_may_die_while_it_is_on_its_way(troupe: Troupe) -> None:
    owner, middle, last = troupe.start(3)
    middle.do(take_and_hand_on, owner.name, last.name)
    last.stop()
    middle.do(send_behind, last.name)
    owner.kill()
    middle.do(puppets.wait_until_dead, owner.name)
    last.go_on()
    assert middle.do(outcome_of_last) == 4 * SIZE


def test_its_sender_may_die_when_it_has_arrived(troupe: Troupe) -> None:
    owner, middle, last = troupe.start(3)
    middle.do(take_and_hand_on, owner.name, last.name)
    middle.do(have_kept, last.name)
    middle.kill()
    last.do(puppets.wait_until_dead, middle.name)
    owner.do(overwrite_arena)
    assert last.do(total_of_kept) == 4 * SIZE


def have_kept(to: str) -> None:
    rpc.rpc_sync(to, keep, args=(_kept[0],))


def overwrite_arena() -> None:
    me = rpc.get_worker_info().name
    for _ in range(20):
        rpc.rpc_sync(me, total, args=(make(9.0),))


def total_of_kept() -> float:
    return float(_kept[0].sum())


def test_a_forked_child_hands_nothing_on(troupe: Troupe) -> None:
    owner, middle = troupe.start(2)
    middle.do(take_and_hand_on, owner.name, owner.name)
    assert middle.do(sum_in_child) == 0


def sum_in_child() -> int:
    child = os.fork()
    if child == 0:
        os._exit(0 if float(_kept[0].sum()) == 4 * SIZE else 1)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


@in_job
def test_what_was_fetched_is_handed_on() -> None:
    rref = rpc.remote("w1", make, args=(2.0,))
    before = _forwarded()
    for _ in range(3):  # of an answer, then of the copy that was published
        assert rpc.rpc_sync("w2", total, args=(rref.to_here(),)) == 2 * SIZE
    assert _forwarded() == before + 3


HEADER = 1 + 16 + 8  # bytes of a tensor of one dimension, before its data


def test_a_payload_alone_points_nowhere() -> None:
    """What says that bytes lie in somebody's memory is believed only in a frame whose sender holds them."""
    honest = encode(torch.ones(3))
    assert honest is not None
    for owner in (0, 1, 1 << 31):
        place = struct.pack("<QQQIIII", 0, 4096, 0, 0, 0, owner, 0)
        with pytest.raises(ProtocolError, match=f"points to memory of worker {owner}, whom nobody knows"):
            decode(b"Y" + honest[1:HEADER] + place)


def lie(to: str, rounds: int) -> None:
    """Send calls whose argument is said to lie in memory where it does not."""
    chance = random.Random(7)
    channel = current_wiring().peers[rpc.get_worker_info(to).id].channel
    honest = encode(((torch.ones(40_000),), None))
    assert honest is not None
    at = honest.index(b"X")
    # Not where a file of the owner may yet be announced, except once: the receiver waits a second for that.
    numbers = [0, 1, 63, 64, 4095, 4096, 1 << 20, 1 << 50, (1 << 63) - 1, (1 << 64) - 4096]
    for i in range(rounds):
        large = [chance.choice(numbers) for _ in range(3)]
        small = [chance.choice(numbers) % (1 << 32) for _ in range(2)]
        if i == 0:
            large[:2] = [1 << 30, 4096]
        place = struct.pack("<QQQIIII", *large, *small, chance.choice([0, 1, 2, 3, (1 << 32) - 1]), 0)
        payload = honest[:at] + b"Y" + honest[at + 1 : at + HEADER] + place + honest[at + HEADER + 160_000 :]
        frame = struct.pack("<HHHHQqIIII", 1, 256, 0, 0xFFFF, (1 << 39) + i, 0, 1, len(payload), 0, 0)
        while not channel.send(frame + payload):
            time.sleep(0.001)
        current_wiring().calls_sent += 1  # for those who leave: they count


@in_job
def test_lies_about_where_a_tensor_lies_harm_nobody() -> None:
    assert rpc.rpc_sync("w1", work.echo, args=(1,)) == 1
    lie("w1", 300)
    assert rpc.rpc_sync("w1", total_of, args=("w2", make(1.0))) == SIZE
