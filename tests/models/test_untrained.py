"""Untrained models on real speech."""

from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch

from spidr.config import MaskingConfig
from spidr.data.masks import MaskGenerator
from spidr.models import DinoSR, SpidR, standardise

AUDIO = Path(__file__).parents[2] / "examples/quickstart/audio"


@pytest.mark.parametrize(
    ("model_class", "loss", "perplexity"),
    [(SpidR, (5.52, 5.60), (250.0, 252.5)), (DinoSR, (5.62, 5.79), (212.0, 228.0))],
    ids=["spidr", "dinosr"],
)
def test_step_0(model_class: type[DinoSR], loss: tuple[float, float], perplexity: tuple[float, float]) -> None:
    """Published logs start at 5.574 and 250 to 252 (SpidR), 5.735 and 214 to 220 (DinoSR)."""
    samples = np.concatenate([soundfile.read(path, dtype="float32")[0] for path in sorted(AUDIO.glob("*.flac"))[:8]])
    waveforms = standardise(torch.from_numpy(samples[: 8 * 16_000]).unsqueeze(0))
    torch.manual_seed(0)
    model = model_class().train()
    padding = torch.zeros(1, model.feature_extractor.num_frames(waveforms.shape[1]), dtype=torch.bool)
    mask, _ = MaskGenerator(MaskingConfig())(padding, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        losses, outputs = model(waveforms, mask=mask)
    assert loss[0] < losses.mean() < loss[1]
    assert perplexity[0] < outputs["pred_ppl"] < perplexity[1]
