"""The training forward as ``torch.compile`` sees it: one graph, few recompilations."""

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

from small_models import tiny_model


@pytest.fixture
def graphs() -> Iterator[list[torch.fx.GraphModule]]:
    yield []
    torch._dynamo.reset()


@pytest.mark.parametrize(("model_type", "mode"), [("spidr", "layer_norm"), ("dinosr", "group_norm")])
def test_one_graph_and_few_recompilations(model_type: str, mode: str, graphs: list[torch.fx.GraphModule]) -> None:
    """``fullgraph`` raises on any graph break. Sizes become symbolic when they change: three graphs are enough."""
    settings = {"encoder_num_layers": 2, "num_codebooks": 2, "encoder_layer_norm_first": mode == "group_norm"}
    model = tiny_model(model_type, extractor_mode=mode, **settings).train()
    model.reduction = lambda _: None

    def count(graph: torch.fx.GraphModule, _: list[Tensor]) -> Callable[..., object]:
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(model, backend=count, fullgraph=True)
    for samples in (1500, 1700, 1900):
        for batch in (2, 3):
            frames = model.feature_extractor.num_frames(samples)
            indices = torch.stack([torch.randperm(frames)[: frames // 2].sort().values for _ in range(batch)])
            loss, _ = compiled(torch.randn(batch, samples), mask=indices)
            loss.sum().backward()
    assert len(graphs) <= 3


def test_compiled_gradients_equal_eager_ones(graphs: list[torch.fx.GraphModule]) -> None:
    """Through the joint graph of forward and backward, with the extractor's operation of our own."""
    settings = {"encoder_num_layers": 1, "num_codebooks": 1, "encoder_dropout": 0.0, "encoder_attention_dropout": 0.0}
    waveforms, mask = torch.randn(2, 1500), torch.arange(10).repeat(2, 1)
    gradients = []
    for backend in ("eager", "aot_eager"):
        model = tiny_model(**settings).train()
        model.reduction = lambda _: None
        call = torch.compile(model, backend=backend, fullgraph=True) if backend == "aot_eager" else model
        call(waveforms, mask=mask)[0].sum().backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, rtol=1e-4, atol=1e-5, msg=name)


def test_no_attention_mask_reaches_the_kernel_when_nothing_is_padded(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Tensor | None] = []
    kernel = torch.nn.functional.scaled_dot_product_attention

    def spy(*args: Tensor, attn_mask: Tensor | None = None, dropout_p: float = 0.0) -> Tensor:
        seen.append(attn_mask)
        return kernel(*args, attn_mask=attn_mask, dropout_p=dropout_p)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", spy)
    model = tiny_model().eval()
    model(torch.randn(2, 1500))
    assert seen == [None] * 8  # student and teacher
    seen.clear()
    model(torch.randn(2, 1500), lengths=[1500, 1000])
    frames = model.feature_extractor.num_frames(1500)
    assert [tuple(mask.shape) for mask in seen if mask is not None] == [(2, 1, 1, frames)] * 8
