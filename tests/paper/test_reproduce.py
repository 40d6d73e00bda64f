"""paper/reproduce.py on a small model and recordings laid out like LibriSpeech."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import polars as pl
import pytest
import soundfile
import torch

from helpers.small_models import tiny_model
from spidr.data.alignments import read_alignments
from spidr.data.units import read_units
from spidr.models.metrics import units_quality

PAPER = Path(__file__).parents[2] / "paper"
PHONES = ("AA", "S", "T", "M")
AT_50_HZ: dict[str, Any] = {"extractor_conv_layer_config": [(8, 10, 5), *[(8, 3, 2)] * 4, *[(8, 2, 2)] * 2]}


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(PAPER)
    return importlib.import_module


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    """``LibriSpeech/dev-clean`` and ``dev-other`` with alignments and items, and ``model/final.pt``."""
    rng = np.random.default_rng(0)
    alignments = []
    for index, name in enumerate(("dev-clean", "dev-other")):
        items = ["#file onset offset #phone prev-phone next-phone speaker"]
        for speaker in range(2):
            for number in range(3):
                fileid = f"{10 * index + speaker}-7-{number:04}"
                path = tmp_path / "LibriSpeech" / name / fileid.split("-")[0] / "7" / f"{fileid}.flac"
                path.parent.mkdir(parents=True, exist_ok=True)
                soundfile.write(path, 0.1 * rng.standard_normal(24_000), 16_000)
                phones = [[PHONES[i % 4], i / 10, (i + 1) / 10] for i in range(15)]
                alignments.append({"fileid": fileid, "phones": phones})
                items += [f"{fileid} {i / 10} {(i + 1) / 10} {PHONES[i % 4]} SIL SIL {speaker}" for i in range(1, 14)]
        (tmp_path / f"{name}.item").write_text("\n".join(items) + "\n")
    (tmp_path / "alignments.jsonl").write_text("\n".join(map(json.dumps, alignments)))
    model = tiny_model(**AT_50_HZ)
    (tmp_path / "model").mkdir()
    torch.save({"model": model.state_dict()}, tmp_path / "model" / "final.pt")
    document = {"run": {"model_type": "spidr"}, "model": dataclasses.asdict(model.cfg)}
    (tmp_path / "model" / "config.json").write_text(json.dumps(document))
    return tmp_path


def command(corpus: Path, *arguments: str) -> list[str]:
    checkpoint = str(corpus / "model" / "final.pt")
    return [checkpoint, str(corpus / "LibriSpeech"), "--output", str(corpus / "out"), "--layer", "3", *arguments]


def test_reproduce(script: Any, corpus: Path, capsys: pytest.CaptureFixture[str]) -> None:
    reproduce: ModuleType = script("reproduce")
    arguments = command(corpus, "--alignments", str(corpus / "alignments.jsonl"), "--device", "cpu")
    with_abx = importlib.util.find_spec("fastabx") is not None
    if with_abx:
        arguments += ["--items", f"dev-clean={corpus / 'dev-clean.item'}"]
    assert reproduce.main(arguments) == 0
    said = capsys.readouterr().out
    assert "measuring unit quality" in said
    assert "skipped, ABX on dev-other: needs --items dev-other=FILE" in said
    out = corpus / "out"
    table = pl.read_csv(out / "results.csv", schema=script("published").SCHEMA)
    phones, units = read_alignments(corpus / "alignments.jsonl"), read_units(out / "layer3.jsonl")
    assert len(units) == 12
    expected = units_quality({n: (phones[n], units[n]) for n in phones}, num_units=12, num_phones=4)
    measured = table.filter(experiment="unit_quality", dataset="dev-clean+dev-other", num_units=12, layer=3)
    assert dict(measured.select("metric", "value").iter_rows()) == pytest.approx(expected._asdict())
    if with_abx:
        errors = table.filter(experiment="abx", dataset="dev-clean")
        kinds = {(kind, speaker) for kind in ("continuous", "codebooks") for speaker in ("within", "across")}
        assert set(errors.select("representation", "speaker").iter_rows()) == kinds
        assert errors["value"].is_between(0, 100).all()
    assert (out / "table.md").read_text() in said

    # A second run measures only what is missing or has changed.
    features = sorted((out / "layer3").rglob("*.npy"))
    assert len(features) == 12
    before = {path: path.stat().st_mtime_ns for path in features[1:]}
    features[0].unlink()
    assert reproduce.main(arguments) == 0
    assert "measuring unit quality" not in capsys.readouterr().out
    assert features[0].exists()
    assert before == {path: path.stat().st_mtime_ns for path in before}
    lines = (corpus / "alignments.jsonl").read_text().splitlines()
    (corpus / "alignments.jsonl").write_text("\n".join(lines[1:]))
    assert reproduce.main(arguments) == 0
    said = capsys.readouterr().out
    assert "measuring unit quality" in said
    assert "skipped, unit quality: 1 recordings without alignment" in said


def test_comparison_with_the_published_values(script: Any) -> None:
    reproduce, published = script("reproduce"), script("published")
    abx = published.results("abx").filter(model="spidr", representation="codebooks", layer=6, speaker="within")
    own = abx.with_columns(value=pl.col.value + 0.25)
    lines = reproduce.comparison(own).splitlines()
    assert "| ABX (%), codebooks, layer 6, dev-clean, within |      4.92 |       5.17 |      +0.25 |" in lines
    (line,) = reproduce.comparison(own.head(1).with_columns(dataset=pl.lit("other"))).splitlines()[2:]
    assert [cell.strip() for cell in line.split("|")[2:5]] == ["", "5.17", ""]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--items", "dev-clean=none.item"], "none.item: does not exist"),
        (["--items", "train=a"], "expected dev-clean=FILE or dev-other=FILE"),
    ],
)
def test_mistakes(
    script: Any, corpus: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    try:
        status = script("reproduce").main(command(corpus, *arguments))
    except SystemExit as error:
        status = error.code
    assert status == 2
    assert message in capsys.readouterr().err


def test_a_folder_that_is_not_librispeech(script: Any, corpus: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert script("reproduce").main(["model.pt", str(corpus)]) == 2
    assert "neither dev-clean nor dev-other" in capsys.readouterr().err
