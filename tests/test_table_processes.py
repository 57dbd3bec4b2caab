"""The reference table between processes: one owner, peers that take, hand on and drop, and one that is killed."""

from __future__ import annotations

import os
import random
import time
from multiprocessing import reduction

import pytest

from fastref._core import Holder, ReferenceTable, table_sizes
from fastref.segments import create_memfd, map_fd
from tests.stopping import stopped
from tests.tables import OWNER

CAPACITY = 128
HOLD_BYTES, DESCRIPTOR_BYTES = table_sizes(CAPACITY)


class Shared:
    """The owner's two regions as memory files."""

    def __init__(self) -> None:
        self.fds = (create_memfd("hold", HOLD_BYTES), create_memfd("descriptors", DESCRIPTOR_BYTES))
        self.hold = map_fd(self.fds[0], HOLD_BYTES, writable=True)
        self.table = ReferenceTable(self.hold, map_fd(self.fds[1], DESCRIPTOR_BYTES, writable=True), CAPACITY)

    def close(self) -> None:
        for fd in self.fds:
            os.close(fd)


@pytest.fixture
def shared():
    shared = Shared()
    yield shared
    del shared.table, shared.hold
    shared.close()


def hold_as(peer: int, pipe) -> Holder:
    """Receive the memory files and map them as a peer does: the words writable, the descriptors not."""
    hold, descriptors = reduction.recv_handle(pipe), reduction.recv_handle(pipe)
    try:
        words = map_fd(hold, HOLD_BYTES, writable=True)
        return Holder(words, map_fd(descriptors, DESCRIPTOR_BYTES, writable=False), CAPACITY, peer)
    finally:
        os.close(hold)
        os.close(descriptors)


def take_and_drop(pipe, peer: int, entries, steps: int) -> None:
    holder, choice, mine = hold_as(peer, pipe), random.Random(peer), []
    for _ in range(steps):
        if choice.random() < 0.5:
            entry = choice.choice(entries)
            holder.acquire(*entry)
            mine.append(entry)
        elif mine:
            holder.release(mine.pop(choice.randrange(len(mine)))[0])
    pipe.send(sorted({index for index, _ in mine}))
    if pipe.recv() == "drop":
        for index, _ in mine:
            holder.release(index)
        pipe.send(holder.entries_held)
    else:
        time.sleep(600)  # to be killed while it holds


def take_and_drop_for_ever(pipe, peer: int, entries) -> None:
    holder, choice = hold_as(peer, pipe), random.Random(peer)
    pipe.send("ready")
    while True:
        index, generation = choice.choice(entries)
        holder.acquire(index, generation)
        if choice.random() < 0.9:
            holder.release(index)


def start(spawn_workers, mp_context, shared, target, *arguments_of_each):
    pipes, workers = [], []
    for arguments in arguments_of_each:
        mine, theirs = mp_context.Pipe()
        [worker] = spawn_workers(target, [(theirs, *arguments)])
        theirs.close()
        for fd in shared.fds:
            reduction.send_handle(mine, fd, worker.pid)
        pipes.append(mine)
        workers.append(worker)
    return pipes, workers


def test_processes_hold_exactly_what_they_say(spawn_workers, mp_context, shared):
    entries = [shared.table.open() for _ in range(32)]
    pipes, workers = start(
        spawn_workers, mp_context, shared, take_and_drop, *[(peer, entries, 20000) for peer in (0, 30, 60)]
    )
    held = {peer: set(pipe.recv()) for peer, pipe in zip((0, 30, 60), pipes, strict=True)}
    for index, _ in entries:
        expected = OWNER | sum(1 << peer for peer, mine in held.items() if index in mine)
        assert shared.table.word(index) == expected
        shared.table.holder.release(index)
    assert set(shared.table.sweep()) == {index for index, _ in entries} - set().union(*held.values())
    for pipe in pipes:
        pipe.send("drop")
    assert [pipe.recv() for pipe in pipes] == [0, 0, 0]
    assert set(shared.table.sweep()) == set().union(*held.values())
    for worker, pipe in zip(workers, pipes, strict=True):
        worker.join()
        assert worker.exitcode == 0
        pipe.close()


def test_the_bits_of_a_killed_process_come_back_and_nobody_elses(spawn_workers, mp_context, shared):
    entries = [shared.table.open() for _ in range(32)]
    pipes, workers = start(spawn_workers, mp_context, shared, take_and_drop, *[(p, entries, 20000) for p in (1, 2)])
    lost, kept = (set(pipe.recv()) for pipe in pipes)
    for index, _ in entries:
        shared.table.holder.release(index)
    shared.table.sweep()
    workers[0].kill()
    workers[0].join()
    assert shared.table.remove_peer(1) == len(lost)
    assert set(shared.table.sweep()) == lost - kept
    assert all(shared.table.word(index) == 1 << 2 for index in kept)
    pipes[1].send("drop")
    assert pipes[1].recv() == 0
    assert set(shared.table.sweep()) == kept
    for pipe in pipes:
        pipe.close()


@pytest.mark.parametrize("seed", range(4))
def test_a_process_killed_anywhere_leaves_nothing(spawn_workers, mp_context, shared, seed):
    entries = [shared.table.open() for _ in range(16)]
    [pipe], [worker] = start(spawn_workers, mp_context, shared, take_and_drop_for_ever, (5, entries))
    assert pipe.recv() == "ready"
    time.sleep(random.Random(seed).uniform(0, 0.02))
    worker.kill()
    worker.join()
    shared.table.remove_peer(5)
    assert all(shared.table.word(index) == OWNER for index, _ in entries)
    for index, _ in entries:
        shared.table.holder.release(index)
    for index in shared.table.sweep():
        shared.table.free(index)
    assert shared.table.snapshot()["free"] == CAPACITY
    pipe.close()


def test_references_are_taken_and_dropped_while_the_owner_is_stopped(spawn_workers, mp_context, shared):
    """Here this process is the peer, and the owner another that does nothing at all."""
    [mine], [owner] = start(spawn_workers, mp_context, shared, own, ())
    entry = mine.recv()
    with stopped(owner.pid):
        alice = Holder(shared.hold, memoryview(bytes(DESCRIPTOR_BYTES)), CAPACITY, 7)
        assert alice.acquire(*entry) and not alice.acquire(*entry)
        assert not alice.release(entry[0]) and alice.release(entry[0])
        assert alice.acquire(*entry)
    mine.send("let go")
    assert mine.recv() == []  # alice holds it
    alice.release(entry[0])
    mine.send("sweep")
    assert mine.recv() == [entry[0]]
    owner.join()
    assert owner.exitcode == 0
    mine.close()


def own(pipe) -> None:
    maps = []
    for size in (HOLD_BYTES, DESCRIPTOR_BYTES):
        fd = reduction.recv_handle(pipe)
        maps.append(map_fd(fd, size, writable=True))
        os.close(fd)
    table = ReferenceTable(*maps, CAPACITY)
    index, generation = table.open()
    pipe.send((index, generation))
    assert pipe.recv() == "let go"
    table.holder.release(index)
    pipe.send(table.sweep())
    assert pipe.recv() == "sweep"
    pipe.send(table.sweep())
