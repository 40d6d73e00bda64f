"""Models by name: published ones, those on the Hugging Face hub or any web server, and files."""

import difflib
import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from spidr.config import DinoSRConfig, SpidRConfig, model_config
from spidr.models import weights as files
from spidr.models.dinosr import DinoSR
from spidr.models.encoder import Encoder
from spidr.models.fairseq import load_fairseq_weights
from spidr.models.published import PUBLISHED, Published
from spidr.models.spidr import SpidR
from spidr.models.weights import fitting, load_into, of_type, read_weights, type_needed, type_of
from spidr.tools.download import Remote, is_remote
from spidr.tools.errors import InputError
from spidr.tools.files import check_file, expand

logger = logging.getLogger(__name__)

Weights = dict[str, Tensor]


def build_model(
    checkpoint: str | Path | None = None, *, cfg: DinoSRConfig | None = None, model_type: str | None = None
) -> DinoSR:
    """Build a model, new or trained.

    Args:
        checkpoint: What to load: the name of a published model (``python -m spidr.models`` lists them), a file (see
            :func:`spidr.models.weights.read_weights`), a folder that ``spidr.export transformers`` or
            ``save_pretrained`` has written, ``hf:OWNER/NAME/FILE`` or ``https://…``. None: a new model. Without
            weights of a teacher, as after an export, the model has none.
        cfg: The model's configuration, unless one is recorded: in ``config.json`` beside the checkpoint (a run's whole
            configuration or its model table alone) or in the header of a safetensors file. None: the defaults.
        model_type: "spidr" or "dinosr". None: the type of the configuration.

    Returns:
        The model, on the CPU and in training mode, like every new module.

    Raises:
        InputError: The model type is unknown or contradicts the configuration, or a file does not fit the model.
    """
    if checkpoint is None:
        cfg = cfg or model_config(type_needed(model_type, None), {})
        if model_type not in (None, type_of(cfg)):
            raise InputError(f"model_type is {model_type!r}, but the configuration is of a {type_of(cfg)!r} model")
        return _new(cfg)
    check_name(checkpoint)
    recorded = recorded_config(checkpoint, model_type)
    if recorded is not None and cfg is not None and recorded != cfg:
        logger.warning("%s: built as its config.json says, which is not the configuration given", checkpoint)
    elif recorded is None and cfg is None:
        cfg = model_config(type_needed(model_type, checkpoint), {})
        logger.warning("%s: no config.json beside it, so the default model of its type is built", checkpoint)
    cfg = recorded or cfg
    assert cfg is not None
    weights = load_weights(checkpoint)
    try:
        model = _empty(cfg)
    except InputError as error:  # too large
        raise InputError(f"{checkpoint}: {error}") from None
    if not any(name.startswith("teacher.") for name in weights):
        model.drop_teacher()
    load_into(model, weights, checkpoint)
    if published := PUBLISHED.get(str(checkpoint)):
        model.best_layer = published.best_layer
    return model


def load_encoder(model: str | Path, model_type: str | None = None) -> DinoSR:
    """Load a trained model for inference: on the CPU, in eval mode and without its teacher.

    Args:
        model: As ``checkpoint`` of :func:`build_model`.
        model_type: "spidr" or "dinosr"; needed only if no configuration is recorded.

    Raises:
        InputError: There is no such model or file, or it does not fit.
    """
    return build_model(model, model_type=model_type).drop_teacher().eval()


def recorded_config(model: str | Path, model_type: str | None = None) -> DinoSRConfig | None:
    """Read the configuration of a trained model, without its weights; None if nothing is recorded.

    Args:
        model: As ``checkpoint`` of :func:`build_model`.
        model_type: What the model must be; needed if the record does not say.

    Raises:
        InputError: There is no such model, or its record is wrong or names another type.
    """
    if published := PUBLISHED.get(str(model)):
        return of_type(published.cfg, model_type, model)
    if not is_remote(str(model)):
        return files.recorded_config(_local(model), model_type)
    remote = Remote(str(model))
    if remote.cached() is None:
        remote.fetch(read_weights)
    return files.recorded_config(remote.cached() or remote.path, model_type)


