"""Training: the loop, and the step it repeats.

``python -m spidr CONFIG`` is the way in; ``torchrun … -m spidr.train CONFIG`` works too.
"""

from __future__ import annotations

import argparse
import inspect
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from typing import Any

from spidr.config import SAMPLE_RATE, Config, DinoSRConfig, read_config
from spidr.tools.errors import InputError
from spidr.tools.frames import conv_length
from spidr.tools.lazy import command_needs, names_from


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser("python -m spidr.train", description="Train, as one of torchrun's processes.")
    parser.add_argument("config", help="configuration file, TOML or JSON")
    parser.add_argument("overrides", nargs="*", help="settings that replace those of the file: SECTION.KEY=VALUE")
    return parser.parse_args()


if __name__ == "__main__":
    _arguments()  # whoever asks for help need not wait for torch

with command_needs("train", __name__):
    import torch
    from torch import Tensor, nn
    from torch.nn.parallel import DistributedDataParallel
    from torch.optim import AdamW
    from torch.optim.lr_scheduler import LambdaLR

    from spidr.compiled import Compiled
    from spidr.data import Batch, build_dataloader
    from spidr.data.loader import SpeechLoader
    from spidr.environment import Environment, Preempted, StopFlag, environment, seed_step
    from spidr.models import DinoSR
    from spidr.models.codebook import count_perplexity
    from spidr.models.flops import step_flops
    from spidr.models.hub import build_model, load_weights, recorded_config
    from spidr.models.weights import load_into
    from spidr.optimizer import build_optimizer, drop_frozen
    from spidr.run import Run

Measured = dict[str, Tensor | float]

__getattr__ = names_from(__name__, "spidr.compat.training")  # what published packages also have here

MAX_SKIPPED_STEPS = 10
"""Steps in a row that float16 may skip for want of range before the run stops."""

MAY_DIFFER = (
    "dropout",
    "encoder_layer_drop",
    "ema_",
    "codebook_decay",
    "codebook_init",
    "codebook_revive_after",
    "freeze_step",
)
"""How the names of model settings begin or end that need not be those of ``init_ckpt``."""


@dataclass(frozen=True)
class Hooks:
    """What a research fork adds to training without touching the package.

    Attributes:
        on_model: Called with the model before anything is built on it, with the weights of ``init_ckpt`` if there are
            any: add modules, which are then trained and saved along, reset codebooks or heads, register forward hooks.
        extra_loss: Called with (model, batch) after each forward pass. Its result, 0-dim and summed over the masked
            frames of the micro-batch like the loss itself, is added to the loss. What a layer has put out during the
            forward pass is at hand through a forward hook on it.
        after_step: Called with the state after every optimiser step.
        loader: Builds the batches, with the arguments of :func:`spidr.data.build_dataloader`.
    """

    on_model: Callable[[DinoSR], None] | None = None
    extra_loss: Callable[[DinoSR, Batch], Tensor] | None = None
    after_step: Callable[[State], None] | None = None
    loader: Callable[..., SpeechLoader] = build_dataloader


@dataclass
class State:
    """All that a step reads and changes. ``position`` counts the optimiser steps' batches taken from this epoch."""

    cfg: Config
    env: Environment
    stop: StopFlag
    model: DinoSR
    network: Callable[..., Any]
    optimizer: AdamW
    scaler: torch.amp.GradScaler
    scheduler: LambdaLR
    loader: SpeechLoader
    hooks: Hooks
    step: int = 0
    epoch: int = 0
    position: int = 0
    skipped_steps: int = 0

    def rounds(self) -> Iterator[list[Batch]]:
        """This process's micro-batches of one optimiser step after the other, without end."""
        while True:
            batches = self.loader.epoch(self.epoch, self.position)
            while micro_batches := list(islice(batches, self.loader.accumulation)):
                self.position += 1
                yield micro_batches
            self.epoch, self.position = self.epoch + 1, 0

    def freeze_if_due(self) -> None:
        """Stop training extractor and projection from ``freeze_step`` on."""
        if self.step >= self.model.freeze_step:
            self.model.freeze_extractor()
            drop_frozen(self.optimizer, self.scheduler)


