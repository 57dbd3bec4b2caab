"""Workers that are reached over TCP through a proxy of their own: what puppets are told to do, and do there."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import socket
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import torch

import fastref.rpc as rpc
from fastref.errors import PeerError
from fastref.rendezvous import Door, WorkerRecord, visit
from fastref.rref import current_wiring
from fastref.runtime import abroad, sessions
from tests import jobs, puppets
from tests.pieces import (
    ASKER,
    DIRECTIONS,
    HEAD,
    LISTENER,
    Cut,
    Direction,
    Piece,
    Script,
    Stall,
    Step,
    Write,
    as_it_is,
    corrupted,
    cut_after,
    head,
    stalled_after,
)
from tests.proxy import Proxy

HANDSHAKE = {ASKER: (72, 40), LISTENER: (72, 40)}
LEAVING = 1
LENT = 1 << 16  # elements
HELD_UP_S = 1.0

_proxies: list[Proxy] = []
_first_script: list[Script] = [as_it_is]
_executions: Counter[Any] = Counter()
_kept: dict[Any, Any] = {}


# ---- orders


def join_behind_a_proxy(name: str, rank: int, world_size: int, job: str, options: dict[str, Any]) -> None:
    """Join over TCP; others find this worker at the endpoint of its proxy."""
    os.environ["FASTREF_TRANSPORT"] = "tcp"
    plain = Door.endpoint.fget  # type: ignore[attr-defined]

    def endpoint(door: Door) -> str:
        if not _proxies:
            _proxies.append(Proxy(plain(door), None if options.get("tls") else HANDSHAKE, _first_script[0]))
            _proxies[0].start()
        return _proxies[0].endpoint

    Door.endpoint = property(endpoint)  # type: ignore[assignment, method-assign]
    puppets.join_job(name, rank, world_size, job, options)


def join_as_over_a_network(name: str, rank: int, world_size: int, job: str, options: dict[str, Any]) -> None:
    """As ``join_behind_a_proxy``; connections count as leaving the host."""
    for module in (abroad, sessions):
        module.leaves_host = lambda connection: True  # type: ignore[attr-defined]
    join_behind_a_proxy(name, rank, world_size, job, options)


def join_over_tcp(name: str, rank: int, world_size: int, job: str, options: dict[str, Any]) -> None:
    """Join over TCP, without a proxy."""
    os.environ["FASTREF_TRANSPORT"] = "tcp"
    puppets.join_job(name, rank, world_size, job, options)


def proxy_do(method: str, *arguments: Any) -> None:
    """Call a method of this worker's proxy."""
    getattr(_proxies[0], method)(*arguments)


def use_script(make: Callable[..., Script], *arguments: Any) -> None:
    """Have ``make(*arguments)`` decide from here on what becomes of each piece."""
    _proxies[0].script = make(*arguments)


def begin_with(make: Callable[..., Script], *arguments: Any) -> None:
    """As ``use_script``, for a proxy that is not there yet."""
    _first_script[0] = make(*arguments)


def let_all_on() -> None:
    """Hand all on from here on."""
    _proxies[0].script = as_it_is


def hang_up(to: str) -> None:
    """Break the connection to another worker from here."""
    runtime: Any = current_wiring()
    runtime._abroad._channels[int(to[1:])].hang_up()


def close_proxy() -> list[str]:
    """End the proxy; what went wrong in it."""
    for proxy in _proxies:
        proxy.close()
    return [repr(trouble) for proxy in _proxies for trouble in proxy.troubles]


def resumptions() -> int:
    """Count what went on over a new connection here."""
    return sum(peer.get("resumed", 0) for peer in current_wiring().snapshot()["peers"].values())


def damages() -> int:
    """Count what came damaged here."""
    return sum(peer.get("damaged", 0) for peer in current_wiring().snapshot()["peers"].values())


def write_while_it_is_sent(to: str, seconds: float) -> int:
    """Send a tensor, again and again, that another thread never ceases to write; how often."""
    tensor = torch.zeros(LENT, dtype=torch.int64)
    over = threading.Event()

    def write() -> None:
        while not over.is_set():
            tensor.add_(1)

    writer = threading.Thread(target=write)
    writer.start()
    count, end_s = 0, time.monotonic() + seconds
    try:
        while time.monotonic() < end_s:
            count += rpc.rpc_sync(to, len, args=(tensor,)) == LENT
    finally:
        over.set()
        writer.join()
    return count


