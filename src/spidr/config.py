"""Every setting, its default and its check.

Configurations are TOML (or JSON) files read by :func:`read_config` into frozen dataclasses. A field's annotation is its
whole check: the type and, through :data:`typing.Annotated`, the accepted values; what several fields must satisfy
together is listed in ``RULES`` of their class. Building a dataclass in Python checks the same. This module needs the
standard library only and imports nothing else of the package.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import logging
import math
import os
import reprlib
import sys
import tomllib
import types
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

logger = logging.getLogger(__name__)

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


def num_frames(num_samples: int) -> int:
    """Number of frames that the base models make of ``num_samples`` samples; frame ``t`` begins at ``t * 20`` ms."""
    return conv_length(DEFAULT_CONV_LAYER_CONFIG, num_samples)


ModelType = Literal["spidr", "dinosr"]
MaskingStrategy = Literal["static", "uniform", "normal", "poisson"]


class InputError(ValueError):
    """Something the user gave is wrong. The message names the file, key or row and says what to do.

    Command lines print the message and exit with status 2.
    """


def receptive_field(shapes: Iterable[tuple[int, int, int]]) -> int:
    """Number of samples that one frame of the convolutions ``shapes`` sees."""
    samples = 1
    for _, kernel, stride in reversed(list(shapes)):
        samples = (samples - 1) * stride + kernel
    return samples


def first_line(error: BaseException) -> str:
    """What another library's error says, short enough for a message of ours; its name if it says nothing."""
    return next(iter(str(error).splitlines()), "")[:200] or type(error).__name__


def check_memory(size: int, place: str) -> None:
    """Refuse what a few bytes of a file ask for but no machine has.

    Args:
        size: Bytes that would be needed.
        place: Where that is asked for.

    Raises:
        InputError: It is more than half of the memory that there is for this process.
    """
    if size > _memory() // 2:
        raise InputError(f"{place}: would take {size / 2**30:,.1f} GiB, more than half of the memory there is.")


@cache
def _memory() -> int:
    try:
        import resource
    except ImportError:  # on Windows, where memory is not known
        return sys.maxsize
    sizes = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")]
    limit = resource.getrlimit(resource.RLIMIT_AS)[0]
    if limit != resource.RLIM_INFINITY:
        sizes.append(limit)
    with suppress(OSError, ValueError):  # ValueError: "max"
        sizes.append(int(Path("/sys/fs/cgroup/memory.max").read_text()))
    return min(sizes)


# --------------------------------------------------------------------------------------------------------------------
# What a field accepts


@dataclass(frozen=True)
class Accepts:
    """The values a field accepts among those of its type; ``text`` completes "an integer …" in the error message."""

    text: str
    test: Callable[[Any], bool]


@dataclass(frozen=True)
class Rule:
    """What the values of several fields must satisfy together; a problem is reported under the first of them."""

    fields: tuple[str, ...]
    test: Callable[..., bool]
    text: str


def _is_folder_name(name: str) -> bool:
    return name not in ("", ".", "..") and not any(c in name for c in "/\\\0") and len(name.encode()) <= 255


def _between(low: int, high: int) -> Accepts:
    """Sizes: without an upper bound, a slip of the keyboard would end in a lack of memory far from here."""
    return Accepts(f"of at least {low} and at most {high:,}", lambda n: low <= n <= high)


MAX_SAMPLES = 2**31 - 1
"""Samples of a recording or batch at most: 37 hours. Lengths are held in 32 bits."""

Positive = Annotated[int, Accepts("of at least 1", lambda n: n >= 1)]
NonNegative = Annotated[int, Accepts("of at least 0", lambda n: n >= 0)]
NonNegativeFloat = Annotated[float, Accepts("of at least 0", lambda x: x >= 0)]
PositiveFloat = Annotated[float, Accepts("above 0", lambda x: x > 0)]
Width = Annotated[int, _between(1, 2**16)]
Layers = Annotated[int, _between(1, 1000)]
Span = Annotated[int, _between(1, 1_000_000)]
Space = Annotated[int, _between(0, 1_000_000)]
SpanSpread = Annotated[float, Accepts("between 0 and 1,000,000", lambda x: 0 <= x <= 1_000_000)]
Samples = Annotated[int, _between(1, MAX_SAMPLES)]
Probability = Annotated[float, Accepts("between 0 and 1", lambda x: 0 <= x <= 1)]
Text = Annotated[str, Accepts("that is not empty", lambda s: bool(s) and "\0" not in s)]
FolderName = Annotated[str, Accepts("that can name one folder (no '/', '\\' or '..')", _is_folder_name)]


