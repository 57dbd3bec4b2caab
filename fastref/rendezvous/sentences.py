"""The sentences that everybody is told when a job cannot start; each names both sides."""

from __future__ import annotations

from collections.abc import Sequence

from fastref.rendezvous.records import WorkerRecord

__all__ = [
    "already_running",
    "could_not_start",
    "deserted",
    "duplicate",
    "forced_apart",
    "full",
    "hidden",
    "not_listening",
    "orphaned",
    "other_host",
    "other_life",
    "out_of_range",
    "roll_call",
    "strictness_differs",
    "unproved",
    "unreachable",
    "world_sizes_differ",
]


def duplicate(job: str, one: WorkerRecord, other: WorkerRecord) -> str:
    """Return the sentence for two workers with one rank or one name."""
    # In one order, so that both sides say the same when both find out.
    first, second = sorted((one, other), key=lambda record: (record.rank, record.pid, record.instance))
    what = f"rank {first.rank}" if first.rank == second.rank else f"the name {first.name!r}"
    return f"two workers of job {job!r} claim {what}, which is not unique: {first} and {second}"


def world_sizes_differ(job: str, one: WorkerRecord, other: WorkerRecord) -> str:
    """Return the sentence for two workers that expect different worlds."""
    return f"workers of job {job!r} differ in world_size: {one} says {one.world_size}, {other} says {other.world_size}"


def strictness_differs(one: WorkerRecord, other: WorkerRecord) -> str:
    """Return the sentence for two workers of which one is strict."""
    strict, lax = (one, other) if one.strict else (other, one)
    return (
        f"worker {strict} is strict and worker {lax} is not; all workers of a job are, or none: "
        "RpcBackendOptions(strict=True), or FASTREF_STRICT=1"
    )


def out_of_range(job: str, worker: WorkerRecord, coordinator: WorkerRecord) -> str:
    """Return the sentence for a rank that the world does not have."""
    return (
        f"worker {worker} of job {job!r} is out of range: it and coordinator {coordinator} have world_size "
        f"{coordinator.world_size}, so ranks go from 0 to {coordinator.world_size - 1}"
    )


def other_host(one: WorkerRecord, other: WorkerRecord) -> str:
    """Return the sentence for two workers that cannot share memory, where one does not listen for other hosts."""
    return (
        f"worker {one} runs on {one.host} and worker {other} on {other.host}: only workers of one host (and one pid "
        "namespace) share memory, and to meet over TCP all of them need the same token: set FASTREF_TOKEN, or "
        "FASTREF_TOKEN_FILE, for all workers"
    )


def forced_apart(one: WorkerRecord, other: WorkerRecord) -> str:
    """Return the sentence for two workers on different hosts, one of which is to use nothing but shared memory."""
    return (
        f"worker {one} runs on {one.host} and worker {other} on {other.host}, and FASTREF_TRANSPORT=shm is set: "
        "workers of different hosts share no memory; unset it"
    )


def not_listening(one: WorkerRecord, other: WorkerRecord) -> str:
    """Return the sentence for a worker that is to be reached over TCP and does not listen."""
    return (
        f"worker {one} has to reach worker {other} over TCP, and one of them does not listen: set FASTREF_TRANSPORT="
        "tcp for all workers or for none"
    )


def hidden(one: WorkerRecord, other: WorkerRecord) -> str:
    """Return the sentence for a worker that listens where only its own machine reaches it."""
    return (
        f"worker {one} runs on {one.host} and listens at {one.endpoint}, where worker {other} on {other.host} cannot "
        "reach it; FASTREF_ADDRESS or FASTREF_INTERFACE chooses another address for a host"
    )


def unreachable(job: str, worker: WorkerRecord, other: WorkerRecord, trouble: object) -> str:
    """Return the sentence for a worker that listens where another cannot reach it."""
    return (
        f"worker {worker} of job {job!r} cannot reach worker {other} at {other.endpoint}: {trouble}; FASTREF_ADDRESS "
        "or FASTREF_INTERFACE chooses another address for a host"
    )


def unproved(job: str, worker: WorkerRecord, other: WorkerRecord, trouble: object) -> str:
    """Return the sentence for two workers that do not take each other for members of one job."""
    return (
        f"worker {worker} of job {job!r} and worker {other} at {other.endpoint} did not prove themselves to each "
        f"other: {trouble}; all workers of a job need the same FASTREF_TOKEN, and TLS all or none"
    )


def other_life(job: str, worker: WorkerRecord, later: WorkerRecord) -> str:
    """Return the sentence for a worker that was there before its job was restarted."""
    return (
        f"job {job!r} was restarted: worker {worker} is of start {worker.epoch}, and worker {later} of start "
        f"{later.epoch}; it cannot join"
    )


def already_running(job: str, worker: WorkerRecord, coordinator: WorkerRecord) -> str:
    """Return the sentence for a second coordinator of a job that has all its workers."""
    return f"job {job!r} runs already with coordinator {coordinator}; {worker} cannot start it a second time"


def full(job: str, worker: WorkerRecord, coordinator: WorkerRecord) -> str:
    """Return the sentence for a worker of a job that has all its workers and goes on."""
    return f"job {job!r} runs already with coordinator {coordinator} and all its workers; {worker} cannot join it"


def could_not_start(job: str, worker: object, coordinator: WorkerRecord, cause: str) -> str:
    """Return the sentence for a worker that failed before it had its links; a worker without a record is described."""
    if worker == coordinator:
        return f"coordinator {coordinator} of job {job!r} could not start: {cause}"
    return f"worker {worker} of job {job!r}, coordinator {coordinator}, could not start: {cause}"


def deserted(job: str, gone: WorkerRecord, witness: WorkerRecord, grace_s: float) -> str:
    """Return the sentence for a worker that came, died or left before the job was complete, and had no successor."""
    return (
        f"worker {gone} of job {job!r} died or left before all had come, and nobody took its place within "
        f"{grace_s:g} s; worker {witness} gives up"
    )


def orphaned(job: str, gone: WorkerRecord, witness: WorkerRecord, trouble: object) -> str:
    """Return the sentence for a coordinator that ended, and with it the place where another could announce itself."""
    return f"worker {gone} of job {job!r} died or left before all had come; worker {witness} gives up: {trouble}"


def roll_call(job: str, world_size: int, present: Sequence[WorkerRecord], timeout_s: float) -> str:
    """Return the sentence for a world that did not fill."""
    present = sorted(present, key=lambda record: record.rank)
    missing = sorted(set(range(world_size)) - {record.rank for record in present})
    return (
        f"only {len(present)} of {world_size} workers of job {job!r} came within {timeout_s:g} s: "
        f"{', '.join(map(str, present))}; missing ranks: {', '.join(map(str, missing))}"
    )
