"""Published and saved weights: download, verify, convert and load them.

Of :mod:`spidr.models`, only this module and ``weights_file`` touch files. No code from a file is ever run: our own
checkpoints are read with ``weights_only=True``, fairseq's with an unpickler that knows tensors and containers and
nothing else.
"""

from __future__ import annotations

import difflib
import hashlib
import http.client
import logging
import os
import pickle
import re
import uuid
import zipfile
from collections import OrderedDict
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar
from urllib.parse import urlparse
from urllib.request import Request, urlopen

import torch
import torch.hub
from torch import Tensor, nn

from spidr.config import DinoSRConfig, SpidRConfig, model_config
from spidr.models import weights_file
from spidr.models.dinosr import DinoSR
from spidr.models.spidr import SpidR
from spidr.tools.errors import InputError, first_line
from spidr.tools.untrusted import read_table

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

logger = logging.getLogger(__name__)

SPIDR_BASE = "https://dl.fbaipublicfiles.com/shared/devai/assets/models/spidr_base.pt"
DINOSR_BASE_REPRODUCED = "https://dl.fbaipublicfiles.com/shared/devai/assets/models/dinosr_base_reproduced.pt"
DINOSR_BASE_ORIGINAL = "https://data.csail.mit.edu/placesaudio/dinosr/dinosr.ckpt"


# --------------------------------------------------------------------------------------------------------------------
# Published models


def spidr_base(pretrained: bool = True, check_hash: bool = False, progress: bool = True) -> SpidR:
    """SpidR base, pretrained on the 960 hours of LibriSpeech (arXiv 2512.20308). Weights: CC BY-NC 4.0.

    Args:
        pretrained: Load the weights, downloaded once to the folder of :func:`torch.hub.get_dir`; else the model is new.
        check_hash: As in :func:`torch.hub.load_state_dict_from_url`: compare a download with the hash in its file name,
            if there is one. That it is complete and has every weight is checked in any case.
        progress: Show a progress bar on stderr while downloading.

    Returns:
        The model, on the CPU and in eval mode.

    Raises:
        InputError: The download failed, or what came is not this model. The message says where to put it by hand.
    """
    return _published(SpidR, SpidRConfig(), SPIDR_BASE, load_weights, pretrained, check_hash, progress)


def dinosr_base_reproduced(pretrained: bool = True, check_hash: bool = False, progress: bool = True) -> DinoSR:
    """DinoSR base as reproduced by the authors of SpidR on LibriSpeech; everything else as :func:`spidr_base`."""
    return _published(DinoSR, DinoSRConfig(), DINOSR_BASE_REPRODUCED, load_weights, pretrained, check_hash, progress)


def dinosr_base_original(pretrained: bool = True, check_hash: bool = False, progress: bool = True) -> DinoSR:
    """DinoSR base by its authors (arXiv 2305.10005), converted from fairseq; everything else as :func:`spidr_base`."""
    cfg = DinoSRConfig(encoder_qkv_bias=True)
    return _published(DinoSR, cfg, DINOSR_BASE_ORIGINAL, load_fairseq_weights, pretrained, check_hash, progress)


PUBLISHED: dict[str, Callable[[], DinoSR]] = {
    "spidr_base": spidr_base,
    "dinosr_base_reproduced": dinosr_base_reproduced,
    "dinosr_base_original": dinosr_base_original,
}


def build_model(
    *,
    cfg: DinoSRConfig | None = None,
    model_type: str | None = None,
    checkpoint: str | Path | None = None,
) -> DinoSR:
    """Build a model, new or from a checkpoint.

    Args:
        cfg: The model's configuration. None: the one in ``config.json`` in the checkpoint's folder (a run's whole
            configuration or its model table alone) or in the header of a safetensors file, else the defaults.
        model_type: "spidr" or "dinosr". None: the type that the configuration tells.
        checkpoint: A file with the weights under ``"model"``, or ``.safetensors`` as ``spidr.export`` writes it: the
            model then has no teacher.

    Returns:
        The model, on the CPU and in training mode, like every new module.

    Raises:
        InputError: The model type is unknown or contradicts the configuration, or a file does not fit.
    """
    if checkpoint is not None and not os.path.exists(checkpoint):  # noqa: PTH110
        raise InputError(f"{checkpoint}: cannot read the file: No such file or directory")
    if cfg is None:
        cfg = recorded_config(Path(checkpoint), model_type) if checkpoint is not None else None
        cfg = model_config(_required(model_type, checkpoint), {}) if cfg is None else cfg
    recorded_type = "spidr" if isinstance(cfg, SpidRConfig) else "dinosr"
    if model_type not in (None, recorded_type):
        raise InputError(f"model_type is {model_type!r}, but the configuration is of a {recorded_type!r} model")
    try:
        model = SpidR(cfg) if isinstance(cfg, SpidRConfig) else DinoSR(cfg)
    except InputError as error:  # too large
        raise InputError(f"{checkpoint}: {error}" if checkpoint is not None else str(error)) from None
    if checkpoint is not None:
        weights = load_weights(checkpoint)
        if _is_export(checkpoint):
            model.drop_teacher()
        load_into(model, weights, checkpoint)
    return model


