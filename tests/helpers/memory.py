"""Memory of programs that a test starts."""

PEAK = """
from pathlib import Path

def peak():  # in kB; ru_maxrss begins at the peak of the process that started this one
    return int(Path("/proc/self/status").read_text().partition("VmHWM:")[2].split()[0])
"""
"""Source of a function, for the start of such a program."""
