"""The run directory: where the processes of one user on one host find each other and prove that they live."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import re
import stat
import struct
import tempfile
from pathlib import Path

from fastref.errors import ResourceError, UsageError
from fastref.segments.identity import InstanceIdentity

__all__ = ["InstanceLock", "is_locked", "job_directory", "run_root"]

RUN_DIR_VARIABLE = "FASTREF_RUN_DIR"
JOB_PREFIX = "job-"
LOCK_SUFFIX = ".lock"
UNFINISHED_SUFFIX = ".lock.new"

# struct flock as the C library lays it out; the pid field must be zero for locks of open file descriptions.
_FLOCK = struct.Struct("hhqqi0q")
_READABLE_NAME_CHARACTERS = 16


def run_root() -> Path:
    """Return the private directory of this user, made if need be.

    It is ``$FASTREF_RUN_DIR``, else ``$XDG_RUNTIME_DIR/fastref``, else ``fastref-<uid>`` in the
    directory for temporary files.

    Raises
    ------
    UsageError
        It exists, but belongs to somebody else, is no directory, or others may enter it.
    ResourceError
        It cannot be made.
    """
    if explicit := os.environ.get(RUN_DIR_VARIABLE):
        root = Path(explicit)
    elif runtime_dir := os.environ.get("XDG_RUNTIME_DIR"):
        root = Path(runtime_dir) / "fastref"
    else:
        root = Path(tempfile.gettempdir()) / f"fastref-{os.geteuid()}"
    root = root.absolute()
    make_private_directory(root)
    return root


def job_directory(root: Path, job: str) -> Path:
    """Return the directory of job ``job`` inside ``root``, made if need be.

    The name keeps some readable characters and a hash of the rest: it cannot leave ``root``, two
    jobs never share one, and it stays short, since the path of a unix socket ends at 107 bytes.
    """
    readable = re.sub(r"[^A-Za-z0-9]+", "_", job)[:_READABLE_NAME_CHARACTERS]
    digest = hashlib.sha256(job.encode("utf-8", "surrogateescape")).hexdigest()[:12]
    directory = root / f"{JOB_PREFIX}{readable}-{digest}"
    make_private_directory(directory)
    return directory


def make_private_directory(path: Path) -> None:
    """Make ``path`` with mode 0700, or check that it is ours alone if it is there."""
    status = None
    while status is None:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with contextlib.suppress(FileExistsError):
                os.mkdir(path, 0o700)
        except OSError as error:
            raise ResourceError(f"cannot make the run directory {path}: {error.strerror}") from error
        # Others remove it when it is empty: then make it again.
        with contextlib.suppress(FileNotFoundError):
            status = path.lstat()
    advice = f"set {RUN_DIR_VARIABLE} to a directory that is yours alone"
    if not stat.S_ISDIR(status.st_mode):
        raise UsageError(f"{path} is not a directory; {advice}")
    if status.st_uid != os.geteuid():
        raise UsageError(f"{path} belongs to uid {status.st_uid}, not to uid {os.geteuid()}; {advice}")
    if status.st_mode & 0o077:
        raise UsageError(f"{path} is open to others (mode {status.st_mode & 0o777:o}): chmod 700 it, or {advice}")


class InstanceLock:
    """The file whose lock says that one instance lives.

    Rule 1: the file gets its name only after it is locked, so a file with a free lock is always a dead one.
    Rule 2: it is made before anything else of the instance and removed after everything else.
    Rule 3: an instance id is never used twice, so a free lock is never taken again.

    The lock belongs to the open file description (``F_OFD_SETLK``). A plain ``F_SETLK`` belongs to the
    process: closing any other descriptor of the file drops it, and a process that holds several
    instances would find its own locks free.
    """

    def __init__(self, root: Path) -> None:
        """Take a new lock in ``root``.

        Raises
        ------
        ResourceError
            The file cannot be made or locked.
        """
        self.identity = InstanceIdentity.create()
        self.path = root / f"{self.identity}{LOCK_SUFFIX}"
        unfinished = root / f"{self.identity}{UNFINISHED_SUFFIX}"
        try:
            self._fd = os.open(unfinished, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
            try:
                fcntl.fcntl(self._fd, fcntl.F_OFD_SETLK, _whole_file_lock())
                os.write(self._fd, json.dumps({"instance": self.instance, "pid": self.identity.pid}).encode())
                os.rename(unfinished, self.path)
            except BaseException:
                os.close(self._fd)
                unfinished.unlink(missing_ok=True)
                raise
        except OSError as error:
            raise ResourceError(f"cannot make and lock {self.path}: {error.strerror}") from error

    @property
    def instance(self) -> str:
        """The random id, sixteen hex digits."""
        return self.identity.instance

    def release(self) -> None:
        """Remove the file and drop the lock; idempotent. A forked child only closes its descriptor."""
        if self._fd < 0:
            return
        fd, self._fd = self._fd, -1
        if os.getpid() == self.identity.pid:
            self.path.unlink(missing_ok=True)
        os.close(fd)


def is_locked(path: Path) -> bool:
    """Return whether any open file description holds a lock on ``path``; takes none itself.

    Raises
    ------
    OSError
        The file cannot be opened.
    """
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
    try:
        answer = fcntl.fcntl(fd, fcntl.F_OFD_GETLK, _whole_file_lock())
    except OSError as error:
        if error.errno == errno.EINVAL:
            raise ResourceError(f"the file system of {path} has no locks of open file descriptions") from error
        raise
    finally:
        os.close(fd)
    kind: int = _FLOCK.unpack(answer)[0]
    return kind != fcntl.F_UNLCK


def _whole_file_lock() -> bytes:
    return _FLOCK.pack(fcntl.F_WRLCK, os.SEEK_SET, 0, 0, 0)