def silences_s() -> set[float]:
    """Return what the system tolerates on the TCP connections of this process, in seconds."""
    found = set()
    for name in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError), socket.socket(fileno=os.dup(int(name))) as one:
            if one.family == socket.AF_INET and not one.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN):
                found.add(one.getsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT) / 1e3)
    return found


def call_in_a_row(to: str, first: int, count: int) -> None:
    """Make calls of all sizes, check every answer."""
    for number in range(first, first + count):
        if number % 5 == 0:
            size = 20_000 + number
            answer = rpc.rpc_sync(
                to, executed, args=((rpc.get_worker_info().name, number), torch.full((size,), number))
            )
            assert answer.shape == (size,) and bool((answer == number + 1).all()), number
        else:
            assert rpc.rpc_sync(to, executed, args=((rpc.get_worker_info().name, number), number)) == number + 1


def call_for(to: str, seconds: float) -> int:
    """As ``call_in_a_row``, for a while; how many calls it were."""
    count, end_s = 0, time.monotonic() + seconds
    while time.monotonic() < end_s:
        call_in_a_row(to, count, 10)
        count += 10
    return count


def call_from_many_threads(to: str, threads: int, count: int) -> None:
    """As ``call_in_a_row``, at once."""
    troubles: list[BaseException] = []

    def call(first: int) -> None:
        try:
            call_in_a_row(to, first, count)
        except BaseException as error:
            troubles.append(error)

    all_of_them = [threading.Thread(target=call, args=(1000 * number,)) for number in range(threads)]
    for thread in all_of_them:
        thread.start()
    for thread in all_of_them:
        thread.join()
    if troubles:
        raise troubles[0]


def hand_references_round(owner: str, third: str, count: int) -> None:
    """Make values at one worker, hand references to another, which hands them on, keeps some and drops them."""
    for number in range(count):
        rref = rpc.remote(owner, executed, args=(("made", number), number))
        assert rpc.rpc_sync(third, keep_and_look, args=(number, rref)) == number + 1
        if number % 3 == 0:
            assert rref.to_here() == number + 1
        if number >= 4:
            rpc.rpc_sync(third, drop, args=(number - 4,))
    for number in range(count):
        rpc.rpc_sync(third, drop, args=(number,))


def executions() -> Counter[Any]:
    """Count how often each call was executed here."""
    return _executions


def wait_until_clean() -> None:
    """Wait until this worker holds nothing, and nobody holds anything of it."""
    jobs.wait_until_clean()


def begin_call(to: str, number: int, timeout_s: float = puppets.PATIENCE_S) -> None:
    """Make a call; ``answer`` waits for it."""
    _kept["future"] = rpc.rpc_async(to, executed, args=(("begun", number), number), timeout=timeout_s)


def answer() -> Any:
    """Wait for the call that was begun."""
    return _kept.pop("future").wait()


def trouble_with(to: str, timeout_s: float = puppets.PATIENCE_S) -> tuple[str, str]:
    """Call until it fails, and say how: the class of the error, and its text."""
    deadline = time.monotonic() + puppets.PATIENCE_S
    while time.monotonic() < deadline:
        try:
            rpc.rpc_sync(to, os.getpid, timeout=timeout_s)
        except PeerError as error:
            return type(error).__name__, str(error)
        time.sleep(0.01)
    raise AssertionError(f"calls to {to} go through")


def wait_for_death(of: str) -> tuple[str, float]:
    """Wait until a worker is known to be dead: why, and when that was seen."""
    deadline = time.monotonic() + puppets.PATIENCE_S
    while True:
        for peer in current_wiring().known_peers():
            if peer.name == of and peer.is_dead:
                return peer.death, time.monotonic()
        assert time.monotonic() < deadline, f"{of} does not die"
        time.sleep(0.001)


def fork_a_child() -> int:
    """Fork a process that does nothing, and keeps what it inherits."""
    pid = os.fork()
    if not pid:
        time.sleep(puppets.PATIENCE_S)
        os._exit(0)
    return pid


