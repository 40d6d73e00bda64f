"""Extractions that are interrupted, repeated, shared, or run beside others."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import polars as pl
import pytest

from helpers.extraction import LAYER, PROMPTS, QUIET, noise, read, rows, save, small, units
from spidr.data import audio
from spidr.extract import Options, extract_features, extract_units
from spidr.extract.__main__ import main
from spidr.models import DinoSR
from spidr.tools.errors import InputError
from spidr.tools.lock import Process


def test_other_settings_into_the_same_output(checkpoint: Path, tmp_path: Path) -> None:
    noise(tmp_path / "audio" / "a.wav")
    table, folder, source = tmp_path / "u.jsonl", tmp_path / "f", tmp_path / "audio"
    extract_units(source, table, model=checkpoint, layer=3, options=QUIET)
    before = table.read_bytes()
    other = save(small(seed=1), tmp_path / "other")
    for changes in ({"layer": 4}, {"dedup": True}, {"model": other}, {"options": Options(dtype="bfloat16")}):
        settings: Any = {"model": checkpoint, "layer": 3, "options": QUIET} | changes
        with pytest.raises(InputError, match=r"u\.jsonl\.json: .* made with (layer|dedup|weights|dtype) = "):
            extract_units(source, table, **settings)
    assert table.read_bytes() == before
    extract_features(source, folder, model=checkpoint, layer=3, options=QUIET)
    with pytest.raises(InputError, match='made with stored = "float32", now it is "float16"'):
        extract_features(source, folder, model=checkpoint, layer=3, output_dtype="float16", options=QUIET)
    other = noise(tmp_path / "other" / "b.wav")  # nothing of it is encoded yet
    with pytest.raises(InputError, match="made with layer = 3, now it is 4"):
        extract_features(other, folder, model=checkpoint, layer=4, options=QUIET)
    with pytest.raises(InputError, match="made with layer = 3, now it is 4"):
        extract_units(other, table, model=checkpoint, layer=4, options=QUIET)
    with pytest.raises(InputError, match="is not empty"):
        extract_features(source, tmp_path / "audio", model=checkpoint, layer=3, options=QUIET)


def test_another_recording_of_the_same_name(checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    first, second = (noise(tmp_path / corpus / "s/u.wav", seed=i) for i, corpus in enumerate(("1", "2")))
    noise(tmp_path / "3" / "s/v.wav", seed=3)
    cases: list[tuple[Any, str, str]] = [
        (extract_features, "f", "f/recordings.json"),
        (extract_units, "u.jsonl", "u.jsonl.recordings.json"),
        (extract_units, "u.parquet", "u.parquet.recordings.json"),
    ]
    for extract, output, said in cases:
        common: Any = {"model": checkpoint, "layer": LAYER, "options": QUIET}
        extract("1", output, **common)
        extract("3", output, **common)
        with pytest.raises(InputError, match="Choose another output; if the recordings have only been moved, remove"):
            extract("2", output, **common)  # a call in between does not matter
        extract("1", output, **common)
        files = {path: path.read_bytes() for path in tmp_path.rglob("*.*") if path.is_file()}
        with pytest.raises(InputError, match=rf"^{said}: the output of (s/)?u there is that of {first}, .* {second}\."):
            extract("2", output, **common)
        extract(tmp_path / "1", tmp_path / output, **common)  # the same recording
        assert {path: path.read_bytes() for path in tmp_path.rglob("*.*") if path.is_file()} == files
        Path(said).write_text("[]", encoding="utf-8")
        with pytest.raises(InputError, match=rf"{said}: says of which recordings .* but cannot be read"):
            extract("1", output, **common)
        Path(said).unlink()  # as written by an earlier version
        extract("1", output, **common)
        assert list(json.loads(Path(said).read_text("utf-8")).values()) == [str(first)]


def test_a_name_that_is_not_encoded_yet(checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "1").mkdir()
    (tmp_path / "1/u.wav").write_bytes(b"no recording")
    noise(tmp_path / "2/u.wav")
    options = Options(on_error="skip", progress=False)
    cases: list[tuple[Any, str]] = [(extract_features, "f"), (extract_units, "u.jsonl")]
    for extract, output in cases:
        common: Any = {"model": checkpoint, "layer": LAYER, "options": options}
        assert set(extract(tmp_path / "1", tmp_path / output, **common)) == {"u"}
        assert extract(tmp_path / "2", tmp_path / output, **common) == {}


def test_a_corpus_that_grows(model: DinoSR, checkpoint: Path, tmp_path: Path) -> None:
    corpus, common = tmp_path / "corpus", {"model": checkpoint, "layer": LAYER, "options": QUIET}

    def unit(name: str) -> list[int]:
        return model.units(read(corpus / name).unsqueeze(0), layer=LAYER)[0][0].tolist()

    noise(corpus / "a" / "u.wav", seed=1)
    noise(corpus / "a" / "v.wav", seed=2)
    for name in ("u.jsonl", "u.parquet"):
        out, found = (
            tmp_path / name,
            units if name == "u.jsonl" else lambda path: dict(pl.read_parquet(path).iter_rows()),
        )
        extract_units(corpus, out, **common)  # type: ignore[arg-type]
        noise(corpus / "b" / "w.wav", seed=3)
        extract_units(corpus / "b", out, **common)  # type: ignore[arg-type]
        assert list(found(out).items()) == [("u", unit("a/u.wav")), ("v", unit("a/v.wav")), ("w", unit("b/w.wav"))]
        extract_units(corpus / "a", out, **common)  # type: ignore[arg-type]
        assert list(found(out)) == ["w", "u", "v"]
        noise(corpus / "u.wav", seed=4)  # a clash: the old recording keeps its name and is not encoded again
        noise(corpus / "b" / "u.wav", seed=5)
        extract_units(corpus, out, **common)  # type: ignore[arg-type]
        files = {"u": "a/u", "v": "a/v", "w": "b/w", "b/u": "b/u", "u.wav": "u"}
        assert found(out) == {name: unit(f"{file}.wav") for name, file in files.items()}
        (corpus / "u.wav").unlink()
        shutil.rmtree(corpus / "b")


def test_a_full_disk(checkpoint: Path, tmp_path: Path) -> None:
    """Simulated by a limit on file sizes."""
    for i in range(20):
        noise(tmp_path / "audio" / f"{i}.wav", 16_000, seed=i)
    script = (
        "import resource, sys; from spidr.extract.__main__ import main; "
        "resource.setrlimit(resource.RLIMIT_FSIZE, (2000, resource.RLIM_INFINITY)); code = main(); "
        "resource.setrlimit(resource.RLIMIT_FSIZE, [resource.RLIM_INFINITY] * 2); sys.exit(code)"
    )
    options = ["--model", checkpoint, "--layer", LAYER, "--threads", 1]
    arguments = command("units", tmp_path / "audio", tmp_path / "u.jsonl", *options)[3:]
    result = subprocess.run([sys.executable, "-c", script, *arguments], capture_output=True, text=True, timeout=250)
    assert result.returncode == 2, result.stderr
    assert re.fullmatch(
        r"error: .*u\.jsonl\.unfinished/.*/0\.jsonl: cannot be written \(File too large\): .*\n", result.stderr
    )
    assert main(arguments) == 0
    assert len(rows(tmp_path / "u.jsonl")) == 20


def command(*arguments: object) -> list[str]:
    return [sys.executable, "-m", "spidr.extract", *map(str, arguments), "--quiet"]


STOPS_HALFWAY = """
import itertools, sys, threading
from spidr.data import audio
from spidr.extract.__main__ import main

