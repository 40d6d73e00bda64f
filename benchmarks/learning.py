"""Compare SpidR, DinoSR and k-means: does a small model learn phonetic units from an hour of speech?

    python benchmarks/learning.py SPEECH OUTPUT [--only baselines] [--seeds 0 1 2] [--starts random warm]

SPEECH holds ``audio/``, ``alignments.jsonl`` (with speaker, gender and duration) and ``phoneme.item``. 45 minutes of
speakers are for training; everything is measured on the others. OUTPUT gets the manifests, the runs, ``results.jsonl``
(one line per system, seed and layer) and ``table.md``. On one core, the baselines take a minute, each training three,
a warm start (:mod:`spidr.warm_start`) six. Interrupt it at any time and rerun it to resume.
"""

import argparse
import itertools
import json
import resource
import statistics
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import torch
from sklearn.cluster import MiniBatchKMeans

from spidr.config import DEFAULT_CONV_LAYER_CONFIG, SAMPLE_RATE, read_config, to_dict
from spidr.data import read_manifest, speech_dataset
from spidr.data.alignments import read_alignments
from spidr.environment import Environment
from spidr.evaluate import evaluate_model
from spidr.evaluate.abx import ABX, Scorer, read_items
from spidr.models import DinoSR, build_model
from spidr.models.codebook import normalise_over_time
from spidr.models.metrics import units_quality
from spidr.validate import encode_rows
from spidr.warm_start import cepstra, log_mel, smooth_and_slope, weights

ROOT = Path(__file__).resolve().parents[1]
TRAIN_MINUTES = 45
MEASURES = ("pnmi", "active_codewords", "units_abx_within", "units_abx_across", "abx_within", "abx_across")
STATES = {"untrained": "step_0.pt", "trained": "final.pt"}
Features = dict[str, np.ndarray]


# --------------------------------------------------------------------------------------------------------------------
# Data


def prepare(speech: Path, output: Path) -> None:
    """Write the manifests, alignments and items of both halves."""
    output.mkdir(parents=True, exist_ok=True)
    rows = [json.loads(line) for line in (speech / "alignments.jsonl").read_text("utf-8").splitlines()]
    minutes: dict[tuple[str, str], float] = {}
    for row in rows:
        speaker = row["gender"], row["speaker"]
        minutes[speaker] = minutes.get(speaker, 0) + row["duration"] / 60
    # Women and men alternate, so that both halves have both.
    by_gender = [sorted(s for s in minutes if s[0] == gender) for gender in sorted({gender for gender, _ in minutes})]
    turns = sorted((i, speaker) for speakers in by_gender for i, speaker in enumerate(speakers))
    train: set[str] = set()
    total = 0.0
    for _, speaker in turns:
        if total + minutes[speaker] <= TRAIN_MINUTES:
            train.add(speaker[1])
            total += minutes[speaker]
    command = [sys.executable, "-m", "spidr.data.write_manifest", str(speech / "audio"), str(output / "all.csv")]
    subprocess.run([*command, "--ext", ".flac"], check=True)
    manifest = read_manifest(output / "all.csv")
    for split, is_train in (("train", True), ("valid", False)):
        fileids = [row["fileid"] for row in rows if (row["speaker"] in train) == is_train]
        part = manifest.filter(pl.col("fileid").is_in(fileids))
        part.write_csv(output / f"{split}.csv")
        seconds = part["num_samples"].sum() / SAMPLE_RATE
        print(f"{split}: {part.height} recordings, {seconds / 60:.1f} minutes", flush=True)
    lines = [json.dumps(row) + "\n" for row in rows]
    (output / "alignments.jsonl").write_text("".join(lines), encoding="utf-8")
    header, *items = (speech / "phoneme.item").read_text("utf-8").splitlines(keepends=True)
    valid = set(read_manifest(output / "valid.csv")["fileid"])
    kept = [line for line in items if line.split()[0] in valid]
    (output / "phoneme.item").write_text(header + "".join(kept), encoding="utf-8")


# --------------------------------------------------------------------------------------------------------------------
# Features and k-means


def smoothed(waveforms: torch.Tensor, shapes: Sequence[tuple[int, int, int]]) -> torch.Tensor:
    """A warm start's targets, before standardisation and weights."""
    x = cepstra(waveforms, shapes)
    return smooth_and_slope(x, torch.tensor([x.shape[1]]))


