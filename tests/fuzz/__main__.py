"""`python -m fuzz [--seconds S] [--seed N] [target...]` (in tests/): tries every target for its share of the time, and says what failed."""

from __future__ import annotations

import argparse
import random
import sys
import time
import traceback

from fuzz.running import run_for
from fuzz.targets import TARGETS


def main() -> int:
    names = [target.name for target in TARGETS]
    parser = argparse.ArgumentParser(prog="fuzz", description=__doc__)
    parser.add_argument("--seconds", type=float, default=60.0, help="for all targets together")
    parser.add_argument(
        "--seed", type=int, default=random.SystemRandom().randrange(1_000_000), help="of the first round; the next takes the next"
    )
    parser.add_argument("targets", nargs="*", metavar="target", help=f"only these: {', '.join(names)}")
    asked = parser.parse_args()
    if unknown := set(asked.targets) - set(names):
        parser.error(f"there is no target {min(unknown)}; there are {', '.join(names)}")
    chosen = [target for target in TARGETS if not asked.targets or target.name in asked.targets]
    print(f"seed {asked.seed}, {asked.seconds / len(chosen):.1f} s for each of {len(chosen)} targets", flush=True)
    failed = []
    for target in chosen:
        began = time.monotonic()
        try:
            tried = run_for(target, asked.seconds / len(chosen), asked.seed)
            print(f"{target.name:14} {tried:>8,} examples in {time.monotonic() - began:5.1f} s", flush=True)
        except Exception:  # noqa: BLE001 - whatever a target raises is what is looked for
            failed.append(target.name)
            print(f"{target.name:14} FAILED after {time.monotonic() - began:5.1f} s", flush=True)
            traceback.print_exc()
    if failed:
        print(f"failed: {', '.join(failed)}. The examples are kept under .hypothesis: the next run tries them first", flush=True)
    return bool(failed)


if __name__ == "__main__":
    sys.exit(main())
