"""Features and units of batches of utterances."""

import copy
import math
import warnings
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from helpers.small_models import tiny_model
from helpers.utterances import LENGTHS, num_frames, padded, utterances
from spidr.data.audio import standardize, statistics_of
from spidr.models import Encoder, standardise
from spidr.models.kernels import exact_products
from spidr.tools import waveforms as waveform_tools
from spidr.tools.errors import InputError

BOTH = pytest.mark.parametrize("model_type", ["spidr", "dinosr"])


@BOTH
@pytest.mark.parametrize("norm_first", [False, True])
@pytest.mark.parametrize("mode", ["layer_norm", "group_norm"])
@torch.no_grad()
def test_a_padded_batch_gives_what_each_utterance_gives_alone(model_type: str, norm_first: bool, mode: str) -> None:
    model = tiny_model(
        model_type, encoder_layer_norm_first=norm_first, extractor_mode=mode, encoder_qkv_bias=True
    ).eval()
    layers = model.get_intermediate_outputs(padded(), lengths=LENGTHS)
    residual = model.get_intermediate_outputs(padded(), lengths=LENGTHS, before_residual=False)
    codebooks = model.get_codebooks(padded(), lengths=torch.tensor(LENGTHS))
    for row, waveform in enumerate(utterances()):
        frames, alone = num_frames(model, len(waveform)), waveform.unsqueeze(0)
        pairs = [
            *zip(layers, model.get_intermediate_outputs(alone), strict=True),
            *zip(residual, model.get_intermediate_outputs(alone, before_residual=False), strict=True),
            *zip(codebooks[1:], model.get_codebooks(alone)[1:], strict=True),
        ]
        for together, single in pairs:
            torch.testing.assert_close(together[row, :frames], single[0], rtol=0, atol=1e-5)
        for together, single in pairs[-3:]:  # the units
            assert torch.equal(together[row, :frames].argmax(-1), single[0].argmax(-1))


@pytest.mark.parametrize(
    ("lengths", "message"),
    [
        ([3000, 20, 60, 2500], r"row 1: 20 samples are too short"),
        ([3001, 1700, 60, 2500], r"row 0: length 3001 is more than the 3000 samples"),
        ([3000, 1700], r"lengths must be \(4,\)"),
    ],
)
def test_wrong_lengths(lengths: list[int], message: str) -> None:
    with pytest.raises(InputError, match=message):
        tiny_model().get_codebooks(padded(), lengths=lengths)


@pytest.mark.parametrize("method", ["forward", "get_codebooks", "get_intermediate_outputs", "encode", "units"])
@pytest.mark.parametrize(
    ("waveforms", "lengths", "message"),
    [
        (torch.zeros(3000), None, r"waveforms must be \(batch, samples\), not of shape \(3000,\)"),
        (torch.zeros(1, 1, 3000), None, r"waveforms must be \(batch, samples\), not of shape \(1, 1, 3000\)"),
        (torch.zeros(1, 3000, dtype=torch.int16), None, r"waveforms must be floats, about -1 to 1, not torch\.int16"),
        (torch.zeros(1, 3000, dtype=torch.complex64), None, "must be floats, about -1 to 1, not torch.complex64"),
        (torch.zeros(1, 3000, dtype=torch.float64), None, r"waveforms must be torch\.float32, not torch\.float64"),
        (torch.zeros(2, 3000), [3000], r"lengths must be \(2,\), not of shape \(1,\)"),
        (torch.zeros(2, 3000), [3000.0, 2000.0], "lengths must be integers, not torch.float32"),
        (torch.zeros(2, 3000), [True, True], "lengths must be integers, not torch.bool"),
        (torch.zeros(0, 3000), None, "at least one row"),
        (torch.zeros(2, 3000), torch.tensor([[3000], [3000]]), r"lengths must be \(2,\), not of shape \(2, 1\)"),
    ],
)
def test_waveforms_must_be_a_batch(method: str, waveforms: Tensor, lengths: Any, message: str) -> None:
    options: dict[str, Any] = {"layer": 4} if method in ("encode", "units") else {}
    with pytest.raises(InputError, match=message):
        getattr(tiny_model(), method)(waveforms, lengths=lengths, **options)


