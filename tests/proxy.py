"""A proxy between an asker and a listener that knows where frames end, and does to each what a test wants."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence

from tests.pieces import (
    ASKER,
    LISTENER,
    Cut,
    Direction,
    Flow,
    Gather,
    HalfClose,
    Piece,
    Reader,
    Script,
    Stall,
    Step,
    Write,
    as_it_is,
)

__all__ = ["Passed", "Proxy", "proxy"]

PATIENCE_S = 60.0
# A close that discards what waits, so that the peer sees a reset.
_RESET = struct.pack("ii", 1, 0)


@contextlib.contextmanager
def proxy(
    target: str,
    handshake: Mapping[Direction, Sequence[int]] | None,
    script: Script = as_it_is,
    bind: str = "127.0.0.1",
) -> Iterator[Proxy]:
    """Stand before a listener until the end; fail there when a script failed or something else than pieces came.

    Parameters
    ----------
    target : str
        ``host:port`` of the listener.
    handshake : mapping, optional
        For both directions the sizes in bytes of what that side says before JSON messages begin; None: both speak TLS.
    script : callable
        What to do with each piece; it runs on the proxy's thread.
    bind : str
        Address to listen on.
    """
    one = Proxy(target, handshake, script, bind)
    one.start()
    try:
        yield one
    finally:
        one.close()
    for trouble in one.troubles:
        raise trouble


@dataclasses.dataclass
class Passed:
    """A piece in place of which something has gone on, what has so far, and when that began by ``time.monotonic``.

    A piece gathered with others stands here with its own data alone.
    """

    piece: Piece
    data: bytes
    at_s: float


class Proxy:
    """See :func:`proxy`. All methods may be called from any thread.

    Attributes
    ----------
    endpoint : str
        ``host:port`` where it listens.
    script : Script
        May be replaced at any time.
    passed : list of Passed
        What has gone on, in this order; recorded just before it is sent, so what has arrived is there.
    flows : list of Flow
        The connections so far.
    troubles : list of Exception
        What went wrong in the proxy itself.
    """

    def __init__(
        self,
        target: str,
        handshake: Mapping[Direction, Sequence[int]] | None,
        script: Script,
        bind: str = "127.0.0.1",
    ) -> None:
        host, _, port = target.rpartition(":")
        self._target, self._bind = (host.strip("[]"), int(port)), bind
        self._handshake = handshake
        self.script = script
        self.endpoint = ""
        self.passed: list[Passed] = []
        self.flows: list[Flow] = []
        self.troubles: list[Exception] = []
        self._is_shut = False
        self._ways: list[_Way] = []
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._run, name="proxy", daemon=True)

    def start(self) -> None:
        """Listen."""
        self._thread.start()
        asyncio.run_coroutine_threadsafe(self._listen(), self._loop).result(PATIENCE_S)

    def close(self) -> None:
        """End all connections and listen no more."""
        if not self._loop.is_closed():
            asyncio.run_coroutine_threadsafe(self._end(), self._loop).result(PATIENCE_S)
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join(PATIENCE_S)
            self._loop.close()

    def cut(self, reset: bool = False) -> None:
        """End all connections."""
        self._do(lambda: [way.cut(Cut(reset=reset)) for way in self._ways])

    def stall(self) -> None:
        """Let no further piece on, in no direction of no connection, until ``go_on``."""
        self._do(self._flowing.clear)

    def go_on(self) -> None:
        """Let on what is stalled, here or by a script."""

        def release() -> None:
            self._flowing.set()
            self._released.set()
            self._released = asyncio.Event()

        self._do(release)

    def shut(self) -> None:
        """End all connections and each new one at once, until ``open``."""
        self._is_shut = True
        self.cut()

    def open(self) -> None:
        """Take connections after ``shut``."""
        self._is_shut = False

    def frames(self, direction: Direction, flow: Flow | None = None) -> list[Piece]:
        """List the frames with a record that have gone on whole and unharmed, of one connection or of all."""
        return [
            passed.piece
            for passed in list(self.passed)
            if passed.piece.kind == "frame"
            and passed.piece.number
            and passed.piece.data in passed.data
            and passed.piece.direction == direction
            and flow in (None, passed.piece.flow)
        ]

    def wait_until(self, condition: Callable[[], object], patience_s: float = PATIENCE_S) -> None:
        """Wait until something is true of what has passed."""
        deadline = time.monotonic() + patience_s
        while not condition():
            if time.monotonic() > deadline:
                last = [
                    (p.piece.flow.index, p.piece.direction, p.piece.kind, p.piece.number) for p in self.passed[-20:]
                ]
                raise AssertionError(f"not true after {patience_s:g} s; what passed last: {last}")
            time.sleep(0.002)

    def _do(self, action: Callable[[], object]) -> None:
        done = threading.Event()

        def act() -> None:
            action()
            done.set()

        self._loop.call_soon_threadsafe(act)
        assert done.wait(PATIENCE_S), "the proxy's script does not return"

    def _run(self) -> None:
        asyncio.set_event_loop(self._loop)
        self._loop.run_forever()

    async def _listen(self) -> None:
        self._flowing, self._released = asyncio.Event(), asyncio.Event()
        self._flowing.set()
        self._server = await asyncio.start_server(self._accept, self._bind, 0)
        host, port = self._server.sockets[0].getsockname()[:2]
        self.endpoint = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"

    async def _end(self) -> None:
        self._server.close()
        tasks = [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        for way in self._ways:
            way.abort()
        await asyncio.sleep(0)  # transports close their sockets one turn later

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if self._is_shut:
            writer.transport.abort()
            return
        flow = Flow(len(self.flows))
        self.flows.append(flow)
        try:
            to_listener = await asyncio.open_connection(*self._target)
        except OSError:
            _end(writer, reset=True)  # as the asker would have seen it
            return
        way = _Way(self, flow, (reader, writer), to_listener)
        self._ways.append(way)
        try:
            await way.run()
        except asyncio.CancelledError:
            pass  # it is closed; asyncio's own callback would complain of it
        except Exception as error:
            self.troubles.append(error)
        finally:
            way.cut(Cut())

    async def gate(self) -> None:
        """Wait while everything is stalled."""
        await self._flowing.wait()

    async def release(self) -> None:
        """Wait for the next ``go_on``."""
        await self._released.wait()

    def handshake(self, direction: Direction) -> Sequence[int] | None:
        """Return the sizes of what one side says in the handshake, None of TLS."""
        return None if self._handshake is None else self._handshake[direction]


Ends = tuple[asyncio.StreamReader, asyncio.StreamWriter]


class _Way:
    """One connection: a pump for each direction."""

    def __init__(self, owner: Proxy, flow: Flow, asker: Ends, listener: Ends) -> None:
        self._owner, self._flow = owner, flow
        self._ends: dict[Direction, Ends] = {ASKER: asker, LISTENER: listener}
        self._cut: set[Direction] = set()
        for _, writer in self._ends.values():
            writer.transport.set_write_buffer_limits(high=0)  # drained means: in the kernel
            writer.get_extra_info("socket").setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    async def run(self) -> None:
        """Go on until both directions have ended."""
        await asyncio.gather(self._pump(ASKER, LISTENER), self._pump(LISTENER, ASKER))

    def cut(self, step: Cut) -> None:
        """End the connection."""
        for side in set(step.towards) - self._cut:
            self._cut.add(side)
            _end(self._ends[side][1], step.reset)

    def abort(self) -> None:
        """Close the sockets, whatever waits to be sent."""
        for _, writer in self._ends.values():
            writer.transport.abort()

    async def _pump(self, source: Direction, sink: Direction) -> None:
        pieces = Reader(self._ends[source][0], source, self._flow, self._owner.handshake(source))
        writer = self._ends[sink][1]
        try:
            while (piece := await pieces.next()) is not None:
                await self._owner.gate()
                if self._cut or not await self._go(piece, self._owner.script(piece), pieces, writer):
                    break
            else:
                if not self._cut:
                    writer.write_eof()
        except OSError:
            # A side that resets is passed on as it is, unless a cut was: its other side may have to find silence.
            if not self._cut:
                self.cut(Cut(reset=True))
        with contextlib.suppress(OSError):
            while await self._ends[source][0].read(1 << 16):
                pass

    async def _go(self, piece: Piece, steps: Sequence[Step], pieces: Reader, writer: asyncio.StreamWriter) -> bool:
        """Do the steps; return False when nothing more goes on in this direction."""
        passed: Passed | None = None
        for step in steps:
            match step:
                case Write(data, singly) if data:
                    # First recorded, then sent: what has arrived is in the record.
                    if passed is None:
                        passed = Passed(piece, b"", time.monotonic())
                        self._owner.passed.append(passed)
                    passed.data += data
                    for part in (data[at : at + 1] for at in range(len(data))) if singly else (data,):
                        writer.write(part)
                        await writer.drain()
                case Stall(None):
                    await self._owner.release()
                case Stall(seconds):
                    await asyncio.sleep(seconds)
                case Gather():
                    await self._gather(piece, step, pieces, writer)
                case Cut():
                    self.cut(step)
                    return False
                case HalfClose():
                    writer.write_eof()
                    return False
        return True

    async def _gather(self, piece: Piece, step: Gather, pieces: Reader, writer: asyncio.StreamWriter) -> None:
        gathered = [piece]
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(step.seconds):
                while len(gathered) < step.count and (following := await pieces.next()) is not None:
                    gathered.append(following)
        arranged = step.arranged(gathered)
        self._owner.passed.extend(Passed(one, one.data, time.monotonic()) for one in arranged)
        writer.write(b"".join(one.data for one in arranged))
        await writer.drain()


def _end(writer: asyncio.StreamWriter, reset: bool) -> None:
    if reset:
        with contextlib.suppress(OSError):  # the other side has reset it already
            writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
        writer.transport.abort()
    else:
        writer.close()
