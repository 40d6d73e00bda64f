"""Exported encoders, loaded by their target software, give the model's results."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import onnx
import onnxruntime
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

import spidr
from helpers.small_models import tiny_config, tiny_model
from spidr.config import model_config
from spidr.export import export_onnx, export_safetensors, export_transformers
from spidr.export.__main__ import main
from spidr.export.configuration_spidr import SpidREncoderConfig
from spidr.export.modeling_spidr import SpidREncoder
from spidr.models import DinoSR, build_model, hub, load_encoder
from spidr.tools.errors import InputError

OTHER = {
    "extractor_mode": "group_norm",
    "extractor_conv_bias": True,
    "encoder_layer_norm_first": True,
    "encoder_qkv_bias": True,
    "encoder_pos_conv_kernel": 12,
}
CASES = [("spidr", {}), ("spidr", OTHER), ("dinosr", {}), ("dinosr", OTHER)]


def trained(model_type: str, changes: dict[str, Any]) -> DinoSR:
    """A model whose norms and biases differ from a new model's."""
    model = tiny_model(model_type, **changes)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model.eval()


def batch(size: int, samples: int) -> tuple[Tensor, Tensor]:
    """Utterances of unequal lengths, with padding that is not silence."""
    generator = torch.Generator().manual_seed(size * samples)
    lengths = torch.randint(min(500, samples - 1), samples, (size,), generator=generator)
    lengths[0] = samples
    return 0.1 * torch.randn(size, samples, generator=generator) + 0.01, lengths


# ------------------------------------------------------------------------------------------------------- safetensors


@pytest.mark.parametrize(("model_type", "changes"), CASES)
def test_safetensors_and_back(tmp_path: Path, model_type: str, changes: dict[str, Any]) -> None:
    model = trained(model_type, changes)
    export_safetensors(model, tmp_path / "encoder.safetensors")
    loaded = build_model(checkpoint=tmp_path / "encoder.safetensors")
    assert (type(loaded), loaded.cfg) == (type(model), model.cfg)
    saved = {name: value for name, value in model.state_dict().items() if not name.startswith("teacher.")}
    assert loaded.state_dict().keys() == saved.keys()
    assert all(torch.equal(value, saved[name]) for name, value in loaded.state_dict().items())
    waveforms, lengths = batch(3, 4000)
    loaded.eval()
    assert torch.equal(loaded.encode(waveforms, lengths, layer=2)[0], model.encode(waveforms, lengths, layer=2)[0])
    assert torch.equal(loaded.units(waveforms, lengths, layer=3)[0], model.units(waveforms, lengths, layer=3)[0])
    with pytest.raises(InputError, match="no teacher"):
        loaded.train()(waveforms)
    with safe_open(tmp_path / "encoder.safetensors", "pt") as file:
        assert file.metadata()["spidr_version"] == spidr.__version__


def test_safetensors_from_elsewhere(tmp_path: Path) -> None:
    """Without a configuration in the header, config.json beside the file is used."""
    model = trained("spidr", {})
    weights = {name: value for name, value in model.state_dict().items() if not name.startswith("teacher.")}
    save_file(weights, tmp_path / "model.safetensors")
    table = vars(model.cfg)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "spidr", "model": table}))
    loaded = build_model(checkpoint=tmp_path / "model.safetensors")
    assert loaded.cfg == model.cfg
    assert torch.equal(loaded.mask_embedding, model.mask_embedding)


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ({"model_type": "hubert", "model": "{}"}, "model_type"),
        ({"model_type": "spidr", "model": "[1]"}, "not a table"),
        ({"model_type": "spidr", "model": "{"}, "damaged"),
        ({"model_type": "spidr", "model": '{"a":' * 100_000}, "damaged"),
        ({"model_type": "spidr", "model": '{"encoder_layers": 2}'}, "encoder_layers: unknown key"),
        ({"model_type": "spidr", "model": "{}"}, "of another shape"),
    ],
)
def test_safetensors_that_do_not_fit(tmp_path: Path, metadata: dict[str, str], message: str) -> None:
    path = tmp_path / "x.safetensors"
    save_file(dict(tiny_model().drop_teacher().state_dict()), path, metadata)
    with pytest.raises(InputError, match=message) as error:
        build_model(checkpoint=path)
    assert str(path) in str(error.value)


