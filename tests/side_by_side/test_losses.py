"""Training scripts written for the published package give the same losses here."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
GOLDEN = HERE.parent / "golden" / "published"


def train(python: str | Path, script: str, folder: Path, processes: int, *stops: int) -> list[dict[str, float]]:
    """Run a script up to each of some steps. Returns all lines of measurements."""
    folder.mkdir(exist_ok=True)
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    environment = {name: value for name, value in environment.items() if name not in ("RANK", "WORLD_SIZE")}
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    for stop in stops:
        command = [python, *(launcher if processes > 1 else []), HERE / f"{script}.py", folder, str(stop)]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr[-5000:]
    return [json.loads(line) for line in (folder / "losses.jsonl").read_text().splitlines()]


def check(lines: list[dict[str, float]], processes: int) -> None:
    expected = json.loads((GOLDEN / "losses.json").read_text())[str(processes)]
    assert len(lines) == len(expected) == 20
    for line, published in zip(lines, expected, strict=True):
        assert line == pytest.approx(published, rel=1e-4, abs=1e-6), line["step"]


@pytest.mark.parametrize(("script", "processes", "stop"), [("loop_with_masks", 1, 10), ("loop_with_indices", 2, 17)])
def test_losses_are_the_published_ones(script: str, processes: int, stop: int, tmp_path: Path) -> None:
    """Also when a second start resumes from the first one's checkpoint, before and after ``freeze_step``."""
    check(train(sys.executable, script, tmp_path / "run", processes, stop, 20), processes)
