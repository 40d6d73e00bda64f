"""Thousands of damaged, mistyped and absurd inputs are read correctly, or refused with one message that says where.

Every run generates the same inputs. Set SPIDR_FUZZ to multiply the number of cases and draw new ones.
"""

from __future__ import annotations

import contextlib
import gzip
import importlib
import io
import json
import os
import random
import resource
import shutil
import struct
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
import soundfile
import torch
from hypothesis import HealthCheck, given, settings, strategies as st

from helpers.small_models import TINY, tiny_config, tiny_model
from helpers.tiny_run import write_config, write_recordings
from spidr.checkpoint import Checkpointer, read_checkpoint
from spidr.config import read_config
from spidr.data import read_manifest
from spidr.data.alignments import read_alignments
from spidr.data.audio import Recording, num_samples, read_audio, read_resampled, statistics
from spidr.data.units import read_units
from spidr.data.write_manifest import write_manifest_tar
from spidr.evaluate import FeatureFolder
from spidr.evaluate.abx import read_items
from spidr.export import export_safetensors
from spidr.extract.kmeans import KMeans
from spidr.models import build_model
from spidr.models.fairseq import load_fairseq_weights
from spidr.models.hub import load_encoder, load_weights, recorded_config
from spidr.tools.errors import InputError
from spidr.tools.metrics import read_metrics

TIMES = int(os.environ.get("SPIDR_FUZZ", "1"))
MEMORY = 2 << 30
"""Bytes that a case may allocate beyond those in use at the start."""


def cases(count: int) -> Any:
    """Run a test on this many generated cases."""
    return settings(
        max_examples=count * TIMES,
        derandomize=TIMES == 1,
        database=None,
        deadline=None,
        suppress_health_check=list(HealthCheck),
    )


