"""Types of the compiled ``fastref.faults.late``."""

from fastref.channels.channel import Channel
from fastref.faults.agenda import Agenda

__all__ = ["LateChannel"]

class LateChannel(Channel):
    def __init__(self, inner: Channel, agenda: Agenda) -> None: ...