def spectral(manifest: Path, compute: Callable[..., torch.Tensor], scale: torch.Tensor) -> Features:
    """Log-mel energies or cepstra at the models' frames, standardised over each recording, times ``scale``."""
    dataset = speech_dataset(manifest, normalize=True)
    frames = (compute(dataset[i].unsqueeze(0), DEFAULT_CONV_LAYER_CONFIG)[0] for i in range(len(dataset)))
    return {
        name: (normalise_over_time(x) * scale).numpy()
        for name, x in zip(dataset.manifest["fileid"], frames, strict=True)
    }


def model_features(model: DinoSR, manifest: Path, layers: list[int]) -> dict[int, Features]:
    """Outputs of some layers, standardised over each recording like the targets of training."""
    dataset = speech_dataset(manifest, normalize=True)
    names = dataset.manifest["fileid"].to_list()
    env = Environment(0, 0, 1, torch.device("cpu"))
    features: dict[int, Features] = {layer: {} for layer in layers}
    for row, _, outputs in encode_rows(model, dataset, list(range(len(names))), 640_000, env, layers=layers):
        for layer, output in zip(layers, outputs, strict=True):
            features[layer][names[row]] = normalise_over_time(output).numpy()
    return features


def k_means(train: Features, valid: Features, units: int, seed: int) -> dict[str, np.ndarray]:
    """Units of the validation recordings by k-means on the frames of the training recordings."""
    clusters = MiniBatchKMeans(units, batch_size=10_000, max_iter=100, n_init=3, random_state=seed)
    clusters.fit(np.concatenate(list(train.values())))
    return {name: clusters.predict(frames).astype(np.int64) for name, frames in valid.items()}


# --------------------------------------------------------------------------------------------------------------------
# Measuring


class Results:
    """The lines of ``results.jsonl``."""

    def __init__(self, output: Path) -> None:
        self.path = output / "results.jsonl"
        self.lines = (
            [json.loads(line) for line in self.path.read_text("utf-8").splitlines()] if self.path.exists() else []
        )

    def has(self, system: str, seed: int) -> bool:
        """Whether a system has already been measured."""
        return any((line["system"], line["seed"]) == (system, seed) for line in self.lines)

    def add(self, system: str, seed: int, rows: list[dict[str, Any]]) -> None:
        """Store all rows of a system."""
        self.lines += [{"system": system, "seed": seed, **row} for row in rows]
        self.path.write_text("".join(json.dumps(line) + "\n" for line in self.lines), encoding="utf-8")
        print(f"{system}, seed {seed}: {rows}", flush=True)

    def table(self) -> str:
        """Mean and standard deviation over seeds."""
        lines = ["| system | layer | seeds | " + " | ".join(MEASURES) + " |", "| --- " * (3 + len(MEASURES)) + "|"]
        for key in dict.fromkeys((line["system"], line.get("layer")) for line in self.lines):
            rows = [line for line in self.lines if (line["system"], line.get("layer")) == key]
            cells = []
            for measure in MEASURES:
                values = [row[measure] for row in rows if row.get(measure) is not None]
                spread = f" ± {statistics.stdev(values):.3f}" if len(values) > 1 else ""
                cells.append(f"{statistics.mean(values):.3f}{spread}" if values else "")
            lines.append(f"| {key[0]} | {key[1] or ''} | {len(rows)} | " + " | ".join(cells) + " |")
        return "\n".join(lines) + "\n"


def measure(output: Path, of_features: ABX, units: dict[str, np.ndarray], size: int, scorer: Scorer) -> dict[str, Any]:
    """Unit quality and ABX of the units, and the ABX of the features they were made from."""
    phones = read_alignments(output / "alignments.jsonl")
    data: Any = {name: (phones[name], sequence) for name, sequence in units.items()}
    quality = units_quality(data, num_units=size, num_phones=100)
    of_units = scorer.score(units, "identical")
    return {
        **quality._asdict(),
        "abx_within": of_features.within,
        "abx_across": of_features.across,
        "units_abx_within": of_units.within,
        "units_abx_across": of_units.across,
    }


def baselines(output: Path, sizes: list[int], seeds: list[int], results: Results, scorer: Scorer) -> None:
    """k-means on log-mel frames, on cepstra, and on a warm start's targets."""
    ones = torch.ones(1)
    for name, compute, scale in (
        ("log-mel", log_mel, ones),
        ("cepstra", cepstra, ones),
        ("smoothed cepstra and slopes", smoothed, weights()),
    ):
        if all(results.has(f"k-means {size}, {name}", seed) for size in sizes for seed in seeds):
            continue
        train, valid = (spectral(output / f"{split}.csv", compute, scale) for split in ("train", "valid"))
        of_features = scorer.score(valid)
        for size in sizes:
            for seed in seeds:
                if not results.has(f"k-means {size}, {name}", seed):
                    units = k_means(train, valid, size, seed)
                    results.add(f"k-means {size}, {name}", seed, [measure(output, of_features, units, size, scorer)])