@pytest.fixture(scope="module", autouse=True)
def _little_memory() -> Iterator[None]:
    """Make absurd allocations fail at once."""
    before = resource.getrlimit(resource.RLIMIT_AS)
    in_use = int(Path("/proc/self/statm").read_text("utf-8").split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (in_use + MEMORY, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_AS, before)


@contextlib.contextmanager
def folder_of(name: str, content: bytes) -> Iterator[Path]:
    """A file in a folder that must contain nothing else afterwards."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / name
        path.write_bytes(content)
        yield path
        assert [p.name for p in Path(folder).iterdir()] == [name]


def attempt(read: Callable[[], Any], place: Path | str) -> Any:
    """The result of a reader, or None if it refused the input properly."""
    try:
        return read()
    except InputError as error:
        message = str(error)
        assert str(place) in message
        assert len(message) < 20_000
        return None


# --------------------------------------------------------------------------------------------------------------------
# Ways to break input

NOISE = [
    b"", b"\0", b"\xff", b"\xef\xbb\xbf", b"\r\n", b"\r", b"\n\n", b'"', b"'", b"{", b"[", b"]]", b"}", b",", b":",
    b"\t", b" ", b"=", b"#", b"\\", b"-", b"1e999", b"NaN", b"null", b"9" * 25, b"\xed\xa0\x80", "\u2028é🎉".encode(),
    b"\xff\xff\xff\xff", b"\0" * 8, b"\x7f\xff\xff\xff", b"[" * 10_000, b"../" * 3, b"$(touch executed)",
]  # fmt: skip


@st.composite
def damaged(draw: st.DrawFn, valid: bytes) -> bytes:
    """A file with something cut off, changed, inserted, removed or repeated."""
    content = valid
    for _ in range(draw(st.integers(1, 3))):
        at = draw(st.integers(0, max(0, len(content) - 1)))
        until = min(len(content), at + draw(st.sampled_from([1, 1, 2, 4, 16, 100])))
        kind = draw(st.sampled_from(["cut", "change", "put in", "put in", "replace", "leave out", "double"]))
        if kind == "cut":
            content = content[:at]
        elif kind == "change":
            content = content[:at] + bytes([draw(st.integers(0, 255))]) + content[at + 1 :]
        elif kind == "put in":
            content = content[:at] + draw(st.sampled_from(NOISE)) + content[at:]
        elif kind == "replace":
            content = content[:at] + draw(st.sampled_from(NOISE)) + content[until:]
        elif kind == "leave out":
            content = content[:at] + content[until:]
        else:
            content = content[:until] + content[at:until] + content[until:]
    return content


ODD = [
    "null", "true", "false", "0", "-1", "1", "3", "2147483648", "9223372036854775807", "9223372036854775808",
    "1" + "0" * 30, "1" * 5000, "0.5", "1.0", "-0.0", "1e308", "1e999", "NaN", "-Infinity", '""', '"x"', '"\\u0000"',
    '"\\ud800"', '"\\u2028"', '"🎉"', '"../../x"', '"/etc/passwd"', '"$(touch executed)"', f'"{"a" * 300}"',
    f'"{"b" * 70_000}"', "[]", "[1]", "[null]", "[[]]", "[1e10]", '["a", "b"]', '[["a", 0, 1]]', '[["a", 0, 1e12]]',
    '[["a", 1, 0]]', '[["a", NaN, 1]]', "{}", '{"a": 1}', "[" * 10_000 + "]" * 10_000,
    '{"a": ' * 10_000 + "1" + "}" * 10_000,
]  # fmt: skip
"""JSON values of unexpected types."""
HOLE = "@hole@"


@st.composite
def mistyped(draw: st.DrawFn, valid: Any) -> str:
    """The JSON of a document with values replaced, removed, repeated or added."""
    document = json.loads(json.dumps(valid))
    fragments = []
    for _ in range(draw(st.integers(1, 2))):
        holder: Any = document
        while True:
            keys = list(holder) if isinstance(holder, dict) else list(range(len(holder)))
            if not keys:
                break
            key = draw(st.sampled_from(keys))
            if not isinstance(holder[key], (dict, list)) or draw(st.booleans()):
                break
            holder = holder[key]
        if not keys:
            continue
        kind = draw(st.sampled_from(["replace", "replace", "replace", "leave out", "add"]))
        if kind == "leave out":
            del holder[key]
        elif isinstance(holder, dict):
            holder[key if kind == "replace" else draw(st.sampled_from(["x", "", "step", "é", "a b"]))] = HOLE
            fragments.append(draw(st.sampled_from(ODD)))
        else:
            holder[key] = HOLE
            fragments.append(draw(st.sampled_from(ODD)))
    text = json.dumps(document)
    for fragment in fragments:
        text = text.replace(f'"{HOLE}"', fragment, 1)
    return text


# --------------------------------------------------------------------------------------------------------------------
# Configurations

CONFIG: dict[str, Any] = {
    "run": {"workdir": "w", "wandb_project": "p", "wandb_name": "n", "model_type": "spidr", "compile": False},
    "data": {"manifest": "m.csv", "num_buckets": 3, "max_sample_size": 12_000, "max_batch_length": 24_000},
    "validation": {"dev": {"manifest": "d.csv"}},
    "optimizer": {"dtype": "float32", "lr": 1e-3, "betas": [0.9, 0.95], "to_freeze": ["feature_extractor"]},
    "masking": {"mask_prob": 0.8},
    "model": TINY,
}


def to_toml(document: str) -> str:
    """JSON sections as TOML, whose values are almost JSON's."""
    lines = []
    for section, table in json.loads(document).items():
        if isinstance(table, dict):
            lines += [f"[{json.dumps(section)}]", *(f"{json.dumps(k)} = {json.dumps(v)}" for k, v in table.items())]
        else:
            lines.insert(0, f"{json.dumps(section)} = {json.dumps(table)}")
    return "\n".join(lines) + "\n"


def check_config(name: str, content: bytes) -> None:
    with folder_of(name, content) as path:
        if (config := attempt(lambda: read_config(path), path)) is not None:
            assert config.run.dir.parts[-1] not in ("", "..")
            assert config.data.max_sample_size <= config.data.max_batch_length


@given(mistyped(CONFIG))
@cases(300)
def test_configuration_in_json(text: str) -> None:
    check_config("c.json", text.encode("utf-8", "surrogatepass"))


@given(st.one_of(damaged(to_toml(json.dumps(CONFIG)).encode()), damaged(json.dumps(CONFIG).encode())), st.booleans())
@cases(200)
def test_damaged_configuration(content: bytes, as_json: bool) -> None:
    check_config("c.json" if as_json else "c.toml", content)


@given(mistyped(CONFIG))
@cases(150)
def test_configuration_in_toml(text: str) -> None:
    with contextlib.suppress(ValueError, RecursionError):  # what Python's JSON cannot represent
        text = to_toml(text)
    check_config("c.toml", text.encode("utf-8", "surrogatepass"))


@given(st.one_of(mistyped(CONFIG), mistyped({"model_type": "spidr", "model": TINY}), mistyped(TINY)))
@cases(100)
def test_configuration_beside_a_checkpoint(text: str) -> None:
    with folder_of("config.json", text.encode("utf-8", "surrogatepass")) as path:
        attempt(lambda: recorded_config(path.with_name("x.pt"), "spidr"), path)


# --------------------------------------------------------------------------------------------------------------------
# Tables

ROWS = [
    {"fileid": f"r{i}", "path": f"/a/r{i}.wav", "num_samples": 1000 + i, "archive": "/t.tar", "byte_offset": 512 * i,
     "byte_size": 300, "mean": 0.5, "std": 0.1}
    for i in range(3)
]  # fmt: skip
CSV = pl.DataFrame(ROWS).write_csv().encode()
SHORT_CSV = b"fileid,path,num_samples\r\na,/a.wav,1\r\nb,/b.wav,2\r\n"
TSV = b"/root\na.wav\t16000\nsub/b.wav\t3\n"


def check_manifest(name: str, content: bytes) -> None:
    with folder_of(name, content) as path:
        manifest = attempt(lambda: read_manifest(path), path)
        if manifest is None:
            return
        assert manifest.height > 0
        for column in {"fileid", "path"} & set(manifest.columns):  # lists of units have no paths
            assert not any(value is None or "\0" in value for value in manifest[column])
        assert "num_samples" not in manifest.columns or min(manifest["num_samples"].to_list()) >= 0
        if name.endswith(".jsonl") and "num_samples" in manifest.columns:
            rows = [json.loads(line) for line in content.decode("utf-8-sig").split("\n") if line.strip()]
            assert [float(row["num_samples"]) for row in rows] == manifest["num_samples"].to_list()


@given(st.one_of(damaged(CSV), damaged(SHORT_CSV)))
@cases(250)
def test_manifest_in_csv(content: bytes) -> None:
    check_manifest("m.csv", content)


@given(st.lists(mistyped(ROWS[0]), min_size=1, max_size=3).map("\n".join), st.booleans())
@cases(150)
def test_manifest_in_json_lines(text: str, first_is_valid: bool) -> None:
    text = json.dumps(ROWS[0]) + "\n" + text if first_is_valid else text
    check_manifest("m.jsonl", text.encode("utf-8", "surrogatepass"))


@given(damaged("\n".join(map(json.dumps, ROWS)).encode()))
@cases(100)
def test_damaged_manifest_in_json_lines(content: bytes) -> None:
    check_manifest("m.jsonl", content)


@given(damaged(TSV))
@cases(120)
def test_manifest_of_fairseq(content: bytes) -> None:
    check_manifest("m.tsv", content)


ALIGNED = [
    {"fileid": "a", "phones": ["SIL", "AH", "AH", "T"]},
    {"fileid": "b", "phones": [["AH", 0.0, 0.1], ["T", 0.1, 0.25]], "duration": 0.3},
]
GRID = b"""File type = "ooTextFile"
Object class = "TextGrid"

xmin = 0
xmax = 0.5
tiers? <exists>
size = 1
item []:
    item [1]:
        class = "IntervalTier"
        name = "phones"
        xmin = 0
        xmax = 0.5
        intervals: size = 2
        intervals [1]:
            xmin = 0
            xmax = 0.25
            text = "AH"
        intervals [2]:
            xmin = 0.25
            xmax = 0.5
            text = ""
"""


def check_alignments(name: str, content: bytes) -> None:
    with folder_of(name, content) as path:
        for phones in (attempt(lambda: read_alignments(path), path) or {}).values():
            assert len(phones) <= 8_640_000
            assert all(isinstance(phone, str) for phone in phones[:100])


@given(st.lists(st.sampled_from(ALIGNED).flatmap(mistyped), min_size=1, max_size=2).map("\n".join), st.booleans())
@cases(200)
def test_alignments(text: str, zipped: bool) -> None:
    content = text.encode("utf-8", "surrogatepass")
    check_alignments("a.jsonl.gz" if zipped else "a.jsonl", gzip.compress(content, 1) if zipped else content)


@given(damaged(gzip.compress("\n".join(map(json.dumps, ALIGNED)).encode())), st.booleans())
@cases(150)
def test_damaged_gzip(content: bytes, as_units: bool) -> None:
    if as_units:
        check_units("u.jsonl.gz", content)
    else:
        check_alignments("a.jsonl.gz", content)


@given(damaged(GRID))
@cases(150)
def test_textgrids(content: bytes) -> None:
    check_alignments("a.TextGrid", content)


ITEMS = b"#file onset offset #phone prev-phone next-phone speaker\na 0.1 0.2 AH T B s1\nb 0.25 0.5 AH T B s2\n"
ODD_TIMES = ["1/0", "1e999999999", "-1", "nan", "inf", "0x1", "1_0", "1" * 5000, "٣", "1e-400", "", "0.3"]


def check_items(content: bytes) -> None:
    with folder_of("x.item", content) as path:
        if (items := attempt(lambda: read_items(path), path)) is not None:
            assert all(-0.1 <= onset <= offset for onset, offset in items.times)


@given(st.one_of(damaged(ITEMS), st.sampled_from(ODD_TIMES).map(lambda t: ITEMS.replace(b"0.1", t.encode()))))
@cases(150)
def test_items(content: bytes) -> None:
    check_items(content)


UNITS = [{"fileid": "a", "units": [1, 2, 3]}, {"audio": "/x/b.wav", "units": [4, 5], "durations": [2, 1]}]


def check_units(name: str, content: bytes) -> None:
    with folder_of(name, content) as path:
        for units in (attempt(lambda: read_units(path), path) or {}).values():
            assert units.dtype == np.int64
            assert units.ndim == 1


@given(st.lists(st.sampled_from(UNITS).flatmap(mistyped), min_size=1, max_size=2).map("\n".join), st.booleans())
@cases(200)
def test_units(text: str, zipped: bool) -> None:
    content = text.encode("utf-8", "surrogatepass")
    check_units("u.jsonl.gz" if zipped else "u.jsonl", gzip.compress(content, 1) if zipped else content)


@cache
def parquet() -> bytes:
    file = io.BytesIO()
    pl.DataFrame({"fileid": ["a", "b"], "units": [[1, 2], [3]], "durations": [[1, 1], [2]]}).write_parquet(file)
    return file.getvalue()


@given(st.data())
@cases(80)
def test_units_in_parquet(data: st.DataObject) -> None:
    check_units("u.parquet", data.draw(damaged(parquet())))


@given(st.lists(mistyped({"step": 3, "group": "train", "loss": 0.5, "lr": 0.1}), max_size=3).map("\n".join))
@cases(80)
def test_metrics(text: str) -> None:
    with folder_of("metrics.jsonl", text.encode("utf-8", "surrogatepass")) as path:
        for line in read_metrics(path):
            assert isinstance(line["step"], int)


# --------------------------------------------------------------------------------------------------------------------
# Recordings

SAMPLES = 0.1 * np.random.default_rng(0).standard_normal(4000).astype(np.float32)


@cache
def recording(name: str, subtype: str | None = None) -> bytes:
    file = io.BytesIO()
    soundfile.write(file, SAMPLES, 16_000, format=name, subtype=subtype)
    return file.getvalue()


ENCODED = [("WAV", "PCM_16"), ("WAV", "FLOAT"), ("WAV", "PCM_U8"), ("WAVEX", "PCM_24"), ("RF64", "PCM_16"),
           ("FLAC", "PCM_16"), ("FLAC", "PCM_24"), ("AIFF", "PCM_16"), ("AU", "PCM_16"), ("CAF", "FLOAT")]  # fmt: skip


def check_audio(content: bytes, name: str) -> None:
    with folder_of(name, content) as path:
        in_archive = Recording("m.wav", str(path), 0, len(content))
        for source in (str(path), in_archive):
            length = attempt(lambda source=source: num_samples(source), path)
            samples = attempt(lambda source=source: read_audio(source), path)
            attempt(lambda source=source: statistics(source), path)
            if samples is not None:
                assert samples.dtype == np.float32
                assert np.isfinite(samples).all()
                assert length == len(samples) > 0
                assert attempt(lambda source=source: len(read_audio(source, 0, 1)), path) == 1


@given(st.data(), st.sampled_from(ENCODED), st.sampled_from(["x.wav", "x.flac"]))
@cases(200)
def test_recordings(data: st.DataObject, kind: tuple[str, str], name: str) -> None:
    check_audio(data.draw(damaged(recording(*kind))), name)


@given(st.data(), st.sampled_from(ENCODED[:7]), st.integers(0, 120), st.binary(min_size=1, max_size=8))
@cases(200)
def test_headers_of_recordings(data: st.DataObject, kind: tuple[str, str], at: int, change: bytes) -> None:
    content = recording(*kind)
    check_audio(content[:at] + change + content[at + len(change) :], "x.flac" if kind[0] == "FLAC" else "x.wav")


@given(st.data(), st.sampled_from(["OGG", "MP3", "WAV"]), st.sampled_from(["x.ogg", "x.mp3", "x.m4a"]))
@cases(40)
def test_other_formats(data: st.DataObject, kind: str, name: str) -> None:
    with folder_of(name, data.draw(damaged(recording(kind)))) as path:
        samples = attempt(lambda: read_resampled(str(path)), path)
        assert samples is None or np.isfinite(samples).all()


@cache
def archive() -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w", format=tarfile.PAX_FORMAT) as tar:
        for name in ("a.wav", "d" * 120 + "/b.wav", "é.wav", "c.txt"):
            member = tarfile.TarInfo(name)
            content = recording("WAV", "PCM_16")[:844] if name == "c.txt" else _short_wav()
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return file.getvalue()


def _short_wav() -> bytes:
    file = io.BytesIO()
    soundfile.write(file, SAMPLES[:100], 16_000, format="WAV", subtype="PCM_16")
    return file.getvalue()


def headers(content: bytes) -> list[int]:
    """Positions of the headers in an archive."""
    with tarfile.open(fileobj=io.BytesIO(content)) as tar:
        return [member.offset for member in tar]


@st.composite
def damaged_archive(draw: st.DrawFn) -> bytes:
    """An archive with a changed header field and a valid checksum."""
    content = bytearray(archive())
    begin = draw(st.sampled_from(headers(archive())))
    place, size = draw(
        st.sampled_from([(0, 100), (100, 8), (124, 12), (124, 12), (124, 12), (156, 1), (257, 8), (345, 155)])
    )
    values = st.one_of(
        st.binary(min_size=size, max_size=size),
        st.sampled_from([b"\xff" * size, b"\x80" + b"\0" * (size - 1), b"\x80" + b"\xff" * (size - 1), b"7" * size]),
        st.sampled_from("0123456789LKSxgDIMV").map(lambda c: c.encode().ljust(size, b"\0")),
        st.integers(-(1 << 40), 1 << 40).map(lambda n: (n % (1 << 96)).to_bytes(12, "big")[-size:]),
    )
    content[begin + place : begin + place + size] = draw(values)[:size].ljust(size, b"\0")
    content[begin + 148 : begin + 156] = b" " * 8
    content[begin + 148 : begin + 156] = b"%06o\0 " % sum(content[begin : begin + 512])
    return bytes(content)


def check_archive(content: bytes) -> None:
    with tempfile.TemporaryDirectory() as folder:
        tar, output = Path(folder) / "a.tar", Path(folder) / "m.csv"
        tar.write_bytes(content)
        attempt(lambda: write_manifest_tar(tar, output), tar)
        assert {path.name for path in Path(folder).iterdir()} <= {"a.tar", "m.csv"}
        if output.exists():
            for row in read_manifest(output).iter_rows(named=True):
                place = Recording(row["path"], row["archive"], row["byte_offset"], row["byte_size"])
                assert row["byte_offset"] + row["byte_size"] <= len(content)
                samples = attempt(lambda place=place: read_audio(place), tar)
                assert samples is None or len(samples) == row["num_samples"]


@given(st.one_of(damaged_archive(), st.deferred(lambda: damaged(archive()))))
@cases(200)
def test_archives(content: bytes) -> None:
    check_archive(content)


# --------------------------------------------------------------------------------------------------------------------
# Models

ODD_OBJECTS: list[Any] = [
    None, True, -1, 0, 1 << 62, 1 << 70, 0.5, float("nan"), "", "x", b"x", (), [], {}, {"a": 1}, [1], torch.zeros(0),
    torch.zeros(3), torch.zeros(2, 2), torch.zeros(1).expand(1 << 40), torch.zeros(4, dtype=torch.complex64),
    torch.zeros(2, 2).to_sparse(), torch.full((16,), float("nan")), torch.nn.Parameter(torch.zeros(2)),
]  # fmt: skip


def changed(valid: dict[str, Any], seed: int) -> dict[str, Any]:
    """Nested dictionaries with something replaced, removed or renamed."""

    def copy(value: Any) -> Any:
        return {key: copy(item) for key, item in value.items()} if isinstance(value, dict) else value

    document, rng = copy(valid), random.Random(seed)
    for _ in range(rng.randint(1, 2)):
        holder = document
        while holder:
            key = rng.choice(list(holder))
            if isinstance(holder[key], dict) and rng.random() < 0.75:
                holder = holder[key]
                continue
            value, kind = holder.pop(key), rng.choice(["replace", "replace", "leave out", "rename"])
            if kind == "replace":
                holder[key] = rng.choice(ODD_OBJECTS)
            elif kind == "rename":
                holder[rng.choice(["x", 7, "module.x", ("a",)])] = value
            break
    return document


SEEDS = st.integers(0, 1 << 30)
"""Seeds of changes to inputs that are too large to print when a test fails."""


@cache
def checkpoint() -> dict[str, Any]:
    """A checkpoint after one step."""
    model = tiny_model()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    return {
        "model": dict(model.state_dict()), "optimizer": optimizer.state_dict(), "scheduler": {"last_epoch": 1},
        "scaler": {}, "epoch": 0, "step": 1, "position": 3, "means": {"loss": [1.0, 1]}, "idle": [torch.zeros(12)],
    }  # fmt: skip


def saved(document: Any, *, legacy: bool = False) -> bytes:
    file = io.BytesIO()
    torch.save(document, file, _use_new_zipfile_serialization=not legacy)
    return file.getvalue()


@cache
def small_checkpoint(legacy: bool) -> bytes:
    weights = {"a": torch.arange(6.0).reshape(2, 3), "b": torch.ones(2, dtype=torch.int64)}
    rest = {"optimizer": {}, "scheduler": {}, "scaler": {}, "epoch": 0, "step": 1}
    return saved({"model": weights, **rest}, legacy=legacy)


def check_weights(content: bytes) -> None:
    with folder_of("step_1.pt", content) as path:
        for read in (load_weights, load_fairseq_weights):
            for value in (attempt(lambda read=read: read(path), path) or {}).values():
                assert isinstance(value, torch.Tensor)
        attempt(lambda: read_checkpoint(path), path)


@given(st.booleans().flatmap(lambda legacy: damaged(small_checkpoint(legacy))))
@cases(150)
def test_damaged_checkpoints(content: bytes) -> None:
    check_weights(content)


@given(st.data())
@cases(150)
def test_checkpoints_with_another_pickle(data: st.DataObject) -> None:
    """The archive is complete, with valid checksums."""
    file = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(small_checkpoint(False))) as archive, zipfile.ZipFile(file, "w") as other:
        for name in archive.namelist():
            content = archive.read(name)
            other.writestr(name, data.draw(damaged(content)) if name.endswith("data.pkl") else content)
    check_weights(file.getvalue())


