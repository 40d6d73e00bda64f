"""Time a training step on an idle and on a busy machine, for several ways in which OpenMP's threads wait.

    python benchmarks/busy.py [--loops N ...] [--steps N]

Prints the median milliseconds per step for the quick start's shape, alone and beside ``--loops`` busy processes: with
OpenMP's default, with what commands set (``GOMP_SPINCOUNT=1000``), with ``OMP_WAIT_POLICY=passive``, with one thread.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import time

CASES = {
    "default": {},
    "GOMP_SPINCOUNT=1000": {"GOMP_SPINCOUNT": "1000"},
    "OMP_WAIT_POLICY=passive": {"OMP_WAIT_POLICY": "passive"},
    "one thread": {"OMP_NUM_THREADS": "1"},
}
CHOSEN = ("GOMP_SPINCOUNT", "KMP_BLOCKTIME", "OMP_WAIT_POLICY", "KMP_LIBRARY", "OMP_NUM_THREADS")


def milliseconds(steps: int) -> float:
    """Median time of a step, without the first two."""
    from speed import Spidr, inputs
    from torch import autocast

    batch, mask, _ = inputs("quickstart")
    subject, taken = Spidr("quickstart", compiled=False), []
    for _ in range(steps + 2):
        start = time.perf_counter()
        subject.step(batch, mask, autocast("cpu", enabled=False))
        taken.append(1000 * (time.perf_counter() - start))
    return statistics.median(taken[2:])


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--loops", type=int, nargs="+", default=[0, 3], help="numbers of busy processes")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        print(milliseconds(args.steps))
        return
    environ = {name: value for name, value in os.environ.items() if name not in CHOSEN}
    print(f"| ms per step, beside | {' | '.join(CASES)} |\n| --- |{' --- |' * len(CASES)}")
    for count in args.loops:
        loops = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(count)]
        try:
            command = [sys.executable, __file__, "--worker", "--steps", str(args.steps)]
            runs = [
                subprocess.run(command, env=environ | case, check=True, stdout=subprocess.PIPE, text=True)
                for case in CASES.values()
            ]
            print(f"| {count} busy loops | {' | '.join(f'{float(run.stdout):.0f}' for run in runs)} |", flush=True)
        finally:
            for loop in loops:
                loop.kill()


if __name__ == "__main__":
    main()
