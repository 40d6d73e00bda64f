"""What surrounds training: logging, meters, metrics sinks and the profiler.

Each may import ``spidr.config`` and its siblings.
"""
