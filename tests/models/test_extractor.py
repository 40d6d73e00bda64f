"""The extractor's matrix products against PyTorch's convolutions."""

from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings, strategies as st
from torch import Tensor

from spidr.models import convolutions
from spidr.models.extractor import FeatureExtractor, GroupNorm
from spidr.tools.errors import InputError
from spidr.tools.frames import conv_length

SHAPES = [(8, 10, 5), (6, 3, 2), (6, 3, 2), (4, 2, 2)]


def oracle(extractor: FeatureExtractor, waveforms: Tensor) -> Tensor:
    """Channels-first convolutions, as in the papers."""
    x = waveforms.unsqueeze(1)
    for layer in extractor.conv_layers:
        x = F.conv1d(x, layer.conv.weight, layer.conv.bias, stride=layer.conv.stride)
        norm = layer.layer_norm
        if isinstance(norm, torch.nn.LayerNorm):
            x = F.layer_norm(x.transpose(1, 2), norm.normalized_shape, norm.weight, norm.bias, norm.eps).transpose(1, 2)
        elif norm is not None:  # not F.group_norm, which refuses a single frame
            x = torch.group_norm(x, norm.num_groups, norm.weight, norm.bias, norm.eps)
        x = F.gelu(x)
    return x.transpose(1, 2)


def build(mode: str, shapes: list[tuple[int, int, int]], *, bias: bool) -> FeatureExtractor:
    torch.manual_seed(0)
    extractor = FeatureExtractor.build(mode, shapes, bias=bias)
    for parameter in extractor.parameters():  # biases and norms too, which start at 0 and 1
        torch.nn.init.normal_(parameter, std=0.5)
    return extractor.double()


def assert_same(extractor: FeatureExtractor, waveforms: Tensor) -> None:
    results = []
    for function in (extractor, lambda w: oracle(extractor, w)):
        x = waveforms.clone().requires_grad_()
        out = function(x)
        inputs = [x, *extractor.parameters()]
        weights = torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view_as(out)
        results.append((out, torch.autograd.grad((out * weights).sum(), inputs)))
    (out, grads), (expected, expected_grads) = results
    torch.testing.assert_close(out, expected)
    for grad, expected_grad in zip(grads, expected_grads, strict=True):
        torch.testing.assert_close(grad, expected_grad)


