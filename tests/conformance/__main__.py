"""Run torch's tests against fastref: ``python -m tests.conformance [--quick] [--verbose] [NAME ...]``.

Prints a table of passed, failed, missing and not applicable by class. Fails when a test fails that is on neither list
of ``tests.conformance.lists``, when one that is listed as missing passes, when a list names a test that there is not,
and when a test leaves a file behind that the next start of a worker would not remove.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
import tempfile
import time
import unittest
from collections.abc import Callable, Iterator
from pathlib import Path

from fastref.segments import run_root, sweep
from tests.conformance.lists import MISSING, NOT_APPLICABLE, QUICK

PATIENCE_S = 60  # for one test
OUTCOMES = ("passed", "failed", "missing", "not applicable", "skipped by torch")


def main() -> int:
    """Run what the command line names; the process's exit code."""
    parser = argparse.ArgumentParser(prog="python -m tests.conformance", description=__doc__.split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="a slice of about a minute")
    parser.add_argument("--missing", action="store_true", help="only those listed as missing")
    parser.add_argument("--verbose", action="store_true", help="what each test prints, also when it passes")
    parser.add_argument("names", nargs="*", help="tests, by name or Class.name; all of them by default")
    arguments = parser.parse_args()
    scratch = tempfile.TemporaryDirectory(prefix="fr-")
    os.environ["DISTRIBUTED_TESTS_DEFAULT_TIMEOUT"] = str(PATIENCE_S)  # torch reads it when it is imported
    os.environ["FASTREF_RUN_DIR"] = str(Path(scratch.name) / "run")
    Path(os.environ["FASTREF_RUN_DIR"]).mkdir(mode=0o700)
    with scratch:
        return Runner(arguments).run()


class Runner:
    """One run: which tests, and what came of them."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        from tests.conformance.suite import CLASSES  # takes seconds, and replaces torch.distributed.rpc

        self.arguments = arguments
        self.capture = Capture()
        self.tests = {
            f"{name}.{method}": made(method)
            for name, made in CLASSES.items()
            for method in unittest.defaultTestLoader.getTestCaseNames(made)
        }
        self.outcomes: dict[str, str] = {}
        self.troubles = [
            f"a list names {name}, which torch does not have"
            for name in [*NOT_APPLICABLE, *MISSING, *QUICK]
            if name not in self.tests
        ]

    def wanted(self, name: str) -> bool:
        """Tell whether a test is to be run."""
        if self.arguments.names:
            return name in self.arguments.names or name.partition(".")[2] in self.arguments.names
        if self.arguments.missing:
            return name in MISSING
        return name in QUICK if self.arguments.quick else True

    def run(self) -> int:
        """Run the tests and print the table; 0 when all is as it should be."""
        started = time.monotonic()
        for name, test in self.tests.items():
            if not self.wanted(name):
                continue
            if name in NOT_APPLICABLE:
                self.outcomes[name] = "not applicable"
                continue
            outcome, output = self._run_one(test)
            if outcome == "failed" and name in MISSING:
                outcome = "missing"
            elif outcome == "passed" and name in MISSING:
                self.troubles.append(f"{name} passes and is still listed as missing")
            self.outcomes[name] = outcome
            print(f"{outcome:16} {name}", flush=True)
            if outcome == "failed" or self.arguments.verbose:
                print(output, flush=True)
        self._print_table(time.monotonic() - started)
        for trouble in self.troubles:
            print(trouble)
        return 1 if self.troubles or "failed" in self.outcomes.values() else 0

    def _run_one(self, test: unittest.TestCase) -> tuple[str, str]:
        before = _files()
        result = unittest.TestResult()
        with self.capture.open() as printed:
            test.run(result)
            text = printed()
        text += "".join(trace for _, trace in result.errors + result.failures)
        if result.skipped:
            return "skipped by torch", text
        left = sorted(_files() - before)
        if left:
            text += f"\nleft behind: {left}"
        return ("passed" if result.wasSuccessful() and not left else "failed"), text

    def _print_table(self, seconds: float) -> None:
        print(f"\n{'':32}" + "".join(f"{outcome:>18}" for outcome in OUTCOMES))
        for kind in dict.fromkeys(name.partition(".")[0] for name in self.outcomes):
            found = [outcome for name, outcome in self.outcomes.items() if name.startswith(f"{kind}.")]
            print(f"{kind:32}" + "".join(f"{found.count(outcome):>18}" for outcome in OUTCOMES))
        every = list(self.outcomes.values())
        print(f"{'all':32}" + "".join(f"{every.count(outcome):>18}" for outcome in OUTCOMES) + f"\n{seconds:.0f} s")


def _files() -> set[str]:
    """Return what is in the run directory and, of ours, in /dev/shm."""
    sweep(run_root())
    run = {str(path) for path in Path(os.environ["FASTREF_RUN_DIR"]).rglob("*") if not path.is_dir()}
    return run | {str(path) for path in Path("/dev/shm").glob("fastref*")}


class Capture:
    """Where this process and its children print while tests run. One file for all: the forkserver keeps the first."""

    def __init__(self) -> None:
        self._file = tempfile.TemporaryFile("w+")

    @contextlib.contextmanager
    def open(self) -> Iterator[Callable[[], str]]:
        """Keep back what is printed; yields a function that returns it."""
        sys.stdout.flush()
        sys.stderr.flush()
        start = self._file.seek(0, os.SEEK_END)
        kept = os.dup(1), os.dup(2)
        os.dup2(self._file.fileno(), 1)
        os.dup2(self._file.fileno(), 2)

        def printed() -> str:
            self._file.seek(start)
            return self._file.read()

        try:
            yield printed
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            for number, duplicate in zip((1, 2), kept, strict=True):
                os.dup2(duplicate, number)
                os.close(duplicate)


if __name__ == "__main__":
    sys.exit(main())
