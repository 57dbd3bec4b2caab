"""The run directory and shared memory: private, locked by the living, swept after the dead, never a SIGBUS."""

from __future__ import annotations

import dataclasses
import fcntl
import mmap
import os
import resource
import shutil
import signal
import socket
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path

import pytest

from fastref.errors import ProtocolError, ResourceError, UsageError
from fastref.segments import (
    InstanceIdentity,
    InstanceLock,
    allocate,
    create_control,
    create_memfd,
    job_directory,
    map_fd,
    run_root,
    seal,
    sweep,
)
from fastref.segments.budget import available_bytes
from fastref.segments.rundir import is_locked

PAGE = mmap.PAGESIZE


@pytest.fixture
def root(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    monkeypatch.setenv("FASTREF_RUN_DIR", str(tmp_path / "run"))
    return run_root()


@pytest.fixture
def shm(tmp_path: Path) -> Path:
    directory = tmp_path / "shm"
    directory.mkdir()
    return directory


@pytest.fixture
def lock(root: Path) -> Iterator[InstanceLock]:
    lock = InstanceLock(root)
    yield lock
    lock.release()


def dead_identity() -> InstanceIdentity:
    """Return the identity of a process that has ended."""
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return dataclasses.replace(InstanceIdentity.create(), pid=process.pid)


# The run directory


def test_run_root_is_the_variable_else_the_runtime_directory_else_the_temporary_one(monkeypatch, tmp_path):
    monkeypatch.setenv("FASTREF_RUN_DIR", str(tmp_path / "explicit"))
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path / "runtime"))
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "temporary"))
    assert run_root() == tmp_path / "explicit"
    monkeypatch.delenv("FASTREF_RUN_DIR")
    assert run_root() == tmp_path / "runtime" / "fastref"
    monkeypatch.delenv("XDG_RUNTIME_DIR")
    assert run_root() == tmp_path / "temporary" / f"fastref-{os.geteuid()}"
    assert run_root().stat().st_mode & 0o777 == 0o700


def test_a_run_root_that_others_may_enter_is_refused(monkeypatch, tmp_path):
    tmp_path.chmod(0o750)
    monkeypatch.setenv("FASTREF_RUN_DIR", str(tmp_path))
    with pytest.raises(UsageError, match=r"open to others \(mode 750\): chmod 700"):
        run_root()


def test_a_run_root_that_is_a_link_or_a_file_is_refused(monkeypatch, tmp_path):
    (tmp_path / "real").mkdir(mode=0o700)
    (tmp_path / "link").symlink_to(tmp_path / "real")
    (tmp_path / "file").touch()
    monkeypatch.setenv("FASTREF_RUN_DIR", str(tmp_path / "link"))
    with pytest.raises(UsageError, match="is not a directory"):
        run_root()
    monkeypatch.setenv("FASTREF_RUN_DIR", str(tmp_path / "file"))
    with pytest.raises(UsageError, match="is not a directory"):
        run_root()


def test_a_run_root_of_another_user_is_refused(monkeypatch, tmp_path):
    if os.geteuid() != 0:
        pytest.skip("only root can give a directory away")
    tmp_path.chmod(0o700)
    os.chown(tmp_path, 12345, -1)
    monkeypatch.setenv("FASTREF_RUN_DIR", str(tmp_path))
    with pytest.raises(UsageError, match="belongs to uid 12345"):
        run_root()


def test_a_run_root_that_cannot_be_made_is_a_resource_error(monkeypatch):
    monkeypatch.setenv("FASTREF_RUN_DIR", "/proc/fastref")
    with pytest.raises(ResourceError, match="/proc/fastref"):
        run_root()


def test_job_directories_are_distinct_short_and_inside_the_root(root):
    names = ["digits", "a/b", "a_b", "a b", "../../etc", "..", "/", "ü" * 300, "ü" * 299, "x" * 5000]
    directories = {job_directory(root, name) for name in names}
    assert len(directories) == len(names)
    for directory in directories:
        assert directory.parent == root
        assert len(directory.name) <= 40
        assert directory.stat().st_mode & 0o777 == 0o700
    assert job_directory(root, "digits") in directories


# Locks


def test_the_lock_of_a_living_instance_stays_when_the_process_closes_another_descriptor_of_the_file(lock):
    os.close(os.open(lock.path, os.O_RDWR))
    assert is_locked(lock.path)


def test_several_instances_of_one_process_do_not_see_each_other_as_dead(root, shm):
    locks = [InstanceLock(root) for _ in range(3)]
    locks[1].release()
    assert sweep(root, shm) == []
    assert [lock.path.exists() for lock in locks] == [True, False, True]
    for lock in locks:
        lock.release()
        lock.release()
    assert list(root.iterdir()) == []