class _ProblemsError(InputError):
    """Everything that is wrong with one table, as (dotted key, text) pairs."""

    def __init__(self, problems: Iterable[tuple[str, str]], source: str = "") -> None:
        self.problems = list(problems)
        lines = [f"{key}: {text}" if key else text for key, text in self.problems]
        if len(lines) > 1:
            lines = [f"{len(lines)} problems", *(f"  {line}" for line in lines)]
        super().__init__((f"{source}: " if source else "") + "\n".join(lines))

    def under(self, key: str) -> list[tuple[str, str]]:
        """The problems with their keys seen from the enclosing table."""
        return [(f"{key}.{inner}" if inner else key, text) for inner, text in self.problems]


_MISSING = object()  # stands for a required key that the file lacks


@dataclass(frozen=True)
class _Settings:
    """Checks the fields of a dataclass when it is built: each by its annotation, then together by ``RULES``."""

    RULES: ClassVar[tuple[Rule, ...]] = ()

    def __post_init__(self) -> None:
        problems: list[tuple[str, str]] = []
        values: dict[str, Any] = {}
        for name, hint in _hints(type(self)).items():
            try:
                values[name] = _convert(getattr(self, name), hint)
            except _ProblemsError as error:
                problems += error.under(_show_key(name))
            else:
                object.__setattr__(self, name, values[name])
        for rule in self.RULES:
            if values.keys() >= set(rule.fields) and not rule.test(*(values[name] for name in rule.fields)):
                found = ", ".join(f"{name} = {_show(values[name])}" for name in rule.fields)
                problems.append((rule.fields[0], f"{rule.text} (found {found})"))
        if problems:
            raise _ProblemsError(problems, type(self).__name__)


# --------------------------------------------------------------------------------------------------------------------
# The settings


@dataclass(frozen=True)
class SlurmConfig(_Settings):
    """What to ask SLURM for. ``time`` is in minutes."""

    account: str
    nodes: Annotated[int, _between(1, 100_000)]
    gpus_per_node: Annotated[int, _between(1, 1000)]
    qos: Text | None = None
    time: Annotated[int, _between(1, 10_000_000)] | None = None
    cpus_per_task: Annotated[int, _between(1, 10_000)] | None = None
    mem_per_gpu: Text | None = None
    constraint: Text | None = None
    partition: Text | None = None


@dataclass(frozen=True)
class RunConfig(_Settings):
    """Where a run lives and how it logs, saves and restarts.

    ``save_interval <= 0`` writes no checkpoint, ``keep_latest <= 0`` keeps all of them. Relative paths start where the
    command was run. ``profile`` records two steps after step 1,005 on the first process. A codebook of which fewer
    than ``collapse_share`` of the codewords are in use for ``collapse_steps`` steps is warned of.
    """

    workdir: Text
    wandb_project: FolderName
    wandb_name: FolderName
    wandb_mode: Literal["online", "offline", "disabled"] = "offline"
    random_seed: NonNegative = 0
    use_deterministic: bool = False
    log_interval: Positive = 200
    save_interval: int = 2500
    init_ckpt: Text | None = None
    compile: bool = True
    keep_latest: int = -1
    model_type: ModelType = "dinosr"
    slurm_validation: SlurmConfig | None = None
    device: Literal["auto", "cuda", "mps", "cpu"] = "auto"
    profile: bool = False
    collapse_share: Probability = 0.1
    collapse_steps: Positive = 1000

    @property
    def dir(self) -> Path:
        """The run folder: ``workdir / wandb_project / wandb_name``."""
        return Path(self.workdir) / self.wandb_project / self.wandb_name


