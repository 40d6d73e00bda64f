"""Every setting, its default and its check.

Configurations are TOML (or JSON) files read by :func:`read_config` into frozen dataclasses, which check themselves (see
:mod:`spidr.tools.schema`). Building one in Python checks the same.
"""

import dataclasses
import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, cast

from spidr.tools.errors import InputError, ProblemsError
from spidr.tools.files import expand
from spidr.tools.schema import REQUIRED, Accepts, Rule, Settings, between, describe, from_table, hints_of, ours, show
from spidr.tools.untrusted import parse_toml_value, read_table

SAMPLE_RATE = 16_000
"""Sampling rate of all audio, in Hz."""

DEFAULT_CONV_LAYER_CONFIG: list[tuple[int, int, int]] = [(512, 10, 5)] + [(512, 3, 2)] * 4 + [(512, 2, 2)] * 2
"""(out_channels, kernel, stride) of each convolution of the feature extractor: one frame every 20 ms."""

ModelType = Literal["spidr", "dinosr"]
MaskingStrategy = Literal["static", "uniform", "normal", "poisson"]


def _is_below(name: str) -> bool:
    parts = name.split("/")
    return set(name).isdisjoint("\\\0") and all(p not in ("", ".", "..") and len(p.encode()) <= 255 for p in parts)


def _divides(part: int, whole: int) -> bool:
    return whole % part == 0


MAX_SAMPLES = 2**31 - 1
"""The most samples of a recording or batch: 37 hours. Lengths have 32 bits."""

Positive = Annotated[int, Accepts("of at least 1", lambda n: n >= 1)]
NonNegative = Annotated[int, Accepts("of at least 0", lambda n: n >= 0)]
NonNegativeFloat = Annotated[float, Accepts("of at least 0", lambda x: x >= 0)]
PositiveFloat = Annotated[float, Accepts("above 0", lambda x: x > 0)]
Width = Annotated[int, between(1, 2**16)]
Layers = Annotated[int, between(1, 1000)]
Span = Annotated[int, between(1, 1_000_000)]
Space = Annotated[int, between(0, 1_000_000)]
SpanSpread = Annotated[float, Accepts("between 0 and 1,000,000", lambda x: 0 <= x <= 1_000_000)]
Samples = Annotated[int, between(1, MAX_SAMPLES)]
Probability = Annotated[float, Accepts("between 0 and 1", lambda x: 0 <= x <= 1)]
Text = Annotated[str, Accepts("that is not empty", lambda s: bool(s) and "\0" not in s)]
Names = list[Text]
Wide = Annotated[int, between(1, 2**20)]
MaskShare = Annotated[float, Accepts("in (0, 1]", lambda p: 0 < p <= 1)]
Betas = Annotated[tuple[float, float], Accepts("in [0, 1)", lambda betas: all(0 <= b < 1 for b in betas))]
ConvLayers = Annotated[
    list[tuple[Width, Width, Width]], Accepts("with 1 to 100 layers", lambda layers: 1 <= len(layers) <= 100)
]
FolderName = Annotated[str, Accepts("that can name a folder inside another ('a' or 'a/b', no '..' or '\\')", _is_below)]


@dataclass(frozen=True, repr=False)
class SlurmConfig(Settings):
    """SLURM resources. ``time`` is in minutes."""

    account: Annotated[str, Accepts("without a NUL character", lambda s: "\0" not in s)] | None = None  # SLURM account
    nodes: Annotated[int, between(1, 100_000)] = REQUIRED  # nodes per job
    gpus_per_node: Annotated[int, between(1, 1000)] = REQUIRED  # GPUs per node, with one task each
    qos: Text | None = None  # quality of service
    time: Annotated[int, between(1, 10_000_000)] | None = None  # time limit in minutes
    cpus_per_task: Annotated[int, between(1, 10_000)] | None = None  # CPUs per task, for its data workers
    mem_per_gpu: Text | None = None  # memory per GPU, such as "80g"
    constraint: Text | None = None  # node features to require
    partition: Text | None = None  # partition

    def __getitem__(self, name: str) -> Any:
        """A setting by name, since this is a dictionary in the published package."""
        return getattr(self, name)

    def keys(self) -> list[str]:
        """Names of the settings that are not None, for ``dict(slurm)``."""
        return [f.name for f in dataclasses.fields(self) if getattr(self, f.name) is not None]


