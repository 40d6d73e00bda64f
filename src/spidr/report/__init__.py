"""``python -m spidr.report RUN``: a run on one page."""

from typing import TYPE_CHECKING

from spidr.tools.lazy import lazy_names

if TYPE_CHECKING:
    from spidr.report.contents import make_report as make_report
else:
    __getattr__, __all__ = lazy_names(__name__, contents="make_report")