def load_encoder(model: str | Path) -> DinoSR:
    """A trained model for inference: on the CPU, in eval mode and without its teacher.

    Args:
        model: The name of a published model, such as "spidr_base", or a checkpoint as :func:`build_model` reads it.

    Raises:
        InputError: There is no such model or file, or it does not fit.
    """
    check_name(model)
    published = PUBLISHED.get(str(model))
    loaded = build_model(checkpoint=model) if published is None else published()
    return loaded.drop_teacher().eval()


def check_name(model: str | Path | DinoSR) -> None:
    """Check that :func:`load_encoder` has something to load, before anything that takes long.

    Raises:
        InputError: It is neither a published model's name nor a file; a model itself is always right.
    """
    # os.path.isfile is False for all that cannot be a file, such as a name that is too long.
    if isinstance(model, DinoSR) or str(model) in PUBLISHED or os.path.isfile(model):  # noqa: PTH113
        return
    nearest = difflib.get_close_matches(str(model), PUBLISHED, n=1)
    advice = f"; did you mean {nearest[0]}?" if nearest else f" ({', '.join(PUBLISHED)})"
    raise InputError(f"{model}: neither a file nor a published model{advice}")


def _is_export(path: str | Path) -> bool:
    """Whether a file has the weights of an encoder without its teacher."""
    return Path(path).suffix == weights_file.SUFFIX


def recorded_config(checkpoint: Path, model_type: str | None = None) -> DinoSRConfig | None:
    """The model's configuration in ``config.json`` in the checkpoint's folder, with a warning None without one.

    A safetensors file that has it in its header needs no ``config.json``.

    Args:
        checkpoint: The checkpoint file; its weights are not read.
        model_type: What the model must be, needed if the file is a model table alone, which does not tell.

    Raises:
        InputError: The file is wrong, tells another model type or none.
    """
    if _is_export(checkpoint) and (cfg := weights_file.read_config(checkpoint)) is not None:
        return cfg
    path = checkpoint.parent / "config.json"
    if not path.exists():
        logger.warning("%s: no config.json beside it, so the default model of its type is built", checkpoint)
        return None
    document = read_table(path)
    if "run" not in document and "model" not in document:  # the bare model table
        return model_config(_required(model_type, path), document, source=str(path))
    run = document.get("run") or document
    recorded_type = run.get("model_type") if isinstance(run, dict) else None
    if recorded_type in ("spidr", "dinosr") and model_type not in (None, recorded_type):
        raise InputError(f"{path}: the model is of type {recorded_type!r}, asked for was {model_type!r}")
    return model_config(recorded_type or _required(model_type, path), document.get("model") or {}, source=str(path))


def _required(model_type: str | None, source: str | Path | None) -> str:
    if model_type is None:
        raise InputError(f"{f'{source}: ' if source else ''}model_type is needed: 'spidr' or 'dinosr'")
    return model_type


# --------------------------------------------------------------------------------------------------------------------
# Checkpoint files


def load_weights(path: str | Path) -> dict[str, Tensor]:
    """Read the weights of a checkpoint, whatever else it holds.

    Args:
        path: A ``torch.save`` dictionary with the weights under ``"model"``, their names with or without ``module.``,
            or a ``.safetensors`` file.

    Returns:
        Name → tensor on the CPU, as saved and in the order of the file.

    Raises:
        InputError: The file is missing, truncated, no checkpoint, or would need to run code to be read.
    """
    if _is_export(path):
        return _read(path, lambda: weights_file.read_weights(path))
    return _read(path, lambda: _weights_of(load_verified(path)))


