"""Export an encoder as one safetensors file."""

from pathlib import Path

import spidr
from spidr.models import DinoSR
from spidr.models.weights import SAFETENSORS, to_safetensors
from spidr.tools.errors import InputError
from spidr.tools.files import atomic_write, expand


def export_safetensors(model: DinoSR, output: str | Path) -> None:
    """Write all weights but the teacher's, with the configuration in the header.

    :func:`spidr.models.build_model` and :func:`spidr.models.hub.load_encoder` read the file.

    Args:
        model: The model; it is not changed.
        output: The file; its name must end in ``.safetensors``.

    Raises:
        InputError: The name has another suffix, the file cannot be written, or safetensors is not installed.
    """
    output = expand(output)
    if output.suffix != SAFETENSORS:
        raise InputError(f"{output}: the name must end in {SAFETENSORS}")
    weights = {name: value for name, value in model.state_dict().items() if not name.startswith("teacher.")}
    with atomic_write(output) as file:
        file.write(to_safetensors(weights, model.cfg, spidr_version=spidr.__version__))
