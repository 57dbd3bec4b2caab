"""``python -m tests.fuzz --seconds 60``: feed every decoder, fail on the first input that it does not take well."""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

from tests.fuzz.decoders import TARGETS
from tests.fuzz.fuzzer import Fuzzer, LastInput


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("targets", nargs="*", choices=[*TARGETS, []], help="all of them without")
    parser.add_argument("--seconds", type=float, default=60.0, help="for all targets together")
    parser.add_argument("--seed", type=int, default=time.time_ns() & 0xFFFFFFFF)
    parser.add_argument("--input", type=Path, help="feed this file once instead, to see a failure again")
    parser.add_argument(
        "--last", type=Path, default=Path("build/fuzz-last-input"), help="where each input is kept first"
    )
    options = parser.parse_args()
    names = options.targets or list(TARGETS)
    if options.input:
        for name in names:
            TARGETS[name].read(options.input.read_bytes())
        return 0
    options.last.parent.mkdir(parents=True, exist_ok=True)
    print(f"seed {options.seed}; an input that ends the process is in {options.last}", flush=True)
    with LastInput(options.last) as last:
        for name in names:
            fuzzer = Fuzzer(TARGETS[name], options.seed, last)
            fuzzer.run(options.seconds / len(names))
            print(f"{name}: {fuzzer.inputs} inputs, {fuzzer.taken} taken, the others refused", flush=True)
            if not 0 < fuzzer.taken < fuzzer.inputs:
                print(f"{name}: a fuzzer that never gets in, or is never refused, tries nothing", file=sys.stderr)
                return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
