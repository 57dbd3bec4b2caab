"""The door of a worker that runs: where it listens, and what strangers do to it: nothing."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import psutil

import fastref.rpc as rpc
from fastref.rref import current_wiring
from tests import proxied
from tests.puppets import PATIENCE_S, Puppet, Troupe, troupe_fixture  # noqa: F401
from tests.strangers import knock


def listens_at(puppet: Puppet) -> list[str]:
    """Return the addresses at which a process listens for TCP."""
    connections = psutil.Process(puppet.pid).net_connections("tcp")
    return [connection.laddr.ip for connection in connections if connection.status == psutil.CONN_LISTEN]


def own_endpoint() -> str:
    """Return where this worker listens for others."""
    wiring: Any = current_wiring()
    return wiring.record.endpoint


def resident_bytes() -> int:
    """Return how much memory this process has."""
    return psutil.Process().memory_info().rss


# ---- where it listens


def test_without_a_token_a_job_listens_on_loopback_only_and_on_nothing_once_it_is_over(troupe: Troupe) -> None:
    crew = troupe.start(2, transport="tcp")
    for puppet in crew:
        assert listens_at(puppet) == ["127.0.0.1"]
    troupe.leave(crew)
    assert [listens_at(puppet) for puppet in crew] == [[], []]


def test_with_a_token_a_job_listens_at_the_chosen_address_only(troupe: Troupe, tmp_path: Path) -> None:
    crew = [troupe.hire(f"w{rank}") for rank in range(2)]
    for rank, puppet in enumerate(crew):
        method = {"init_method": f"file://{tmp_path}/store"}
        environment = {"FASTREF_TOKEN": "the token of this test", "FASTREF_ADDRESS": f"127.0.0.{rank + 2}"}
        puppet.order(join_from_store, puppet.name, rank, method, environment)
    for puppet in crew:
        puppet.outcome()
    assert [listens_at(puppet) for puppet in crew] == [["127.0.0.2"], ["127.0.0.3"]]
    troupe.leave(crew)
    assert [listens_at(puppet) for puppet in crew] == [[], []]


def join_from_store(name: str, rank: int, method: dict[str, str], environment: dict[str, str]) -> None:
    """Join a job of two that meets in a store."""
    os.environ.update(environment, FASTREF_TRANSPORT="tcp")
    rpc.init_rpc(name, rank=rank, world_size=2, rpc_backend_options=rpc.RpcBackendOptions(**method))


# ---- strangers


def test_strangers_of_all_kinds_disturb_nobody_and_are_given_nothing(troupe: Troupe, tmp_path: Path) -> None:
    owner, user = troupe.start(2, transport="tcp")
    stranger = troupe.hire("stranger")
    endpoint, tripwire = owner.do(own_endpoint), tmp_path / "unpickled"
    stranger.order(knock, endpoint, 500, 0.5, str(tripwire))
    user.do(proxied.call_in_a_row, "w0", 0, 200)
    for _ in range(5):  # one who has the token gets in meanwhile, and a word
        assert user.do(proxied.visit_with, "w0", "anything", {}, {}) == ("refused", "closed")
    outcome = stranger.outcome()
    assert outcome["come"] > 100 and not outcome["let in"] and not tripwire.exists()
    assert owner.do(proxied.resumptions) == 0
    troupe.leave([owner, user])
