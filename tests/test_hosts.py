"""Hosts of network namespaces are hosts: apart in everything but the network between them."""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from multiprocessing.context import ForkServerContext
from pathlib import Path

import psutil
import pytest

import fastref.rpc as rpc
from fastref.segments import host_identity, run_root
from tests.hosts import Host, Impossible, hosts
from tests.puppets import join_job, keep, kept

PORT = 7000
PATIENCE_S = 60.0


@pytest.fixture
def three(mp_context: ForkServerContext) -> Iterator[list[Host]]:
    with hosts(3, mp_context) as room:
        yield room


def serve_echo(address: str) -> None:
    """Send back what comes, one connection after the other."""
    with socket.create_server((address, PORT)) as server:
        while True:
            connection, _ = server.accept()
            with connection, contextlib.suppress(ConnectionResetError):
                while data := connection.recv(65536):
                    connection.sendall(data)


def connect(address: str) -> None:
    keep("echo", socket.create_connection((address, PORT), PATIENCE_S))


def say(text: str) -> None:
    kept("echo").sendall(text.encode())


def hear(timeout_s: float = PATIENCE_S) -> str:
    """What comes back; "" when the connection was closed, "silence" when nothing comes."""
    kept("echo").settimeout(timeout_s)
    try:
        return kept("echo").recv(65536).decode()
    except TimeoutError:
        return "silence"


