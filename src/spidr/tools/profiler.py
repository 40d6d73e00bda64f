"""A trace of two training steps for VizTracer's viewer. Imports ``spidr.tools.lazy`` only."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from spidr.tools.lazy import needs_extra

logger = logging.getLogger(__name__)

FIRST_STEP = 1_005
NUM_STEPS = 2


class StepProfiler:
    """Records two steps after step 1,005 to ``trace.html``; call it before every step.

    Args:
        folder: The run folder.
        enabled: Without it, nothing is recorded.

    Raises:
        InputError: VizTracer is not installed.
    """

    def __init__(self, folder: Path, *, enabled: bool) -> None:
        self.path = folder / "trace.html"
        self.enabled = enabled
        self._tracer: Any = None
        if enabled:  # now: what is missing should not stop the run in the middle
            with needs_extra("train"):
                from viztracer import VizTracer

                self._tracer_class = VizTracer

    def __call__(self, step: int) -> None:
        """Start or stop recording, given the number of steps done."""
        if not self.enabled:
            return
        if step == FIRST_STEP:
            self._tracer = self._tracer_class(output_file=str(self.path), verbose=0, log_torch=True)
            self._tracer.start()
        elif step == FIRST_STEP + NUM_STEPS:
            self.stop()

    def stop(self) -> None:
        """Write what has been recorded, if anything."""
        if self._tracer is not None:
            self._tracer.stop()
            self._tracer.save()
            self._tracer = None
            logger.info("wrote the profile to %s", self.path)