@dataclass(frozen=True, repr=False)
class RunConfig(Settings):
    """A run's folder, logging, checkpoints and device."""

    workdir: Text  # parent of all run folders; relative to the current folder
    wandb_project: FolderName  # folder in workdir; project on wandb
    wandb_name: FolderName  # folder in the project; run name on wandb
    wandb_mode: Literal["online", "offline", "disabled"] = "offline"  # where metrics go besides metrics.jsonl
    random_seed: NonNegative = 0  # seed of weights and dropout
    use_deterministic: bool = False  # use deterministic algorithms (slower on a GPU)
    log_interval: Positive = 200  # steps between lines of metrics
    save_interval: int = 2500  # steps between checkpoints; <= 0: none
    init_ckpt: Text | None = None  # initial weights: a file or a published model
    compile: bool = True  # use torch.compile (on CUDA only)
    keep_latest: int = -1  # number of checkpoints to keep; <= 0: all
    model_type: ModelType = "dinosr"  # always set it
    slurm_validation: SlurmConfig | None = None  # resources of validation jobs
    device: Literal["auto", "cuda", "mps", "cpu"] = ours("auto")  # auto: CUDA, else MPS, else the CPU
    profile: bool = ours(False)  # record a trace of two steps after step 1,005
    collapse_share: Probability = ours(0.1)  # warn if a codebook uses a smaller share of its codewords
    collapse_steps: Positive = ours(1000)  # for this many steps in a row

    @property
    def dir(self) -> Path:
        """The run folder: ``workdir / wandb_project / wandb_name``."""
        return expand(self.workdir) / self.wandb_project / self.wandb_name


@dataclass(frozen=True, repr=False)
class DataConfig(Settings):
    """Manifests and how batches are made from them. Sizes and lengths are in samples.

    ``max_batch_length`` is per process and micro-batch, ``global_batch_length`` per optimizer step over all processes;
    it determines the number of accumulated micro-batches (None: no accumulation). With ``weights``, an epoch still has
    the total hours of all manifests (None: each recording once).
    """

    manifest: Text | Annotated[list[Text], Accepts("with at least one", bool)]  # a manifest, or several
    enable_padding: bool = False  # pad a batch to its longest row; otherwise crop to its shortest
    rand_crop: bool = True  # crop at random; otherwise at the start
    normalize: bool = True  # standardise each recording
    num_buckets: Annotated[int, between(1, 1_000_000)] = 1000  # buckets of similar length, from which batches are drawn
    min_sample_size: Annotated[int, between(0, MAX_SAMPLES)] = 2000  # skip shorter recordings
    max_sample_size: Samples = 320_000  # crop longer recordings
    max_batch_length: Samples = 3_800_000  # batch size per process and micro-batch, with padding
    drop_last: bool = False  # drop an epoch's incomplete last step
    num_workers: Annotated[int, between(0, 1000)] = 10  # reader processes; 0: read in the training process
    pin_memory: bool = False  # put batches in page-locked memory
    prefetch_factor: Annotated[int, between(1, 1000)] = 2  # batches that each worker prepares ahead
    persistent_workers: bool = True  # keep workers between epochs
    random_seed: NonNegative = 0  # seed of order, crops and masks
    bucket_method: Literal["uniform", "percentile"] = "uniform"  # spacing of the bucket boundaries
    alignments_path: Text | None = None  # phones, to report unit quality in validation
    global_batch_length: Annotated[int, between(1, 10**10)] | None = ours(None)  # batch size per step, by accumulation
    on_error: Literal["raise", "skip"] = ours("raise")  # what to do with unreadable recordings
    weights: list[PositiveFloat] | None = ours(None)  # each manifest's share of an epoch's hours
    length_multiple: Annotated[int, between(1, 1024)] = ours(1)  # make a batch's frames a multiple of this
    distinct_epochs: NonNegative = ours(0)  # later epochs repeat these; 0: none (1 with cache)
    cache: bool = ours(False)  # keep outputs of a frozen extractor and teacher in memory

    RULES: ClassVar = (
        Rule(
            ("weights", "manifest"),
            lambda weights, manifest: weights is None or (isinstance(manifest, list) and len(weights) == len(manifest)),
            "must be as many as there are manifests",
        ),
        Rule(("min_sample_size", "max_sample_size"), operator.le, "must not exceed max_sample_size"),
        Rule(("max_sample_size", "max_batch_length"), operator.le, "must fit in max_batch_length"),
    )

    @property
    def num_distinct(self) -> int:
        """Number of epochs that later ones repeat, 0 if none."""
        return self.distinct_epochs or int(self.cache)

    @property
    def manifests(self) -> list[str]:
        """The manifests, one or several."""
        return [self.manifest] if isinstance(self.manifest, str) else self.manifest