@dataclass(frozen=True)
class DataConfig(_Settings):
    """A manifest and how batches are made from it. Sizes and lengths are in samples.

    ``max_batch_length`` holds per process and micro-batch, ``global_batch_length`` per optimiser step over all
    processes: the number of accumulated micro-batches follows from it (None: no accumulation).
    """

    manifest: Text
    enable_padding: bool = False
    rand_crop: bool = True
    normalize: bool = True
    num_buckets: Annotated[int, _between(1, 1_000_000)] = 1000
    min_sample_size: Annotated[int, _between(0, MAX_SAMPLES)] = 2000
    max_sample_size: Samples = 320_000
    max_batch_length: Samples = 3_800_000
    drop_last: bool = False
    num_workers: Annotated[int, _between(0, 1000)] = 10
    pin_memory: bool = False
    prefetch_factor: Annotated[int, _between(1, 1000)] = 2
    persistent_workers: bool = True
    random_seed: NonNegative = 0
    bucket_method: Literal["uniform", "percentile"] = "uniform"
    alignments_path: Text | None = None
    global_batch_length: Annotated[int, _between(1, 10**10)] | None = None
    on_error: Literal["raise", "skip"] = "raise"

    RULES: ClassVar = (
        Rule(("min_sample_size", "max_sample_size"), lambda low, high: low <= high, "must not exceed max_sample_size"),
        Rule(("max_sample_size", "max_batch_length"), lambda one, sum_: one <= sum_, "must fit in max_batch_length"),
    )


@dataclass(frozen=True)
class OptimizerConfig(_Settings):
    """AdamW, its learning-rate schedule and the precision of the forward pass.

    ``exclude_from_optimizer`` and ``to_freeze`` are prefixes of parameter names.
    """

    lr: NonNegativeFloat = 5e-4
    betas: Annotated[tuple[float, float], Accepts("in [0, 1)", lambda betas: all(0 <= b < 1 for b in betas))] = (
        0.9,
        0.95,
    )
    weight_decay: NonNegativeFloat = 0.01
    eps: PositiveFloat = 1e-6
    max_norm: PositiveFloat = 10.0
    dtype: Literal["float32", "float16", "bfloat16"] = "bfloat16"
    init_lr_scale: NonNegativeFloat = 0.01
    final_lr_scale: NonNegativeFloat = 0.01
    max_steps: Positive = 400_000
    warmup_steps: NonNegative = 12_000
    hold_steps: NonNegative = 188_000
    decay_steps: NonNegative = 200_000
    rsqrt_timescale: Positive = 10_000
    rsqrt_shift: NonNegative = 0
    scheduler: Literal["tristage", "cosine", "rsqrt", "constant"] = "tristage"
    exclude_from_optimizer: list[Text] = field(default_factory=lambda: ["teacher"])
    to_freeze: list[Text] = field(default_factory=lambda: ["feature_extractor", "feature_projection"])

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


