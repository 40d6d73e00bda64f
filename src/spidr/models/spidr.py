"""SpidR: every head reads the student's layer that its codebook is built from, and the teacher slows down smoothly.

Source: Poli, Luthra, Benchekroun, Higuchi, Gleize, Shen, Algayres, Chung, Assran, Pino, Dupoux. SpidR: Learning Fast
and Stable Linguistic Units for Spoken Language Models Without Supervision. TMLR 2025 (arXiv 2512.20308).
"""

import math
from collections.abc import Callable
from functools import partial

from spidr.config import SpidRConfig
from spidr.models.dinosr import DinoSR


def exp_ema_scheduler(step: int, start_decay: float, timescale: float, threshold: float) -> float:
    """Teacher decay of SpidR after optimiser step ``step`` (counted from 1).

    Its distance to 1 shrinks exponentially from ``1 - start_decay``; at ``threshold`` and below, the decay is 1.
    """
    distance = (1 - start_decay) * math.exp(-step / timescale)
    return 1 - distance if distance > threshold else 1.0


class SpidR(DinoSR):
    """DinoSR, but head ``k`` reads the student's layer of codebook ``k``, and the teacher slows down smoothly.

    The heads read feed-forward outputs before the residual addition, so the student's last LayerNorm has no part in the
    loss: it needs no gradient and keeps its values.

    Args:
        cfg: Settings of the model; None: the base model.

    Example:
        >>> model = SpidR().eval()
        >>> units, frames = model.units(waveforms, lengths)  # (B, S) at 16 kHz -> (B, T), 50 a second
    """

    config_class = SpidRConfig
    best_layer = 6
    heads_read_layers = True
    cfg: SpidRConfig

    def __init__(self, cfg: SpidRConfig | None = None) -> None:
        super().__init__(cfg)
        student = self.student
        unused = student.layer_norm if self.cfg.encoder_layer_norm_first else student.layers[-1].final_layer_norm
        unused.requires_grad_(False)

    def _ema_scheduler(self) -> Callable[[int], float]:
        cfg = self.cfg
        return partial(
            exp_ema_scheduler, start_decay=cfg.ema_start_decay, timescale=cfg.ema_timescale, threshold=cfg.ema_threshold
        )
