"""Detect collapsing codebooks."""

import logging
from collections.abc import Sequence

logger = logging.getLogger(__name__)


class CollapseWatch:
    """Warns, once per codebook until it recovers, that only few of its codewords are in use.

    A codebook of ``size`` codewords is narrow in a step if a share of less than ``share`` of them gets a frame (if
    there are fewer frames than codewords, a share of the frames). ``steps`` narrow steps in a row are a collapse.
    """

    def __init__(self, share: float, steps: int, size: int) -> None:
        self.share, self.steps, self.size = share, steps, size
        self._narrow: dict[str, int] = {}

    def step(self, step: int, layers: Sequence[str], active: Sequence[float], frames: float) -> None:
        """Check a step of ``frames`` masked frames, given how many codewords of each layer's codebook got one."""
        least = self.share * min(self.size, frames)
        for layer, count in zip(layers, active, strict=True):
            self._narrow[layer] = self._narrow.get(layer, 0) + 1 if count < least else 0
            if self._narrow[layer] == self.steps:
                logger.warning(
                    "step %d: the codebook of layer %s has used less than %g %% of its %d codewords for %d steps (now "
                    "%d): it is collapsing. Try a slower teacher (ema_start_decay closer to 1), a lower optimizer.lr "
                    'or a longer warm-up, model.codebook_init = "data", or model.codebook_revive_after = %d',
                    step, layer.removeprefix("l"), 100 * self.share, self.size, self.steps, count, self.steps,
                )  # fmt: skip
