"""Kill training at random moments, start it again, and compare the bits of what comes out with an undisturbed run.

``python benchmarks/kill.py [--kills 60] [--seed 0]``: small models on 1, 2 and 4 processes with data workers. Every
disturbed run is killed several times before it may finish. Ends with a table, and status 1 if anything differs.
"""

from __future__ import annotations

import argparse
import os
import random
import signal
import sys
import tempfile
import time
from collections import Counter
from contextlib import suppress
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from processes import CONTEXT, Fault, Ranks, assert_same_run, complete
from tiny_run import write_config, write_recordings

KINDS = ("one rank", "all ranks", "data worker", "SIGTERM", "SIGUSR1", "SIGUSR2", "validation", "checkpoint")
SETUPS = [("spidr", 1, 1), ("dinosr", 2, 2), ("dinosr", 1, 2), ("spidr", 2, 1), ("spidr", 4, 1), ("dinosr", 4, 2)]
"""Model, processes and micro-batches of each."""


def children(pid: int | None) -> list[int]:
    """Process ids of a process's children: its data workers."""
    try:
        return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except OSError:
        return []


def disturb(config: Path, world_size: int, kind: str, seconds: float, rng: random.Random) -> bool:
    """Run until something bad happens. Returns whether it did before the run had finished."""
    rank, fault = rng.randrange(world_size), None
    if kind in ("validation", "checkpoint"):
        fault = Fault(kind, rng.randint(1, 3), rank=0 if kind == "checkpoint" else rank)
    ranks = Ranks(config, world_size, fault)
    if fault is None:
        # Before all have met, nobody but a launcher can know that one is missing.
        while world_size > 1 and "training" not in ranks.log.read_text() and ranks.processes[0].is_alive():
            time.sleep(0.01)
        time.sleep(rng.uniform(0, 0.6 * seconds))
        pids = [process.pid for process in ranks.processes]
        victims = {"all ranks": pids, "data worker": children(pids[rank])[:1]}.get(kind, [pids[rank]])
        for pid in victims:
            with suppress(ProcessLookupError):
                os.kill(pid or 0, getattr(signal, kind, signal.SIGKILL))
    return any(status != 0 for status in ranks.wait(300))


def main() -> int:
    """Run the command line. Returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--kills", type=int, default=60, help="how many kills at least")
    parser.add_argument("--seed", type=int, default=0, help="seed of kinds and moments")
    args = parser.parse_args()
    rng = random.Random(args.seed)
    kills: Counter[tuple[str, str]] = Counter()
    runs = different = 0
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        manifest = write_recordings(folder / "data", count=24)
        warm_up = CONTEXT.Process(target=int)  # the server's start is no part of a run
        warm_up.start()
        warm_up.join()
        few = write_recordings(folder / "few", count=4)
        for number, (model_type, world_size, accumulation) in enumerate(SETUPS):
            setup = f"{model_type}, {world_size} x {accumulation}"
            sections = {
                "run": {"model_type": model_type, "save_interval": 4, "log_interval": 2},
                "data": {"num_workers": 1, "global_batch_length": 24_000 * world_size * accumulation},
                "optimizer": {"max_steps": 18},
                "model": {"freeze_step": 9},
                "validation": {"dev": {"manifest": str(few), "num_workers": 0}},
            }
            start = time.monotonic()
            undisturbed = complete(write_config(folder, manifest, f"undisturbed_{number}", **sections), world_size)
            seconds = time.monotonic() - start
            share = args.kills * (number + 1) // len(SETUPS)
            while sum(kills.values()) < share:
                runs += 1
                config = write_config(folder, manifest, f"killed_{runs}", **sections)
                for kind in rng.choices(KINDS, k=rng.randint(2, 5)):
                    if disturb(config, world_size, kind, seconds, rng):
                        kills[setup, kind] += 1
                try:
                    assert_same_run(complete(config, world_size), undisturbed)
                except AssertionError as error:
                    different += 1
                    print(f"{setup}: run {runs} differs: {error}", flush=True)
                print(f"{setup}: {sum(kills.values())} kills, {runs} runs, {different} differ", flush=True)
    print(f"\n{'':16}" + "".join(f"{kind:>12}" for kind in KINDS))
    for model_type, world_size, accumulation in SETUPS:
        setup = f"{model_type}, {world_size} x {accumulation}"
        print(f"{setup:16}" + "".join(f"{kills[setup, kind]:12}" for kind in KINDS))
    print(f"{sum(kills.values())} kills in {runs} runs; {runs - different} ended with the undisturbed run's bits")
    return 1 if different else 0


if __name__ == "__main__":
    sys.exit(main())