@dataclass(frozen=True)
class DinoSRConfig(_Settings):
    """The shape and schedules of DinoSR. The name fairseq gives a field is in brackets.

    ``ema_exclude_layers`` are prefixes of names inside the transformer. A codeword that has got no frame for
    ``codebook_revive_after`` steps takes half of a busy one's; 0: never.
    """

    extractor_mode: Literal["layer_norm", "group_norm"] = "layer_norm"  # [extractor_mode]
    extractor_conv_bias: bool = False  # [conv_bias]
    extractor_conv_layer_config: Annotated[
        list[tuple[Width, Width, Width]], Accepts("with 1 to 100 layers", lambda layers: 1 <= len(layers) <= 100)
    ] = field(default_factory=lambda: list(DEFAULT_CONV_LAYER_CONFIG))
    encoder_embed_dim: Width = 768  # [encoder_embed_dim]
    encoder_projection_dropout: Probability = 0.0  # [dropout_input]
    encoder_pos_conv_kernel: Width = 95  # [conv_pos]
    encoder_pos_conv_groups: Width = 16  # [conv_pos_groups]
    encoder_pos_conv_depth: Layers = 5  # [pos_conv_depth]
    encoder_num_layers: Layers = 12  # [encoder_layers]
    encoder_num_heads: Width = 12  # [encoder_attention_heads]
    encoder_attention_dropout: Probability = 0.1  # [attention_dropout]
    encoder_ff_interm_features: Annotated[int, _between(1, 2**20)] = 3072  # [encoder_ffn_embed_dim]
    encoder_ff_interm_dropout: Probability = 0.0  # [activation_dropout]
    encoder_dropout: Probability = 0.1  # [dropout]
    encoder_layer_norm_first: bool = False  # [layer_norm_first]
    encoder_layer_drop: Probability = 0.05  # [encoder_layerdrop]
    encoder_qkv_bias: bool = False  # always true in fairseq
    codebook_size: Annotated[int, _between(2, 2**20)] = 256  # [codebook_size]
    codebook_decay: NonNegativeFloat = 0.9  # [codebook_decay]
    num_codebooks: Layers = 8  # [average_top_k_layers]
    ema_start_decay: Probability = 0.999  # [ema_decay]
    ema_final_decay: Probability = 0.9999  # [ema_end_decay]
    ema_final_step: NonNegative = 30_000  # [ema_anneal_end_step]
    ema_exclude_layers: list[Text] = field(default_factory=lambda: ["pos_conv_embed"])
    freeze_step: NonNegative = 200_000  # [freeze_teacher_step]
    codebook_init: Literal["random", "data"] = "random"
    codebook_revive_after: NonNegative = 0

    RULES: ClassVar = (
        Rule(
            ("encoder_num_heads", "encoder_embed_dim"),
            lambda heads, width: width % heads == 0,
            "must divide encoder_embed_dim",
        ),
        Rule(
            ("encoder_pos_conv_groups", "encoder_embed_dim"),
            lambda groups, width: width % groups == 0,
            "must divide encoder_embed_dim",
        ),
        Rule(
            ("num_codebooks", "encoder_num_layers"),
            lambda codebooks, layers: codebooks <= layers,
            "must not exceed encoder_num_layers",
        ),
    )


@dataclass(frozen=True)
class SpidRConfig(DinoSRConfig):
    """DinoSR's settings with SpidR's exponential teacher schedule and no layer drop."""

    encoder_layer_drop: Probability = 0.0
    ema_timescale: Positive = 20_000
    ema_threshold: NonNegativeFloat = 1e-7


def _uniform_lengths_exist(selection: str, other: float, length: int) -> bool:
    return selection != "uniform" or other <= 2 * length


_UNIFORM_LENGTHS = "uniform draws lengths from the second value to twice the third, so the second must not exceed that"


@dataclass(frozen=True)
class MaskingConfig(_Settings):
    """Span masking of frames and of feature channels, with fairseq's names. Lengths are in frames or channels."""

    mask_prob: Annotated[float, Accepts("in (0, 1]", lambda p: 0 < p <= 1)] = 0.8
    mask_selection: MaskingStrategy = "static"
    mask_other: SpanSpread = 0.0
    mask_length: Span = 10
    no_mask_overlap: bool = False
    mask_min_space: Space = 1
    mask_channel_prob: Probability = 0.0
    mask_channel_selection: MaskingStrategy = "static"
    mask_channel_other: SpanSpread = 0.0
    mask_channel_length: Span = 10
    no_mask_channel_overlap: bool = False
    mask_channel_min_space: Space = 1

    RULES: ClassVar = (
        Rule(
            ("mask_selection", "mask_other", "mask_length"),
            _uniform_lengths_exist,
            _UNIFORM_LENGTHS,
        ),
        Rule(
            ("mask_channel_selection", "mask_channel_other", "mask_channel_length"),
            _uniform_lengths_exist,
            _UNIFORM_LENGTHS,
        ),
    )


@dataclass(frozen=True)
class ResumeConfig:
    """A checkpoint to validate and the file its results go to."""

    step: int
    checkpoint: str
    results: str


