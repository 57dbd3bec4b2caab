"""Who an instance is: the name that lets others tell the living from the dead."""

from __future__ import annotations

import errno
import hashlib
import os
import re
import secrets
import socket
from dataclasses import dataclass
from pathlib import Path

__all__ = ["INSTANCE_PATTERN", "InstanceIdentity", "host_identity", "network_identity", "process_lives"]

INSTANCE_PATTERN = r"[0-9a-f]{16}"
_NAME = re.compile(
    r"(?P<boot>[0-9a-f]{8})-(?P<pid_namespace>\d{1,20})-(?P<pid>\d{1,10})-(?P<start_ticks>\d{1,20})"
    rf"-(?P<instance>{INSTANCE_PATTERN})"
)


@dataclass(frozen=True)
class InstanceIdentity:
    """One runtime of one process, named so that no other ever has the same name.

    Parameters
    ----------
    boot : str
        Eight hex digits of a hash of the kernel's boot id.
    pid_namespace : int
        Inode of the pid namespace in which ``pid`` means something.
    pid : int
        The process.
    start_ticks : int
        When it started, in clock ticks since boot: a pid that was given out again has another value.
    instance : str
        Sixteen random hex digits, new for every runtime.
    """

    boot: str
    pid_namespace: int
    pid: int
    start_ticks: int
    instance: str

    @classmethod
    def create(cls) -> InstanceIdentity:
        """Return the identity of a new instance in the calling process."""
        pid = os.getpid()
        stat = _process_stat(pid)
        if stat is None:
            raise RuntimeError("/proc does not show the calling process; fastref needs /proc to be mounted")
        return cls(_boot(), _pid_namespace(), pid, stat[1], secrets.token_hex(8))

    @classmethod
    def parse(cls, text: str) -> InstanceIdentity | None:
        """Return the identity that ``str`` turned into ``text``, or None when it is none of ours."""
        match = _NAME.fullmatch(text)
        if match is None:
            return None
        return cls(
            match["boot"], int(match["pid_namespace"]), int(match["pid"]), int(match["start_ticks"]), match["instance"]
        )

    def __str__(self) -> str:
        return f"{self.boot}-{self.pid_namespace}-{self.pid}-{self.start_ticks}-{self.instance}"

    def is_ours_to_judge(self) -> bool:
        """Return whether ``pid`` means something here: same boot, same pid namespace."""
        return self.boot == _boot() and self.pid_namespace == _pid_namespace()

    def process_lives(self) -> bool:
        """Return whether the process still runs; only meaningful when it is ours to judge."""
        stat = _process_stat(self.pid)
        return stat is not None and stat[0] not in "ZX" and stat[1] == self.start_ticks


def process_lives(pid: int) -> bool:
    """Return whether a process of this pid namespace still runs; it does where no descriptor is left to look."""
    try:
        stat = _process_stat(pid)
    except OSError as error:
        if error.errno not in (errno.EMFILE, errno.ENFILE):
            raise
        return True
    return stat is not None and stat[0] not in "ZX"


def host_identity() -> str:
    """Return a text that is equal for two processes only when they can share pids and memory."""
    return f"{socket.gethostname()}:{_boot()}:{_pid_namespace()}"


def network_identity() -> str:
    """Return a text that is equal for two processes only when they share a loopback; containers may, or may not."""
    return f"{_boot()}:{os.stat('/proc/self/ns/net').st_ino}"


def _boot() -> str:
    boot_id = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return hashlib.sha256(boot_id.encode()).hexdigest()[:8]


def _pid_namespace() -> int:
    return os.stat("/proc/self/ns/pid").st_ino


def _process_stat(pid: int) -> tuple[str, int] | None:
    """Return state and start time in ticks of a process, None when there is none."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text(errors="replace")
    except (FileNotFoundError, ProcessLookupError):
        return None
    # The command name stands in parentheses and may itself contain spaces and parentheses.
    fields = text[text.rindex(")") + 2 :].split()
    return fields[0], int(fields[19])
