"""Time manifests, batch order, masks and loading at the size of LibriSpeech and Libri-Light.

    python benchmarks/data.py [--folder DIR] [--only NAME ...] [--scale N] [--published PYTHON]

Prints the machine and a table of results and targets. ``--published`` repeats the measurements in an environment with
the published package (0.1.2), which needs TorchCodec and FFmpeg. Takes less than eight minutes and about 3 GB of disk
for synthetic recordings; needs no network. ``--scale 100`` divides all numbers of files and rows by 100, for a trial.
"""

from __future__ import annotations

import argparse
import io
import json
import multiprocessing
import os
import platform
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import polars as pl
import soundfile
import torch

from spidr.config import DataConfig, MaskingConfig
from spidr.data import build_dataloader, read_manifest, speech_dataset
from spidr.data.masks import MaskGenerator
from spidr.data.write_manifest import write_manifest, write_manifest_tar

LIBRISPEECH, LIBRILIGHT = 281_241, 10_000_000
FILES = 20_000

Row = tuple[str, float, str]
"""Name, value, unit and target of a measurement."""


def seconds(function: Callable[[], object], repeat: int = 5, clock: Callable[[], float] = time.perf_counter) -> float:
    """Median wall time of ``repeat`` calls, or of fewer if they take long."""
    times: list[float] = []
    while len(times) < repeat and sum(times) < 10:
        start = clock()
        function()
        times.append(clock() - start)
    return float(np.median(times))


def machine() -> str:
    """Describe the machine."""
    lines = Path("/proc/cpuinfo").read_text("utf-8").splitlines()
    model = next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    return f"{model}, {os.cpu_count()} cores; Python {platform.python_version()}, torch {torch.__version__}"


def core_seconds(function: Callable[[], object], repeat: int = 5) -> float:
    """Median processor time of a call in this process, whatever else the machine is doing."""
    return seconds(function, repeat, time.process_time)


def speech(length: int, seed: int) -> np.ndarray:
    """Noise with a falling spectrum and pauses, which FLAC compresses about as well as speech."""
    rng = np.random.default_rng(seed)
    samples = np.convolve(rng.standard_normal(length), np.hanning(16) / 8, "same")
    return np.round(3000 * samples * np.abs(np.sin(np.arange(length) / 20_000))).astype(np.int16)


def once(path: Path, make: Callable[[Path], object]) -> Path:
    """Make a file or folder unless an earlier run has."""
    if not path.exists():
        unfinished = path.with_name(f"unfinished-{path.name}")
        make(unfinished)
        unfinished.rename(path)
    return path


def recordings(folder: Path, suffix: str, seconds_each: float, count: int) -> Path:
    """A folder of recordings; after the first hundred, hard links to them."""

    def make(path: Path) -> None:
        path.mkdir()
        for i in range(count):
            file = path / f"{i:06}{suffix}"
            if i < 100:
                soundfile.write(file, speech(int(16_000 * seconds_each), i), 16_000)
            else:
                file.hardlink_to(path / f"{i % 100:06}{suffix}")

    return once(folder / f"{count}x{seconds_each:g}s{suffix}", make)


def big_manifest(folder: Path, rows: int) -> Path:
    """A CSV manifest with names and lengths like those of Libri-Light."""

    def make(path: Path) -> None:
        number = pl.int_range(rows, eager=True).cast(pl.String).str.zfill(9)
        lengths = np.random.default_rng(0).gamma(6, 32_000, rows).clip(20_000, 560_000).astype(np.int64)
        table = pl.DataFrame({"number": number, "num_samples": lengths}).select(
            fileid=pl.lit("1089-134686-") + pl.col("number"),
            path=pl.lit("/datasets/librilight/segmented/train/1089/134686/1089-134686-") + pl.col("number") + ".flac",
            num_samples="num_samples",
        )
        table.write_csv(path)

    return once(folder / f"rows{rows}.csv", make)