ValidationName = Annotated[FolderName, Accepts("other than 'train'", lambda name: name != "train")]


@dataclass(frozen=True)
class Config(_Settings):
    """A whole configuration file.

    ``validation`` maps the name of a validation set to its data. ``model_given`` says what the file's [model] table
    sets, None if it has none: the model of ``run.init_ckpt`` then holds. It is no setting itself; in a configuration
    built in Python, everything counts as given.
    """

    run: RunConfig
    data: DataConfig
    model: DinoSRConfig
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    masking: MaskingConfig = field(default_factory=MaskingConfig)
    validation: dict[ValidationName, DataConfig] = field(default_factory=dict)
    model_given: frozenset[str] | None = field(
        default=frozenset(f.name for f in dataclasses.fields(SpidRConfig)), compare=False, repr=False
    )

    RULES: ClassVar = (
        Rule(
            ("model", "run"),
            lambda model, run: isinstance(model, SpidRConfig) == (run.model_type == "spidr"),
            "must be a SpidRConfig for run.model_type 'spidr' and a DinoSRConfig for 'dinosr'",
        ),
    )


_MODEL_CONFIGS: dict[str, type[DinoSRConfig]] = {"spidr": SpidRConfig, "dinosr": DinoSRConfig}


# --------------------------------------------------------------------------------------------------------------------
# Reading and writing


def read_config(path: str | Path) -> Config:
    """Read and check a configuration file.

    Args:
        path: A JSON file if its name ends in ``.json``, else a TOML file. A run's ``config.json`` is one.

    Returns:
        The settings, with the defaults where the file is silent.

    Raises:
        InputError: The file cannot be read or parsed, or some of its keys or values are wrong: one message names the
            file and, for every problem, the key, what was found and what is accepted.
    """
    sections = {name: table for name, table in read_table(path).items() if table is not None}
    run, model_table = sections.get("run"), sections.get("model")
    model_type = run.get("model_type", "dinosr") if isinstance(run, dict) else None
    # With a wrong model_type, which is reported, SpidRConfig knows all the names there are.
    model_class = _MODEL_CONFIGS.get(model_type, SpidRConfig) if isinstance(model_type, str) else SpidRConfig
    problems: list[tuple[str, str]] = []
    try:
        model = _from_table(model_class, {} if model_table is None else model_table)
    except _ProblemsError as error:
        problems, model = error.under("model"), model_class()
    try:
        config = _from_table(Config, sections | {"model": model})
    except _ProblemsError as error:
        problems += error.problems
    if problems:
        raise _ProblemsError(problems, str(path))
    optimizer = config.optimizer
    if optimizer.max_steps < optimizer.warmup_steps:
        logger.warning(
            "%s: optimizer.max_steps = %d ends during the warm-up (optimizer.warmup_steps = %d)",
            path,
            optimizer.max_steps,
            optimizer.warmup_steps,
        )
    return dataclasses.replace(config, model_given=None if model_table is None else frozenset(model_table))


def to_dict(config: Config) -> dict[str, Any]:
    """All settings as JSON values; :func:`read_config` reads them back unchanged."""
    document: dict[str, Any] = dataclasses.asdict(config)
    del document["model_given"]
    as_json: dict[str, Any] = json.loads(json.dumps(document))  # tuples become lists
    return as_json


def model_config(model_type: str, table: Mapping[str, Any], *, source: str = "model") -> DinoSRConfig:
    """Check a [model] table on its own.

    Args:
        model_type: "spidr" or "dinosr".
        table: The settings that differ from the defaults.
        source: Where the table comes from, for the error message.

    Returns:
        A :class:`SpidRConfig` for "spidr", else a :class:`DinoSRConfig`.

    Raises:
        InputError: An unknown model type, or wrong keys or values.
    """
    if not isinstance(model_type, str) or model_type not in _MODEL_CONFIGS:
        raise InputError(f"{source}: model_type: found {_show(model_type)}, accepted: {_describe(ModelType)}")
    try:
        return _from_table(_MODEL_CONFIGS[model_type], table)
    except _ProblemsError as error:
        raise _ProblemsError(error.problems, source) from None


