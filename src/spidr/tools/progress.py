"""Show progress: a bar on a terminal, a line a minute in a log file."""

import logging
import shutil
import sys
import time

from tqdm import tqdm

logger = logging.getLogger(__name__)

_BAR = "{desc}: {percentage:3.0f}%|{bar}| {n:.2f}/{total:.2f} {unit}, {elapsed} passed, {remaining} left{postfix}"


class Progress:
    """Shows the progress of some work; called with the amount done since the last call.

    ``scale`` is in units per amount of work; ``initial`` was done before. A ``total`` of 0 shows nothing.
    """

    def __init__(
        self, description: str, total: float, unit: str, scale: float = 1, *, initial: float = 0, shown: bool = True
    ) -> None:
        self._description, self._unit, self._scale = description, unit, scale
        self._digits = 0 if scale == 1 else 2
        self._total, self._done = total * scale, initial * scale
        self._start, self._initial = time.monotonic(), self._done
        self._last = self._start
        self._note = ""
        self._shown = shown and total > 0
        self._bar = None
        if self._shown and sys.stderr is not None and sys.stderr.isatty():
            self._bar = tqdm(
                total=self._total,
                initial=self._done,
                desc=description,
                unit=unit,
                bar_format=_BAR.replace(".2f", f".{self._digits}f"),
                ncols=shutil.get_terminal_size().columns,  # some terminals report none
                nrows=20,
            )

    def __call__(self, done: float, note: str = "") -> None:
        """Add work done, and show the latest ``note`` beside it."""
        self._done += done * self._scale
        self._note = note or self._note
        if self._bar is not None:
            if note:
                self._bar.set_postfix_str(note, refresh=False)
            self._bar.update(done * self._scale)
        elif self._shown and (now := time.monotonic()) - self._last >= 60 and self._done > self._initial:
            self._last = now
            left = (now - self._start) * (self._total - self._done) / (self._done - self._initial)
            share, total = 100 * self._done / self._total, f"{self._total:.{self._digits}f} {self._unit}"
            what = ", ".join(filter(None, (f"{tqdm.format_interval(max(0.0, left))} left", self._note)))
            logger.info("%s: %.0f%% of %s, %s", self._description, share, total, what)

    def close(self) -> None:
        """Close the bar and leave it visible."""
        if self._bar is not None:
            self._bar.close()