def test_a_forked_child_that_releases_the_lock_leaves_its_parent_alive(root, lock):
    child = os.fork()
    if child == 0:
        lock.release()
        os._exit(0)
    os.waitpid(child, 0)
    assert lock.path.exists()
    assert is_locked(lock.path)


def test_an_identity_survives_being_a_file_name():
    identity = InstanceIdentity.create()
    assert InstanceIdentity.parse(str(identity)) == identity
    assert identity.is_ours_to_judge() and identity.process_lives()
    assert not dataclasses.replace(identity, start_ticks=identity.start_ticks - 1).process_lives()
    for text in ["", "x", f"{identity}x", f"x{identity}", str(identity)[:-1], str(identity).replace("-", "_")]:
        assert InstanceIdentity.parse(text) is None


# Sweeping


def test_what_a_killed_process_left_is_swept_and_what_a_living_one_has_stays(root):
    script = textwrap.dedent("""
        import sys, time
        from fastref.rendezvous import Listener
        from fastref.segments import InstanceLock, create_control, job_directory, run_root
        lock = InstanceLock(run_root())
        listener = Listener(job_directory(run_root(), "job"), lock.instance)
        (listener.directory / f"{lock.instance}.coordinator").touch()
        (listener.directory / f"{lock.instance}.coordinator.new").touch()
        control = create_control(4096, lock.identity, keep_name=True)
        print(lock.path, listener.path, "/dev/shm" + control.name, flush=True)
        time.sleep(60)
    """)
    living, killed = (
        subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True) for _ in range(2)
    )
    try:
        paths_of_living = [Path(text) for text in living.stdout.readline().split()]
        paths_of_killed = [Path(text) for text in killed.stdout.readline().split()]
        assert sweep(root) == []
        killed.kill()
        killed.wait()
        assert all(path.exists() for path in paths_of_killed)
        removed = sweep(root)
        assert set(paths_of_killed) < set(removed)
        assert len(removed) == 5
        assert all(path.exists() for path in paths_of_living)
    finally:
        for process in (living, killed):
            process.kill()
            process.wait()
            process.stdout.close()
    sweep(root)
    assert list(root.iterdir()) == []
    assert not any(path.exists() for path in paths_of_living)


def test_a_zombie_and_a_lock_that_a_forked_child_keeps_are_dead(root, shm):
    # The child inherits the lock of its parent and lives on; the parent ends and is not waited for.
    script = textwrap.dedent("""
        import os, time
        from fastref.segments import InstanceLock, run_root
        lock = InstanceLock(run_root())
        child = os.fork()
        if child == 0:
            time.sleep(60)
        print(child, flush=True)
        os._exit(0)
    """)
    parent = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True)
    child = int(parent.stdout.readline())
    try:
        os.waitid(os.P_PID, parent.pid, os.WEXITED | os.WNOWAIT)
        (lock_file,) = root.iterdir()
        assert is_locked(lock_file)
        assert sweep(root, shm) == [lock_file]
    finally:
        os.kill(child, signal.SIGKILL)
        parent.wait()
        parent.stdout.close()


def test_an_instance_that_is_just_starting_is_not_swept(root, shm, monkeypatch):
    seen = []

    def lock_after_a_sweep(fd, operation, argument):
        seen.append(sweep(root, shm))
        return lock_now(fd, operation, argument)

    lock_now = fcntl.fcntl
    monkeypatch.setattr(
        "fastref.segments.rundir.fcntl.fcntl",
        lambda fd, operation, argument: (
            lock_after_a_sweep(fd, operation, argument)
            if operation == fcntl.F_OFD_SETLK
            else lock_now(fd, operation, argument)
        ),
    )
    lock = InstanceLock(root)
    assert seen == [[]]
    assert is_locked(lock.path)
    lock.release()


def test_what_a_process_left_that_was_killed_before_it_had_its_lock_is_swept(root, shm):
    unfinished = root / f"{dead_identity()}.lock.new"
    unfinished.touch()
    (root / f"{InstanceIdentity.create()}.lock.new").touch()
    assert sweep(root, shm) == [unfinished]


def test_what_is_not_ours_to_judge_is_left_alone(root, shm, lock):
    dead = dead_identity()
    other_boot = dataclasses.replace(dead, boot="00000000", instance="0" * 16)
    other_namespace = dataclasses.replace(dead, pid_namespace=1, instance="1" * 16)
    directory = job_directory(root, "job")
    foreign = [
        *(root / f"{identity}.lock" for identity in (other_boot, other_namespace)),
        *(directory / f"{identity.instance}.sock" for identity in (other_boot, other_namespace)),
        *(shm / f"fastref-{identity}-control" for identity in (other_boot, other_namespace)),
        root / "notes.lock",
        directory / "notes.txt",
        directory / f"{dead.instance}.sock.bak",
        shm / "fastref-something",
        shm / f"fastref-{dead}-control.bak",
        shm / f"other-{dead}-control",
    ]
    for path in foreign:
        path.touch()
    (shm / f"fastref-{dead}-link").symlink_to(shm / "other")
    assert sweep(root, shm) == []
    assert all(path.exists() for path in foreign)
    assert (shm / f"fastref-{dead}-link").is_symlink()


