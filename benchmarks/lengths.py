"""Time batches of varying length on a CPU, with PyTorch's caches of compiled operations and with smaller ones.

    python benchmarks/lengths.py [--size SIZE] [--steps N]

For each cache size, a process takes the same training steps, every batch of a different length. Prints the median time
of a step per second of speech, and the process's memory as it grows.
"""

import argparse
import os
import subprocess
import sys
import time
from pathlib import Path
from statistics import median


def worker(size: str, steps: int) -> None:
    """Train, and print a row of the table."""
    import torch
    from speed import Spidr, inputs

    from spidr.tools.threads import keep_memory

    keep_memory()
    model, generator = Spidr(size, compiled=False), torch.Generator().manual_seed(0)
    batch, mask, _ = inputs(size)
    times, sizes = [], []
    for _ in range(steps):
        frames = int(torch.randint(mask.shape[1] // 4, mask.shape[1], (), generator=generator))
        start = time.perf_counter()
        model.step(batch[:, : 400 + 320 * (frames - 1)], mask[:, :frames], torch.autocast("cpu", enabled=False))
        times.append((time.perf_counter() - start) / (len(batch) * frames * 0.02))
        sizes.append(int(Path("/proc/self/statm").read_text("utf-8").split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1e9)
    after = " | ".join(f"{sizes[i]:.2f}" for i in (1, steps // 2, steps - 1))
    print(f"| {os.environ.get('LRU_CACHE_CAPACITY', '1024')} | {1000 * median(times):.2f} | {after} |", flush=True)


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", default="quickstart", help="shape of the model, see speed.py")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        worker(args.size, args.steps)
        return
    from spidr.tools.threads import CAPACITIES

    print(f"| entries | ms per second of speech | GB after 2 steps | {args.steps // 2} | {args.steps} |")
    print("| --- |" + " --- |" * 4, flush=True)
    for chosen in ({}, CAPACITIES):
        command = [sys.executable, __file__, "--worker", "--size", args.size, "--steps", str(args.steps)]
        subprocess.run(command, check=True, env=os.environ | chosen)


if __name__ == "__main__":
    main()