def load_verified(path: str | Path) -> Any:
    """``torch.load`` on the CPU, without code and with the checksums, which torch writes but does not verify.

    Raises:
        Exception: Any, as from ``torch.load``, if the file is damaged.
    """
    if zipfile.is_zipfile(path):
        with open_archive(path) as archive:
            if damaged := archive.testzip():
                raise ValueError(f"the checksum of {damaged} is wrong")
    return torch.load(path, map_location="cpu", weights_only=True)


def open_archive(path: str | Path) -> zipfile.ZipFile:
    """Open a zip file that cannot be larger unpacked than it is: neither torch nor numpy writes any other by itself.

    Raises:
        Exception: Any, as from ``zipfile``, if it is no such file.
    """
    archive = zipfile.ZipFile(path)
    entries = archive.infolist()
    stored = all(entry.compress_type == zipfile.ZIP_STORED for entry in entries)
    if not stored or sum(entry.file_size for entry in entries) > Path(path).stat().st_size:
        archive.close()
        raise ValueError("entries that are compressed or overlap")
    return archive


def _weights_of(document: Any) -> dict[str, Tensor]:
    weights = document.get("model") if isinstance(document, dict) else None
    if not isinstance(weights, dict):
        raise ValueError("expected a dictionary with the weights under 'model'")
    return _checked({str(name).removeprefix("module."): value for name, value in weights.items()})


def _checked(weights: dict[str, Any]) -> dict[str, Tensor]:
    for name, value in weights.items():
        if not isinstance(value, Tensor):
            raise ValueError(f"expected only tensors under 'model', found a {type(value).__name__} at {name}")
        if value.layout is not torch.strided or value.is_quantized or value.is_nested or value.is_meta:
            raise ValueError(f"expected only plain tensors under 'model', found another kind at {name}")
        if value.nbytes > value.untyped_storage().nbytes():
            raise ValueError(f"a tensor that is larger than its data at {name}")
    return weights


def load_into(model: nn.Module, weights: Mapping[str, Tensor], source: str | Path) -> None:
    """Copy weights into a model, all or none.

    Args:
        model: The model to change.
        weights: One tensor for each entry of ``model.state_dict()``, of the same shape.
        source: Where the weights come from, for the error message.

    Raises:
        InputError: Entries are missing, unknown or of another shape; the message names them.
    """
    expected = model.state_dict()
    problems = [
        *_few("missing", [name for name in expected if name not in weights]),
        *_few("unknown", [name for name in weights if name not in expected]),
        *_few(
            "of another shape",
            [
                f"{name} (found {tuple(weights[name].shape)}, expected {tuple(value.shape)})"
                for name, value in expected.items()
                if name in weights and weights[name].shape != value.shape
            ],
        ),
    ]
    if problems:
        raise InputError(f"{source}: not the weights of this {type(model).__name__}: {'; '.join(problems)}")
    model.load_state_dict(weights)


def _few(what: str, names: list[str], limit: int = 5) -> list[str]:
    rest = f" and {len(names) - limit} more" if len(names) > limit else ""
    return [f"{what}: {', '.join(names[:limit])}{rest}"] if names else []


