"""Other libraries in the benchmark do the work they are timed for; what is not installed is said, not fatal."""

from __future__ import annotations

import gc
import os

import pytest
import torch

from fastref.bench import Effort, compare, rows
from fastref.bench.backends import BACKENDS
from fastref.bench.ledger import Ledger
from fastref.bench.objects import OBJECT_ROWS, ObjectCaller
from fastref.bench.peers import PEERS
from fastref.bench.peers.bytesfloor import BytesPeer, Server
from fastref.bench.report import markdown, text_table
from fastref.bench.work import Thing
from fastref.errors import FastrefError

TINY = Effort(seconds=0.02, min_samples=5, warmup=2, windows=2, exercise_calls=10, settle_s=0.1, idle_s=0.3)
LIGHT = ["managers", "pyro5", "rpyc", "zmq"]
OBJECTS = rows.ROW_GROUPS["peers"]


@pytest.mark.parametrize("name", LIGHT)
def test_a_library_does_all_the_work_that_it_offers(name):
    if (reason := BACKENDS[name].missing()) is not None:
        pytest.skip(f"{name} is {reason}")
    comparison = compare([name], OBJECTS, 1, TINY)
    assert comparison.notes == {}
    figures = comparison.rounds[0][name]
    assert list(figures) == [row for row in OBJECTS if row in BACKENDS[name].offers]
    assert all(summary.p50 > 0 and summary.first > 0 for summary in figures.values())


def test_what_is_not_installed_is_named_with_the_way_to_get_it(monkeypatch):
    monkeypatch.setattr(BACKENDS["ray"], "package", "no_such_package")
    comparison = compare(["ray", "pipe"], ["call", "object_call"], 1, TINY)
    assert comparison.backends == ["pipe"]
    sentence = "ray: not installed (pip install ray)"
    assert text_table(comparison).splitlines()[-1] == sentence and f"- {sentence}" in markdown(comparison)


def test_a_library_that_fails_is_noted_and_the_others_are_measured(monkeypatch):
    monkeypatch.setattr(BACKENDS["managers"], "world_size", 2)  # nobody serves: the adapter needs no second worker
    comparison = compare(["managers", "pipe"], ["call", "object_call"], 1, TINY)
    assert comparison.rounds[0]["managers"] == {} and comparison.rounds[0]["pipe"]["call"].p50 > 0
    (sentence,) = comparison.notes["managers"]
    assert "NotImplementedError" in sentence


def test_every_peer_offers_known_rows_and_says_how_to_get_it():
    for peer in PEERS:
        assert peer.optional and peer.offers <= OBJECT_ROWS == set(OBJECTS)
        assert {"object_call", "object_rate", "object_echo_1m", "object_fetch_1m"} <= peer.offers


class Here:
    """A peer whose objects live in this process."""

    def __init__(self):
        self.calls_lost = 0

    def create(self, ledger):
        return Thing(ledger)

    def touch(self, thing):
        thing.touch()

    def touches(self, thing):
        return thing.touches()

    def touch_many(self, thing, count):
        for _ in range(count - self.calls_lost):
            thing.touch()

    def echo(self, thing, tensor):
        return thing.echo(tensor)

    def fetcher(self, thing):
        return thing.tensor

    def pass_on(self, thing):
        thing.touch()

    def release(self, thing):
        pass


@pytest.mark.parametrize("row", OBJECTS)
def test_the_same_work_is_done_and_proven_for_every_row(row):
    summary = getattr(ObjectCaller(Here()), row)(TINY)
    assert summary.p50 > 0 and summary.operations >= summary.samples > 0 and summary.first > 0


def test_calls_that_were_lost_are_no_rate():
    peer = Here()
    peer.calls_lost = 1
    with pytest.raises(FastrefError, match="the other end counted"):
        ObjectCaller(peer).object_rate(TINY)


def test_an_echo_of_something_else_is_no_echo():
    peer = Here()
    peer.echo = lambda thing, tensor: tensor + 1
    with pytest.raises(FastrefError, match="did not come back as it was sent"):
        ObjectCaller(peer).object_echo_1k(TINY)


def test_a_ledger_counts_destructors_and_knows_when_the_last_one_ran():
    ledger = Ledger()
    assert ledger.count == 0
    things = [Thing(ledger.path) for _ in range(3)]
    stamps = []
    while things:
        things.pop()
        gc.collect()
        stamps.append(ledger.wait(3 - len(things)))
    assert ledger.count == 3 and stamps == sorted(set(stamps))
    ledger.close()


def test_a_destructor_that_nobody_waits_for_writes_nowhere(tmp_path):
    ledger = Ledger()
    late, later = Thing(ledger.path), Thing(ledger.path)
    number = int(ledger.path.rpartition("/")[2])
    ledger.close()
    del late
    page = tmp_path / "page"
    descriptor = os.open(page, os.O_RDWR | os.O_CREAT)
    if descriptor != number:
        os.dup2(descriptor, number)
        os.close(descriptor)
    del later
    os.close(number)
    assert page.read_bytes() == b""


class Loop:
    """A wire to a server in this process."""

    def __init__(self):
        self.server = Server()

    def ask(self, operation, payload):
        return bytearray(self.server.answer(operation, bytes(payload)))

    def touch_many(self, count):
        for _ in range(count):
            self.server.answer(1, b"")

    def close(self):
        pass


def test_a_floor_touches_counts_echoes_and_fetches():
    peer = BytesPeer(Loop())
    peer.touch(None)
    peer.touch_many(None, 4)
    assert peer.touches(None) == 6
    tensor = torch.arange(16, dtype=torch.int32)
    assert torch.equal(peer.echo(None, tensor), tensor)
    assert torch.equal(peer.fetcher(None)(), torch.ones(1 << 18))
