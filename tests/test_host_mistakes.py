"""What one host has set wrongly, as both are told; and a host whose network has no default route."""

from __future__ import annotations

from collections.abc import Iterator
from multiprocessing.context import ForkServerContext
from pathlib import Path

import pytest

import fastref.rpc as rpc
from fastref.errors import RendezvousError, UsageError
from tests.hosts import Host, hosts
from tests.puppets import Puppet
from tests.world import PORT, SECRET, far_peers

TOKEN = {"FASTREF_TOKEN": SECRET}
PATIENCE_S = 60.0


@pytest.fixture
def room(mp_context: ForkServerContext) -> Iterator[list[Host]]:
    with hosts(2, mp_context) as two:
        yield two


def begin(room: list[Host], method: str, *environments: dict[str, str]) -> list[Puppet]:
    """Have one worker on each host join; what comes of it is to be asked for."""
    workers = []
    for rank, (host, environment) in enumerate(zip(room, environments, strict=True)):
        workers.append(host.hire(f"w{rank}", {**TOKEN, **environment}))
        workers[rank].order(join, rank, method)
    return workers


def join(rank: int, method: str) -> None:
    options = rpc.RpcBackendOptions(init_method=method, rpc_timeout=PATIENCE_S)
    rpc.init_rpc(f"w{rank}", rank=rank, world_size=2, rpc_backend_options=options)


MISTAKES = [
    ({"FASTREF_TRANSPORT": "pigeons"}, "FASTREF_TRANSPORT is shm or tcp, .* it is 'pigeons'"),
    ({"FASTREF_TOKEN": "short"}, "a token has 16 to 4096 bytes, this one has 5"),
    ({"FASTREF_INTERFACE": "eth77"}, "this host has no such interface"),
]


@pytest.mark.shared_memory("what the environment of all says about the way is not what is tried here")
@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize(("mistake", "sentence"), MISTAKES)
def test_what_keeps_a_worker_from_listening_is_told_on_the_other_host(
    room: list[Host], rank: int, mistake: dict[str, str], sentence: str
) -> None:
    environments = [mistake if number == rank else {} for number in range(2)]
    workers = begin(room, f"tcp://{room[0].address}:{PORT}", *environments)
    with pytest.raises(UsageError, match=sentence):
        workers[rank].outcome()
    with pytest.raises(
        RendezvousError, match=rf"'w{rank}' \(rank {rank}, .* could not start: UsageError: .*{sentence}"
    ):
        workers[1 - rank].outcome()


@pytest.mark.parametrize("rank", [0, 1])
def test_the_loopback_of_another_host_of_the_same_machine_is_out_of_reach(room: list[Host], rank: int) -> None:
    environments = [{"FASTREF_ADDRESS": "127.0.0.1"} if number == rank else {} for number in range(2)]
    for worker in begin(room, f"tcp://{room[0].address}:{PORT}", *environments):
        with pytest.raises(
            RendezvousError, match=rf"'w{rank}' .* listens at 127.0.0.1:\d+, where worker .* cannot reach"
        ):
            worker.outcome()


def test_hosts_without_a_default_route_meet_by_a_file(room: list[Host], tmp_path: Path) -> None:
    workers = begin(room, f"file://{tmp_path}/store", {}, {})
    for worker in workers:
        worker.outcome()
    assert workers[0].do(far_peers) == {"w1": True}
    for host in room:
        assert [endpoint.rpartition(":")[0] for endpoint in host.listening()] == [host.address]
    for worker in workers:
        worker.order(rpc.shutdown)
    for worker in workers:
        worker.outcome()
