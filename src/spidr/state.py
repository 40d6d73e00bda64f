"""The parts of a run and how they are built: model, optimizer, loader, and the model wrapped for training."""

import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import AdamW

from spidr.adapt import FrozenOutputs, first_weights, init_codebooks, reset_codebooks, truncated
from spidr.compiled import compiled
from spidr.config import Config, DinoSRConfig, may_differ
from spidr.data import Batch, build_dataloader
from spidr.data.batch import Uploader
from spidr.data.loader import SpeechLoader
from spidr.environment import Environment, StopFlag
from spidr.models import DinoSR
from spidr.models.hub import build_model, recorded_config
from spidr.models.weights import load_into
from spidr.optimizer import Schedule, build_optimizer, drop_frozen
from spidr.tools.errors import InputError
from spidr.tools.meters import Last, Mean, PerCodebook, PerCodebookAndMean, Transport


@dataclass
class Measured:
    """The measurements of an optimizer step, over all processes; tensors are still on the device.

    To add a metric, add a field, which says how it is combined over the steps of a log line, and its value in
    :func:`spidr.train.train_step`.
    """

    loss: Mean
    grad_norm: Mean
    batch_size: Mean  # utterances
    skipped_files: Mean
    target_ppl: PerCodebookAndMean
    pred_ppl: PerCodebookAndMean
    active_codewords: PerCodebook
    lr: Last
    ema_decay: Last
    frames: Transport  # masked
    seconds: Transport  # of audio
    tflop: Transport
    stop: Transport  # number of processes that were told to stop
    finite_here: Transport  # whether this process's loss was finite


@dataclass(frozen=True)
class Hooks:
    """Additions to training from outside the package.

    Attributes:
        on_model: Called with the model before anything is built on it, with the weights of ``init_ckpt`` if any: add
            modules, which are then trained and saved too, reset codebooks or heads, register forward hooks.
        extra_loss: Called with (model, batch) after each forward pass. Its result, 0-dim and summed over the masked
            frames of the micro-batch like the loss itself, is added to the loss. A forward hook on a layer gives its
            output.
        after_step: Called with the state after every optimizer step.
        loader: Called instead of :func:`spidr.data.build_dataloader`, with the same arguments.
    """

    on_model: Callable[[DinoSR], None] | None = None
    extra_loss: Callable[[DinoSR, Batch], Tensor] | None = None
    after_step: Callable[["State"], None] | None = None
    loader: Callable[..., SpeechLoader] = build_dataloader


@dataclass
class State:
    """Everything a step reads and changes. ``position``: steps of this epoch whose batches have been taken."""

    cfg: Config
    env: Environment
    stop: StopFlag
    model: DinoSR
    network: Callable[..., Any]
    optimizer: AdamW
    scaler: torch.amp.GradScaler
    scheduler: Schedule
    loader: SpeechLoader
    frozen: FrozenOutputs
    hooks: Hooks
    step: int = 0
    epoch: int = 0
    position: int = 0
    skipped_steps: int = 0

    def __post_init__(self) -> None:
        self.upload = Uploader(self.env.device)

    def rounds(self) -> Iterator[list[Batch]]:
        """This process's micro-batches, one optimizer step after another, without end."""
        while True:
            batches = self.loader.epoch(self.epoch, self.position)
            while micro_batches := list(islice(batches, self.loader.accumulation)):
                self.position += 1
                yield micro_batches
            self.epoch, self.position = self.epoch + 1, 0

    def freeze_if_due(self) -> None:
        """Freeze extractor and projection once ``freeze_step`` is reached."""
        if self.step >= self.model.freeze_step:
            self.model.freeze_extractor()
            drop_frozen(self.optimizer, self.scheduler)


def build_state(cfg: Config, env: Environment, stop: StopFlag, hooks: Hooks, *, new: bool) -> State:
    """Build a run's state, the same on every process.

    A run that is not ``new`` loads a checkpoint afterwards, so it needs no initial weights.
    """
    if env.device.type == "cuda":
        check_batch_length(cfg)
    torch.manual_seed(cfg.run.random_seed)
    model = build_model(cfg=cfg.model, model_type=cfg.run.model_type)
    if new and cfg.run.init_ckpt is not None:
        load_into(model, first_weights(cfg), cfg.run.init_ckpt)
        model.current_step.zero_()
    if hooks.on_model is not None:
        hooks.on_model(model)
    model.to(env.device).train()
    model.reduction = env.all_reduce
    shapes, channels = model.cfg.extractor_conv_layer_config, model.cfg.encoder_embed_dim
    loader = hooks.loader(
        cfg.data, cfg.masking, conv_layer_config=shapes, channels=channels, rank=env.rank, world_size=env.world_size
    )
    if new and cfg.model.reset == "codebooks":
        reset_codebooks(model, loader, env, cfg)
    elif new and cfg.run.init_ckpt is None and model.cfg.codebook_init == "data":
        init_codebooks(model, loader, env, cfg.run.random_seed)
    model.defer_codebook_updates = True  # once per step, for all micro-batches
    optimizer, scaler, scheduler = build_optimizer(model, cfg.optimizer)
    frozen = FrozenOutputs(model, cfg, loader, env)
    state = State(cfg, env, stop, model, model, optimizer, scaler, scheduler, loader, frozen, hooks)
    state.freeze_if_due()
    return state


