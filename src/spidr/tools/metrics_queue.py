"""``python -m spidr.tools.metrics_queue RUN``: see :mod:`spidr.validation_jobs`."""

import sys

from spidr.validation_jobs import collect_metrics, main, push_metrics

__all__ = ["collect_metrics", "main", "push_metrics"]

if __name__ == "__main__":
    sys.exit(main())
