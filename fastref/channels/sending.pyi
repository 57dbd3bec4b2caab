"""Types of the compiled ``fastref.channels.sending``."""

from fastref.channels.channel import Channel

__all__ = ["StreamSender", "checksum"]

class StreamSender(Channel):
    fd: int
    source: int
    room_bytes: int
    sums: bool
    leaving: bool
    peer_left: bool
    sent: int
    received: int
    bytes_sent: int
    def leave(self) -> None: ...

def checksum(data: bytes, before: int = 0) -> int: ...
