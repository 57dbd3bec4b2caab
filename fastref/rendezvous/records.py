"""What one worker tells the others about itself."""

from __future__ import annotations

import json
import re
from dataclasses import asdict, dataclass
from typing import Any

from fastref.errors import ProtocolError, UsageError
from fastref.options import check_worker_name
from fastref.rendezvous.fields import parse_object, read_flag, read_integer, read_text
from fastref.rendezvous.stream import parse_endpoint

__all__ = ["WorkerRecord", "describe"]

# Ranks are the upper 16 bits of an id.
MAX_WORLD_SIZE = 1 << 16
_INSTANCE = re.compile(r"[0-9a-f]{16}")


@dataclass(frozen=True)
class WorkerRecord:
    """One worker as its peers know it.

    Parameters
    ----------
    name : str
        Unique in the job.
    rank : int
        0 <= rank < world_size.
    pid : int
        Its process.
    instance : str
        The random id of its runtime, sixteen hex digits.
    address : str
        Path of its unix socket.
    world_size : int
        How many workers it expects; 0: a group that workers join and leave.
    version : str
        Its version of fastref.
    layout : int
        Version of the layout of its shared memory.
    bits : int
        How many peers one word of its reference table can name.
    host : str
        Where it runs: equal texts can share pids and memory.
    incarnation : int
        How many workers of the group had its rank before.
    endpoint : str
        ``address:port`` where it listens for workers of other hosts, "" when it does not.
    epoch : int
        How often its node was restarted before; says something only beside another of the same node.
    node : int
        Which node it is of, where a launcher has several on a host.
    entries : int
        Of its reference table.
    silence_ms : int
        After how long without a sign of life it takes a worker of another host for dead.
    strict : bool
        It takes registered callables and plain data only.
    network : str
        Where texts differ, the loopback of one is not that of the other.
    """

    name: str
    rank: int
    pid: int
    instance: str
    address: str
    world_size: int
    version: str
    layout: int
    bits: int
    host: str
    incarnation: int = 0
    endpoint: str = ""
    entries: int = 1 << 18
    epoch: int = 0
    node: int = 0
    silence_ms: int = 15_000
    strict: bool = False
    network: str = ""

    def __str__(self) -> str:
        return f"{self.name!r} (rank {self.rank}, pid {self.pid})"

    def is_outlived_by(self, other: WorkerRecord) -> bool:
        """Return whether the other is of a later start of the same node."""
        return (self.host, self.node) == (other.host, other.node) and self.epoch < other.epoch

    def to_fields(self) -> dict[str, Any]:
        """Return the record as a JSON object."""
        return asdict(self)

    def to_json(self) -> bytes:
        """Return the record as JSON text."""
        return json.dumps(self.to_fields(), separators=(",", ":")).encode()

    @classmethod
    def from_fields(cls, fields: dict[str, Any]) -> WorkerRecord:
        """Return the record in a JSON object, every field checked but whether the rank is within the world.

        Raises
        ------
        ProtocolError
            Names the first field that is wrong.
        """
        try:
            name = check_worker_name(read_text(fields, "name", most=127))
        except UsageError as error:
            raise ProtocolError(f"field 'name': {error}") from error
        instance = read_text(fields, "instance", most=16)
        if _INSTANCE.fullmatch(instance) is None:
            raise ProtocolError(f"field 'instance' must be sixteen hex digits, it is {instance!r}")
        address = read_text(fields, "address")
        if not address.startswith("/") or "\0" in address:
            raise ProtocolError(f"field 'address' must be an absolute path, it is {address!r}")
        endpoint = read_text(fields, "endpoint", least=0, most=100)
        if endpoint:
            try:
                parse_endpoint(endpoint)
            except ProtocolError as error:
                raise ProtocolError(f"field 'endpoint': {error}") from error
        return cls(
            name=name,
            rank=read_integer(fields, "rank", most=2**31 - 1),
            pid=read_integer(fields, "pid", least=1, most=2**31 - 1),
            instance=instance,
            address=address,
            world_size=read_integer(fields, "world_size", most=MAX_WORLD_SIZE),
            version=read_text(fields, "version", most=64),
            layout=read_integer(fields, "layout"),
            bits=read_integer(fields, "bits", most=64),
            host=read_text(fields, "host", most=512),
            incarnation=read_integer(fields, "incarnation", most=(1 << 12) - 1),
            endpoint=endpoint,
            entries=_entries(fields),
            epoch=read_integer(fields, "epoch"),
            node=read_integer(fields, "node"),
            silence_ms=read_integer(fields, "silence_ms", least=1, most=10**12),
            strict=read_flag(fields, "strict"),
            network=read_text(fields, "network", least=0, most=100),
        )

    @classmethod
    def from_json(cls, data: bytes) -> WorkerRecord:
        """Return the record in a JSON text; as ``from_fields``."""
        return cls.from_fields(parse_object(data))


def _entries(fields: dict[str, Any]) -> int:
    entries = read_integer(fields, "entries", least=64, most=1 << 24)
    if entries % 64:
        raise ProtocolError(f"field 'entries' must be a multiple of 64, it is {entries}")
    return entries


def describe(fields: dict[str, Any]) -> str:
    """Return a phrase for a record that may be damaged or of another version, for use in an error."""
    parts = {key: fields.get(key) for key in ("name", "rank", "pid")}
    return f"{str(parts['name'])[:127]!r} (rank {str(parts['rank'])[:20]}, pid {str(parts['pid'])[:20]})"
