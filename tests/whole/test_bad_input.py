"""Wrong input to the real command line: exit status 2, one line that says what is wrong, nothing left behind."""

from __future__ import annotations

import io
import json
import os
import pickle
import resource
import subprocess
import sys
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch

from helpers.ports import free_port
from helpers.processes import CONTEXT
from helpers.tiny_run import write_config, write_recordings
from spidr.data import read_manifest
from spidr.data.write_manifest import write_manifest_tar

Break = Callable[[Path, Path], dict[str, Any] | None]
"""Given the folder and the manifest, breaks something; may return sections of the configuration."""


def _first_recording(manifest: Path) -> Path:
    return Path(manifest.read_text("utf-8").splitlines()[1].split(",")[1])


def _rewrite(**options: Any) -> Break:
    def rewrite(folder: Path, manifest: Path) -> None:
        samples, rate = soundfile.read(_first_recording(manifest))
        samples = np.stack([samples] * options.get("channels", 1), axis=1)
        soundfile.write(_first_recording(manifest), samples, options.get("rate", rate))

    return rewrite


def _missing_manifest(folder: Path, manifest: Path) -> None:
    manifest.unlink()


def _missing_column(folder: Path, manifest: Path) -> None:
    manifest.write_text(manifest.read_text("utf-8").replace("path", "file", 1), encoding="utf-8")


def _vanished(folder: Path, manifest: Path) -> None:
    _first_recording(manifest).unlink()


def _empty(folder: Path, manifest: Path) -> None:
    _first_recording(manifest).write_bytes(b"")


def _nan(folder: Path, manifest: Path) -> None:
    samples, rate = soundfile.read(_first_recording(manifest), dtype="float32")
    samples[100] = float("nan")
    soundfile.write(_first_recording(manifest), samples, rate, subtype="FLOAT")


def _huge_samples(folder: Path, manifest: Path) -> None:
    """The squares would overflow, and all standardised samples become zero."""
    samples, rate = soundfile.read(_first_recording(manifest), dtype="float32")
    soundfile.write(_first_recording(manifest), samples * np.float32(1e30), rate, subtype="FLOAT")