def train(cfg: Config, hooks: Hooks | None = None) -> None:
    """Train, or go on training, the run that ``cfg`` describes, as one of the processes that share it.

    Args:
        cfg: See :func:`spidr.config.read_config`.
        hooks: What to add.

    Raises:
        InputError: Something the user gave is wrong, or the run cannot go on; the message says what to do. With several
            processes, on one of them; see :func:`spidr.environment.environment`.
        Preempted: A signal asked to stop; the state is saved.
    """
    with ExitStack() as stack:
        env = stack.enter_context(environment(cfg.run))
        stop = stack.enter_context(StopFlag().listening())
        cfg = replace(cfg, model=model_settings(cfg))
        run = stack.enter_context(closing(Run(cfg, env)))
        latest = run.find_checkpoint()
        state = build_state(cfg, env, stop, hooks or Hooks(), new=latest is None)
        stack.callback(state.loader.close)
        if latest is not None:
            run.restore(state, latest)
        state.network = wrap(state.model, cfg, env)
        run.begin(state)
        batches = run.timed(state.rounds())
        while state.step < cfg.optimizer.max_steps:
            micro_batches = next(batches)
            measured = train_step(state, micro_batches)
            if measured is None:
                continue
            run.record(state, micro_batches, measured)
            run.log(state)
            saved = run.save(state)
            if run.must_stop:
                raise Preempted(stop.signum)
            if saved:
                run.validate(state)
        run.finish(state)


# --------------------------------------------------------------------------------------------------------- one step


