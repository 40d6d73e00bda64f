"""Floating-point operations of the models' matrix products and convolutions, and what GPUs can do.

Everything else (norms, GELU, softmax, the optimiser) is left out, as is what is computed twice to save memory: divided
by time and peak, this is the model FLOPs utilisation (MFU) of the PaLM paper (arXiv 2204.02311, appendix B).
"""

from __future__ import annotations

from spidr.config import DinoSRConfig
from spidr.tools.frames import conv_length

_HOPPER = {"bfloat16": 989.4, "float16": 989.4, "float32": 66.9}

PEAK_TFLOPS: dict[str, dict[str, float]] = {
    "GB200": {"bfloat16": 2500.0, "float16": 2500.0, "float32": 80.0},
    "B200": {"bfloat16": 2250.0, "float16": 2250.0, "float32": 75.0},
    "H200": _HOPPER,
    "H100 PCIe": {"bfloat16": 756.0, "float16": 756.0, "float32": 51.0},
    "H100 NVL": {"bfloat16": 835.0, "float16": 835.0, "float32": 60.0},
    "H100": _HOPPER,
    "GH200": _HOPPER,
    "A100": {"bfloat16": 312.0, "float16": 312.0, "float32": 19.5},
    "L40S": {"bfloat16": 362.05, "float16": 362.05, "float32": 91.6},
    "RTX 5090": {"bfloat16": 209.5, "float16": 209.5, "float32": 104.8},
    "RTX 4090": {"bfloat16": 165.2, "float16": 165.2, "float32": 82.6},
    "RTX 3090 Ti": {"bfloat16": 80.0, "float16": 80.0, "float32": 40.0},
    "RTX 3090": {"bfloat16": 71.0, "float16": 71.0, "float32": 35.6},
    "RTX 6000 Ada": {"bfloat16": 364.2, "float16": 364.2, "float32": 91.1},
    "RTX A6000": {"bfloat16": 154.8, "float16": 154.8, "float32": 38.7},
    "MI300X": {"bfloat16": 1307.4, "float16": 1307.4, "float32": 163.4},
    "MI300A": {"bfloat16": 980.6, "float16": 980.6, "float32": 122.6},
    "V100-PCIE": {"float16": 112.0, "float32": 14.0},
    "V100": {"float16": 125.0, "float32": 15.7},
}
"""Dense TFLOP/s by a part of the name that PyTorch gives the device; the first that fits counts.

From NVIDIA's and AMD's data sheets and architecture white papers, without sparsity, float32 without TF32, 16 bits with
sums in float32 (as PyTorch multiplies; GeForce cards do half as many as with sums in float16).
"""


def peak_tflops(device_name: str, dtype: str) -> float | None:
    """Peak of a GPU, None if it is not in the table."""
    for name, peaks in PEAK_TFLOPS.items():
        if name in device_name:
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


def transformer_flops(cfg: DinoSRConfig, num_frames: int, num_layers: int | None = None) -> float:
    """Of the positional convolutions and the first layers (default all), for one utterance."""
    dim, depth = cfg.encoder_embed_dim, cfg.encoder_pos_conv_depth
    kernel = max(3, cfg.encoder_pos_conv_kernel // depth)
    positional = 2.0 * depth * kernel * dim * dim / cfg.encoder_pos_conv_groups
    linear = 2.0 * dim * (4 * dim + 2 * cfg.encoder_ff_interm_features)
    attention = 4.0 * num_frames * dim
    layers = cfg.encoder_num_layers if num_layers is None else num_layers
    return num_frames * (positional + layers * (linear + attention))


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
