"""Processes watch each other: one that hangs is named, and nobody waits for it."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest

from helpers.processes import Fault, Ranks
from helpers.tiny_run import write_config, write_recordings


@pytest.mark.parametrize("frozen", [0, 1])
def test_a_frozen_process_is_not_waited_for(tmp_path: Path, frozen: int) -> None:
    """Rank 0 serves the store, so the others must notice its silence without the store."""
    manifest = write_recordings(tmp_path / "data", count=8)
    config = write_config(tmp_path, manifest, optimizer={"max_steps": 100})
    ranks = Ranks(config, 3, Fault("step", 3, signal.SIGSTOP, rank=frozen))
    try:
        for rank, process in enumerate(ranks.processes):
            if rank != frozen:
                process.join(90)
                assert process.exitcode == 1
    finally:
        ranks.processes[frozen].kill()
    told = [line for line in ranks.log.read_text().splitlines() if line.startswith("error:")]
    if frozen == 0:
        assert all("does not answer any more" in line and "rank 0" in line for line in told)
        assert told
    else:
        assert len(told) == 1
        assert "rank 1 on " in told[0]
        assert "rank 1 on " in (tmp_path / "p/run/log_0.txt").read_text().splitlines()[-1]