_MAX_BYTES = 2**20
_MAX_KEY_PARTS = 100


def read_table(path: str | Path) -> dict[str, Any]:
    """Parse a TOML file, or a JSON file if its name ends in ``.json``, without looking at what is in it.

    Raises:
        InputError: The file is missing, unreadable, not UTF-8, not valid, or names a key twice.
    """
    path = Path(path)
    kind = "JSON" if path.suffix.lower() == ".json" else "TOML"
    try:
        with path.open("rb") as file:
            raw = file.read(_MAX_BYTES + 1)
    except (OSError, ValueError) as error:  # ValueError: a NUL character in the path
        reason = error.strerror if isinstance(error, OSError) else error
        raise InputError(f"{path}: cannot read the file: {reason}") from None
    if len(raw) > _MAX_BYTES:
        raise InputError(f"{path}: larger than {_MAX_BYTES // 2**20} MiB, so no configuration")
    try:
        text = raw.decode("utf-8-sig")
        document = parse_json(text) if kind == "JSON" else _parse_toml(text)
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise InputError(f"{path}: not UTF-8 text (line {line}: byte 0x{raw[error.start]:02x})") from None
    except ValueError as error:  # also the parsers' own errors, which say the line
        raise InputError(f"{path}: not valid {kind}: {error}") from None
    if not isinstance(document, dict):
        raise InputError(f"{path}: found {_show(document)}, accepted: an object of sections")
    return document


