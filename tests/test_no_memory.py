"""A system that has no shared memory left while a job runs: a typed error where it can be acted on, nothing lost."""

from __future__ import annotations

import contextlib
import errno
import os
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

import fastref.rpc as rpc
from fastref.errors import RemoteError, ResourceError
from tests import puppets
from tests.puppets import Puppet, Troupe, troupe_fixture  # noqa: F401

pytestmark = pytest.mark.shared_memory("it is what there is not enough of")

LARGE_BYTES = 32 << 20
SMALL_BYTES = 1 << 20


@contextlib.contextmanager
def refused(puppet: Puppet, refuse: Callable[[], None]) -> Iterator[None]:
    """Let the system of one worker refuse memory."""
    puppet.do(refuse)
    try:
        yield
    finally:
        puppet.do(grant_memory)


def refuse_pages() -> None:
    """Refuse to make sure of the pages of any memory file."""
    keep_of_system("posix_fallocate")
    os.posix_fallocate = _refuse


def refuse_files() -> None:
    """Refuse any new memory file."""
    keep_of_system("memfd_create")
    os.memfd_create = _refuse


def keep_of_system(name: str) -> None:
    puppets.keep(name, getattr(os, name))


def grant_memory() -> None:
    for name in ("posix_fallocate", "memfd_create"):
        if name in puppets._kept:
            setattr(os, name, puppets.kept(name))
            puppets.drop(name)


def _refuse(*arguments: Any) -> Any:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def make_bytes(count: int) -> bytes:
    return bytes(count)


def length(data: bytes) -> int:
    return len(data)


def fetch(to: str, function: Callable[..., Any], *arguments: Any) -> int:
    return len(rpc.remote(to, function, arguments).to_here())


def wait_until_empty(patience_s: float = 20.0) -> None:
    """Wait until this worker holds nothing: what was lent comes back when its reader says so."""
    deadline = time.monotonic() + patience_s
    while held := {what: count for what, count in count_held().items() if count}:
        assert time.monotonic() < deadline, f"still held: {held}"
        time.sleep(0.005)


def count_held() -> dict[str, int]:
    figures = puppets.snapshot()
    slots = figures["slots"]
    return {
        "entries": len(figures["held"]),
        "blocks": figures["arena"]["blocks"],
        "slots": slots["count"] - slots["free"],
        "calls": figures["calls"]["pending"],
    }


def check_empty(crew: list[Puppet]) -> None:
    """Check that no worker holds anything, and that all still answer."""
    for puppet in crew:
        for other in crew:
            assert puppet.do(rpc.rpc_sync, other.name, puppets.process_id) == other.pid
        puppet.do(wait_until_empty)


def test_no_memory_for_arguments_is_an_error_of_the_caller(troupe: Troupe) -> None:
    w0, w1 = crew = troupe.start(2)
    with refused(w0, refuse_pages):
        for call in (rpc.rpc_sync, send_by_future):
            with pytest.raises(ResourceError, match="no room for .* bytes of shared memory: No space left") as caught:
                w0.do(call, "w1", length, (bytes(LARGE_BYTES),))
            assert not isinstance(caught.value, RemoteError)
        check_empty(crew)
    assert w0.do(rpc.rpc_sync, "w1", length, (bytes(LARGE_BYTES),)) == LARGE_BYTES
    check_empty(crew)
    troupe.leave(crew)


def test_no_memory_for_a_result_is_an_error_of_the_call(troupe: Troupe) -> None:
    w0, w1 = crew = troupe.start(2)
    with refused(w1, refuse_pages):
        for call in (call_and_measure, fetch):
            with pytest.raises(ResourceError, match="no room for .* bytes of shared memory: No space left"):
                w0.do(call, "w1", make_bytes, LARGE_BYTES)
        check_empty(crew)
    assert w0.do(fetch, "w1", make_bytes, LARGE_BYTES) == LARGE_BYTES
    check_empty(crew)
    troupe.leave(crew)


def test_no_memory_for_more_of_the_table_is_an_error_where_the_value_is(troupe: Troupe) -> None:
    w0, w1 = crew = troupe.start(2)
    with refused(w0, refuse_pages):
        with pytest.raises(ResourceError, match="no room for .* bytes of shared memory: No space left"):
            w0.do(hand_out, "w1", 5000)
        w0.do(puppets.drop, "references")
        check_empty(crew)
    assert w0.do(hand_out, "w1", 5000) == 5000
    w0.do(puppets.drop, "references")
    check_empty(crew)
    troupe.leave(crew)


def test_small_messages_need_no_new_memory_file_and_large_ones_without_are_an_error(troupe: Troupe) -> None:
    w0, w1 = crew = troupe.start(2)
    with refused(w0, refuse_files), refused(w1, refuse_files):
        assert w0.do(rpc.rpc_sync, "w1", length, (bytes(SMALL_BYTES),)) == SMALL_BYTES
        assert w0.do(fetch, "w1", make_bytes, SMALL_BYTES) == SMALL_BYTES
        with pytest.raises(ResourceError, match="cannot create .* bytes of shared memory") as caught:
            w0.do(rpc.rpc_sync, "w1", length, (bytes(LARGE_BYTES),))
        assert not isinstance(caught.value, RemoteError)
        with pytest.raises(ResourceError, match="cannot create .* bytes of shared memory"):
            w0.do(fetch, "w1", make_bytes, LARGE_BYTES)
        check_empty(crew)
    assert w0.do(rpc.rpc_sync, "w1", length, (bytes(LARGE_BYTES),)) == LARGE_BYTES
    assert w0.do(fetch, "w1", make_bytes, LARGE_BYTES) == LARGE_BYTES
    troupe.leave(crew)


def send_by_future(to: str, function: Callable[..., Any], arguments: tuple[Any, ...]) -> Any:
    return rpc.rpc_async(to, function, arguments).wait()


def call_and_measure(to: str, function: Callable[..., Any], *arguments: Any) -> int:
    return len(rpc.rpc_sync(to, function, arguments))


def hand_out(to: str, count: int) -> int:
    """Send references to so many values of this worker, and keep them; say how many there are."""
    references = [rpc.RRef(puppets.Cell(number)) for number in range(count)]
    puppets.keep("references", references)
    return rpc.rpc_sync(to, length, (references,))