@given(SEEDS)
@cases(40)
def test_checkpoints_of_other_things(seed: int) -> None:
    """A run resumes only from a checkpoint that fits."""
    content = saved(changed(checkpoint(), seed))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "step_1.pt"
        path.write_bytes(content)
        model = tiny_model()
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.0)
        checkpointer = Checkpointer(folder, 1)
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda _: 1.0)
        checkpointer.init_state(model, optimizer, scheduler, torch.amp.GradScaler("cpu", enabled=False))
        if attempt(lambda: checkpointer.restore(path) or True, path):
            for parameter in model.parameters():
                parameter.grad = torch.zeros_like(parameter)
            optimizer.step()


@given(SEEDS)
@cases(60)
def test_weights_of_other_models(seed: int) -> None:
    with folder_of("x.pt", saved(changed({"model": checkpoint()["model"]}, seed))) as path:
        attempt(lambda: build_model(cfg=tiny_config(), checkpoint=path), path)


@cache
def safetensors() -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        export_safetensors(tiny_model(), Path(folder) / "m.safetensors")
        return (Path(folder) / "m.safetensors").read_bytes()


@st.composite
def damaged_safetensors(draw: st.DrawFn) -> bytes:
    """A file with a damaged header, of right or wrong length, or with other metadata."""
    content = safetensors()
    size = struct.unpack_from("<Q", content)[0]
    header = content[8 : 8 + size]
    kind = draw(st.sampled_from(["header", "length", "model", "all"]))
    if kind == "all":
        return draw(damaged(content))
    if kind == "length":
        return struct.pack("<Q", draw(st.sampled_from([0, 1, size - 1, size + 1, 1 << 30, 1 << 62]))) + content[8:]
    if kind == "header":
        header = draw(damaged(header))
    else:
        document = json.loads(header)
        metadata = document["__metadata__"]
        metadata["model"] = draw(mistyped(json.loads(metadata["model"])))
        metadata["model_type"] = draw(st.sampled_from(["spidr", "dinosr", "x", ""]))
        header = json.dumps(document).encode("utf-8", "surrogatepass")
    return struct.pack("<Q", len(header)) + header + content[8 + size :]