@pytest.mark.parametrize("fast", [False, True], ids=["products", "convolutions"])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("mode", ["layer_norm", "group_norm"])
def test_equals_convolutions_forward_and_backward(
    mode: str, bias: bool, fast: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(convolutions, "multiplies_fast", lambda _: fast)
    torch.manual_seed(1)
    assert_same(build(mode, SHAPES, bias=bias), torch.randn(3, 1234, dtype=torch.float64))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("grad", [False, True])
def test_group_norm_of_outputs_far_smaller_than_the_samples(dtype: torch.dtype, grad: bool) -> None:
    """Second differences of a slow wave: the statistics come from sums of products that cancel almost wholly."""
    extractor = build("group_norm", SHAPES, bias=False)
    first = extractor.conv_layers[0].conv
    with torch.no_grad():
        first.weight.zero_()
        first.weight[:, 0, 3:6] = torch.tensor([1.0, -2.0, 1.0])
    noise = torch.randn(2, 4000, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    waveforms = torch.sin(torch.arange(4000, dtype=torch.float64) / 50) + 1e-3 * noise
    expected = oracle(extractor, waveforms)
    with torch.set_grad_enabled(grad), torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
        found = extractor.float()(waveforms.float())
    error = (found - expected).abs().max() / expected.abs().max()
    assert error < (1e-3 if dtype == torch.float32 else 0.05)


def test_sums_leave_out_the_padding() -> None:
    waveforms, lengths = torch.randn(2, 200), torch.tensor([200, 87])
    sums = convolutions.gram(waveforms, SHAPES[0], lengths)
    for row, length, found in zip(waveforms, lengths, sums, strict=True):
        torch.testing.assert_close(found[None], convolutions.gram(row[None, :length], SHAPES[0]))
    assert sums[:, -1, -1].tolist() == [39, 16]


@settings(deadline=None)
@given(
    shapes=st.lists(st.tuples(st.integers(1, 4), st.integers(1, 7), st.integers(1, 4)), min_size=1, max_size=4),
    extra=st.integers(0, 40),
    batch=st.integers(1, 3),
    mode=st.sampled_from(["layer_norm", "group_norm"]),
    bias=st.booleans(),
    fast=st.booleans(),
)
def test_any_kernels_and_strides(
    shapes: list[tuple[int, int, int]], extra: int, batch: int, mode: str, bias: bool, fast: bool
) -> None:
    """Kernels smaller than, equal to and larger than the stride, down to the shortest waveform."""
    shortest = 1
    for _, kernel, stride in reversed(shapes):
        shortest = (shortest - 1) * stride + kernel
    waveforms = torch.randn(batch, shortest + extra, dtype=torch.float64)
    extractor = build(mode, shapes, bias=bias)
    with mock.patch.object(convolutions, "multiplies_fast", return_value=fast):
        out = extractor(waveforms)
        assert out.shape == (batch, conv_length(shapes, shortest + extra), shapes[-1][0])
        assert_same(extractor, waveforms)


def test_too_short() -> None:
    with pytest.raises(InputError, match="20 samples are too short"):
        FeatureExtractor.build("layer_norm", SHAPES, bias=False)(torch.randn(1, 20))
    with pytest.raises(InputError, match="at least one row"):
        FeatureExtractor.build("layer_norm", SHAPES, bias=False)(torch.randn(0, 2000))


def test_bfloat16_autocast_stays_close() -> None:
    extractor = build("layer_norm", SHAPES, bias=False).float()
    waveforms = torch.randn(2, 4000)
    with torch.autocast("cpu", torch.bfloat16):
        out = extractor(waveforms)
        out.float().sum().backward()
    assert out.dtype == torch.bfloat16
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in extractor.parameters())
    torch.testing.assert_close(out.float(), extractor(waveforms), rtol=0.1, atol=0.1)


def test_initial_kernels() -> None:
    """Kaiming normal: fan-in, gain sqrt(2)."""
    torch.manual_seed(0)
    extractor = FeatureExtractor.build("layer_norm", [(512, 10, 5), (512, 3, 2)], bias=False)
    for layer, fan_in in zip(extractor.conv_layers, (10, 1536), strict=True):
        assert layer.conv.weight.std().item() == pytest.approx((2 / fan_in) ** 0.5, rel=0.05)


def test_training_keeps_one_tensor_for_each_convolution_but_the_first() -> None:
    extractor, batch, samples = build("layer_norm", SHAPES, bias=False), 2, 8000
    kept: dict[int, int] = {}

    def pack(x: Tensor) -> Tensor:
        kept[x.untyped_storage().data_ptr()] = x.numel()
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        extractor(torch.randn(batch, samples, dtype=torch.float64))
    lengths = [conv_length(SHAPES[: i + 1], samples) for i in range(len(SHAPES))]
    outputs = [batch * length * channels for length, (channels, _, _) in zip(lengths, SHAPES, strict=True)]
    kernels = batch * lengths[0] * SHAPES[0][1]
    # The last output twice, before its norm and before GELU; otherwise only weights and padding rows.
    assert sum(kept.values()) < 1.1 * (kernels + sum(outputs[1:]) + outputs[-1]) + 1000


def test_group_norm_in_16_bits_counts_every_frame() -> None:
    """16,447 is 16,384 in bfloat16."""
    x = (10 + torch.randn(1, 4, 16_447, generator=torch.Generator().manual_seed(0))).bfloat16()
    assert GroupNorm(4).bfloat16()(x).float().mean(2).abs().max() < 0.01
