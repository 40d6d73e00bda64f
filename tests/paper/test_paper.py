"""The paper's figures and tables come from its values, and its recipes are the package's."""

from __future__ import annotations

import csv
import itertools
import json
import os
import subprocess
import sys
import tomllib
from collections.abc import Callable
from dataclasses import replace
from itertools import groupby
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import polars as pl
import pytest
import torch

from spidr.config import DataConfig, MaskingConfig, OptimizerConfig, read_config
from spidr.data.loader import build_dataloader
from spidr.tools.errors import InputError

ROOT = Path(__file__).parents[2]
PAPER = ROOT / "paper"


@pytest.fixture
def paper(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], ModuleType]:
    """Import a module of paper/, as the scripts there do."""
    import importlib

    monkeypatch.syspath_prepend(PAPER)
    return importlib.import_module


def series(axes: Any, label: str) -> tuple[list[float], list[float]]:
    """The points of a line."""
    (line,) = [line for line in axes.lines if line.get_label() == label]
    return list(line.get_xdata()), list(line.get_ydata())


# --------------------------------------------------------------------------------------------------------- published


def test_results_are_tidy(paper: Callable[[str], ModuleType]) -> None:
    published = paper("published")
    for experiment in ("abx", "map", "unit_quality", "spoken_lm", "superb"):
        table = published.results(experiment)
        assert not table.is_empty()
        assert not table.select(published.KEYS).is_duplicated().any()
        assert set(table["model"]) <= set(published.MODELS)
        assert set(table["representation"]) <= set(published.REPRESENTATIONS)
        assert set(table["metric"]) <= set(published.METRICS)
    abx = published.results("abx").filter(model="spidr", layer=6, dataset="dev-clean", speaker="within")
    assert dict(abx.select("representation", "value").iter_rows()) == {
        "continuous": 3.324,
        "probabilities": 2.986,
        "codebooks": 4.923,
        "kmeans": 6.0,
    }
    onehot = published.results("map").filter(representation="codebooks", layer=5, dataset="dev-clean")
    assert onehot.row(0, named=True)["model"] == "spidr"
    assert onehot["value"].to_list() == [69.18]


# ----------------------------------------------------------------------------------------------------------- figures


