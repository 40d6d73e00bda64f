"""Every setting, its default and its check.

Configurations are TOML (or JSON) files read by :func:`read_config` into frozen dataclasses. This module needs the
standard library only and imports nothing else of the package.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeVar

SAMPLE_RATE = 16_000
"""Sampling rate of all audio, in Hz."""

DEFAULT_CONV_LAYER_CONFIG: list[tuple[int, int, int]] = [(512, 10, 5)] + [(512, 3, 2)] * 4 + [(512, 2, 2)] * 2
"""(out_channels, kernel, stride) of each convolution of the feature extractor: one frame every 20 ms."""

Length = TypeVar("Length")


def conv_length(shapes: Iterable[tuple[int, int, int]], lengths: Length) -> Length:
    """Number of frames the convolutions ``shapes`` make of ``lengths`` samples.

    Args:
        shapes: (out_channels, kernel, stride) of each convolution, all without padding.
        lengths: A number of samples: an int, or an integer array or tensor of them.

    Returns:
        As many numbers of frames, 0 where the samples do not fill one kernel.
    """
    for _, kernel, stride in shapes:
        frames: Any = (lengths - kernel) // stride + 1  # type: ignore[operator]
        lengths = frames * (frames > 0)
    return lengths


ModelType = Literal["spidr", "dinosr"]
MaskingStrategy = Literal["static", "uniform", "normal", "poisson"]


class InputError(ValueError):
    """Something the user gave is wrong. The message names the file, key or row and says what to do.

    Command lines print the message and exit with status 2.
    """


@dataclass(frozen=True)
class SlurmConfig:
    """What to ask SLURM for. ``time`` is in minutes."""

    account: str
    nodes: int
    gpus_per_node: int
    qos: str | None = None
    time: int | None = None
    cpus_per_task: int | None = None
    mem_per_gpu: str | None = None
    constraint: str | None = None
    partition: str | None = None


@dataclass(frozen=True)
class RunConfig:
    """Where a run lives and how it logs, saves and restarts."""

    workdir: str
    wandb_project: str
    wandb_name: str
    wandb_mode: Literal["online", "offline", "disabled"] = "offline"
    random_seed: int = 0
    use_deterministic: bool = False
    log_interval: int = 200
    save_interval: int = 2500
    init_ckpt: str | None = None
    compile: bool = True
    keep_latest: int = -1
    model_type: ModelType = "dinosr"
    slurm_validation: SlurmConfig | None = None
    device: Literal["auto", "cuda", "mps", "cpu"] = "auto"
    profile: bool = False

    @property
    def dir(self) -> Path:
        """The run folder: ``workdir / wandb_project / wandb_name``."""
        return Path(self.workdir) / self.wandb_project / self.wandb_name


@dataclass(frozen=True)
class DataConfig:
    """A manifest and how batches are made from it. Sizes and lengths are in samples."""

    manifest: str
    enable_padding: bool = False
    rand_crop: bool = True
    normalize: bool = True
    num_buckets: int = 1000
    min_sample_size: int = 2000
    max_sample_size: int = 320_000
    max_batch_length: int = 3_800_000
    drop_last: bool = False
    num_workers: int = 10
    pin_memory: bool = False
    prefetch_factor: int = 2
    persistent_workers: bool = True
    random_seed: int = 0
    bucket_method: Literal["uniform", "percentile"] = "uniform"
    alignments_path: str | None = None
    global_batch_length: int | None = None
    on_error: Literal["raise", "skip"] = "raise"


@dataclass(frozen=True)
class OptimizerConfig:
    """AdamW, its learning-rate schedule and the precision of the forward pass."""

    lr: float = 5e-4
    betas: tuple[float, float] = (0.9, 0.95)
    weight_decay: float = 0.01
    eps: float = 1e-6
    max_norm: float = 10.0
    dtype: Literal["float32", "float16", "bfloat16"] = "bfloat16"
    init_lr_scale: float = 0.01
    final_lr_scale: float = 0.01
    max_steps: int = 400_000
    warmup_steps: int = 12_000
    hold_steps: int = 188_000
    decay_steps: int = 200_000
    rsqrt_timescale: int = 10_000
    rsqrt_shift: int = 0
    scheduler: Literal["tristage", "cosine", "rsqrt", "constant"] = "tristage"
    exclude_from_optimizer: tuple[str, ...] = ("teacher",)
    to_freeze: tuple[str, ...] = ("feature_extractor", "feature_projection")

    @property
    def mixed_precision(self) -> bool:
        """Whether the forward pass runs under autocast."""
        return self.dtype != "float32"


@dataclass(frozen=True)
class DinoSRConfig:
    """The shape and schedules of DinoSR. The name fairseq gives a field is in brackets."""

    extractor_mode: Literal["layer_norm", "group_norm"] = "layer_norm"  # [extractor_mode]
    extractor_conv_bias: bool = False  # [conv_bias]
    extractor_conv_layer_config: tuple[tuple[int, int, int], ...] = tuple(DEFAULT_CONV_LAYER_CONFIG)
    encoder_embed_dim: int = 768  # [encoder_embed_dim]
    encoder_projection_dropout: float = 0.0  # [dropout_input]
    encoder_pos_conv_kernel: int = 95  # [conv_pos]
    encoder_pos_conv_groups: int = 16  # [conv_pos_groups]
    encoder_pos_conv_depth: int = 5  # [pos_conv_depth]
    encoder_num_layers: int = 12  # [encoder_layers]
    encoder_num_heads: int = 12  # [encoder_attention_heads]
    encoder_attention_dropout: float = 0.1  # [attention_dropout]
    encoder_ff_interm_features: int = 3072  # [encoder_ffn_embed_dim]
    encoder_ff_interm_dropout: float = 0.0  # [activation_dropout]
    encoder_dropout: float = 0.1  # [dropout]
    encoder_layer_norm_first: bool = False  # [layer_norm_first]
    encoder_layer_drop: float = 0.05  # [encoder_layerdrop]
    encoder_qkv_bias: bool = False  # always true in fairseq
    codebook_size: int = 256  # [codebook_size]
    codebook_decay: float = 0.9  # [codebook_decay]
    num_codebooks: int = 8  # [average_top_k_layers]
    ema_start_decay: float = 0.999  # [ema_decay]
    ema_final_decay: float = 0.9999  # [ema_end_decay]
    ema_final_step: int = 30_000  # [ema_anneal_end_step]
    ema_exclude_layers: tuple[str, ...] = ("pos_conv_embed",)
    freeze_step: int = 200_000  # [freeze_teacher_step]
    codebook_init: Literal["random", "data"] = "random"


@dataclass(frozen=True)
class SpidRConfig(DinoSRConfig):
    """DinoSR's settings with SpidR's exponential teacher schedule and no layer drop."""

    encoder_layer_drop: float = 0.0
    ema_timescale: int = 20_000
    ema_threshold: float = 1e-7


@dataclass(frozen=True)
class MaskingConfig:
    """Span masking of frames and of feature channels, with fairseq's names."""

    mask_prob: float = 0.8
    mask_selection: MaskingStrategy = "static"
    mask_other: float = 0.0
    mask_length: int = 10
    no_mask_overlap: bool = False
    mask_min_space: int = 1
    mask_channel_prob: float = 0.0
    mask_channel_selection: MaskingStrategy = "static"
    mask_channel_other: float = 0.0
    mask_channel_length: int = 10
    no_mask_channel_overlap: bool = False
    mask_channel_min_space: int = 1


@dataclass(frozen=True)
class ResumeConfig:
    """A checkpoint to validate and the file its results go to."""

    step: int
    checkpoint: str
    results: str


@dataclass(frozen=True)
class Config:
    """A whole configuration file."""

    run: RunConfig
    data: DataConfig
    model: DinoSRConfig
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    masking: MaskingConfig = field(default_factory=MaskingConfig)
    validation: dict[str, DataConfig] = field(default_factory=dict)


def read_config(path: str | Path) -> Config:
    """Read a configuration file."""
    raise NotImplementedError
