"""How much memory there is: the kernel gives out more than it has, and kills somebody for it later."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from fastref.errors import ResourceError

__all__ = ["available_bytes", "check_available"]

_PROC = Path("/proc")
_CGROUPS = Path("/sys/fs/cgroup")


def check_available(size_bytes: int, purpose: str) -> None:
    """Refuse a request for shared memory that can only end in somebody being killed.

    Anonymous shared memory has no limit of its own: asked for more than there is, the kernel goes on
    until the out-of-memory killer has found a victim.

    Raises
    ------
    ResourceError
        Less than ``size_bytes`` are available, or it cannot be seen how many are: no descriptor is left.
    """
    try:
        available = available_bytes()
    except OSError as error:
        message = f"{purpose} needs {size_bytes} bytes of memory, and how much is available cannot be seen: {error}"
        raise ResourceError(message) from error
    if size_bytes > available:
        raise ResourceError(f"{purpose} needs {size_bytes} bytes of memory, {available} are available")


def available_bytes(proc: Path = _PROC, cgroups: Path = _CGROUPS) -> int:
    """Return how many bytes can be had now, of the machine and of every control group around this process.

    Groups of version 2 are looked at; version 1 is not.
    """
    rooms = [_available_on_machine(proc)]
    for group in _groups(proc, cgroups):
        limit = (group / "memory.max").read_text().strip()
        if limit != "max":
            used = int((group / "memory.current").read_text())
            # File pages that nobody has used lately count as used, and go as soon as there is need.
            rooms.append(int(limit) - used + _field(group / "memory.stat", "inactive_file"))
    return max(0, min(rooms))


def _available_on_machine(proc: Path) -> int:
    return _field(proc / "meminfo", "MemAvailable:") * 1024


def _groups(proc: Path, cgroups: Path) -> Iterator[Path]:
    """Yield the version 2 groups from that of this process up, those that limit memory at all."""
    for line in (proc / "self/cgroup").read_text().splitlines():
        hierarchy, _, path = line.split(":", 2)
        if hierarchy == "0":
            group = cgroups / path.lstrip("/")
            for one in [group, *group.parents]:
                if (one / "memory.max").exists():
                    yield one
                if one == cgroups:
                    return


def _field(path: Path, name: str) -> int:
    for line in path.read_text().splitlines():
        words = line.split()
        if words and words[0] == name:
            return int(words[1])
    return 0