def train_step(state: State, micro_batches: list[Batch]) -> Measured | None:
    """One optimiser step.

    The loss is summed over micro-batches and processes and divided by all their masked frames, so how a global batch is
    cut makes no difference. Beside the gradients' there is one reduction over processes, of the statistics.

    Args:
        state: Changed in place.
        micro_batches: Of this process.

    Returns:
        What the step measured, over all processes, tensors still on the device; None if float16 overflowed and the
        step was skipped.

    Raises:
        InputError: If float16 overflowed too many times in a row.
    """
    model, env, optimizer, scaler = state.model, state.env, state.optimizer, state.scaler
    seed_step(state.cfg.run.random_seed, state.step, env.rank)
    scale = _loss_scale(state.cfg)
    for i, micro_batch in enumerate(micro_batches):
        with _sync_gradients(state.network, when=i == len(micro_batches) - 1):
            objective = _forward(state, micro_batch.to(env.device, non_blocking=True))
            scaler.scale(objective * scale).backward()
    measured = _reduce_statistics(state, micro_batches)
    scaler.unscale_(optimizer)
    parameters = [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
    # DistributedDataParallel has averaged over processes; the loss is a mean over the frames of all of them.
    torch._foreach_mul_([p.grad for p in parameters], env.world_size / scale / measured["frames"])
    measured["grad_norm"] = nn.utils.clip_grad_norm_(parameters, state.cfg.optimizer.max_norm)
    measured["lr"] = state.scheduler.get_last_lr()[0]
    before = scaler.get_scale()
    scaler.step(optimizer)
    scaler.update()
    optimizer.zero_grad()
    if scaler.get_scale() < before:  # constant unless float16, where the scaler has already waited for the device
        _skip(state)
        return None
    state.skipped_steps = 0
    state.scheduler.step()
    state.step += 1
    measured["ema_decay"] = model.update_ema(state.step)
    if state.step == model.freeze_step:
        state.freeze_if_due()
        state.network = wrap(model, state.cfg, env)  # DistributedDataParallel would wait for the frozen gradients
    if state.hooks.after_step is not None:
        state.hooks.after_step(state)
    return measured


def _forward(state: State, batch: Batch) -> Tensor:
    """The objective of a micro-batch: its losses, summed."""
    dtype = getattr(torch, state.cfg.optimizer.dtype)
    with torch.autocast(state.env.device.type, dtype, enabled=state.cfg.optimizer.mixed_precision):
        loss, _ = state.network(
            batch.waveforms,
            mask=batch.mask_indices,
            attention_mask=batch.attention_mask,
            lengths=batch.lengths,
            channel_mask=batch.channel_mask,
        )
        objective = loss.sum()
        if state.hooks.extra_loss is not None:
            objective = objective + state.hooks.extra_loss(state.model, batch)
    return objective


def _reduce_statistics(state: State, micro_batches: list[Batch]) -> Measured:
    """Sum the step's statistics over processes, with what else is to be known of all of them."""
    views = state.model.statistics.view()
    finite = torch.isfinite(views["loss"]).clone()
    extra = (
        sum(len(batch.rows) for batch in micro_batches),
        sum(batch.num_samples for batch in micro_batches) / SAMPLE_RATE,
        sum(len(batch.skipped) for batch in micro_batches),
        state.stop.signum > 0,
        sum(_tflop(state.model, batch) for batch in micro_batches),
    )
    for slot, value in zip(views["extra"], extra, strict=True):
        slot.fill_(value)
    totals = state.model.reduce_statistics()
    utterances, seconds, skipped, stop, tflop = totals["extra"].clone()
    frames = totals["frames"].clamp(min=1)  # very short utterances may have no masked frame at all
    return {
        "loss": totals["loss"] / frames,
        "frames": frames,
        "batch_size": utterances,
        "seconds": seconds,
        "skipped_files": skipped,
        "stop": stop,
        "tflop": tflop,
        "finite_here": finite,
        "target_ppls": count_perplexity(totals["assigned"]),
        "pred_ppls": count_perplexity(totals["predicted"]),
        "active_codewords": (totals["assigned"] > 0).sum(-1),
    }


def _tflop(model: DinoSR, batch: Batch) -> float:
    """Floating-point operations of the model on a micro-batch, in 10^12."""
    rows, samples = batch.waveforms.shape
    masked = 0 if batch.mask_indices is None else batch.mask_indices.shape[1]
    return rows * step_flops(model.cfg, samples, masked, frozen=model.extractor_frozen) / 1e12


def _skip(state: State) -> None:
    """Forget a step that overflowed: neither schedule nor teacher nor codebooks advance."""
    state.model.discard_statistics()
    state.skipped_steps += 1
    if state.skipped_steps == MAX_SKIPPED_STEPS:
        raise InputError(
            f"step {state.step + 1}: float16 overflowed {MAX_SKIPPED_STEPS} times in a row; "
            'lower optimizer.lr or use optimizer.dtype = "bfloat16"'
        )


def _loss_scale(cfg: Config) -> float:
    """Keeps gradients near their final size until the number of masked frames is known, as float16 needs."""
    return 1 / max(1, conv_length(cfg.model.extractor_conv_layer_config, cfg.data.max_batch_length))


def _sync_gradients(network: Callable[..., Any], *, when: bool) -> Any:
    """Reduce gradients over processes in the backward pass, or leave it to a later one."""
    return network.no_sync() if isinstance(network, DistributedDataParallel) and not when else nullcontext()


# --------------------------------------------------------------------------------------------------------- set-up


def build_state(cfg: Config, env: Environment, stop: StopFlag, hooks: Hooks, *, new: bool) -> State:
    """Build the run at its beginning, on every process the same.

    Args:
        cfg: The configuration.
        env: The processes.
        stop: The flag to look at.
        hooks: What to add.
        new: Whether the run begins here. Otherwise a checkpoint is going to be loaded, so no weights are needed.
    """
    torch.manual_seed(cfg.run.random_seed)
    model = build_model(cfg=cfg.model, model_type=cfg.run.model_type)
    if new and cfg.run.init_ckpt is not None:
        load_into(model, load_weights(cfg.run.init_ckpt), cfg.run.init_ckpt)
        model.current_step.zero_()
    if hooks.on_model is not None:
        hooks.on_model(model)
    model.to(env.device).train()
    model.reduction = env.all_reduce
    model.defer_codebook_updates = True  # once a step, over all its micro-batches
    loader = hooks.loader(
        cfg.data,
        cfg.masking,
        conv_layer_config=model.cfg.extractor_conv_layer_config,
        channels=model.cfg.encoder_embed_dim,
        rank=env.rank,
        world_size=env.world_size,
    )
    optimizer, scaler, scheduler = build_optimizer(model, cfg.optimizer)
    state = State(cfg, env, stop, model, model, optimizer, scaler, scheduler, loader, hooks)
    if new and cfg.run.init_ckpt is None and model.cfg.codebook_init == "data":
        init_codebooks(state)
    state.freeze_if_due()
    return state


def init_codebooks(state: State) -> None:
    """Take the first codewords from the first batch of the main process."""
    batch = next(state.loader.epoch(0)).to(state.env.device)
    generator = torch.Generator().manual_seed(state.cfg.run.random_seed)
    state.model.init_codebooks(
        batch.waveforms, attention_mask=batch.attention_mask, lengths=batch.lengths, generator=generator
    )
    for buffer in state.model.codebooks.buffers():
        state.env.broadcast(buffer)


def model_settings(cfg: Config) -> DinoSRConfig:
    """The model's configuration: with ``init_ckpt``, what the [model] table does not set is the checkpoint's own.

    Raises:
        InputError: If the [model] table asks for another architecture than the checkpoint's.
    """
    if cfg.run.init_ckpt is None:
        return cfg.model
    # A run that has begun has it in its own folder: the other one may be gone by now.
    begun = cfg.run.dir / "config.json"
    recorded = recorded_config(begun if begun.exists() else cfg.run.init_ckpt, cfg.run.model_type)
    if recorded is None:
        return cfg.model
    given = {name: getattr(cfg.model, name) for name in cfg.model_given or () if hasattr(recorded, name)}
    differing = [
        f"{name} = {value} here, {getattr(recorded, name)} there"
        for name, value in sorted(given.items())
        if value != getattr(recorded, name) and not (name.startswith(MAY_DIFFER) or name.endswith(MAY_DIFFER))
    ]
    if differing:
        raise InputError(f"[model] asks for another model than {cfg.run.init_ckpt} holds: {'; '.join(differing)}")
    return replace(recorded, **given)


class _Replica(nn.Module):
    """The model as DistributedDataParallel sees it."""

    def __init__(self, model: DinoSR, call: Callable[..., Any]) -> None:
        super().__init__()
        self.model = model
        self._call = partial(call)  # bare, it would be registered as a second module

    def forward(self, *inputs: Tensor, **options: Tensor | None) -> Any:
        """Call the model; without input, give something of which every trained parameter has a gradient."""
        if inputs:
            return self._call(*inputs, **options)
        return sum(parameter.sum() for parameter in self.model.parameters() if parameter.requires_grad)


def wrap(model: DinoSR, cfg: Config, env: Environment) -> Callable[..., Any]:
    """The model as the loop calls it: compiled if configured, with gradients averaged over processes if several."""
    call = Compiled(model, cfg) if cfg.run.compile else model
    if env.world_size == 1:
        return call
    # Buffers change in the same way everywhere: no broadcast. The option was renamed in torch 2.15.
    known = inspect.signature(DistributedDataParallel).parameters
    option = "forward_sync_buffers" if "forward_sync_buffers" in known else "broadcast_buffers"
    network = DistributedDataParallel(_Replica(model, call), gradient_as_bucket_view=True, **{option: False})  # type: ignore[arg-type]
    # After its first backward pass it lays out its buckets anew, and where a gradient lies in a bucket decides about
    # the last bit of its sum over processes. So that comes here, or the first step after a restart would differ.
    network().backward()
    model.zero_grad()
    return network


def main() -> int:
    """Command line of ``python -m spidr.train``. Returns the exit status."""
    try:
        cfg = read_config((args := _arguments()).config, args.overrides)
    except InputError as error:
        # All processes of a machine find the same: one of them says so.
        local_rank = os.environ.get("LOCAL_RANK", "")
        is_first = "RANK" not in os.environ or not local_rank.isdigit() or int(local_rank) == 0
        return say_why(error) if is_first else 2
    try:
        train(cfg)
    except InputError as error:
        return say_why(error)
    return 0


def say_why(error: InputError) -> int:
    """Write an error on a line of its own. Returns the exit status."""
    line_break = "\n" if "RANK" in os.environ else ""  # another process's progress bar may be on this line
    sys.stderr.write(f"{line_break}error: {error}\n")
    return 2


if __name__ == "__main__":
    sys.exit(main())
