"""Names that published training loops import from ``spidr.checkpoint``, ``environment``, ``optimizer`` and others."""

import os
import random
import socket
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.utils import get_total_norm
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR, LRScheduler

from spidr.config import Config, OptimizerConfig
from spidr.environment import choose_device, find_meeting_place, ranks
from spidr.models.metrics import perplexity
from spidr.optimizer import lr_factor

__all__ = [
    *("NonFiniteError", "build_scheduler", "init_wandb", "params_norm", "perplexities"),
    *("remove_param_group", "set_seed", "setup_environment", "setup_pytorch", "setup_training"),
]


def set_seed(seed: int) -> None:
    """Seed the random generators of Python, numpy and torch."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def setup_pytorch(*, use_deterministic: bool) -> None:
    """Use deterministic algorithms, or not."""
    torch.use_deterministic_algorithms(use_deterministic)
    if use_deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # without it cuBLAS refuses


def setup_environment(**variables: str) -> None:
    """Set environment variables."""
    os.environ.update(variables)


def setup_training(seed: int, *, use_deterministic: bool = False) -> None:
    """Join the processes that torchrun or SLURM started, as the default process group, and seed this one.

    Sets ``RANK``, ``LOCAL_RANK`` and ``WORLD_SIZE``. A single process gets its own group. The seed is ``seed`` plus the
    rank.

    Raises:
        InputError: The variables of torchrun or SLURM contradict each other.
    """
    rank, local_rank, world_size = ranks()
    if world_size > 1:
        find_meeting_place()
    else:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(local_rank), "WORLD_SIZE": str(world_size)}
    device = choose_device("auto", local_rank)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    setup_pytorch(use_deterministic=use_deterministic)
    set_seed(seed + rank)


def remove_param_group(optim: Optimizer, *scheduler_and_index: Any) -> None:
    """Remove a parameter group and its state: ``(optim, scheduler, index)``.

    ``(optim, index)`` empties the group instead, as no scheduler works with fewer groups than it started with.
    """
    *schedulers, index = scheduler_and_index
    for parameter in optim.param_groups[index]["params"]:
        optim.state.pop(parameter, None)
    if not schedulers:
        optim.param_groups[index]["params"] = []
        return
    schedulers += getattr(schedulers[0], "_schedulers", ())
    lists = [
        getattr(scheduler, name, None) for scheduler in schedulers for name in ("base_lrs", "lr_lambdas", "_last_lr")
    ]
    for entries in {id(entries): entries for entries in [optim.param_groups, *lists] if entries}.values():
        del entries[index]


def build_scheduler(opt: Optimizer, cfg: OptimizerConfig) -> LRScheduler:
    """Build the learning-rate schedule of an optimizer."""
    return LambdaLR(opt, lambda step: lr_factor(step, cfg))


class NonFiniteError(Exception):
    """A norm is infinite or not a number."""


def params_norm(
    params: Tensor | Iterable[Tensor], norm_type: float = 2.0, *, error_if_nonfinite: bool = False
) -> Tensor:
    """Norm of all elements of some tensors, 0-dim. Raises NonFiniteError if asked to and if it is not finite."""
    tensors = [params] if isinstance(params, Tensor) else list(params)
    norm = get_total_norm(tensors, norm_type)
    if error_if_nonfinite and not norm.isfinite():
        raise NonFiniteError(f"the norm of {len(tensors)} tensors is {norm.item()}")
    return norm


def perplexities(ys: Sequence[Tensor]) -> Tensor:
    """Perplexity of the mean row of each (N, V), (K,)."""
    return torch.stack([perplexity(y) for y in ys])


def init_wandb(cfg: Config) -> None:
    """Start a wandb run for ``cfg.run``, with ``train/NAME`` against ``train/step``."""
    import wandb

    run = cfg.run
    wandb.init(project=run.wandb_project, name=run.wandb_name, mode=run.wandb_mode, dir=run.workdir, config=asdict(cfg))
    wandb.define_metric("train/step")
    wandb.define_metric("train/*", step_metric="train/step")