def _damaged_in_archive(folder: Path, manifest: Path) -> None:
    """AIFF named WAV, one with a chunk that ends before it begins, so that libsndfile seeks to before the file.

    It reads members of archives through Python functions, whose errors only appear as tracebacks.
    """
    with tarfile.open(folder / "a.tar", "w") as archive:
        for wav in sorted((manifest.parent / "audio").iterdir()):
            file = io.BytesIO()
            soundfile.write(file, *soundfile.read(wav), format="AIFF")
            content = file.getvalue()
            info = tarfile.TarInfo(wav.name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    write_manifest_tar(folder / "a.tar", manifest)
    with (folder / "a.tar").open("r+b") as tar:
        tar.seek(read_manifest(manifest)["byte_offset"][2] + 31)
        tar.write(b"\xff" * 8)


def _damaged_flac(folder: Path, manifest: Path) -> None:
    wav = _first_recording(manifest)
    flac = wav.with_suffix(".flac")
    soundfile.write(flac, *soundfile.read(wav))
    data = bytearray(flac.read_bytes())
    data[len(data) // 2 : len(data) // 2 + 500] = bytes(500)
    flac.write_bytes(data)
    manifest.write_text(manifest.read_text("utf-8").replace(str(wav), str(flac)), encoding="utf-8")


def _short(folder: Path, manifest: Path) -> dict[str, Any]:
    return {"data": {"min_sample_size": 12_000}}


def _not_a_folder(folder: Path, manifest: Path) -> dict[str, Any]:
    (folder / "file").touch()
    return {"run": {"workdir": str(folder / "file" / "runs")}}


def _read_only(folder: Path, manifest: Path) -> dict[str, Any]:
    return {"run": {"workdir": "/proc/runs"}}


class _Evil:
    def __reduce__(self) -> Any:
        return os.system, ("touch executed",)


def _malicious(folder: Path, manifest: Path) -> dict[str, Any]:
    torch.save({"model": {"x": _Evil()}}, folder / "evil.pt")
    return {"run": {"init_ckpt": str(folder / "evil.pt")}}


def _malicious_pickle(folder: Path, manifest: Path) -> dict[str, Any]:
    (folder / "evil.pt").write_bytes(pickle.dumps({"model": _Evil()}))
    return {"run": {"init_ckpt": str(folder / "evil.pt")}}


def _other_shape(folder: Path, manifest: Path) -> dict[str, Any]:
    torch.save({"model": {"mask_embedding": torch.zeros(7)}}, folder / "other.pt")
    return {"run": {"init_ckpt": str(folder / "other.pt")}}


def _setting(section: str, **values: Any) -> Break:
    return lambda folder, manifest: {section: values}


BEFORE_THE_FOLDER = [
    (_setting("model", encoder_embed_dim=10**9), "model.encoder_embed_dim: found 1000000000, accepted: an integer of"),
    (
        _setting("model", encoder_embed_dim=65_536, encoder_num_layers=1000, encoder_ff_interm_features=1_000_000),
        "a model of encoder_embed_dim = 65536, encoder_num_layers = 1000, encoder_ff_interm_features = 1000000: would",
    ),
    (
        _setting("model", extractor_conv_layer_config=[[16, 10, 5], [65_536, 3, 2], [65_536, 60_000, 2]]),
        "a model of extractor_conv_layer_config = [(16, 10, 5), (65536, 3, 2), (65536, 60000, 2)]: would take",
    ),
    (
        _setting("model", encoder_embed_dim=65_536, encoder_pos_conv_kernel=65_536, encoder_pos_conv_depth=1),
        "a model of encoder_embed_dim = 65536, encoder_pos_conv_kernel = 65536, encoder_pos_conv_depth = 1, encoder_",
    ),
    (
        _setting("model", encoder_embed_dim=65_536, codebook_size=1_000_000),
        "a model of codebook_size = 1000000, num_codebooks = 3, encoder_embed_dim = 65536: would take",
    ),
    (_missing_manifest, "manifest.csv: the manifest does not exist"),
    (_missing_column, "manifest.csv: column 'path' is missing"),
    (_short, "manifest.csv: no recording has 12000 samples"),
    (_malicious, "evil.pt: "),
    (_malicious_pickle, "evil.pt: "),
    (_other_shape, "other.pt: not the weights of this SpidR"),
    (_not_a_folder, "the folder cannot be made (Not a directory)"),
    (_read_only, "run.workdir: /proc/runs/p/run: the folder cannot be made"),
]
WHILE_READING = [
    (_vanished, ".wav: the file does not exist"),
    (_empty, ".wav: "),
    (_nan, ".wav: the recording holds samples that are not finite"),
    (_damaged_flac, ".flac: "),
    (_rewrite(channels=2), ".wav: the recording has 2 channels"),
    (_rewrite(rate=8000), ".wav: the sample rate is 8000 Hz"),
    (_huge_samples, ".wav: the recording holds samples that are not finite"),
    (_damaged_in_archive, "a.tar:"),
]


def _command_line(config: str, cwd: str, module: str, log: str, variables: dict[str, str], limit: int | None) -> None:
    """Runs in its own process like ``python -m MODULE CONFIG``, with everything already imported."""
    os.chdir(cwd)
    os.environ |= variables
    for number in (1, 2):
        os.dup2(os.open(log, os.O_CREAT | os.O_WRONLY | os.O_APPEND), number)
    sys.stdout = sys.stderr = open(2, "w", encoding="utf-8", buffering=1, closefd=False)  # noqa: SIM115
    sys.argv = [module, config]
    if limit is not None:
        import signal

        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    if module == "spidr":
        from spidr.__main__ import main
    else:
        from spidr.__main__ import main
    sys.exit(main())


def run(
    config: Path, module: str = "spidr", variables: dict[str, str] | None = None, limit: int | None = None
) -> tuple[int | None, str]:
    """Exit status and output of a command line."""
    log = config.with_suffix(".out")
    process = CONTEXT.Process(
        target=_command_line, args=(str(config), str(config.parent), module, str(log), variables or {}, limit)
    )
    process.start()
    process.join(120)
    return process.exitcode, log.read_text()


def assert_refused(status: int | None, printed: str, message: str) -> None:
    errors = [line for line in printed.splitlines() if line.startswith("error: ")]
    assert status == 2, printed
    assert len(errors) == 1, printed
    assert message in errors[0]
    assert "Traceback" not in printed


@pytest.mark.parametrize(("break_it", "message"), BEFORE_THE_FOLDER)
def test_found_before_anything_is_written(tmp_path: Path, break_it: Break, message: str) -> None:
    manifest = write_recordings(tmp_path / "data", count=6)
    sections = break_it(tmp_path, manifest) or {}
    config = write_config(tmp_path, manifest, **sections)
    before = set(tmp_path.rglob("*"))
    assert_refused(*run(config), message)
    assert set(tmp_path.rglob("*")) - before == {config.with_suffix(".out")}


@pytest.mark.parametrize(("break_it", "message"), WHILE_READING)
def test_found_in_a_recording(tmp_path: Path, break_it: Break, message: str) -> None:
    manifest = write_recordings(tmp_path / "data", count=6)
    sections = break_it(tmp_path, manifest) or {}
    sections.setdefault("data", {})["num_workers"] = 1
    config = write_config(tmp_path, manifest, **sections)
    assert_refused(*run(config, "spidr.train"), message)
    assert not list(tmp_path.rglob(".*.tmp"))


def test_damaged_recordings_in_an_archive_are_skipped(tmp_path: Path) -> None:
    manifest = write_recordings(tmp_path / "data", count=6)
    _damaged_in_archive(tmp_path, manifest)
    data = {"on_error": "skip", "num_workers": 1}
    config = write_config(tmp_path, manifest, data=data, optimizer={"max_steps": 2})
    document = json.loads(config.read_text())
    config.write_text(json.dumps(document | {"validation": {}}))
    status, printed = run(config)
    assert status == 0, printed
    assert printed.count("Skipped: ") == 1
    assert "a.tar:2.wav: " in printed
    assert "Traceback" not in printed


def test_checkpoint_of_another_shape(tmp_path: Path) -> None:
    manifest = write_recordings(tmp_path / "data", count=6)
    config = write_config(
        tmp_path, manifest, optimizer={"max_steps": 1}, validation={"dev": {"manifest": str(manifest)}}
    )
    assert run(config)[0] == 0
    saved = {path: path.read_bytes() for path in (tmp_path / "p" / "run").glob("*.pt")}
    config = write_config(tmp_path, manifest, model={"codebook_size": 10})
    assert_refused(*run(config), "other settings: model.codebook_size = 12 there, 10 here")
    assert {path: path.read_bytes() for path in (tmp_path / "p" / "run").glob("*.pt")} == saved


def test_disk_full_while_saving(tmp_path: Path) -> None:
    """The previous checkpoint is kept; once there is space, the same command resumes."""
    manifest = write_recordings(tmp_path / "data", count=6)
    config = write_config(tmp_path, manifest, run={"save_interval": 2}, optimizer={"max_steps": 5})
    folder = tmp_path / "p" / "run"
    # The first checkpoint has no optimizer state yet and fits.
    assert_refused(*run(config, limit=600_000), "step_2.pt: cannot be written (File too large)")
    assert sorted(path.name for path in folder.glob("*.pt")) == ["step_0.pt"]
    assert not list(folder.glob(".*.tmp"))
    config.with_suffix(".out").unlink()
    assert run(config)[0] == 0
    assert (folder / "final.pt").exists()


def test_one_message_for_all_processes(tmp_path: Path) -> None:
    manifest = write_recordings(tmp_path / "data", count=12)
    config = write_config(tmp_path, manifest)
    _vanished(tmp_path, manifest)
    torchrun = [
        sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", f"--master-port={free_port()}",
        "-m", "spidr.train", str(config),
    ]  # fmt: skip
    done = subprocess.run(
        torchrun, capture_output=True, text=True, timeout=250, check=False, env=os.environ | {"OMP_NUM_THREADS": "1"}
    )
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert done.returncode != 0
    assert len(errors) == 1, done.stderr
    assert "the file does not exist" in errors[0]
    assert "exitcode  : 2" in done.stderr
    assert "InputError" not in done.stderr


@pytest.mark.parametrize(("rank", "messages"), [("0", 1), ("1", 0)])
def test_configuration_is_refused_by_one_process_of_a_machine(tmp_path: Path, rank: str, messages: int) -> None:
    config = write_config(tmp_path, tmp_path / "none.csv", run={"save_intervall": 3})
    status, printed = run(config, "spidr.train", {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": "2"})
    assert (status, printed.count("error: ")) == (2, messages)
