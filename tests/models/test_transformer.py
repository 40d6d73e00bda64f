"""The transformer, against a slow oracle written from its definition."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from helpers.small_models import tiny_config
from spidr.models.transformer import ConvPositionalEmbedding, SelfAttention, Transformer, TransformerLayer


def positional_oracle(module: ConvPositionalEmbedding, x: Tensor) -> Tensor:
    """A convolution of one utterance (T, D) without padding, output by output."""
    for conv in module.convs:
        kernel, groups = conv.weight.shape[-1], conv.groups
        padded = F.pad(x, (0, 0, kernel // 2, kernel // 2))
        out = torch.zeros_like(x)
        width = x.shape[1] // groups
        for t in range(len(x)):
            window = padded[t : t + kernel]
            for group in range(groups):
                part = slice(group * width, (group + 1) * width)
                out[t, part] = torch.einsum("kc,ock->o", window[:, part], conv.weight[part])
        out = out + conv.bias
        mean, var = out.mean(1, keepdim=True), out.var(1, correction=0, keepdim=True)
        out = (out - mean) / torch.sqrt(var + 1e-5)
        x = out * 0.5 * (1 + torch.erf(out / math.sqrt(2)))
    return x


def attention_oracle(module: SelfAttention, x: Tensor) -> Tensor:
    """Attention of one utterance (T, D), head by head."""
    dim = x.shape[1]
    q, k, v = F.linear(x, module.qkv.weight, module.qkv.bias).split(dim, dim=1)
    width = dim // module.num_heads
    heads = []
    for head in range(module.num_heads):
        part = slice(head * width, (head + 1) * width)
        weights = (q[:, part] @ k[:, part].T / math.sqrt(width)).exp()
        heads.append(weights / weights.sum(1, keepdim=True) @ v[:, part])
    return torch.cat(heads, dim=1) @ module.proj.weight.T + module.proj.bias


def block_oracle(block: TransformerLayer, x: Tensor) -> tuple[Tensor, Tensor]:
    def feed_forward(y: Tensor) -> Tensor:
        return block.feed_forward.output_dense(F.gelu(block.feed_forward.intermediate_dense(y)))

    if block.layer_norm_first:
        x = x + attention_oracle(block.attention, block.layer_norm(x))
        forwarded = feed_forward(block.final_layer_norm(x))
        return x + forwarded, forwarded
    x = block.layer_norm(x + attention_oracle(block.attention, x))
    forwarded = feed_forward(x)
    return block.final_layer_norm(x + forwarded), forwarded


def oracle(model: Transformer, x: Tensor) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """Final output, outputs before the residual addition, and after."""
    x = x + positional_oracle(model.pos_conv_embed, x)
    if model.layer_norm_first:
        x = model.layer_norm(x)
    before, after = [], []
    for block in model.layers:
        x, forwarded = block_oracle(block, x)
        before.append(forwarded)
        after.append(x)
    return x if model.layer_norm_first else model.layer_norm(x), before, after


def build(**changes: object) -> Transformer:
    torch.manual_seed(0)
    model = Transformer.build(tiny_config(**changes)).double().eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model


@pytest.mark.parametrize("norm_first", [False, True])
@pytest.mark.parametrize("qkv_bias", [False, True])
@pytest.mark.parametrize("kernel", [15, 12], ids=["odd", "even"])
@torch.no_grad()
def test_equals_oracle(norm_first: bool, qkv_bias: bool, kernel: int) -> None:
    model = build(encoder_layer_norm_first=norm_first, encoder_qkv_bias=qkv_bias, encoder_pos_conv_kernel=kernel)
    x = torch.randn(2, 23, 32, dtype=torch.float64)
    final, before, after = zip(*(oracle(model, row) for row in x), strict=True)
    torch.testing.assert_close(model(x), torch.stack(final))
    for layers, before_residual in ((before, True), (after, False)):
        expected = [torch.stack(rows) for rows in zip(*layers, strict=True)]
        torch.testing.assert_close(model.get_intermediate_outputs(x, before_residual=before_residual), expected)


@pytest.mark.parametrize("kernel", [15, 12], ids=["odd", "even"])
@torch.no_grad()
def test_positional_convolutions_by_products(kernel: int) -> None:
    model = build(encoder_pos_conv_kernel=kernel)
    x, mask = torch.randn(2, 40, 32, dtype=torch.float64), (torch.arange(40) < 29)[None, None, None]
    expected = model.pos_conv_embed(x, mask)
    model.pos_conv_embed.by_products = True
    torch.testing.assert_close(model.pos_conv_embed(x, mask), expected, rtol=0, atol=1e-5)


@torch.no_grad()
def test_first_layers_only() -> None:
    model = build()
    x = torch.randn(2, 9, 32, dtype=torch.float64)
    torch.testing.assert_close(model.get_intermediate_outputs(x, num_layers=2), model.get_intermediate_outputs(x)[:2])


@pytest.mark.parametrize("num_layers", [0, 5, -1])
def test_number_of_layers_out_of_range(num_layers: int) -> None:
    with pytest.raises(ValueError, match=f"between 1 and 4, not {num_layers}"):
        build().get_intermediate_outputs(torch.randn(1, 9, 32, dtype=torch.float64), num_layers=num_layers)


def test_only_the_residual_stream_skips_a_dropped_block() -> None:
    model = build(encoder_layer_drop=1.0, encoder_dropout=0.0, encoder_attention_dropout=0.0)
    x = torch.randn(1, 9, 32, dtype=torch.float64)
    start = model.layer_norm(x + model.pos_conv_embed(x))
    torch.testing.assert_close(model.eval().get_intermediate_outputs(x)[0], model.layers[0](start)[1])
    model.train()
    torch.testing.assert_close(model(x), start)
    for layer, output in zip(model.layers, model.get_intermediate_outputs(x), strict=True):
        torch.testing.assert_close(output, layer(start)[1])
    model(x).sum().backward()
    gradients = [p.grad for p in model.layers.parameters()]
    assert all(grad is not None and not grad.any() for grad in gradients)  # zero, not None: DDP waits for them


def test_blocks_are_dropped_as_often_as_configured() -> None:
    settings = {"encoder_num_layers": 1, "num_codebooks": 1, "encoder_dropout": 0.0, "encoder_attention_dropout": 0.0}
    model = build(encoder_layer_drop=0.3, **settings).train()
    x = torch.randn(1, 5, 32, dtype=torch.float64)
    with torch.no_grad():
        dropped = model.layer_norm(x + model.pos_conv_embed(x))
        torch.manual_seed(0)
        share = sum(torch.equal(model(x), dropped) for _ in range(500)) / 500
    assert 0.24 < share < 0.36  # three standard deviations


def test_initial_weights() -> None:
    torch.manual_seed(0)
    model = Transformer.build(tiny_config(encoder_embed_dim=256, encoder_ff_interm_features=512, encoder_qkv_bias=True))
    for layer in model.layers:
        bound = math.sqrt(6 / (256 + 768)) / math.sqrt(2)
        assert layer.attention.qkv.weight.abs().max().item() == pytest.approx(bound, rel=0.01)
        assert layer.attention.proj.weight.abs().max().item() == pytest.approx(math.sqrt(6 / 512), rel=0.01)
        for linear in (layer.feed_forward.intermediate_dense, layer.feed_forward.output_dense):
            assert linear.weight.std().item() == pytest.approx(0.02, rel=0.02)
            assert not linear.bias.any()
        assert not layer.attention.qkv.bias.any()
        assert not layer.attention.proj.bias.any()