@dataclass(frozen=True, repr=False)
class OptimizerConfig(Settings):
    """AdamW, its learning-rate schedule and the precision of the forward pass.

    ``exclude_from_optimizer`` and ``to_freeze`` are prefixes of parameter names.
    """

    lr: NonNegativeFloat = 5e-4  # peak learning rate
    betas: Betas = (0.9, 0.95)  # AdamW's betas
    weight_decay: NonNegativeFloat = 0.01  # AdamW's weight decay
    eps: PositiveFloat = 1e-6  # AdamW's epsilon
    max_norm: PositiveFloat = 10.0  # clip gradients to this norm
    dtype: Literal["float32", "float16", "bfloat16"] = "bfloat16"  # precision of the forward pass (autocast)
    init_lr_scale: NonNegativeFloat = 0.01  # rate at the first step, as a share of lr
    final_lr_scale: NonNegativeFloat = 0.01  # rate after the decay, as a share of lr
    max_steps: Positive = 400_000  # optimizer steps in total
    warmup_steps: NonNegative = 12_000  # steps of linear warm-up
    hold_steps: NonNegative = 188_000  # steps at the peak rate
    decay_steps: NonNegative = 200_000  # steps of decay (tristage)
    rsqrt_timescale: Positive = 10_000  # timescale of rsqrt
    rsqrt_shift: NonNegative = 0  # shift of rsqrt
    scheduler: Literal["tristage", "cosine", "rsqrt", "constant"] = "tristage"  # shape of the decay
    exclude_from_optimizer: Names = field(default_factory=lambda: ["teacher"])  # not trained (prefixes)
    to_freeze: Names = field(default_factory=lambda: ["feature_extractor", "feature_projection"])  # from freeze_step on

    RULES: ClassVar = (
        Rule(
            ("decay_steps", "scheduler"),
            lambda steps, scheduler: steps > 0 or scheduler != "tristage",
            "must be at least 1 with the tristage scheduler",
        ),
    )

    @property
    def mixed_precision(self) -> bool:
        """Whether the forward pass runs under autocast."""
        return self.dtype != "float32"


