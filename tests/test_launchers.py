"""What a launcher's environment says: ranks, places and lives; which address a worker tells; whether it listens."""

from __future__ import annotations

import dataclasses
import logging
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

import fastref.rpc as rpc
from fastref.errors import RendezvousError, UsageError
from fastref.identity import loopback_token
from fastref.rendezvous import (
    Listener,
    Way,
    WorkerRecord,
    is_open,
    job_name,
    open_door,
    resolve_member_rank,
    resolve_rank,
    way_to,
)
from fastref.rendezvous.addresses import choose_address
from fastref.rendezvous.launchers import (
    all_on_this_host,
    first_node,
    launch_settings,
    node_rank,
    restart_count,
    start_of_all,
)
from fastref.rendezvous.methods import store_host

SLURM = {
    "SLURM_PROCID": "3",
    "SLURM_NTASKS": "8",
    "SLURM_LOCALID": "1",
    "SLURM_JOB_NODELIST": "node[07-09],other",
    "SLURM_JOB_ID": "123456",
}
ALL = (*SLURM, "RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "SLURM_STEP_NODELIST")
TORCH = {"RANK": "1", "WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "4711"}
SECRET = "a token of sixteen characters and more"


@pytest.fixture
def environ(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    for name in (*ALL, "TORCHELASTIC_RUN_ID", "TORCHELASTIC_RESTART_COUNT", "FASTREF_TOKEN", "FASTREF_TRANSPORT"):
        monkeypatch.delenv(name, raising=False)
    return monkeypatch


# Slurm


@pytest.mark.parametrize(
    ("nodes", "first"),
    [
        ("node1", "node1"),
        ("a,b,c", "a"),
        ("node[001-003,007],gpu5", "node001"),
        ("node[12,14-20]", "node12"),
        ("rack[1-2]node[03-09]x,b", "rack1node03x"),
        ("tux-3.example.org,b", "tux-3.example.org"),
    ],
)
def test_the_first_node_of_a_list_is_found(nodes, first):
    assert first_node(nodes) == first


@pytest.mark.parametrize("nodes", ["", ",a", "]"])
def test_a_list_that_begins_with_no_name_is_an_error(nodes):
    with pytest.raises(UsageError, match="begins with no name"):
        first_node(nodes)


def test_slurm_says_rank_world_and_where_the_store_is(environ):
    for name, value in SLURM.items():
        environ.setenv(name, value)
    assert resolve_rank("env://") == (3, 8)
    assert not is_open("env://", None)
    assert launch_settings()["MASTER_ADDR"] == store_host("env://") == "node07"
    port = int(launch_settings()["MASTER_PORT"])
    assert 20_000 <= port < 32_000
    assert job_name("env://") == f"env://node07:{port}"
    environ.setenv("SLURM_JOB_ID", "123457")
    assert int(launch_settings()["MASTER_PORT"]) == port + 1
    environ.setenv("SLURM_STEP_NODELIST", "node09")
    environ.setenv("MASTER_PORT", "1234")
    assert job_name("env://") == "env://node09:1234"


@pytest.mark.parametrize("name", ["RANK", "WORLD_SIZE", "MASTER_ADDR"])
def test_what_somebody_has_set_goes_before_slurm(environ, name):
    for variable, value in {**SLURM, name: "1"}.items():
        environ.setenv(variable, value)
    settings = launch_settings()
    assert settings == {"RANK": "", "WORLD_SIZE": "", "MASTER_ADDR": "", "MASTER_PORT": "", name: "1"}


@pytest.mark.parametrize("name", ["SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID", "SLURM_JOB_NODELIST"])
def test_a_half_set_slurm_says_nothing(name):
    assert not any(launch_settings({key: value for key, value in SLURM.items() if key != name}).values())


def test_workers_that_slurm_started_find_each_other(environ, tmp_path):
    from fastref.rendezvous.methods import open_store

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    here = {**SLURM, "SLURM_PROCID": "0", "SLURM_JOB_NODELIST": "127.0.0.1", "MASTER_PORT": str(port)}
    for name, value in here.items():
        environ.setenv(name, value)
    store = open_store("env://", 0, 8, 20.0)
    store.set("key", "value")
    assert open_store("env://", 1, 8, 20.0).get("key") == b"value"


# torchrun


def test_a_job_that_torchrun_started_has_its_name_and_its_life(environ):
    environ.setenv("MASTER_ADDR", "somewhere")
    environ.setenv("MASTER_PORT", "1")
    assert (job_name("env://"), restart_count()) == ("env://somewhere:1", 0)
    environ.setenv("TORCHELASTIC_RUN_ID", "run7")
    environ.setenv("TORCHELASTIC_RESTART_COUNT", "2")
    assert (job_name("env://"), restart_count()) == ("env://somewhere:1#run7", 2)
    assert job_name("tcp://somewhere:1?rank=0") == "tcp://somewhere:1#run7"
    assert job_name("local://job") == "job"
    environ.setenv("TORCHELASTIC_RESTART_COUNT", "often")
    with pytest.raises(UsageError, match="TORCHELASTIC_RESTART_COUNT must be a number, it is 'often'"):
        restart_count()


@pytest.mark.parametrize(
    ("environment", "node", "start"),
    [
        ({}, 0, 0),
        ({"TORCHELASTIC_RESTART_COUNT": "2"}, 0, 2),
        ({"TORCHELASTIC_RESTART_COUNT": "2", "TORCHELASTIC_RUN_ID": "run7", "GROUP_RANK": "3", **TORCH}, 3, 0),
        ({"TORCHELASTIC_RESTART_COUNT": "2", "TORCHELASTIC_RUN_ID": "run7", **TORCH, "LOCAL_WORLD_SIZE": "4"}, 0, 2),
    ],
)
def test_a_start_has_a_number_that_all_know_where_all_are_of_one_node(environment, node, start):
    assert (node_rank(environment), start_of_all(environment)) == (node, start)


@pytest.mark.parametrize(
    ("environment", "answer"),
    [
        ({}, False),
        (TORCH, False),
        ({**TORCH, "LOCAL_WORLD_SIZE": "4"}, True),
        (SLURM, False),
        ({**SLURM, "SLURM_JOB_NUM_NODES": "1"}, True),
        ({**SLURM, "SLURM_JOB_NUM_NODES": "1", "SLURM_STEP_NUM_NODES": "2"}, False),
    ],
)
def test_the_launcher_says_whether_all_are_on_one_host(environment, answer):
    assert all_on_this_host(environment) is answer


# Addresses


@pytest.mark.parametrize(("host", "text"), [("127.0.0.1", "127.0.0.1"), ("localhost", None), ("::1", "::1")])
def test_a_store_on_loopback_is_reached_from_loopback(host, text):
    try:
        socket.create_server((host, 0), family=socket.AF_INET6 if ":" in host else socket.AF_INET).close()
    except OSError:
        pytest.skip(f"no {host} here")
    chosen = choose_address(host, environ={})
    assert chosen.is_loopback
    assert chosen.why == f"it reaches the store at {host}"
    assert text in (None, chosen.text)


def test_an_address_or_an_interface_can_be_asked_for():
    assert choose_address(None, "127.0.0.1", {}).why == "the option address"
    asked = choose_address("10.0.0.1", None, {"FASTREF_ADDRESS": "localhost", "FASTREF_INTERFACE": "lo"})
    assert asked.is_loopback and asked.why == "FASTREF_ADDRESS"
    of_interface = choose_address("10.0.0.1", None, {"FASTREF_INTERFACE": "lo"})
    assert (of_interface.text, of_interface.why) == ("127.0.0.1", "FASTREF_INTERFACE=lo")
    as_for_torch = choose_address("10.0.0.1", None, {"TP_SOCKET_IFNAME": "lo"})
    assert (as_for_torch.text, as_for_torch.why) == ("127.0.0.1", "TP_SOCKET_IFNAME=lo")
    by_option = choose_address("10.0.0.1", "lo", {"FASTREF_ADDRESS": "10.0.0.1"})
    assert (by_option.text, by_option.why) == ("127.0.0.1", "the option address=lo")


@pytest.mark.parametrize(
    ("option", "environment", "text"),
    [
        ("192.0.2.7", {}, "the option address must be an address of this host, '192.0.2.7' is none; .*interfaces.*lo"),
        ("eth77", {}, "the option address must be an address of this host, 'eth77' is none; .*interfaces.*lo"),
        (None, {"TP_SOCKET_IFNAME": "eth77"}, "TP_SOCKET_IFNAME=eth77: this host has no such interface, it has .*lo"),
        (None, {"FASTREF_ADDRESS": "no such host"}, "FASTREF_ADDRESS must be an address of this host"),
        (None, {"FASTREF_INTERFACE": "eth77"}, "FASTREF_INTERFACE=eth77: this host has no such interface, it has .*lo"),
    ],
)
def test_what_is_no_address_of_this_host_is_refused(option, environment, text):
    with pytest.raises(UsageError, match=text):
        choose_address(None, option, environment)


@pytest.mark.parametrize("kind", [rpc.RpcBackendOptions, rpc.TensorPipeRpcBackendOptions])
def test_a_worker_listens_where_its_options_say(environ, tmp_path, caplog, kind):
    environ.setenv("FASTREF_TRANSPORT", "tcp")

    def join(address: str | None) -> None:
        options = kind(rpc_timeout=5.0, init_method=f"file://{tmp_path}/{address}", address=address)
        rpc.init_rpc("alone", rank=0, world_size=1, rpc_backend_options=options)
        rpc.shutdown()

    environ.setenv("FASTREF_TOKEN", SECRET)
    with caplog.at_level(logging.INFO, logger="fastref"):
        join("lo")
    assert (
        "listening at 127.0.0.1:" in caplog.text and "for workers of other hosts: the option address=lo" in caplog.text
    )
    with pytest.raises(UsageError, match="the option address must be an address of this host, 'eth77' is none"):
        join("eth77")
    with pytest.raises(TypeError, match="address is a string, got 7"):
        kind(address=7)


def test_a_name_that_means_loopback_only_here_is_not_told_to_others(monkeypatch):
    monkeypatch.setattr("fastref.rendezvous.addresses._addresses_of", lambda name: ["127.0.1.1"])
    assert choose_address("this-host", environ={}).why in ("it is that of the default route", "this host has no other")


# Ways


def record(host: str, **more: object) -> WorkerRecord:
    one = WorkerRecord("alice", 0, 1, "0" * 16, "/a", 2, "1.0", 1, 61, host)
    return dataclasses.replace(one, **more)


@pytest.mark.parametrize(
    ("theirs", "forced", "way", "text"),
    [
        ("here", "", Way("shm"), "shm"),
        ("here", "shm", Way("shm", "FASTREF_TRANSPORT"), "shm: FASTREF_TRANSPORT"),
        ("here", "tcp", Way("tcp", "FASTREF_TRANSPORT"), "tcp: FASTREF_TRANSPORT"),
        ("there", "", Way("tcp", "another host"), "tcp: another host"),
        ("there", "tcp", Way("tcp", "another host"), "tcp: another host"),
    ],
)
def test_a_way_is_chosen_for_a_reason(theirs, forced, way, text):
    chosen = way_to(record("here"), record(theirs), {"FASTREF_TRANSPORT": forced})
    assert (chosen, str(chosen)) == (way, text)


def test_shared_memory_between_hosts_cannot_be_forced():
    with pytest.raises(RendezvousError, match="'alice' .* runs on here and .* on there, and FASTREF_TRANSPORT=shm"):
        way_to(record("here"), record("there"), {"FASTREF_TRANSPORT": "shm"})


# Whether a worker listens


@pytest.fixture
def listener(no_leaks: None, tmp_path: Path) -> Iterator[Listener]:
    listener = Listener(tmp_path / "job", "0" * 16)
    yield listener
    listener.close()
    assert not (tmp_path / "job").exists()


TOKEN = {"FASTREF_TOKEN": SECRET}
TCP = {"FASTREF_TRANSPORT": "tcp"}


@pytest.mark.parametrize(
    ("method", "environment", "listens"),
    [
        ("local://job", {}, False),
        ("local://job", TOKEN, False),
        ("local://job", TCP, True),
        ("env://", TORCH, False),
        ("env://", {**TORCH, **TOKEN}, True),
        ("env://", {**TORCH, **TOKEN, "LOCAL_WORLD_SIZE": "4"}, False),
        ("env://", {**TORCH, **TCP, "LOCAL_WORLD_SIZE": "4"}, True),
        ("env://", {**TORCH, **TCP}, True),  # its store is on loopback
        ("env://", {**TORCH, **TOKEN, "FASTREF_TRANSPORT": "shm"}, False),
        ("tcp://127.0.0.1:1", TOKEN, True),
        ("file:///tmp/store", TCP, True),
    ],
)
def test_a_worker_listens_when_it_has_to_and_on_loopback_unless_told(environ, listener, method, environment, listens):
    for name, value in environment.items():
        environ.setenv(name, value)
    door = open_door(listener, method)
    assert (door is not None) is listens
    if door is not None:
        assert door.endpoint.startswith("127.0.0.1:")
        if "FASTREF_TOKEN" not in environment:
            assert door.credentials.token == loopback_token(listener.directory)
        door.close()


def test_listening_beyond_loopback_without_a_token_is_refused_with_the_line_that_mends_it(environ, listener):
    for name, value in {**TORCH, **TCP, "FASTREF_ADDRESS": "not loopback"}.items():
        environ.setenv(name, value)
    environ.setattr("fastref.rendezvous.addresses._addresses_of", lambda name: ["10.9.8.7"])
    environ.setattr("fastref.rendezvous.addresses._source_towards", lambda target: "10.9.8.7")
    environ.delenv("FASTREF_ADDRESS")
    with pytest.raises(UsageError, match=r"10.9.8.7.*export FASTREF_TOKEN=\$\(python -c 'import secrets; print"):
        open_door(listener, "env://")


def test_what_was_chosen_and_why_is_logged_and_kept(environ, listener, caplog):
    environ.setenv("FASTREF_TOKEN", SECRET)
    with caplog.at_level(logging.INFO, logger="fastref"):
        door = open_door(listener, "tcp://127.0.0.1:1")
    assert f"listening at {door.endpoint} for workers of other hosts: it reaches the store at 127.0.0.1" in caplog.text
    assert door.address.why == "it reaches the store at 127.0.0.1"
    assert SECRET not in caplog.text
    door.close()


def test_a_store_of_ones_own_says_where_it_is(environ):
    from torch.distributed import HashStore, PrefixStore, TCPStore

    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    assert store_host("env://", PrefixStore("x", store)) == "127.0.0.1"
    environ.setenv("MASTER_ADDR", "elsewhere")
    assert store_host("env://", HashStore()) is None


def test_groups_of_open_size_stay_on_one_host_and_say_so(environ):
    with pytest.raises(UsageError, match="192.0.2.7.* of open size are on one host so far; those of a job, to"):
        resolve_member_rank("tcp://192.0.2.7:1?rank=0", 0)
    environ.setenv("FASTREF_TRANSPORT", "tcp")
    with pytest.raises(UsageError, match="FASTREF_TRANSPORT=tcp: workers of a group of open size .* use shared memory"):
        resolve_member_rank("local://job", 0)