def visit_with(to: str, kind: str, changes: dict[str, Any], record_changes: dict[str, Any]) -> tuple[str, str]:
    """Go to another worker's door with a message that is a bit wrong; its answer."""
    runtime: Any = current_wiring()
    theirs = next(link.record for link in runtime._far_links.values() if link.record.name == to)
    mine: WorkerRecord = runtime.record
    connection = visit(theirs.endpoint, runtime._door.credentials, time.monotonic() + puppets.PATIENCE_S)
    body = {
        "record": {**mine.to_fields(), **record_changes},
        "to_instance": theirs.instance,
        "attempt": 1,
        "received": 0,
        **changes,
    }
    connection.send_message(kind, body)
    message = connection.wait_message(time.monotonic() + puppets.PATIENCE_S)
    connection.close()
    return ("", "") if message is None else (message.kind, str(message.body.get("sentence", "")))


def lend_and_leave(to: str) -> int:
    """Call with a large tensor, be interrupted, change the tensor; how many payloads were lent until then."""
    tensor = torch.arange(LENT)
    seen: list[int] = []

    def interrupt() -> None:
        _wait_until(lambda: payloads_lent() == 1)
        seen.append(payloads_lent())
        signal.raise_signal(signal.SIGINT)

    threading.Thread(target=interrupt).start()
    try:
        rpc.rpc_sync(to, note_total, args=(tensor,), timeout=0)
    except KeyboardInterrupt:
        tensor.zero_()
        return seen[0] - payloads_lent()
    raise AssertionError("nothing held up the call")


def lend_and_go_on(to: str) -> int:
    """Begin a call with a large tensor, change the tensor; how many payloads are lent."""
    tensor = torch.arange(LENT)
    _kept["future"] = rpc.rpc_async(to, note_total, args=(tensor,), timeout=0)
    tensor.zero_()
    return payloads_lent()


def begin_fetching(to: str, what: str) -> None:
    """Call for a large tensor; ``answer`` waits for it."""
    _kept["future"] = rpc.rpc_async(to, give_behind_a_stall, args=(what,), timeout=0)


def answer_total() -> int:
    """Wait for the tensor that was called for, and sum it."""
    return int(answer().sum())


def change_what_was_given() -> int:
    """Change the tensor of which a copy was asked for, if it is kept; how many payloads are lent."""
    peer: Any = next(peer for peer in current_wiring().known_peers() if peer.is_far)
    _wait_until(lambda: peer.snapshot()["unconfirmed_bytes"] > 8 * LENT and (peer.lent or not payloads_lent()))
    if _kept["given"] is not None:
        _kept["given"].zero_()
    return payloads_lent()


def payloads_lent() -> int:
    """Count what is sent from where it lies."""
    return sum(peer.get("borrowed", 0) for peer in current_wiring().snapshot()["peers"].values())


def wait_until_nothing_is_lent() -> None:
    """Wait until all payloads have arrived, and nothing is kept for them."""
    _wait_until(lambda: not payloads_lent() and not any(peer.lent for peer in current_wiring().known_peers()))


def noted_total() -> int:
    """Wait for the total of what came."""
    _wait_until(lambda: "total" in _kept)
    return _kept.pop("total")


def _wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + puppets.PATIENCE_S
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.001)


# ---- what workers call


def executed(what: Any, value: Any) -> Any:
    """Count, and return one more."""
    _executions[what] += 1
    return value + 1


def keep_and_look(number: int, rref: Any) -> Any:
    """Keep a reference, hand it on to its maker and back, and return its value."""
    _kept[number] = rref
    return rref.to_here()


def note_total(tensor: torch.Tensor) -> None:
    """Note the sum of a tensor."""
    _kept["total"] = int(tensor.sum())


def give_behind_a_stall(what: str) -> torch.Tensor:
    """Return a large tensor that is kept here, or is not; the proxy holds up the answer."""
    _proxies[0].stall()
    tensor = torch.arange(LENT)
    _kept["given"] = tensor if what == "kept" else None
    return tensor


def drop(number: int) -> None:
    """Let go of a reference."""
    _kept.pop(number, None)


# ---- scripts


