"""Processes watch each other: one that hangs is named, and nobody waits for it."""

from __future__ import annotations

import os
import signal
import time
from functools import partial
from pathlib import Path

import pytest

from helpers.processes import Fault, Ranks
from helpers.slurm_cluster import wait_for
from helpers.tiny_run import write_config, write_recordings
from spidr.models import DinoSR
from spidr.tools import peers
from spidr.tools.errors import InputError
from spidr.tools.peers import Cause, Peers
from spidr.tools.progress import Progress
from spidr.train import Hooks


@pytest.mark.parametrize("frozen", [0, 1])
def test_a_frozen_process_is_not_waited_for(tmp_path: Path, frozen: int) -> None:
    """Rank 0 serves the store, so the others must notice its silence without the store."""
    manifest = write_recordings(tmp_path / "data", count=8)
    config = write_config(tmp_path, manifest, optimizer={"max_steps": 100})
    ranks = Ranks(config, 3, Fault("step", 3, signal.SIGSTOP, rank=frozen))
    try:
        for rank, process in enumerate(ranks.processes):
            if rank != frozen:
                process.join(250)
                assert process.exitcode == 1
    finally:
        ranks.processes[frozen].kill()
    told = [line for line in ranks.log.read_text().splitlines() if line.startswith("error:")]
    if frozen == 0:
        assert all("no longer responds" in line and "rank 0" in line for line in told)
        assert told
    else:
        assert len(told) == 1
        assert "rank 1 on " in told[0]
        assert "rank 1 on " in (tmp_path / "p/run/log_0.txt").read_text().splitlines()[-1]


def _slow_store() -> Hooks:
    look = Peers._look

    def look_slowly(self: Peers) -> None:
        time.sleep(peers.BEAT)
        look(self)

    Peers._look = look_slowly  # type: ignore[method-assign]
    return Hooks()


def test_a_dead_process_is_named_where_the_store_answers_slowly(tmp_path: Path) -> None:
    """As on a busy machine, or with many processes: those that fail with it wait until its silence is noticed."""
    config = write_config(tmp_path, write_recordings(tmp_path / "data", count=8), optimizer={"max_steps": 100})
    ranks = Ranks(config, 3, Fault("step", 3, rank=1), hooks=_slow_store)
    assert ranks.wait() == [1, -signal.SIGKILL, 1]
    told = [line for line in ranks.log.read_text().splitlines() if line.startswith("error:")]
    assert len(told) == 1
    assert "rank 1 on " in told[0]


def _leave_one_after_the_other(folder: Path) -> Hooks:
    close, leave = Progress.close, Peers.leave

    def close_late(self: Progress) -> None:
        assert os.environ["RANK"] == "1" or wait_for((folder / "go on").exists, 200)
        close(self)

    def leave_and_tell(self: Peers) -> None:
        (folder / f"{os.environ['RANK']} leaves").touch()
        leave(self)

    Progress.close, Peers.leave = close_late, leave_and_tell  # type: ignore[method-assign]
    return Hooks()


def test_another_signal_while_one_waits_for_the_other_to_end(tmp_path: Path) -> None:
    config = write_config(tmp_path, write_recordings(tmp_path / "data", count=8), optimizer={"max_steps": 100})
    ranks = Ranks(config, 2, Fault("step", 3, signal.SIGTERM), hooks=partial(_leave_one_after_the_other, tmp_path))
    pid = ranks.processes[1].pid
    assert pid is not None
    assert wait_for((tmp_path / "1 leaves").exists, 200)
    os.kill(pid, signal.SIGTERM)
    (tmp_path / "go on").touch()
    assert ranks.wait() == [75, 75], ranks.log.read_text()


def _fail_on_one_then_stop_the_other(folder: Path) -> Hooks:
    tell = Peers._tell

    def tell_and_say_so(self: Peers, about: int, status: int, text: str) -> Cause:
        cause = tell(self, about, status, text)
        (folder / "told").touch()
        return cause

    def on_model(model: DinoSR) -> None:
        if os.environ["RANK"] == "1":
            raise InputError("rank 1 finds a mistake")
        assert wait_for((folder / "told").exists, 200)
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(60)

    Peers._tell = tell_and_say_so  # type: ignore[method-assign]
    return Hooks(on_model=on_model)


def test_a_launcher_that_stops_the_others_does_not_hide_the_failure(tmp_path: Path) -> None:
    config = write_config(tmp_path, write_recordings(tmp_path / "data", count=8))
    ranks = Ranks(config, 2, hooks=partial(_fail_on_one_then_stop_the_other, tmp_path))
    assert ranks.wait() == [2, 2], ranks.log.read_text()
