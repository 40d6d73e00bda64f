"""AdamW, its learning-rate schedules and the gradient scaler."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import nn
from torch.optim import AdamW, Optimizer
from torch.optim.lr_scheduler import LambdaLR

from spidr.config import OptimizerConfig
from spidr.tools.lazy import names_from

__getattr__ = names_from(__name__, "spidr.compat.training")  # what published packages also have here


def lr_factor(step: int, cfg: OptimizerConfig) -> float:
    """Factor of the learning rate at the 0-based update ``step``: linear warm-up, then ``cfg.scheduler``."""
    warmup, floor = cfg.warmup_steps, cfg.final_lr_scale
    peak = 1.0
    if cfg.scheduler == "rsqrt":
        peak = 1 / math.sqrt(1 + cfg.rsqrt_shift / cfg.rsqrt_timescale)
    if step < warmup:
        return cfg.init_lr_scale + (peak - cfg.init_lr_scale) * step / warmup
    match cfg.scheduler:
        case "tristage":
            return floor ** (max(0, step - warmup - cfg.hold_steps) / max(1, cfg.decay_steps))
        case "cosine":
            progress = (step - warmup) / max(1, cfg.max_steps - warmup)
            return floor + (1 - floor) * (1 + math.cos(math.pi * min(1.0, progress))) / 2
        case "rsqrt":
            past = step - warmup - cfg.hold_steps
            return 1.0 if past < 0 else 1 / math.sqrt(1 + (past + cfg.rsqrt_shift) / cfg.rsqrt_timescale)
        case _:
            return 1.0


def _starts_with(name: str, prefixes: Sequence[str]) -> bool:
    return name.startswith(tuple(prefixes))


def build_optimizer(model: nn.Module, cfg: OptimizerConfig) -> tuple[AdamW, torch.amp.GradScaler, LambdaLR]:
    """Build what a training step needs beside the model.

    Args:
        model: Its parameters whose names start with one of ``cfg.exclude_from_optimizer`` are left out.
        cfg: The settings.

    Returns:
        AdamW with the parameters under ``cfg.to_freeze`` in group 1 and the rest in group 0, a gradient scaler, enabled
        for float16 only, and the schedule: ``scheduler.get_last_lr()`` is the rate in use.
    """
    named = [(n, p) for n, p in model.named_parameters() if not _starts_with(n, cfg.exclude_from_optimizer)]
    to_freeze = [p for n, p in named if _starts_with(n, cfg.to_freeze)]
    rest = [p for n, p in named if not _starts_with(n, cfg.to_freeze)]
    groups = [{"params": params} for params in (rest, to_freeze) if params or params is rest]
    device = next(model.parameters()).device.type
    optimizer = AdamW(groups, lr=cfg.lr, betas=cfg.betas, eps=cfg.eps, weight_decay=cfg.weight_decay, fused=True)
    scaler = torch.amp.GradScaler(device, enabled=cfg.dtype == "float16")
    return optimizer, scaler, LambdaLR(optimizer, lambda step: lr_factor(step, cfg))


def drop_frozen(optimizer: Optimizer, scheduler: LambdaLR) -> None:
    """Stop training group 1, the parameters to freeze, and forget its state: later checkpoints do not hold it."""
    for group in optimizer.param_groups[1:]:
        for parameter in group["params"]:
            parameter.requires_grad_(False)
            parameter.grad = None
            optimizer.state.pop(parameter, None)
    # The schedule keeps one entry a group and refuses to step with more of them than there are groups.
    for entries in (optimizer.param_groups, scheduler.base_lrs, scheduler.lr_lambdas, scheduler._last_lr):
        del entries[1:]
