"""Response slots: an answer reaches its own call or nobody; a wait ends with it, at the deadline or at a death."""

from __future__ import annotations

import importlib.util
import os
import random
import struct
import subprocess
import sysconfig
import threading
import time
from pathlib import Path

import pytest
from Cython.Compiler.Main import CompilationOptions
from Cython.Compiler.Main import compile as compile_cython

from fastref.channels.slots import PeerSlots, ResponseSlots, slot_bytes
from fastref.errors import ProtocolError, UsageError

ROOT = Path(__file__).resolve().parent.parent
COUNT = 4
DONE = 64  # where the first slot has its word `done`
LATE_S = 0.05  # long enough for the other thread to be asleep on its futex


@pytest.fixture(scope="module")
def driver(tmp_path_factory):
    """Build and import ``slots_driver.pyx``."""
    folder = tmp_path_factory.mktemp("driver")
    source, module = folder / "slots_driver.c", folder / "slots_driver.so"
    options = CompilationOptions(output_file=str(source), include_path=[str(ROOT)])
    assert compile_cython(str(ROOT / "tests" / "slots_driver.pyx"), options).num_errors == 0
    command = [
        os.environ.get("CC", "gcc"),
        "-std=gnu11",
        "-O1",
        "-w",
        "-fPIC",
        "-shared",
        str(source),
        "-o",
        str(module),
    ]
    subprocess.run([*command, f"-I{sysconfig.get_path('include')}", f"-I{ROOT / 'fastref' / '_c'}"], check=True)
    spec = importlib.util.spec_from_file_location("slots_driver", module)
    loaded = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(loaded)
    return loaded


@pytest.fixture
def ends(driver):
    memory = bytearray(slot_bytes(COUNT))
    return driver.Caller(memory, COUNT), driver.Callee(memory, COUNT)


def later(action, *arguments):
    thread = threading.Timer(LATE_S, action, arguments)
    thread.start()
    return thread


# Memory


@pytest.mark.parametrize("count", [0, -1, 65])
def test_a_process_has_1_to_64_slots(count):
    for call in (lambda: slot_bytes(count), lambda: ResponseSlots(bytearray(1 << 16), count)):
        with pytest.raises(UsageError, match="1 to 64"):
            call()


@pytest.mark.parametrize("kind", [ResponseSlots, PeerSlots])
def test_memory_that_is_too_small_is_refused(kind):
    with pytest.raises(ProtocolError):
        kind(bytearray(slot_bytes(8) - 1), 8)
    kind(bytearray(slot_bytes(64)), 64)


# Answers


def test_an_answer_arrives_in_the_slot_of_its_call(ends, driver):
    caller, callee = ends
    slot = caller.begin(7)
    assert callee.answer(slot, 7, b"x" * driver.ROOM, flags=3)
    assert caller.wait(slot) == "done"
    assert caller.waits_for(slot, 7) and callee.still_reads(slot, 7)
    assert caller.read(slot) == (b"x" * driver.ROOM, 3)
    assert not caller.waits_for(slot, 7) and not callee.still_reads(slot, 7)


@pytest.mark.parametrize("slice_s", [-1, 0.001], ids=["no slices", "short"])
def test_an_answer_is_found_though_a_late_callee_hides_it(driver, slice_s):
    """A callee is held up after DONE; its caller gives up, finds the answer and uses the slot for another call."""
    memory = bytearray(slot_bytes(COUNT))
    caller, callee = driver.Caller(memory, COUNT), driver.Callee(memory, COUNT)
    slot = caller.begin(1)
    assert callee.answer(slot, 1, b"first")
    assert caller.give_up(slot) == "done" and caller.read(slot) == (b"first", 0)
    assert caller.begin(2) == slot
    assert callee.answer(slot, 2, b"second")
    memory[DONE : DONE + 8] = struct.pack("=Q", 1)  # only now does the first one's store arrive
    assert caller.wait(slot, slice_s=slice_s) == "done"
    assert caller.read(slot) == (b"second", 0)


@pytest.mark.parametrize("slice_s", [-1, 0.001, 10], ids=["no slices", "short", "long"])
def test_a_sleeping_caller_is_woken_by_its_answer(ends, slice_s):
    caller, callee = ends
    slot = caller.begin(1)
    thread = later(callee.answer, slot, 1, b"late")
    while (outcome := caller.wait(slot, slice_s=slice_s)) == "interrupted":
        pass
    assert outcome == "done" and caller.read(slot) == (b"late", 0)
    thread.join()


def test_a_spinning_caller_gives_its_processor_back(ends):
    caller, _ = ends
    assert caller.wait(caller.begin(1), slice_s=0) == "interrupted"


def test_a_wait_ends_at_its_deadline(ends):
    caller, _ = ends
    slot = caller.begin(1)
    start = time.monotonic()
    while (outcome := caller.wait(slot, timeout_s=max(start + 0.05 - time.monotonic(), 1e-9))) == "interrupted":
        pass
    assert outcome == "timed out" and time.monotonic() - start >= 0.05
    assert caller.give_up(slot) == "timed out"
    assert caller.slots.snapshot()["free"] == COUNT


def test_a_wait_ends_when_the_peer_dies(ends):
    caller, _ = ends
    slot = caller.begin(1)
    thread = later(caller.peer_dies)
    assert caller.wait(slot) == "died"
    thread.join()


