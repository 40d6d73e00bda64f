"""Kill training at random moments, restart it, and compare the result bit by bit with that of an undisturbed run.

    python benchmarks/kill.py [--kills 60] [--minutes M] [--seed 0]

Trains small models on 1, 2 and 4 processes with data workers. Every disturbed run is killed several times, also while
it resumes and around ``freeze_step``, before it may finish. Ends with a table. If anything differs, the exit status is
1, the two run folders are kept, and the first differing tensor and checkpoint are printed.
"""

from __future__ import annotations

import argparse
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from helpers.processes import CONTEXT, Fault, Ranks, assert_same_run, complete
from helpers.tiny_run import write_config, write_recordings
from spidr.config import read_config

SIGNALS = ("SIGTERM", "SIGUSR1", "SIGUSR2", "SIGINT", "SIGHUP")
KINDS = ("one rank", "all ranks", "data worker", *SIGNALS, "validation", "checkpoint", "freeze", "resume")
ONCE_SEEN = ("resume", "one rank", "all ranks", "SIGTERM")
"""A run on one process once ended with different weights after these; it has not happened since."""

SETUPS = [("spidr", 1, 1), ("dinosr", 2, 2), ("dinosr", 1, 2), ("spidr", 2, 1), ("spidr", 4, 1), ("dinosr", 4, 2)]
"""Model, number of processes and micro-batches."""

FREEZE_STEP = 9


def children(pid: int | None) -> list[int]:
    """Ids of a process's children, which are its data workers."""
    try:
        return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text("utf-8").split()]
    except OSError:
        return []


def disturb(config: Path, world_size: int, kind: str, seconds: float, rng: random.Random) -> bool:
    """Run until something bad happens. Returns whether that was before the end of the run."""
    rank, fault = rng.randrange(world_size), None
    if kind in ("validation", "checkpoint"):
        fault = Fault(kind, rng.randint(1, 3), rank=0 if kind == "checkpoint" else rank)
    if kind == "freeze":
        fault = Fault(
            "step", rng.choice((FREEZE_STEP - 1, FREEZE_STEP, FREEZE_STEP + 1)), rank=rng.choice((rank, None))
        )
    ranks = Ranks(config, world_size, fault)
    if fault is None:
        # Before all processes have joined, only a launcher can know that one is missing.
        while world_size > 1 and "training" not in ranks.log.read_text("utf-8") and ranks.processes[0].is_alive():
            time.sleep(0.01)
        time.sleep(rng.uniform(0, (0.1 if kind == "resume" else 0.6) * seconds))
        pids = [process.pid for process in ranks.processes]
        everyone = kind in ("all ranks", "resume", "SIGINT", "SIGHUP")  # terminals send these to all
        victims = children(pids[rank])[:1] if kind == "data worker" else pids if everyone else [pids[rank]]
        for pid in victims:
            with suppress(ProcessLookupError):
                os.kill(pid or 0, getattr(signal, kind, signal.SIGKILL))
    return any(status != 0 for status in ranks.wait(600))


def tensors(value: Any, name: str = "") -> dict[str, torch.Tensor]:
    """The tensors in nested containers, by path."""
    if isinstance(value, torch.Tensor):
        return {name: value}
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, (list, tuple)) else ()
    return {place: tensor for key, item in items for place, tensor in tensors(item, f"{name}.{key}").items()}


def first_difference(found: Path, expected: Path) -> str:
    """The first tensor that differs between two runs, in which checkpoint, and by how much."""
    paths = sorted(expected.glob("step_*.pt"), key=lambda path: int(path.stem[5:]))
    for path in [*paths, expected / "final.pt"]:
        if not (found / path.name).exists():
            continue
        ours, theirs = (tensors(torch.load(folder / path.name, weights_only=True)) for folder in (found, expected))
        for name in ours.keys() & theirs.keys():
            a, b = ours[name].double(), theirs[name].double()
            if a.shape != b.shape or not torch.equal(a, b):
                by = (a - b).abs().max().item() if a.shape == b.shape else "its shape"
                return f"{path.name}: {name} differs by {by}"
    return "no tensor of a checkpoint differs"


def main() -> int:
    """Run the command line. Returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--kills", type=int, default=60, help="minimum number of kills (default: %(default)s)")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="stop after this time (default: when done)")
    parser.add_argument("--seed", type=int, default=0, help="seed of kinds and moments (default: %(default)s)")
    args = parser.parse_args()
    rng = random.Random(args.seed)
    kills: Counter[tuple[str, str]] = Counter()
    runs = different = 0
    folder = Path(tempfile.mkdtemp(prefix="kill-"))
    manifest = write_recordings(folder / "data", count=24)
    warm_up = CONTEXT.Process(target=int)  # starts the fork server, which is not part of a run
    warm_up.start()
    warm_up.join()
    few = write_recordings(folder / "few", count=4)
    begin = time.monotonic()
    for number, (model_type, world_size, accumulation) in enumerate(SETUPS):
        setup = f"{model_type}, {world_size} x {accumulation}"
        sections = {
            "run": {"model_type": model_type, "save_interval": 4, "log_interval": 2},
            "data": {"num_workers": 1, "global_batch_length": 24_000 * world_size * accumulation},
            "optimizer": {"max_steps": 18},
            "model": {"freeze_step": FREEZE_STEP},
            "validation": {"dev": {"manifest": str(few), "num_workers": 0}},
        }
        start = time.monotonic()
        undisturbed = complete(
            write_config(folder, manifest, f"undisturbed_{number}", **sections), world_size, timeout=600
        )
        seconds = time.monotonic() - start
        share = args.kills * (number + 1) // len(SETUPS)
        until = begin + 60 * args.minutes * (number + 1) / len(SETUPS)
        while sum(kills.values()) < share and time.monotonic() < until:
            runs += 1
            config = write_config(folder, manifest, f"killed_{runs}", **sections)
            kinds = ONCE_SEEN if rng.random() < 0.2 else rng.choices(KINDS, k=rng.randint(2, 5))
            for kind in kinds:
                if disturb(config, world_size, kind, seconds, rng):
                    kills[setup, kind] += 1
            killed = read_config(config).run.dir
            try:
                complete(config, world_size, timeout=600)
                assert_same_run(killed, undisturbed)
                shutil.rmtree(killed)
            except AssertionError as error:
                different += 1
                where = first_difference(killed, undisturbed)
                print(f"{setup}, {kinds}: {killed} differs from {undisturbed}: {where}\n{error}")
            print(f"{setup}: {sum(kills.values())} kills, {runs} runs, {different} differ", flush=True)
    print(f"\n{'':16}" + "".join(f"{kind:>12}" for kind in KINDS))
    for model_type, world_size, accumulation in SETUPS:
        setup = f"{model_type}, {world_size} x {accumulation}"
        print(f"{setup:16}" + "".join(f"{kills[setup, kind]:12}" for kind in KINDS))
    print(f"{sum(kills.values())} kills in {runs} runs; {runs - different} ended with the undisturbed run's bits")
    if not different:
        shutil.rmtree(folder)
    return 1 if different else 0


if __name__ == "__main__":
    sys.exit(main())
