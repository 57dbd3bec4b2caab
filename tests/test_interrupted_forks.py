"""Calls with references to a worker of another host, interrupted at any line: their worker can still leave."""

from __future__ import annotations

import contextlib
import signal
from multiprocessing.context import ForkServerContext
from typing import Any

import fastref.rpc as rpc
from tests import work
from tests.jobs import Job

INTERRUPTS = 300


def test_a_worker_leaves_after_calls_that_were_interrupted_at_any_line(mp_context: ForkServerContext) -> None:
    job = Job(mp_context, 2, transport="tcp")
    try:
        job.run(interrupt_calls)
        job.close()
    finally:
        job.kill()


def interrupt_calls() -> None:
    def interrupt(*arguments: Any) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGALRM, interrupt)
    try:
        for number in range(INTERRUPTS):
            with contextlib.suppress(KeyboardInterrupt):
                signal.setitimer(signal.ITIMER_REAL, 3e-4 + number * 1e-5)
                while True:
                    rpc.rpc_sync("w1", work.echo, args=([rpc.RRef(number)],))
    finally:
        signal.signal(signal.SIGALRM, before)
