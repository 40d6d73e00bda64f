"""Weeks of training: many epochs, slow disks, ten million recordings."""

import json
import os
import threading
import time
from functools import partial
from pathlib import Path

import numpy as np
import polars as pl
import pytest

from helpers.processes import Ranks, assert_same_run, complete
from helpers.tiny_run import write_config, write_recordings
from spidr.config import DataConfig, read_config
from spidr.data import build_dataloader
from spidr.train import Hooks, State

EPOCHS, WARM, EVERY = 1000, 200, 25


def _resident() -> int:
    """Bytes of memory in use."""
    return int(Path("/proc/self/statm").read_text("utf-8").split()[1]) * os.sysconf("SC_PAGE_SIZE")


def _observe(output: Path) -> Hooks:
    def after_step(state: State) -> None:
        if state.step >= WARM and (state.step - WARM) % EVERY == 0:
            seen = (state.epoch, _resident(), threading.active_count(), len(list(Path("/proc/self/fd").iterdir())))
            with output.open("a", encoding="utf-8") as file:
                file.write(json.dumps(seen) + "\n")

    return Hooks(after_step=after_step)


def test_a_thousand_epochs_take_no_more_than_two_hundred(tmp_path: Path) -> None:
    config = write_config(
        tmp_path,
        write_recordings(tmp_path / "data", count=2),
        run={"log_interval": 50, "save_interval": 200, "keep_latest": 1},
        optimizer={"max_steps": EPOCHS},
        data={"num_workers": 1},
    )
    document = json.loads(config.read_text("utf-8"))
    del document["validation"]
    config.write_text(json.dumps(document), "utf-8")
    complete(config, hooks=partial(_observe, tmp_path / "seen"), timeout=280)
    seen = [json.loads(line) for line in (tmp_path / "seen").read_text("utf-8").splitlines()]
    epochs, memory, *counts = map(np.array, zip(*seen, strict=True))
    assert np.array_equal(np.diff(epochs), np.full(len(seen) - 1, EVERY))  # an epoch is one step
    # Threads and file descriptors. A heartbeat may have its file open just then; a leak never goes away again.
    assert all(count[-10:].min() == count[:10].min() for count in counts)
    # The median slope over all pairs of points ignores a single jump of the allocator, but not a leak.
    first, second = np.triu_indices(len(seen), 1)
    slope = np.median((memory[second] - memory[first]) / (epochs[second] - epochs[first]))
    assert slope * (EPOCHS - WARM) < 8e6


def _slow_disk(seconds: float) -> Hooks:
    from spidr.tools import files

    rename = files._rename

    def slow(aside: Path, path: Path) -> None:
        time.sleep(seconds * path.name.startswith("step_4"))
        rename(aside, path)

    files._rename = slow
    return Hooks()


def test_a_disk_slower_than_the_silence_limit(tmp_path: Path) -> None:
    """The others wait for the process that saves, since it keeps sending heartbeats."""
    manifest = write_recordings(tmp_path / "data", count=6)
    options = {"run": {"save_interval": 4}, "optimizer": {"max_steps": 6}}
    config = write_config(tmp_path, manifest, **options)
    ranks = Ranks(config, 2, hooks=partial(_slow_disk, 9.0))  # SILENCE is 6 s in tests
    assert ranks.wait() == [0, 0], ranks.log.read_text()
    undisturbed = complete(write_config(tmp_path, manifest, "undisturbed", **options), 2)
    assert_same_run(read_config(config).run.dir, undisturbed)


@pytest.mark.slow
def test_ten_million_recordings(tmp_path: Path) -> None:
    """The first and last batches of an epoch, with real audio, on 16 processes with 4 micro-batches."""
    few = pl.read_csv(write_recordings(tmp_path / "data", count=20))
    manifest = tmp_path / "manifest.csv"
    few[np.arange(10_000_000) % few.height].write_csv(manifest)
    cfg = DataConfig(
        manifest=str(manifest), max_sample_size=12_000, max_batch_length=200_000, num_workers=0,
        global_batch_length=4 * 16 * 200_000,
    )  # fmt: skip
    loader = build_dataloader(cfg, None, rank=15, world_size=16)
    steps = len(loader) // 4
    first = next(loader.epoch(0))
    last = list(loader.epoch(0, steps - 1))
    assert steps * 64 * 50 > 10_000_000  # a batch has at most 50 recordings of 4,000 samples
    assert len(last) == 4
    for batch in (first, *last):
        assert batch.waveforms.numel() <= 200_000
        assert batch.waveforms.isfinite().all()
