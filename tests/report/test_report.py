"""The report of a run: the page's contents, that it is self-contained, and what it says if something is missing."""

from __future__ import annotations

import csv
import json
import re
import shutil
import struct
import xml.etree.ElementTree as ET
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import torch

from helpers.tiny_run import write_config, write_recordings
from spidr.config import DEFAULT_CONV_LAYER_CONFIG, Config, read_config
from spidr.report.__main__ import main
from spidr.report.contents import newest_checkpoint, spans, spectrogram
from spidr.report.figures import curves, utterance
from spidr.tools.metrics import read_metrics
from spidr.train import train

AT_50_HZ = {"extractor_conv_layer_config": [(16, kernel, stride) for _, kernel, stride in DEFAULT_CONV_LAYER_CONFIG]}


@pytest.fixture(scope="module")
def cfg(tmp_path_factory: pytest.TempPathFactory) -> Config:
    """A finished run, validated on aligned recordings."""
    folder = tmp_path_factory.mktemp("run")
    manifest = write_recordings(folder / "recordings", count=12)
    rows = [line.split(",") for line in manifest.read_text().splitlines()[1:]]
    phones = [{"fileid": row[0], "phones": [f"P{i // 9 % 3}" for i in range(int(row[2]) // 160)]} for row in rows]
    (folder / "phones.jsonl").write_text("".join(json.dumps(line) + "\n" for line in phones))
    path = write_config(folder, manifest, run={"save_interval": 3}, model=AT_50_HZ, optimizer={"max_steps": 6})
    document = json.loads(path.read_text())
    document["validation"]["dev"]["alignments_path"] = str(folder / "phones.jsonl")
    path.write_text(json.dumps(document))
    cfg = read_config(path)
    train(cfg)
    return cfg


def figures_of(html: str) -> dict[str, ET.Element]:
    """The SVGs by description; each must be well-formed."""
    found = re.findall(r'<figure role="img" aria-label="([^"]*)">(<svg.*?</svg>)', html, flags=re.DOTALL)
    return {label: ET.fromstring(svg) for label, svg in found}


def texts(svg: ET.Element) -> list[str]:
    return ["".join(element.itertext()).strip() for element in svg.iter("{http://www.w3.org/2000/svg}text")]


def test_everything_is_on_one_page(cfg: Config, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(cfg.run.dir), "--output", str(tmp_path), "--device", "cpu"]) == 0
    assert capsys.readouterr().out == f"{tmp_path / 'index.html'}\n"
    html = (tmp_path / "index.html").read_text()
    svgs = figures_of(html)
    training, codebooks, units, phones, utterance = svgs.values()
    assert {"Loss", "Learning rate", "EMA decay", "Audio seconds per second", "training", "dev"} <= set(texts(training))
    assert {"Perplexity of the targets", "Active codewords", "layer 2", "layer 4"} <= set(texts(codebooks))
    assert {"PNMI", "Phone purity", "Cluster purity", "Bits per second"} <= set(texts(units))
    assert {"P0", "P1", "P2", "P(phone | unit)"} <= set(texts(phones))
    assert {"phones", "layer 2", "layer 3", "layer 4", "kHz", "seconds"} <= set(texts(utterance))
    last = read_metrics(cfg.run.dir / "metrics.jsonl")[-1]
    assert f"<td>{last['pnmi_l3']:.4g}</td>" in html
    assert '"spidr"' in html.replace("&quot;", '"')
    # Self-contained: no scripts, and nothing is fetched.
    assert "<script" not in html
    assert re.findall(r'(?:src|href)="(?!#|data:)[^"]*"', html) == []
    assert "@import" not in html
    # Ids are unique, and every reference has a target.
    ids = re.findall(r' id="([^"]+)"', html)
    assert len(ids) == len(set(ids))
    assert set(re.findall(r'href="#([^"]+)"|url\(#([^)]+)\)', html)) <= {(i, "") for i in ids} | {("", i) for i in ids}


def test_figures_use_the_pages_colours(cfg: Config, tmp_path: Path) -> None:
    """Figures use only the page's colours, so that dark pages have no black text."""
    assert main([str(cfg.run.dir), "--output", str(tmp_path), "--device", "cpu"]) == 0
    html = (tmp_path / "index.html").read_text()
    for svg in re.findall(r"<svg.*?</svg>", html, flags=re.DOTALL):
        written = re.sub(r'(?:xlink:)?href="data:[^"]*"', "", svg)
        assert set(re.findall(r"(?:fill|stroke): ?(#[0-9a-fA-F]{3,6})", written)) == set()
        assert "var(--ink)" in svg
    assert "prefers-color-scheme: dark" in html
    for name in ("training", "codebooks", "units-dev", "phones", "utterance"):
        png = (tmp_path / f"{name}.png").read_bytes()
        assert png.startswith(b"\x89PNG")
        assert min(struct.unpack(">II", png[16:24])) > 200


def test_without_alignments_and_without_the_recordings(
    cfg: Config, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    run.mkdir()
    document = json.loads((cfg.run.dir / "config.json").read_text())
    document["validation"]["dev"]["alignments_path"] = None
    (run / "config.json").write_text(json.dumps(document))
    (run / "step_3.pt").write_bytes((cfg.run.dir / "step_3.pt").read_bytes())
    assert main([str(run), "--device", "cpu"]) == 0
    html = (run / "report" / "index.html").read_text()
    assert "The run has logged nothing yet." in html
    assert list(figures_of(html)) == ["Spectrogram, phones and units of an utterance"]
    document["validation"]["dev"]["manifest"] = str(tmp_path / "gone.csv")
    (run / "config.json").write_text(json.dumps(document))
    assert main([str(run), "--device", "cpu"]) == 0
    assert "gone.csv: the manifest does not exist" in (run / "report" / "index.html").read_text()
    assert "warning: no units in the report" in capsys.readouterr().err


def test_mistakes(cfg: Config, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(tmp_path)]) == 2
    assert capsys.readouterr().err == f"error: {tmp_path}: not a run folder, it has no config.json\n"
    assert main([str(cfg.run.dir), "--set", "test"]) == 2
    assert "no validation set 'test'; there are: dev" in capsys.readouterr().err


HOSTILE = ['x"><svg onload=alert(2)>', 'x"><script>alert(3)<!--', "$x^$", "$\\oops{$", "a/b", "&lt;b>"]


class Tags(HTMLParser):
    """Finds what a browser would run."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag in ("script", "iframe", "b") or any(name.startswith("on") for name, _ in attrs):
            self.found.append(tag)


@pytest.mark.parametrize("name", HOSTILE)
def test_names_from_elsewhere_are_text(cfg: Config, tmp_path: Path, name: str) -> None:
    """Names of a validation set, a recording and a phone appear literally on the page and in its figures."""
    run = tmp_path / "run"
    run.mkdir()
    for file in ("final.pt", "metrics.jsonl"):
        shutil.copy(cfg.run.dir / file, run)
    document = json.loads((cfg.run.dir / "config.json").read_text())
    dev = document["validation"].pop("dev")
    rows = Path(dev["manifest"]).read_text("utf-8").splitlines()
    renamed = [[f"{name}{i}", *line.split(",")[1:]] for i, line in enumerate(rows[1:4])]
    with (tmp_path / "dev.csv").open("w", newline="") as file:
        csv.writer(file).writerows([rows[0].split(","), *renamed])
    aligned = [{"fileid": row[0], "phones": [[name, 0, int(row[2]) / 16_000]]} for row in renamed]
    (tmp_path / "p.jsonl").write_text("".join(json.dumps(row) + "\n" for row in aligned))
    files = {"manifest": str(tmp_path / "dev.csv"), "alignments_path": str(tmp_path / "p.jsonl")}
    group = name.replace("\\", "")  # not allowed in a set's name
    document["validation"] = {group: dev | files}
    (run / "config.json").write_text(json.dumps(document))
    line = {"step": 6, "group": group, "loss": 1.0, "pnmi_l2": 0.1, "pnmi_l3": 0.2, "pnmi_l4": 0.3}
    with (run / "metrics.jsonl").open("a") as file:
        file.write(json.dumps(line) + "\n")
    assert main([str(run), "--device", "cpu"]) == 0
    html = (run / "report" / "index.html").read_text()
    parser = Tags()
    parser.feed(html)
    assert parser.found == []
    svgs = figures_of(html)
    assert group in texts(svgs["Loss, gradient norm, learning rate, EMA decay and throughput by step"])
    assert name in texts(svgs["Probability of each phone given each unit"])
    assert any(text.startswith(name) for text in texts(svgs["Spectrogram, phones and units of an utterance"]))
    assert {path.name for path in (run / "report").iterdir() if "units" in path.name} == {"units-0.png"}


def test_values_that_cannot_be_drawn_are_named(cfg: Config, tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    shutil.copy(cfg.run.dir / "config.json", run)
    lines = ['{"step": 4, "group": "train", "loss": 1%s}' % ("0" * 400), '{"step": 4, "group": "train", "loss": 1e308}']
    lines += [
        '{"step": 5, "group": "dev", "pnmi_l²": 1.0, "pnmi_l3": 0.5}',
        '{"step": 1%s, "group": "dev"}' % ("0" * 400),
    ]
    (run / "metrics.jsonl").write_text("\n".join([*lines, '{"step": 2, "group": "train", "loss": 2.5}']) + "\n")
    assert main([str(run), "--device", "cpu"]) == 0
    html = (run / "report" / "index.html").read_text()
    assert "Left out, since it cannot be drawn: loss of train at step 4, loss of train at step 4, step of dev" in html
    assert len(figures_of(html)) >= 2


def test_no_usable_checkpoint(cfg: Config, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """An error names the checkpoints, and there is no page."""
    run = tmp_path / "run"
    run.mkdir()
    shutil.copy(cfg.run.dir / "config.json", run)
    for name in ("step_3.pt", "final.pt"):
        (run / name).write_bytes((cfg.run.dir / name).read_bytes()[:-1000])
        assert main([str(run), "--device", "cpu"]) == 2
        assert name in capsys.readouterr().err.splitlines()[-1]
    assert not (run / "report").exists()


def test_a_run_of_the_base_model_is_compared_with_the_published_ones(tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    validation = {"dev": {"manifest": str(tmp_path / "gone.csv")}}
    table = {"run": {"workdir": str(tmp_path), "wandb_project": "p", "wandb_name": "n", "model_type": "spidr"}}
    (run / "config.json").write_text(json.dumps(table | {"data": {"manifest": "m"}, "validation": validation}))
    lines: list[dict[str, object]] = [{"step": 5000, "group": group, "loss": 3.4} for group in ("train", "dev")]
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert main([str(run), "--device", "cpu"]) == 0
    html = (run / "report" / "index.html").read_text()
    assert "dev: the validation loss is 3.40, in published runs at most 2.51 by then." in html
    assert "published" in texts(next(iter(figures_of(html).values())))


def test_a_flat_line_has_short_tick_labels() -> None:
    steps, values = [1.0, 2.0], [0.9997, 0.99970002]
    for title, curve in (("EMA decay", (steps, values)), ("Loss", (steps, [0.0, 0.0]))):
        labels = texts(ET.fromstring(curves("a", {title: {"training": curve}}).svg))
        assert title in labels
        assert max(map(len, labels)) <= 9


def test_panels_of_the_same_layers_have_one_legend() -> None:
    layers = {f"layer {layer}": ([0.0, 400_000.0], [0.0, layer]) for layer in range(5, 13)}
    labels = texts(ET.fromstring(curves("a", {"PNMI": layers, "Bits": layers}).svg))
    assert [labels.count(name) for name in layers] == [1] * 8
    assert labels.count("400k") == 2
    own = texts(ET.fromstring(curves("a", {"PNMI": layers, "Loss": {"valid": layers["layer 5"]}}).svg))
    assert "layer 12" in own
    assert "valid" not in own


def test_labels_are_drawn_where_they_fit() -> None:
    units = [(123, 0.0, 0.04), (12, 0.04, 0.08), (124, 0.08, 0.14), (77, 0.14, 0.15)]
    drawn = utterance("a", np.zeros((257, 600)), 3.0, [], {"layer 5": units}, "title")
    labels = texts(ET.fromstring(drawn.svg))
    assert {"12", "123", "124", "layer 5"} <= set(labels)
    assert "77" not in labels


def test_spans() -> None:
    assert spans("aabbbc", 0.1, 0.45) == [("a", 0.0, 0.2), ("b", 0.2, 0.45)]
    assert spans([], 0.1, 1) == []


def test_a_tone_in_the_spectrogram() -> None:
    time = torch.arange(16_000) / 16_000
    decibels = spectrogram(torch.sin(2 * torch.pi * 2000 * time))
    assert decibels.shape == (257, 201)
    assert (decibels[:, 5:-5].argmax(0) == 2000 / 8000 * 256).all()
    assert np.isfinite(decibels).all()


def test_newest_checkpoint(cfg: Config, tmp_path: Path) -> None:
    assert newest_checkpoint(cfg.run.dir) == cfg.run.dir / "final.pt"
    assert newest_checkpoint(tmp_path) is None
    checkpoint = torch.load(cfg.run.dir / "final.pt", weights_only=True)
    assert checkpoint["step"] == 6
    torch.save({"model": checkpoint["model"]}, tmp_path / "final.pt")
    assert newest_checkpoint(tmp_path) == tmp_path / "final.pt"
    (tmp_path / "final.pt").unlink()
    for step in (5, 6, 10):
        torch.save(checkpoint | {"step": step}, tmp_path / f"step_{step}.pt")
    (tmp_path / "step_x.pt").touch()
    assert newest_checkpoint(tmp_path) == tmp_path / "step_10.pt"


def test_a_run_extended_after_its_end(cfg: Config, tmp_path: Path) -> None:
    """``final.pt`` of six steps is older than the checkpoints of the extended run."""
    run = tmp_path / "run"
    shutil.copytree(cfg.run.dir, run)
    checkpoint = torch.load(run / "final.pt", weights_only=True)
    # All other codewords are so far away that the first is always nearest.
    for name, value in checkpoint["model"].items():
        if name.startswith("heads."):
            value.zero_()
            if name.endswith("bias"):
                value[0] = 1
    torch.save(checkpoint | {"step": 9}, run / "step_9.pt")
    assert newest_checkpoint(run) == run / "step_9.pt"
    assert main([str(run), "--device", "cpu"]) == 0
    assert "1 of 12 units active" in (run / "report" / "index.html").read_text()