@dataclass(frozen=True, repr=False)
class DinoSRConfig(Settings):
    """The shape and schedules of DinoSR. fairseq's names are in brackets.

    ``ema_exclude_layers`` are prefixes of names inside the transformer. A codeword that got no frame for
    ``codebook_revive_after`` steps takes half of a busy one's frames.
    """

    extractor_mode: Literal["layer_norm", "group_norm"] = "layer_norm"  # [extractor_mode] normalisation
    extractor_conv_bias: bool = False  # [conv_bias] biases of the convolutions
    extractor_conv_layer_config: ConvLayers = field(default_factory=DEFAULT_CONV_LAYER_CONFIG.copy)  # the convolutions
    encoder_embed_dim: Width = 768  # [encoder_embed_dim] width of the transformer
    encoder_projection_dropout: Probability = 0.0  # [dropout_input] after the projection
    encoder_pos_conv_kernel: Width = 95  # [conv_pos] total kernel of the positional convolutions
    encoder_pos_conv_groups: Width = 16  # [conv_pos_groups] groups of each
    encoder_pos_conv_depth: Layers = 5  # [pos_conv_depth] number of positional convolutions
    encoder_num_layers: Layers = 12  # [encoder_layers] transformer layers
    encoder_num_heads: Width = 12  # [encoder_attention_heads] attention heads
    encoder_attention_dropout: Probability = 0.1  # [attention_dropout] on attention weights
    encoder_ff_interm_features: Wide = 3072  # [encoder_ffn_embed_dim] width of the feed-forward
    encoder_ff_interm_dropout: Probability = 0.0  # [activation_dropout] within the feed-forward
    encoder_dropout: Probability = 0.1  # [dropout] after attention and feed-forward
    encoder_layer_norm_first: bool = False  # [layer_norm_first] pre-norm instead of post-norm
    encoder_layer_drop: Probability = 0.05  # [encoder_layerdrop] probability of skipping a layer
    encoder_qkv_bias: bool = False  # biases of query, key and value (always on in fairseq)
    codebook_size: Annotated[int, between(2, 2**20)] = 256  # [codebook_size] codewords per codebook
    codebook_decay: Probability = 0.9  # [codebook_decay] decay of the codewords' moving averages
    num_codebooks: Layers = 8  # [average_top_k_layers] one for each of the last layers
    ema_start_decay: Probability = 0.999  # [ema_decay] the teacher's initial decay
    ema_final_decay: Probability = 0.9999  # [ema_end_decay] its final decay
    ema_final_step: NonNegative = 30_000  # [ema_anneal_end_step] when it reaches that
    ema_exclude_layers: Names = field(default_factory=lambda: ["pos_conv_embed"])  # copied, not averaged (prefixes)
    freeze_step: NonNegative = 200_000  # [freeze_teacher_step] when to_freeze is frozen
    codebook_init: Literal["random", "data"] = ours("random")  # initial codewords: random, or frames of the first batch
    codebook_revive_after: NonNegative = ours(0)  # steps without a frame before reviving; 0: never
    reset: Literal["none", "codebooks"] = ours("none")  # codebooks: start with new codewords and heads

    ELSEWHERE: ClassVar = dict.fromkeys(
        ("ema_timescale", "ema_threshold", "train_layers"),
        "unknown key for run.model_type 'dinosr': it is a setting of 'spidr'",
    )
    RULES: ClassVar = (
        Rule(("encoder_num_heads", "encoder_embed_dim"), _divides, "must divide encoder_embed_dim"),
        Rule(("encoder_pos_conv_groups", "encoder_embed_dim"), _divides, "must divide encoder_embed_dim"),
        Rule(("num_codebooks", "encoder_num_layers"), operator.le, "must not exceed encoder_num_layers"),
    )


@dataclass(frozen=True, repr=False)
class SpidRConfig(DinoSRConfig):
    """DinoSR's settings with SpidR's exponential teacher schedule and no layer drop."""

    encoder_layer_drop: Probability = 0.0  # probability of skipping a layer
    ema_timescale: PositiveFloat = 20_000.0  # steps in which 1 - decay falls to 1/e
    ema_threshold: NonNegativeFloat = 1e-7  # 1 - decay counts as 0 below this
    train_layers: Layers | None = ours(None)  # keep only the first layers of run.init_ckpt; none: all


