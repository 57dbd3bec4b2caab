"""Other libraries with objects in other processes, and floors; each is measured where it is installed."""

from fastref.bench.contract import Backend
from fastref.bench.peers.dask import DaskBackend
from fastref.bench.peers.iceoryx import IceoryxFloor
from fastref.bench.peers.managers import ManagersBackend
from fastref.bench.peers.monarch import MonarchBackend
from fastref.bench.peers.mpi import MpiFloor
from fastref.bench.peers.pyro import PyroBackend
from fastref.bench.peers.ray import RayBackend
from fastref.bench.peers.rpyc import RpycBackend
from fastref.bench.peers.xoscar import XoscarBackend
from fastref.bench.peers.zeromq import ZeroMqFloor

__all__ = ["PEERS"]

PEERS: list[Backend] = [
    ManagersBackend(),
    PyroBackend(),
    RpycBackend(),
    DaskBackend(),
    RayBackend(),
    XoscarBackend(),
    MonarchBackend(),
    ZeroMqFloor(),
    MpiFloor(),
    IceoryxFloor(),
]
