"""Adapting a trained model: how the run starts, what stays frozen, and what is cached."""

from __future__ import annotations

import json
import signal
from dataclasses import replace
from itertools import chain, count, islice
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._dynamo.utils import counters

from helpers.processes import Fault, Ranks, assert_same_run, complete, outcome
from helpers.small_models import tiny_model
from helpers.tiny_run import write_config, write_recordings
from spidr.adapt import reset_codebooks
from spidr.compiled import compile_forward
from spidr.config import SpidRConfig, read_config, to_dict
from spidr.data import build_dataloader
from spidr.environment import Environment
from spidr.models import build_model
from spidr.optimizer import lr_factor
from spidr.state import model_settings
from spidr.tools.errors import InputError
from spidr.tools.metrics import read_metrics
from spidr.train import train

FROZEN = {"ema_start_decay": 1.0, "freeze_step": 0}
DROPOUT = {"encoder_dropout": 0.0, "encoder_attention_dropout": 0.0}


@pytest.fixture(scope="module")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_recordings(tmp_path_factory.mktemp("data") / "recordings", count=24)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model to adapt, with its configuration beside it."""
    folder = tmp_path_factory.mktemp("trained")
    cfg = read_config(write_config(folder, folder / "none.csv"))
    torch.manual_seed(99)
    torch.save({"model": build_model(cfg=cfg.model).state_dict()}, folder / "final.pt")
    (folder / "config.json").write_text(json.dumps(to_dict(cfg)))
    return folder / "final.pt"


def write(folder: Path, manifest: Path, trained: Path, name: str = "run", **sections: dict[str, Any]) -> Path:
    """A configuration that adapts for 15 steps, five per epoch."""
    defaults: dict[str, dict[str, Any]] = {
        "run": {"init_ckpt": str(trained), "save_interval": 7},
        "data": {"max_batch_length": 48_000},
        "optimizer": {"max_steps": 15, "scheduler": "constant", "lr": 1e-3, "warmup_steps": 0},
        "model": FROZEN | DROPOUT,
    }
    tables = {key: defaults.get(key, {}) | sections.get(key, {}) for key in defaults | sections}
    path = write_config(folder, manifest, name, **tables)
    document = json.loads(path.read_text())
    document["model"] = tables["model"]  # without the shape, which comes from the trained model
    del document["validation"]
    path.write_text(json.dumps(document))
    return path


def weights(path: Path) -> dict[str, torch.Tensor]:
    return torch.load(path, weights_only=True)["model"]


def losses(folder: Path) -> list[float]:
    return [line["loss"] for line in read_metrics(folder / "metrics.jsonl") if line["group"] == "train"]


def test_only_student_and_codebooks_move(tmp_path: Path, manifest: Path, trained: Path) -> None:
    cfg = read_config(write(tmp_path, manifest, trained))
    train(cfg)
    before, after = weights(trained), weights(cfg.run.dir / "final.pt")
    still = {name.split(".")[0] for name in before if torch.equal(before[name], after[name])}
    moved = {name.split(".")[0] for name in before if not torch.equal(before[name], after[name])}
    assert still - moved == {"feature_extractor", "feature_projection", "teacher"}
    assert moved == {"mask_embedding", "student", "heads", "codebooks", "current_step"}


@pytest.mark.parametrize("name", ["adapt", "adapt-fast"])
def test_shipped_recipes(name: str, caplog: pytest.LogCaptureFixture) -> None:
    """As published for DiscoPhon and SpidR-Adapt."""
    cfg = read_config(Path(__file__).parents[1] / "configs" / f"{name}.toml")
    assert not caplog.records
    optimizer, data = cfg.optimizer, cfg.data
    expected = SpidRConfig(ema_start_decay=1.0, freeze_step=0)
    assert cfg.run.init_ckpt == "spidr_vp20"
    if name == "adapt":
        steps = (optimizer.warmup_steps, optimizer.hold_steps, optimizer.decay_steps, optimizer.max_steps)
        assert (optimizer.scheduler, optimizer.lr, steps) == ("tristage", 5e-5, (600, 9400, 10_000, 20_000))
    else:
        expected = replace(expected, codebook_decay=0.8, reset="codebooks")
        assert [lr_factor(step, optimizer) for step in (0, 7999)] == [1, 1]
        assert (optimizer.lr, optimizer.max_steps) == (5e-6, 8000)
    assert model_settings(cfg) == expected
    assert (data.min_sample_size, data.num_buckets, data.bucket_method) == (0, 5, "percentile")


# ---------------------------------------------------------------------------------------------------- the cache


@pytest.mark.parametrize(
    ("model", "data"),
    [
        ({}, {}),
        ({"codebook_decay": 1.0}, {"enable_padding": True, "num_workers": 2}),
        ({"freeze_step": 6}, {"distinct_epochs": 2}),
    ],
    ids=["frames", "labels", "frozen_later"],
)
def test_cached_and_plain_training_give_the_same_losses(
    tmp_path: Path, manifest: Path, trained: Path, model: dict[str, Any], data: dict[str, Any]
) -> None:
    found = []
    for cache in (False, True):
        tables = {"model": FROZEN | DROPOUT | model, "data": {"max_batch_length": 48_000, "distinct_epochs": 1} | data}
        tables["data"]["cache"] = cache
        cfg = read_config(write(tmp_path, manifest, trained, f"cached_{cache}", **tables))
        train(cfg)
        found.append(losses(cfg.run.dir))
    plain, cached = found
    assert cached == pytest.approx(plain, rel=2e-3)
    assert cached != plain  # since the cache is float16
    assert len(set(plain)) == 15  # masks are new each time


def test_cached_frames_go_into_one_compiled_graph() -> None:
    model = tiny_model(**DROPOUT).train()
    model.defer_codebook_updates = True
    model.freeze_extractor()
    call, graphs = compile_forward(model, backend="eager"), []
    for samples in (1500, 1900, 2300):
        waveforms = torch.randn(2, samples)
        with torch.no_grad():
            frames = model.feature_extractor(waveforms)
            labels = model.labels(model.project(waveforms, frames=frames)[0])
        mask = torch.stack([torch.randperm(frames.shape[1])[:7].sort().values for _ in range(2)])
        for kept in ({"frames": frames}, {"frames": frames, "labels": labels}):
            loss, plain = (f(waveforms, mask=mask, **kept)[0] for f in (call, model))
            torch.testing.assert_close(loss, plain)
            torch.testing.assert_close(loss, model(waveforms, mask=mask)[0])
        graphs.append(counters["stats"]["unique_graphs"])
    assert graphs[0] == graphs[-1]


def test_cache_in_a_group_norm_model(tmp_path: Path, manifest: Path) -> None:
    """Frames depend on the crop there."""
    run = {"init_ckpt": None}
    model = FROZEN | DROPOUT | {"extractor_mode": "group_norm", "codebook_decay": 1.0}
    found = []
    for cache in (False, True):
        data = {"max_batch_length": 48_000, "distinct_epochs": 1, "cache": cache}
        path = write_config(tmp_path, manifest, f"cached_{cache}", run=run, data=data, model=model)
        train(read_config(path, ["optimizer.max_steps=12"]))
        found.append(losses(tmp_path / "p" / f"cached_{cache}"))
    assert found[1] == pytest.approx(found[0], rel=2e-3)


def test_stopped_with_a_cache(tmp_path: Path, manifest: Path, trained: Path) -> None:
    """The cache is refilled, and the result has the same bits."""
    data = {"max_batch_length": 48_000, "cache": True}
    model = FROZEN | DROPOUT | {"codebook_decay": 1.0, "reset": "codebooks"}
    undisturbed, config = (write(tmp_path, manifest, trained, n, data=data, model=model) for n in ("whole", "killed"))
    complete(undisturbed)
    assert Ranks(config, fault=Fault("step", 10)).wait() == [-signal.SIGKILL]
    complete(config)
    assert_same_run(read_config(config).run.dir, read_config(undisturbed).run.dir)


def test_processes_share_the_work(tmp_path: Path, manifest: Path, trained: Path) -> None:
    """Cache and reset on two processes, and on one that takes both halves of each batch."""
    found = []
    for processes in (1, 2):
        data = {"global_batch_length": 48_000, "cache": True}
        model = FROZEN | DROPOUT | {"train_layers": 3}
        path = write(
            tmp_path, manifest, trained, f"on_{processes}", data=data | {"max_batch_length": 24_000}, model=model
        )
        found.append(outcome(complete(path, processes))[0]["model"])
    for name, value in found[0].items():
        torch.testing.assert_close(found[1][name], value, rtol=1e-5, atol=1e-5, msg=lambda m, n=name: n + m)


def test_cache_without_anything_frozen_is_refused(tmp_path: Path, manifest: Path, trained: Path) -> None:
    model, data = {"freeze_step": 15}, {"max_batch_length": 48_000, "cache": True}
    cfg = read_config(write(tmp_path, manifest, trained, data=data, model=model))
    with pytest.raises(InputError, match=r"data\.cache: the extractor never stops learning"):
        train(cfg)


# ------------------------------------------------------------------------------------------------------- the reset


def test_reset_of_codebooks_and_heads(tmp_path: Path, manifest: Path, trained: Path) -> None:
    model = FROZEN | DROPOUT | {"reset": "codebooks"}
    cfg = read_config(write(tmp_path, manifest, trained, model=model))
    train(cfg)
    given, start = weights(trained), weights(cfg.run.dir / "step_0.pt")
    changed = {name.split(".")[0] for name in given if not torch.equal(given[name], start[name])}
    assert changed == {"heads", "codebooks"}
    done = weights(cfg.run.dir / "final.pt")
    (cfg.run.dir / "final.pt").unlink()
    train(cfg)  # resumes without another reset
    again = weights(cfg.run.dir / "final.pt")
    assert all(torch.equal(again[name], value) for name, value in done.items())

    # A run that starts from this one resets its codebooks only if told to.
    cfg = read_config(write(tmp_path, manifest, cfg.run.dir / "final.pt", "next"))
    assert model_settings(cfg).reset == "none"


def test_new_heads_are_fitted_alone(tmp_path: Path, manifest: Path, trained: Path) -> None:
    cfg = read_config(write(tmp_path, manifest, trained))
    cfg = replace(cfg, model=model_settings(cfg))
    loader = build_dataloader(cfg.data, cfg.masking, conv_layer_config=cfg.model.extractor_conv_layer_config)
    model, expected = build_model(trained), build_model(trained)
    torch.manual_seed(0)
    reset_codebooks(model, loader, Environment.alone("cpu"), cfg)

    torch.manual_seed(0)
    first = next(loader.epoch(0))
    generator = torch.Generator().manual_seed(cfg.run.random_seed)
    expected.init_codebooks(first.waveforms, attention_mask=None, lengths=None, generator=generator)
    for head in expected.heads:
        head[0].reset_parameters()
    sgd = torch.optim.SGD(expected.heads.parameters(), lr=5e-2)
    for batch in islice(chain.from_iterable(map(loader.epoch, count())), 20):
        loss, _ = expected(batch.waveforms, **batch.options)
        expected.zero_grad()
        loss.mean().backward()
        sgd.step()
    for name, value in expected.state_dict().items():
        torch.testing.assert_close(model.state_dict()[name], value, msg=lambda m, n=name: n + m)


def test_reset_is_the_same_on_all_processes(tmp_path: Path, manifest: Path, trained: Path) -> None:
    path = write(tmp_path, manifest, trained, model=FROZEN | {"reset": "codebooks"}, optimizer={"max_steps": 2})
    folder = complete(path, 2)
    assert all(value.isfinite().all() for value in weights(folder / "final.pt").values())
    assert len(losses(folder)) == 2


# -------------------------------------------------------------------------------------------------- fewer layers


def test_layers_above_train_layers_are_removed(tmp_path: Path, manifest: Path, trained: Path) -> None:
    full = build_model(trained).eval()  # layers 1 to 4, codebooks of 2 to 4
    path = write(tmp_path, manifest, trained, model=FROZEN | DROPOUT | {"train_layers": 3})
    cfg = read_config(path)
    train(cfg)
    start = build_model(cfg.run.dir / "step_0.pt").eval()
    assert start.codebook_layers == range(2, 4)
    waveforms = torch.randn(2, 8000)
    for layer in (2, 3):
        assert torch.equal(start.units(waveforms, layer=layer)[0], full.units(waveforms, layer=layer)[0])
    with pytest.raises(InputError, match="there is no layer 4: choose a layer from 1 to 3"):
        start.units(waveforms, layer=4)
    assert read_config(cfg.run.dir / "config.json").model.encoder_num_layers == 3

    (cfg.run.dir / "final.pt").unlink()
    train(cfg)  # resumes with the smaller model
    assert (cfg.run.dir / "final.pt").exists()
    with pytest.raises(InputError, match="train_layers = 2 here, 3 there"):
        train(read_config(path, ["model.train_layers=2"]))


def test_train_layers_beside_a_full_model_table(tmp_path: Path, manifest: Path, trained: Path) -> None:
    shape = {"encoder_num_layers": 4, "num_codebooks": 3}
    cfg = read_config(write(tmp_path, manifest, trained, model=FROZEN | shape | {"train_layers": 2}))
    train(cfg)
    (cfg.run.dir / "final.pt").unlink()
    train(cfg)
    model = build_model(cfg.run.dir / "final.pt")
    assert (model.cfg.encoder_num_layers, model.num_codebooks) == (2, 1)


@pytest.mark.parametrize("layers", [1, 5])
def test_layers_without_a_codebook_are_refused(tmp_path: Path, manifest: Path, trained: Path, layers: int) -> None:
    cfg = read_config(write(tmp_path, manifest, trained, model=FROZEN | {"train_layers": layers}))
    with pytest.raises(InputError, match=rf"train_layers = {layers}: choose a layer that has a codebook, 2 to 4"):
        train(cfg)
    assert not cfg.run.dir.exists()
