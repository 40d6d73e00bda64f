"""Long recordings: in pieces that change nothing, or in windows, whose effect is as stated."""

import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from helpers.memory import PEAK
from helpers.small_models import tiny_model
from spidr.models import DinoSR, convolutions, long
from spidr.tools import waveforms
from spidr.tools.errors import InputError

SAMPLES = 9000
LENGTHS = [SAMPLES, 1700, 90, 8000, 300]
HOP = 40 / 16_000  # seconds, of the tiny models


def batch() -> torch.Tensor:
    return torch.randn(len(LENGTHS), SAMPLES, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("piece", [60, 1000, 10_000, 30_000])
@pytest.mark.parametrize("mode", ["layer_norm", "group_norm"])
@pytest.mark.parametrize("grad", [False, True])
def test_the_extractor_in_pieces(mode: str, piece: int, grad: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pieces of a row and groups of rows; lengths within and beyond the first piece."""
    model = tiny_model(extractor_mode=mode, extractor_conv_bias=True).double()
    parameters, waveforms, counted = [*model.feature_extractor.parameters()], batch().double(), torch.tensor(LENGTHS)
    channels, _, stride = model.feature_extractor.shapes[0]
    calls: list[int] = []
    at_once = convolutions._extract
    monkeypatch.setattr(convolutions, "_extract", lambda *given: calls.append(1) or at_once(*given))
    for given in (None, counted):
        outcomes = []
        for size in (10**9, piece):
            with monkeypatch.context() as patch, torch.set_grad_enabled(grad):
                patch.setattr(long, "SAMPLES", size)
                patch.setattr(convolutions, "CPU_BYTES", size * channels * 8 // stride)
                out = model.feature_extractor(waveforms, given)
            outcomes.append([out, *(torch.autograd.grad(out.square().mean(), parameters) if grad else ())])
        for one, other in zip(*outcomes, strict=True):
            torch.testing.assert_close(one, other, rtol=0, atol=1e-9)
    assert len(calls) > 4


@pytest.mark.parametrize("bias", [False, True])
@torch.no_grad()
def test_the_transformer_in_pieces(bias: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("dinosr", encoder_qkv_bias=bias).double().eval()
    for parameter in model.student.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    waveforms = batch().double()
    whole = model.get_codebooks(waveforms, lengths=LENGTHS)[1:]
    monkeypatch.setattr(long, "LONG", 50)
    monkeypatch.setattr(long, "PIECE", 30)
    pieces = model.get_codebooks(waveforms, lengths=LENGTHS)[1:]
    for one, other in zip(whole, pieces, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-9)


@torch.no_grad()
def windows(model: DinoSR, row: int, layer: int, size: int, context: int) -> torch.Tensor:
    """From the definition: the layer's output on each window with its context, for one utterance."""
    waveform = batch()[row, : LENGTHS[row]]
    waveform = (waveform - waveform.mean()) / torch.sqrt(waveform.var(correction=0) + 1e-5)
    features, _ = model.project(waveform.unsqueeze(0))
    outputs = []
    for start in range(0, features.shape[1], size):
        left = max(0, start - context)
        output = model.student.get_intermediate_outputs(features[:, left : start + size + context])[layer - 1][0]
        outputs.append(output[start - left :][:size])
    return torch.cat(outputs)


@pytest.mark.parametrize("mode", ["layer_norm", "group_norm"])
@pytest.mark.parametrize(("size", "context"), [(50, 20), (64, None), (30, 0), (100, 500)])
def test_windows(size: int, context: int | None, mode: str) -> None:
    model = tiny_model("spidr", extractor_mode=mode).eval()
    options = {"window": size * HOP, "context": None if context is None else context * HOP}
    features, frame_lengths = model.encode(batch(), LENGTHS, layer=3, **options)
    units, unit_lengths = model.units(batch(), LENGTHS, layer=3, **options)
    assert torch.equal(frame_lengths, unit_lengths)
    for row, num_frames in enumerate(frame_lengths.tolist()):
        expected = windows(model, row, 3, size, size // 4 if context is None else context)
        torch.testing.assert_close(features[row, :num_frames], expected, rtol=0, atol=1e-5)
        assert not features[row, num_frames:].any()
        with torch.no_grad():
            assert torch.equal(units[row, :num_frames], model.heads[1](expected).argmax(-1))
        assert (units[row, num_frames:] == -1).all()


def test_a_window_as_long_as_the_recording_changes_nothing() -> None:
    model = tiny_model("dinosr").eval()
    whole, _ = model.encode(batch(), LENGTHS, layer=4)
    assert torch.equal(model.encode(batch(), LENGTHS, layer=4, window=SAMPLES / 16_000)[0], whole)
    assert not torch.allclose(model.encode(batch(), LENGTHS, layer=4, window=0.1)[0], whole)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"window": 0.001}, "window = 0.001 s is shorter than a frame of 0.0025 s"),
        ({"window": 1.0, "context": -1.0}, "context = -1.0 s needs to be at least 0"),
        ({"context": 1.0}, "goes with a window"),
        ({"window": 0.0}, r"window = 0\.0 s is shorter than a frame"),
        ({"window": -1.0}, r"window = -1\.0 s is shorter than a frame"),
        ({"window": math.inf}, "window = inf s is not a number of seconds"),
        ({"window": math.nan}, "window = nan s is not a number of seconds"),
        ({"window": 1.0, "context": math.inf}, "context = inf s is not a number of seconds"),
        ({"window": 1.0, "context": math.nan}, "context = nan s is not a number of seconds"),
    ],
)
def test_wrong_windows(options: dict[str, float], message: str) -> None:
    for method in ("encode", "units"):
        with pytest.raises(InputError, match=message):
            getattr(tiny_model(), method)(batch(), layer=4, **options)


