"""Training: the loop, and the step it repeats.

``python -m spidr CONFIG`` is the way in; ``torchrun … -m spidr.train CONFIG`` works too.
"""

import runpy
from contextlib import nullcontext
from typing import Any

if __name__ == "__main__":  # --help need not wait for torch
    runpy.run_module("spidr", run_name="__main__")

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from spidr.config import SAMPLE_RATE, Config
from spidr.data import Batch
from spidr.environment import seed_step
from spidr.models.codebook import count_perplexity
from spidr.models.flops import step_flops
from spidr.run import Run
from spidr.state import Hooks, Measured, State, wrap
from spidr.tools.errors import InputError
from spidr.tools.frames import conv_length
from spidr.tools.lazy import names_from

__all__ = ["Hooks", "State", "train", "train_step"]

__getattr__ = names_from(__name__, "spidr.compat.training")  # what published packages also have here

MAX_SKIPPED_STEPS = 10  # the run stops after float16 has overflowed in this many steps in a row


def train(cfg: Config, hooks: Hooks | None = None) -> None:
    """Train, or resume, the run that ``cfg`` describes, as one of the processes that share it.

    Args:
        cfg: See :func:`spidr.config.read_config`.
        hooks: What to add.

    Raises:
        InputError: Some input is wrong, or the run cannot continue; the message says what to do. With
            several processes, on one of them; see :func:`spidr.environment.environment`.
        Preempted: A signal asked to stop; the state is saved.
    """
    with Run(cfg, hooks) as run:
        run.begin()
        for micro_batches in run.rounds():
            measured = train_step(run.state, micro_batches)
            if measured is None:  # float16 overflowed
                continue
            run.record(micro_batches, measured)
            run.log()
            run.save()
            run.validate()
        run.finish()


def train_step(state: State, micro_batches: list[Batch]) -> Measured | None:
    """Take one optimizer step.

    The loss is summed over micro-batches and processes and divided by all their masked frames, so it does not matter
    how a global batch is divided. Besides the gradients' there is one reduction over processes, of the statistics.

    Args:
        state: Changed in place.
        micro_batches: Of this process.

    Returns:
        The step's measurements; None if float16 overflowed and the step was skipped.

    Raises:
        InputError: float16 has overflowed too many times in a row.
    """
    model, env, optimizer, scaler = state.model, state.env, state.optimizer, state.scaler
    seed_step(state.cfg.run.random_seed, state.step, env.rank)
    # float16 needs gradients near their final size before the number of masked frames is known.
    scale = 1 / max(1, conv_length(state.cfg.model.extractor_conv_layer_config, state.cfg.data.max_batch_length))
    for i, micro_batch in enumerate(micro_batches):
        with _sync_gradients(state.network, when=i == len(micro_batches) - 1):
            objective = _forward(state, micro_batch)
            scaler.scale(objective * scale).backward()
    totals = _reduce_statistics(state, micro_batches)
    scaler.unscale_(optimizer)
    parameters = [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
    # DistributedDataParallel has averaged over processes; the loss is a mean over all their frames.
    torch._foreach_mul_([p.grad for p in parameters], env.world_size / scale / totals["frames"])
    grad_norm = nn.utils.clip_grad_norm_(parameters, state.cfg.optimizer.max_norm)
    lr, before = state.scheduler.get_last_lr()[0], scaler.get_scale()
    scaler.step(optimizer)
    scaler.update()
    optimizer.zero_grad()
    if scaler.get_scale() < before:  # constant unless float16, where the scaler has already waited for the device
        _skip(state)
        return None
    state.skipped_steps = 0
    state.scheduler.step()
    state.step += 1
    measured = Measured(grad_norm=grad_norm, lr=lr, ema_decay=model.update_ema(state.step), **totals)
    if state.step == model.freeze_step:
        state.freeze_if_due()
        state.network = wrap(model, state.cfg, env)  # DistributedDataParallel would wait for the frozen gradients
    if state.hooks.after_step is not None:
        state.hooks.after_step(state)
    return measured


def _forward(state: State, micro_batch: Batch) -> Tensor:
    """The objective of a micro-batch: its losses, summed."""
    batch = state.upload(micro_batch)
    dtype = getattr(torch, state.cfg.optimizer.dtype)
    with torch.autocast(state.env.device.type, dtype, enabled=state.cfg.optimizer.mixed_precision):
        loss, _ = state.network(batch.waveforms, **batch.options, **state.frozen(micro_batch, batch, state.step))
        objective = loss.sum()
        if state.hooks.extra_loss is not None:
            objective = objective + state.hooks.extra_loss(state.model, batch)
    return objective


def _reduce_statistics(state: State, micro_batches: list[Batch]) -> dict[str, Tensor]:
    """Sum the step's statistics, and a few counts, over all processes."""
    counts = {
        "batch_size": sum(len(batch.rows) for batch in micro_batches),
        "seconds": sum(batch.num_samples for batch in micro_batches) / SAMPLE_RATE,
        "skipped_files": sum(len(batch.skipped) for batch in micro_batches),
        "stop": float(state.stop.signum > 0),
        "tflop": sum(_tflop(state, batch) for batch in micro_batches),
    }
    views = state.model.statistics.view()
    finite = torch.isfinite(views["loss"]).clone()
    for slot, value in zip(views["extra"], counts.values(), strict=False):
        slot.fill_(value)
    totals = state.model.reduce_statistics()
    sums = dict(zip(counts, totals["extra"].clone(), strict=False))
    frames = totals["frames"].clamp(min=1)  # very short utterances may have no masked frame at all
    return {
        "loss": totals["loss"] / frames,
        "frames": frames,
        "finite_here": finite,
        "target_ppl": count_perplexity(totals["assigned"]),
        "pred_ppl": count_perplexity(totals["predicted"]),
        "active_codewords": (totals["assigned"] > 0).sum(-1),
        **sums,
    }


def _tflop(state: State, batch: Batch) -> float:
    """TFLOP of the model on a micro-batch."""
    (rows, samples), model = batch.waveforms.shape, state.model
    masked = 0 if batch.mask_indices is None else batch.mask_indices.shape[1]
    kept = {"has_frames": state.frozen.has_frames, "has_labels": state.frozen.has_labels(state.step)}
    return rows * step_flops(model.cfg, samples, masked, frozen=model.extractor_frozen, **kept) / 1e12


def _skip(state: State) -> None:
    """Discard a step that overflowed: schedule, teacher and codebooks do not advance."""
    state.model.discard_statistics()
    state.skipped_steps += 1
    if state.skipped_steps == MAX_SKIPPED_STEPS:
        raise InputError(
            f"step {state.step + 1}: float16 overflowed {MAX_SKIPPED_STEPS} times in a row; "
            'lower optimizer.lr or use optimizer.dtype = "bfloat16"'
        )


def _sync_gradients(network: Any, *, when: bool) -> Any:
    """Reduce gradients over processes in this backward pass, or leave that to a later one."""
    return network.no_sync() if isinstance(network, DistributedDataParallel) and not when else nullcontext()
