"""Units in other programs' formats."""

import json
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from helpers.extraction import LAYER, QUIET, noise
from spidr.extract import Options, extract_units, fit_kmeans
from spidr.tools.errors import InputError

SUFFIXES = {
    "spidr": "jsonl",
    "discophon": "jsonl",
    "slamkit": "jsonl",
    "unit-hifigan": "jsonl",
    "fairseq": "txt",
    "km": "km",
}


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    for i, name in enumerate(("s1/a", "s1/b", "s2/c")):
        noise(tmp_path / "corpus" / f"{name}.wav", 9000 + 1000 * i, seed=i)
    return tmp_path / "corpus"


def extract(corpus: Any, output: Path, file_format: Any, model: Any, **options: Any) -> list[str]:
    extract_units(corpus, output, model=model, layer=LAYER, file_format=file_format, **{"options": QUIET} | options)
    return output.read_text("utf-8").splitlines()


def test_the_lines_of_each_format(corpus: Path, varied: Path, tmp_path: Path) -> None:
    expected = {
        row["fileid"]: row["units"] for row in map(json.loads, extract(corpus, tmp_path / "u.jsonl", "spidr", varied))
    }
    assert list(expected) == ["a", "b", "c"]
    runs = {name: [(u, len(list(run))) for u, run in groupby(units)] for name, units in expected.items()}
    assert any(count > 1 for run in runs.values() for _, count in run)

    def lines(file_format: str, **options: Any) -> list[str]:
        merged = "merged-" if options else ""
        return extract(
            corpus,
            tmp_path / f"{merged}{file_format}.{SUFFIXES.get(file_format, 'jsonl')}",
            file_format,
            varied,
            **options,
        )

    assert [json.loads(line) for line in lines("discophon")] == [{"file": n, "units": u} for n, u in expected.items()]
    assert [json.loads(line) for line in lines("slamkit")] == [
        {"file_name": name, "units": [u for u, _ in run], "duration": [n for _, n in run]} for name, run in runs.items()
    ]
    assert [json.loads(line) for line in lines("unit-hifigan")] == [
        {"audio": str(corpus / speaker / f"{name}.wav"), "units": expected[name], "speaker": speaker}
        for speaker, name in (("s1", "a"), ("s1", "b"), ("s2", "c"))
    ]
    assert lines("fairseq") == [f"{name}|{' '.join(map(str, units))}" for name, units in expected.items()]
    assert lines("fairseq", dedup=True) == [f"{n}|{' '.join(str(u) for u, _ in run)}" for n, run in runs.items()]
    assert lines("km") == [" ".join(map(str, units)) for units in expected.values()]