@torch.no_grad()
def test_get_codebooks() -> None:
    for model_type in ("spidr", "dinosr"):
        model = tiny_model(model_type).eval()
        waveforms = torch.randn(1, 1500)
        probabilities = model.get_codebooks(waveforms)
        assert probabilities[0] is None
        onehot = model.get_codebooks(waveforms, onehot=True)
        for soft, hard in zip(probabilities[1:], onehot[1:], strict=True):
            assert soft.shape == (1, num_frames(model, 1500), 12)  # the batch dimension is kept
            torch.testing.assert_close(soft.sum(-1), torch.ones(soft.shape[:2]))
            assert hard.dtype == torch.int64
            assert torch.equal(hard, F.one_hot(soft.argmax(-1), 12))
        for n in range(1, 5):
            first = model.get_codebooks(waveforms, num_layers=n)
            assert len(first) == n
            for a, b in zip(first[1:], probabilities[1:], strict=False):
                torch.testing.assert_close(a, b)
        with pytest.raises(ValueError, match="between 1 and 4, not 5"):
            model.get_codebooks(waveforms, num_layers=5)


@torch.no_grad()
def test_heads_read_the_stated_layers() -> None:
    for model_type in ("spidr", "dinosr"):
        model = tiny_model(model_type).eval()
        waveforms = torch.randn(2, 1500)
        features, _ = model.project(waveforms)
        layers, final = model.get_intermediate_outputs(waveforms), model.student(features)
        for k, soft in enumerate(model.get_codebooks(waveforms)[1:]):
            read = layers[1 + k] if model_type == "spidr" else final
            torch.testing.assert_close(soft, model.heads[k](read).exp())


@BOTH
@torch.no_grad()
def test_encode_and_units_standardise_each_utterance_over_its_own_samples(model_type: str) -> None:
    model = tiny_model(model_type).eval()
    scaled = [7 * waveform + 3 for waveform in utterances()]
    batch = torch.nn.utils.rnn.pad_sequence(scaled, batch_first=True)
    features, frame_lengths = model.encode(batch, LENGTHS, layer=3)
    units, unit_lengths = model.units(batch, LENGTHS, layer=3)
    assert frame_lengths.tolist() == unit_lengths.tolist() == [num_frames(model, n) for n in LENGTHS]
    for row, waveform in enumerate(scaled):
        normed = (waveform - waveform.mean()) / torch.sqrt(waveform.var(correction=0) + 1e-5)
        expected = model.get_intermediate_outputs(normed.unsqueeze(0), num_layers=3)[-1][0]
        torch.testing.assert_close(features[row, : len(expected)], expected, rtol=0, atol=1e-5)
        expected_units = model.get_codebooks(normed.unsqueeze(0))[2][0].argmax(-1)
        assert torch.equal(units[row, : len(expected_units)], expected_units)
        assert (units[row, len(expected_units) :] == -1).all()
    plain, _ = model.encode(batch[:1], layer=3, normalize=False)
    torch.testing.assert_close(plain, model.get_intermediate_outputs(batch[:1])[2])


def test_layers_without_units() -> None:
    model = tiny_model().eval()
    with pytest.raises(InputError, match="layer 1 has no codebook; layers 2 to 4 have one"):
        model.units(padded(), LENGTHS, layer=1)
    with pytest.raises(InputError, match="no layer 6, the best of the base model: choose a layer from 1 to 4"):
        model.encode(padded(), LENGTHS)  # the best layer of the base model


@BOTH
def test_training_mode_makes_no_difference_and_comes_back(model_type: str) -> None:
    model = tiny_model(model_type)
    expected = model.eval().units(padded(), LENGTHS, layer=3)[0], model.encode(padded(), LENGTHS, layer=3)[0]
    model.train()
    model.student.layers[1].eval()  # the user's choice
    modes = [module.training for module in model.modules()]
    found = model.units(padded(), LENGTHS, layer=3)[0], model.encode(padded(), LENGTHS, layer=3)[0]
    assert torch.equal(found[0], expected[0])
    assert torch.equal(found[1], expected[1])
    assert not found[1].requires_grad
    assert [module.training for module in model.modules()] == modes
    with pytest.raises(InputError):
        model.units(torch.full((1, 3000), math.nan), layer=3)
    assert [module.training for module in model.modules()] == modes


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_arrays(dtype: type) -> None:
    model, array = tiny_model().eval(), padded().numpy()
    expected = model.units(padded(), LENGTHS, layer=3)
    found = model.units(array.astype(dtype), np.array(LENGTHS), layer=3)
    assert torch.equal(found[0], expected[0])
    assert torch.equal(found[1], expected[1])
    with pytest.raises(InputError, match="must be floats, about -1 to 1, not int16"):
        model.units((1000 * array).astype(np.int16), layer=3)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf, 1e30])