MEASURE = (
    PEAK
    + """
import sys, torch
sys.path.insert(0, sys.argv[1])
from helpers.small_models import tiny_model
from spidr.config import DEFAULT_CONV_LAYER_CONFIG
shapes = [(64, kernel, stride) for _, kernel, stride in DEFAULT_CONV_LAYER_CONFIG]
model = tiny_model(extractor_conv_layer_config=shapes, encoder_num_heads=1, encoder_num_layers=1, num_codebooks=1)
model.eval().encode(torch.randn(1, 16_000), layer=1)
before = peak()
features, _ = model.encode(torch.randn(1, 600 * 16_000), layer=1)
print(features.shape[1], peak() - before)
"""
)


def test_memory_for_ten_minutes() -> None:
    """The first convolution's output would take 490 MB, an attention matrix 3.6 GB; the waveform and its standardised
    copies take 40 MB each."""
    tests = str(Path(__file__).parents[1])
    done = subprocess.run([sys.executable, "-c", MEASURE, tests], check=True, capture_output=True, text=True)
    frames, kilobytes = map(int, done.stdout.split())
    assert frames == 29_999
    assert kilobytes < 350_000


@pytest.mark.parametrize("mode", ["layer_norm", "group_norm"])
def test_a_recording_that_is_read_piece_by_piece(mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As extraction does with a file: only a window and its context are in memory."""
    monkeypatch.setattr(waveforms, "BLOCK", 1000)
    monkeypatch.setattr(long, "SAMPLES", 1000)
    model, waveform = tiny_model(extractor_mode=mode).eval(), 0.01 * batch()[:1] + 0.3
    asked = []

    def read(start: int, stop: int) -> torch.Tensor:
        asked.append(stop - start)
        return waveform[:, start:stop]

    def layer(features: torch.Tensor, mask: None) -> torch.Tensor:
        return model.student.get_intermediate_outputs(features, mask)[2]

    standardised = waveforms.Standardised(read, SAMPLES)
    with model.inference():
        found = torch.cat([*model.windows(standardised, SAMPLES, layer, size=50, context=20)], 1)
    expected, _ = model.encode(waveform, layer=3, window=50 * HOP, context=20 * HOP)
    assert torch.equal(found, expected)
    assert max(asked) < 3000
