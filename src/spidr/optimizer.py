"""AdamW, its learning-rate schedules and the gradient scaler."""

import math
from typing import Any

import torch
from torch import Tensor, nn
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
            progress = (step - warmup - cfg.hold_steps) / max(1, cfg.decay_steps)
            return floor ** min(max(0.0, progress), 1.0)
        case "cosine":
            progress = (step - warmup) / max(1, cfg.max_steps - warmup)
            return floor + (1 - floor) * (1 + math.cos(math.pi * min(1.0, progress))) / 2
        case "rsqrt":
            past = step - warmup - cfg.hold_steps
            return 1.0 if past < 0 else 1 / math.sqrt(1 + (past + cfg.rsqrt_shift) / cfg.rsqrt_timescale)
        case _:
            return 1.0


class Schedule(LambdaLR):
    """The learning rate as a function of the number of updates only."""

    def go_to(self, step: int) -> None:
        """Set the rate after ``step`` updates."""
        self.last_epoch, self._step_count = step, step + 1
        for group, base, factor in zip(self.optimizer.param_groups, self.base_lrs, self.lr_lambdas, strict=True):
            group["lr"] = base * factor(step)
        self._last_lr = [group["lr"] for group in self.optimizer.param_groups]


def build_optimizer(model: nn.Module, cfg: OptimizerConfig) -> tuple[AdamW, torch.amp.GradScaler, Schedule]:
    """Build the optimizer, the gradient scaler and the schedule.

    Returns:
        AdamW with the parameters under ``cfg.to_freeze`` in group 1 and the rest in group 0, except those under
        ``cfg.exclude_from_optimizer``; a gradient scaler, enabled for float16 only; and the schedule:
        ``scheduler.get_last_lr()`` is the rate in use.
    """
    excluded, to_freeze = tuple(cfg.exclude_from_optimizer), tuple(cfg.to_freeze)
    groups: tuple[list[nn.Parameter], list[nn.Parameter]] = ([], [])
    for name, parameter in model.named_parameters():
        if not name.startswith(excluded):
            groups[name.startswith(to_freeze)].append(parameter)
    device = next(model.parameters()).device.type
    given = [{"params": params} for params in groups if params]
    optimizer = AdamW(given, cfg.lr, cfg.betas, cfg.eps, cfg.weight_decay, fused=True)
    scaler = torch.amp.GradScaler(device, enabled=cfg.dtype == "float16")
    return optimizer, scaler, Schedule(optimizer, lambda step: lr_factor(step, cfg))


def drop_frozen(optimizer: Optimizer, scheduler: LambdaLR) -> None:
    """Stop training group 1, the parameters to freeze, and drop its state, also from later checkpoints."""
    for group in optimizer.param_groups[1:]:
        for parameter in group["params"]:
            parameter.requires_grad_(False)
            parameter.grad = None
            optimizer.state.pop(parameter, None)
    # The schedule keeps one entry a group and refuses to step with more of them than there are groups.
    for entries in (optimizer.param_groups, scheduler.base_lrs, scheduler.lr_lambdas, scheduler._last_lr):
        del entries[1:]


def load_optimizer(optimizer: Optimizer, saved: dict[str, Any], *, keep_settings: bool) -> None:
    """Load an optimizer's state, and also its settings (rate, betas, …) unless they are to be kept.

    A group that the file lacks, since its parameters were frozen, starts without a state; one that only the file has is
    dropped: ``freeze_step`` may have changed since.

    Raises:
        ValueError: The file's parameters differ. (A damaged file may raise anything.)
    """
    own = optimizer.state_dict()
    state = {}
    for group, saved_group in zip(own["param_groups"], saved["param_groups"], strict=False):
        for index, saved_index in zip(group["params"], saved_group["params"], strict=True):
            if saved_index in saved["state"]:
                state[index] = saved["state"][saved_index]
    # The optimizer takes this for granted, and would only fail in its next step.
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    for index, values in state.items():
        for key, value in values.items():
            if isinstance(value, Tensor) and value.numel() != 1 and value.shape != parameters[index].shape:
                raise ValueError(f"{key} of the optimizer's parameter {index} has the shape {tuple(value.shape)}")
        if isinstance(optimizer, AdamW) and not (
            values.keys() >= {"exp_avg", "exp_avg_sq"} and float(values["step"]) > 0
        ):
            raise ValueError(f"the state of the optimizer's parameter {index} is not that of AdamW")
    groups = own["param_groups"]
    if not keep_settings:
        settings = [{k: v for k, v in group.items() if k != "params"} for group in saved["param_groups"]]
        groups = [group | (settings[i] if i < len(settings) else {}) for i, group in enumerate(groups)]
    optimizer.load_state_dict({"state": state, "param_groups": groups})
