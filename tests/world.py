"""A job across real hosts: two workers on each of three, shared memory within a host and TCP between them."""

from __future__ import annotations

import os
import socket
import time
import traceback
from collections.abc import Callable, Sequence
from typing import Any

import torch

import fastref.rpc as rpc
from fastref.debug import snapshot
from tests import puppets
from tests.hosts import Host
from tests.jobs import wait_until_clean
from tests.puppets import Puppet

__all__ = ["PORT", "World", "far_peers", "host_name", "wait_until"]

SECRET = "the token of all jobs across hosts"
PORT = 7100
PER_HOST = 2


class World:
    """Workers w0 and w1 on the first host, w2 and w3 on the second, and so on; w0's host has the store.

    Parameters
    ----------
    room : list of Host
    tokens : sequence of str
        Of the workers of each host.
    """

    def __init__(self, room: Sequence[Host], tokens: Sequence[str] = ()) -> None:
        self.room = room
        self.all = [
            host.hire(f"w{PER_HOST * number + each}", {"FASTREF_TOKEN": token})
            for number, (host, token) in enumerate(zip(room, tokens or [SECRET] * len(room), strict=True))
            for each in range(PER_HOST)
        ]
        self.size = len(self.all)

    def __getitem__(self, rank: int) -> Puppet:
        return self.all[rank]

    @property
    def names(self) -> list[str]:
        return [puppet.name for puppet in self.all]

    def order_join(self, rank: int, scheme: str = "tcp", **options: Any) -> None:
        """Have one worker join; what comes of it is the outcome of its puppet."""
        self.all[rank].order(join_across, scheme, self.room[0].address, rank, self.size, options)

    def join(self, scheme: str = "tcp", **options: Any) -> World:
        """Have all join the job."""
        for rank in range(self.size):
            self.order_join(rank, scheme, **options)
        for puppet in self.all:
            puppet.outcome()
        return self

    def run(self, rank: int, function: Callable[..., Any], *arguments: Any) -> Any:
        """Run the body of a test on a worker; what it asserts is told with the lines where."""
        return self.all[rank].do(body, function, *arguments)

    def check(self, ranks: Sequence[int] = ()) -> None:
        """Fail when one of the workers goes on holding something."""
        some = [self.all[rank] for rank in ranks or range(self.size)]
        for puppet in some:
            puppet.order(wait_until_clean)
        for puppet in some:
            puppet.outcome()

    def leave(self, ranks: Sequence[int] = ()) -> None:
        """Have workers shut down gracefully, all at once, and end."""
        some = [self.all[rank] for rank in ranks or range(self.size)]
        for puppet in some:
            puppet.order(rpc.shutdown, True, puppets.PATIENCE_S)
        for puppet in some:
            puppet.outcome()
        assert [puppet.end() for puppet in some] == [0] * len(some)


def wait_until(condition: Callable[[], object]) -> None:
    """Wait until something is so."""
    deadline = time.monotonic() + puppets.PATIENCE_S
    while not condition():
        assert time.monotonic() < deadline, "it did not come to be"
        time.sleep(0.01)


# ---- what runs on the workers


def join_across(scheme: str, address: str, rank: int, world_size: int, options: dict[str, Any]) -> None:
    """Join the job whose store is at an address; ``scheme``: how this worker is told so."""
    torch.set_num_threads(1)
    init_method = f"tcp://{address}:{PORT}" if scheme == "tcp" else "env://"
    if scheme == "env":
        says = {"MASTER_ADDR": address, "MASTER_PORT": PORT, "RANK": rank, "WORLD_SIZE": world_size}
        os.environ.update({name: str(value) for name, value in says.items()})
    rpc.init_rpc(
        f"w{rank}",
        rank=rank,
        world_size=world_size,
        rpc_backend_options=rpc.RpcBackendOptions(init_method=init_method, **options),
    )


def body(function: Callable[..., Any], *arguments: Any) -> Any:
    """Call a function; an assertion of it tells where."""
    try:
        return function(*arguments)
    except AssertionError as error:
        error.add_note(traceback.format_exc())
        raise


def host_name() -> str:
    """Return the name of the host that this runs on."""
    return socket.gethostname()


def far_peers() -> dict[str, bool]:
    """Return of each other worker whether it is reached over TCP."""
    me = rpc.get_worker_info().name
    return {name: peer["far"] for name, peer in snapshot()["peers"].items() if name != me}