def load_weights(model: str | Path) -> Weights:
    """Read the weights of a trained model: name → tensor on the CPU, as saved.

    Args:
        model: As ``checkpoint`` of :func:`build_model`.

    Raises:
        InputError: There is no such model, or its file is truncated, damaged or no checkpoint.
    """
    if published := PUBLISHED.get(str(model)):
        return _load_published(published)
    if is_remote(str(model)):
        return Remote(str(model)).fetch(read_weights)
    check_name(model)
    return read_weights(_local(model))


def check_name(model: str | Path | Encoder) -> None:
    """Check that :func:`load_encoder` could load a model, before anything that takes long.

    Raises:
        InputError: There is no such file or published model.
    """
    if isinstance(model, Encoder) or str(model) in PUBLISHED or is_remote(str(model)):
        return
    path = _local(model)
    if not path.suffix and not os.path.exists(path):  # noqa: PTH110
        nearest = difflib.get_close_matches(str(model), PUBLISHED, n=1)
        advice = f"did you mean {nearest[0]}?" if nearest else "python -m spidr.models lists those"
        problem = f"{model}: neither a file nor a published model; {advice}"
        raise InputError(problem, guide="units.md#which-model-which-layer")
    check_file(path)


def _local(model: str | Path) -> Path:
    """The path of a model on this machine; for an exported folder, that of its weights."""
    path = expand(model)
    # os.path.isfile is False for all that cannot be a file, such as a name that is too long.
    return path / "model.safetensors" if os.path.isfile(path / "model.safetensors") else path  # noqa: PTH113


def _new(cfg: DinoSRConfig) -> DinoSR:
    return SpidR(cfg) if isinstance(cfg, SpidRConfig) else DinoSR(cfg)


class _Undrawn(TorchFunctionMode):
    """Skips the drawing of first weights, which takes seconds, where others are about to be loaded."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if getattr(func, "__name__", "").endswith(("uniform_", "normal_")):
            return args[0] if args else kwargs["tensor"]
        return func(*args, **kwargs)


def _empty(cfg: DinoSRConfig) -> DinoSR:
    """A model on the CPU, in float32, with no weights yet. The caller's random generator is left alone."""
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)
    try:
        with torch.random.fork_rng(devices=[]), torch.device("cpu"), _Undrawn():
            return _new(cfg)
    finally:
        torch.set_default_dtype(default)


def _load_published(published: Published, check_hash: bool = False, progress: bool = True) -> Weights:
    """Weights of a published model, downloaded unless they are in the cache and fit."""
    model, read = _empty(published.cfg), load_fairseq_weights if published.fairseq else read_weights
    remote = Remote(published.file, published.saved_as or published.file.rpartition("/")[2])
    return remote.fetch(lambda path: fitting(model, read(path), path), check_hash=check_hash, progress=progress)


def _entry_point(published: Published) -> Callable[..., DinoSR]:
    def load(pretrained: bool = True, check_hash: bool = False, progress: bool = True) -> DinoSR:
        if pretrained:
            model = _empty(published.cfg)
            load_into(model, _load_published(published, check_hash, progress), published.name)
        else:
            model = _new(published.cfg)
        model.best_layer = published.best_layer
        return model.eval()

    load.__name__ = load.__qualname__ = published.name
    load.__doc__ = f"""{published.about}.

    Licence of the weights: {published.licence}. Cite {published.citation}. Best layer for units:
    {published.best_layer}.

    Args:
        pretrained: Load the weights, downloaded once to the folder of :func:`torch.hub.get_dir`; else the model is new.
        check_hash: As in :func:`torch.hub.load_state_dict_from_url`: compare a download with the hash in its file name,
            if there is one. It must be complete and have every weight in any case.
        progress: Show a progress bar on stderr while downloading.

    Returns:
        The model, on the CPU and in eval mode.

    Raises:
        InputError: The download failed, or is not this model. The message says where to put the file by hand.
    """
    return load


globals().update({name: _entry_point(model) for name, model in PUBLISHED.items()})


def __getattr__(name: str) -> Callable[..., DinoSR]:  # for type checkers: the functions above
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
