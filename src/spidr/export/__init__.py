"""A trained encoder for other software: safetensors, ONNX, or a folder that ``transformers`` loads.

May import ``spidr.config``, ``spidr.models`` and ``spidr.tools``. What the formats need is the extra ``export``.
"""

from spidr.export.onnx_file import export_onnx
from spidr.export.safetensors_file import export_safetensors
from spidr.export.transformers_folder import export_transformers

__all__ = ["export_onnx", "export_safetensors", "export_transformers"]
