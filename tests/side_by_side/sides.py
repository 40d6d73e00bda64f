"""What a user of ``spidr`` 0.1.2 or 0.2.0 gets for the same inputs: run with each package, then compare.

    python sides.py FOLDER OUTPUT.pt [NAME …]    # FOLDER: a new one; OUTPUT.pt: {name: value}

Each function is one promise. Its result holds tensors, numbers and strings; an error is its message.
"""

import contextlib
import dataclasses
import inspect
import io
import json
import subprocess
import sys
import tarfile
import traceback
import warnings
import wave
from pathlib import Path
from typing import Any

import torch
from setting import first_weights
from torch import nn

from spidr.config import DinoSRConfig, MaskingConfig, OptimizerConfig, SpidRConfig

SHAPE: dict[str, Any] = {
    "extractor_conv_layer_config": [(16, 10, 5), (16, 8, 8), (16, 4, 4)],
    "encoder_embed_dim": 24,
    "encoder_pos_conv_kernel": 9,
    "encoder_pos_conv_groups": 2,
    "encoder_pos_conv_depth": 2,
    "encoder_num_layers": 4,
    "encoder_num_heads": 2,
    "encoder_ff_interm_features": 48,
    "codebook_size": 12,
    "num_codebooks": 2,
    "encoder_attention_dropout": 0.0,
    "encoder_dropout": 0.0,
    "encoder_layer_drop": 0.0,
}
SHAPES = ({}, {"encoder_layer_norm_first": True}, {"extractor_mode": "group_norm", "encoder_qkv_bias": True})
PROMISES = {}


def promise(function: Any) -> Any:
    PROMISES[function.__name__] = function
    return function