@pytest.mark.parametrize("file_format", ["discophon", "slamkit", "unit-hifigan", "fairseq", "km"])
def test_every_format_resumes(
    file_format: str, corpus: Path, varied: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Also when the corpus has grown, in the order of the sources; damaged units are recomputed."""
    caplog.set_level("INFO")
    out = tmp_path / f"u.{SUFFIXES.get(file_format, 'jsonl')}"
    before = extract(corpus, out, file_format, varied)
    assert extract(corpus, out, file_format, varied) == before
    assert "nothing left to do" in caplog.text
    out.write_text("\n".join([before[0], before[1][:-5] + "x", before[2]]) + "\n")
    assert extract(corpus, out, file_format, varied) == before
    nameless = file_format in ("unit-hifigan", "km")
    assert f"{3 if nameless else 1} recordings have damaged values" in caplog.text
    noise(corpus / "s1" / "aa.wav", 12_000, seed=7)
    after = extract(corpus, out, file_format, varied)
    if nameless:  # all rows come from this call, in its order
        assert [after[0], *after[2:]] == before
    else:
        assert sorted({*after} - {*before}) == [line for line in after if "aa" in line]
    assert len(after) == 4
    assert "1 recordings (0.0 min) encoded" in caplog.text


def test_a_skipped_recording_keeps_its_line_in_files_without_names(corpus: Path, varied: Path, tmp_path: Path) -> None:
    whole = extract(corpus, tmp_path / "whole.km", "km", varied)
    (corpus / "s1" / "b.wav").write_bytes(b"no recording")
    skipping = Options(on_error="skip", progress=False)
    assert extract(corpus, tmp_path / "u.km", "km", varied, options=skipping) == [whole[0], "", whole[2]]
    noise(corpus / "s1" / "b.wav", 10_000, seed=1)
    assert extract(corpus, tmp_path / "u.km", "km", varied) == whole
    with pytest.raises(InputError, match="its rows have no names, so it cannot hold other recordings beside these"):
        extract(corpus / "s2", tmp_path / "u.km", "km", varied)


def test_speakers_of_a_manifest(corpus: Path, varied: Path, tmp_path: Path) -> None:
    rows = [f"{name},{corpus / name}.wav,{9000 + 1000 * i},{i}" for i, name in enumerate(("s1/a", "s1/b"))]
    (tmp_path / "m.csv").write_text("\n".join(["fileid,path,num_samples,speaker", *rows]))
    lines = extract(tmp_path / "m.csv", tmp_path / "u.jsonl", "unit-hifigan", varied)
    assert [json.loads(line)["speaker"] for line in lines] == ["0", "1"]


def test_the_names_of_discophons_files(corpus: Path, varied: Path, tmp_path: Path) -> None:
    common: Any = {"model": varied, "layer": LAYER, "options": QUIET}
    extract_units(corpus, tmp_path / "out", file_format="discophon", language="swa", split="train-1h", **common)
    (found,) = (tmp_path / "out").glob("*.jsonl")
    assert found.name == "units-swa-train-1h.jsonl"
    for choice, message in (
        ({"language": "deutsch", "split": "dev"}, "language: found 'deutsch', expected one of deu, swa"),
        ({"language": "deu", "split": "train"}, "split: found 'train', expected one of dev, test"),
        ({"language": "deu"}, "split: found None"),
        ({"language": "deu", "split": "dev", "dedup": True}, "one unit for each frame"),
        ({}, r"must end in \.jsonl, or be a folder with --language and --split"),
    ):
        options: Any = choice
        with pytest.raises(InputError, match=message):
            extract_units(corpus, tmp_path / "x", file_format="discophon", **common, **options)
    with pytest.raises(InputError, match="unit-hifigan needs one unit for each frame"):
        extract_units(corpus, tmp_path / "x.jsonl", file_format="unit-hifigan", dedup=True, **common)
    with pytest.raises(InputError, match="only the format discophon names its files"):
        extract_units(corpus, tmp_path / "x.jsonl", language="deu", split="dev", **common)


@pytest.mark.parametrize(("kmeans", "penalty"), [(False, 1.0), (True, 3e-5)])
def test_penalised_units(kmeans: bool, penalty: float, varied: Path, corpus: Path, tmp_path: Path) -> None:
    """No cost gives the best unit of each frame, a high cost one unit; batches change nothing."""
    common: dict[str, Any] = {}
    if kmeans:
        fit_kmeans(corpus, tmp_path / "k.npz", model=varied, layer=LAYER, units=8, options=QUIET)
        common = {"kmeans": tmp_path / "k.npz"}
    found = {}
    for name, smooth, seconds in (
        ("none", 0.0, 0),
        ("plain", None, 0),
        ("some", penalty, 0),
        ("batch", penalty, 60),
        ("all", 1e5, 0),
    ):
        options = Options(batch_seconds=seconds, progress=False)
        given = {} if smooth is None else {"smooth": smooth}
        found[name] = extract(corpus, tmp_path / f"{name}.jsonl", "spidr", varied, options=options, **common, **given)
    changes = {
        name: sum(np.count_nonzero(np.diff(json.loads(line)["units"])) for line in lines)
        for name, lines in found.items()
    }
    assert found["none"] == found["plain"]
    assert found["some"] == found["batch"]
    assert changes["plain"] > changes["some"] > changes["all"] == 0
    with pytest.raises(InputError, match=r"made with smooth = null, now it is 0\.3"):
        extract(corpus, tmp_path / "plain.jsonl", "spidr", varied, smooth=0.3, **common)
    with pytest.raises(InputError, match="smooth: found nan, expected a number of 0 or more"):
        extract(corpus, tmp_path / "x.jsonl", "spidr", varied, smooth=float("nan"), **common)
