"""The command ``python -m fastref.compat``: run a program with fastref in the place of ``torch.distributed.rpc``."""

from __future__ import annotations

import os
import sys
from pathlib import Path

__all__ = ["interpreter_options", "main"]

USAGE = """\
usage: python [options] -m fastref.compat script.py [argument ...]
       python [options] -m fastref.compat -m module [argument ...]
       python [options] -m fastref.compat -c program [argument ...]

Runs what `python` would run, with fastref in the place of torch.distributed.rpc: in this process, in every Python that
it starts, and so on. For torchrun: torchrun [options] -m fastref.compat script.py [argument ...]
"""

STARTUP = Path(__file__).resolve().parent / "startup"
MODULE = "fastref.compat"


def main() -> None:
    """Become the program that the command line names. The interpreter starts again, and so it runs exactly as ever."""
    arguments = sys.argv[1:]
    if not arguments or arguments[0] in ("-h", "--help"):
        print(USAGE, end="")
        sys.exit(0 if arguments else 2)
    if sys.flags.ignore_environment or sys.flags.no_site:
        sys.exit(f"{MODULE}: a Python under -E, -I or -S does not look for what puts fastref in torch's place")
    path = os.environ.get("PYTHONPATH", "")
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(STARTUP), path]))
    sys.stdout.flush()
    os.execv(sys.executable, [sys.executable, *interpreter_options(len(arguments)), *arguments])


def interpreter_options(argument_count: int) -> list[str]:
    """Return the interpreter's own options: what stands before this module on the command line."""
    options = sys.orig_argv[1:-argument_count]
    if options[-1] == MODULE:  # -m fastref.compat, or -um fastref.compat
        options.pop()
        last = options.pop()[:-1]
    else:  # -mfastref.compat
        last = options.pop().removesuffix(f"m{MODULE}")
    return options if last in ("", "-") else [*options, last]


if __name__ == "__main__":
    main()