def cut_often(seed: int, least: int, most: int) -> Script:
    """Cut at a random byte of a frame, after ``least`` to ``most`` frames each time."""
    dice = random.Random(seed)
    left = dice.randint(least, most)

    def script(piece: Piece) -> Sequence[Step]:
        nonlocal left
        if piece.kind != "frame" or not piece.number:
            return as_it_is(piece)
        left -= 1
        if left > 0:
            return as_it_is(piece)
        left = dice.randint(least, most)
        return cut_after(piece, dice.randint(0, len(piece.data)), reset=dice.random() < 0.5)

    return script


def cut_at_bytes(seed: int, most: int) -> Script:
    """Cut at a random byte, whatever it belongs to, after up to ``most`` bytes of both directions each time."""
    dice = random.Random(seed)
    left = dice.randint(1, most)

    def script(piece: Piece) -> Sequence[Step]:
        nonlocal left
        count, left = left, left - len(piece.data)
        if left > 0:
            return as_it_is(piece)
        left = dice.randint(1, most)
        return cut_after(piece, count, reset=dice.random() < 0.5)

    return script


def cut_next(direction: Direction, share: float = 0.0, towards: Sequence[Direction] = DIRECTIONS) -> Script:
    """Cut behind a share of the bytes of the next record of one direction."""
    done: list[bool] = []

    def script(piece: Piece) -> Sequence[Step]:
        if done or piece.direction != direction or not piece.number:
            return as_it_is(piece)
        done.append(True)
        return cut_after(piece, round(share * len(piece.data)), tuple(towards))

    return script


def damage(direction: Direction, at: float, times: int) -> Script:
    """Flip the bits of a byte of the next record of one direction as often as it comes, so many times.

    ``at`` is which byte of the head, or, under 1, where in all of the frame.
    """
    done: list[int] = []

    def script(piece: Piece) -> Sequence[Step]:
        wanted = piece.number and piece.direction == direction and piece.number == (done or [piece.number])[0]
        if not wanted or len(done) == times:
            return as_it_is(piece)
        done.append(piece.number)
        return corrupted(piece, int(at if at >= 1 else at * len(piece.data)))

    return script


def damage_often(seed: int, most: int) -> Script:
    """Flip one bit of every so many bytes, wherever it is, and whatever for."""
    choose = random.Random(seed)
    left = [choose.randrange(most)]

    def script(piece: Piece) -> Sequence[Step]:
        data = bytearray(piece.data)
        if piece.kind != "frame":
            return as_it_is(piece)
        while left[0] < len(data):
            data[left[0]] ^= 1 << choose.randrange(8)
            left[0] += 1 + choose.randrange(most)
        left[0] -= len(data)
        return [Write(bytes(data))]

    return script


def talk_nonsense(direction: Direction, field: int, value: int) -> Script:
    """Put another value into a field of the head of the next record of one direction, with the sum of such a head."""
    done: list[bool] = []

    def script(piece: Piece) -> Sequence[Step]:
        if done or piece.direction != direction or not piece.number:
            return as_it_is(piece)
        done.append(True)
        said = list(HEAD.unpack_from(piece.data))
        said[field] ^= value
        return [Write(head(*said[:6], piece.data[HEAD.size : HEAD.size + said[4]]) + piece.data[HEAD.size :])]

    return script


def start_slowly(held_up: str, cut: str) -> Script:
    """Hold up the link that one worker asks for, and cut that of another when it has been made for a while."""

    def script(piece: Piece) -> Sequence[Step]:
        asks = piece.flow.messages[0] if piece.flow.messages else {}
        if asks.get("kind") != "link-hello":
            return as_it_is(piece)
        name = asks["body"]["record"]["name"]
        if piece.message is asks and name == held_up:
            return stalled_after(piece, 0, HELD_UP_S)
        if piece.message.get("kind") == "link-welcome" and name == cut:
            return [Write(piece.data), Stall(HELD_UP_S / 4), Cut()]
        return as_it_is(piece)

    return script


def cut_farewells() -> Script:
    """Cut in place of the first farewell of each direction."""
    done: set[Direction] = set()

    def script(piece: Piece) -> Sequence[Step]:
        if piece.kind != "frame" or piece.signal != LEAVING or piece.direction in done:
            return as_it_is(piece)
        done.add(piece.direction)
        return [Cut()]

    return script
