"""One process at a time: locks of live processes hold, those of dead ones are taken over."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import time
from collections.abc import Iterator
from multiprocessing.synchronize import Event
from pathlib import Path

import pytest

from spidr.tools import lock
from spidr.tools.errors import InputError
from spidr.tools.lock import Lock

CONTEXT = multiprocessing.get_context("fork")


def _hold(target: Path, held: Event) -> None:
    with Lock(target, "is writing here"):
        held.set()
        signal.pause()


@pytest.fixture
def holder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[multiprocessing.context.ForkProcess]:
    monkeypatch.setattr(lock, "BEAT", 0.2)
    held = CONTEXT.Event()
    process = CONTEXT.Process(target=_hold, args=(tmp_path, held))
    process.start()
    assert held.wait(200)
    yield process
    process.kill()
    process.join()


def rewrite(path: Path, **changes: str) -> None:
    """Change a lock's file to what another machine would have written."""
    fields = json.loads(path.read_text("utf-8"))
    fields["process"] |= {k: v for k, v in changes.items() if k in fields["process"]}
    aside = path.with_name("aside")
    aside.write_text(json.dumps(fields | {k: v for k, v in changes.items() if k in fields}), encoding="utf-8")
    aside.replace(path)  # at once: the owner reads it, too


@pytest.mark.parametrize("name", ["", "table.jsonl", "ä" * 120])
def test_a_lock_is_held_once_and_leaves_nothing(tmp_path: Path, name: str) -> None:
    for _ in range(2):
        with Lock(tmp_path / name, "is writing here") as held:
            with pytest.raises(InputError, match=f"another process is writing here .process {os.getpid()} on"):
                Lock(tmp_path / name, "is writing here").__enter__()
            held.check()
        assert list(tmp_path.iterdir()) == []


def test_the_lock_of_a_live_process_holds(tmp_path: Path, holder: multiprocessing.context.ForkProcess) -> None:
    with pytest.raises(InputError, match=f"process {holder.pid} on"), Lock(tmp_path, "is writing here"):
        pass


def test_the_lock_of_a_killed_process_is_taken_over_even_before_it_is_reaped(
    tmp_path: Path, holder: multiprocessing.context.ForkProcess
) -> None:
    os.kill(holder.pid, signal.SIGKILL)
    os.waitid(os.P_PID, holder.pid, os.WEXITED | os.WNOWAIT)  # a zombie
    with Lock(tmp_path, "is writing here"):
        pass
    assert list(tmp_path.iterdir()) == []


def test_the_lock_of_another_machine_is_judged_by_its_heartbeats(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, holder: multiprocessing.context.ForkProcess
) -> None:
    rewrite(tmp_path / ".spidr.lock", machine="elsewhere", host="node7")
    with pytest.raises(InputError, match="on node7"), Lock(tmp_path, "is writing here"):
        pass
    os.kill(holder.pid, signal.SIGKILL)
    monkeypatch.setattr(lock, "SILENCE", 3.0)
    with Lock(tmp_path, "is writing here"):
        pass


def test_a_lock_without_a_name_is_taken_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without waiting for the silence of an owner that has one."""
    monkeypatch.setattr(lock, "BEAT", 0.2)
    monkeypatch.setattr(lock, "SILENCE", 10_000.0)
    (tmp_path / ".spidr.lock").touch()
    with Lock(tmp_path, "is writing here"):
        pass
    assert list(tmp_path.iterdir()) == []


def test_a_lock_of_the_same_job_is_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, holder: multiprocessing.context.ForkProcess
) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "17")
    rewrite(tmp_path / ".spidr.lock", job="17")
    lingering = CONTEXT.Process(target=_kill_later, args=(holder.pid,))
    lingering.start()
    with Lock(tmp_path, "is writing here"):
        holder.join(100)
        assert not holder.is_alive()
    lingering.join()


def _kill_later(pid: int) -> None:
    time.sleep(1)
    os.kill(pid, signal.SIGKILL)


def test_a_process_that_was_taken_for_dead_notices(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lock, "BEAT", 0.05)
    with Lock(tmp_path, "is writing here") as held:
        rewrite(tmp_path / ".spidr.lock", token="another", host="node7")
        held._thread.join(200)
        with pytest.raises(InputError, match=r"on node7.* has taken over"):
            held.check()
    assert (tmp_path / ".spidr.lock").exists()  # it belongs to the other process


def _count(folder: Path, start: Event, times: int) -> None:
    start.wait()
    done = 0
    while done < times:
        try:
            with Lock(folder, "counts"):
                total = folder / "total"
                total.write_text(str(int(total.read_text()) + 1))
                done += 1
        except InputError:
            continue


def test_many_processes_get_the_lock_one_after_another(tmp_path: Path) -> None:
    (tmp_path / "total").write_text("0")
    start = CONTEXT.Event()
    processes = [CONTEXT.Process(target=_count, args=(tmp_path, start, 20)) for _ in range(4)]
    for process in processes:
        process.start()
    # A stale lock, which all processes find at once.
    (tmp_path / ".spidr.lock").write_text(json.dumps(_dead(tmp_path)))
    start.set()
    for process in processes:
        process.join(200)
    assert (tmp_path / "total").read_text() == "80"
    assert [path.name for path in tmp_path.iterdir()] == ["total"]


def _dead(folder: Path) -> dict[str, object]:
    with Lock(folder / "other", "is tried") as held:
        fields: dict[str, object] = json.loads(held.path.read_text())
    fields["process"] = {**fields["process"], "started": "1"}  # type: ignore[dict-item]
    return fields