def tar_of(dataset: Path) -> Path:
    """An archive of a folder's files."""

    def make(path: Path) -> None:
        with tarfile.open(path, "w", copybufsize=1 << 22) as tar:  # in pieces as large as those of the files
            tar.dereference = True
            for file in sorted(dataset.iterdir()):
                member = tarfile.TarInfo(file.name)
                member.size = file.stat().st_size
                tar.addfile(member, io.BytesIO(file.read_bytes()))

    return once(dataset.with_name(dataset.name + ".tar"), make)


LOADING = {".wav": 15_000, ".flac": 3500}
"""Formats and their targets in seconds of audio per second."""


def utterances(folder: Path, scale: int, suffix: str) -> tuple[int, str]:
    """Number of 12 s recordings, and their manifest."""
    count, manifest = max(400, 2000 // scale), folder / f"utterances{suffix}.csv"
    write_manifest(recordings(folder, suffix, 12, count), manifest, suffix)
    return count, str(manifest)


# Measured here and, with --published, there, through functions that both packages have.


def manifests(folder: Path, scale: int) -> Iterator[Row]:
    """Reading manifests."""
    manifest = big_manifest(folder, LIBRISPEECH // scale)
    yield f"read a manifest of {LIBRISPEECH // scale:,} rows", seconds(lambda: read_manifest(manifest)), "s (< 0.3)"


def writing(folder: Path, scale: int) -> Iterator[Row]:
    """Writing manifests of folders and archives."""
    count = FILES // scale
    output = folder / "written.csv"
    for suffix in (".wav", ".flac"):
        dataset = recordings(folder, suffix, 0.5, count)
        archive = tar_of(dataset)
        yield (
            f"write_manifest, {count:,} {suffix} files",
            count / seconds(lambda: write_manifest(dataset, output, suffix), 3),  # noqa: B023
            "files/s",
        )
        yield (
            f"write_manifest_tar, {count:,} {suffix} members",
            count / seconds(lambda: write_manifest_tar(str(archive), str(output), suffix), 3),  # noqa: B023
            "files/s",
        )


def reading(folder: Path, scale: int) -> Iterator[Row]:
    """Reading whole recordings."""
    count = max(20, 2000 // scale)
    for suffix in (".wav", ".flac"):
        manifest = folder / f"reading{suffix}.csv"
        write_manifest(recordings(folder, suffix, 12, count), manifest, suffix)
        dataset = speech_dataset(manifest, normalize=True)
        each = core_seconds(lambda: [dataset[i] for i in range(20)]) / 20  # noqa: B023
        yield f"12 s {suffix} read and standardised", 1000 * each, "ms"


def masking(_: Path, __: int) -> Iterator[Row]:
    """Drawing the masks of a batch."""
    padding = torch.zeros(12, 999, dtype=torch.bool)
    for name, options in {
        "static": {},
        "uniform": {"mask_selection": "uniform"},
        "normal": {"mask_selection": "normal", "mask_other": 3.0},
        "poisson": {"mask_selection": "poisson"},
        "static, no overlap": {"no_mask_overlap": True},
    }.items():
        generator = MaskGenerator(replace(MaskingConfig(), **options))  # type: ignore[arg-type]
        yield f"masks of 12 x 999 frames, {name}", 1000 * core_seconds(lambda: generator(padding), 50), "ms (< 2)"  # noqa: B023


def loading(folder: Path, scale: int) -> Iterator[Row]:
    """An epoch of batches, loaded by a worker."""
    for suffix, target in LOADING.items():
        count, manifest = utterances(folder, scale, suffix)
        loader = build_dataloader(DataConfig(manifest, num_workers=1, persistent_workers=False), MaskingConfig())
        time_taken = seconds(lambda: sum(len(batch) for batch, _, _ in loader), 3)  # noqa: B023
        yield f"12 s {suffix}, one worker", 12 * count / time_taken, f"audio s/s (> {target:,})"


# Measured here only.


def in_a_process(function: Callable[..., object], *arguments: object) -> tuple[float, float]:
    """Time (s) of a call in a fresh process, and its peak increase in memory (GB)."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(_time_and_memory, (function, arguments))


def _time_and_memory(function: Callable[..., object], arguments: tuple[object, ...]) -> tuple[float, float]:
    def kilobytes(field: str) -> int:
        lines = Path("/proc/self/status").read_text("utf-8").splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith(field))

    before = kilobytes("VmRSS")
    start = time.perf_counter()
    function(*arguments)
    return time.perf_counter() - start, (kilobytes("VmHWM") - before) / 1e6


def _order(rows: int) -> None:
    from spidr.data.sampler import BatchSampler

    lengths = np.random.default_rng(0).integers(20_000, 560_000, rows, dtype=np.int32)
    BatchSampler(lengths, DataConfig("made up")).epoch(0)


def librilight(folder: Path, scale: int) -> Iterator[Row]:
    """A manifest of ten million rows."""
    rows = LIBRILIGHT // scale
    time_taken, memory = in_a_process(read_manifest, big_manifest(folder, rows))
    yield f"read a manifest of {rows:,} rows", time_taken, "s (< 10)"
    yield "  memory for it", memory, "GB (< 3)"
    time_taken, memory = in_a_process(_order, rows)
    yield f"batch order of {rows:,} rows, start-up and epoch", time_taken, "s (< 5)"
    yield "  memory for it", memory, "GB (< 1)"


def order(_: Path, scale: int) -> Iterator[Row]:
    """The order of LibriSpeech's batches."""
    from spidr.data.sampler import BatchSampler

    rows = LIBRISPEECH // scale
    lengths = np.random.default_rng(0).integers(20_000, 560_000, rows)
    cfg = DataConfig("made up")
    sampler = BatchSampler(lengths, cfg)
    batches = sampler.epoch(0)
    yield f"batch order of {rows:,} rows, start-up", seconds(lambda: BatchSampler(lengths, cfg)), "s (< 0.1)"
    yield f"batch order of {rows:,} rows, new epoch", seconds(lambda: sampler.epoch(1)), "s (< 0.1)"
    yield "one batch by its number", 1e6 * seconds(lambda: batches[len(batches) // 2], 1000), "µs"


def headers(folder: Path, scale: int) -> Iterator[Row]:
    """Reading headers with TorchCodec, for comparison with write_manifest."""
    try:
        from torchcodec.decoders import AudioDecoder

        AudioDecoder(next(recordings(folder, ".wav", 0.5, FILES // scale).iterdir()))
    except (ImportError, OSError, RuntimeError):
        return
    for suffix in (".wav", ".flac"):
        files = sorted(recordings(folder, suffix, 0.5, FILES // scale).iterdir())[:500]
        each = seconds(lambda: [AudioDecoder(file).metadata for file in files], 3) / len(files)  # noqa: B023
        yield f"TorchCodec reading {suffix} headers one by one", 1 / each, "files/s"


def hour(folder: Path, _: int) -> Iterator[Row]:
    """Reading parts of a long recording."""
    dataset = folder / "hour"
    file = dataset / "hour.flac"
    dataset.mkdir(exist_ok=True)
    once(file, lambda path: soundfile.write(path, np.tile(speech(3_600_000, 0), 16), 16_000, format="FLAC"))
    write_manifest(dataset, folder / "hour.csv", ".flac", stats=True)
    cfg = DataConfig(str(folder / "hour.csv"), max_sample_size=160_000, num_workers=0)
    loader = build_dataloader(cfg, None)
    times = []
    for epoch in range(50):
        start = time.process_time()
        next(iter(loader.epoch(epoch)))
        times.append(time.process_time() - start)
    yield "random 10 s of an hour of FLAC, standardised", 1000 * float(np.median(times)), "ms (< 10)"


def one_core(folder: Path, scale: int) -> Iterator[Row]:
    """An epoch of batches, loaded in this process."""
    for suffix, target in LOADING.items():
        count, manifest = utterances(folder, scale, suffix)
        loader = build_dataloader(DataConfig(manifest, num_workers=0), MaskingConfig())
        time_taken = core_seconds(lambda: sum(1 for _ in loader), 3)  # noqa: B023
        yield f"12 s {suffix}, one core without worker", 12 * count / time_taken, f"audio s/s (> {target:,})"


def archives(folder: Path, _: int) -> Iterator[Row]:
    """The same recordings as files and in an archive."""
    for suffix in (".wav", ".flac"):
        dataset = recordings(folder, suffix, 12, 400)
        write_manifest(dataset, folder / "files.csv", suffix)
        write_manifest_tar(tar_of(dataset), folder / "tar.csv", suffix)
        for name in ("files", "tar"):
            loader = build_dataloader(DataConfig(str(folder / f"{name}.csv"), num_workers=0), MaskingConfig())
            rate = 12 * 400 / core_seconds(lambda: sum(1 for _ in loader), 7)  # noqa: B023
            yield f"12 s {suffix} from {'files' if name == 'files' else 'a tar'}, one core", rate, "audio s/s"


def workers(folder: Path, scale: int) -> Iterator[Row]:
    """A worker's memory over epochs."""
    write_manifest(recordings(folder, ".wav", 12, max(400, 2000 // scale)), folder / "workers.csv")
    cfg = DataConfig(str(folder / "workers.csv"), num_workers=1, max_batch_length=600_000)
    loader = build_dataloader(cfg, MaskingConfig())
    sizes = []
    for epoch in range(10):
        for _ in loader.epoch(epoch):
            pass
        (worker,) = multiprocessing.active_children()
        pages = int(Path(f"/proc/{worker.pid}/statm").read_text("utf-8").split()[1])
        sizes.append(pages * os.sysconf("SC_PAGE_SIZE") / 1e6)
    loader.close()
    yield "a worker's memory after 10 epochs over after 1", sizes[-1] - sizes[0], "MB"


COMMON = (manifests, writing, reading, masking, loading)
OURS = (order, librilight, headers, one_core, hour, archives, workers)


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()) / "spidr-benchmark-data")
    parser.add_argument("--only", nargs="+", choices=[f.__name__ for f in (*COMMON, *OURS)], help="measure only these")
    parser.add_argument("--scale", type=int, default=1, help="divide numbers of files and rows by this")
    parser.add_argument("--published", help="python of an environment with the published package")
    parser.add_argument("--json", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(1)
    args.folder.mkdir(parents=True, exist_ok=True)
    if args.json:  # called below, in the other environment
        for function in COMMON:
            if args.only is None or function.__name__ in args.only:
                try:
                    for what, value, _ in function(args.folder, args.scale):
                        print(json.dumps([what, value]), flush=True)
                except Exception as error:
                    print(f"failed: {function.__name__}: {type(error).__name__}: {str(error)[:300]}", file=sys.stderr)
        return
    theirs: dict[str, float] = {}
    if args.published:
        command = [args.published, __file__, "--json", "--folder", str(args.folder), "--scale", str(args.scale)]
        command += ["--only", *args.only] if args.only else []
        environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}  # its own packages
        done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
        theirs = dict(json.loads(line) for line in done.stdout.splitlines() if line.startswith("["))
        failed = [line for line in done.stderr.splitlines() if line.startswith("failed: ")]
        print(*(failed or done.stderr.splitlines()[-1:] * (done.returncode != 0)), sep="\n", file=sys.stderr)
    print(f"{machine()}\n")
    print(f"| {'':55} | {'here':>10} | {'published':>10} | {'ratio':>7} | unit (target) |")
    print(f"| {'---':55} | {'---':>10} | {'---':>10} | {'---':>7} | --- |")
    for function in (*COMMON, *OURS):
        if args.only is None or function.__name__ in args.only:
            for what, value, unit in function(args.folder, args.scale):
                other = theirs.get(what)
                ratio = "" if other is None else f"{value / other if '/s' in unit else other / value:.1f}"
                shown = "" if other is None else f"{other:.4g}"
                print(f"| {what:55} | {value:10.4g} | {shown:>10} | {ratio:>7} | {unit} |", flush=True)


if __name__ == "__main__":
    main()
