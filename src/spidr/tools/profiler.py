"""A trace of training steps for VizTracer's viewer."""

import logging
from pathlib import Path
from typing import Any

from spidr.tools.lazy import needs_extra

logger = logging.getLogger(__name__)

FIRST_STEP = 1_005


class StepProfiler:
    """Records a few training steps; call it before every step.

    ``count`` of them, after step ``first`` (None: 1,005), go to ``path``, an HTML or JSON file; None: nothing is
    recorded. Raises InputError if VizTracer is not installed.
    """

    def __init__(self, path: Path | None, *, first: int | None = None, count: int = 2) -> None:
        self.path, self.first, self.count = path, FIRST_STEP if first is None else first, count
        self._tracer: Any = None
        if path is not None:  # import now: a missing package should not stop the run midway
            with needs_extra("train"):
                from viztracer import VizTracer

                self._tracer_class = VizTracer

    def __call__(self, step: int) -> None:
        """Start or stop recording, given the number of steps done."""
        if step == self.first and self.path is not None:
            self._tracer = self._tracer_class(output_file=str(self.path), verbose=0, log_torch=True)
            self._tracer.start()
        elif step == self.first + self.count:
            self.stop()

    def stop(self) -> None:
        """Write what has been recorded, if anything."""
        if self._tracer is not None:
            self._tracer.stop()
            self._tracer.save()
            self._tracer = None
            logger.info("wrote the profile to %s", self.path)
