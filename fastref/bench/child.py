"""First code of every process a benchmark starts: tie it to its starter, then work or burn.

Run by path, on the standard library alone, so that a burning process costs no import of torch and a
working one can say what it weighed when torch was imported and nothing else was.
"""

from __future__ import annotations

import ctypes
import faulthandler
import os
import signal
import sys

PR_SET_PDEATHSIG = 1  # <linux/prctl.h>
GRACE_S = 5  # between the dump of all stacks and the signal that cannot be missed


def tether(starter_pid: int, limit_s: int) -> None:
    """Make this process die with its starter, and at the latest after a limit.

    The kernel sends the signal when the *thread* that started this process ends, so start children from a
    thread that lives as long as they shall.

    Parameters
    ----------
    starter_pid : int
        The process that started this one.
    limit_s : int
        Seconds this process may live. Then all its stacks go to stderr and it ends.

    Raises
    ------
    OSError
        When the kernel refuses.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    libc.prctl.argtypes = [ctypes.c_int] + [ctypes.c_ulong] * 4
    if libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0) != 0:
        error = ctypes.get_errno()
        raise OSError(error, f"prctl(PR_SET_PDEATHSIG): {os.strerror(error)}")
    if os.getppid() != starter_pid:  # it died before the line above: no signal will come
        os._exit(1)
    faulthandler.dump_traceback_later(limit_s, exit=True)
    # The watchdog of faulthandler is a thread; the alarm is the kernel's and ends even a stuck interpreter.
    signal.alarm(limit_s + GRACE_S)


def burn() -> None:
    """Keep one core busy until killed."""
    while True:
        pass


def work(descriptor: int) -> None:
    """Report the import of torch alone, then serve the starter's requests over a socket."""
    from multiprocessing.connection import Connection

    import torch.distributed.rpc  # noqa: F401  (what every program over either backend has loaded)

    requests: Connection = Connection(descriptor)
    requests.send(("done", None))
    requests.recv()  # the starter weighs all processes at this point

    from fastref.bench.worker import serve

    serve(requests)


def main(argv: list[str]) -> None:
    """``burn STARTER_PID LIMIT_S`` or ``work STARTER_PID LIMIT_S DESCRIPTOR``."""
    role, starter_pid, limit_s, *rest = argv
    tether(int(starter_pid), int(limit_s))
    if role == "burn":
        burn()
    else:
        work(int(rest[0]))


if __name__ == "__main__":
    main(sys.argv[1:])