def write(path: Path, length: int, seed: int) -> None:
    sound = (torch.randn(length, generator=torch.Generator().manual_seed(seed)) / 8).clamp(-1, 1)
    with wave.open(str(path), "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(16_000)
        file.writeframes((sound * 32_767).to(torch.int16).numpy().tobytes())


def model(kind: str = "spidr", **changes: Any) -> Any:
    from spidr.models import DinoSR, SpidR

    found = SpidR(SpidRConfig(**SHAPE | changes)) if kind == "spidr" else DinoSR(DinoSRConfig(**SHAPE | changes))
    found.load_state_dict(first_weights(found))
    return found.eval()


def waveforms(rows: int = 3, samples: int = 6400) -> torch.Tensor:
    return torch.randn(rows, samples, generator=torch.Generator().manual_seed(9))


def masked(rows: int = 3, frames: int = 39, seed: int = 4) -> torch.Tensor:
    keys = torch.rand(rows, frames, generator=torch.Generator().manual_seed(seed))
    return torch.zeros(rows, frames, dtype=torch.bool).scatter_(1, keys.argsort(1)[:, :15], value=True)


def forward(m: Any, x: torch.Tensor, mask: torch.Tensor | None, **options: Any) -> Any:
    """Call with the kind of mask that this version takes."""
    if "mask" in inspect.signature(m.forward).parameters:
        return m(x, mask=mask, **options)
    return m(x, mask_indices=mask if mask is None else mask.nonzero()[:, 1].view(len(mask), -1), **options)


def attention_mask(lengths: list[int], frames: int = 39) -> torch.Tensor:
    return (torch.arange(frames) < torch.tensor(lengths)[:, None])[:, None, None]


@promise
def inference(folder: Path) -> Any:
    found = {}
    for kind in ("spidr", "dinosr"):
        for options in (
            {},
            {"encoder_layer_norm_first": True},
            {"extractor_mode": "group_norm", "encoder_qkv_bias": True},
        ):
            m, x, mask = model(kind, **options), waveforms(), attention_mask([39, 20, 33])
            key = f"{kind} {sorted(options)}"
            with torch.no_grad():
                found[f"{key} outputs"] = m.get_intermediate_outputs(x)
                found[f"{key} masked outputs"] = m.get_intermediate_outputs(x, attention_mask=mask)
                found[f"{key} codebooks"] = m.get_codebooks(x)
                found[f"{key} masked codebooks"] = m.get_codebooks(x, attention_mask=mask)
                found[f"{key} one-hot"] = [c if c is None else c.long() for c in m.get_codebooks(x, onehot=True)]
                features = m.feature_projection(m.feature_extractor(x))
                found[f"{key} first layers"] = m.student.get_intermediate_outputs(features, None, 2)
                found[f"{key} student"] = m.student(features, mask)
                found[f"{key} by hand"] = by_hand(m, features)
    return found


def by_hand(m: Any, features: torch.Tensor) -> torch.Tensor:
    x = m.student.layer_norm(features + m.student.pos_conv_embed(features))
    for layer in m.student.layers:
        x, _ = layer(x)
    return x


@promise
def losses(folder: Path) -> Any:
    found = {}
    for kind in ("spidr", "dinosr"):
        for options in ({}, {"encoder_layer_norm_first": True}):
            key, m = f"{kind} {sorted(options)}", model(kind, **options)
            for name, mask, attends in (
                ("mask", masked(), None),
                ("no mask", None, None),
                ("padding", masked(frames=20), attention_mask([39, 30, 20])),
            ):
                mask = mask if mask is None else nn.functional.pad(mask, (0, 39 - mask.shape[1]))
                with torch.no_grad():
                    loss, outputs = forward(m, waveforms(), mask, attention_mask=attends)
                found[f"{key} {name}"] = [loss, *(outputs[n].reshape(()) for n in ("target_ppl", "pred_ppl"))]
    return found


@promise
def codebooks_move_in_training_and_not_in_evaluation(folder: Path) -> Any:
    m = model().train()
    before = m.state_dict()["codebooks.1.codebook"].clone()
    found = {}
    for step in range(3):
        loss, _ = forward(m, waveforms(), masked(seed=step))
        loss.mean().backward()
        found[f"loss {step}"] = loss.detach()
    found["codebook"], found["counts"] = m.state_dict()["codebooks.1.codebook"], m.state_dict()["codebooks.1.counts"]
    found["gradients"] = sorted(n for n, p in m.named_parameters() if p.grad is None and not n.startswith("teacher"))
    found["norm"] = torch.stack([p.grad.norm() for p in m.parameters() if p.grad is not None]).norm()
    found["moved"] = not torch.equal(before, found["codebook"])
    m.eval()
    forward(m, waveforms(), masked())
    found["moved in evaluation"] = not torch.equal(found["codebook"], m.state_dict()["codebooks.1.codebook"])
    found["teacher trains"] = m.train().teacher.training
    return found


@promise
def teacher(folder: Path) -> Any:
    found: dict[str, Any] = {}
    for kind in ("spidr", "dinosr"):
        m = model(kind, freeze_step=3, ema_start_decay=0.9).train()
        with torch.no_grad():
            for p in m.student.parameters():
                p += 0.1
        found[f"{kind} decays"] = [m.update_ema(step) for step in range(1, 5)]
        found[f"{kind} weights"] = {n: v for n, v in m.state_dict().items() if n.startswith("teacher")}
        found[f"{kind} frozen"] = sorted(
            n for n, p in m.named_parameters() if not p.requires_grad and n.startswith("feature")
        )
        found[f"{kind} step"] = m.current_step
    return found


@promise
def schedules(folder: Path) -> Any:
    from spidr.models.dinosr import ema_scheduler
    from spidr.models.spidr import exp_ema_scheduler
    from spidr.optimizer import build_optimizer

    steps = [0, 1, 5, 9, 10, 11, 50, 10**6]
    found: dict[str, Any] = {
        "dinosr": [ema_scheduler(s, 0.9, 0.99, 10, 20) for s in steps],
        "spidr": [exp_ema_scheduler(s, 0.9, 10.0, 1e-3) for s in steps],
    }
    for name in ("tristage", "cosine", "rsqrt", "constant"):
        cfg = OptimizerConfig(
            scheduler=name,
            max_steps=60,
            warmup_steps=10,
            hold_steps=10,
            decay_steps=30,
            rsqrt_timescale=5,
            rsqrt_shift=3,
        )  # type: ignore[arg-type]
        optimizer, scaler, scheduler = build_optimizer(nn.Linear(2, 2), cfg)
        rates = []
        for _ in range(50):
            rates.append(scheduler.get_last_lr()[0])
            optimizer.step()
            scheduler.step()
        found[name], found[f"{name} scaler"] = rates, scaler.is_enabled()
    return found


@promise
def units(folder: Path) -> Any:
    from spidr.models.metrics import bitrate, build_count_matrix, proba_phone_code, units_quality

    draw = torch.Generator().manual_seed(0)
    data = {}
    for i in range(4):
        codes = torch.randint(12, (50,), generator=draw)
        phones = [f"p{(int(c) + int(torch.randint(3, (), generator=draw))) % 9}" for c in codes for _ in range(2)]
        data[f"r{i}"] = (phones, codes.tolist())
    counts, names = build_count_matrix(data, 12, 9, 2)
    joint, phone_names, columns = proba_phone_code(data, num_units=12, num_phones=9, only_active=True)
    return {
        "quality": list(units_quality(data, num_units=12, num_phones=9)),
        "counts": counts.sum(1),
        "names": sorted(names),
        "joint": joint.sum(0),
        "rows": sorted(phone_names),
        "columns": sorted(columns.tolist()),
        "bits": bitrate(num_units=256),
        "bits of": bitrate(num_units=12, sequences=[c for _, c in data.values()]),
    }


@promise
def manifests(folder: Path) -> Any:
    from spidr.data import num_samples, read_manifest, speech_dataset

    (folder / "a" / "b").mkdir(parents=True)
    for i, name in enumerate(("a/x.wav", "a/b/y.wav", "a/z_mic1.wav", "a/z_mic2.wav")):
        write(folder / name, 4000 + 100 * i, i)
    with tarfile.open(folder / "a.tar", "w") as tar:
        tar.add(folder / "a", "a")
    found: dict[str, Any] = {}
    for name, arguments in {
        "csv": ["a", "m.csv"],
        "options first": ["--ext", ".wav", "a", "n.csv"],
        "any suffix": ["--ext", "_mic1.wav", "a", "o.csv"],
        "fairseq": ["--fairseq", "a", "m.tsv"],
        "tar": ["a.tar", "t.csv"],
    }.items():
        command = [sys.executable, "-m", "spidr.data.write_manifest", *arguments]
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
        output = next(folder / a for a in arguments if a.endswith(("csv", "jsonl", "tsv")))
        if not output.exists():  # 0.1.2 writes an archive's manifest beside the archive
            found[name] = ("no output", done.returncode)
            continue
        if output.suffix == ".tsv":
            found[name] = (done.returncode, sorted(output.read_text().replace(str(folder), "").splitlines()))
            continue
        table = read_manifest(output).sort("path")
        shown = table.select(c for c in ("fileid", "path", "num_samples", "byte_size") if c in table.columns)
        found[name] = (
            done.returncode,
            [tuple(str(v).replace(str(folder), "") for v in row) for row in shown.iter_rows()],
        )
    rows = read_manifest(folder / "m.csv").to_dicts()
    (folder / "extra.jsonl").write_text("".join(json.dumps(row | {"units": [1, 2]}) + "\n" for row in rows))
    found["extra columns"] = read_manifest(folder / "extra.jsonl")["units"].to_list()
    (folder / "short.csv").write_text("fileid,num_samples\nx,4000\n")
    found["two columns"] = read_manifest(folder / "short.csv").select("fileid", "num_samples").rows()
    for normalize in (False, True):
        dataset = speech_dataset(folder / "m.csv", normalize=normalize)
        order = sorted(range(len(dataset)), key=lambda i: dataset.manifest["fileid"][i])
        found[f"waveforms {normalize}"] = [dataset[i] for i in order]
    found["archive"] = (
        [speech_dataset(folder / "t.csv", normalize=False)[0].sum()] if (folder / "t.csv").exists() else []
    )
    found["lengths"] = [
        num_samples(folder / "a" / "x.wav"),
        num_samples(str(folder / "a" / "x.wav"), verify=True),
        num_samples((folder / "a" / "x.wav").read_bytes()),
    ]
    return found


@promise
def checkpoints(folder: Path) -> Any:
    from spidr.checkpoint import Checkpointer
    from spidr.optimizer import build_optimizer

    def parts() -> Any:
        layer = nn.Linear(3, 2)
        optimizer, scaler, scheduler = build_optimizer(layer, OptimizerConfig(max_steps=100, warmup_steps=10))
        return layer, optimizer, scheduler, scaler

    def facts(c: Any) -> Any:
        return [int(c.step), int(c.epoch), c.last.name if c.last else None]

    run = folder / "new" / "run"
    one = Checkpointer(run, 2)
    found: dict[str, Any] = {"made": run.is_dir()}
    one.init_state(*parts())
    found["nothing there"] = one.load_existing_run()
    found["saved"] = [bool(one.save(step, 1)) for step in range(6)]
    found["facts"] = facts(one)
    found["forced"] = [bool(one.save(5, 1, force=True)), facts(one)]
    other = Checkpointer(run, 2)
    other.init_state(*parts())
    found["loaded"] = [other.load(2), facts(other), other.load(99), other.load_existing_run(), facts(other)]
    one.save_final(6, 2)
    other = Checkpointer(run, 2)
    other.init_state(*parts())
    found["final"] = [other.load_existing_run(), facts(other), sorted(p.name for p in run.iterdir())]
    found["kinds"] = sorted(torch.load(run / "step_2.pt", weights_only=False))
    none = Checkpointer(folder / "none", 0)
    none.init_state(*parts())
    found["no interval"] = [
        bool(none.save(0, 0)),
        bool(none.save(2, 0)),
        sorted(p.name for p in (folder / "none").iterdir()),
    ]
    few = Checkpointer(folder / "few", 1, 2)
    few.init_state(*parts())
    [few.save(step, 0) for step in range(5)]
    found["latest"] = sorted(p.name for p in (folder / "few").iterdir())
    off = Checkpointer(folder / "off", 1, disable=True)
    off.init_state(*parts())
    found["disabled"] = [
        bool(off.save(1, 0)),
        sorted(p.name for p in (folder / "off").iterdir()) if (folder / "off").exists() else [],
    ]
    return found


@promise
def building(folder: Path) -> Any:
    from spidr.models import build_model

    m, cfg, found = model(), SpidRConfig(**SHAPE), {}
    weights = m.state_dict()
    (folder / "run").mkdir(parents=True)
    kinds = {
        "bare": weights,
        "model": {"model": weights},
        "module": {"model": {f"module.{n}": v for n, v in weights.items()}},
        "orig_mod": {"model": {f"_orig_mod.{n}": v for n, v in weights.items()}},
    }
    for name, content in kinds.items():
        torch.save(content, folder / "run" / f"{name}.pt")
        for place, config in (
            ("bare table", dataclasses.asdict(cfg)),
            (
                "whole",
                {
                    "run": {"workdir": "w", "wandb_project": "p", "wandb_name": "n", "model_type": "spidr"},
                    "data": {"manifest": "m"},
                    "model": dataclasses.asdict(cfg),
                },
            ),
        ):
            (folder / "run" / "config.json").write_text(json.dumps(config))
            for path in (folder / "run" / f"{name}.pt", str(folder / "run" / f"{name}.pt")):
                with contextlib.redirect_stdout(io.StringIO()):
                    loaded = attempt(lambda path=path: build_model(model_type="spidr", checkpoint=path))
                found[f"{name} {place} {type(path).__name__}"] = (
                    loaded
                    if isinstance(loaded, str)
                    else all(torch.equal(v, weights[n]) for n, v in loaded.state_dict().items())
                )
    both = attempt(lambda: build_model(cfg=SpidRConfig(), model_type="spidr", checkpoint=folder / "run" / "bare.pt"))
    found["cfg and checkpoint"] = both if isinstance(both, str) else len(both.student.layers)
    found["cfg only"] = len(build_model(cfg=cfg, model_type="spidr").student.layers)
    found["defaults"] = attempt(lambda: len(build_model(model_type="dinosr").student.layers))
    return found


@promise
def validation(folder: Path) -> Any:
    from spidr.validate import validate

    batches = [(waveforms(), attention_mask([39, 39, 39]), masked(seed=seed)) for seed in range(3)]
    m = model()
    if "mask" not in inspect.signature(m.forward).parameters:
        batches = [(x, a, mask.nonzero()[:, 1].view(3, -1)) for x, a, mask in batches]
    return {name: float(value) for name, value in validate(m, batches, torch.device("cpu")).items()}


@promise
def masks(folder: Path) -> Any:
    from spidr.data.masks import MaskGenerator

    found = {}
    padding = torch.arange(400) >= torch.tensor([[400], [380], [400], [390]])
    for name, cfg in {
        "static": MaskingConfig(),
        "uniform": MaskingConfig(mask_selection="uniform", mask_other=5.0),
        "normal": MaskingConfig(mask_selection="normal", mask_other=2.0),
        "poisson": MaskingConfig(mask_selection="poisson"),
        "apart": MaskingConfig(no_mask_overlap=True, mask_prob=0.4),
    }.items():
        generator, share = MaskGenerator(cfg), []
        for seed in range(40):
            mask = generator(padding, generator=torch.Generator().manual_seed(seed))[0]
            share.append(mask.float().mean() if mask.dtype == torch.bool else torch.tensor(mask.shape[1] / 400))
        found[name] = torch.stack(share).mean()
    return found


@promise
def configurations(folder: Path) -> Any:
    from spidr.config import read_config

    (folder / "c.toml").write_text(
        '[run]\nworkdir = "w"\nwandb_project = "p"\nwandb_name = "n"\nmodel_type = "spidr"\n'
        '[data]\nmanifest = "m.csv"\n'
        "[model]\nema_timescale = 30000\n[optimizer]\nlr = 1\n"
    )
    cfg = read_config(folder / "c.toml")
    document = json.loads(json.dumps(dataclasses.asdict(cfg)))
    (folder / "c.json").write_text(json.dumps(document))
    again = read_config(str(folder / "c.json"))
    return {
        "again": again == cfg or dataclasses.asdict(again) == dataclasses.asdict(cfg),
        "dir": str(cfg.run.dir),
        "timescale": float(cfg.model.ema_timescale),
        "names": [SpidRConfig(ema_timescale=20_000.0).ema_timescale],
    }


def attempt(function: Any) -> Any:
    try:
        return function()
    except Exception as error:
        return f"{type(error).__name__}: {str(error)[:200]}"


if __name__ == "__main__":
    folder, output, *names = sys.argv[1:]
    results = {}
    for name in names or PROMISES:
        place = Path(folder, name).resolve()
        place.mkdir(parents=True)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                results[name] = PROMISES[name](place)
            except Exception:
                results[name] = traceback.format_exc().splitlines()[-25:]
    torch.save(results, output)
