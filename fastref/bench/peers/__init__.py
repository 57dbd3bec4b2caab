"""Other libraries with objects in other processes; each is measured where it is installed."""

from fastref.bench.contract import Backend

__all__ = ["PEERS"]

PEERS: list[Backend] = []
