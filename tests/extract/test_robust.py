"""What exists is kept, and what goes wrong is reported."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch

from helpers.extraction import LAYER, QUIET, noise, read, rows, small, units
from helpers.memory import PEAK
from spidr.extract import Options, extract_features, extract_units
from spidr.models import DinoSR
from spidr.tools.errors import InputError
from spidr.tools.lock import Lock

COMMON: dict[str, Any] = {"layer": LAYER, "options": QUIET}


# ---------------------------------------------------------------------------------------------------- names


def test_links_are_followed_and_loops_are_not(checkpoint: Path, tmp_path: Path) -> None:
    noise(tmp_path / "corpus" / "dev" / "a.wav")
    noise(tmp_path / "real" / "b.wav")
    (tmp_path / "corpus" / "train").symlink_to(tmp_path / "real")
    (tmp_path / "corpus" / "dev" / "c.wav").symlink_to(tmp_path / "real" / "b.wav")
    (tmp_path / "real" / "loop").symlink_to(tmp_path / "corpus")
    extract_units(tmp_path / "corpus", tmp_path / "u.jsonl", model=checkpoint, **COMMON)
    assert sorted(units(tmp_path / "u.jsonl")) == ["a", "b", "c"]


def test_every_name_of_a_recording_has_a_row(checkpoint: Path, tmp_path: Path) -> None:
    file = noise(tmp_path / "a.wav")
    (tmp_path / "wav.scp").write_text(f"utt1 {file}\nutt2 {file}\n")
    (tmp_path / "segments").write_text("s1 utt1 0.0 0.25\ns2 utt1 0.25 0.5\n")
    out = tmp_path / "u.jsonl"
    for source in (tmp_path / "wav.scp", tmp_path / "segments", file):
        extract_units(source, out, model=checkpoint, **COMMON)
    found = units(out)
    assert list(found) == ["utt1", "utt2", "s1", "s2", "a"]
    assert found["utt1"] == found["utt2"] == found["a"]
    assert len(found["s1"]) == len(found["s2"]) == 12


def test_only_clashing_names_get_longer(checkpoint: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    for name in ("a/1.wav", "b/2.wav", "b/3.wav"):
        noise(tmp_path / "c" / name)
    extract_features(tmp_path / "c", tmp_path / "f", model=checkpoint, flat=True, **COMMON)
    before = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "f").glob("*.npy")}
    noise(tmp_path / "c" / "b" / "1.wav")
    noise(tmp_path / "c" / "b" / "3.flac")
    extract_features(tmp_path / "c", tmp_path / "f", model=checkpoint, flat=True, **COMMON)
    after = {str(path.relative_to(tmp_path / "f")): path.stat().st_mtime_ns for path in (tmp_path / "f").rglob("*.npy")}
    assert after.keys() - before.keys() == {"b/1.npy", "b/3.npy"}
    assert after.items() >= before.items()
    assert "2 recordings (0.0 min) encoded" in caplog.text


# ---------------------------------------------------------------------------------------------------- several jobs


def test_three_jobs_add_to_one_table(checkpoint: Path, tmp_path: Path) -> None:
    for i in range(30):
        noise(tmp_path / str(i % 3) / f"{i}.wav", 16_000, seed=i)
    command = [sys.executable, "-m", "spidr.extract", "units"]
    options = ["--model", checkpoint, "--layer", "3", "--quiet", "--threads", "1"]
    jobs = [
        subprocess.Popen(list(map(str, [*command, tmp_path / part, tmp_path / "u.jsonl", *options])))
        for part in ("0", "1", "2")
    ]
    assert [job.wait(timeout=300) for job in jobs] == [0, 0, 0]
    assert sorted(units(tmp_path / "u.jsonl"), key=int) == [str(i) for i in range(30)]
    left = {path.name for path in tmp_path.iterdir()} - {"0", "1", "2"}
    assert left == {"u.jsonl", "u.jsonl.json", "u.jsonl.recordings.json"}


def test_unrelated_unfinished_folders_are_kept(checkpoint: Path, tmp_path: Path) -> None:
    noise(tmp_path / "a.wav")
    kept = tmp_path / "u.jsonl.unfinished" / "notes" / "precious.txt"
    kept.parent.mkdir(parents=True)
    kept.write_text("mine")
    extract_units(tmp_path / "a.wav", tmp_path / "u.jsonl", model=checkpoint, **COMMON)
    assert kept.read_text() == "mine"
    assert [path.name for path in kept.parents[1].iterdir()] == ["notes"]


@pytest.mark.parametrize("name", ["u.jsonl", "u.parquet", "f"])
def test_recordings_that_another_job_encodes(name: str, checkpoint: Path, tmp_path: Path) -> None:
    """They are refused while it runs; if it is dead, its work is taken over, rows of other recordings included."""
    extract: Any = extract_features if name == "f" else extract_units
    for letter in "abc":
        noise(tmp_path / "audio" / f"{letter}.wav")
    out = tmp_path / name
    unfinished = out / ".unfinished" if name == "f" else tmp_path / f"{name}.unfinished"
    (unfinished / "1-1").mkdir(parents=True)
    (unfinished / "1-1" / "recordings.json").write_text('{"b": "", "d": ""}')
    if name != "f":
        part = [{"name": n, "units": [1] * 24, "audio": "", "speaker": ""} for n in ("b", "d")]
        (unfinished / "1-1" / "0.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part))
    with Lock(unfinished / "1-1", "is encoding some of these recordings"):
        with pytest.raises(InputError, match=r"another process is encoding some of these recordings \(process \d+ on"):
            extract(tmp_path / "audio", out, model=checkpoint, **COMMON)
        extract(tmp_path / "audio" / "c.wav", out, model=checkpoint, **COMMON)
        assert (unfinished / "1-1").exists()
    extract(tmp_path / "audio", out, model=checkpoint, **COMMON)
    assert not unfinished.exists()
    if name == "u.jsonl":
        assert {"a", "b", "c", "d"} == units(out).keys()
        assert units(out)["b"] == units(out)["d"] == [1] * 24


# ---------------------------------------------------------------------------------------------------- damage


def test_damaged_rows_are_recomputed(checkpoint: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for i in range(8):
        noise(tmp_path / "audio" / f"{i}.wav", 16_000, seed=i)
    out = tmp_path / "u.jsonl"
    extract_units(tmp_path / "audio", out, model=checkpoint, **COMMON)
    whole = out.read_bytes()
    lines = whole.splitlines(keepends=True)
    lines[1] = lines[1].replace(b", ", b"\x00\xff{", 5)
    lines[2] = lines[2][:40] + b"]}\n"  # too few units
    lines[3] = b'{"fileid": "3", "units": [99999]}\n'
    lines[4] = b"7\n"
    lines[5] = lines[5][:60]
    out.write_bytes(b"".join(lines[:6] + lines[7:]))
    extract_units(tmp_path / "audio", out, model=checkpoint, **COMMON)
    assert out.read_bytes() == whole
    assert "recordings have damaged values, which are recomputed" in caplog.text


@pytest.mark.parametrize("file_format", ["npy", "pt"])
def test_damaged_arrays_are_recomputed(file_format: Any, checkpoint: Path, tmp_path: Path) -> None:
    for i in range(6):
        noise(tmp_path / "audio" / f"{i}.wav", 16_000, seed=i)
    common = {"model": checkpoint, "file_format": file_format, **COMMON}
    extract_features(tmp_path / "audio", tmp_path / "f", **common)
    files = sorted((tmp_path / "f").glob(f"*.{file_format}"))
    whole = [file.read_bytes() for file in files]
    os.truncate(files[0], 2000)
    os.truncate(files[1], 0)
    files[2].write_bytes(b"\0" * len(whole[2]))
    other = np.zeros((3, 32), dtype=np.float32)
    np.save(files[3].open("wb"), other) if file_format == "npy" else torch.save(torch.from_numpy(other), files[3])
    extract_features(tmp_path / "audio", tmp_path / "f", **common)
    for file, expected in zip(files, whole, strict=True):
        if file_format == "npy":
            assert file.read_bytes() == expected
        else:
            assert torch.load(file).shape == (49, 32)


def test_the_name_of_a_model_is_not_a_setting(checkpoint: Path, tmp_path: Path) -> None:
    noise(tmp_path / "audio" / "a.wav")
    out = tmp_path / "u.jsonl"
    extract_units(tmp_path / "audio", out, model=checkpoint, **COMMON)
    record = json.loads((tmp_path / "u.jsonl.json").read_text())
    (tmp_path / "u.jsonl.json").write_text(json.dumps(record | {"spidr": "0.2.9", "model": "moved/final.pt"}))
    noise(tmp_path / "audio" / "b.wav")
    extract_units(tmp_path / "audio", out, model=small(), **COMMON)
    assert list(rows(out)) == ["a", "b"]


# ---------------------------------------------------------------------------------------------------- messages


def test_all_bad_recordings_are_named_at_once(checkpoint: Path, tmp_path: Path) -> None:
    audio = tmp_path / "audio"
    noise(audio / "a.wav")
    noise(audio / "b.wav", 399)
    noise(audio / "c.wav", rate=8000)
    (audio / "d.wav").write_bytes(b"")
    with pytest.raises(InputError) as error:
        extract_units(audio, tmp_path / "u.jsonl", model=checkpoint, **COMMON)
    message = str(error.value)
    assert all(
        part in message
        for part in ("b.wav: 399 samples are too short", "c.wav", "8000 Hz", "d.wav: ", "--on-error skip")
    )
    assert "a.wav" not in message
    assert not list(tmp_path.glob("u.jsonl*"))


def test_quiet_recordings_and_constant_units(
    checkpoint: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    soundfile.write(tmp_path / "a.wav", 0.001 * np.random.default_rng(0).standard_normal(16_000), 16_000)
    extract_units(tmp_path / "a.wav", tmp_path / "u.jsonl", model=checkpoint, **COMMON)
    assert "1 recordings are quieter than -45 dBFS, such as a" in caplog.text
    assert "all frames have unit" in caplog.text


def test_features_that_are_not_finite(tmp_path: Path) -> None:
    model = small()
    model.student.layers[0].feed_forward.output_dense.weight.data[0, 0] = torch.nan
    noise(tmp_path / "audio" / "a.wav", 160_000)
    noise(tmp_path / "audio" / "b.wav")
    cases: list[tuple[Any, str]] = [(extract_units, "u.jsonl"), (extract_features, "f")]
    for extract, out in cases:
        for options in (QUIET, Options(window=2.0, progress=False), Options(batch_seconds=60, progress=False)):
            with pytest.raises(InputError, match=r"(a|b)\.wav: .* not finite"):
                extract(tmp_path / "audio", tmp_path / out, model=model, layer=LAYER, options=options)
        skipping = Options(window=2.0, on_error="skip", progress=False)
        assert extract(
            tmp_path / "audio", tmp_path / f"skip-{out}", model=model, layer=LAYER, options=skipping
        ).keys() == {
            "a",
            "b",
        }


# ---------------------------------------------------------------------------------------------------- the caller


def test_the_callers_state_does_not_change(model: DinoSR, tmp_path: Path) -> None:
    noise(tmp_path / "a.wav")
    trained = small().train()
    trained.student.layers[0].eval()
    modes = [module.training for module in trained.modules()]
    state = torch.random.get_rng_state()
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.set_default_dtype(torch.float64)
    try:
        extract_units(tmp_path / "a.wav", tmp_path / "u.jsonl", model=trained, **COMMON)
        extract_features(tmp_path / "a.wav", tmp_path / "f", model=trained, **COMMON)
        assert torch.are_deterministic_algorithms_enabled()
        assert torch.is_deterministic_algorithms_warn_only_enabled()
        assert torch.get_default_dtype() == torch.float64
    finally:
        torch.set_default_dtype(torch.float32)
        torch.use_deterministic_algorithms(False)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert [module.training for module in trained.modules()] == modes
    assert units(tmp_path / "u.jsonl")["a"] == model.units(read(tmp_path / "a.wav")[None], layer=LAYER)[0][0].tolist()


def test_standard_error_that_nobody_reads(checkpoint: Path, tmp_path: Path) -> None:
    for i in range(20):
        noise(tmp_path / "audio" / f"{i}.wav", 16_000, seed=i)
    noise(tmp_path / "audio" / "short.wav", 100)
    command = [
        sys.executable,
        "-m",
        "spidr.extract",
        "units",
        tmp_path / "audio",
        tmp_path / "u.jsonl",
        "--model",
        checkpoint,
    ]
    arguments = [*map(str, command), "--layer", "3", "--on-error", "skip"]
    with subprocess.Popen(arguments, stderr=subprocess.PIPE) as process:
        assert process.stderr is not None
        process.stderr.close()
    assert process.returncode == 0
    assert len(units(tmp_path / "u.jsonl")) == 20


# ---------------------------------------------------------------------------------------------------- long recordings


def test_features_of_a_long_recording_are_an_ordinary_array(checkpoint: Path, tmp_path: Path) -> None:
    file = noise(tmp_path / "a.wav", 100_000)
    options = Options(window=1.0, progress=False)
    for file_format in ("npy", "pt"):
        extract_features(
            file, tmp_path / file_format, model=checkpoint, layer=LAYER, file_format=file_format, options=options
        )  # type: ignore[arg-type]
    found = np.load(tmp_path / "npy" / "a.npy")
    np.save(tmp_path / "again.npy", found)
    assert (tmp_path / "again.npy").read_bytes() == (tmp_path / "npy" / "a.npy").read_bytes()
    assert torch.equal(torch.load(tmp_path / "pt" / "a.pt"), torch.from_numpy(found))


MEASURE = (
    PEAK
    + """
import sys
from spidr.extract import Options, extract_features, extract_units
options = Options(window=30, progress=False, threads=1)
for source in sys.argv[3:]:
    extract_units(source, source + ".jsonl", model=sys.argv[1], layer=3, options=options)
    extract_features(source, sys.argv[2], model=sys.argv[1], layer=3, options=options)
    print(peak() // 1024)
"""
)


def test_memory_does_not_grow_with_a_recording_in_windows(checkpoint: Path, tmp_path: Path) -> None:
    """The samples of eight minutes would take 31 MB."""
    files = [noise(tmp_path / f"{minutes}.wav", minutes * 960_000) for minutes in (3, 11)]
    command = [sys.executable, "-c", MEASURE, checkpoint, tmp_path / "f", *files]
    # Freed memory leaves the heap, so that only memory in use is measured.
    at_once = {"MALLOC_ARENA_MAX": "1", "MALLOC_MMAP_THRESHOLD_": "1000000", "MALLOC_TRIM_THRESHOLD_": "1000000"}
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=True, env=os.environ | at_once)
    before, after = map(int, done.stdout.split())
    assert after - before < 15