def check_safetensors(content: bytes) -> None:
    with folder_of("m.safetensors", content) as path:
        attempt(lambda: load_encoder(path), path)


@given(st.deferred(damaged_safetensors))
@cases(120)
def test_safetensors(content: bytes) -> None:
    check_safetensors(content)


@cache
def centroids() -> bytes:
    file = io.BytesIO()
    made = {"kind": "kmeans", "model": "x", "layer": 2, "weights": "0"}
    np.savez(file, centroids=np.zeros((3, 4), np.float32), made=json.dumps(made))
    return file.getvalue()


@st.composite
def other_centroids(draw: st.DrawFn) -> bytes:
    file = io.BytesIO()
    arrays = [
        np.zeros((3, 4)),
        np.zeros((3, 4), np.float32),
        np.full((1, 2), np.nan, np.float32),
        np.zeros(3),
        np.array("x"),
    ]
    made = draw(st.one_of(mistyped({"model": "x", "layer": 2, "weights": "0"}), st.just("x")))
    names = draw(st.sampled_from([("centroids", "made"), ("centroids", "x"), ("x", "made")]))
    save = draw(st.sampled_from([np.savez, np.savez, np.savez_compressed]))
    save(file, **dict(zip(names, (draw(st.sampled_from(arrays)), made.replace("\ud800", "")), strict=True)))
    return file.getvalue()