@dataclass(frozen=True, repr=False)
class MaskingConfig(Settings):
    """Span masking of frames and of feature channels, with fairseq's names. Lengths are in frames or channels."""

    mask_prob: MaskShare = 0.8  # share of frames to mask, counting overlaps twice
    mask_selection: MaskingStrategy = "static"  # distribution of span lengths
    mask_other: SpanSpread = 0.0  # second parameter of the distribution
    mask_length: Span = 10  # mean length of spans
    no_mask_overlap: bool = False  # keep spans apart
    mask_min_space: Space = 1  # frames between spans kept apart
    mask_channel_prob: Probability = 0.0  # share of channels to mask; 0: none
    mask_channel_selection: MaskingStrategy = "static"  # distribution of span lengths
    mask_channel_other: SpanSpread = 0.0  # second parameter of the distribution
    mask_channel_length: Span = 10  # mean length of spans
    no_mask_channel_overlap: bool = False  # keep spans apart
    mask_channel_min_space: Space = 1  # channels between spans kept apart

    RULES: ClassVar = tuple(
        Rule(
            (f"{mask}_selection", f"{mask}_other", f"{mask}_length"),
            lambda selection, other, length: selection != "uniform" or other <= 2 * length,
            "uniform draws lengths from the second value to twice the third, so the second must not exceed that",
        )
        for mask in ("mask", "mask_channel")
    )


@dataclass(frozen=True)
class ResumeConfig:
    """A checkpoint to validate and the file its results go to."""

    step: int
    checkpoint: str
    results: str


ValidationName = Annotated[FolderName, Accepts("other than 'train'", lambda name: name != "train")]


@dataclass(frozen=True, repr=False)
class Config(Settings):
    """A whole configuration file.

    ``validation`` maps the name of a validation set to its data.
    """

    run: RunConfig
    data: DataConfig
    model: DinoSRConfig
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    masking: MaskingConfig = field(default_factory=MaskingConfig)
    validation: dict[ValidationName, DataConfig] = field(default_factory=dict)
    RULES: ClassVar = (
        Rule(
            ("model", "run"),
            lambda model, run: isinstance(model, SpidRConfig) == (run.model_type == "spidr"),
            "must be a SpidRConfig for run.model_type 'spidr' and a DinoSRConfig for 'dinosr'",
        ),
    )

    @property
    def model_given(self) -> frozenset[str] | None:
        """What the file's [model] table sets; None without one: the model of ``run.init_ckpt`` then holds.

        In a configuration built in Python, everything counts as given.
        """
        return cast("frozenset[str] | None", vars(self.model).get("_given", frozenset(hints_of(type(self.model)))))


_MODEL_CONFIGS: dict[str, type[DinoSRConfig]] = {"spidr": SpidRConfig, "dinosr": DinoSRConfig}


# --------------------------------------------------------------------------------------------------------------------
# Reading and writing


