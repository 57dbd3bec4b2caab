"""The command ``fastref``: ``fastref bench`` measures on the machine it is run on."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from fastref._version import __version__
from fastref.bench import __main__ as bench

__all__ = ["main"]

COMMANDS = {"bench": bench.main}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a subcommand.

    Parameters
    ----------
    arguments : sequence of str, optional
        Those of the process by default: the subcommand, then what it takes.

    Returns
    -------
    int
        The subcommand's exit status.
    """
    given = list(sys.argv[1:] if arguments is None else arguments)
    parser = argparse.ArgumentParser(prog="fastref", description="Remote references between processes of one host.")
    parser.add_argument("--version", action="version", version=f"fastref {__version__}")
    parser.add_argument("command", choices=COMMANDS, help="what to do; `fastref COMMAND --help` says how")
    # Only the first word is parsed here: the rest, --help included, is the subcommand's.
    return COMMANDS[parser.parse_args(given[:1]).command](given[1:], prog=f"fastref {given[0]}")
