"""What every test gets: a watchdog, a leak check, a run directory of its own, and warm processes."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import shutil
import signal
import tempfile
from collections.abc import Callable, Iterator, Sequence
from multiprocessing import forkserver
from multiprocessing.context import ForkServerContext, ForkServerProcess
from pathlib import Path

import hypothesis
import pytest
import pytest_timeout

from fastref.rendezvous.ways import forced_transport
from tests.leaks import take_holdings, wait_for_return
from tests.watchdog import CHILD_LIFETIME_S, STACKS_PATH_VARIABLE, Watchdog, run_armed

ROOT = Path(__file__).resolve().parent.parent
SCRATCH = pytest.StashKey[Path]()
REPORT_FD = pytest.StashKey[int]()
WATCHDOG = pytest.StashKey[Watchdog]()

hypothesis.settings.register_profile("fastref", deadline=None, print_blob=True)
hypothesis.settings.load_profile("fastref")


def pytest_configure(config: pytest.Config) -> None:
    # A shell has what it runs in the background ignore it, and all that starts from there; some tests are about it.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    # Not under TMPDIR: the path of a unix socket has 107 characters at most.
    scratch = Path(tempfile.mkdtemp(prefix="fr-", dir=os.environ.get("FASTREF_TEST_SCRATCH", "/tmp")))
    config.stash[SCRATCH] = scratch
    # Capturing is off while plugins are configured: this is the terminal.
    config.stash[REPORT_FD] = os.dup(2)
    (scratch / "run").mkdir(mode=0o700)
    (scratch / "stacks").touch()
    # In the environment before any child starts: the forkserver hands on its own.
    os.environ["FASTREF_RUN_DIR"] = str(scratch / "run")
    os.environ[STACKS_PATH_VARIABLE] = str(scratch / "stacks")
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))


def pytest_unconfigure(config: pytest.Config) -> None:
    os.close(config.stash[REPORT_FD])
    shutil.rmtree(config.stash[SCRATCH])


def pytest_timeout_set_timer(item: pytest.Item, settings: pytest_timeout.Settings) -> bool:
    """Guard the test by our watchdog; pytest-timeout keeps its option, its marker and its sense of when."""
    if pytest_timeout.is_debugging():
        return True
    stash = item.config.stash
    watchdog = Watchdog(item.nodeid, settings.timeout, stash[REPORT_FD], stash[SCRATCH] / "stacks")
    item.stash[WATCHDOG] = watchdog
    watchdog.start()
    return True


def pytest_timeout_cancel_timer(item: pytest.Item) -> bool:
    if WATCHDOG in item.stash:
        item.stash[WATCHDOG].cancel()
        del item.stash[WATCHDOG]
    return True


@pytest.fixture(autouse=True)
def no_leaks(request: pytest.FixtureRequest) -> Iterator[None]:
    """Fail a test after which a segment, file, process, thread or descriptor is left.

    ``@pytest.mark.leaks("reason")`` opts out.
    """
    if request.node.get_closest_marker("leaks"):
        yield
        return
    before = take_holdings()
    yield
    left = wait_for_return(before)
    assert not left, "the test left behind:\n  " + "\n  ".join(left)


@pytest.fixture(scope="session")
def mp_context() -> ForkServerContext:
    """Return a context whose processes start in milliseconds: their server has imported torch and fastref already."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch", "fastref", "tests.watchdog"])
    forkserver.ensure_running()
    return context


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip ``@pytest.mark.shared_memory("what of it")`` where all workers talk over TCP."""
    if forced_transport() != "tcp":
        return
    for item in items:
        for mark in item.iter_markers("shared_memory"):
            item.add_marker(pytest.mark.skip(reason=f"takes shared memory: {mark.args[0]}"))


class WorkerProcesses(list[ForkServerProcess]):
    """Processes of one test, in the order of their arguments."""

    def join(self) -> None:
        """Wait for all of them; fail unless each ended well."""
        for process in self:
            process.join(CHILD_LIFETIME_S)
        codes = [process.exitcode for process in self]
        assert not any(codes) and None not in codes, f"exit codes of the workers: {codes}"


@pytest.fixture
def spawn_workers(
    mp_context: ForkServerContext, no_leaks: None
) -> Iterator[Callable[[Callable[..., object], Sequence[tuple[object, ...]]], WorkerProcesses]]:
    """Return ``start(target, arguments_of_each) -> WorkerProcesses``: one armed process per tuple of arguments.

    Processes still alive when the test ends are killed.
    """
    started: list[ForkServerProcess] = []

    def start(target: Callable[..., object], arguments_of_each: Sequence[tuple[object, ...]]) -> WorkerProcesses:
        workers = WorkerProcesses(
            mp_context.Process(target=run_armed, args=(target, arguments)) for arguments in arguments_of_each
        )
        for process in workers:
            process.start()
            started.append(process)
        return workers

    yield start
    for process in started:
        with contextlib.suppress(ValueError):  # closed by the test
            process.kill()
            process.join()
            process.close()
