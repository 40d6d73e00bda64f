"""The training step against measured values, however it is distributed; hooks; what stops it."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from helpers.processes import Fault, Ranks, assert_same_run, complete, outcome
from helpers.small_models import GoldenCase, tiny_model
from helpers.tiny_run import write_config, write_recordings
from spidr.__main__ import main
from spidr.adapt import FrozenOutputs
from spidr.config import Config, DataConfig, MaskingConfig, OptimizerConfig, RunConfig, read_config, to_dict
from spidr.data import Batch, build_dataloader
from spidr.data.loader import SpeechLoader
from spidr.environment import Environment, Preempted, StopFlag
from spidr.export import export_safetensors
from spidr.models import DinoSR
from spidr.models.hub import build_model
from spidr.optimizer import build_optimizer
from spidr.state import Hooks, State, model_settings
from spidr.tools import peers
from spidr.tools.errors import InputError
from spidr.tools.metrics import read_metrics
from spidr.train import train, train_step

CPU = Environment(0, 0, 1, torch.device("cpu"))


@pytest.fixture(scope="module")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_recordings(tmp_path_factory.mktemp("data") / "recordings", count=24)


# --------------------------------------------------------------------------------------------------------- one step


def test_golden_trajectory(golden: GoldenCase) -> None:
    expected, model = golden.trajectory, golden.model().train()
    model.reduction = CPU.all_reduce
    model.defer_codebook_updates = True
    run = RunConfig("runs", "project", "name", model_type=golden.model_type, compile=False)  # type: ignore[arg-type]
    optimizer_cfg = OptimizerConfig(**expected["optimizer"])
    cfg = Config(run, DataConfig("manifest.csv"), golden.cfg, optimizer_cfg)
    optimizer, scaler, scheduler = build_optimizer(model, optimizer_cfg)
    frozen = FrozenOutputs(model, cfg, None, CPU)  # type: ignore[arg-type]
    state = State(cfg, CPU, StopFlag(), model, model, optimizer, scaler, scheduler, None, frozen, Hooks())  # type: ignore[arg-type]
    frames = golden.tensors["attention_mask_keys"].sum(1)
    for i, step in enumerate(expected["steps"]):
        waveforms = golden.tensors["train_waveforms"][i]
        batch = Batch(
            waveforms=waveforms,
            rows=torch.arange(len(waveforms)),
            starts=torch.zeros(len(waveforms), dtype=torch.int64),
            num_samples=waveforms.numel(),
            num_frames=int(frames.sum()),
            max_frames=golden.tensors["masks"][i].shape[1],
            frame_lengths=frames,
            mask_indices=golden.tensors["masks"][i],
        )
        measured = train_step(state, [batch])
        assert measured is not None
        for name in ("loss", "grad_norm", "lr", "ema_decay"):
            assert float(getattr(measured, name)) == pytest.approx(step[name], rel=1e-4), (i, name)
        for name in ("target_ppl", "pred_ppl"):
            assert float(torch.as_tensor(getattr(measured, name)).mean()) == pytest.approx(step[name], rel=1e-4), (
                i,
                name,
            )
    weights = model.state_dict()
    for name, value in golden.weights("checkpoint_after.pt").items():
        torch.testing.assert_close(weights[name], value, rtol=1e-5, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")
    assert len(optimizer.param_groups) == 1  # frozen at step 4
    assert state.step == int(model.current_step) == 6


def test_processes_and_micro_batches_make_no_difference(tmp_path: Path, manifest: Path) -> None:
    """Padded batches, uneven last rounds, extractor frozen on the way."""
    folders = []
    for world_size in (1, 2, 4):
        config = write_config(
            tmp_path,
            manifest,
            f"on_{world_size}",
            run={"model_type": "dinosr", "save_interval": 100, "log_interval": 1},
            data={"global_batch_length": 96_000, "enable_padding": True},
            model={"freeze_step": 12, "encoder_dropout": 0.0, "encoder_attention_dropout": 0.0,
                   "encoder_layer_drop": 0.0},
            optimizer={"max_steps": 20},
        )  # fmt: skip
        folders.append(complete(config, world_size))
    (reference, lines), *others = map(outcome, folders)
    for checkpoint, other_lines in others:
        for name, value in reference["model"].items():
            torch.testing.assert_close(
                checkpoint["model"][name], value, rtol=1e-5, atol=1e-5, msg=lambda m, n=name: n + m
            )
        for line, other in zip(lines, other_lines, strict=True):
            assert other.pop("group") == line["group"]
            assert other == pytest.approx({k: v for k, v in line.items() if k != "group"}, rel=1e-5, abs=1e-5)
    assert max(line.get("epoch", 0) for line in lines) > 1


# --------------------------------------------------------------------------------------------------------- hooks


class FrameClassifier:
    """Learns to tell from a middle layer's output which frames are masked."""

    def __init__(self, folder: Path | None = None, stop_at: int | None = None) -> None:
        self.folder, self.stop_at = folder, stop_at
        self.losses: list[float] = []

    def hooks(self) -> Hooks:
        return Hooks(on_model=self.on_model, extra_loss=self.extra_loss, after_step=self.after_step)

    def on_model(self, model: DinoSR) -> None:
        model.frame_classifier = nn.Linear(model.cfg.encoder_embed_dim, 2)
        model.student.layers[1].register_forward_hook(self.keep)

    def keep(self, layer: nn.Module, inputs: Any, outputs: tuple[Tensor, Tensor]) -> None:
        self.features = outputs[0]

    def extra_loss(self, model: DinoSR, batch: Batch) -> Tensor:
        logits = model.frame_classifier(self.features).flatten(0, 1)
        assert batch.mask is not None
        loss = F.cross_entropy(logits, batch.mask.flatten().long())
        self.losses.append(loss.item())
        return loss * batch.mask.sum()

    def after_step(self, state: State) -> None:
        if state.step == self.stop_at:
            state.stop.set(signal.SIGTERM)


