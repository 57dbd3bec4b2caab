"""Jobs of real workers: the body of a test runs on worker 0 while the others serve."""

from __future__ import annotations

import functools
import gc
import importlib
import inspect
import itertools
import os
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.context import ForkServerContext
from typing import Any

import pytest

import fastref.rpc as rpc
from fastref.rref import current_wiring
from tests.watchdog import arm

__all__ = ["Job", "in_job", "job_fixtures", "names", "wait_until_clean"]

# Workers outlive the tests of one module; the watchdog of a single test ends them when it hangs.
JOB_LIFETIME_S = 900.0
# What was let go of is gone within a second; a busy machine gets more before a leak is called one.
PATIENCE_S = 30.0

_numbers = itertools.count()


def names(world_size: int) -> list[str]:
    """Return the names of the workers of a job, by rank."""
    return [f"w{rank}" for rank in range(world_size)]


class Job:
    """Worker processes of one job, each waiting for orders and serving meanwhile.

    Parameters
    ----------
    context : ForkServerContext
        What starts them.
    world_size : int
    options : dict
        Arguments of ``RpcBackendOptions``, the init method excepted; ``kind`` is another class of options,
        ``transport`` what ``FASTREF_TRANSPORT`` says to the workers; ``last`` what the last one has instead.
    """

    def __init__(self, context: ForkServerContext, world_size: int, **options: Any) -> None:
        self.world_size = world_size
        options["init_method"] = f"local://job-{os.getpid()}-{next(_numbers)}"
        self._pipes, self._processes = [], []
        for rank in range(world_size):
            mine, theirs = context.Pipe()
            process = context.Process(target=_work, args=(theirs, rank, world_size, options))
            process.start()
            theirs.close()
            self._pipes.append(mine)
            self._processes.append(process)
        for rank in range(world_size):
            self._outcome(rank)

    def run(self, function: Callable[..., Any], *arguments: Any, on: int = 0) -> Any:
        """Run a function of an importable module on one worker and return its result."""
        self._pipes[on].send((function.__module__, function.__qualname__, arguments))
        return self._outcome(on)

    @property
    def is_alive(self) -> bool:
        """False once a worker has ended."""
        return bool(self._processes) and all(process.is_alive() for process in self._processes)

    def check(self) -> None:
        """Fail when a worker still holds something: a reference, a call, a slot, a pin, a block."""
        for pipe in self._pipes:
            pipe.send((__name__, "wait_until_clean", ()))
        for rank in range(self.world_size):
            self._outcome(rank)

    def close(self) -> None:
        """Have all workers shut down, and fail unless each ended well."""
        for pipe in self._pipes:
            pipe.send(None)
        for process in self._processes:
            process.join(2 * PATIENCE_S)
        codes = [process.exitcode for process in self._processes]
        self.kill()
        assert not any(codes) and None not in codes, f"exit codes of the workers: {codes}"

    def kill(self) -> None:
        """End the processes, whatever they do."""
        for process in self._processes:
            process.kill()
            process.join()
            process.close()
        for pipe in self._pipes:
            pipe.close()
        self._processes, self._pipes = [], []

    def _outcome(self, rank: int) -> Any:
        try:
            kind, value = self._pipes[rank].recv()
        except EOFError:
            self._processes[rank].join(PATIENCE_S)
            pytest.fail(f"w{rank} ended with exit code {self._processes[rank].exitcode}", pytrace=False)
        if kind == "failed":
            pytest.fail(f"on w{rank}:\n{value}", pytrace=False)
        if kind == "skipped":
            pytest.skip(value)
        return value


def in_job(body: Callable[..., None]) -> Callable[..., None]:
    """Make a test whose body runs on worker 0 of the ``job`` fixture; its parameters are sent there."""

    @functools.wraps(body)
    def test(job: Job, **parameters: Any) -> None:
        job.run(body, *parameters.values())

    own = inspect.signature(body).parameters.values()
    job = inspect.Parameter("job", inspect.Parameter.KEYWORD_ONLY)
    keywords = [parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY) for parameter in own]
    test.__signature__ = inspect.Signature([job, *keywords])  # type: ignore[attr-defined]
    return test


