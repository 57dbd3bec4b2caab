"""``fastref bench`` and ``python -m fastref.bench``: measure side by side, and print the tables."""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Callable, Collection, Sequence
from pathlib import Path

from fastref.bench.backends import BACKENDS
from fastref.bench.compare import compare
from fastref.bench.plot import plot
from fastref.bench.report import machine, text_table, to_json, write_markdown
from fastref.bench.rows import ROW_GROUPS, ROWS
from fastref.bench.timing import FULL, QUICK
from fastref.errors import FastrefError

__all__ = ["main"]

ROUNDS, QUICK_ROUNDS = 3, 1


def main(arguments: Sequence[str] | None = None, prog: str = "python -m fastref.bench") -> int:
    """Run the comparison that the arguments describe.

    Parameters
    ----------
    arguments : sequence of str, optional
        Those of the process by default.
    prog : str
        How the command is called in its help.

    Returns
    -------
    int
        Exit status: 0 when everything was measured, however far it reached; 1 when a measurement failed;
        130 after Ctrl-C.
    """
    chosen = _parser(prog).parse_args(arguments)
    effort, rounds = (QUICK, QUICK_ROUNDS) if chosen.quick else (FULL, ROUNDS)
    if chosen.seconds is not None:
        effort = dataclasses.replace(effort, seconds=chosen.seconds)
    progress = _Progress()
    try:
        comparison = compare(chosen.backends, chosen.rows, chosen.rounds or rounds, effort, progress)
        progress.done()
        if chosen.markdown:
            write_markdown(comparison, chosen.markdown)
        if chosen.json:
            chosen.json.write_text(to_json(comparison))
        if chosen.plot:
            plot(comparison, chosen.plot)
    except FastrefError as error:
        progress.done()
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        progress.done()
        return 130
    print(", ".join(f"{key} {value}" for key, value in machine().items()))
    print(text_table(comparison), end="")
    return 0


def _parser(prog: str) -> argparse.ArgumentParser:
    description = "Measure fastref, torch.distributed.rpc and other libraries side by side, and print the tables."
    parser = argparse.ArgumentParser(prog=prog, description=description)
    parser.add_argument(
        "--backends", type=_names(BACKENDS), default=list(BACKENDS), metavar="NAME,...", help=", ".join(BACKENDS)
    )
    known = "; ".join(f"{group}: {', '.join(names)}" for group, names in ROW_GROUPS.items())
    parser.add_argument(
        "--rows", type=_rows, default=list(ROWS), metavar="ROW,...", help=f"rows, or groups of rows ({known})"
    )
    parser.add_argument("--rounds", type=_positive, help=f"default {ROUNDS}, with --quick {QUICK_ROUNDS}")
    parser.add_argument("--seconds", type=float, help="time for one row in one round")
    parser.add_argument("--quick", action="store_true", help="little of everything: shows that it runs, not how fast")
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="write the table, or fill it in between marks")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every round's figures")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw the tables (svg, png, pdf; needs matplotlib)")
    return parser


def _names(known: Collection[str]) -> Callable[[str], list[str]]:
    def parse(text: str) -> list[str]:
        names = text.split(",")
        if unknown := [name for name in names if name not in known]:
            raise argparse.ArgumentTypeError(f"{', '.join(unknown)} not among {', '.join(known)}")
        return names

    return parse


def _rows(text: str) -> list[str]:
    names = _names([*ROW_GROUPS, *ROWS])(text)
    return [row for name in names for row in ROW_GROUPS.get(name, [name])]


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{number} is not at least 1")
    return number


class _Progress:
    """What is going on, on stderr: one line that changes on a terminal, one line each elsewhere."""

    def __init__(self) -> None:
        self._in_place = sys.stderr.isatty()

    def __call__(self, text: str) -> None:
        line = f"\r\x1b[K{text}" if self._in_place else f"{text}\n"
        print(line, end="", file=sys.stderr, flush=True)

    def done(self) -> None:
        """Clear the line that changes."""
        if self._in_place:
            print("\r\x1b[K", end="", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
