"""A /dev/shm that is tiny or full: typed errors or another way, never a signal."""

from __future__ import annotations

import shutil
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
# What opens segments, carries payloads, starts, ends and dies; named, since the whole suite would take its time twice.
SLICE = [
    "tests/test_segments.py",
    "tests/test_signals.py::test_ctrl_c_ends_init_that_waits_for_others_and_the_process_can_start_again",
    "tests/test_death.py::test_the_references_of_a_killed_worker_go",
    "tests/test_death.py::test_the_next_start_removes_what_the_killed_left",
    "tests/test_death.py::test_survivors_start_again_with_a_new_worker_in_the_place_of_the_dead",
    "tests/test_fork.py::test_workers_of_a_data_loader_are_refused_and_harm_nothing",
    "tests/test_stress.py::test_no_reference_is_lost_and_none_is_left_whatever_happens[61-0]",
]
MOUNT = 'mount -t tmpfs -o size="$1" none /dev/shm && shift && exec "$@"'


@pytest.fixture(scope="module")
def with_shm_of() -> Callable[..., subprocess.CompletedProcess[str]]:
    """Return ``run(size, *command)``: a command that sees a /dev/shm of its own, of that size."""
    unshare = shutil.which("unshare")
    if unshare is None or subprocess.run([unshare, "-rm", "true"], capture_output=True).returncode:
        pytest.skip("no user and mount namespaces here, so no small /dev/shm")

    def run(size: str, *command: str, timeout_s: float = 100.0) -> subprocess.CompletedProcess[str]:
        whole = [unshare, "-rm", "sh", "-c", MOUNT, "sh", size, *command]
        return subprocess.run(whole, capture_output=True, text=True, timeout=timeout_s, cwd=ROOT)

    return run


PROGRAM = """
    import os, sys
    import torch
    import fastref.rpc as rpc
    from fastref.errors import ResourceError
    from tests import puppets

    def start(name, **options):
        rpc.init_rpc("alone", rank=0, world_size=1,
                     rpc_backend_options=rpc.RpcBackendOptions(init_method=f"local://{name}", **options))

    {body}
    left = [name for name in os.listdir("/dev/shm") if name.startswith("fastref")]
    assert not left, left
    print("done")
"""


def program(body: str) -> list[str]:
    return [sys.executable, "-c", textwrap.dedent(PROGRAM).replace("{body}", body.strip())]


def check(result: subprocess.CompletedProcess[str]) -> None:
    assert result.returncode == 0, f"ended with {result.returncode}\n{result.stdout[-4000:]}\n{result.stderr[-4000:]}"


def test_init_in_8_kib_is_a_typed_error_and_leaves_nothing(with_shm_of: Callable) -> None:
    body = """
before = sorted(os.listdir("/proc/self/fd"))
for attempt in range(3):
    try:
        start(f"tiny-{attempt}")
    except ResourceError as error:
        assert "/dev/shm" in str(error), error
    else:
        raise SystemExit("init_rpc found room where there is none")
    assert sorted(os.listdir("/proc/self/fd")) == before
"""
    result = with_shm_of("8k", *program(body))
    check(result)
    assert result.stdout == "done\n"


def test_a_full_directory_is_a_typed_error_and_enough_room_later_is_enough(with_shm_of: Callable) -> None:
    body = """
with open("/dev/shm/filler", "wb", buffering=0) as filler:
    try:
        while True:
            filler.write(b"x" * 4096)
    except OSError:
        pass
try:
    start("full")
except ResourceError as error:
    assert "/dev/shm" in str(error), error
else:
    raise SystemExit("init_rpc found room where there is none")
os.unlink("/dev/shm/filler")
start("free")
assert rpc.rpc_sync("alone", puppets.echo, (1,)) == 1
rpc.shutdown()
"""
    result = with_shm_of("256k", *program(body))
    check(result)
    assert result.stdout == "done\n"


def test_payloads_larger_than_the_directory_go_through(with_shm_of: Callable) -> None:
    body = """
start("large")
for size in (0, 1000, 100_000, 3_000_000):
    data = torch.arange(size)
    assert torch.equal(rpc.rpc_sync("alone", puppets.echo, (data,)), data)
    assert rpc.remote("alone", puppets.echo, ("x" * size,)).to_here() == "x" * size
rpc.shutdown()
"""
    result = with_shm_of("256k", *program(body))
    check(result)
    assert result.stdout == "done\n"


def test_an_arena_that_is_full_is_a_typed_error_on_the_side_that_can_act_on_it(with_shm_of: Callable) -> None:
    body = """
start("arena", arena_limit=1 << 20)
large = torch.zeros(1 << 20)
try:
    rpc.rpc_sync("alone", puppets.echo, (large,))
except ResourceError as error:
    assert "1048576" in str(error), error
else:
    raise SystemExit("4 MiB went through an arena of 1 MiB")
try:
    rpc.rpc_sync("alone", torch.zeros, (1 << 20,))
except ResourceError as error:
    assert "1048576" in str(error), error
else:
    raise SystemExit("an answer of 4 MiB went through an arena of 1 MiB")
for _ in range(100):
    assert rpc.rpc_sync("alone", puppets.echo, (large[:100_000],)).numel() == 100_000
rpc.shutdown()
"""
    result = with_shm_of("256k", *program(body))
    check(result)
    assert result.stdout == "done\n"


@pytest.mark.slow
def test_a_slice_of_the_suite_passes_in_256_kib(with_shm_of: Callable) -> None:
    """The kernel's memory files are not in the directory; names of control segments are, for a moment."""
    # Files of another user cannot be made in a user namespace.
    options = ["-q", "-p", "no:cacheprovider", "-k", "not another_user"]
    check(with_shm_of("256k", sys.executable, "-m", "pytest", *options, *SLICE))