def test_files_of_another_user_are_left_alone(root, shm):
    if os.geteuid() != 0:
        pytest.skip("only root can give a file away")
    segment = shm / f"fastref-{dead_identity()}-control"
    segment.touch()
    os.chown(segment, 12345, -1)
    assert sweep(root, shm) == []
    os.chown(segment, 0, -1)
    assert sweep(root, shm) == [segment]


def test_a_segment_whose_lock_lies_in_another_run_directory_stays_while_its_process_lives(root, shm):
    living = shm / f"fastref-{InstanceIdentity.create()}-control"
    dead = shm / f"fastref-{dead_identity()}-control"
    living.touch()
    dead.touch()
    assert sweep(root, shm) == [dead]


def test_many_may_sweep_while_others_start_and_stop(root):
    script = textwrap.dedent("""
        from fastref.rendezvous import Listener
        from fastref.segments import InstanceLock, create_control, job_directory, run_root, sweep
        for _ in range(100):
            lock = InstanceLock(run_root())
            listener = Listener(job_directory(run_root(), "job"), lock.instance)
            control = create_control(4096, lock.identity, keep_name=True)
            sweep(run_root())
            assert lock.path.exists() and listener.path.exists()
            listener.close()
            control.unlink()
            control.close()
            lock.release()
    """)
    processes = [subprocess.Popen([sys.executable, "-c", script]) for _ in range(3)]
    assert [process.wait() for process in processes] == [0, 0, 0]
    assert list(root.iterdir()) == []


# Control segments


def test_a_control_segment_has_no_name_left_and_its_memory_is_shared_through_the_descriptor(lock):
    segment = create_control(3 * PAGE, lock.identity)
    assert not Path("/dev/shm" + segment.name).exists()
    assert not os.get_inheritable(segment.fd)
    assert os.fstat(segment.fd).st_mode & 0o777 == 0o600
    assert os.fstat(segment.fd).st_blocks * 512 >= 3 * PAGE
    writer = memoryview(map_fd(segment.fd, segment.size_bytes, writable=True))
    reader = memoryview(map_fd(segment.fd, segment.size_bytes, writable=False))
    assert reader.tobytes() == bytes(3 * PAGE)
    writer[PAGE : PAGE + 5] = b"hello"
    assert reader[PAGE : PAGE + 5].tobytes() == b"hello"
    segment.unlink()
    segment.close()
    segment.close()


def test_a_name_that_exists_and_a_size_of_zero_are_typed_errors(lock):
    segment = create_control(PAGE, lock.identity, keep_name=True)
    with pytest.raises(ResourceError, match="cannot create /dev/shm/fastref-"):
        create_control(PAGE, lock.identity)
    assert Path("/dev/shm" + segment.name).exists()
    segment.unlink()
    segment.close()
    with pytest.raises(UsageError, match="above zero"):
        create_control(0, lock.identity)