def parse_json(text: str) -> Any:
    """Parse JSON that anybody may have written.

    Raises:
        ValueError: It is not valid, names a key twice, or is nested too deeply.
    """

    def table(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        result: dict[str, Any] = {}
        for key, value in pairs:
            if key in result:
                raise ValueError(f"duplicate key {_show_key(key)}")
            result[key] = value
        return result

    try:
        return json.loads(text, object_pairs_hook=table)
    except RecursionError:
        raise ValueError("nested too deeply") from None


def _parse_toml(text: str) -> dict[str, Any]:
    """As :func:`parse_json`."""
    for number, line in enumerate(text.split("\n"), start=1):
        # tomllib's time grows with the square of the parts of a key.
        if line.partition("=")[0].count(".") > _MAX_KEY_PARTS and not line.lstrip().startswith("#"):
            raise ValueError(f"nested too deeply (at line {number})")
    try:
        return tomllib.loads(text)
    except RecursionError:
        raise ValueError("nested too deeply") from None


S = TypeVar("S", bound=_Settings)


def _from_table(cls: type[S], table: Any) -> S:
    """Build a dataclass from a parsed table; the problems of all its keys are raised together."""
    if not isinstance(table, Mapping):
        raise _ProblemsError([("", f"found {_show(table)}, accepted: a table")])
    settings = {f.name: f for f in dataclasses.fields(cls) if f.compare}
    problems = [(_show_key(key), _unknown(cls, key, list(settings))) for key in table if key not in settings]
    required = (name for name, f in settings.items() if f.default is f.default_factory is dataclasses.MISSING)
    try:
        result = cls(**dict.fromkeys(required, _MISSING) | {key: table[key] for key in table if key in settings})
    except _ProblemsError as error:
        problems += error.problems
    if problems:
        raise _ProblemsError(problems)
    return result


def _unknown(cls: type, key: str, names: list[str]) -> str:
    if cls is DinoSRConfig and key in _hints(SpidRConfig):
        return "unknown key for run.model_type 'dinosr': it is a setting of 'spidr'"
    nearest = difflib.get_close_matches(key, names, n=1)
    return f"unknown key, did you mean {nearest[0]}?" if nearest else f"unknown key, accepted: {', '.join(names)}"


def _hints(cls: type) -> dict[str, Any]:
    """The annotation of each field that a file may set, as far as there are any."""
    hints = get_type_hints(cls, include_extras=True)
    return {f.name: hints[f.name] for f in dataclasses.fields(cls) if f.compare}


def _convert(value: Any, hint: Any) -> Any:
    """The value as its annotation wants it: integers as floats, lists as tuples, tables as dataclasses.

    Raises:
        _ProblemsError: It is none of the accepted values.
    """
    if value is _MISSING:
        raise _ProblemsError([("", f"missing, required: {_describe(hint)}")])
    if dataclasses.is_dataclass(hint):
        return value if isinstance(value, hint) else _from_table(hint, value)  # type: ignore[arg-type, type-var]
    if get_origin(hint) in (Union, types.UnionType):
        return None if value is None else _convert(value, get_args(hint)[0])
    if get_origin(hint) is dict and isinstance(value, Mapping):
        return _convert_values(value, *get_args(hint))
    try:
        return _convert_scalar_or_list(value, hint)
    except TypeError:
        raise _ProblemsError([("", f"found {_show(value)}, accepted: {_describe(hint)}")]) from None


def _convert_values(table: Mapping[str, Any], key_hint: Any, value_hint: Any) -> dict[str, Any]:
    problems: list[tuple[str, str]] = []
    result = {}
    for key, value in table.items():
        try:
            result[_convert(key, key_hint)] = _convert(value, value_hint)
        except _ProblemsError as error:
            problems += error.under(_show_key(key))
    if problems:
        raise _ProblemsError(problems)
    return result


def _convert_scalar_or_list(value: Any, hint: Any) -> Any:
    """As :func:`_convert`, but raises TypeError."""
    origin, arguments = get_origin(hint), get_args(hint)
    if origin is Annotated:
        converted = _convert_scalar_or_list(value, arguments[0])
        if all(accepts.test(converted) for accepts in arguments[1:]):
            return converted
    elif origin is Literal:
        if isinstance(value, str) and value in arguments:
            return value
    elif origin is list and isinstance(value, (list, tuple)):
        return [_convert_scalar_or_list(item, arguments[0]) for item in value]
    elif origin is tuple and isinstance(value, (list, tuple)) and len(value) == len(arguments):
        return tuple(map(_convert_scalar_or_list, value, arguments))
    elif isinstance(value, bool):  # a bool is an int in Python, but not in a file
        if hint is bool:
            return value
    elif hint is int and isinstance(value, int) and abs(value) < 2**63:
        return value
    elif hint is float and isinstance(value, (int, float)) and abs(value) < 2**1023 and math.isfinite(value):
        return float(value)
    elif hint is str and isinstance(value, str) and not any("\ud800" <= c <= "\udfff" for c in value):
        return value
    raise TypeError


_NAMES = {bool: "true or false", int: "an integer", float: "a finite number", str: "a string"}


def _describe(hint: Any) -> str:
    """What an annotation accepts, in words."""
    origin, arguments = get_origin(hint), get_args(hint)
    if origin is Annotated:
        return " ".join([_describe(arguments[0]), *(accepts.text for accepts in arguments[1:])])
    if origin is Literal:
        *names, last = map(_show, arguments)
        return f"{', '.join(names)} or {last}"
    if origin is list:
        return f"a list, each {_describe(arguments[0])}"
    if origin is tuple:
        return f"a list of {len(arguments)}, each {_describe(arguments[0])}"
    if origin in (Union, types.UnionType):
        return _describe(arguments[0])
    return _NAMES.get(hint, "a table")


class _Short(reprlib.Repr):
    def repr_int(self, x: int, level: int) -> str:
        # Python does not write more than 4,300 decimal digits, which a file may give as hexadecimal ones.
        return super().repr_int(x, level) if x.bit_length() < 10_000 else f"{hex(x)[:40]}..."


_short = _Short()
_short.maxstring = _short.maxother = _short.maxlong = 80


def _show(value: Any) -> str:
    """A value as the user wrote it, more or less, cut to a readable length."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, dict):
        return f"a table of {len(value)} keys"
    return _short.repr(value)


def _show_key(key: str) -> str:
    return key if key.replace("-", "_").isidentifier() and len(key) < 80 else _short.repr(key)
