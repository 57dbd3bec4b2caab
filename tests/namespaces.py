"""The system calls behind a host of its own: namespaces, mounts, a program inside.

Imports the standard library alone, since `tests.enter_host` starts once for every program on a host.
"""

from __future__ import annotations

import ctypes
import os
import resource
import signal
from collections.abc import Callable
from typing import NoReturn

__all__ = [
    "NEW_MOUNTS",
    "NEW_NETWORK",
    "NEW_PIDS",
    "NEW_USERS",
    "NEW_UTS",
    "bind",
    "die_with_parent",
    "keep_mounts_private",
    "mount",
    "run_inside",
    "set_host_name",
    "unshare",
]

# sched.h; the standard library has them from Python 3.12 on.
NEW_MOUNTS = 0x00020000
NEW_UTS = 0x04000000
NEW_USERS = 0x10000000
NEW_PIDS = 0x20000000
NEW_NETWORK = 0x40000000

# sys/mount.h, sys/prctl.h
_MS_NOSUID, _MS_NODEV, _MS_BIND, _MS_REC, _MS_PRIVATE = 2, 4, 4096, 16384, 1 << 18
_PR_SET_PDEATHSIG = 1

_libc = ctypes.CDLL(None, use_errno=True)


def unshare(kinds: int) -> None:
    """Put the calling process into new namespaces; of pids: the children to come."""
    _check(_libc.unshare(kinds), "unshare")


def run_inside(host: int, kinds: int, tell_pid: Callable[[int], None], program: Callable[[], NoReturn]) -> NoReturn:
    """Run a program in the namespaces of the process behind a pidfd; end as it ends.

    A process cannot change its own pid namespace, only that of its children. So the calling process stands by outside,
    where those who started it wait for it, and tells them the program's pid there.
    """
    directory = os.getcwd()
    _check(_libc.setns(host, kinds), "setns")
    os.chdir(directory)  # who enters other mounts stands at their root
    child = os.fork()
    if child == 0:
        try:
            die_with_parent()
            program()
        finally:
            os._exit(1)
    tell_pid(child)
    # What the program closes is closed, then.
    os.closerange(0, resource.getrlimit(resource.RLIMIT_NOFILE)[0])
    _end_like(os.waitpid(child, 0)[1])


def keep_mounts_private() -> None:
    """Let no mount of this mount namespace be seen outside."""
    _mount("none", "/", None, _MS_REC | _MS_PRIVATE, None)


def mount(kind: str, target: str, options: str | None = None) -> None:
    """Mount a new file system, ``tmpfs`` or ``proc``."""
    _mount(kind, target, kind, _MS_NOSUID | _MS_NODEV, options)


def bind(source: str, target: str) -> None:
    """Let a file be seen in the place of another one."""
    _mount(source, target, None, _MS_BIND, None)


def set_host_name(name: str) -> None:
    """Name the host of this UTS namespace."""
    _check(_libc.sethostname(name.encode(), len(name)), f"sethostname {name}")


def die_with_parent() -> None:
    """Have the calling process killed when the thread that started it ends; forgotten when credentials change."""
    _check(_libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL), "prctl")


def _end_like(status: int) -> NoReturn:
    if os.WIFSIGNALED(status):
        number = os.WTERMSIG(status)
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        if number != signal.SIGKILL:
            signal.signal(number, signal.SIG_DFL)
        os.kill(os.getpid(), number)
    os._exit(os.waitstatus_to_exitcode(status))


def _mount(source: str, target: str, kind: str | None, flags: int, options: str | None) -> None:
    texts = [None if text is None else text.encode() for text in (source, target, kind, options)]
    _check(_libc.mount(*texts[:3], ctypes.c_ulong(flags), texts[3]), f"mount {kind or source} on {target}")


def _check(result: int, what: str) -> None:
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{what}: {os.strerror(number)}")
