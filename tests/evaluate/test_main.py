"""Units, features and models evaluated from files, by the command line."""

import json
import math
import re
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import torch

from helpers.small_models import AT_50_HZ, tiny_model
from helpers.synthetic import write_lines
from helpers.tiny_run import write_recordings
from spidr.data import speech_dataset
from spidr.data.alignments import read_alignments
from spidr.evaluate import main
from spidr.evaluate.abx import Scorer, read_items
from spidr.evaluate.model import _Spool
from spidr.models import DinoSR
from spidr.models.metrics import units_quality
from spidr.tools.errors import InputError

needs_fastabx = pytest.mark.skipif(sys.version_info < (3, 12), reason="fastabx needs Python 3.12")


def varied_model(model_type: str) -> DinoSR:
    """A model without biases, so that its units depend on the audio."""
    model = tiny_model(model_type, **AT_50_HZ).eval()
    for head in model.heads:
        torch.nn.init.zeros_(head[0].bias)  # type: ignore[index]
    return model


def save_model(folder: Path, model: DinoSR, model_type: str) -> str:
    torch.save({"model": model.state_dict()}, folder / "checkpoint.pt")
    (folder / "config.json").write_text(json.dumps({"model_type": model_type, "model": asdict(model.cfg)}))
    return str(folder / "checkpoint.pt")


def rows_of(capsys: pytest.CaptureFixture[str]) -> list[dict[str, float]]:
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


# ------------------------------------------------------------------------------------------------------------ units


