"""What surrounds training: logging, meters, metrics sinks and the profiler."""
