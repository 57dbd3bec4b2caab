"""Removing what dead instances left in the run directory and in /dev/shm, and nothing else."""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Callable, Iterator
from pathlib import Path

from fastref.segments.control import SHM_DIRECTORY, SHM_PREFIX
from fastref.segments.identity import INSTANCE_PATTERN, InstanceIdentity
from fastref.segments.rundir import JOB_PREFIX, LOCK_SUFFIX, UNFINISHED_SUFFIX, is_locked

__all__ = ["sweep"]

# What an instance keeps in a job directory: <instance>.<one of these>.
_JOB_FILE = re.compile(rf"(?P<instance>{INSTANCE_PATTERN})\.(sock|member|(coordinator|joined)(\.new)?)")
_SHM_NAME = re.compile(rf"{SHM_PREFIX}(?P<identity>[0-9a-f-]+-{INSTANCE_PATTERN})(-[a-z]+)?")


def sweep(
    root: Path,
    shm_directory: Path = SHM_DIRECTORY,
    clear: Callable[[Path], object] = lambda directory: None,
) -> list[Path]:
    """Remove what dead instances of this boot and pid namespace left.

    Left alone: what belongs to another user, another boot or another pid namespace, what cannot
    be read, and every name that is not of our making. Any number of processes may sweep at once,
    and others may start or stop meanwhile.

    Parameters
    ----------
    root : Path
        The run directory.
    shm_directory : Path
        Where named shared memory lies.
    clear : callable
        Called with each job directory before it is removed if it is empty: takes away what belongs to no instance.

    Returns
    -------
    list of Path
        What was removed.
    """
    # The order makes it safe against instances that are starting: a lock is there before anything else of its
    # instance is, so what was seen first and has no lock afterwards has lost it for good.
    job_directories = [entry for entry in _entries(root) if entry.name.startswith(JOB_PREFIX) and entry.is_dir()]
    job_files = [entry for directory in job_directories for entry in _entries(directory)]
    segments = [entry for entry in _entries(shm_directory) if entry.name.startswith(SHM_PREFIX)]
    locks = _Locks(root)

    removed = [path for path in job_files if locks.job_file_is_dead(path) and _remove(path)]
    removed += [path for path in segments if locks.segment_is_dead(path) and _remove(path)]
    # Locks go last: a sweeper that is killed half-way leaves the proof of death to the next.
    removed += [path for path in locks.dead_files if _remove(path)]
    for directory in job_directories:
        clear(directory)
        if _remove_if_empty(directory):
            removed.append(directory)
    return removed


class _Locks:
    """The instances that have a lock file in the run directory, by what became of them."""

    def __init__(self, root: Path) -> None:
        self.kept: set[str] = set()
        self.dead: set[str] = set()
        self.dead_files: list[Path] = []
        for path in _entries(root):
            if path.name.endswith(UNFINISHED_SUFFIX):
                identity = InstanceIdentity.parse(path.name.removesuffix(UNFINISHED_SUFFIX))
                # Its maker may be between creating and locking it: here only the process counts.
                if identity and identity.is_ours_to_judge() and not identity.process_lives():
                    self.dead_files.append(path)
            elif path.name.endswith(LOCK_SUFFIX):
                identity = InstanceIdentity.parse(path.name.removesuffix(LOCK_SUFFIX))
                if identity is None:
                    continue
                if _is_dead(identity, path):
                    self.dead.add(identity.instance)
                    self.dead_files.append(path)
                else:
                    self.kept.add(identity.instance)

    def job_file_is_dead(self, path: Path) -> bool:
        match = _JOB_FILE.fullmatch(path.name)
        # Lock and job directory share the run directory, so no lock at all means that the instance has ended.
        return match is not None and match["instance"] not in self.kept

    def segment_is_dead(self, path: Path) -> bool:
        match = _SHM_NAME.fullmatch(path.name)
        identity = InstanceIdentity.parse(match["identity"]) if match else None
        if identity is None or not identity.is_ours_to_judge() or identity.instance in self.kept:
            return False
        # Its lock may lie in another run directory: then only the end of the process proves anything.
        return identity.instance in self.dead or not identity.process_lives()


def _is_dead(identity: InstanceIdentity, lock_file: Path) -> bool:
    if not identity.is_ours_to_judge():
        return False
    try:
        # A forked child inherits the lock and may outlive its parent, but an instance ends with its process.
        return not identity.process_lives() or not is_locked(lock_file)
    except OSError:
        # Gone meanwhile, or not ours to read: either way not ours to remove.
        return False


def _entries(directory: Path) -> Iterator[Path]:
    try:
        names = os.listdir(directory)
    except (FileNotFoundError, PermissionError):
        return
    for name in names:
        yield directory / name


def _remove(path: Path) -> bool:
    try:
        status = path.lstat()
        if status.st_uid != os.geteuid() or not (stat.S_ISREG(status.st_mode) or stat.S_ISSOCK(status.st_mode)):
            return False
        path.unlink()
    except (FileNotFoundError, PermissionError):
        return False  # another sweeper was faster, or it is not ours
    return True


def _remove_if_empty(directory: Path) -> bool:
    try:
        directory.rmdir()
    except OSError:
        return False  # in use, or already gone
    return True
