"""Time the extraction of units and features, against the published package encoding one file at a time.

    python benchmarks/extract.py FOLDER --published PYTHON [--minutes 30] [--feature-minutes 10] [--quick]

FOLDER holds recordings (16 kHz mono WAV or FLAC). PYTHON is the interpreter of an environment with spidr 0.1.2 and
soundfile, which reads, standardises and encodes one file after another, with ``get_codebooks`` and
``get_intermediate_outputs``. Both use the same base model with random weights, and all cores. The recordings are split
into parts, which all encode in turn; the median is of the ratios per part. Prints a Markdown table. The full run takes
about ten minutes on two cores; ``--quick`` is a one-minute trial with a small model.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
import torch

from spidr.config import SpidRConfig
from spidr.extract import Options, extract_features, extract_units
from spidr.models import SpidR, build_model

LAYER = 6

PUBLISHED = """
import json, sys, time
import numpy as np, soundfile, torch
from spidr.models import build_model

checkpoint, layer = sys.argv[1], int(sys.argv[2])
model = build_model(model_type="spidr", checkpoint=checkpoint).eval()
print(json.dumps({"threads": torch.get_num_threads()}), flush=True)
for line in sys.stdin:
    what, output, files = json.loads(line)
    start = time.perf_counter()
    with torch.no_grad():
        for file in files:
            samples, _ = soundfile.read(file, dtype="float32")
            waveform = torch.from_numpy(samples)[None]
            waveform = torch.nn.functional.layer_norm(waveform, waveform.shape)
            if what == "features":
                values = model.get_intermediate_outputs(waveform)[layer - 1]
            else:
                values = model.get_codebooks(waveform)[layer - 1].argmax(-1)
            np.save(output + "/" + file.rpartition("/")[2] + ".npy", values.squeeze(0).numpy())
    print(time.perf_counter() - start, flush=True)
"""


class Published:
    """The published package, in its own process."""

    def __init__(self, python: str, checkpoint: Path) -> None:
        environ = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
        self.process = subprocess.Popen(
            [python, "-c", PUBLISHED, str(checkpoint), str(LAYER)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environ,
        )
        self.threads = json.loads(self._answer())["threads"]

    def seconds(self, what: str, files: list[Path], output: Path) -> float:
        """Seconds to encode some files."""
        assert self.process.stdin is not None
        print(json.dumps([what, str(output), [str(file) for file in files]]), file=self.process.stdin, flush=True)
        return float(self._answer())

    def _answer(self) -> str:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            sys.exit("the published package has ended with an error")
        return line

    def close(self) -> None:
        """End the process."""
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()


def ours(what: str, files: list[Path], output: Path, model: SpidR, dtype: Any) -> float:
    """Seconds to encode some files."""
    options = Options(device="cpu", dtype=dtype, progress=False)
    start = time.perf_counter()
    if what == "features":
        extract_features(files, output / "features", model=model, layer=LAYER, options=options)
    else:
        extract_units(files, output / "units.jsonl", model=model, layer=LAYER, options=options)
    return time.perf_counter() - start


def parts_of(folder: Path, minutes: float, count: int) -> list[tuple[list[Path], float]]:
    """Recordings that add up to about ``minutes``, in parts, and the seconds of each part."""
    files = sorted(path for path in folder.rglob("*") if path.suffix in (".wav", ".flac"))
    np.random.default_rng(0).shuffle(files)
    chosen: list[tuple[Path, float]] = []
    while files and sum(seconds for _, seconds in chosen) < 60 * minutes:
        file = files.pop()
        chosen.append((file, soundfile.info(file).duration))
    parts = [chosen[i::count] for i in range(count)]
    return [([file for file, _ in part], sum(seconds for _, seconds in part)) for part in parts if part]


def check(what: str, files: list[Path], reference: Path, output: Path, same: list[float]) -> None:
    """Compare with the published package: the share of equal units, or the largest difference of a feature."""
    units = {}
    if what == "units":
        units = {
            row["fileid"]: row["units"] for row in map(json.loads, (output / "units.jsonl").open(encoding="utf-8"))
        }
    for file in files:
        expected = np.load(reference / f"{file.name}.npy")
        if what == "units":
            same.append(float(np.mean(expected == units[file.stem])))
        else:
            same.append(float(np.abs(expected - np.load(output / "features" / f"{file.stem}.npy")).max()))


def measure(
    what: str, parts: list[tuple[list[Path], float]], model: SpidR, published: Published | None, dtypes: list[str]
) -> None:
    """Let every system encode every part in turn, and print a row for each system."""
    audio = sum(seconds for _, seconds in parts)
    times: dict[str, list[float]] = {name: [] for name in ("published", *dtypes)}
    same: dict[str, list[float]] = {dtype: [] for dtype in dtypes}
    for files, _ in parts:
        with tempfile.TemporaryDirectory() as folder:
            reference = Path(folder, "published")
            reference.mkdir()
            if published is not None:
                times["published"].append(published.seconds(what, files, reference))
            for dtype in dtypes:
                times[dtype].append(ours(what, files, Path(folder, dtype), model, dtype))
                if published is not None:
                    check(what, files, reference, Path(folder, dtype), same[dtype])
    for name, values in times.items():
        if not values:
            continue
        ratio, agreement = "", ""
        if published is not None and name != "published":
            ratio = f"{statistics.median(a / b for a, b in zip(times['published'], values, strict=True)):.2f}"
            agreement = f"{np.mean(same[name]):.4%} equal" if what == "units" else f"{max(same[name]):.1e} apart"
        label = "spidr 0.1.2, float32" if name == "published" else f"this, {name}"
        print(f"| {what} of layer {LAYER} | {label} | {audio / sum(values):.1f} | {ratio} | {agreement} |", flush=True)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--published", metavar="PYTHON")
    parser.add_argument("--minutes", type=float, default=30, help="minutes of audio for units")
    parser.add_argument("--feature-minutes", type=float, default=10, help="minutes of audio for features")
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--quick", action="store_true")
    args = parser.parse_args()
    cfg, parts = SpidRConfig(), 5
    if args.quick:
        cfg = SpidRConfig(
            extractor_conv_layer_config=[(32, 10, 5)] + [(32, 3, 2)] * 4 + [(32, 2, 2)] * 2,
            encoder_embed_dim=64,
            encoder_ff_interm_features=128,
            encoder_num_heads=4,
        )
        args.minutes = args.feature_minutes = 0.5
        parts = 2
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = Path(folder, "model.pt")
        torch.save({"model": SpidR(cfg).state_dict()}, checkpoint)
        changed = {name: value for name, value in asdict(cfg).items() if value != asdict(SpidRConfig())[name]}
        Path(folder, "config.json").write_text(
            json.dumps(changed), encoding="utf-8"
        )  # the published package has fewer settings
        model: Any = build_model(model_type="spidr", checkpoint=checkpoint).eval()
        published = Published(args.published, checkpoint) if args.published else None
        threads = f"{torch.get_num_threads()} threads"
        if published is not None and published.threads != torch.get_num_threads():
            sys.exit(f"the published package has {published.threads} threads, this one has {threads}")
        print(f"{platform.processor() or platform.machine()}, {torch.backends.cpu.get_cpu_capability()}, {threads}\n")
        print("| what | system | audio seconds per second | speed-up | agreement |\n| --- | --- | --- | --- | --- |")
        for what, minutes in (("units", args.minutes), ("features", args.feature_minutes)):
            if minutes > 0:
                measure(what, parts_of(args.folder, minutes, parts), model, published, args.dtypes)
        if published is not None:
            published.close()


if __name__ == "__main__":
    main()
