"""Run one program on a host of `tests.hosts`.

Usage: ``enter_host.py PIDFD KINDS PID_PIPE PROGRAM [ARGUMENT ...]``.
"""

from __future__ import annotations

import os
import sys
from typing import NoReturn

# Next to this file; started by its path, without the packages of the environment, it is up in milliseconds.
from namespaces import run_inside


def main() -> None:
    """Be the process that the test started."""
    host, kinds, pid_pipe = map(int, sys.argv[1:4])
    command = sys.argv[4:]
    os.set_inheritable(host, False)
    os.set_inheritable(pid_pipe, False)

    def program() -> NoReturn:
        try:
            os.execvp(command[0], command)
        except OSError as error:
            os.write(2, f"cannot run {command[0]}: {error}\n".encode())
            os._exit(127)

    def tell_pid(pid: int) -> None:
        os.write(pid_pipe, str(pid).encode())

    run_inside(host, kinds, tell_pid, program)


if __name__ == "__main__":
    main()
