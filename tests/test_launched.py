"""Jobs as launchers start them: torchrun, and again after a worker was killed; Slurm by what it says to each task."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Sequence
from multiprocessing.context import ForkServerContext
from pathlib import Path

import pytest

import fastref.rpc as rpc
from tests.hosts import Host, hosts
from tests.world import far_peers

PATIENCE_S = 100.0
SECRET = "the token of a gang of two hosts"
TORCHRUN = ("-m", "torch.distributed.run", "--nproc-per-node", "2", "--max-restarts", "1")


def outcome(directory: Path, starts: Sequence[int]) -> str:
    """Check what the workers of the second life have got of each other; return what that of the first was told."""
    for rank, start in enumerate(starts):
        assert (directory / f"got-{rank}").read_text() == f"{[rank] * len(starts)} in start {start}"
    return (directory / "leftover").read_text()


def test_a_gang_that_torchrun_restarts_goes_on_without_one_of_its_first_life(tmp_path: Path) -> None:
    command = [sys.executable, *TORCHRUN, "--standalone", "-m", "tests.gang", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE_S, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "WorkerDied: worker 'w1'" in done.stderr
    assert "waited 1 s for the 2 workers" in outcome(tmp_path, [1, 1])


@pytest.mark.gates
@pytest.mark.timeout(200)
@pytest.mark.parametrize(
    ("scheme", "survivors", "starts"),
    [("static", "", [1, 1, 1, 1]), ("c10d", "stay", [0, 0, 1, 1])],
    ids=["all nodes have failed", "one node has failed"],
)
def test_a_gang_of_two_hosts_goes_on_however_torchrun_counts_its_starts(
    tmp_path: Path, mp_context: ForkServerContext, scheme: str, survivors: str, starts: list[int]
) -> None:
    with hosts(2, mp_context) as room:
        run_gang(room, scheme, str(tmp_path), survivors)
        told = outcome(tmp_path, starts)
        assert re.search(r"was restarted: worker 'w3' .* is of start 0, and worker 'w2' .* of start 1", told)


def test_slurms_tasks_on_two_hosts_need_nothing_but_the_token(mp_context: ForkServerContext) -> None:
    job = {"SLURM_NTASKS": "4", "SLURM_JOB_NUM_NODES": "2", "SLURM_JOB_NODELIST": "host[0-1]", "SLURM_JOB_ID": "4711"}
    with hosts(2, mp_context) as room:
        tasks = [
            host.hire(
                f"w{2 * number + local}",
                {**job, "SLURM_PROCID": f"{2 * number + local}", "SLURM_LOCALID": f"{local}", "FASTREF_TOKEN": SECRET},
            )
            for number, host in enumerate(room)
            for local in range(2)
        ]
        for task in tasks:
            task.order(rpc.init_rpc, task.name)
        for task in tasks:
            task.outcome()
        assert [task.do(far_peers) for task in tasks[::3]] == [
            {"w1": False, "w2": True, "w3": True},
            {"w0": True, "w1": True, "w2": False},
        ]
        for task in tasks:
            task.order(rpc.shutdown)
        for task in tasks:
            task.outcome()


def run_gang(room: Sequence[Host], scheme: str, *arguments: str) -> None:
    """Run the program under torchrun with two workers on each host."""
    for node, host in enumerate(room):
        where = ("--rdzv-backend", "c10d", "--rdzv-endpoint", f"{room[0].name}:29400", "--rdzv-id", "run7")
        if scheme == "static":
            where = ("--node-rank", str(node), "--master-addr", room[0].name, "--master-port", "29400")
        command = [*TORCHRUN, "--nnodes", str(len(room)), *where, "-m", "tests.gang", *arguments]
        host.run(sys.executable, command, {"FASTREF_TOKEN": SECRET})
    for host in room:
        for agent in host.processes:
            agent.finish(PATIENCE_S)
        left = host.run("find", [os.environ["FASTREF_RUN_DIR"], "/dev/shm", "-mindepth", "1"])
        assert left.finish() == ""
