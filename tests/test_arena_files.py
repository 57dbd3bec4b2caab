"""Arenas of running workers grow by files and give them back, whoever is slow, stopped, killed, late or a liar."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

import fastref
import fastref.rpc as rpc
from fastref._core import arm_failpoints, failpoint_passages
from fastref.errors import CallTimeout, FastrefError, PeerError, ResourceError, UsageError
from fastref.rref import current_wiring
from fastref.segments import seal
from tests import puppets
from tests.puppets import Ended, Puppet, Troupe, troupe_fixture  # noqa: F401

ELEMENTS = 5 << 20  # 20 MiB: more than the first file has
MIB = 1 << 20
POINT = re.compile(r"""\bfailpoint\(["'](file\.[a-z_]+)["']\)""")
POINTS = sorted(POINT.findall((Path(fastref.__file__).parent / "runtime" / "files.py").read_text()))
OF_PEERS = {"file.mapped", "file.unmapped"}


def files() -> Any:
    return current_wiring()._memory.files


def arena() -> dict[str, Any]:
    return current_wiring().snapshot()["arena"]


def be_quick(idle_s: float = 0.1) -> None:
    """Give back what is idle sooner than a program would want."""
    files().idle_s = idle_s


def total(tensor: torch.Tensor) -> float:
    return float(tensor.sum(dtype=torch.float64))


def make(value: float, elements: int = ELEMENTS) -> torch.Tensor:
    return torch.full((elements,), value)


def exchange(names: list[str], value: float, elements: int = ELEMENTS) -> None:
    """Send each a large tensor, and get one of each."""
    for name in names:
        assert rpc.rpc_sync(name, total, (make(value, elements),)) == value * elements
        assert total(rpc.rpc_sync(name, make, (value + 1, elements))) == (value + 1) * elements


def keep_tensor(label: str, tensor: torch.Tensor) -> None:
    puppets.keep(label, tensor)


def total_kept() -> float:
    return total(puppets.kept("kept"))


def send_to_keep(name: str, value: float) -> None:
    rpc.rpc_sync(name, keep_tensor, ("kept", make(value)))


def wait_until_idle(others: int = 0, patience_s: float = 20.0) -> dict[str, Any]:
    """Wait until the arena is as it was at the beginning; ``others``: files that stay all the same."""
    deadline = time.monotonic() + patience_s
    while (figures := arena())["files"] > 1 + others or (figures["retiring"] and not others):
        assert time.monotonic() < deadline, figures
        time.sleep(0.01)
    return figures


def mapped() -> int:
    """Bytes of arenas that this process maps."""
    found = 0
    for line in Path("/proc/self/maps").read_text().splitlines():
        if "memfd:fastref-arena" in line:
            start, end = line.split()[0].split("-")
            found += int(end, 16) - int(start, 16)
    return found


def descriptors() -> int:
    return psutil.Process().num_fds()


def quick_crew(troupe: Troupe, count: int = 3, **options: Any) -> list[Puppet]:
    crew = troupe.start(count, **options)
    for puppet in crew:
        puppet.do(be_quick)
    return crew


def names(crew: list[Puppet]) -> list[str]:
    return [puppet.name for puppet in crew]


# ---- as it should be


def test_memory_comes_when_it_is_needed_and_goes_when_it_is_not(troupe: Troupe) -> None:
    crew = quick_crew(troupe)
    for puppet in crew:
        puppet.do(exchange, names(crew), 1.0, 1 << 16)  # who leases opens the map of its pages, and keeps it
    before = [(puppet.do(mapped), puppet.do(descriptors)) for puppet in crew]
    for puppet in crew:
        puppet.do(be_quick, 3600.0)
    for puppet in crew:
        puppet.do(exchange, names(crew), 1.0)
    for puppet, (mapped_before, _) in zip(crew, before, strict=True):
        assert puppet.do(mapped) > mapped_before + 3 * 2 * 20 * MIB  # of each worker, two views
        assert puppet.do(arena)["committed"] >= 20 * MIB
    for puppet in crew:
        puppet.do(be_quick)
    for puppet in crew:
        figures = puppet.do(wait_until_idle)
        assert figures["given_back"] >= 20 * MIB
        assert figures["committed"] <= 4 * MIB
    assert [(puppet.do(mapped), puppet.do(descriptors)) for puppet in crew] == before
    troupe.leave(crew)


def test_addresses_are_used_again_by_other_files(troupe: Troupe) -> None:
    crew = quick_crew(troupe, 2)
    for puppet in crew:
        puppet.do(be_quick, 0.0)
    for i in range(15):
        for puppet in crew:
            puppet.do(exchange, names(crew), float(i), ELEMENTS + i * (1 << 18))
        for puppet in crew:
            puppet.do(wait_until_idle)
    troupe.leave(crew)


def test_files_come_and_go_while_others_send(troupe: Troupe) -> None:
    crew = quick_crew(troupe)
    for puppet in crew:
        puppet.do(be_quick, 0.0)
    for puppet in crew:
        puppet.order(exchange_for, 4.0, names(crew))
    for puppet in crew:
        assert puppet.outcome() > 0
    for puppet in crew:
        assert puppet.do(wait_until_idle)["given_back"] > 0
    troupe.leave(crew)


def exchange_for(seconds: float, to: list[str]) -> int:
    """Exchange tensors of changing sizes, with pauses in which files go; return how often."""
    deadline = time.monotonic() + seconds
    rounds = 0
    while time.monotonic() < deadline:
        exchange(to, float(rounds % 7), 1 << 18 + rounds % 5)
        time.sleep(0.15 * (rounds % 3))
        rounds += 1
    return rounds


def test_a_file_of_which_something_is_leased_stays(troupe: Troupe) -> None:
    w0, w1 = quick_crew(troupe, 2)
    w0.do(send_to_keep, "w1", 3.0)
    time.sleep(0.6)
    assert w0.do(arena)["files"] == 2
    assert w1.do(total_kept) == 3.0 * ELEMENTS
    w1.do(puppets.drop_all)
    w0.do(wait_until_idle)
    troupe.leave([w0, w1])


def test_what_comes_next_is_made_warm_ahead(troupe: Troupe) -> None:
    w0, w1 = troupe.start(2)
    w0.do(exchange, ["w1"], 1.0)
    assert w0.do(wait_until_populated) >= 20 * MIB
    w0.do(exchange, ["w1"], 2.0)
    troupe.leave([w0, w1])


def wait_until_populated(patience_s: float = 20.0) -> int:
    deadline = time.monotonic() + patience_s
    while arena()["populated_ahead"] < 20 * MIB:
        assert time.monotonic() < deadline, arena()
        time.sleep(0.01)
    return arena()["populated_ahead"]


# ---- those who join later


def test_who_joins_later_gets_the_files_that_there_are(troupe: Troupe) -> None:
    crew = [troupe.hire("w0"), troupe.hire("w1"), troupe.hire("w2")]
    for rank, puppet in enumerate(crew[:2]):
        puppet.do(puppets.join_job, puppet.name, rank, None, troupe.job, {})
        puppet.do(be_quick)
    w0, w1, w2 = crew
    w0.do(send_to_keep, "w1", 3.0)  # it keeps a file of w0
    w2.do(puppets.join_job, "w2", 2, None, troupe.job, {})
    w2.do(be_quick)
    w0.do(exchange, ["w2"], 4.0)
    w2.do(exchange, ["w0"], 5.0)
    w1.do(puppets.drop_all)
    for puppet in crew:
        puppet.do(wait_until_idle)
    troupe.leave(crew)


# ---- the limit


def test_the_environment_limits_the_arena(monkeypatch) -> None:
    for text, limit in (("5000000", 5_000_000), ("512K", 512 << 10), ("20m", 20 << 20), (" 3G ", 3 << 30)):
        monkeypatch.setenv("FASTREF_ARENA_LIMIT", text)
        assert rpc.RpcBackendOptions(init_method="local://x").arena_limit == limit
        assert rpc.RpcBackendOptions(init_method="local://x", arena_limit=7).arena_limit == 7
    for text in ("much", "-1", "1.5G", "2T", "G"):
        monkeypatch.setenv("FASTREF_ARENA_LIMIT", text)
        with pytest.raises(UsageError, match="FASTREF_ARENA_LIMIT"):
            rpc.RpcBackendOptions(init_method="local://x")
    monkeypatch.delenv("FASTREF_ARENA_LIMIT")
    assert rpc.RpcBackendOptions(init_method="local://x").arena_limit is None


def test_beyond_the_limit_is_an_error_that_names_it_and_nothing_is_lost(troupe: Troupe) -> None:
    w0, w1 = quick_crew(troupe, 2, arena_limit=50 * MIB)
    for _ in range(2):
        with pytest.raises(ResourceError, match=str(50 * MIB)):
            w0.do(exchange, ["w1"], 1.0, 15 << 20)
        w0.do(send_to_keep, "w1", 1.0)  # blocks of 20 MiB: there is room for two
        w0.do(exchange, ["w1"], 2.0)
        figures = w0.do(arena)
        assert figures["committed"] - figures["retiring"] <= 50 * MIB
        w1.do(puppets.drop_all)
    for i in range(20):
        w0.do(exchange, ["w1"], 1.0, (1 + i % 3) * (3 << 20))
    for puppet in (w0, w1):
        puppet.do(wait_until_idle)
    troupe.leave([w0, w1])


# ---- the stopped


def test_a_stopped_peer_delays_only_that_memory_is_given_back(troupe: Troupe) -> None:
    w0, w1, w2 = crew = quick_crew(troupe)
    w0.do(exchange, ["w1", "w2"], 1.0)
    w2.stop()
    w0.do(wait_until_retiring)
    committed = []
    for i in range(6):
        w0.do(exchange, ["w1"], float(i))
        time.sleep(0.3)
        committed.append(w0.do(arena)["committed"])
    figures = w0.do(arena)
    assert 0 < figures["retiring"] < figures["committed"]
    assert figures["files"] == 3  # one waits for w2; of the next nothing is asked
    assert committed[-1] == committed[2] < 130 * MIB
    w2.go_on()
    for puppet in crew:
        puppet.do(wait_until_idle)
    w0.do(exchange, ["w1", "w2"], 9.0)
    troupe.leave(crew)


def wait_until_retiring(patience_s: float = 20.0) -> None:
    deadline = time.monotonic() + patience_s
    while not arena()["retiring"]:
        assert time.monotonic() < deadline, arena()
        time.sleep(0.005)


def test_a_peer_that_is_killed_while_stopped_is_not_waited_for(troupe: Troupe) -> None:
    w0, w1, w2 = quick_crew(troupe)
    w0.do(exchange, ["w1", "w2"], 1.0)
    w2.stop()
    w0.do(wait_until_retiring)
    w2.kill()
    w0.do(wait_until_idle)
    w0.do(exchange, ["w1"], 2.0)
    troupe.leave([w0, w1])


# ---- the killed, stopped and delayed, at every step


@pytest.mark.parametrize("action", ["kill:1", "stop:0.3", "delay:0.02"])
@pytest.mark.parametrize("point", POINTS)
def test_a_worker_hit_at_any_step_harms_nobody_else(troupe: Troupe, point: str, action: str) -> None:
    w0, w1, w2 = crew = quick_crew(troupe)
    hit = w1 if point in OF_PEERS else w0
    hit.do(arm_failpoints, f"{point}={action}")
    with contextlib.suppress(Ended, PeerError):
        w0.do(exchange, ["w1", "w2"], 1.0)
    killed = action == "kill:1"
    if killed:
        hit.process.join(puppets.PATIENCE_S)
        assert hit.process.exitcode == -signal.SIGKILL
    survivors = [puppet for puppet in crew if puppet is not hit or not killed]
    for puppet in survivors:
        puppet.do(wait_until_idle)
        if killed:
            puppet.do(puppets.wait_until_dead, hit.name)
    if not killed:
        assert hit.do(failpoint_passages)[point] > 0
        hit.do(arm_failpoints, None)
    for puppet in survivors:
        puppet.do(exchange, names(survivors), 2.0)
    for puppet in survivors:
        assert puppet.do(wait_until_idle)["blocks"] == 0
    troupe.leave(survivors)


def test_there_are_points_to_be_hit_at() -> None:
    assert {"file.made", "file.announced", "file.mapped", "file.retired", "file.unmapped"} <= set(POINTS)
    assert OF_PEERS <= set(POINTS)


# ---- those that do not read


def link_to(name: str) -> Any:
    return next(link for link in current_wiring()._links.values() if link.record.name == name)


def read_nothing(name: str) -> None:
    """Have the system refuse what is posted to one peer."""
    link = link_to(name)
    puppets.keep("link", link)

    def refuse(*arguments: Any, **keywords: Any) -> None:
        raise CallTimeout("there is no room", name)

    link.send_message = refuse


def read_again() -> None:
    del puppets.kept("link").send_message
    puppets.drop("link")


def refused(name: str, elements: int) -> bool:
    try:
        rpc.rpc_sync(name, total, (make(1.0, elements),))
    except ResourceError as error:
        return name in str(error) and "has not read" in str(error)
    return False


def test_a_peer_that_has_no_room_for_the_announcement_gets_no_block_until_it_has(troupe: Troupe) -> None:
    w0, w1, w2 = quick_crew(troupe)
    w0.do(read_nothing, "w1")
    w0.do(exchange, ["w2"], 1.0)
    assert w0.do(refused, "w1", ELEMENTS)
    w0.do(rpc.rpc_sync, "w1", puppets.nothing_with, (bytes(8000),))  # through the ring
    w0.do(read_again)
    w0.do(exchange, ["w1", "w2"], 2.0)
    w0.do(wait_until_idle)
    troupe.leave([w0, w1, w2])


def test_a_peer_that_dies_with_messages_unread_is_in_nobodys_way(troupe: Troupe) -> None:
    w0, w1, w2 = quick_crew(troupe)
    w0.do(read_nothing, "w1")
    w0.do(exchange, ["w2"], 1.0)
    w1.kill()
    w0.do(puppets.drop_all)
    w0.do(puppets.wait_until_dead, "w1")
    w0.do(wait_until_idle)
    w0.do(exchange, ["w2"], 2.0)
    troupe.leave([w0, w2])


# ---- liars


def announce_nothing() -> None:
    files()._tell = lambda rank, link: None
    files()._untold = lambda rank: []


def say(name: str, kind: str, offset: int, size_bytes: int | None = None, sealed: bool = True) -> None:
    """Send a message about files to a peer, as it may come from one that is broken."""
    link = link_to(name)
    if size_bytes is None:
        link.send_message(kind, {"offset": offset})
        return
    fd = os.memfd_create("lie", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    os.ftruncate(fd, 1 << 20)
    if sealed:
        seal(fd)
    link.send_message(kind, {"offset": offset}, {"file": (fd, size_bytes)})
    os.close(fd)


def check_cut_off(liar: Puppet, victim: Puppet, witness: Puppet) -> None:
    """The liar counts as dead, and nobody else is the worse for it."""
    victim.do(puppets.wait_until_dead, liar.name)
    victim.do(exchange, [witness.name], 1.0)
    witness.do(exchange, [victim.name], 2.0)


def test_a_block_in_a_file_that_was_never_announced_is_no_block(troupe: Troupe) -> None:
    w0, w1, w2 = quick_crew(troupe)
    w0.do(announce_nothing)
    with pytest.raises(FastrefError):
        w0.do(exchange, ["w1"], 1.0)
    check_cut_off(w0, w1, w2)


@pytest.mark.parametrize(
    "lie",
    [
        ("arena-file", 0, 1 << 20),  # where one is
        ("arena-file", 4 << 20, 2 << 20),  # shorter than announced
        ("arena-file", 4 << 20, 1 << 20, False),  # may shrink
        ("arena-file", (4 << 20) + 1, 1 << 20),
        ("arena-file", 4 << 20, 1000),
        ("arena-file", 4 << 20, 0),
        ("arena-file", 1 << 50, 1 << 20),  # beyond the arena
        ("arena-file", (1 << 63) - 4096, 1 << 20),
        ("arena-file", 4 << 20),  # without a descriptor
        ("arena-drop", 4 << 20),  # there is none
        ("arena-drop", 1),
        ("arena-dropped", 4 << 20),  # it was not asked for
    ],
)
def test_nonsense_about_files_is_the_end_of_a_link(troupe: Troupe, lie: tuple) -> None:
    w0, w1, w2 = quick_crew(troupe)
    w0.do(say, "w1", *lie)
    check_cut_off(w0, w1, w2)


def test_a_file_that_is_taken_away_while_it_is_leased_is_kept(troupe: Troupe) -> None:
    w0, w1, w2 = quick_crew(troupe)
    w0.do(send_to_keep, "w1", 3.0)
    w0.do(say, "w1", "arena-drop", 4 << 20)
    check_cut_off(w0, w1, w2)
    assert w1.do(total_kept) == 3.0 * ELEMENTS