@pytest.mark.parametrize("options", [{}, {"normalize": False}, {"window": 0.1}], ids=str)
def test_samples_that_are_not_finite_are_refused(bad: float, options: dict[str, Any]) -> None:
    model, waveforms = tiny_model().eval(), padded()
    waveforms[1, LENGTHS[1] :] = bad  # padding does not count
    expected = model.units(padded(), LENGTHS, layer=3, **options)[0]
    assert torch.equal(model.units(waveforms, LENGTHS, layer=3, **options)[0], expected)
    waveforms[1, 5] = bad
    for method in (model.encode, model.units):
        with pytest.raises(InputError, match="row 1: samples that are NaN or infinite"):
            method(waveforms, LENGTHS, layer=3, **options)


def test_a_quiet_recording_gives_one_warning() -> None:
    waveform_tools._warn_of_quiet_recordings.cache_clear()
    model = tiny_model().eval()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.units(0.006 * padded(), LENGTHS, layer=3)
        model.units(0.004 * padded(), LENGTHS, layer=3, normalize=False)
    with pytest.warns(UserWarning, match="quieter than -45 dBFS"):
        model.units(0.004 * padded(), LENGTHS, layer=3)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.units(0.004 * padded(), LENGTHS, layer=3)


def test_standardise() -> None:
    waveforms = 7 * padded() + 3
    found = standardise(waveforms, torch.tensor(LENGTHS))
    for row, length in enumerate(LENGTHS):
        x = waveforms[row, :length].double()
        expected = (x - x.mean()) / torch.sqrt(x.var(correction=0) + 1e-5)
        torch.testing.assert_close(found[row, :length].double(), expected, rtol=0, atol=1e-6)
        assert not found[row, length:].any()
        assert torch.equal(standardise(waveforms[row : row + 1, :length])[0], found[row, :length])


def test_standardise_in_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    waveforms, lengths = 1e-3 * padded() + 100, torch.tensor(LENGTHS)
    expected = standardise(waveforms, lengths), standardise(waveforms)
    monkeypatch.setattr(waveform_tools, "BLOCK", 97)
    torch.testing.assert_close((standardise(waveforms, lengths), standardise(waveforms)), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("length", [1, 400, 160_000])
def test_training_standardises_in_the_same_way(length: int) -> None:
    """Training reads parts of recordings, with the same result to the last bit."""
    samples = (0.1 * np.random.default_rng(length).standard_normal(length) + 0.02).astype(np.float32)
    expected = standardise(torch.from_numpy(samples).unsqueeze(0))[0].numpy()
    standardize(samples, *statistics_of(samples), out=samples)
    assert np.array_equal(samples, expected)


def test_tf32_is_off_inside_and_unchanged_outside() -> None:
    """Tests the switches, which exist without a GPU."""
    matmul = torch.backends.cuda.matmul
    if not hasattr(matmul, "fp32_precision"):
        pytest.skip("older switches")
    conv = torch.backends.cudnn.conv
    before = matmul.fp32_precision, conv.fp32_precision
    assert before[1] != "ieee"
    with exact_products(torch.device("cuda")):
        with exact_products(torch.device("cuda")):
            assert (matmul.fp32_precision, conv.fp32_precision) == ("ieee", "ieee")
        assert (matmul.fp32_precision, conv.fp32_precision) == ("ieee", "ieee")
    assert (matmul.fp32_precision, conv.fp32_precision) == before


def test_repr_is_one_line() -> None:
    text = repr(tiny_model())
    assert text.startswith("SpidR(4 layers of 32, 3 codebooks of 12, 0.1 M parameters")
    assert "\n" not in text
    assert isinstance(tiny_model(), Encoder)


def test_a_model_without_a_teacher() -> None:
    model = copy.deepcopy(tiny_model()).drop_teacher()
    assert model.teacher is None
    assert not [name for name in model.state_dict() if name.startswith("teacher.")]
    assert model.train().eval().encode(padded(), LENGTHS, layer=2)[0].shape[0] == len(LENGTHS)
    with pytest.raises(InputError, match="this model has no teacher"):
        model(padded())
