"""Configuration of SpidR and DinoSR for ``transformers``. Copied into exported folders."""

from __future__ import annotations

from typing import Any

from transformers import PretrainedConfig


class SpidREncoderConfig(PretrainedConfig):
    """The kind of model and its settings.

    Args:
        spidr_type: "spidr" or "dinosr".
        settings: The model's settings, as in spidr's configuration.
        spidr_version: The version of spidr that wrote the folder.
    """

    model_type = "spidr"

    def __init__(
        self,
        spidr_type: str = "spidr",
        settings: dict[str, Any] | None = None,
        spidr_version: str | None = None,
        **kwargs: Any,
    ) -> None:
        self.spidr_type = spidr_type
        self.settings = settings or {}
        self.spidr_version = spidr_version
        super().__init__(**kwargs)