def check_kmeans(content: bytes) -> None:
    with folder_of("k.npz", content) as path:
        if (found := attempt(lambda: KMeans.load(path), path)) is not None:
            assert found.centroids.dtype == np.float32
            assert np.isfinite(found.centroids).all()
            assert isinstance(found.made["layer"], int)


@given(st.one_of(st.deferred(lambda: damaged(centroids())), other_centroids()))
@cases(120)
def test_kmeans(content: bytes) -> None:
    check_kmeans(content)


@cache
def features(suffix: str) -> bytes:
    file = io.BytesIO()
    if suffix == ".npy":
        np.save(file, np.zeros((5, 3), np.float32))
    else:
        torch.save(torch.zeros(5, 3), file)
    return file.getvalue()


@given(st.data(), st.sampled_from([".npy", ".pt"]))
@cases(100)
def test_features(data: st.DataObject, suffix: str) -> None:
    odd = st.sampled_from(ODD_OBJECTS).map(saved) if suffix == ".pt" else st.just(b"")
    with folder_of(f"a{suffix}", data.draw(st.one_of(damaged(features(suffix)), odd))) as path:
        found = attempt(lambda: FeatureFolder(path.parent)["a"], path)
        assert found is None or found.ndim == 2 or found.dtype.kind in "iu"