def model_settings(cfg: Config) -> DinoSRConfig:
    """The model's configuration. With ``init_ckpt``, settings missing from [model] come from the checkpoint.

    Raises:
        InputError: If the [model] table asks for another architecture than the checkpoint's.
    """
    if cfg.run.init_ckpt is None:
        return truncated(cfg.model)
    # Once a run has begun, its own folder has the settings; the other one may be gone.
    begun = cfg.run.dir / "config.json"
    has_begun = begun.exists()
    recorded = recorded_config(begun if has_begun else cfg.run.init_ckpt, cfg.run.model_type)
    if recorded is None:
        return truncated(cfg.model)
    names = {name for name in cfg.model_given or () if hasattr(recorded, name)}
    own = {name: getattr(cfg.model, name) for name in ("reset", "train_layers") if hasattr(recorded, name)}
    if not has_begun:
        recorded = replace(recorded, **own)  # the other run's start does not concern this one
    elif own.get("train_layers") is not None:
        names -= {"encoder_num_layers", "num_codebooks"}  # it has already been cut
    given = {name: getattr(cfg.model, name) for name in names}
    differing = [
        f"{name} = {value} here, {getattr(recorded, name)} there"
        for name, value in sorted(given.items())
        if value != getattr(recorded, name) and not may_differ(name)
    ]
    if differing:
        raise InputError(f"[model] asks for another model than {cfg.run.init_ckpt} holds: {'; '.join(differing)}")
    return truncated(replace(recorded, **given))


def check_batch_length(cfg: Config) -> None:
    """Raise InputError if a tensor of a batch would have more elements than 32-bit indices can address on a GPU."""
    model, stride, per_sample = cfg.model, 1, 0.0
    for channels, _, layer_stride in model.extractor_conv_layer_config:
        stride *= layer_stride
        per_sample = max(per_sample, channels / stride)
    widest = max(model.encoder_ff_interm_features, model.num_codebooks * model.codebook_size)
    most = int((2**31 - 1) / max(per_sample, widest / stride))
    if cfg.data.max_batch_length > most:
        raise InputError(
            f"data.max_batch_length = {cfg.data.max_batch_length}: a GPU takes at most {most} with this model, as its "
            "indices have 32 bits; use data.global_batch_length for larger batches"
        )


class Replica(nn.Module):
    """The model as DistributedDataParallel sees it."""

    def __init__(self, model: DinoSR, call: Callable[..., Any]) -> None:
        super().__init__()
        self.model = model
        self._call = partial(call)  # otherwise it would be registered as a second module

    def forward(self, *inputs: Tensor, **options: Tensor | None) -> Any:
        """Call the model; without input, return a value that depends on every trained parameter."""
        if inputs:
            return self._call(*inputs, **options)
        return sum(parameter.sum() for parameter in self.model.parameters() if parameter.requires_grad)


def wrap(model: DinoSR, cfg: Config, env: Environment) -> Callable[..., Any]:
    """Wrap the model for the loop: compiled if so configured, with gradients averaged over processes."""
    call = compiled(model, env.device) if cfg.run.compile else model
    if env.world_size == 1:
        return call
    # Buffers change identically on all processes, so need no broadcast. The option was renamed in torch 2.15.
    known = inspect.signature(DistributedDataParallel).parameters
    option = "forward_sync_buffers" if "forward_sync_buffers" in known else "broadcast_buffers"
    network = DistributedDataParallel(Replica(model, call), gradient_as_bucket_view=True, **{option: False})  # type: ignore[arg-type]
    # After its first backward pass it rearranges its buckets, and a gradient's place in a bucket decides the last bit
    # of its sum over processes. Do that here, or the first step after a restart would differ.
    network().backward()
    model.zero_grad()
    return network
