"""The training forward through ``torch.compile``, on CUDA only."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

logger = logging.getLogger(__name__)


def compiled(model: nn.Module, device: torch.device) -> Callable[..., Any]:
    """The model, compiled on CUDA. Elsewhere compiled code is slower, so it stays as it is."""
    if device.type == "cuda":
        logger.info("compiling: the first step takes a minute or more; run.compile = false turns it off")
        return compile_forward(model)
    logger.info("run.compile is ignored: on %s, compiled code is slower", device.type)
    return model


def compile_forward(model: nn.Module, **options: Any) -> Callable[..., Any]:
    """Compile a model's forward into one graph for all sizes.

    A break in the graph is an error, and so is reaching the compiler's limit of recompilations, after which it would
    go on uncompiled without a word. DistributedDataParallel is told not to split the graph at its buckets.

    Args:
        model: The model.
        options: More options of ``torch.compile``.
    """
    torch._dynamo.config.optimize_ddp = False
    _leave_convolutions_dynamic()
    return torch.compile(model, dynamic=True, fullgraph=True, **options)


def _leave_convolutions_dynamic() -> None:
    """Have ATen compute the gradient of a convolution, as Inductor decides anyway, but for any length.

    To come to that decision, torch 2.14 fixes the length of the input and compiles anew for every other one.
    """
    try:
        from torch._inductor.kernel.conv import aten_convolution_backward_fallback
        from torch._inductor.lowering import lowerings
    except ImportError:  # other versions
        return
    lowerings[torch.ops.aten.convolution_backward.default] = aten_convolution_backward_fallback
