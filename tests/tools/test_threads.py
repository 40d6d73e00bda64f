"""Commands set variables for OpenMP; an import does not."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from spidr.tools import threads


def seen(command: list[str], folder: Path, **environ: str) -> str:
    """The variables that OpenMP would read when a process ends, or loads torch (a fake torch prints them)."""
    names = ("GOMP_SPINCOUNT", "KMP_BLOCKTIME", "OMP_WAIT_POLICY", *threads.CAPACITIES)
    show = f"import os; print('seen', [os.environ.get(name) for name in {names}])\n"
    folder.joinpath("torch.py").write_text(f"{show}os._exit(os.sys.stdout.flush() or 0)\n")
    folder.joinpath("sitecustomize.py").write_text(f"import atexit\natexit.register(lambda: exec({show!r}, {{}}))\n")
    clean = {name: value for name, value in os.environ.items() if name not in (*threads.CHOICES, *threads.CAPACITIES)}
    clean["PYTHONPATH"] = os.pathsep.join([str(folder), *sys.path])
    found = subprocess.run(
        [sys.executable, *command], env=clean | environ, capture_output=True, text=True, timeout=250, check=False
    )
    *_, last = (line for line in found.stdout.splitlines() if line.startswith("seen "))
    return last.removeprefix("seen ")


@pytest.mark.parametrize("module", ["spidr", "spidr.train", "spidr.extract", "spidr.evaluate", "spidr.warm_start"])
def test_commands_set_it_before_torch_is_loaded(module: str, tmp_path: Path) -> None:
    assert seen(["-m", module, "--help"], tmp_path) == "['1000', '1', None, '256', '256']"


def test_console_script(tmp_path: Path) -> None:
    script = "import sys; sys.argv = ['spidr', 'extract', '-h']; from spidr.__main__ import spidr; spidr()"
    assert seen(["-c", script], tmp_path) == "['1000', '1', None, '256', '256']"


def test_quick_start(tmp_path: Path) -> None:
    script = Path(__file__).parents[2] / "examples" / "quickstart" / "run.py"
    assert seen([str(script), "--help"], tmp_path) == "['1000', '1', None, '256', '256']"


def test_the_users_settings_are_kept(tmp_path: Path) -> None:
    found = seen(["-m", "spidr.train", "--help"], tmp_path, OMP_WAIT_POLICY="active", LRU_CACHE_CAPACITY="1024")
    assert found == "[None, None, 'active', '256', '1024']"


def test_an_import_changes_nothing(tmp_path: Path) -> None:
    tmp_path.joinpath("client.py").write_text("import spidr.models\nspidr.models.SpidR")
    assert seen(["-m", "client"], tmp_path) == seen(["-c", "import spidr; spidr.models"], tmp_path)
    assert seen(["-m", "client"], tmp_path) == "[None, None, None, None, None]"


@pytest.mark.parametrize(("text", "expected"), [("150000 100000\n", 2), ("50000 100000\n", 1), ("max 100000\n", None)])
def test_quota(text: str, expected: int | None, tmp_path: Path) -> None:
    assert threads.quota(tmp_path) is None
    tmp_path.joinpath("cpu.max").write_text(text)
    assert threads.quota(tmp_path) == expected


@pytest.mark.skipif(sys.platform != "linux", reason="glibc")
def test_freed_memory_is_kept() -> None:
    """Blocks of 40 MB, used and freed repeatedly: their pages are cleared once, not every time."""
    code = (
        "import ctypes, resource; from spidr.tools import threads; threads.keep_memory()\n"
        "ctypes.CDLL(None).prctl(41, 1, 0, 0, 0)\n"  # PR_SET_THP_DISABLE: huge pages would be few
        "for _ in range(20): bytearray(40_000_000)\n"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt)"
    )
    clean = {name: value for name, value in os.environ.items() if name not in threads.MALLOC_CHOICES}
    for chosen, kept in ({}, True), ({"MALLOC_TRIM_THRESHOLD_": "0"}, False):
        run = [sys.executable, "-c", code]
        found = subprocess.run(run, env=clean | chosen, capture_output=True, text=True, check=True)
        assert (int(found.stdout) < 5 * 40_000_000 // 4096) is kept
