"""What surrounds training: logging, meters, metrics sinks and the profiler.

Each may import ``spidr.config``, ``spidr.lazy`` and its siblings.
"""
