"""The training forward through ``torch.compile``, on CUDA only."""

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
    go on uncompiled without a word. DistributedDataParallel is told not to split the graph at its buckets. ``options``
    are more of ``torch.compile``'s.
    """
    torch._dynamo.config.optimize_ddp = False
    leave_convolutions_dynamic()
    return torch.compile(model, dynamic=True, fullgraph=True, **options)


def leave_convolutions_dynamic() -> None:
    """Have ATen compute the gradient of a convolution, for any length.

    Inductor does so by itself up to torch 2.8. Later versions find out that they should by fixing the length of the
    input, and compile anew for every other one.
    """
    try:
        from torch._inductor.lowering import fallback_handler, lowerings
    except ImportError:  # versions to come may compile more often than they should
        logger.warning("torch %s: the compiler may compile again for each length of a batch", torch.__version__)
        return
    operation = torch.ops.aten.convolution_backward.default
    lowerings[operation] = fallback_handler(operation)