def test_frame_classifier_is_trained_too(tmp_path: Path, manifest: Path) -> None:
    sections: dict[str, Any] = {
        "run": {"save_interval": 100},
        "optimizer": {"max_steps": 20, "lr": 1e-2},
        "model": {"freeze_step": 7},
    }
    undisturbed = read_config(write_config(tmp_path, manifest, "undisturbed", **sections))
    classifier = FrameClassifier()
    train(undisturbed, classifier.hooks())
    assert sum(classifier.losses[-5:]) < 0.9 * sum(classifier.losses[:5])
    checkpoint, _ = outcome(undisturbed.run.dir)
    assert {"frame_classifier.weight", "frame_classifier.bias"} <= checkpoint["model"].keys()
    assert any(state["exp_avg"].shape == (2, 32) for state in checkpoint["optimizer"]["state"].values())

    stopped = read_config(write_config(tmp_path, manifest, "stopped", **sections))
    with pytest.raises(Preempted) as preempted:
        train(stopped, FrameClassifier(stop_at=9).hooks())
    assert (preempted.value.code, preempted.value.signum) == (75, signal.SIGTERM)
    assert (stopped.run.dir / "step_10.pt").exists()
    train(stopped, FrameClassifier().hooks())
    assert_same_run(stopped.run.dir, undisturbed.run.dir)


def test_codebook_and_head_can_be_reset(tmp_path: Path, manifest: Path) -> None:
    seen = []

    def reset_at_step_3(state: State) -> None:
        codebook, head = state.model.codebooks[0], state.model.heads[0][0]  # type: ignore[index]
        if state.step == 3:
            before = codebook.codebook.clone(), head.weight.detach().clone()
            torch.manual_seed(1)
            codebook.reset_parameters()
            head.reset_parameters()
            for parameter in head.parameters():
                del state.optimizer.state[parameter]
            seen.append([not torch.equal(a, b) for a, b in zip(before, (codebook.codebook, head.weight), strict=True)])
        if state.step == 5:
            seen.append([state.optimizer.state[head.weight]["step"].item()])

    cfg = read_config(write_config(tmp_path, manifest, optimizer={"max_steps": 6}))
    train(cfg, Hooks(after_step=reset_at_step_3))
    assert seen == [[True, True], [2.0]]