read, reads = audio.read_audio, itertools.count()

def read_half(where):
    if next(reads) >= 36:
        threading.Event().wait()
    return read(where)

audio.read_audio = read_half
sys.exit(main())
"""


def wait_until(condition: Callable[[], bool], process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 200
    while not condition():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.fixture(scope="module")
def prompts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with every third prompt."""
    folder = tmp_path_factory.mktemp("prompts")
    for file in sorted(PROMPTS.iterdir())[::3]:
        (folder / file.name).symlink_to(file)
    return folder


@pytest.fixture(scope="module")
def undisturbed(checkpoint: Path, prompts: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Features and units of all prompts, from an uninterrupted run."""
    folder = tmp_path_factory.mktemp("undisturbed")
    extract_units(prompts, folder / "u.jsonl", model=checkpoint, layer=LAYER, options=QUIET)
    extract_features(prompts, folder / "f", model=checkpoint, layer=LAYER, options=QUIET)
    return folder


@pytest.mark.parametrize("kind", ["units", "features"])
def test_killed_and_started_again(
    kind: str, checkpoint: Path, prompts: Path, undisturbed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / ("u.jsonl" if kind == "units" else "f")

    def done() -> set[str]:
        if kind == "features":
            return {p.stem for p in out.glob("[!.]*.npy")}
        parts = (tmp_path / "u.jsonl.unfinished").glob("*/*.jsonl")
        return {
            json.loads(line)["name"]
            for p in parts
            for line in p.read_bytes().splitlines(keepends=True)
            if line[-1] == 10
        }

    options = ["--model", checkpoint, "--layer", LAYER, "--threads", 1]
    halfway = [sys.executable, "-c", STOPS_HALFWAY, *command(kind, prompts, out, *options)[3:]]
    with subprocess.Popen(halfway, stderr=subprocess.PIPE, text=True) as process:
        wait_until(lambda: len(done()) >= 5, process)
        process.send_signal(signal.SIGKILL)
    before = done()
    assert 5 <= len(before) < 72
    assert not (tmp_path / "u.jsonl").exists()
    if kind == "units":  # as if killed while writing
        (part,) = (tmp_path / "u.jsonl.unfinished").glob("*/*.jsonl")
        with part.open("ab") as file:
            file.write(b'{"name": "half", "units": [1, 2')
    else:
        (out / f".spidr-{Process.current().machine}-{process.pid}-1-0.tmp").write_bytes(b"half")
    read_again = []
    read = audio.read_audio
    monkeypatch.setattr(audio, "read_audio", lambda where: (read_again.append(Path(where.path).stem), read(where))[1])
    again: Any = extract_units if kind == "units" else extract_features
    again(prompts, out, model=checkpoint, layer=LAYER, options=QUIET)
    assert not before & set(read_again)
    assert len(before) + len(read_again) == 72
    if kind == "units":
        assert out.read_bytes() == (undisturbed / "u.jsonl").read_bytes()
        assert {p.name for p in tmp_path.iterdir()} == {"u.jsonl", "u.jsonl.json", "u.jsonl.recordings.json"}
    else:
        assert {p.name for p in out.iterdir()} == {p.name for p in (undisturbed / "f").iterdir()}
        assert all(p.read_bytes() == (undisturbed / "f" / p.name).read_bytes() for p in out.iterdir())
    read_again.clear()
    again(prompts, out, model=checkpoint, layer=LAYER, options=QUIET)
    assert read_again == []


def test_processes_share_the_work(checkpoint: Path, prompts: Path, undisturbed: Path, tmp_path: Path) -> None:
    launch = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node=2",
        "-m",
        "spidr.extract",
    ]
    options = ["--model", checkpoint, "--layer", LAYER, "--batch-seconds", 20]
    arguments = command("units", prompts, tmp_path / "u.jsonl", *options)[3:]
    subprocess.run([*launch, *arguments], check=True, timeout=250, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert (tmp_path / "u.jsonl").read_bytes() == (undisturbed / "u.jsonl").read_bytes()
