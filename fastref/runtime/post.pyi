"""Types of the compiled ``fastref.runtime.post``."""

from typing import Any

from fastref._core import Holder, IdGenerator, ReferenceTable
from fastref.carriers.arena import Arena
from fastref.channels.channel import Inbox
from fastref.channels.slots import ResponseSlots
from fastref.options import WorkerInfo
from fastref.rref import OwnedValue, Wiring
from fastref.runtime.peer import Peer

__all__ = ["Post"]

class Post(Wiring):
    default_timeout_s: float
    slice_ns: int
    owned: list[OwnedValue | None]
    calls_sent: int

    def __init__(
        self,
        rank: int,
        info: WorkerInfo,
        peers: list[Peer],
        inbox: Inbox,
        slots: ResponseSlots,
        arena: Arena,
        table: ReferenceTable,
        ids: IdGenerator,
        default_timeout_s: float,
    ) -> None: ...
    # By rank. While the job is forming, None stands for a worker that has not been met.
    @property
    def peers(self) -> list[Peer]: ...
    @property
    def inbox(self) -> Inbox: ...
    @property
    def slots(self) -> ResponseSlots: ...
    @property
    def arena(self) -> Arena: ...
    @property
    def table(self) -> ReferenceTable: ...
    @property
    def ids(self) -> IdGenerator: ...
    @property
    def info(self) -> WorkerInfo: ...
    def add_peer(self, peer: Peer) -> None: ...
    def fork_abroad(self, peer: Peer, fork_id: int, owner: int, index: int, generation: int, holder: Holder) -> Any: ...
    def unfork_abroad(self, child: Any) -> None: ...
    def send_control(self, peer: Peer, kind: int, call: int, payload: bytes) -> None: ...
    def flush_all(self) -> bool: ...
    def drop_outgoing(self, peer: Peer) -> None: ...
    def own(self, index: int, owned: OwnedValue) -> None: ...
    def open_entry(self) -> tuple[int, int]: ...