def job_fixtures(world_size: int, variants: Sequence[dict[str, Any]] = ({},)) -> tuple[Any, Any]:
    """Return fixtures for a module, to be named ``jobs`` and ``job``: one job for its tests, checked after each.

    Parameters
    ----------
    world_size : int
    variants : sequence of dict
        Options of the workers; every test runs once with each.
    """

    @pytest.fixture(scope="module", params=variants, ids=_shown)
    def jobs(request: pytest.FixtureRequest, mp_context: ForkServerContext) -> Iterator[Callable[[], Job]]:
        running: list[Job] = []

        def get() -> Job:
            if running and not running[-1].is_alive:
                running.pop().kill()
            if not running:
                running.append(Job(mp_context, world_size, **request.param))
            return running[-1]

        get()  # here, for the leak check to count it before each test
        yield get
        running[-1].close()

    @pytest.fixture
    def job(jobs: Callable[[], Job]) -> Iterator[Job]:
        current = jobs()
        yield current
        try:
            if current.is_alive:
                current.check()
        except BaseException:
            current.kill()
            raise
        finally:
            jobs()  # the next test finds a job at its start

    return jobs, job


def _shown(options: dict[str, Any]) -> str:
    return "-".join(f"{name}={value}" for name, value in options.items() if name != "last") or "default"


def _work(pipe: Any, rank: int, world_size: int, options: dict[str, Any]) -> None:
    """Be a worker: join, follow orders, leave."""
    arm(JOB_LIFETIME_S)
    last = options.pop("last", {})
    if rank == world_size - 1:
        options |= last
    kind = options.pop("kind", rpc.RpcBackendOptions)
    if transport := options.pop("transport", ""):
        os.environ["FASTREF_TRANSPORT"] = transport
    rpc.init_rpc(f"w{rank}", rank=rank, world_size=world_size, rpc_backend_options=kind(**options))
    pipe.send(("done", None))
    while (order := pipe.recv()) is not None:
        pipe.send(_follow(*order))
    rpc.shutdown(timeout=PATIENCE_S)


def _follow(module: str, qualname: str, arguments: Sequence[Any]) -> tuple[str, Any]:
    try:
        function: Any = importlib.import_module(module)
        for part in qualname.split("."):
            function = getattr(function, part)
        return "done", inspect.unwrap(function)(*arguments)
    except pytest.skip.Exception as skipped:
        return "skipped", str(skipped)
    except BaseException as error:
        shown = traceback.TracebackException.from_exception(error, capture_locals=True)
        for frame in shown.stack:
            if not os.path.basename(frame.filename).startswith("test_"):
                frame.locals = None
        return "failed", "".join(shown.format())


def wait_until_clean() -> None:
    """Fail when this worker goes on holding something: a reference, a call, a slot, a pin, a block."""
    deadline = time.monotonic() + PATIENCE_S
    while held := _held():
        if time.monotonic() > deadline:
            table = current_wiring().snapshot()["table"]["entries"]
            settled = {index: entry for index, entry in table.items() if entry["state"] != "pending"}
            raise AssertionError(f"{rpc.get_worker_info()} still holds {held}; entries with a value: {settled}")
        gc.collect()
        time.sleep(0.01)


def _held() -> dict[str, int]:
    """Count what a worker at rest does not hold."""
    figures = current_wiring().snapshot()
    peers, table = figures["peers"].values(), figures["table"]
    held = {
        "references that others have on values here": table["used"]
        - sum(peer["credits_open"] for peer in peers if not peer["dead"]),
        "references to values elsewhere": sum(peer["entries_held"] for peer in peers),
        "references on their way": sum(peer["pins"] + peer["children"] for peer in peers),
        "references that nobody confirmed": figures["abroad"]["waiting"],
        "unanswered calls": figures["calls"]["pending"],
        "running functions": figures["calls"]["running"],
        "response slots": figures["slots"]["count"] - figures["slots"]["free"],
        "blocks of shared memory": figures["arena"]["blocks"],
    }
    return {what: count for what, count in held.items() if count}
