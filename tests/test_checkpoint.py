"""Checkpoints: complete or absent, damaged ones skipped, old and foreign ones recognised."""

from __future__ import annotations

import errno
import json
import logging
import os
import pickle
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings, strategies as st

from helpers.small_models import tiny_model
from spidr.checkpoint import Checkpointer, read_checkpoint
from spidr.config import OptimizerConfig
from spidr.optimizer import build_optimizer, drop_frozen
from spidr.tools import files
from spidr.tools.errors import InputError

CFG = OptimizerConfig(lr=1e-2, warmup_steps=4, hold_steps=2, decay_steps=4)


def checkpointer(folder: Path, interval: int = 1, keep_latest: int = -1, seed: int = 0, **changes: Any) -> Checkpointer:
    model = tiny_model(seed=seed, **changes)
    optimizer, scaler, scheduler = build_optimizer(model, CFG)
    result = Checkpointer(folder, interval, keep_latest)
    result.init_state(model, optimizer, scheduler, scaler)
    return result


def train_a_step(state: Checkpointer) -> None:
    for parameter in state.model.parameters():
        if parameter.requires_grad:
            parameter.grad = torch.full_like(parameter, 0.1)
    state.optimizer.step()
    state.scheduler.step()


def steps(folder: Path) -> list[int]:
    return sorted(int(path.stem.removeprefix("step_")) for path in folder.glob("step_*.pt"))


def test_everything_comes_back(tmp_path: Path) -> None:
    saved = checkpointer(tmp_path)
    for _ in range(6):
        train_a_step(saved)
    saved.extra = {"position": 12, "means": {"loss": [1.5, 2]}}
    assert saved.save(6, epoch=3)
    found = checkpointer(tmp_path, seed=1)
    assert found.load_existing_run()
    assert (found.step, found.epoch, found.last) == (6, 3, tmp_path / "step_6.pt")
    assert found.extra == {"position": 12, "means": {"loss": [1.5, 2]}}
    for _ in range(2):  # identical from here on
        for name, value in saved.model.state_dict().items():
            assert torch.equal(value, found.model.state_dict()[name]), name
        assert found.scheduler.get_last_lr() == saved.scheduler.get_last_lr()
        assert found.scheduler.state_dict() == saved.scheduler.state_dict()
        train_a_step(saved)
        train_a_step(found)


def test_when_to_save(tmp_path: Path) -> None:
    saved = checkpointer(tmp_path, interval=3)
    assert [saved.save(step, 0) for step in range(7)] == [True, False, False, True, False, False, True]
    assert saved.save(7, 0, force=True)
    saved.save_final(8, 1)
    assert steps(tmp_path) == [0, 3, 6, 7]
    assert read_checkpoint(tmp_path / "final.pt")["step"] == 8
    assert not checkpointer(tmp_path, interval=0).save(0, 0)


def test_disabled_writes_nothing(tmp_path: Path) -> None:
    state = checkpointer(tmp_path)
    state.disable = True
    assert state.save(4, 2)
    state.save_final(4, 2)
    assert (state.step, state.epoch) == (4, 2)
    assert not list(tmp_path.iterdir())


def test_keep_latest_spares_what_is_needed(tmp_path: Path) -> None:
    saved = checkpointer(tmp_path, keep_latest=2)
    saved.needed = lambda: {1, 4}
    for step in range(6):
        saved.save(step, 0)
    assert steps(tmp_path) == [1, 4, 5]
    saved.needed = set
    saved.save(6, 0)
    assert steps(tmp_path) == [5, 6]


def test_damaged_file_of_a_later_step_does_not_count_as_kept(tmp_path: Path) -> None:
    saved = checkpointer(tmp_path, keep_latest=1)
    (tmp_path / "step_9.pt").write_bytes(b"damaged")
    saved.save(4, 0)
    saved.save(5, 0)
    assert steps(tmp_path) == [5, 9]
    assert checkpointer(tmp_path).find_latest() == tmp_path / "step_5.pt"


