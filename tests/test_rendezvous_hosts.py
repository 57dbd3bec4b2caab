"""Workers of real hosts meet: each has its own network, processes and run directory; they share a store."""

from __future__ import annotations

import time
from collections.abc import Iterator
from multiprocessing.context import ForkServerContext

import pytest

from tests.hosts import Host, hosts
from tests.workers import PATIENCE_S, worker

PORT = 29_500
TOKEN = {"FASTREF_TOKEN": "the token of the job on these hosts"}


@pytest.fixture
def three(mp_context: ForkServerContext) -> Iterator[list[Host]]:
    with hosts(3, mp_context) as room:
        yield room


def meet(name: str, rank: int, world_size: int, init_method: str, timeout_s: float = PATIENCE_S) -> tuple[object, ...]:
    """Join and link; return names, ways and where this worker listens, or the error."""
    started = time.monotonic()
    with worker(name, init_method) as one:
        endpoint = one.door.endpoint if one.door else ""
        why = one.door.address.why if one.door else ""
        try:
            one.join(rank, world_size, timeout_s)
            one.link(PATIENCE_S)
        except Exception as error:
            return type(error).__name__, str(error), time.monotonic() - started
        for link in one.links.values():  # nobody leaves before all have their links
            link.send_message("done", {})
        for link in one.links.values():
            assert link.wait_message(time.monotonic() + PATIENCE_S) is not None
        names = [member.name for member in one.membership.members]
        return names, [str(link.way) for _, link in sorted(one.links.items())], endpoint, why


def test_three_hosts_of_two_workers_meet_at_the_store_of_the_first(three):
    place = f"tcp://{three[0].address}:{PORT}"
    crew = [host.hire(f"w{2 * index + beside}", TOKEN) for index, host in enumerate(three) for beside in range(2)]
    for rank, puppet in reversed(list(enumerate(crew))):
        puppet.order(meet, f"w{rank}", rank, 6, place)
    for rank, puppet in enumerate(crew):
        names, ways, endpoint, why = puppet.outcome()
        assert names == [f"w{number}" for number in range(6)]
        expected = ["shm" if other == rank ^ 1 else "tcp: another host" for other in range(6) if other != rank]
        assert ways == expected
        assert endpoint.startswith(f"{three[rank // 2].address}:")
        assert why == f"it reaches the store at {three[0].address}"


def test_without_a_token_all_are_told_what_to_do(three):
    place = f"tcp://{three[0].address}:{PORT}"
    crew = [host.hire(f"w{rank}", {"FASTREF_TOKEN": ""}) for rank, host in enumerate(three[:2])]
    for rank, puppet in enumerate(crew):
        puppet.order(meet, f"w{rank}", rank, 2, place)
    outcomes = [puppet.outcome() for puppet in crew]
    assert [outcome[0] for outcome in outcomes] == ["RendezvousError"] * 2
    assert outcomes[0][1] == outcomes[1][1]
    assert "'w1' (rank 1, " in outcomes[0][1] and "set FASTREF_TOKEN" in outcomes[0][1]


def test_a_token_of_another_job_is_told_to_both_hosts(three):
    place = f"tcp://{three[0].address}:{PORT}"
    crew = [three[0].hire("w0", TOKEN), three[1].hire("w1", {"FASTREF_TOKEN": "the token of another job"})]
    for rank, puppet in enumerate(crew):
        puppet.order(meet, f"w{rank}", rank, 2, place)
    outcomes = [puppet.outcome() for puppet in crew]
    assert [outcome[0] for outcome in outcomes] == ["RendezvousError"] * 2
    assert outcomes[0][1] == outcomes[1][1]
    assert "did not prove themselves to each other" in outcomes[0][1]


def test_slurm_leads_tasks_of_several_nodes_to_each_other(three):
    nodes = {"SLURM_NTASKS": "3", "SLURM_JOB_NODELIST": f"{three[0].address},other", "SLURM_JOB_ID": "77"}
    crew = [
        host.hire(f"w{rank}", {**TOKEN, **nodes, "SLURM_PROCID": str(rank), "SLURM_LOCALID": "0"})
        for rank, host in enumerate(three)
    ]
    for rank, puppet in enumerate(crew):
        puppet.order(meet, f"w{rank}", -1, None, "env://")
    assert [puppet.outcome()[0] for puppet in crew] == [["w0", "w1", "w2"]] * 3


@pytest.mark.slow
@pytest.mark.parametrize("gone", [0, 1])
def test_a_worker_whose_host_vanished_while_it_waited_counts_as_dead(three, gone, tmp_path):
    place = f"file://{tmp_path}/store"
    crew = [host.hire(f"w{rank}", {**TOKEN, "FASTREF_INTERFACE": "eth0"}) for rank, host in enumerate(three[:2])]
    for rank, puppet in enumerate(crew):
        puppet.order(meet, f"w{rank}", rank, 3, place)
    time.sleep(1.0)
    three[gone].unplug()
    three[gone].kill()
    kind, told, _ = crew[1 - gone].outcome()
    assert kind == "RendezvousError"
    assert f"'w{gone}' (rank {gone}, " in told and "died or left before all had come" in told


@pytest.mark.slow
def test_the_next_coordinator_takes_the_place_of_one_whose_host_vanished(three, tmp_path):
    place = f"file://{tmp_path}/store"
    environment = {**TOKEN, "FASTREF_INTERFACE": "eth0"}
    three[0].hire("old", environment).order(meet, "old", 0, 2, place)
    time.sleep(1.0)
    three[0].unplug()
    three[0].kill()
    crew = [three[1].hire("w0", environment), three[2].hire("w1", environment)]
    crew[0].order(meet, "w0", 0, 2, place)
    time.sleep(2.5)  # until it has taken the place; who comes before that is told that the old one cannot be reached
    crew[1].order(meet, "w1", 1, 2, place)
    assert [puppet.outcome()[0] for puppet in crew] == [["w0", "w1"]] * 2