class ByGroup:
    """A loader whose batches come from one group of recordings in one epoch, and another in the next."""

    def __init__(self, manifests: list[Path], data: DataConfig, masking: MaskingConfig, **options: Any) -> None:
        self.loaders = [build_dataloader(replace(data, manifest=str(m)), masking, **options) for m in manifests]
        self.accumulation = self.loaders[0].accumulation
        self.dataset = self.loaders[0].dataset
        self.groups: list[int] = []

    def epoch(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        self.groups.append(epoch % len(self.loaders))
        return self.loaders[self.groups[-1]].epoch(epoch // len(self.loaders), start)

    def close(self) -> None:
        for loader in self.loaders:
            loader.close()


def test_sampling_by_group(tmp_path: Path, manifest: Path) -> None:
    header, *rows = manifest.read_text("utf-8").splitlines()
    manifests = [tmp_path / "one.csv", tmp_path / "other.csv"]
    for path, part in zip(manifests, (rows[:8], rows[8:]), strict=True):
        path.write_text("\n".join([header, *part]) + "\n")
    loaders = []

    def build(data: DataConfig, masking: MaskingConfig, **options: Any) -> ByGroup:
        loaders.append(ByGroup(manifests, data, masking, **options))
        return loaders[-1]

    cfg = read_config(write_config(tmp_path, manifest, optimizer={"max_steps": 12}))
    train(cfg, Hooks(loader=build))  # type: ignore[arg-type]
    assert loaders[0].groups[:3] == [0, 1, 0]


# --------------------------------------------------------------------------------------------------------- not finite


def test_exploding_loss_stops_before_anything_is_saved(tmp_path: Path, manifest: Path) -> None:
    cfg = read_config(
        write_config(
            tmp_path,
            manifest,
            run={"save_interval": 1},
            optimizer={"lr": 1e30, "warmup_steps": 0, "max_norm": 1e30, "max_steps": 10},
        )
    )
    with pytest.raises(
        InputError, match=r"step \d+: loss .* not finite; nothing was saved.*rank 0: .*\.wav"
    ) as stopped:
        train(cfg)
    step = int(str(stopped.value).split(":")[0].removeprefix("step "))
    saved = sorted(int(path.stem.removeprefix("step_")) for path in cfg.run.dir.glob("step_*.pt"))
    assert saved == list(range(step))
    newest = torch.load(cfg.run.dir / f"step_{step - 1}.pt", weights_only=True)
    assert all(value.isfinite().all() for value in newest["model"].values() if value.is_floating_point())


def nan_on_rank_1() -> Hooks:
    def break_head(model: DinoSR) -> None:
        if os.environ["RANK"] == "1":
            model.student.layers[-1].register_forward_hook(lambda *_: (_[2][0] * float("nan"), _[2][1] * float("nan")))

    return Hooks(on_model=break_head)


def test_not_finite_names_the_rank_and_its_files(tmp_path: Path, manifest: Path) -> None:
    config = write_config(
        tmp_path, manifest, optimizer={"max_steps": 3}, validation={"dev": {"manifest": str(manifest)}}
    )
    ranks = Ranks(config, 2, hooks=nan_on_rank_1)
    assert ranks.wait() == [2, 2]
    errors = [line for line in ranks.log.read_text().splitlines() if line.startswith("error:")]
    assert len(errors) == 1
    assert "step 1: loss nan" in errors[0]
    assert "rank 1: " in errors[0]
    assert "rank 0: " not in errors[0]


class Overflow:
    """Makes the gradients of some calls infinite, as can happen in float16."""

    def __init__(self, *calls: int) -> None:
        self.bad, self.calls, self.seen = calls, 0, []

    def extra_loss(self, model: DinoSR, batch: Batch) -> Tensor:
        self.calls += 1
        return model.mask_embedding.sum() * (float("inf") if self.calls in self.bad else 0.0)

    def after_step(self, state: State) -> None:
        adam_steps = {int(entry["step"]) for entry in state.optimizer.state.values()}
        self.seen.append((state.step, state.position, state.scheduler.last_epoch, state.scaler.get_scale(), adam_steps))


def test_float16_step_that_overflows_advances_nothing(tmp_path: Path, manifest: Path) -> None:
    cfg = read_config(
        write_config(tmp_path, manifest, optimizer={"dtype": "float16", "max_steps": 4}, run={"save_interval": 2})
    )
    overflow = Overflow(3, 4)
    train(cfg, Hooks(extra_loss=overflow.extra_loss, after_step=overflow.after_step))
    scale = 2.0**16
    assert overflow.seen == [
        (1, 1, 1, scale, {1}),
        (2, 2, 2, scale, {2}),
        (3, 5, 3, scale / 4, {3}),  # only two rounds of batches are lost
        (4, 6, 4, scale / 4, {4}),
    ]
    lines = read_metrics(cfg.run.dir / "metrics.jsonl")
    assert [line["step"] for line in lines if line["group"] == "train"] == [1, 2, 3, 4]
    assert [line["ema_decay"] for line in lines if line["group"] == "train"] == pytest.approx([0.999] * 4, abs=1e-4)


def test_float16_that_always_overflows_stops(tmp_path: Path, manifest: Path) -> None:
    cfg = read_config(write_config(tmp_path, manifest, optimizer={"dtype": "float16", "max_steps": 4}))
    overflow = Overflow(*range(2, 100))
    with pytest.raises(InputError, match=r"step 2: float16 overflowed 10 times in a row; lower optimizer\.lr"):
        train(cfg, Hooks(extra_loss=overflow.extra_loss))
    assert overflow.calls == 11


# --------------------------------------------------------------------------------------------------------- processes


@pytest.mark.parametrize(("rank", "line_break"), [(None, ""), ("0", "\n")])
def test_error_is_a_line_of_its_own(
    rank: str | None, line_break: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """With several processes, its line may contain another one's progress bar."""
    monkeypatch.setattr("sys.argv", ["spidr.train", "gone.toml"])
    monkeypatch.setenv("RANK", rank or "")
    if rank is None:
        monkeypatch.delenv("RANK")
    assert main() == 2
    assert capsys.readouterr().err.startswith(f"{line_break}error: gone.toml: cannot be read")


def slow_data_on_rank_1(slept: Path) -> Hooks:
    def build(*args: Any, **options: Any) -> SpeechLoader:
        loader = build_dataloader(*args, **options)
        epoch = loader.epoch

        def slow_epoch(*where: int) -> Iterator[Batch]:
            for number, batch in enumerate(epoch(*where)):
                if where == (0, 0) and number == 1:
                    time.sleep(peers.SILENCE + 2)  # longer than others wait for a dead process
                    slept.touch()
                yield batch

        if options["rank"] == 1:
            loader.epoch = slow_epoch  # type: ignore[method-assign]
        return loader

    return Hooks(loader=build)


def test_processes_wait_for_one_with_slow_data(tmp_path: Path, manifest: Path) -> None:
    config = write_config(tmp_path, manifest, optimizer={"max_steps": 3})
    lines = read_metrics(complete(config, 2, partial(slow_data_on_rank_1, tmp_path / "slept")) / "metrics.jsonl")
    assert (tmp_path / "slept").exists()
    assert [line["step"] for line in lines if line["group"] == "train"] == [1, 2, 3]


def test_dead_process_is_named_by_one_of_the_others(tmp_path: Path, manifest: Path) -> None:
    ranks = Ranks(write_config(tmp_path, manifest), 3, Fault("step", 3, rank=1))
    statuses = ranks.wait()
    assert statuses == [1, -signal.SIGKILL, 1]
    told = [line for line in ranks.log.read_text().splitlines() if line.startswith("error:")]
    assert len(told) == 1
    assert "rank 1 on " in told[0]
    assert "no sign of life" in told[0]


@pytest.mark.parametrize("missing", [0, 1])
def test_process_that_dies_at_the_start(tmp_path: Path, manifest: Path, missing: int) -> None:
    """Others do not wait for a dead process, whether all have joined or one has not."""
    ranks = Ranks(write_config(tmp_path, manifest), 3, Fault("meeting", rank=1), missing=missing)
    assert ranks.wait() == [1, -signal.SIGKILL, 1][: 3 - missing]
    told = [line for line in ranks.log.read_text().splitlines() if line.startswith("error:")]
    assert len(told) == 1
    assert "rank 1 on " in told[0]


# --------------------------------------------------------------------------------------------------------- init_ckpt


def write_checkpoint(folder: Path, **changes: Any) -> Path:
    """A SpidR checkpoint with its run's configuration, as a run leaves it."""
    folder.mkdir()
    cfg = read_config(write_config(folder, folder / "none.csv", model={"encoder_num_layers": 5, **changes}))
    torch.manual_seed(99)
    model = build_model(cfg=cfg.model)
    model.current_step.fill_(500)
    optimizer, scaler, scheduler = build_optimizer(model, cfg.optimizer)
    checkpoint = {  # as version 0.1.2 wrote it
        "model": {f"module.{name}": value for name, value in model.state_dict().items()},
        "optimizer": optimizer.state_dict(),
        "scheduler": scheduler.state_dict(),
        "scaler": scaler.state_dict(),
        "epoch": 7,
        "step": 500,
    }
    torch.save(checkpoint, folder / "x.pt")
    (folder / "config.json").write_text(json.dumps(to_dict(cfg)))
    return folder / "x.pt"


def without_model_table(path: Path, **model: Any) -> Config:
    document = json.loads(path.read_text("utf-8"))
    document["model"] = model or None
    path.write_text(json.dumps(document), encoding="utf-8")
    return read_config(path)


def test_weights_of_init_ckpt(tmp_path: Path, manifest: Path) -> None:
    checkpoint = write_checkpoint(tmp_path / "pretrained", freeze_step=3)
    path = write_config(tmp_path, manifest, run={"init_ckpt": str(checkpoint)}, optimizer={"max_steps": 2})
    cfg = without_model_table(path)
    train(cfg)
    start = torch.load(cfg.run.dir / "step_0.pt", weights_only=True)
    given = torch.load(checkpoint, weights_only=True)["model"]
    for name, value in start["model"].items():
        assert name == "current_step" or torch.equal(value, given[f"module.{name}"])
    assert (int(start["model"]["current_step"]), start["step"]) == (0, 0)
    assert len(start["optimizer"]["param_groups"]) == 2  # nothing is frozen
    assert read_config(cfg.run.dir / "config.json").model.encoder_num_layers == 5

    checkpoint.unlink()  # not needed to resume
    checkpoint.with_name("config.json").unlink()
    (cfg.run.dir / "final.pt").unlink()
    train(cfg)
    assert (cfg.run.dir / "final.pt").exists()


def test_an_export_as_init_ckpt(tmp_path: Path, manifest: Path) -> None:
    """It has no teacher, so a copy of its student becomes the teacher."""
    model = tiny_model(seed=5)
    export_safetensors(model, tmp_path / "encoder.safetensors")
    run = {"init_ckpt": str(tmp_path / "encoder.safetensors")}
    cfg = without_model_table(write_config(tmp_path, manifest, run=run, optimizer={"max_steps": 1}))
    train(cfg)
    assert "encoder.safetensors has no teacher" in (cfg.run.dir / "log_0.txt").read_text()
    start = torch.load(cfg.run.dir / "step_0.pt", weights_only=True)["model"]
    given = model.state_dict()
    assert start.keys() == given.keys()
    assert all(torch.equal(value, given[name.replace("teacher.", "student.")]) for name, value in start.items())


def test_model_table_beside_init_ckpt(tmp_path: Path, manifest: Path) -> None:
    checkpoint = write_checkpoint(tmp_path / "pretrained")
    path = write_config(tmp_path, manifest, run={"init_ckpt": str(checkpoint)})
    free = {"encoder_dropout": 0.3, "encoder_layer_drop": 0.1, "ema_timescale": 7, "freeze_step": 9}
    settings = model_settings(without_model_table(path, **free))
    assert {name: getattr(settings, name) for name in free} == free
    assert settings.encoder_num_layers == 5
    with pytest.raises(InputError, match=r"codebook_size = 11 here, 12 there"):
        model_settings(without_model_table(path, codebook_size=11))


def test_init_ckpt_of_another_shape_without_its_config(tmp_path: Path, manifest: Path) -> None:
    checkpoint = write_checkpoint(tmp_path / "pretrained")
    checkpoint.with_name("config.json").unlink()
    cfg = read_config(write_config(tmp_path, manifest, run={"init_ckpt": str(checkpoint)}))
    with pytest.raises(InputError, match=r"x\.pt: not the weights of this SpidR: unknown: student\.layers\.4"):
        train(cfg)
    assert not cfg.run.dir.exists()


def test_model_type_must_be_the_checkpoint_s(tmp_path: Path, manifest: Path) -> None:
    checkpoint = write_checkpoint(tmp_path / "pretrained")
    path = write_config(tmp_path, manifest, run={"init_ckpt": str(checkpoint), "model_type": "dinosr"})
    with pytest.raises(InputError, match="'spidr'"):
        model_settings(without_model_table(path))