def _truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1000])


def _empty(path: Path) -> None:
    path.write_bytes(b"")


def _flip_a_weight(path: Path) -> None:
    content = bytearray(path.read_bytes())
    weights = tiny_model().mask_embedding.detach().numpy().tobytes()
    content[content.index(weights) + 5] ^= 0x10
    path.write_bytes(content)


def _other_step(path: Path) -> None:
    path.write_bytes(path.with_name("step_1.pt").read_bytes())


def _weights_only(path: Path) -> None:
    torch.save({"model": tiny_model().state_dict()}, path)


def _text(path: Path) -> None:
    path.write_text("not a checkpoint", encoding="utf-8")


class _Evil:
    def __reduce__(self) -> Any:
        return os.system, ("touch executed",)


def _malicious(path: Path) -> None:
    torch.save({**read_checkpoint(path), "extra": _Evil()}, path)


def _malicious_pickle(path: Path) -> None:
    path.write_bytes(pickle.dumps(_Evil()))


DAMAGES = [_truncate, _empty, _flip_a_weight, _other_step, _weights_only, _text, _malicious, _malicious_pickle]


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_checkpoint_is_skipped(
    tmp_path: Path, damage: Callable[[Path], None], caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    saved = checkpointer(tmp_path)
    for step in (1, 2, 3):
        saved.save(step, 0)
    damage(tmp_path / "step_3.pt")
    with caplog.at_level(logging.WARNING, "spidr"):
        assert checkpointer(tmp_path).find_latest() == tmp_path / "step_2.pt"
    assert [record.getMessage().count("step_3.pt") >= 1 for record in caplog.records] == [True]
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize("damage", [_truncate, _empty, _malicious])
def test_damaged_final_checkpoint_is_skipped(tmp_path: Path, damage: Callable[[Path], None]) -> None:
    saved = checkpointer(tmp_path)
    saved.save(3, 0)
    saved.save_final(4, 0)
    assert checkpointer(tmp_path).find_latest() == tmp_path / "final.pt"
    damage(tmp_path / "final.pt")
    assert checkpointer(tmp_path).find_latest() == tmp_path / "step_3.pt"


def test_the_later_of_final_and_numbered(tmp_path: Path) -> None:
    saved = checkpointer(tmp_path)
    saved.save_final(4, 0)
    saved.save(4, 0)
    assert checkpointer(tmp_path).find_latest() == tmp_path / "final.pt"
    saved.save(5, 0)  # max_steps was raised
    assert checkpointer(tmp_path).find_latest() == tmp_path / "step_5.pt"


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(position=st.floats(0, 1, exclude_max=True), bit=st.integers(0, 7), cut=st.booleans())
def test_any_damage_is_detected_or_harmless(tmp_path: Path, position: float, bit: int, cut: bool) -> None:
    """A flipped bit or a cut anywhere is refused or leaves what is read unchanged."""
    good = tmp_path / "good.pt"
    if not good.exists():
        checkpointer(tmp_path).save(1, 0)
        (tmp_path / "step_1.pt").rename(good)
    content = bytearray(good.read_bytes())
    place = int(position * len(content))
    if cut:
        del content[place:]
    else:
        content[place] ^= 1 << bit
    bad = tmp_path / "bad.pt"
    bad.write_bytes(content)
    try:
        found = read_checkpoint(bad)
    except InputError:
        return
    expected = read_checkpoint(good)
    assert all(torch.equal(found["model"][name], value) for name, value in expected["model"].items())
    assert (found["step"], found["epoch"]) == (1, 0)


def test_load_says_what_is_wrong(tmp_path: Path) -> None:
    state = checkpointer(tmp_path)
    assert not state.load(3)
    state.save(3, 0)
    assert state.load(3)
    other = checkpointer(tmp_path, codebook_size=10)
    with pytest.raises(InputError, match=r"step_3\.pt: does not fit the configured model \(.*heads\.0"):
        other.load(3)


def test_checkpoint_of_version_0_1_2(tmp_path: Path) -> None:
    """Names with ``module.``, another scheduler and scaler, other optimizer flags, no data position."""
    saved = checkpointer(tmp_path)
    for _ in range(6):
        train_a_step(saved)
    saved.save(6, epoch=2)
    document = read_checkpoint(tmp_path / "step_6.pt")
    document["model"] = {f"module.{name}": value for name, value in document["model"].items()}
    for group in document["optimizer"]["param_groups"]:
        del group["decoupled_weight_decay"], group["initial_lr"]
        group["fused"] = None
    document["scheduler"] = {"_schedulers": [{}], "last_epoch": 6}
    document["scaler"] = {"scale": 65536.0, "growth_factor": 2.0, "backoff_factor": 0.5, "growth_interval": 2000,
                          "_growth_tracker": 6}  # fmt: skip
    document |= {"epoch": torch.tensor([2]), "step": torch.tensor([6])}
    torch.save(document, tmp_path / "step_6.pt")
    found = checkpointer(tmp_path, seed=1)
    assert found.load_existing_run()
    assert (found.step, found.epoch) == (6, 2)
    train_a_step(saved)
    train_a_step(found)
    assert found.scheduler.get_last_lr() == saved.scheduler.get_last_lr()
    for name, value in saved.model.state_dict().items():
        assert torch.equal(value, found.model.state_dict()[name]), name
    assert "position" not in found.extra


def test_new_metrics_come_in_the_order_of_steps(tmp_path: Path) -> None:
    state = checkpointer(tmp_path, interval=2)
    assert list(state.find_new_metrics()) == []

    def write(*where: tuple[int, str]) -> list[tuple[int, str]]:
        with state.metrics.open("a") as file:
            file.writelines(json.dumps({"step": step, "group": group, "loss": 1.0}) + "\n" for step, group in where)
        found = list(state.find_new_metrics())
        groups = [next(key.removesuffix("/step") for key in line if key.endswith("/step")) for line in found]
        assert found == [
            {f"{g}/loss": 1.0, f"{g}/step": line[f"{g}/step"]} for g, line in zip(groups, found, strict=True)
        ]
        return [(line[f"{group}/step"], group) for group, line in zip(groups, found, strict=True)]

    assert write((0, "dev"), (2, "dev"), (6, "dev")) == [(0, "dev"), (2, "dev")]
    assert write() == []
    assert write((4, "dev"), (2, "other")) == [(4, "dev"), (6, "dev")]
    assert write((0, "other")) == [(0, "other"), (2, "other")]


def test_on_its_own_with_any_model_and_schedule(tmp_path: Path) -> None:
    def build(folder: Path, **options: Any) -> tuple[Checkpointer, torch.optim.Optimizer, Any]:
        model = torch.nn.Linear(2, 2)
        optimizer = torch.optim.SGD(model.parameters(), lr=1.0, momentum=0.9)
        schedules = [
            torch.optim.lr_scheduler.ConstantLR(optimizer),
            torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5),
        ]
        scheduler = torch.optim.lr_scheduler.SequentialLR(optimizer, schedules, milestones=[2])
        state = Checkpointer(folder, 2, **options)
        state.init_state(model, optimizer, scheduler, torch.amp.GradScaler("cpu", enabled=False))
        return state, optimizer, scheduler

    state, optimizer, scheduler = build(tmp_path / "a/b")
    assert (tmp_path / "a/b").is_dir()
    assert state.last is None
    for step in range(6):
        assert state.save(torch.tensor([step]), torch.tensor([1])) == (step % 2 == 0)  # type: ignore[arg-type]
        state.model(torch.ones(1, 2)).sum().backward()
        optimizer.step()
        scheduler.step()
    assert state.last == tmp_path / "a/b/step_4.pt"
    other, other_optimizer, other_scheduler = build(tmp_path / "a/b")
    assert other.last == tmp_path / "a/b/step_4.pt"
    assert other.load_existing_run()
    assert (other.step, other.epoch) == (4, 1)
    assert other_optimizer.param_groups[0]["lr"] == 4 * optimizer.param_groups[0]["lr"]
    other_scheduler.step()
    assert other_optimizer.param_groups[0]["lr"] == 2 * optimizer.param_groups[0]["lr"]

    never, *_ = build(tmp_path / "never", keep_latest=1)
    never.interval = 0
    assert [never.save(0, 0), never.save(1, 0, force=True), never.save_final(1, 0)] == [False] * 3
    assert not list((tmp_path / "never").iterdir())
    build(tmp_path / "disabled", disable=True)
    assert not (tmp_path / "disabled").exists()