@pytest.mark.parametrize(
    "content", [b"", b"\xff" * 100, b"\x10" + b"\0" * 7 + b"{" * 16], ids=["empty", "size", "header"]
)
def test_safetensors_damaged(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(content)
    for cfg in (None, tiny_config()):
        with pytest.raises(InputError, match=r"x\.safetensors: .*damaged"):
            build_model(cfg=cfg, checkpoint=path)


# ------------------------------------------------------------------------------------------------------------- ONNX


FEW = {"encoder_num_layers": 3, "num_codebooks": 2, "encoder_pos_conv_depth": 1}  # exporting takes seconds per layer


@pytest.mark.parametrize(("model_type", "changes"), [CASES[0], CASES[3]])
def test_onnx(tmp_path: Path, capfd: pytest.CaptureFixture[str], model_type: str, changes: dict[str, Any]) -> None:
    model = trained(model_type, {**FEW, **changes})
    before = {name: value.clone() for name, value in model.state_dict().items()}
    random = torch.get_rng_state()
    export_onnx(model, tmp_path / "encoder.onnx", layers=[2, 1])
    assert torch.equal(torch.get_rng_state(), random)
    assert capfd.readouterr() == ("", "")
    assert [path.name for path in tmp_path.iterdir()] == ["encoder.onnx"]
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    check_outputs(model, tmp_path / "encoder.onnx")
    proto = onnx.load(tmp_path / "encoder.onnx")
    onnx.checker.check_model(proto)
    metadata = {entry.key: entry.value for entry in proto.metadata_props}
    assert json.loads(metadata["layers"]) == [1, 2]
    assert metadata["spidr_version"] == spidr.__version__
    assert model_config(metadata["model_type"], json.loads(metadata["model"])) == model.cfg
    # No layer occurs twice, or without being needed; DinoSR's units need all layers.
    softmaxes = [node for node in proto.graph.node if node.op_type == "Softmax"]
    assert len(softmaxes) == {"spidr": 2, "dinosr": 3}[model_type]


def check_outputs(model: DinoSR, path: Path) -> None:
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    assert names == ["frames", "features_1", "features_2", "units_2"]  # layer 1 has no codebook
    one_frame = next(n for n in range(1, 1000) if model.feature_extractor.num_frames(n))
    for size, samples in [(1, one_frame), (2, 8000), (5, 3333), (4, 12_001)]:
        waveforms, lengths = batch(size, samples)
        results = session.run(None, {"waveforms": waveforms.numpy(), "lengths": lengths.numpy()})
        found = dict(zip(names, map(torch.from_numpy, results), strict=True))
        units, frames = model.units(waveforms, lengths, layer=2)
        assert torch.equal(found["frames"], frames)
        exists = torch.arange(units.shape[1]) < frames.unsqueeze(1)
        for layer in (1, 2):
            features, _ = model.encode(waveforms, lengths, layer=layer)
            torch.testing.assert_close(found[f"features_{layer}"][exists], features[exists], rtol=0, atol=1e-4)
        assert (found["units_2"] == units).float().mean() > 0.99  # two codewords may be equally likely
        assert torch.equal(found["units_2"] == -1, ~exists)
    # A graph cannot refuse input as the library does: bad rows are marked, the others are unaffected.
    waveforms, lengths = batch(3, 8000)
    waveforms[0, 100] = torch.nan
    lengths[1] = 9000
    results = session.run(None, {"waveforms": waveforms.numpy(), "lengths": lengths.numpy()})
    frames, features, _, wrong = map(torch.from_numpy, results)
    assert (wrong[:2] == -1).all()
    assert features[:2, : int(frames[0])].isnan().all()
    assert (wrong[2, : int(frames[2])] >= 0).all()


# ----------------------------------------------------------------------------------------------------- transformers

TRANSFORMERS = """
import socket, sys
import torch

class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "spidr":
            raise ModuleNotFoundError(name)

def refuse(*_, **__):
    raise OSError("no network")

sys.meta_path.insert(0, Refuse())
socket.socket.connect = refuse
from transformers import AutoFeatureExtractor, AutoModel

for folder in sys.argv[1:]:
    model = AutoModel.from_pretrained(folder, trust_remote_code=True)
    expected = torch.load(folder + ".pt")
    waveforms, lengths = expected["waveforms"], expected["lengths"]
    assert not model.training
    assert torch.equal(model.encode(waveforms, lengths, layer=2)[0], expected["features"])
    assert torch.equal(model.units(waveforms, lengths, layer=3)[0], expected["units"])
    if folder == sys.argv[-1]:
        continue
    extractor = AutoFeatureExtractor.from_pretrained(folder)
    rows = [row[:length].numpy() for row, length in zip(waveforms, lengths)]
    inputs = extractor(rows, sampling_rate=16_000, padding=True, return_tensors="pt")
    with torch.no_grad():
        output = model(**inputs)
    assert len(output.hidden_states) == 5
    torch.testing.assert_close(output.hidden_states[2], expected["features"], rtol=0, atol=1e-6)
    assert torch.equal(output.last_hidden_state, output.hidden_states[-1])
    model.save_pretrained(folder + "-again")
    again = AutoModel.from_pretrained(folder + "-again", trust_remote_code=True)
    assert torch.equal(again.encode(waveforms, lengths, layer=2)[0], expected["features"])
"""


def test_transformers_loads_the_folder_alone(tmp_path: Path) -> None:
    for name, (model_type, changes) in {"spidr": CASES[0], "dinosr": CASES[3]}.items():
        model = trained(model_type, changes)
        export_transformers(model, tmp_path / name)
        assert build_model(checkpoint=tmp_path / name / "model.safetensors").cfg == model.cfg
        waveforms, lengths = batch(3, 4000)
        expected = {
            "waveforms": waveforms,
            "lengths": lengths,
            "features": model.encode(waveforms, lengths, layer=2)[0],
            "units": model.units(waveforms, lengths, layer=3)[0],
        }
        torch.save(expected, tmp_path / f"{name}.pt")
    home = tmp_path / "home"
    home.mkdir()
    done = subprocess.run(
        [sys.executable, "-c", TRANSFORMERS, str(tmp_path / "spidr"), str(tmp_path / "dinosr")],
        capture_output=True, text=True, check=False, cwd=home,
        env={"HF_HOME": str(home), "HF_HUB_OFFLINE": "1", "PATH": "", "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr


def test_transformers_refuses_padding_at_the_beginning() -> None:
    model = trained("spidr", {})
    encoder = SpidREncoder(SpidREncoderConfig("spidr", vars(model.cfg))).eval()
    waveforms = torch.randn(2, 4000)
    mask = torch.ones(2, 4000, dtype=torch.int64)
    mask[1, 3000:] = 0
    assert encoder(waveforms, mask).last_hidden_state.isfinite().all()
    for wrong in (mask.flip(1), mask[:, :-1]):
        with pytest.raises(InputError, match=r"attention_mask must be \(B, S\): 1 for a row's samples, then 0"):
            encoder(waveforms, wrong)


def test_other_hidden_folders_are_left_alone(tmp_path: Path) -> None:
    (tmp_path / ".out.tmp").mkdir()
    (tmp_path / ".out.tmp" / "data").write_text("precious")
    export_transformers(trained("spidr", {}), tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == [".out.tmp", "out"]
    assert (tmp_path / ".out.tmp" / "data").read_text() == "precious"


# ------------------------------------------------------------------------------------------------- the command line


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    model = trained("spidr", {})
    torch.save({"model": model.state_dict()}, tmp_path / "final.pt")
    document = {"model_type": "spidr", "model": vars(model.cfg)}
    (tmp_path / "config.json").write_text(json.dumps(document))
    return tmp_path / "final.pt"


def header_and_weights(path: Path) -> tuple[Any, ...]:
    """Metadata and weights, to compare files whose header entries are in random order."""
    with safe_open(path, "pt") as file:
        return file.metadata(), {name: file.get_tensor(name).tolist() for name in file.keys()}  # noqa: SIM118


def test_in_another_locale(checkpoint: Path, tmp_path: Path) -> None:
    env = os.environ | {"LC_ALL": "POSIX", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"}
    command = [sys.executable, "-m", "spidr.export", "transformers", str(checkpoint), str(tmp_path / "out")]
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert load_encoder(tmp_path / "out").cfg == load_encoder(checkpoint).cfg


def test_command_line(checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first, second, folder = tmp_path / "a.safetensors", tmp_path / "b.safetensors", tmp_path / "folder"
    assert main(["safetensors", str(checkpoint), str(first)]) == 0
    assert main(["safetensors", str(first), str(second)]) == 0
    assert header_and_weights(first) == header_and_weights(second)
    assert main(["transformers", str(first), str(folder)]) == 0
    assert header_and_weights(folder / "model.safetensors") == header_and_weights(first)
    assert capsys.readouterr().out.split() == [str(first), str(second), str(folder)]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["safetensors", "hubert_base", "out.safetensors"],
            "neither a file nor a published model",
        ),
        (["safetensors", "final.pt", "out.bin"], "must end in .safetensors"),
        (["safetensors", "final.pt", "config.json"], "exists"),
        (["transformers", "final.pt", "missing/folder"], "is in a folder that does not exist"),
        (["onnx", "final.pt", "out.onnx", "--layers", "7"], "layer must be between 1 and 4, not 7"),
    ],
)
def test_command_line_errors(
    checkpoint: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    message: str,
) -> None:
    monkeypatch.chdir(checkpoint.parent)
    before = sorted(checkpoint.parent.iterdir())
    assert main(arguments) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("error: ")
    assert captured.err.count("\n") == 1
    assert message in captured.err
    assert sorted(checkpoint.parent.iterdir()) == before


def test_missing_package(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("safetensors", "onnxscript"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(InputError, match=r"pip install 'spidr\[export\]'"):
        export_safetensors(tiny_model(), tmp_path / "a.safetensors")
    with pytest.raises(InputError, match=r"pip install 'spidr\[export\]'"):
        export_onnx(tiny_model(), tmp_path / "a.onnx")
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "a.safetensors").write_bytes(b"any")
    with pytest.raises(InputError, match=r"pip install 'spidr\[export\]'"):
        hub.load_weights(tmp_path / "a.safetensors")