def train(output: Path, config: Path, start: str, seed: int) -> tuple[Path, str]:
    """Train a configuration unless that is done. Returns the run's folder and the system's name."""
    cfg = to_dict(read_config(config))
    system = config.stem if start == "random" else f"{config.stem}, {start}"
    name = system.replace(", ", "-") + f"-{seed}"
    cfg["run"] |= {"workdir": str(output), "wandb_project": "runs", "wandb_name": name, "random_seed": seed}
    cfg["data"] |= {"manifest": str(output / "train.csv"), "random_seed": seed}
    cfg["validation"] = {}  # measured afterwards
    path = output / f"{name}.json"
    if start == "warm":
        warm = output / "warm" / name / "warm.pt"
        cfg["run"]["init_ckpt"], cfg["model"]["freeze_step"] = str(warm), 0
        path.write_text(json.dumps(cfg), encoding="utf-8")
        if not warm.exists():
            timed(f"{name}, warm start", "spidr.warm_start", path, warm)
    run = output / "runs" / name
    if not (run / "final.pt").exists():
        path.write_text(json.dumps(cfg), encoding="utf-8")
        timed(name, "spidr", path)
    return run, system


def timed(name: str, module: str, *arguments: Path) -> None:
    """Run a module and print its processor time."""
    before = cpu_minutes()
    subprocess.run([sys.executable, "-m", module, *map(str, arguments)], check=True)
    print(f"{name}: {cpu_minutes() - before:.1f} minutes of processor time", flush=True)


def cpu_minutes() -> float:
    """Processor time of all child processes that have ended."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return (usage.ru_utime + usage.ru_stime) / 60


def measure_units(output: Path, checkpoint: Path, system: str, seed: int, results: Results) -> None:
    """Measure every layer of a checkpoint and the units of its heads."""
    if results.has(system, seed):
        return
    rows = evaluate_model(
        build_model(checkpoint=checkpoint).eval(),
        output / "valid.csv",
        output / "alignments.jsonl",
        items=read_items(output / "phoneme.item"),
        device="cpu",
        max_batch_length=640_000,
    )
    results.add(system, seed, rows)


def measure_k_means(output: Path, checkpoint: Path, system: str, seed: int, results: Results, scorer: Scorer) -> None:
    """Measure k-means on each layer of a checkpoint that has a codebook, with as many units."""
    if results.has(system, seed):
        return
    model = build_model(checkpoint=checkpoint).eval()
    size, layers = model.cfg.codebook_size, list(model.codebook_layers)
    train, valid = (model_features(model, output / f"{split}.csv", layers) for split in ("train", "valid"))
    rows: list[dict[str, Any]] = []
    for layer in layers:
        units = k_means(train[layer], valid[layer], size, seed)
        rows.append({"layer": layer, **measure(output, scorer.score(valid[layer]), units, size, scorer)})
    results.add(system, seed, rows)


def main() -> None:
    """Run the comparison."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("speech", type=Path)
    parser.add_argument("output", type=Path)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--sizes", type=int, nargs="+", default=[64], help="numbers of k-means units")
    parser.add_argument(
        "--configs",
        type=Path,
        nargs="*",
        default=[ROOT / "configs" / "small-spidr.toml", ROOT / "configs" / "small-dinosr.toml"],
    )
    parser.add_argument("--starts", nargs="+", choices=("random", "warm"), default=["random", "warm"])
    parser.add_argument("--only", choices=("baselines", "models"))
    args = parser.parse_args()
    output = args.output.resolve()
    prepare(args.speech.resolve(), output)
    results, scorer = Results(output), Scorer(read_items(output / "phoneme.item"))
    if args.only != "models":
        baselines(output, args.sizes, args.seeds, results, scorer)
    if args.only != "baselines":
        runs = []
        for seed in args.seeds:
            for start, config in itertools.product(args.starts, args.configs):
                run, name = train(output, config, start, seed)
                for state, checkpoint in STATES.items():
                    measure_units(output, run / checkpoint, f"{name}, {state}", seed, results)
                    if start == "warm" or state == "trained":
                        runs.append((run / checkpoint, f"k-means on {name}, {state}", seed))
                (output / "table.md").write_text(results.table(), encoding="utf-8")
        for path, system, seed in runs:
            measure_k_means(output, path, system, seed, results, scorer)
    (output / "table.md").write_text(results.table(), encoding="utf-8")
    print(results.table())


if __name__ == "__main__":
    main()
