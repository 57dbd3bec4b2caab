"""Workers up to the point where they are linked: in this process, or a cast of processes that play them."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import time
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection as Pipe
from typing import Any

from fastref.options import TlsFiles
from fastref.rendezvous import (
    Link,
    Listener,
    Membership,
    TcpLink,
    WorkerRecord,
    job_name,
    join,
    link_all,
    open_door,
)
from fastref.segments import InstanceLock, create_memfd, host_identity, job_directory, map_fd, run_root

PATIENCE_S = 60.0


class Worker:
    """One worker up to the point where it has its links; what a runtime does with these parts."""

    def __init__(self, name: str, init_method: str, *, tls: TlsFiles | None = None, **changes: Any) -> None:
        root = run_root()
        self.lock = InstanceLock(root)
        self.listener = Listener(job_directory(root, job_name(init_method)), self.lock.instance)
        self.init_method = init_method
        try:
            self.door = open_door(self.listener, init_method, tls=tls)
        except BaseException:
            self.listener.close()
            self.lock.release()
            raise
        self.record = dataclasses.replace(
            WorkerRecord(
                name=name,
                rank=0,
                pid=os.getpid(),
                instance=self.lock.instance,
                address=str(self.listener.path),
                world_size=1,
                version="1.0",
                layout=1,
                bits=61,
                host=host_identity(),
            ),
            **changes,
        )
        self.membership: Membership | None = None
        self.links: dict[int, Link | TcpLink] = {}

    def join(self, rank: int, world_size: int | None, timeout_s: float, **more: Any) -> None:
        self.membership = join(
            self.record, self.listener, self.init_method, rank, world_size, timeout_s, **{"door": self.door, **more}
        )
        self.record = self.membership.record

    def link(self, timeout_s: float) -> None:
        """Link, handing a file with both names over every link."""
        fds = []

        def segments_for(peer: WorkerRecord) -> dict[str, tuple[int, int]]:
            text = f"{self.record.name} for {peer.name}".encode()
            fd = create_memfd("test", len(text))
            os.pwrite(fd, text, 0)
            fds.append(fd)
            return {"control": (fd, len(text))}

        try:
            deadline = time.monotonic() + timeout_s
            self.links = link_all(
                self.record, self.membership.members, self.listener, segments_for, deadline, self.door
            )
        finally:
            for fd in fds:
                os.close(fd)

    def read_segments(self) -> list[str]:
        texts = []
        for rank, link in sorted(self.links.items()):
            if isinstance(link, TcpLink):
                continue
            fd, size_bytes = self.links[rank].take("control")
            texts.append(bytes(map_fd(fd, size_bytes, writable=False)).decode())
            os.close(fd)
        return texts

    def close(self) -> None:
        if self.membership is not None:
            self.membership.close()
        for link in self.links.values():
            link.close()
        if self.door is not None:
            self.door.close()
        self.listener.close()
        self.lock.release()


@contextlib.contextmanager
def worker(name: str, init_method: str, **changes: Any) -> Iterator[Worker]:
    one = Worker(name, init_method, **changes)
    try:
        yield one
    finally:
        one.close()


def play(pipe: Pipe, name: str, init_method: str, rank: int, world_size: int | None, options: dict[str, Any]) -> None:
    """Join and link once in this process, report the outcome, hold everything until told to end."""
    os.environ.update(options.get("environment", {}))
    with worker(name, init_method, **options.get("changes", {})) as one:
        pipe.send("ready")
        time.sleep(options.get("delay_s", 0.0))
        started = time.monotonic()
        try:
            one.join(rank, world_size, options.get("timeout_s", PATIENCE_S))
            one.link(PATIENCE_S)
        except Exception as error:
            pipe.send((type(error), str(error), time.monotonic() - started))
        else:
            ways = [str(link.way) for _, link in sorted(one.links.items())]
            names = [member.name for member in one.membership.members]
            pipe.send((names, one.read_segments(), time.monotonic() - started, ways))
            pipe.recv()


class Cast:
    """Processes that play one worker each."""

    def __init__(self, mp_context: Any, spawn_workers: Callable[..., Any], init_method: str) -> None:
        self._context, self._spawn = mp_context, spawn_workers
        self.init_method = init_method
        self.pipes: list[Pipe] = []
        self.processes: list[Any] = []

    def start(self, name: str, rank: int, world_size: int | None, init_method: str = "", **options: Any) -> Any:
        mine, theirs = self._context.Pipe()
        arguments = (theirs, name, init_method or self.init_method, rank, world_size, options)
        (process,) = self._spawn(play, [arguments])
        theirs.close()
        self.pipes.append(mine)
        self.processes.append(process)
        assert mine.recv() == "ready"
        return process

    def outcome(self, index: int) -> Any:
        assert self.pipes[index].poll(2 * PATIENCE_S)
        return self.pipes[index].recv()

    def outcomes(self) -> list[Any]:
        return [self.outcome(index) for index in range(len(self.pipes))]

    def end(self) -> None:
        for pipe in self.pipes:
            with contextlib.suppress(BrokenPipeError):
                pipe.send("end")
        for process in self.processes:
            process.join()
        for pipe in self.pipes:
            pipe.close()