def _read(path: str | Path, load: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
    """What ``load`` returns; a broken file can make it fail in any way, and each becomes an InputError."""
    try:
        return load()
    except InputError:
        raise
    except OSError as error:
        raise InputError(f"{path}: cannot read the file: {error.strerror or error}") from None
    except pickle.UnpicklingError as error:
        logger.debug("%s: %s", path, error)
        raise InputError(f"{path}: no checkpoint, or one that holds more than weights; it was not loaded") from None
    except Exception as error:
        logger.debug("%s", path, exc_info=True)
        raise InputError(f"{path}: damaged or no checkpoint ({first_line(error)})") from None


# --------------------------------------------------------------------------------------------------------------------
# fairseq's DinoSR

# Names in fairseq and ours; the first pattern that matches the whole name holds.
_TRANSFORMER_NAMES = (
    (r"pos_conv\.(\d+)\.0\.(.+)", r"pos_conv_embed.convs.\1.\2"),
    (r"(layers\.\d+)\.self_attn\.out_proj\.(.+)", r"\1.attention.proj.\2"),
    (r"(layers\.\d+)\.self_attn\.([qkv])_proj\.(.+)", r"\1.attention.\2.\3"),  # joined to qkv afterwards
    (r"(layers\.\d+)\.self_attn_layer_norm\.(.+)", r"\1.layer_norm.\2"),
    (r"(layers\.\d+)\.fc1\.(.+)", r"\1.feed_forward.intermediate_dense.\2"),
    (r"(layers\.\d+)\.fc2\.(.+)", r"\1.feed_forward.output_dense.\2"),
)
_MODEL_NAMES = (
    *((rf"encoder\.{theirs}", rf"student.{ours}") for theirs, ours in _TRANSFORMER_NAMES),
    (r"encoder\.(.+)", r"student.\1"),
    (r"mask_emb", r"mask_embedding"),
    (r"layer_norm\.(.+)", r"feature_projection.layer_norm.\1"),
    (r"post_extract_proj\.(.+)", r"feature_projection.projection.\1"),
    (r"feature_extractor\.conv_layers\.(\d+)\.0\.(.+)", r"feature_extractor.conv_layers.\1.conv.\2"),
    (r"feature_extractor\.conv_layers\.(\d+)\.2\.1\.(.+)", r"feature_extractor.conv_layers.\1.layer_norm.\2"),
    (r"heads\.(\d+)\.(.+)", r"heads.\1.0.\2"),
    (r"_codebook(\d+)", r"codebooks.\1.codebook"),
    (r"_codebook_cnts(\d+)", r"codebooks.\1.counts"),
)


def load_fairseq_weights(path: str | Path) -> dict[str, Tensor]:
    """Read the weights of a fairseq checkpoint of DinoSR under our names.

    Args:
        path: A file with the student, heads and codebooks under ``"model"``, the teacher under ``"model"]["_ema"``, and
            the number of steps in ``"last_optimizer_state"``. The configuration and metrics beside them are ignored.

    Returns:
        As :func:`load_weights`. A name that is not known is kept, so that :func:`load_into` reports it.

    Raises:
        InputError: The file is missing, truncated or no checkpoint of DinoSR.
    """
    return _read(path, lambda: _convert_fairseq(_unpickle_archive(path)))


def _convert_fairseq(document: Any) -> dict[str, Tensor]:
    weights = document.get("model") if isinstance(document, dict) else None
    teacher = weights.get("_ema") if isinstance(weights, dict) else None
    if not isinstance(weights, dict) or not isinstance(teacher, dict):
        raise ValueError("expected fairseq's DinoSR: weights under 'model', the teacher's in it under '_ema'")
    renamed = _checked(
        {_rename(name, _MODEL_NAMES): value for name, value in weights.items() if name != "_ema"}
        | {f"teacher.{_rename(name, _TRANSFORMER_NAMES)}": value for name, value in teacher.items()}
    )
    for name in [name for name in renamed if ".attention.q." in name]:
        parts = [name.replace(".attention.q.", f".attention.{letter}.") for letter in "qkv"]
        if all(part in renamed for part in parts):
            renamed[name.replace(".attention.q.", ".attention.qkv.")] = torch.cat([renamed.pop(part) for part in parts])
    return renamed | {"current_step": torch.tensor([_fairseq_step(document.get("last_optimizer_state"))])}


def _rename(name: Any, patterns: tuple[tuple[str, str], ...]) -> str:
    for pattern, replacement in patterns:
        if match := re.fullmatch(pattern, str(name)):
            return match.expand(replacement)
    return str(name)


def _fairseq_step(optimizer_state: Any) -> int:
    """The number of updates of the first parameter, 0 if the file does not tell."""
    for key in ("state", 0, "step"):
        optimizer_state = optimizer_state.get(key) if isinstance(optimizer_state, dict) else None
    return int(optimizer_state) if isinstance(optimizer_state, (int, float, Tensor)) else 0


class _Placeholder:
    """Stands for any object that is not a tensor or container, and takes whatever a pickle does to it."""

    def __new__(cls, *_: Any, **__: Any) -> _Placeholder:
        return super().__new__(cls)

    def __init__(self, *_: Any, **__: Any) -> None: ...

    def __call__(self, *_: Any, **__: Any) -> _Placeholder:
        return self

    def __setstate__(self, _: Any) -> None: ...

    def __setitem__(self, _: Any, __: Any) -> None: ...

    append = extend = add = __setstate__


_STORAGES = {
    "DoubleStorage": torch.float64,
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
}


def _rebuild_tensor(storage: Tensor, offset: int, size: tuple[int, ...], stride: tuple[int, ...], *_: Any) -> Tensor:
    return storage.as_strided(size, stride, offset)  # which checks the bounds


def _rebuild_parameter(data: Tensor, *_: Any) -> Tensor:
    return data


_KNOWN: dict[tuple[str, str], Any] = {
    ("collections", "OrderedDict"): OrderedDict,
    ("torch._utils", "_rebuild_tensor_v2"): _rebuild_tensor,
    ("torch._utils", "_rebuild_parameter"): _rebuild_parameter,
    **{("torch", name): dtype for name, dtype in _STORAGES.items()},
}


class _Unpickler(pickle._Unpickler):
    """Reads tensors from an archive of ``torch.save``; imports nothing, runs nothing but what is in ``_KNOWN``.

    It is the one in Python: the one in C takes gigabytes for a pickle of ten bytes that numbers an object with 2^32.
    """

    def __init__(self, archive: zipfile.ZipFile, folder: str) -> None:
        super().__init__(archive.open(f"{folder}/data.pkl"))
        self.archive, self.folder = archive, folder
        self.storages: dict[tuple[str, torch.dtype], Tensor] = {}

    def find_class(self, module: str, name: str, /) -> Any:
        return _KNOWN.get((module, name), _Placeholder)

    def persistent_load(self, key: Any, /) -> Tensor:
        _, dtype, name, *_ = key
        if (name, dtype) not in self.storages:
            content = bytearray(self.archive.read(f"{self.folder}/data/{name}"))
            self.storages[name, dtype] = (
                torch.frombuffer(content, dtype=dtype) if content else torch.empty(0, dtype=dtype)
            )
        return self.storages[name, dtype]


def _unpickle_archive(path: str | Path) -> Any:
    """The content of a ``torch.save`` file (its zip format) with placeholders for all unknown objects.

    torch.load has no such mode: it refuses unknown classes or imports them.
    """
    with open_archive(path) as archive:
        folder = next(name.removesuffix("/data.pkl") for name in archive.namelist() if name.endswith("/data.pkl"))
        return _Unpickler(archive, folder).load()


# --------------------------------------------------------------------------------------------------------------------
# Download

M = TypeVar("M", bound=DinoSR)


def _published(
    model_class: Callable[[Any], M],
    cfg: DinoSRConfig,
    url: str,
    read: Callable[[Path], dict[str, Tensor]],
    pretrained: bool,
    check_hash: bool,
    progress: bool,
) -> M:
    """The model, with the weights at the URL if pretrained. They enter torch.hub's cache only once they fit."""

    def load(path: Path) -> M:
        model = model_class(cfg)
        load_into(model, read(path), path)
        return model.eval()

    if not pretrained:
        return model_class(cfg).eval()
    cached = Path(torch.hub.get_dir()) / "checkpoints" / Path(urlparse(url).path).name
    if cached.exists():
        try:
            return load(cached)
        except InputError as error:
            logger.warning("%s; fetching it again", error)
    with _download(url, cached, check_hash, progress) as partial:
        return load(partial)


@contextmanager
def _download(url: str, path: Path, check_hash: bool, progress: bool) -> Iterator[Path]:
    """Download to a temporary file beside ``path``, renamed to it if the block succeeds and removed otherwise."""
    # A name of its own, so that several processes may download at once; the last one's file stays.
    partial = path.with_name(f"{path.name}.{uuid.uuid4().hex}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        digest = _fetch(url, partial, progress)
        expected = torch.hub.HASH_REGEX.search(path.name)
        if check_hash and expected and not digest.startswith(expected[1]):
            raise InputError(f"the SHA-256 is {digest}, expected {expected[1]}…")
        yield partial
        partial.replace(path)
    except (OSError, http.client.HTTPException, InputError) as error:
        reason = str(error).removeprefix(f"{partial}: ")  # which will not be there any more
        raise InputError(f"{url}: cannot download it to {path}, where it may be put by hand: {reason}") from error
    finally:
        with suppress(OSError):
            partial.unlink()


def _fetch(url: str, path: Path, progress: bool) -> str:
    """Download a file and return its SHA-256."""
    sha256, received = hashlib.sha256(), 0
    request = Request(url, headers={"User-Agent": "spidr"})
    with urlopen(request, timeout=60) as response, path.open("xb") as file:
        length = response.headers.get("Content-Length")
        total = int(length) if length else None
        # tqdm if it is installed, else torch.hub's own substitute
        with torch.hub.tqdm(total=total, disable=not progress, unit="B", unit_scale=True) as bar:  # type: ignore[attr-defined]
            while chunk := response.read(1 << 20):
                file.write(chunk)
                sha256.update(chunk)
                received += len(chunk)
                bar.update(len(chunk))
    # A connection that closes early just ends the stream.
    if total is not None and received != total:
        raise InputError(f"it stopped after {received:,} of {total:,} bytes; try again")
    return sha256.hexdigest()
