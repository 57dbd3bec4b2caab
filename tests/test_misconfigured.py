"""A job that cannot start: every worker learns why, at once, and can start another afterwards."""

from __future__ import annotations

import os
import socket
import time
from pathlib import Path

import pytest

import fastref.rpc as rpc
from fastref.errors import UsageError
from tests import puppets
from tests.misconfigured import CASES, DAMAGED, METHODS, Part, check, free_port, play, prepared, take_part, trio
from tests.puppets import Puppet, Troupe, troupe_fixture  # noqa: F401

# One or two of a kind; the gate plays all of them over every init method.
OFTEN = [
    *("same_name", "same_rank", "missing_rank", "no_world", "name_too_long", "full_shm", "full_shm_of_the_coordinator"),
    *("no_memory_for_a_ring", "killed_while_joining", "coordinator_killed_while_joining", "unknown_scheme"),
    *("old_worker_in_a_running_job", "run_directory_open_to_others", "run_directory_of_another_user", "never_full"),
]


@pytest.fixture
def place(troupe: Troupe, tmp_path: Path) -> tuple[str, int, Path]:
    """Return job name, port and directory, for an init method of any kind."""
    return troupe.job, free_port(), tmp_path


NOT_OVER_TCP = {
    "no_memory_for_a_ring": pytest.mark.shared_memory("there is no ring elsewhere"),
}


@pytest.mark.parametrize("name", [pytest.param(name, marks=NOT_OVER_TCP.get(name, ())) for name in OFTEN])
def test_everybody_learns_what_is_wrong(
    troupe: Troupe, place: tuple[str, int, Path], tmp_path: Path, name: str
) -> None:
    case = prepared(CASES[name], tmp_path)
    _, outcomes = play(troupe, case.parts, case.methods[0], place)
    check(case, outcomes)


@pytest.mark.parametrize("method", METHODS[1:])
@pytest.mark.parametrize("name", ["missing_rank", "arena_beyond_the_system"])
def test_everybody_learns_it_by_any_init_method(
    troupe: Troupe, place: tuple[str, int, Path], name: str, method: str
) -> None:
    _, outcomes = play(troupe, CASES[name].parts, method, place)
    check(CASES[name], outcomes)


@pytest.mark.shared_memory("there are no segments to damage elsewhere")
@pytest.mark.parametrize("damage", DAMAGED)
def test_a_damaged_segment_is_an_error_that_names_its_maker(
    troupe: Troupe, place: tuple[str, int, Path], damage: str
) -> None:
    players, outcomes = play(troupe, trio(w1=DAMAGED[damage]), "local", place)
    for outcome in (outcomes[0], outcomes[2]):
        assert outcome.error in ("ProtocolError", "RendezvousError")
        assert "'w1' (rank 1, " in outcome.text
        assert any(word in outcome.text for word in ("is damaged", "handed over no segment", "layout", "claims"))
    assert outcomes[1].error == "RendezvousError"
    # Nobody is lost by it: the two that did nothing wrong go on with another worker.
    crew = [players[0], players[2]]
    for rank, player in enumerate(crew):
        player.name = f"w{rank}"
    troupe.join(crew, job=f"{troupe.job}-again")
    assert crew[0].do(rpc.rpc_sync, "w1", puppets.process_id) == crew[1].pid
    troupe.leave(crew)


def test_workers_whose_tables_have_other_bits_work_together(troupe: Troupe, place: tuple[str, int, Path]) -> None:
    parts = [Part(f"w{rank}", rank, 3, "joined", options={"table_bits": bits}) for rank, bits in enumerate((61, 2, 0))]
    crew, outcomes = play(troupe, parts, "local", place)
    assert [outcome.error for outcome in outcomes] == ["joined"] * 3
    for rank, puppet in enumerate(crew):
        other = f"w{(rank + 1) % 3}"
        puppet.do(puppets.keep_result, "reference", rpc.remote, other, puppets.Cell, (rank,))
        puppet.do(puppets.hand_on, "reference", f"w{(rank + 2) % 3}", f"from {rank}")
    for rank in range(3):
        assert crew[(rank + 2) % 3].do(puppets.get_through, f"from {rank}") == rank
    for puppet in crew:
        puppet.do(puppets.drop_all)
    for puppet in crew:
        puppet.do(puppets.wait_until_entries, 0)
    troupe.leave(crew)


def found_socket() -> str:
    """Return where the only worker so far listens, or a path where nobody does."""
    run_directory = Path(os.environ["FASTREF_RUN_DIR"])
    return next((str(path) for path in run_directory.glob("job-*/*.sock")), str(run_directory / "nobody"))


def test_a_process_that_talks_nonsense_at_the_meeting_keeps_nobody_from_starting(
    troupe: Troupe, place: tuple[str, int, Path]
) -> None:
    w0, w1 = troupe.hire("w0"), troupe.hire("w1")
    w0.order(take_part, Part("w0", 0, 2), "local", place)
    stranger = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    while stranger.connect_ex(found_socket()):
        time.sleep(0.005)
    stranger.send(os.urandom(4096))
    w1.order(take_part, Part("w1", 1, 2), "local", place)
    assert [w0.outcome().error, w1.outcome().error] == ["joined", "joined"]
    stranger.close()
    troupe.leave([w0, w1])


@pytest.mark.shared_memory("there are no segments to damage elsewhere")
def test_those_who_were_told_start_another_job_at_once(troupe: Troupe, place: tuple[str, int, Path]) -> None:
    crew, outcomes = play(troupe, CASES["no_memory_for_a_ring"].parts, "local", place)
    check(CASES["no_memory_for_a_ring"], outcomes)
    for rank, puppet in enumerate([crew[0], crew[2]]):
        puppet.name = f"w{rank}"
    troupe.join([crew[0], crew[2]])
    assert crew[0].do(rpc.rpc_sync, "w1", puppets.process_id) == crew[2].pid
    troupe.leave([crew[0], crew[2]])


def test_a_worker_whose_others_never_come_raises_its_own_error() -> None:
    """It looks for somebody to tell, finds nobody, and says so in a note."""
    options = rpc.RpcBackendOptions(init_method=f"local://nobody-{os.getpid()}")
    with pytest.raises(UsageError, match="Worker name must match") as caught:
        rpc.init_rpc("a b", rank=1, world_size=2, rpc_backend_options=options)
    assert "no coordinator of job" in caught.value.__notes__[0]
