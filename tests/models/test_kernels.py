"""Dropout and attention on a CPU: their definitions, and the memory they keep for the backward pass."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from helpers.operators import Operators
from spidr.models import kernels
from spidr.models.transformer import FeedForward

P = 0.3


def kept_bytes(function: Any, *inputs: Tensor) -> int:
    """Bytes that a function keeps for its backward pass, each storage counted once."""
    storages: dict[int, int] = {}

    def pack(x: Tensor) -> Tensor:
        storages[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        function(*inputs)
    return sum(storages.values())


@pytest.mark.parametrize("p", [0.1, 0.5, 0.9, 0.998])
def test_share_dropped(p: float) -> None:
    torch.manual_seed(0)
    kept, scale = kernels.draw_kept((1001, 999), p)
    assert kept.shape == (1001, 999)
    assert kept.dtype == torch.int8
    dropped = kept == 0
    p = min(p, 255 / 256)
    assert scale == pytest.approx(1 / (1 - p))
    # Overall, for each of the eight elements that share a random word, and for pairs of neighbours.
    deviation = math.sqrt(p * (1 - p) / (dropped.numel() // 8))
    drawn = dropped.flatten()[: dropped.numel() // 8 * 8].view(-1, 8)
    assert drawn.float().mean(0).sub(p).abs().max() < 5 * deviation
    both = (drawn[:, 1:] & drawn[:, :-1]).float().mean(0)
    assert both.sub(p * p).abs().max() < 5 * deviation


@pytest.mark.parametrize("p", [1e-9, 1 - 1e-9])
def test_extreme_probabilities(p: float) -> None:
    kept, scale = kernels.draw_kept((400, 400), p)
    assert (1 - kept.float()).mean().sub(p).abs() < 5e-3
    assert math.isfinite(scale)


def test_draws_depend_only_on_the_seed() -> None:
    draws = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        torch.manual_seed(3)
        draws.append(kernels.draw_kept((500, 500), P)[0])
    torch.set_num_threads(1)
    assert torch.equal(*draws)
    assert not torch.equal(draws[0], kernels.draw_kept((500, 500), P)[0])


def test_dropout() -> None:
    torch.manual_seed(0)
    dropout, x = kernels.Dropout(P), torch.randn(300, 200, dtype=torch.float64, requires_grad=True)
    out = dropout(x)
    factor = 1 / (1 - P)
    dropped = out == 0
    torch.testing.assert_close(out, (x * factor).masked_fill(dropped, 0))
    assert dropped.double().mean().item() == pytest.approx(P, abs=0.01)
    (grad,) = torch.autograd.grad(out.sum(), x)
    torch.testing.assert_close(grad, torch.full_like(x, factor).masked_fill(dropped, 0))
    assert torch.equal(dropout.eval()(x), x)
    assert torch.equal(kernels.Dropout(0.0)(x), x)
    assert torch.equal(kernels.Dropout(1.0)(x), torch.zeros_like(x))
    assert kept_bytes(kernels.Dropout(P), x) == x.numel()  # one byte each


MASKS = {
    "all": None,
    "key padding": torch.arange(23) < torch.tensor([23, 9]).view(2, 1, 1, 1),
    "any": (torch.arange(23) <= torch.arange(23).unsqueeze(1))[None, None],
    "a row without keys": (torch.arange(23).unsqueeze(1) != 5)[None, None].expand(2, 1, 23, 23),
}


@pytest.mark.parametrize("dropout", [0.0, P])
@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS.keys())
def test_attention_head_by_head(mask: Tensor | None, dropout: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """With oneDNN, a few queries at a time, against PyTorch's own and against all heads at once."""
    if not hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        pytest.skip("this PyTorch has no such operation of oneDNN")
    monkeypatch.setattr(kernels, "prefers_onednn", lambda: True)
    seed, found = torch.randn(2, 3, 23, 8), []
    for smallest, at_a_time in ((1, 1), (1 << 40, 1 << 20)):
        monkeypatch.setattr(kernels, "SMALLEST", smallest)
        monkeypatch.setattr(kernels, "WEIGHTS_AT_A_TIME", at_a_time)
        torch.manual_seed(0)
        q, k, v = (torch.randn(2, 3, 23, 8, requires_grad=True) for _ in range(3))
        out = kernels.attend(q, k, v, mask, dropout)
        found.append([out, *torch.autograd.grad(out, (q, k, v), seed)])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("at_a_time", [1, 23 * 23 * 4, 1 << 20])