def test_units_with_known_quality(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A, B and silence are equally frequent; A has one unit, B two, one of which is also the silence's."""
    phones = write_lines(
        tmp_path / "phones.jsonl",
        {"fileid": "r1", "phones": [["A", 0.0, 0.08], ["B", 0.08, 0.16]], "duration": 0.16},
        {"fileid": "r2", "phones": ["SIL"] * 8},
        {"fileid": "not among the units", "phones": ["Z"]},
    )
    units = write_lines(
        tmp_path / "units.jsonl",
        {"fileid": "x/r1", "units": [3, 3, 3, 3, 9, 9, 0, 0]},
        {"fileid": "x/r2", "units": [0] * 4},
    )
    assert main(["units", str(units), str(phones), "--num-units", "16", "--json"]) == 0
    (row,) = rows_of(capsys)
    entropy = math.log2(3)
    given_unit = 6 / 12 * (math.log2(3) - 2 / 3)  # only unit 0 is ambiguous: B or, twice as likely, silence
    assert row == {
        "units": str(units),
        "phone_purity": pytest.approx((4 + 2 + 4) / 12),
        "cluster_purity": pytest.approx((4 + 2 + 4) / 12),
        "pnmi": pytest.approx((entropy - given_unit) / entropy),
        "codebook_perplexity": pytest.approx(2 ** (1 / 3 * math.log2(3) + 1 / 6 * math.log2(6) + 1 / 2)),
        "active_codewords": 3,
        "bitrate": pytest.approx(4 * 4 / 0.24),
    }


def test_several_files_of_units_in_a_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    phones = write_lines(tmp_path / "phones.jsonl", {"name": "r", "phones": ["A", "A", "B", "B"]})
    good = write_lines(tmp_path / "good.jsonl", {"name": "r", "units": [0, 1]})
    bad = write_lines(tmp_path / "bad.jsonl", {"name": "r", "units": [5, 5]})
    assert main(["units", str(good), str(bad), str(phones)]) == 0
    header, rule, *lines = capsys.readouterr().out.splitlines()
    assert [cell.strip() for cell in header.split("|")[1:4]] == ["units", "PNMI", "phone purity"]
    assert set(rule) == set("-| ")
    assert [line.split("|")[2].strip() for line in lines] == ["1.0000", "0.0000"]
    assert len({len(line) for line in (header, rule, *lines)}) == 1


NUMPY_ALONE = """
import sys
from spidr.evaluate import main

assert main(["units", *sys.argv[1:]]) == 0
assert not {"torch", "polars", "soundfile", "fastabx"} & sys.modules.keys()
"""


def test_units_import_only_numpy(tmp_path: Path) -> None:
    """Importing torch takes longer than the units of LibriSpeech's dev sets."""
    phones = write_lines(tmp_path / "phones.jsonl", {"name": "r", "phones": ["A", "A", "B", "B"]})
    units = write_lines(tmp_path / "units.jsonl", {"name": "r", "units": [0, 1]})
    command = [sys.executable, "-c", NUMPY_ALONE, str(units), str(phones)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "1.0000" in done.stdout


def test_mistakes_end_with_one_message(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    phones = write_lines(tmp_path / "phones.jsonl", {"name": "r", "phones": ["A", "A", "B", "B"]})
    units = write_lines(tmp_path / "units.jsonl", {"name": "r", "units": [0, 300]}, {"name": "s", "units": [0]})
    assert main(["units", str(units), str(phones)]) == 2
    out, err = capsys.readouterr()
    said = f"{phones}: 1 of the 2 recordings of {units} are not aligned, such as s"
    assert (out, err) == ("", f"error: {said} (see docs/evaluate.md#units-against-phones)\n")
    write_lines(units, {"name": "r", "units": [0, 300]})
    assert main(["units", str(units), str(phones)]) == 2
    assert capsys.readouterr().err == "error: r: units from 0 to 300, expected from 0 to 255\n"
    assert main(["units", str(tmp_path / "gone.parquet"), str(phones)]) == 2
    assert "gone.parquet: cannot be read (No such file" in capsys.readouterr().err


# ------------------------------------------------------------------------------------------------------------ ABX


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Noise with random phones and items, from two speakers; recording 0 is not aligned."""
    folder = tmp_path_factory.mktemp("corpus")
    manifest = write_recordings(folder / "recordings", count=9)
    (folder / "manifest.csv").write_text(manifest.read_text())
    rng = np.random.default_rng(0)
    lines, items = [], ["#file onset offset #phone prev-phone next-phone speaker"]
    for row in speech_dataset(manifest, normalize=True).manifest.iter_rows(named=True):
        names = rng.choice(["A", "B", "C"], int(row["num_samples"] / 1600)).tolist()
        intervals = [(name, i / 10, (i + 1) / 10) for i, name in enumerate(names)]
        if row["fileid"] != "0":
            lines.append({"fileid": row["fileid"], "phones": intervals, "duration": row["num_samples"] / 16_000})
        if row["fileid"] != "8":
            speaker = int(row["fileid"]) % 2
            items += [f"{row['fileid']} {start} {end} {name} x y s{speaker}" for name, start, end in intervals]
    write_lines(folder / "phones.jsonl", *lines)
    (folder / "phoneme.item").write_text("\n".join(items) + "\n")
    return folder


@needs_fastabx
def test_abx_of_folders_and_units(corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rng = np.random.default_rng(1)
    layers = {}
    for layer in ("layer1", "layer2"):
        (tmp_path / layer / "sub").mkdir(parents=True)
        layers[layer] = {str(i): rng.standard_normal((40, 4)).astype(np.float32) for i in range(9)}
        for name, features in layers[layer].items():
            if layer == "layer1":
                np.save(tmp_path / layer / "sub" / f"{name}.npy", features)
            else:
                torch.save(torch.from_numpy(features), tmp_path / layer / f"{name}.pt")
    units = {str(i): rng.integers(0, 5, 40) for i in range(9)}
    write_lines(tmp_path / "units.jsonl", *({"fileid": name, "units": u.tolist()} for name, u in units.items()))
    sources = [str(tmp_path / name) for name in ("layer1", "layer2", "units.jsonl")]
    assert main(["abx", *sources, str(corpus / "phoneme.item"), "--json", "--max-size-group", "0"]) == 0
    rows = rows_of(capsys)
    scorer = Scorer(read_items(corpus / "phoneme.item"), max_size_group=None)
    expected = [scorer.score(layers["layer1"]), scorer.score(layers["layer2"]), scorer.score(units, "identical")]
    assert [row.pop("features") for row in rows] == sources
    assert rows == [score._asdict() for score in expected]
    assert len({score.within for score in expected}) == 3


@needs_fastabx
def test_bad_feature_folders(corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    item = str(corpus / "phoneme.item")
    for name, message in (("empty", "no .npy or .pt file"), ("broken", "no features of a recording")):
        (tmp_path / name).mkdir()
        if name == "broken":
            (tmp_path / name / "0.npy").write_bytes(b"nothing")
            for i in range(1, 9):
                np.save(tmp_path / name / f"{i}.npy", np.ones((40, 2), np.float32))
        assert main(["abx", str(tmp_path / name), item]) == 2
        assert message in capsys.readouterr().err


# ------------------------------------------------------------------------------------------------------------ model


@needs_fastabx
def test_model_on_items_of_other_recordings(corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    header, *rows = (corpus / "phoneme.item").read_text().splitlines(keepends=True)
    (tmp_path / "other.item").write_text(header + "".join(f"other{row}" for row in rows))
    arguments = [save_model(tmp_path, varied_model("spidr"), "spidr"), str(corpus / "manifest.csv")]
    arguments += [str(corpus / "phones.jsonl"), "--item", str(tmp_path / "other.item"), "--device", "cpu"]
    assert main(["model", *arguments]) == 2
    assert re.search(r"other\.item: .*manifest\.csv lacks \d+ of its recordings, such as oth", capsys.readouterr().err)


def test_a_full_disk_is_named(tmp_path: Path) -> None:
    (tmp_path / "3").symlink_to("/dev/full")
    with pytest.raises(InputError, match=r"cannot be written \(No space left"):
        _Spool(tmp_path, [3]).add("a", [torch.ones(2, 4)])


@needs_fastabx
@pytest.mark.parametrize("model_type", ["spidr", "dinosr"])
def test_model(corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], model_type: str) -> None:
    """Every layer and codebook, as if recordings were encoded one by one."""
    model = varied_model(model_type)
    arguments = [save_model(tmp_path, model, model_type), str(corpus / "manifest.csv"), str(corpus / "phones.jsonl")]
    arguments += ["--item", str(corpus / "phoneme.item"), "--device", "cpu", "--max-batch-length", "24000", "--json"]
    assert main(["model", *arguments]) == 0
    rows = rows_of(capsys)
    assert [row["layer"] for row in rows] == [1, 2, 3, 4]
    dataset = speech_dataset(corpus / "manifest.csv", normalize=True)
    names = dataset.manifest["fileid"].to_list()
    with torch.no_grad():
        outputs = {name: model.get_intermediate_outputs(dataset[i][None]) for i, name in enumerate(names)}
        codebooks = {name: model.get_codebooks(dataset[i][None]) for i, name in enumerate(names)}
    phones = read_alignments(corpus / "phones.jsonl")
    scorer = Scorer(read_items(corpus / "phoneme.item"))
    for layer, row in enumerate(rows):
        expected = scorer.score({name: x[layer][0].numpy() for name, x in outputs.items()})
        assert row["abx_within"] == pytest.approx(expected.within, abs=0.02)  # near ties may go either way
        assert row["abx_across"] == pytest.approx(expected.across, abs=0.02)
        if layer == 0:
            assert row.keys() == {"layer", "abx_within", "abx_across"}
            continue
        units = {name: x[layer][0].argmax(-1).numpy() for name, x in codebooks.items()}
        assert len(np.unique(np.concatenate(list(units.values())))) > 2
        quality = units_quality(
            {name: (phones[name], units[name].tolist()) for name in phones}, num_units=12, num_phones=4
        )
        assert {name: row[name] for name in quality._fields} == pytest.approx(quality._asdict())
        expected = scorer.score(units, "identical")
        assert row["units_abx_within"] == pytest.approx(expected.within)
        assert row["units_abx_across"] == pytest.approx(expected.across)


def test_some_layers_of_a_model_without_items(corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    checkpoint = save_model(tmp_path, varied_model("spidr"), "spidr")
    arguments = ["model", checkpoint, str(corpus / "manifest.csv"), str(corpus / "phones.jsonl")]
    assert main([*arguments, "--layers", "4,1", "--device", "cpu"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split("|")[1].strip() for line in lines[2:]] == ["1", "4"]
    assert set(lines[2].split("|")[2]) == {" "}
    assert float(lines[3].split("|")[2]) > 0  # PNMI
    assert main([*arguments, "--layers", "5"]) == 2
    assert capsys.readouterr().err == "error: layer must be between 1 and 4, not 5\n"
    for length in ("0", "-1", "100000000000"):
        assert main([*arguments, "--max-batch-length", length]) == 2
        message = f"error: max_batch_length: found {length}, expected 1 to 2,147,483,647 samples\n"
        assert capsys.readouterr().err == message
    write_lines(tmp_path / "phones.jsonl", {"fileid": "other", "phones": ["A"]})
    assert main([*arguments[:3], str(tmp_path / "phones.jsonl")]) == 2
    assert "aligns no recording" in capsys.readouterr().err