def read_config(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Read and check a configuration file.

    Args:
        path: A JSON file if its name ends in ``.json``, such as a run's ``config.json``, else a TOML file.
        overrides: Settings that replace the file's, such as ``"optimizer.lr=1e-3"``.

    Raises:
        InputError: The file cannot be read or parsed, or some of its keys or values are wrong: one message names the
            file and, for every problem, the key, what was found and what is accepted.
    """
    document = read_table(path)
    for text in overrides:
        _override(document, text)
    sections = {name: table for name, table in document.items() if table is not None}
    run, model_table = sections.get("run"), sections.get("model")
    model_type = run.get("model_type", "dinosr") if isinstance(run, dict) else None
    # With a wrong model_type, which is reported, SpidRConfig knows all names.
    model_class = _MODEL_CONFIGS.get(model_type, SpidRConfig) if isinstance(model_type, str) else SpidRConfig
    problems: list[tuple[str, str]] = []
    try:
        model = from_table(model_class, {} if model_table is None else model_table)
    except ProblemsError as error:
        problems, model = error.under("model"), model_class()
    try:
        config = from_table(Config, sections | {"model": model})
    except ProblemsError as error:
        problems += error.problems
    if problems:
        raise ProblemsError(problems, str(path), guide="pretrain.md#3-write-a-configuration")
    object.__setattr__(config.model, "_given", None if model_table is None else frozenset(model_table))
    return config


def _override(document: dict[str, Any], text: str) -> None:
    """Apply ``SECTION.KEY=VALUE``. The value is TOML or, failing that, a string."""
    name, equals, value = text.partition("=")
    *sections, key = name.strip().split(".")
    if not (equals and sections and key):
        raise InputError(f"{text!r}: a setting is given as SECTION.KEY=VALUE, such as optimizer.lr=1e-3")
    table = document
    for section in sections:
        if table.get(section) is None:
            table[section] = {}
        table = table[section]
        if not isinstance(table, dict):
            raise InputError(f"{text!r}: {section} is not a section")
    table[key] = parse_toml_value(value.strip())


def schedule_remark(cfg: OptimizerConfig) -> str | None:
    """Describe what is odd about the steps of a schedule, if anything."""
    steps, warmup, begin = cfg.max_steps, cfg.warmup_steps, cfg.warmup_steps + cfg.hold_steps
    end = begin + cfg.decay_steps
    if steps < warmup:
        return f"optimizer.max_steps = {steps} ends during warm-up (optimizer.warmup_steps = {warmup})"
    if cfg.scheduler == "tristage" and steps <= begin:
        reason = f"optimizer.max_steps = {steps} does not exceed warmup_steps + hold_steps = {begin}"
        return f"the learning rate never decays: {reason}"
    if cfg.scheduler == "tristage" and steps > end:
        rest = f"{cfg.final_lr_scale:g} of its peak from step {end} on, where the decay ends,"
        return f"the learning rate stays at optimizer.final_lr_scale = {rest} to optimizer.max_steps = {steps}"
    return None


def to_dict(config: Settings) -> dict[str, Any]:
    """Settings as JSON values; :func:`read_config` reads them back unchanged.

    Settings that the published package lacks are omitted if they have their defaults.
    """
    values = ((f, getattr(config, f.name)) for f in dataclasses.fields(config))
    return {f.name: _to_json(value) for f, value in values if not (f.metadata.get("ours") and value == f.default)}


def _to_json(value: Any) -> Any:
    if isinstance(value, Settings):
        return to_dict(value)
    if isinstance(value, dict):
        return {key: _to_json(item) for key, item in value.items()}
    return [_to_json(item) for item in value] if isinstance(value, (list, tuple)) else value


MAY_DIFFER = (
    *("dropout", "encoder_layer_drop", "ema_", "codebook_decay", "codebook_init", "codebook_revive_after"),
    *("freeze_step", "reset"),
)
"""Prefixes and suffixes of model settings that do not change the model's shape."""


def may_differ(name: str) -> bool:
    """Whether a model setting leaves the model's shape unchanged."""
    return name.startswith(MAY_DIFFER) or name.endswith(MAY_DIFFER)


def model_config(model_type: str, table: Mapping[str, Any], *, source: str = "model") -> DinoSRConfig:
    """Check a [model] table of a "spidr" or "dinosr" on its own; ``source`` is where it comes from, for the message.

    Raises:
        InputError: An unknown model type, or wrong keys or values.
    """
    if not isinstance(model_type, str) or model_type not in _MODEL_CONFIGS:
        raise InputError(f"{source}: model_type: found {show(model_type)}, accepted: {describe(ModelType)}")
    try:
        return from_table(_MODEL_CONFIGS[model_type], table)
    except ProblemsError as error:
        raise ProblemsError(error.problems, source) from None
