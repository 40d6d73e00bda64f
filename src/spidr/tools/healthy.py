"""A healthy pretraining of the base model, from the published runs (arXiv 2512.20308)."""

from collections.abc import Sequence

import numpy as np

LOSS: dict[int, tuple[float, float]] = {
    0: (5.57, 5.57),
    2_500: (2.62, 2.89),
    5_000: (2.28, 2.51),
    10_000: (2.04, 2.19),
    20_000: (1.59, 1.75),
    400_000: (0.94, 1.41),
}
"""Step → the lowest and highest validation loss, on dev-clean and dev-other, mean over the codebooks."""

ACTIVE_CODEWORDS = (191, 223)
"""Of 256, lowest and highest of the codebooks; settled by step 2,500. The others stay dead."""

BASE = {"encoder_num_layers": 12, "encoder_embed_dim": 768, "num_codebooks": 8, "codebook_size": 256}
"""Settings that the published runs' models share."""

DECIDED = 2_500  # the step by which the active codewords are settled
MARGIN = 0.15  # tolerated deviation from the published range, as a share


def is_base(model: object) -> bool:
    """Whether a model has the relevant settings of SpidR's base model."""
    return hasattr(model, "ema_timescale") and all(getattr(model, name) == value for name, value in BASE.items())


def expected_loss(step: float) -> tuple[float, float]:
    """The lowest and highest validation loss of the published runs at a step, straight lines between those known."""
    low, high = zip(*LOSS.values(), strict=True)
    return float(np.interp(step, [*LOSS], low)), float(np.interp(step, [*LOSS], high))


def unlike_published(step: int, loss: float | None, active: Sequence[float] = ()) -> str:
    """Say how a run of the base model differs from the published ones at a step, if at all.

    ``loss`` is on a validation set; ``active`` are the active codewords of each codebook there, if counted.
    """
    said = []
    if loss is not None and step >= DECIDED:
        high = expected_loss(step)[1]
        if loss > (1 + MARGIN) * high:
            said.append(f"the validation loss is {loss:.2f}, in published runs at most {high:.2f} by then")
    if active and step >= DECIDED and min(active) < (1 - MARGIN) * ACTIVE_CODEWORDS[0]:
        said.append(f"a codebook uses {min(active):.0f} codewords, in published runs at least {ACTIVE_CODEWORDS[0]}")
    return "; ".join(said)
