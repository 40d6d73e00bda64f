"""``python -m spidr.report RUN``: what a run has done, on one page."""

from typing import TYPE_CHECKING

from spidr.tools.lazy import lazy_names

if TYPE_CHECKING:
    from spidr.report.contents import make_report
else:
    __getattr__ = lazy_names(__name__, {"make_report": "contents"})

__all__ = ["make_report"]
