"""Export a trained encoder: to safetensors, ONNX, or a folder that ``transformers`` loads.

Names are imported when they are first used. Needs the extra ``export``.
"""

from typing import TYPE_CHECKING

from spidr.tools.lazy import lazy_names

if TYPE_CHECKING:
    from spidr.export.onnx_file import export_onnx as export_onnx
    from spidr.export.safetensors_file import export_safetensors as export_safetensors
    from spidr.export.transformers_folder import export_transformers as export_transformers
else:
    __getattr__, __all__ = lazy_names(
        __name__,
        onnx_file="export_onnx",
        safetensors_file="export_safetensors",
        transformers_folder="export_transformers",
    )
