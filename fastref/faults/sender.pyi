"""Types of the compiled ``fastref.faults.sender``."""

from typing import Any

from fastref.faults.agenda import Agenda
from fastref.faults.plan import FaultPlan
from fastref.runtime.peer import Peer
from fastref.runtime.serve import Server

__all__ = ["FaultySender"]

class FaultySender(Server):
    plan: FaultPlan

    def __init__(self, *args: Any, **kwargs: Any) -> None: ...
    @property
    def agenda(self) -> Agenda: ...
    def add_peer(self, peer: Peer) -> None: ...
    def look_sooner(self) -> None: ...
