"""The published models, in one table: functions, ``torch.hub`` entry points, help texts and docs come from it."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from spidr.config import DinoSRConfig, ModelType, model_config

_META = "https://dl.fbaipublicfiles.com/shared/devai/assets"
_ADAPT = f"{_META}/spidr-adapt/checkpoints"
_NON_COMMERCIAL = "CC BY-NC 4.0"


@dataclass(frozen=True)
class Published:
    """A model that anybody can load by its name.

    Attributes:
        name: What it is called here.
        model_type: "spidr" or "dinosr".
        about: What it is and what it was trained on, to complete "The model is …".
        file: Where its weights are: ``https://…`` or ``hf:OWNER/NAME/FILE``.
        licence: Of the weights.
        citation: The paper to cite.
        best_layer: The layer, counted from 1, whose units are the most phonetic.
        settings: Those that differ from the defaults of its type.
        fairseq: Whether the file is fairseq's.
        saved_as: Its name in torch.hub's folder, if not that of the file.
    """

    name: str
    model_type: ModelType
    about: str
    file: str
    licence: str
    citation: str
    best_layer: int
    settings: Mapping[str, Any] = field(default_factory=dict)
    fairseq: bool = False
    saved_as: str = ""

    @property
    def cfg(self) -> DinoSRConfig:
        """Its configuration."""
        return model_config(self.model_type, dict(self.settings))


def _adapted(name: str, method: str, folder: str, step: int) -> Published:
    about = f"SpidR-Adapt ({method}), trained on VoxPopuli in 19 languages"
    file, saved_as = f"{_ADAPT}/{folder}/step_{step}.pt", f"{name}.pt"
    return Published(name, "spidr", about, file, _NON_COMMERCIAL, "SpidR-Adapt", 6, saved_as=saved_as)


# fmt: off
_MODELS = (
    Published("spidr_base", "spidr", "SpidR base, trained on LibriSpeech (960 hours)",
              f"{_META}/models/spidr_base.pt", _NON_COMMERCIAL, "arXiv 2512.20308", 6),
    Published("dinosr_base_reproduced", "dinosr",
              "DinoSR base as reproduced by SpidR's authors, trained on LibriSpeech (960 hours)",
              f"{_META}/models/dinosr_base_reproduced.pt", _NON_COMMERCIAL, "arXiv 2512.20308", 5),
    Published("dinosr_base_original", "dinosr",
              "DinoSR base by its authors, trained on LibriSpeech (960 hours), converted from fairseq",
              "https://data.csail.mit.edu/placesaudio/dinosr/dinosr.ckpt", "its authors'", "arXiv 2305.10005", 5,
              settings={"encoder_qkv_bias": True}, fairseq=True),
    Published("spidr_vp20", "spidr", "SpidR base, trained on VoxPopuli in 20 languages",
              "hf:coml/spidr-vp20/final.pt", "see huggingface.co/coml/spidr-vp20", "arXiv 2603.18612", 6,
              saved_as="spidr_vp20.pt"),
    Published("spidr_mmsulab", "spidr", "SpidR base, trained on MMS-ulab",
              "hf:coml/spidr-mmsulab/final.pt", "see huggingface.co/coml/spidr-mmsulab", "arXiv 2603.18612", 5,
              saved_as="spidr_mmsulab.pt"),
    _adapted("spidr_adapt_multitask", "multi-task", "spidr_vp19lang", 400_000),
    _adapted("spidr_adapt_reptile", "Reptile", "spidr_reptile_vp19lang", 200_000),
    _adapted("spidr_adapt_foblo", "FOBLO", "spidr_foblo_vp19lang", 200_000),
    _adapted("spidr_adapt_sl_multitask", "supervised, multi-task", "spidr_sl_vp19lang", 400_000),
    _adapted("spidr_adapt_sl_reptile", "supervised, Reptile", "spidr_reptile_sl_vp19lang", 200_000),
    _adapted("spidr_adapt_sl_foblo", "supervised, FOBLO", "spidr_foblo_sl_vp19lang", 200_000),
)
# fmt: on

PUBLISHED: dict[str, Published] = {model.name: model for model in _MODELS}