# --------------------------------------------------------------------------------------------------------------------
# Command lines


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Recordings and everything that goes with them, including bad files."""
    hard = resource.getrlimit(resource.RLIMIT_AS)[1]
    resource.setrlimit(resource.RLIMIT_AS, (hard, hard))  # threads that are started fail in odd ways without memory
    folder = tmp_path_factory.mktemp("corpus")
    manifest = write_recordings(folder, count=3)
    write_config(folder, manifest)
    names = [path.stem for path in sorted((folder / "audio").iterdir())]
    (folder / "a.jsonl").write_text(
        "".join(json.dumps({"fileid": n, "phones": ["AH", "T"] * 20}) + "\n" for n in names)
    )
    (folder / "u.jsonl").write_text("".join(json.dumps({"fileid": n, "units": [1, 2] * 10}) + "\n" for n in names))
    items = [f"{name} 0.0 0.1 {phone} B C s{i}" for i, name in enumerate(names) for phone in ("AH", "T", "AH")]
    (folder / "x.item").write_text("#file onset offset #phone prev-phone next-phone speaker\n" + "\n".join(items))
    export_safetensors(tiny_model(), folder / "m.safetensors")
    (folder / "k.npz").write_bytes(centroids())
    (folder / "t.tar").write_bytes(archive())
    (folder / "noise.bin").write_bytes(bytes(range(256)) * 8)
    (folder / "features").mkdir()
    for name in names:
        np.save(folder / "features" / f"{name}.npy", np.zeros((40, 3), np.float32))
    (folder / "run" / "validation").mkdir(parents=True)
    (folder / "run" / "config.json").write_text((folder / "run.json").read_text())
    (folder / "run" / "metrics.jsonl").write_text(
        '{"step": 0, "group": "train", "loss": "x"}\n{"step": 1, "group": 3}\n'
    )
    (folder / "run" / "validation" / "step_x.pending").touch()
    os.mkfifo(folder / "audio" / "pipe.flac")
    return folder


FILES = [
    "manifest.csv", "run.json", "a.jsonl", "u.jsonl", "x.item", "m.safetensors", "k.npz", "t.tar", "noise.bin", "audio",
    "audio/0.wav", "features", "run", "run/metrics.jsonl", ".", "missing.csv", "missing/x.csv",
    "a" * 300 + ".wav", "\udcff.csv", "$(touch executed)", "; touch executed", "", "/dev/null/x", "é\n.toml", "*.csv",
]  # fmt: skip
OUTPUTS = ["out.csv", "out.jsonl", "out.tsv", "out.npz", "out.parquet", "out.safetensors", "out", "deep/er/out.jsonl",
           "noise.bin/out.jsonl", "noise.bin", "/proc/out.npz", "b" * 300 + ".csv", ""]  # fmt: skip
NUMBERS = ["1", "0", "-1", "2", "7", "1.5", "nan", "inf", "1e999", "9" * 25, "1/0", "x", "", "100000000000"]
COMMANDS: dict[str, tuple[list[list[str]], list[str]]] = {
    "spidr": ([FILES], ["-A=a b", "-N=1", "-G=1", "-N=-1", "-t=NUMBER", "--mem-per-gpu=$(x)", "--dump=OUTPUT"]),
    "spidr.train": ([FILES[10:]], []),
    "spidr.data.write_manifest": ([FILES, OUTPUTS], ["--ext=flac", "--ext=", "--fairseq", "--stats", "--nonsense"]),
    "spidr.extract features": (
        [FILES, OUTPUTS],
        ["--layer=NUMBER", "--batch-seconds=NUMBER", "--window=NUMBER", "--context=NUMBER", "--threads=NUMBER",
         "--format=pt", "--store=float16", "--on-error=skip", "--resample", "--device=cuda", "--model=FILE"],
    ),
    "spidr.extract units": (
        [FILES, OUTPUTS],
        ["--layer=NUMBER", "--kmeans=FILE", "--dedup", "--batch-seconds=NUMBER", "--window=NUMBER", "--on-error=skip"],
    ),
    "spidr.extract kmeans": ([FILES, OUTPUTS], ["--units=NUMBER", "--max-frames=NUMBER", "--seed=NUMBER", "--layer=2"]),
    "spidr.evaluate units": ([FILES, FILES], ["--num-units=NUMBER", "--frame-step=NUMBER", "--tier=x", "--json"]),
    "spidr.evaluate abx": (
        [FILES, FILES],
        ["--frame-rate=NUMBER", "--max-size-group=NUMBER", "--max-x-across=NUMBER",
         "--distance=euclidean", "--distance=identical"],
    ),
    "spidr.evaluate model": (
        [FILES, FILES, FILES],
        ["--layers=NUMBER", "--max-batch-length=NUMBER", "--item=FILE", "--tier=x"],
    ),
    "spidr.export safetensors": ([FILES, OUTPUTS], []),
    "spidr.export transformers": ([FILES, OUTPUTS], []),
    "spidr.report": ([FILES], ["--output=OUTPUT", "--set=dev", "--set=x", "--layer=NUMBER", "--max-minutes=NUMBER"]),
    "spidr.tools.metrics_queue": ([FILES], ["--entity=e", "--runid=$(x)"]),
}  # fmt: skip
"""Command lines: candidates for arguments, and options."""
RIGHT = {
    "spidr": ["run.json", "--dry-run"],
    "spidr.data.write_manifest": ["audio", "out.csv"],
    "spidr.extract features": ["manifest.csv", "out", "--model=m.safetensors", "--quiet"],
    "spidr.extract units": ["manifest.csv", "out.jsonl", "--model=m.safetensors", "--quiet"],
    "spidr.extract kmeans": ["manifest.csv", "out.npz", "--model=m.safetensors", "--quiet", "--units=3"],
    "spidr.evaluate units": ["u.jsonl", "a.jsonl"],
    "spidr.evaluate abx": ["features", "x.item"],
    "spidr.evaluate model": ["m.safetensors", "manifest.csv", "a.jsonl", "--device=cpu"],
    "spidr.export safetensors": ["m.safetensors", "out.safetensors"],
    "spidr.export transformers": ["m.safetensors", "out"],
    "spidr.report": ["run", "--output=out"],
    "spidr.train": ["noise.bin"],
    "spidr.tools.metrics_queue": ["run", "--entity=e"],
}


@st.composite
def command_line(draw: st.DrawFn) -> tuple[str, list[str]]:
    name = draw(st.sampled_from(list(COMMANDS)))
    choices, options = COMMANDS[name]
    arguments = list(RIGHT[name])
    if name == "spidr" or draw(st.booleans()):
        at = draw(st.integers(0, len(choices) - 1))
        arguments[at] = draw(st.sampled_from(choices[at]))
    for option in draw(st.lists(st.sampled_from(options), max_size=2)) if options else ():
        option = option.replace("NUMBER", draw(st.sampled_from(NUMBERS)))
        option = option.replace("FILE", draw(st.sampled_from(FILES)))
        arguments.append(option.replace("OUTPUT", draw(st.sampled_from(OUTPUTS))))
    return name, arguments


def call(name: str, arguments: list[str]) -> tuple[int, str]:
    """Exit status and standard error of a command line, run in this process."""
    module, *command = name.split()
    packages = ("spidr", "spidr.extract", "spidr.export", "spidr.report")
    if module == "spidr.train":  # runs the package's own program
        module = "spidr"
    main = importlib.import_module(f"{module}.__main__" if module in packages else module).main
    errors, before = io.StringIO(), sys.argv
    sys.argv = [module, *arguments]
    try:
        with contextlib.redirect_stderr(errors), contextlib.redirect_stdout(io.TextIOWrapper(io.BytesIO(), "utf-8")):
            status = main() if module == "spidr.train" else main([*command, *arguments])
    except SystemExit as end:
        status = end.code
    finally:
        sys.argv = before
    return status or 0, errors.getvalue()


@given(command_line())
@cases(250)
def test_command_lines(corpus: Path, line: tuple[str, list[str]]) -> None:
    """Correct command lines do their work, all others say what is wrong."""
    there = set(corpus.rglob("*"))
    with contextlib.chdir(corpus):
        status, errors = call(*line)
    assert status in (0, 2), errors
    if status == 2:
        assert len([text for text in errors.splitlines() if "error: " in text]) == 1, errors
    assert "Traceback" not in errors
    new = set(corpus.rglob("*")) - there
    assert not [path for path in new if path.name.startswith(".") or path.name == "executed"]
    for path in new:
        if path.parent == corpus:
            shutil.rmtree(path) if path.is_dir() else path.unlink()
