"""``python -m spidr.report RUN``: what a run has done, on one page."""