def test_moved_freeze_step(tmp_path: Path) -> None:
    """With parameters frozen when saved but not now, and vice versa."""
    saved = checkpointer(tmp_path)
    train_a_step(saved)
    saved.save(1, 0)
    drop_frozen(saved.optimizer, saved.scheduler)  # type: ignore[arg-type]
    train_a_step(saved)
    saved.save(2, 0)
    later = checkpointer(tmp_path, seed=1)
    assert later.load(2)
    assert len(later.optimizer.param_groups) == 2
    assert not any(parameter in later.optimizer.state for parameter in later.optimizer.param_groups[1]["params"])
    train_a_step(later)
    earlier = checkpointer(tmp_path, seed=1)
    drop_frozen(earlier.optimizer, earlier.scheduler)  # type: ignore[arg-type]
    assert earlier.load(1)
    assert {int(state["step"]) for state in earlier.optimizer.state.values()} == {1}
    train_a_step(earlier)


def test_no_usable_checkpoint_is_an_error(tmp_path: Path) -> None:
    saved = checkpointer(tmp_path)
    saved.save(1, 0)
    saved.save_final(2, 0)
    for path in tmp_path.iterdir():
        _truncate(path)
    os.mkfifo(tmp_path / "step_7.pt")
    with pytest.raises(InputError, match=r"none of its checkpoints can be used.*final\.pt.*step_7\.pt.*step_1\.pt"):
        checkpointer(tmp_path).load_existing_run()