def test_figures_that_need_nothing(
    paper: Callable[[str], ModuleType], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    figures = paper("figures")
    assert figures.main(["--output", str(tmp_path)]) == 0
    drawn = {f"figure{number}{suffix}" for number in (2, 3, 4, 5, 6, 7, *range(11, 17)) for suffix in (".pdf", ".png")}
    assert {path.name for path in tmp_path.iterdir()} == drawn
    for path in tmp_path.iterdir():
        assert path.read_bytes()[:4] == {".pdf": b"%PDF", ".png": b"\x89PNG"}[path.suffix]
    said = capsys.readouterr().out
    for number, needed in ((8, "--features and --alignments"), (10, "--units and --alignments")):
        assert f"figure {number}: skipped, it needs {needed}" in said


@pytest.mark.parametrize(
    ("script", "missing"),
    [("figures", "matplotlib"), ("tables", "polars"), ("reproduce", "polars"), ("extract_features", "soundfile")],
)
def test_scripts_say_which_extra_is_missing(script: str, missing: str, tmp_path: Path) -> None:
    (tmp_path / missing).mkdir()
    (tmp_path / missing / "__init__.py").write_text(f"raise ModuleNotFoundError(name={missing!r})")
    command = [sys.executable, PAPER / f"{script}.py", "--help"]
    environment = os.environ | {"PYTHONPATH": str(tmp_path)}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.stderr == f"error: `{missing}` is missing: install it with `pip install 'spidr[paper]'`\n"
    assert (done.returncode, done.stdout) == (2, "")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [(["--only", "8"], "figure 8 needs --features and --alignments"), (["--only", "1"], "2, 3,")],
)
def test_figures_that_cannot_be_drawn(
    paper: Callable[[str], ModuleType], capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    try:
        status = paper("figures").main(arguments)
    except SystemExit as error:
        status = error.code
    assert status == 2
    assert message in capsys.readouterr().err


def test_schedules_are_those_of_the_package(paper: Callable[[str], ModuleType]) -> None:
    top, bottom = paper("from_package").schedules().axes
    steps, rates = top.lines[0].get_data()
    assert dict(zip(steps, rates, strict=True))[200.0] == pytest.approx(5)
    assert rates[-1] == pytest.approx(0.05)
    steps, distances = series(bottom, "SpidR")
    assert distances[steps.index(20.0)] == pytest.approx(1e-3 / np.e)


def test_correlations_are_the_papers(paper: Callable[[str], ModuleType]) -> None:
    """For the models that the paper uses: SpidR with codebooks and k-means, and HuBERT."""
    figures = paper("from_results")
    features, units = (
        [ax.get_title(loc="right") for ax in figure.axes]
        for figure in (figures.spoken_lm_against_features(), figures.spoken_lm_against_units())
    )
    assert [features[i] for i in (0, 1, 4)] == [f"r = {r}, n = 32" for r in ("−0.84", "0.62", "−0.86")]
    assert units[:2] == [f"r = {r}, n = 32" for r in ("−0.85", "0.85")]


def test_masks_of_figure_6(paper: Callable[[str], ModuleType]) -> None:
    package = paper("from_package")
    assert package.lengths_of_runs(np.array([0, 1, 1, 0, 1, 0, 0, 1, 1, 1], dtype=bool)).tolist() == [2, 1, 3]
    _, bottom = package.masks().axes
    shares = np.array([bar.get_height() for bar in bottom.patches])
    assert shares.sum() == pytest.approx(100, abs=1)
    assert shares[:5].sum() < 1  # no run is shorter than a span, except at the end of an utterance


# ----------------------------------------------------------------------------------------- figures of a corpus


@pytest.fixture
def extracted(tmp_path: Path) -> Path:
    """Features, units and alignments in which phones and units coincide."""
    rng = np.random.default_rng(0)
    phones, centres = ["SIL", "AA", "S", "T"], rng.normal(size=(4, 8)) * 5
    lines, units = [], []
    (tmp_path / "layer6").mkdir()
    for speaker in range(3):
        for index in range(4):
            name = f"{speaker}-0-{index}"
            sequence = rng.integers(0, 4, 30).repeat(3)
            lines.append({"fileid": name, "phones": [phones[i] for i in sequence.repeat(2)]})
            units.append({"fileid": name, "units": (sequence + 10).tolist()})
            features = centres[sequence] + rng.normal(size=(len(sequence), 8))
            torch.save(torch.from_numpy(features).float(), tmp_path / "layer6" / f"{name}.pt")
    (tmp_path / "alignments.jsonl").write_text("\n".join(map(json.dumps, lines)))
    (tmp_path / "units.jsonl").write_text("\n".join(map(json.dumps, units)))
    return tmp_path


def test_figures_of_a_corpus(paper: Callable[[str], ModuleType], extracted: Path) -> None:
    arguments = ["--only", "8,9,10", "--segments", "60", "--num-units", "20", "--output", str(extracted / "figures")]
    arguments += ["--features", str(extracted / "layer6"), str(extracted / "layer6")]
    arguments += ["--units", str(extracted / "units.jsonl"), "--alignments", str(extracted / "alignments.jsonl")]
    assert paper("figures").main(arguments) == 0
    assert len(list((extracted / "figures").glob("figure*.png"))) == 3
    corpus = paper("from_corpus")
    figure = corpus.phones_given_units(extracted / "units.jsonl", extracted / "alignments.jsonl", 20)
    assert np.array_equal(figure.axes[0].images[0].get_array(), np.eye(4))


def test_units_of_merged_runs_are_drawn_as_all_others(paper: Callable[[str], ModuleType], extracted: Path) -> None:
    corpus, table = paper("from_corpus"), pl.read_ndjson(extracted / "units.jsonl")
    runs = [[list(run) for _, run in groupby(units)] for units in table["units"]]
    columns = {"units": [[run[0] for run in row] for row in runs], "durations": [[*map(len, row)] for row in runs]}
    pl.DataFrame({"fileid": table["fileid"], **columns}).write_parquet(extracted / "merged.parquet")
    figure = corpus.phones_given_units(extracted / "merged.parquet", extracted / "alignments.jsonl", 20)
    assert np.array_equal(figure.axes[0].images[0].get_array(), np.eye(4))


@pytest.mark.parametrize("columns", [1, 2])
def test_names_of_phones_do_not_overlap(paper: Callable[[str], ModuleType], columns: int) -> None:
    corpus, style = paper("from_corpus"), paper("style")
    figure, (ax, *_) = style.new_figure(4.0 / columns, 1, columns)
    phones = [f"{a}{b}" for a in "ABDGMW" for b in "CHWOY" for _ in range(3)]
    points = np.random.default_rng(0).uniform(size=(len(phones) // 3, 2)).repeat(3, axis=0)
    corpus.scatter(ax, points, phones, {})
    corpus.name_phones(ax, points, phones, corpus.width_of_points(columns))
    figure.draw_without_rendering()
    boxes = [text.get_window_extent() for text in ax.texts]
    assert len(boxes) > 10 / columns
    assert not [pair for pair in itertools.combinations(boxes, 2) if pair[0].overlaps(pair[1])]


def test_phone_segments(paper: Callable[[str], ModuleType], tmp_path: Path) -> None:
    np.save(tmp_path / "7-1-0.npy", np.arange(10, dtype=np.float32)[:, None])
    phones = ["SIL"] * 4 + ["AA1"] * 6 + ["T"] + ["AA0"] * 9
    means, names, speakers = paper("from_corpus").phone_segments(tmp_path, {"7-1-0": phones}, limit=100)
    # A feature frame is 20 ms: AA1 is frames 2 to 4, T the first half of frame 5, AA0 starts in its second half.
    assert means[:, 0].tolist() == [3.0, 5.0, 7.5]
    assert names == ["AA", "T", "AA"]
    assert speakers == ["7", "7", "7"]
    with pytest.raises(InputError, match="none of the 1 recordings"):
        paper("from_corpus").phone_segments(tmp_path, {"8-1-0": phones}, limit=100)
    with pytest.raises(InputError, match=r"7-1-0: 10 frames, expected about 50"):
        paper("from_corpus").phone_segments(tmp_path, {"7-1-0": phones * 5}, limit=100)


# ------------------------------------------------------------------------------------------------------------ tables


def test_tables_name_the_best_and_show_reproduced_values(paper: Callable[[str], ModuleType], tmp_path: Path) -> None:
    published, tables = paper("published"), paper("tables")
    row = published.results("abx").filter(
        model="spidr", representation="codebooks", layer=6, dataset="dev-clean", speaker="within"
    )
    own = pl.concat([row.with_columns(value=4.5), row.with_columns(layer=pl.lit(7, pl.Int64), value=9.25)])
    own.write_csv(tmp_path / "results.csv")
    assert tables.main(["--output", str(tmp_path), "--reproduced", str(tmp_path / "results.csv")]) == 0
    assert {path.suffix for path in tmp_path.glob("superb.*")} == {".md", ".tex", ".csv"}
    with (tmp_path / "abx-discrete.csv").open() as file:
        rows = {(line["Model"], line["From"], line["Layer"]): line for line in csv.DictReader(file)}
    assert len(rows) == 10
    six, seven = rows["SpidR", "codebooks", "6"], rows["SpidR", "codebooks", "7"]
    column = "ABX (%) dev-clean within ↓"
    assert (six[column], six[f"{column} reproduced"]) == ("4.92", "4.50")
    assert (seven[column], seven[f"{column} reproduced"]) == ("5.26", "9.25")
    assert column in six["best"]
    text = (tmp_path / "abx-discrete.md").read_text()
    assert " **4.92** |" in text
    assert f"- {column}: 4.92 (SpidR, codebooks, 256 units, layer 6)" in text
    latex = (tmp_path / "superb.tex").read_text()
    assert r"DinoSR (original) & \textbf{3.21} & \textbf{4.71} \\" in latex
    assert "- sBLIMP ↑: 61.2 (SpidR, k-means, 50 units, layer 6, 6,000 h)" in (tmp_path / "spoken-lm.md").read_text()
    assert "- Hours ↓: 15 (H100, compiled: yes, 16 GPUs)" in (tmp_path / "pretraining-time.md").read_text()


def test_tables_say_which_file_has_no_results(
    paper: Callable[[str], ModuleType], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert paper("tables").main(["--output", str(tmp_path), "--reproduced", str(tmp_path / "none.csv")]) == 2
    assert "none.csv" in capsys.readouterr().err


# ----------------------------------------------------------------------------------------------------------- recipes


@pytest.mark.parametrize(("name", "column"), [("spidr-base", 1), ("dinosr-base", 2)])
def test_recipes(name: str, column: int) -> None:
    """Every hyperparameter is the same in the table of paper/README.md, in the file and by default."""
    path = ROOT / "configs" / f"{name}.toml"
    text = (PAPER / "README.md").read_text(encoding="utf-8").split("## Hyperparameters")[1]
    cells = [
        [cell.strip(" `") for cell in line.split("|")[1:-1]] for line in text.splitlines() if line.startswith("| `")
    ]
    table = {row[0]: json.loads(row[column]) for row in cells if row[column]}
    document = tomllib.loads(path.read_text(encoding="utf-8"))
    written = {
        f"{section}.{key}": value
        for section in ("data", "model", "masking", "optimizer")
        for key, value in document[section].items()
        if key != "manifest"
    }
    assert written == table
    config = read_config(path)
    assert config.run.model_type == name.split("-")[0]
    defaults = {
        "data": replace(DataConfig("m"), global_batch_length=60_800_000),
        "model": type(config.model)(),
        "masking": MaskingConfig(),
        "optimizer": OptimizerConfig(),
    }
    for key, value in table.items():
        section, field = key.split(".")
        default = getattr(defaults[section], field)
        assert (json.loads(json.dumps(default)), key) == (value, key)


def test_recipes_train_the_same_on_4_8_and_16_gpus(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    lengths = rng.integers(20_000, 320_000, 3000)
    manifest = tmp_path / "librispeech-960.csv"
    rows = "".join(f"{i},/{i}.flac,{length}\n" for i, length in enumerate(lengths))
    manifest.write_text(f"fileid,path,num_samples\n{rows}")
    config = replace(read_config(ROOT / "configs" / "spidr-base.toml").data, manifest=str(manifest), num_workers=0)
    steps: dict[int, list[list[Any]]] = {}
    for gpus in (4, 8, 16):
        loaders = [build_dataloader(config, None, rank=rank, world_size=gpus) for rank in range(gpus)]
        assert {loader.accumulation for loader in loaders} == {16 // gpus}
        # What each process requests: rows, and the seeds of masks and crops.
        batches = [[(r.key, *r.rows.tolist()) for r in loader.requests(0, 0)] for loader in loaders]
        per_step = 16 // gpus
        steps[gpus] = [
            sorted(batch for own in batches for batch in own[first : first + per_step])
            for first in range(0, len(batches[0]), per_step)
        ]
    assert len(steps[16][0]) == 16
    assert steps[4] == steps[8] == steps[16]