def wait_until(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def start_echo(host: Host, address: str = "") -> None:
    host.hire("echo").order(serve_echo, address or host.address)
    wait_until(host.listening)


def who_and_where() -> tuple[str, int, int, list[str], list[str]]:
    return host_identity(), os.getpid(), os.getppid(), os.listdir("/dev/shm"), os.listdir(run_root())


def ask_where(name: str) -> str:
    return rpc.rpc_sync(name, host_identity)


def print_host_name(prefix: str) -> None:
    print(os.environ["FASTREF_SAYS"], prefix, socket.gethostname())


def leave_traces() -> None:
    Path("/dev/shm/fastref-trace").touch()
    (run_root() / "trace").touch()


def test_hosts_reach_each_other_by_address_and_by_name(three: list[Host]) -> None:
    for host in three:
        start_echo(host)
    for host in three:
        puppet = host.hire("asker")
        for other in three:
            for target in (other.address, other.name):
                puppet.do(connect, target)
                puppet.do(say, "hello")
                assert puppet.do(hear) == "hello"
        assert puppet.end() == 0


def test_no_two_hosts_share_identity_processes_memory_or_directory(three: list[Host]) -> None:
    here = who_and_where()
    three[0].hire("w").do(leave_traces)
    puppets = [host.hire(f"w{index}") for index, host in enumerate(three)]
    seen = [puppet.do(who_and_where) for puppet in puppets]
    assert len({here[0], *(one[0] for one in seen)}) == 4
    assert [one[0].split(":")[0] for one in seen] == [host.name for host in three]
    assert all(parent == 0 for _, _, parent, _, _ in seen)
    assert [shm for _, _, _, shm, _ in seen] == [["fastref-trace"], [], []]
    assert [files for _, _, _, _, files in seen] == [["trace"], [], []]
    assert who_and_where() == here


def test_two_programs_of_one_host_share_what_it_has(three: list[Host]) -> None:
    first, second = three[0].hire("first"), three[0].hire("second")
    assert first.do(host_identity) == second.do(host_identity)
    first.do(leave_traces)
    assert second.do(who_and_where)[3:] == (["fastref-trace"], ["trace"])


def test_two_workers_of_a_host_meet_in_its_own_shared_memory(three: list[Host]) -> None:
    pairs = [[host.hire(f"w{rank}") for rank in range(2)] for host in three[:2]]
    for pair in pairs:
        for rank, puppet in enumerate(pair):
            puppet.order(join_job, puppet.name, rank, 2, "the-same-name", {})
    for pair in pairs:
        for puppet in pair:
            puppet.outcome()
        assert pair[0].do(ask_where, "w1") == pair[1].do(host_identity)
        for puppet in pair:
            puppet.order(rpc.shutdown)
        for puppet in pair:
            puppet.outcome()


@pytest.mark.parametrize("remove", [False, True], ids=["cable", "card"])
def test_an_unplugged_host_is_silent_until_it_is_plugged_in_again(three: list[Host], remove: bool) -> None:
    start_echo(three[0], "0.0.0.0")
    puppet = three[1].hire("asker")
    puppet.do(connect, three[0].address)
    for side in three[:2]:
        side.unplug(remove)
        puppet.do(say, "is anybody there?")
        assert puppet.do(hear, 0.5) == "silence"
        side.plug()
        assert puppet.do(hear) == "is anybody there?"


def test_the_others_do_not_notice_that_one_is_unplugged(three: list[Host]) -> None:
    start_echo(three[0])
    puppet = three[1].hire("asker")
    three[2].unplug()
    puppet.do(connect, three[0].address)
    puppet.do(say, "hello")
    assert puppet.do(hear) == "hello"


def test_a_killed_host_ends_with_all_its_processes_and_no_other(three: list[Host]) -> None:
    start_echo(three[0])
    asker = three[1].hire("asker")
    asker.do(connect, three[0].address)
    nested = three[0].run("sh", ["-c", "sleep 1000 & sleep 1000"])
    wait_until(lambda: len(psutil.Process(nested.inner_pid).children()) == 2)
    victims = [psutil.Process(nested.inner_pid), *psutil.Process(nested.inner_pid).children()]
    three[0].kill()
    assert not any(victim.is_running() for victim in victims)
    assert (nested.returncode, three[0].processes[0].exitcode) == (-9, -9)
    assert asker.do(hear) == ""


def test_a_host_that_loses_power_is_silent(three: list[Host]) -> None:
    start_echo(three[0])
    asker = three[1].hire("asker")
    asker.do(connect, three[0].address)
    three[0].unplug()
    three[0].kill()
    assert asker.do(hear, 0.5) == "silence"


def test_what_cannot_be_done_is_said_and_harms_no_host(three: list[Host]) -> None:
    three[0].unplug(remove=True)
    with pytest.raises(Impossible, match="no interface"):
        three[0].unplug()
    three[0].plug()
    three[1].kill()
    with pytest.raises(AssertionError, match="host1 was killed"):
        three[1].run("true")
    assert [three[0].listening(), three[2].listening()] == [[], []]


def test_a_stopped_host_goes_on_where_it_was(three: list[Host]) -> None:
    start_echo(three[0])
    asker = three[1].hire("asker")
    asker.do(connect, three[0].address)
    three[0].stop()
    asker.do(say, "hello")
    assert asker.do(hear, 0.5) == "silence"
    three[0].cont()
    assert asker.do(hear) == "hello"


def test_what_listens_is_seen_and_on_its_own_host_only(three: list[Host]) -> None:
    assert [host.listening() for host in three] == [[], [], []]
    start_echo(three[0])
    start_echo(three[1], "127.0.0.1")
    assert [host.listening() for host in three] == [[f"{three[0].address}:{PORT}"], [f"127.0.0.1:{PORT}"], []]


def test_a_program_ends_on_a_host_as_anywhere(three: list[Host]) -> None:
    assert three[0].run("echo", ["a", "b"]).finish() == "a b\n"
    assert three[0].run("sh", ["-c", "echo $GREETING; pwd"], {"GREETING": "hi"}).finish() == f"hi\n{os.getcwd()}\n"
    assert three[0].run("sh", ["-c", "exit 7"]).wait(PATIENCE_S) == 7
    slow = three[0].run("sleep", ["1000"])
    slow.terminate()
    assert slow.wait(PATIENCE_S) == -15
    missing = three[0].run("no-such-program")
    assert missing.wait(PATIENCE_S) == 127 and "no-such-program" in missing.output


def test_a_function_of_a_module_runs_on_a_host(three: list[Host]) -> None:
    assert three[1].python(print_host_name, "I am", env={"FASTREF_SAYS": "hi"}).finish() == "hi I am host1\n"


PROGRAM = """
import os, sys
from tests.hosts import hosts
with hosts(2) as room:
    room[0].run("sleep", ["1000"])
    print("ready", flush=True)
    sys.stdin.read()
"""


def test_nothing_is_left_of_the_hosts_of_a_test_that_is_killed() -> None:
    command = [sys.executable, "-c", PROGRAM]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as program:
        if program.stdout.readline() != "ready\n":
            program.kill()
            pytest.skip("no hosts here, as the other tests say")
        below = psutil.Process(program.pid).children(recursive=True)
        # The switch and what is before it, a first process for each host, the program and what stands by it.
        assert len(below) == 6
        program.kill()
    gone, alive = psutil.wait_procs(below, PATIENCE_S)
    assert not alive


@pytest.mark.parametrize("environment, outcome", [("", pytest.skip.Exception), ("true", pytest.fail.Exception)])
def test_a_test_that_cannot_have_hosts_is_skipped_here_and_fails_in_ci(
    monkeypatch: pytest.MonkeyPatch, environment: str, outcome: type[BaseException]
) -> None:
    def refuse(*_: object) -> None:
        raise Impossible("unshare: Operation not permitted")

    monkeypatch.setenv("CI", environment)
    monkeypatch.setattr("tests.hosts._start", refuse)
    with pytest.raises(outcome, match="Operation not permitted"), hosts(2):
        pass