def test_checkpoints_with_weights_that_are_not_finite_are_refused(tmp_path: Path) -> None:
    saved = checkpointer(tmp_path)
    saved.save(1, 0)
    saved.model.mask_embedding.data[3] = float("nan")  # type: ignore[union-attr, operator]
    saved.save(2, 0)
    assert checkpointer(tmp_path).find_latest() == tmp_path / "step_1.pt"
    with pytest.raises(InputError, match="1 weights are not finite, the first are mask_embedding"):
        checkpointer(tmp_path).load(2)


def test_in_the_background(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Writes the state at the time of saving, one file at a time; the next call reports a failure."""
    state = checkpointer(tmp_path, keep_latest=1)
    state._background = True
    gate, rename = threading.Event(), files._rename
    monkeypatch.setattr(files, "_rename", lambda *paths: (gate.wait(30), rename(*paths)))
    before = {name: value.clone() for name, value in state.model.state_dict().items()}
    assert state.save(1, 0)
    train_a_step(state)
    assert not (tmp_path / "step_1.pt").exists()
    threading.Timer(0.2, gate.set).start()
    assert state.save(2, 0)
    written = read_checkpoint(tmp_path / "step_1.pt")["model"]
    assert all(torch.equal(value, written[name]) for name, value in before.items())
    state.wait()
    assert steps(tmp_path) == [2]  # and only now is the previous one removed

    def full(*_: Path) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(files, "_rename", full)
    assert state.save(3, 0)
    with pytest.raises(InputError, match=r"step_3\.pt: cannot be written .*make room"):
        state.save(4, 0)
    assert steps(tmp_path) == [2]