def test_a_wait_ends_when_the_process_stops(ends):
    caller, _ = ends
    slot = caller.begin(1)
    thread = later(caller.slots.stop)
    assert caller.wait(slot) == "stopped"
    thread.join()


def test_an_answer_that_is_there_beats_death_and_deadline(ends):
    caller, callee = ends
    slot = caller.begin(1)
    callee.answer(slot, 1, b"last words")
    caller.peer_dies()
    assert caller.wait(slot, timeout_s=1e-9) == "done"


def test_an_answer_that_came_as_a_message_ends_the_wait(ends):
    caller, _ = ends
    slot = caller.begin(5)
    caller.finish_here(slot, 5, 32)
    assert caller.wait(slot) == "done" and caller.read(slot) == (b"", 32)
    caller.finish_here(slot, 5, 32)  # again: the call is over
    assert caller.wait(caller.begin(6), slice_s=0) == "interrupted"


# Too late


def test_an_answer_never_reaches_a_later_call(ends):
    caller, callee = ends
    slot = caller.begin(1)
    assert caller.give_up(slot) == "timed out"
    assert caller.begin(2) == slot
    assert not callee.claim(slot, 1)
    assert callee.answer(slot, 2, b"two") and caller.wait(slot) == "done"
    assert caller.read(slot) == (b"two", 0)


def test_a_slot_whose_answer_is_being_written_is_not_used_until_the_callee_has_noticed(ends):
    caller, callee = ends
    slot = caller.begin(1)
    assert callee.claim(slot, 1)
    assert caller.give_up(slot) == "timed out"
    assert caller.slots.snapshot() == {"count": COUNT, "free": COUNT - 1, "abandoned": 1, "spun": 0, "slept": 0}
    others = [caller.begin(number) for number in range(2, 2 + COUNT)]
    assert slot not in others and others.count(-1) == 1
    assert not callee.finish(1, b"too late")
    assert caller.begin(99) == slot


def test_a_slot_whose_callee_died_while_it_wrote_comes_back(ends):
    caller, callee = ends
    slot = caller.begin(1)
    callee.claim(slot, 1)
    caller.give_up(slot)
    assert [caller.begin(number) for number in range(2, 1 + COUNT)].count(-1) == 0
    assert caller.begin(50) == -1
    caller.peer_dies()
    assert caller.begin(51) == slot


def test_who_gives_up_on_a_dead_callee_has_the_slot_at_once(ends):
    caller, callee = ends
    slot = caller.begin(1)
    callee.claim(slot, 1)
    assert caller.give_up(slot, dead=True) == "timed out"
    assert caller.slots.snapshot()["free"] == COUNT


def test_an_answer_that_comes_while_the_caller_gives_up_is_read(ends):
    caller, callee = ends
    slot = caller.begin(1)
    callee.answer(slot, 1, b"just in time")
    assert caller.give_up(slot) == "done" and caller.read(slot) == (b"just in time", 0)


def test_when_all_slots_are_taken_nobody_waits_for_one(ends):
    caller, callee = ends
    slots = [caller.begin(number) for number in range(COUNT)]
    assert sorted(slots) == list(range(COUNT))
    assert caller.begin(9) == -1
    callee.answer(slots[2], 2, b"")
    caller.read(slots[2])
    assert caller.begin(9) == slots[2]


@pytest.mark.parametrize("slot", [COUNT, 63, 2**31, 2**32 - 1])
def test_a_slot_that_a_peer_does_not_have_is_not_claimed(ends, slot):
    _, callee = ends
    assert not callee.claim(slot, 1)


def test_a_number_that_nobody_waits_for_is_not_claimed(ends):
    caller, callee = ends
    slot = caller.begin(7)
    for number in (0, 6, 8, 2**48 - 1):
        assert not callee.claim(slot, number)
    callee.answer(slot, 7, b"")
    assert not callee.claim(slot, 7)  # once


def test_many_calls_of_many_threads_keep_their_answers(ends):
    """A callee that is sometimes late, callers that sometimes give up: the short form of ``tests/c/slot.c``."""
    caller, callee = ends
    requests: list[tuple[int, int]] = []
    numbers = iter(range(1, 10**9))
    wrong, answered, finished = [], [], threading.Event()

    def call(seed):
        choice = random.Random(seed)
        for _ in range(500):
            number = next(numbers)
            slot = caller.begin(number)
            if slot < 0:
                time.sleep(0)
                continue
            requests.append((slot, number))
            outcome = caller.wait(slot, timeout_s=choice.choice([0, 1e-5, 1e-4]))
            while outcome == "interrupted":
                outcome = caller.wait(slot)
            if outcome == "done" or caller.give_up(slot) == "done":
                answered.append(number)
                if caller.read(slot)[0] != str(number).encode():
                    wrong.append(number)

    def serve():
        while not finished.is_set():
            if requests:
                slot, number = requests.pop()
                callee.answer(slot, number, str(number).encode())
            else:
                time.sleep(0)

    server = threading.Thread(target=serve)
    server.start()
    callers = [threading.Thread(target=call, args=(seed,)) for seed in range(3)]
    for thread in callers:
        thread.start()
    for thread in callers:
        thread.join()
    finished.set()
    server.join()
    assert not wrong and answered
