"""Shared memory and the run directory: create, lock, map, reclaim, sweep."""

from fastref.segments.control import ControlSegment, create_control
from fastref.segments.identity import InstanceIdentity, host_identity, network_identity, process_lives
from fastref.segments.memory import allocate, cannot_shrink, create_memfd, map_fd, map_private, seal
from fastref.segments.rundir import InstanceLock, job_directory, run_root
from fastref.segments.sweep import sweep

__all__ = [
    "ControlSegment",
    "InstanceIdentity",
    "InstanceLock",
    "allocate",
    "cannot_shrink",
    "create_control",
    "create_memfd",
    "host_identity",
    "job_directory",
    "map_fd",
    "map_private",
    "network_identity",
    "process_lives",
    "run_root",
    "seal",
    "sweep",
]
