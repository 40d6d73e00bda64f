"""The benchmark runs; its numbers depend on the machine."""

import json
import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "speed.py"


def test_quick_run(tmp_path: Path) -> None:
    command = [sys.executable, str(SCRIPT), "--size", "tiny", "--repeat", "1", "--dtypes", "float32"]
    done = subprocess.run(
        [*command, "--json", str(tmp_path / "speed.json")], check=True, capture_output=True, text=True
    )
    lines = [line for line in done.stdout.splitlines() if line.startswith("|")]
    assert len(lines) == 7  # head, step, its share of the peak, features, units, memory
    times = json.loads((tmp_path / "speed.json").read_text())["times"]["float32"]
    assert list(times) == ["step", "features", "units", "memory"]
    assert all(values[0] > 0 for row in times.values() for values in row.values())
