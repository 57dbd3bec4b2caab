"""Types of the compiled ``fastref.channels.shm``."""

from typing_extensions import Buffer

from fastref.channels.channel import Channel

__all__ = ["RING_SIZE", "ShmChannel", "ring_bytes"]

RING_SIZE: int

def ring_bytes(size_bytes: int = ...) -> int: ...

class ShmChannel(Channel):
    def __init__(self, ring: Buffer, size_bytes: int, bell: Buffer, me: int) -> None: ...
    @property
    def sent(self) -> int: ...
    @property
    def wakes(self) -> int: ...