@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS.keys())
def test_attention(mask: Tensor | None, at_a_time: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "WEIGHTS_AT_A_TIME", at_a_time)
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, 3, 23, 8, dtype=torch.float64, requires_grad=True) for _ in range(3))
    torch.manual_seed(1)
    found = kernels.attend(q, k, v, mask, P)
    torch.manual_seed(1)
    kept, scale = kernels.draw_kept((6, 23, 23), P)
    scores = q @ k.transpose(2, 3) / math.sqrt(8)
    if mask is not None:
        scores = scores.masked_fill(~mask, -1e300)
    weights = scores.softmax(-1) * (1 if mask is None else mask)
    expected = weights * kept.view(2, 3, 23, 23) * scale @ v
    torch.testing.assert_close(found, expected)
    seed = torch.randn_like(expected)
    for a, b in zip(*(torch.autograd.grad(out, (q, k, v), seed) for out in (found, expected)), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize(("kernel", "bias", "dilation"), [(5, True, 1), (6, False, 1), (5, True, 2)])
def test_grouped_convolution_in_bfloat16(
    kernel: int, bias: bool, dilation: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kernels, "multiplies_fast", lambda dtype: True)
    torch.manual_seed(0)
    conv = nn.Conv1d(12, 24, kernel, padding=kernel // 2, groups=4, bias=bias, dilation=dilation)
    x = torch.randn(3, 12, 30, requires_grad=True)
    expected = conv(x)
    seed = torch.randn_like(expected)
    inputs = (x, *conv.parameters())
    with torch.autocast("cpu", torch.bfloat16):
        found = kernels.convolve(x, conv)
    with Operators() as operators:
        gradients = torch.autograd.grad(found, inputs, seed.bfloat16())
    assert ("convolution_backward" in operators.names()) == (dilation == 2)
    for a, b in zip((found, *gradients), (expected, *torch.autograd.grad(expected, inputs, seed)), strict=True):
        torch.testing.assert_close(a.float(), b, rtol=0.02, atol=0.02 * b.abs().max().item())


def test_attention_keeps_no_weights() -> None:
    frames, dim = 600, 4
    q, k, v = (torch.randn(1, 2, frames, dim, requires_grad=True) for _ in range(3))
    kept = kept_bytes(lambda *x: kernels.attend(*x, None, P), q, k, v)
    assert kept < 2 * frames * frames * 1.2  # one byte per weight, and the inputs


def test_feed_forward_keeps_one_tensor_and_computes_no_product_twice() -> None:
    dim, hidden, rows = 8, 64, 500
    block, x = FeedForward(dim, hidden, P).train(), torch.randn(1, rows, dim, requires_grad=True)
    parameters = sum(p.numel() for p in block.parameters())
    assert kept_bytes(block, x) <= 4 * (rows * hidden + rows * dim + parameters) + rows * hidden  # what dropout keeps
    with Operators() as operators:
        block(x).sum().backward()
    names = [name for name, _ in operators.log]
    assert (names.count("addmm"), names.count("mm"), names.count("gelu")) == (2, 4, 2)


def test_feed_forward_with_dropout_recomputes_the_same_draws() -> None:
    torch.manual_seed(0)
    block, x = FeedForward(6, 12, P).double().train(), torch.randn(1, 5, 6, dtype=torch.float64, requires_grad=True)

    def seeded(x: Tensor) -> Tensor:
        torch.manual_seed(7)
        return block(x)

    assert torch.autograd.gradcheck(seeded, x)


def test_other_devices_use_pytorch(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.randn(2, 3, 5, 4)
    with torch.no_grad():
        assert not kernels.is_lean(x)
        torch.manual_seed(0)
        expected = nn.Dropout(P)(x)
        torch.manual_seed(0)
        assert torch.equal(kernels.Dropout(P)(x), expected)
    assert not kernels.is_lean(x.to("meta"))
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    assert not kernels.is_lean(x)


@pytest.mark.parametrize(("kernel", "frames", "chunk"), [(7, 50, 16), (4, 33, 8), (19, 5, 16), (3, 1, 4), (5, 32, 16)])
def test_convolution_by_products(kernel: int, frames: int, chunk: int) -> None:
    conv = nn.Conv1d(12, 12, kernel, padding=kernel // 2, groups=3)
    x = torch.randn(2, 12, frames, requires_grad=True)
    expected = conv(x)
    found = kernels.convolve_by_products(x, conv.weight, conv.bias, kernel // 2, 3, chunk=chunk)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    seed, inputs = torch.randn_like(expected), (x, conv.weight, conv.bias)
    for a, b in zip(*(torch.autograd.grad(out, inputs, seed) for out in (found, expected)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
