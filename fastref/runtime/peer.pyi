"""Types of the compiled ``fastref.runtime.peer``."""

from collections import deque
from threading import Condition
from typing import Any

from fastref._core import Holder, PinQueue
from fastref.carriers.arena import Arena
from fastref.carriers.borrow import PeerArena
from fastref.channels.channel import Channel
from fastref.channels.slots import PeerSlots
from fastref.errors import WorkerDied
from fastref.options import WorkerInfo

__all__ = ["Peer"]

class Peer:
    shares_main: bool
    greeted: bool
    left: bool
    death: str | None
    callables: dict[int, Any]
    credits_asked: bool
    credits_refused: str | None
    credits_open: int
    credit_window: int
    children: dict[int, tuple[Holder, int]]
    lock: Condition

    def __init__(
        self,
        rank: int,
        info: WorkerInfo,
        pid: int,
        channel: Channel,
        slots: PeerSlots,
        holder: Holder,
        arena: PeerArena,
        bits: int,
        incarnation: int = 0,
        generations: range = ...,
    ) -> None: ...
    @property
    def rank(self) -> int: ...
    @property
    def info(self) -> WorkerInfo: ...
    @property
    def pid(self) -> int: ...
    @property
    def channel(self) -> Channel: ...
    @property
    def slots(self) -> PeerSlots: ...
    @property
    def holder(self) -> Holder: ...
    @property
    def pins(self) -> PinQueue: ...
    @property
    def arena(self) -> PeerArena: ...
    @property
    def bits(self) -> int: ...
    @property
    def incarnation(self) -> int: ...
    @property
    def serves(self) -> Holder | None: ...
    @property
    def uid(self) -> int: ...
    @property
    def outgoing(self) -> deque[tuple[bytes, list[Any] | None, int]]: ...
    @property
    def name(self) -> str: ...
    @property
    def is_dead(self) -> bool: ...
    def mark_dead(self, reason: str) -> None: ...
    def refuse_calls(self) -> None: ...
    def died_error(self, owner: bool = False) -> WorkerDied: ...
    def add_credits(self, credits: list[tuple[int, int]]) -> None: ...
    def refuse_credits(self, why: str) -> None: ...
    def free(self, arena: Arena) -> None: ...
    def snapshot(self) -> dict[str, Any]: ...
