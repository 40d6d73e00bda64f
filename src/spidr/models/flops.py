"""Floating-point operations of the models' matrix products and convolutions, and what GPUs can do.

Everything else (norms, GELU, softmax, the optimiser) is left out, as is what is computed twice to save memory: divided
by time and peak, this is the model FLOPs utilisation (MFU) of the PaLM paper (arXiv 2204.02311, appendix B).
"""

import re

from spidr.config import DinoSRConfig
from spidr.tools.frames import conv_length


def _both(peak: float, float32: float | None = None) -> dict[str, float]:
    """As fast in bfloat16 as in float16."""
    return {"bfloat16": peak, "float16": peak} | ({} if float32 is None else {"float32": float32})


PEAK_TFLOPS: dict[str, dict[str, float]] = {
    "GB200": _both(2500.0),  # GB200 NVL72 data sheet
    "B200": _both(2250.0),  # HGX B200 data sheet
    "H200 NVL": _both(835.5, 60.0),  # H200 data sheet
    "H200": _both(989.4, 66.9),  # the same
    "GH200": _both(989.4, 66.9),  # GH200 data sheet
    "H100 PCIe": _both(756.0, 51.0),  # H100 data sheet
    "H100 NVL": _both(835.5, 60.0),  # the same
    "H100": _both(989.4, 66.9),  # the same, and Hopper white paper
    "A100": _both(312.0, 19.5),  # A100 data sheet
    "L40S": _both(362.05, 91.6),  # L40S data sheet
    "RTX 5090": _both(209.5, 104.8),  # RTX Blackwell white paper
    "RTX 4090": _both(165.2, 82.6),  # Ada white paper
    "RTX 3090 Ti": _both(80.0, 40.0),  # the same
    "RTX 3090": _both(71.0, 35.6),  # GA102 white paper
    "RTX 6000 Ada": _both(364.2, 91.1),  # RTX 6000 Ada data sheet
    "RTX A6000": _both(154.8, 38.7),  # RTX A6000 data sheet
    "MI300X": _both(1307.4, 163.4),  # MI300X data sheet
    "MI300A": _both(980.6, 122.6),  # MI300A data sheet
    "V100-PCIE": {"float16": 112.0, "float32": 14.0},  # V100 data sheet
    "V100": {"float16": 125.0, "float32": 15.7},  # the same
}
"""Dense TFLOP/s by a part of the name that PyTorch gives the device; the first that fits counts.

NVIDIA's and AMD's figures without sparsity: half of what a data sheet states with it. float32 is without TF32, 16 bits
are with float32 accumulation, as in PyTorch (GeForce cards reach half of their float16 figure). Uncertain figures are
left out.
"""


def peak_tflops(device_name: str, dtype: str) -> float | None:
    """Peak of a GPU, None if it is not in the table."""
    if "Laptop" in device_name:  # slower, under the same name
        return None
    for name, peaks in PEAK_TFLOPS.items():
        if re.search(rf"\b{name}\b", device_name):  # an RTX A1000 is no A100
            return peaks.get(dtype)
    return None


def extractor_flops(cfg: DinoSRConfig, num_samples: int) -> list[float]:
    """Of each convolution, for one waveform."""
    flops, channels = [], 1
    for i, (width, kernel, _) in enumerate(cfg.extractor_conv_layer_config, start=1):
        frames = conv_length(cfg.extractor_conv_layer_config[:i], num_samples)
        flops.append(2.0 * channels * kernel * width * frames)
        channels = width
    return flops


def transformer_flops(cfg: DinoSRConfig, num_frames: int) -> float:
    """Of the positional convolutions and the layers, for one utterance."""
    dim, depth = cfg.encoder_embed_dim, cfg.encoder_pos_conv_depth
    kernel = max(3, cfg.encoder_pos_conv_kernel // depth)
    positional = 2.0 * depth * kernel * dim * dim / cfg.encoder_pos_conv_groups
    linear = 2.0 * dim * (4 * dim + 2 * cfg.encoder_ff_interm_features)
    attention = 4.0 * num_frames * dim
    return num_frames * (positional + cfg.encoder_num_layers * (linear + attention))


def step_flops(
    cfg: DinoSRConfig,
    num_samples: int,
    num_masked: int,
    *,
    frozen: bool = False,
    has_frames: bool = False,
    has_labels: bool = False,
) -> float:
    """Of one utterance in a training step: 56 GFLOP a second in the base model.

    Forward and backward (twice the forward) of what is trained, the teacher's forward, the heads and the distances of
    targets and codewords.

    Args:
        cfg: The model.
        num_samples: Samples of the waveform, padding included.
        num_masked: Its masked frames.
        frozen: Whether the extractor and the projection are.
        has_frames: Whether the extractor's output is at hand (``data.cache``).
        has_labels: Whether the teacher's labels are.
    """
    frames = conv_length(cfg.extractor_conv_layer_config, num_samples)
    first, *others = [0.0] if has_frames else extractor_flops(cfg, num_samples)
    projection = 2.0 * cfg.extractor_conv_layer_config[-1][0] * cfg.encoder_embed_dim * frames
    inputs = first + sum(others) + projection
    # The waveform needs no gradient.
    inputs = inputs if frozen else 3 * inputs - first
    head = 2.0 * num_masked * cfg.encoder_embed_dim * cfg.codebook_size * cfg.num_codebooks
    student = transformer_flops(cfg, frames)
    return inputs + 3 * (student + head) + (0 if has_labels else student + head)
