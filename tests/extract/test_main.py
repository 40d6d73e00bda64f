"""The command line."""

from __future__ import annotations

import functools
import os
import pty
import re
import subprocess
import sys
from contextlib import closing, suppress
from pathlib import Path
from typing import Any

import pytest

from helpers.extraction import PROMPTS, noise
from spidr.extract import Options, extract_features
from spidr.extract.__main__ import main
from spidr.tools import progress
from spidr.tools.errors import InputError


@pytest.mark.parametrize(
    ("rate", "channels", "message"), [(44_100, 1, "the sample rate is 44100 Hz"), (16_000, 2, "2 channels")]
)
def test_other_formats_are_refused_with_a_remedy(
    rate: int, channels: int, message: str, checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = noise(tmp_path / "a.wav", 8000, rate, channels=channels)
    assert main(["units", str(file), str(tmp_path / "u.jsonl"), "--model", str(checkpoint), "--layer", "3"]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert "--resample does it on the way" in error
    assert str(file) in error


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere", "OUT.jsonl"], "nowhere: does not exist; expected a manifest, a folder or an audio file"),
        (["DIR", "OUT.txt"], "must end in .jsonl or .parquet"),
        (["DIR", "OUT.jsonl", "--layer", "1"], "layer 1 has no codebook; layers 2 to 4 have a codebook"),
        (["DIR", "OUT.jsonl", "--layer", "5"], "layer 5 does not exist; layers 2 to 4 have a codebook"),
        (["DIR", "OUT.jsonl", "--model", "wav2vec"], "wav2vec: neither a file nor a published model"),
        (["DIR", "OUT.jsonl", "--window", "0"], "window: found 0.0, expected seconds, more than 0"),
        (["DIR", "OUT.jsonl", "--window", "-1"], "window: found -1.0, expected seconds, more than 0"),
        (["DIR", "OUT.jsonl", "--window", "inf"], "window: found inf, expected seconds, more than 0"),
        (["DIR", "OUT.jsonl", "--window", "nan"], "window: found nan, expected seconds, more than 0"),
        (["DIR/a.wav", "OUT.jsonl", "--window", "0.001"], "window = 0.001 s is shorter than a frame of 0.02 s"),
        (["DIR", "OUT.jsonl", "--window", "1", "--context", "inf"], "context: found inf, expected seconds, 0 or more"),
        (["DIR", "OUT.jsonl", "--window", "1", "--context", "nan"], "context: found nan, expected seconds, 0 or more"),
        (["DIR", "OUT.jsonl", "--window", "1", "--context", "-2"], "context: found -2.0, expected seconds, 0 or more"),
        (["DIR", "OUT.jsonl", "--batch-seconds", "nan"], "batch_seconds: found nan, expected seconds, 0 or more"),
        (["DIR", "OUT.jsonl", "--threads", "0"], "threads: found 0, expected 1 to 1,000"),
        (["DIR", "OUT.jsonl", "--threads", "1001"], "threads: found 1001, expected 1 to 1,000"),
        (["DIR", "OUT.jsonl", "--threads", "9" * 30], f"threads: found {'9' * 30}, expected 1 to 1,000"),
        (
            ["DIR", "OUT.jsonl", "--window", "1e7"],
            "window: found 10000000.0, expected seconds, more than 0, at most 1,000,0",
        ),
        (["DIR", "OUT.jsonl", "--batch-seconds", "1e9"], "expected seconds, 0 or more, at most 1,000,000"),
        (["DIR", "OUT.jsonl", "--context", "1"], "there is no window"),
        (["DIR", "OUT.jsonl", "--kmeans", "none.npz"], "none.npz: does not exist; write it with"),
        (["EMPTY", "OUT.jsonl"], "no file's name ends like that of a recording"),
        (["archive.tar", "OUT.jsonl"], "write the manifest of an archive first"),
        (["DIR/short.wav", "OUT.jsonl"], "short.wav: 9 samples are too short"),
    ],
)
def test_wrong_input(
    arguments: list[str],
    message: str,
    checkpoint: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    noise(tmp_path / "DIR" / "a.wav")
    noise(tmp_path / "DIR" / "short.wav", 9)
    (tmp_path / "EMPTY").mkdir()
    (tmp_path / "archive.tar").touch()
    defaults = ["--model", str(checkpoint)] if "--model" not in arguments else []
    defaults += ["--layer", "3"] if "--layer" not in arguments else []
    assert main(["units", *arguments, *defaults, "--quiet"]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert "Traceback" not in error
    assert not (tmp_path / "OUT.jsonl").exists()


@pytest.mark.parametrize(
    ("name", "value", "accepted"),
    [
        ("device", "gpu", "auto, cuda, mps or cpu"),
        ("dtype", "float16", "float32, bfloat16 or auto"),
        ("on_error", "ignore", "raise or skip"),
        ("file_format", "numpy", "npy or pt"),
        ("output_dtype", "bfloat16", "float32 or float16"),
    ],
)
def test_wrong_choices_from_python(name: str, value: str, accepted: str, tmp_path: Path) -> None:
    choice: Any = {name: value}
    call: Any = functools.partial(extract_features, noise(tmp_path / "a.wav"), tmp_path / "f")
    with pytest.raises(InputError, match=f"^{name}: found '{value}', expected {accepted}$"):
        (call if name in ("file_format", "output_dtype") else Options)(**choice)


@pytest.mark.parametrize("command", ["units", "features", "kmeans"])
@pytest.mark.parametrize(
    ("model", "advice"),
    [
        ("spidr_bsae", "; did you mean spidr_base?"),
        ("dinosr_base", "; did you mean dinosr_base_original?"),
        ("wav2vec", "; python -m spidr.models lists those"),
    ],
)
def test_a_mistyped_model_is_reported_before_the_sources_are_read(
    command: str,
    model: str,
    advice: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "audio").mkdir()
    (tmp_path / "audio" / "a.wav").write_bytes(b"would be refused")
    output = {"units": "u.jsonl", "features": "f", "kmeans": "k.npz"}[command]
    assert main([command, "audio", output, "--model", model]) == 2
    guide = " (see docs/units.md#which-model-which-layer)"
    assert capsys.readouterr().err == f"error: {model}: neither a file nor a published model{advice}{guide}\n"


@pytest.mark.parametrize(
    ("samples", "expected"), [(288_000, r"0\.60/0\.60 min of audio"), (28_800_000, r"1\.00/1\.00 h of audio")]
)
def test_progress_in_a_terminal(samples: int, expected: str, checkpoint: Path, tmp_path: Path) -> None:
    """In minutes or hours of audio, even if the terminal does not report its width."""
    lines = ["fileid,path,num_samples"]
    for name in ("a", "b"):
        file = noise(tmp_path / f"{name}.wav", min(samples, 288_000))  # long ones are shorter than listed: skipped
        lines.append(f"{name},{file},{samples}")
    (tmp_path / "m.csv").write_text("\n".join(lines))
    arguments = ["features", tmp_path / "m.csv", tmp_path / "f", "--model", checkpoint, "--layer", "3"]
    command = [sys.executable, "-m", "spidr.extract", *map(str, arguments), "--on-error", "skip"]
    terminal, ours = pty.openpty()
    with subprocess.Popen(command, stderr=ours) as process:
        os.close(ours)
        shown = b""
        with suppress(OSError):  # EIO at the end
            while piece := os.read(terminal, 4096):
                shown += piece
    assert process.returncode == 0, shown
    bar = [line for line in re.split(r"[\r\n]+", shown.decode()) if line.startswith("Features: ")]
    assert bar[0].startswith("Features:   0%|")
    assert re.fullmatch(rf"Features: 100%\|.*\| {expected}, 00:\d\d passed, 00:00 left *", bar[-1])


def test_the_last_line(checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """One line in a log file, and no bar; also if nothing was left to do."""
    for name in ("a", "b"):
        noise(tmp_path / "audio" / f"{name}.wav", 288_000)
    out = tmp_path / "u.jsonl"
    arguments = ["units", str(tmp_path / "audio"), str(out), "--model", str(checkpoint), "--layer", "3"]
    for said in (f"{out}: 2 recordings (0.6 min) encoded", f"nothing left to do: {out} has all of these recordings"):
        assert main(arguments) == 0
        lines = capsys.readouterr().err.splitlines()
        assert [line[-len(said) :] for line in lines if "all frames have unit" not in line] == [said]


def test_a_log_file_gets_a_line_a_minute(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    now = 1000.0
    monkeypatch.setattr(progress.time, "monotonic", lambda: now)
    with closing(progress.Progress("Units", 1000, "h of audio", 0.01)) as advance:
        for _ in range(10):
            now += 20
            advance(100)
    assert [record.getMessage() for record in caplog.records] == [
        f"Units: {share}% of 10.00 h of audio, {left} left"
        for share, left in ((30, "02:20"), (60, "01:20"), (90, "00:20"))
    ]


def test_benchmark() -> None:
    """It runs without the published package."""
    benchmark = Path(__file__).parents[2] / "benchmarks" / "extract.py"
    result = subprocess.run(
        [sys.executable, benchmark, PROMPTS, "--quick"], capture_output=True, text=True, timeout=250, check=True
    )
    table = [line.split("|") for line in result.stdout.splitlines() if line.startswith("|")]
    assert [cells[1].strip() for cells in table[2:]] == ["units of layer 6"] * 2 + ["features of layer 6"] * 2
    assert all(float(cells[3]) > 0 for cells in table[2:])