def test_a_full_shared_memory_directory_is_an_error_that_names_it_and_never_a_sigbus(root):
    unshare = shutil.which("unshare")
    if unshare is None or subprocess.run([unshare, "-rm", "true"], capture_output=True).returncode:
        pytest.skip("no user and mount namespaces here, so no small /dev/shm")
    script = textwrap.dedent("""
        import os
        from fastref.errors import ResourceError
        from fastref.segments import InstanceLock, create_control, map_fd, run_root
        lock = InstanceLock(run_root())
        small = create_control(16384, lock.identity)
        memoryview(map_fd(small.fd, small.size_bytes, writable=True))[:] = b"x" * 16384
        try:
            create_control(65536, lock.identity)
        except ResourceError as error:
            print(error)
        assert os.listdir("/dev/shm") == [], os.listdir("/dev/shm")
        again = create_control(32768, lock.identity)
        memoryview(map_fd(again.fd, again.size_bytes, writable=True))[:] = b"x" * 32768
        lock.release()
    """)
    command = 'mount -t tmpfs -o size=64k none /dev/shm && exec "$0" -c "$1"'
    done = subprocess.run(
        [unshare, "-rm", "sh", "-c", command, sys.executable, script], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == "/dev/shm has no room for a control segment of 65536 bytes: 49152 are free\n"


# Memory files


@pytest.fixture
def memory() -> Iterator[int]:
    fd = create_memfd("test", 4 * PAGE)
    yield fd
    os.close(fd)


def test_a_memory_file_can_neither_shrink_nor_grow(memory):
    assert not os.get_inheritable(memory)
    for size_bytes in (PAGE, 8 * PAGE):
        with pytest.raises(PermissionError):
            os.ftruncate(memory, size_bytes)


def test_a_memory_file_may_grow_when_asked_for_but_not_shrink():
    fd = create_memfd("test", PAGE, grow=True)
    os.ftruncate(fd, 2 * PAGE)
    seal(fd, grow=True)
    for size_bytes in (PAGE, 3 * PAGE):
        with pytest.raises(PermissionError):
            os.ftruncate(fd, size_bytes)
    os.close(fd)


def test_after_the_seal_the_owner_writes_and_allocates_and_nobody_else_can(memory):
    owner = memoryview(map_fd(memory, 4 * PAGE, writable=True))
    seal(memory, future_write=True)
    with pytest.raises(PermissionError):
        map_fd(memory, 4 * PAGE, writable=True)
    with pytest.raises(PermissionError):
        os.pwrite(memory, b"x", 0)
    allocate(memory, PAGE, PAGE)
    assert os.fstat(memory).st_blocks * 512 == PAGE
    reader = memoryview(map_fd(memory, 4 * PAGE, writable=False))
    owner[PAGE] = 7
    assert reader[PAGE] == 7
    with pytest.raises(TypeError):
        reader[PAGE] = 8


def test_memory_that_the_system_does_not_have_is_a_resource_error():
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (0, hard))
    try:
        with pytest.raises(ResourceError, match=f"cannot create {PAGE} bytes of shared memory for 'test': Too many"):
            create_memfd("test", PAGE)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_more_than_the_available_memory_is_refused_before_the_kernel_kills_for_it(memory, lock, monkeypatch):
    # Never asked for in earnest: anonymous shared memory has no limit, and the killer picks whom it likes.
    monkeypatch.setattr("fastref.segments.budget.available_bytes", lambda: PAGE)
    allocate(memory, 0, PAGE)
    with pytest.raises(ResourceError, match=f"a segment needs {2 * PAGE} bytes of memory, {PAGE} are available"):
        allocate(memory, 0, 2 * PAGE)
    with pytest.raises(ResourceError, match=f"a control segment needs {2 * PAGE} bytes of memory"):
        create_control(2 * PAGE, lock.identity)
    assert os.fstat(memory).st_blocks * 512 == PAGE


@pytest.mark.parametrize(
    ("own", "parent", "expected"),
    [
        (None, None, 1000 * 1024),
        ("max", "max", 1000 * 1024),
        ("500000", "max", 500000 - 300000 + 1000),
        ("max", "400000", 400000 - 300000 + 1000),
        ("500000", "400000", 400000 - 300000 + 1000),
        ("1000", "max", 0),
    ],
)
def test_available_memory_is_the_least_of_the_machine_and_all_control_groups(tmp_path, own, parent, expected):
    proc, cgroups = tmp_path / "proc", tmp_path / "cgroup"
    (proc / "self").mkdir(parents=True)
    (proc / "meminfo").write_text("MemTotal: 5000 kB\nMemAvailable:    1000 kB\n")
    (proc / "self/cgroup").write_text("1:memory:/elsewhere\n0::/job/worker\n")
    (cgroups / "job/worker").mkdir(parents=True)
    for group, limit in [(cgroups / "job/worker", own), (cgroups / "job", parent)]:
        if limit is not None:
            (group / "memory.max").write_text(f"{limit}\n")
            (group / "memory.current").write_text("300000\n")
            (group / "memory.stat").write_text("anon 5\ninactive_file 1000\n")
    assert available_bytes(proc, cgroups) == expected
    assert available_bytes() > 0


def test_a_segment_shorter_than_announced_is_not_mapped(memory):
    with pytest.raises(ProtocolError, match=f"announced with {4 * PAGE + 1} bytes and has {4 * PAGE}"):
        map_fd(memory, 4 * PAGE + 1, writable=False)
    with pytest.raises(ProtocolError, match="above zero"):
        map_fd(memory, 0, writable=False)
    left, right = socket.socketpair()
    with left, right, pytest.raises(ProtocolError, match="is none"):
        map_fd(left.fileno(), PAGE, writable=False)


def test_a_mapping_outlives_its_descriptor():
    fd = create_memfd("test", PAGE)
    mapping = memoryview(map_fd(fd, PAGE, writable=True))
    os.close(fd)
    mapping[0] = 1
    assert mapping[0] == 1
