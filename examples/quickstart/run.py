"""Train a small SpidR on the recorded prompts in this folder, on two CPU cores in at most ten minutes.

Writes two manifests, one for training and one for validation, to ``runs/quickstart`` and trains
``configs/quickstart.toml``. It ends with a table: for every codebook, how much its units say about the phones (PNMI),
before and after training.
"""

import json
import subprocess
import sys
from pathlib import Path

import polars as pl

from spidr.data import read_manifest

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
OUTPUT = ROOT / "runs" / "quickstart"


def run(*arguments: str) -> None:
    """Run a command of the package, as a user would, from the root of the repository."""
    print("+ python -m", *arguments, flush=True)
    result = subprocess.run([sys.executable, "-m", *arguments], cwd=ROOT, check=False)
    if result.returncode:
        sys.exit(result.returncode)


def main() -> None:
    """Run the quick start."""
    OUTPUT.mkdir(parents=True, exist_ok=True)
    run("spidr.data.write_manifest", str(HERE / "audio"), str(OUTPUT / "all.csv"), "--ext", ".flac")
    manifest = read_manifest(OUTPUT / "all.csv")
    prompts = [json.loads(line) for line in (HERE / "alignments.jsonl").read_text(encoding="utf-8").splitlines()]
    for split in ("train", "valid"):
        fileids = [prompt["fileid"] for prompt in prompts if prompt["split"] == split]
        manifest.filter(pl.col("fileid").is_in(fileids)).write_csv(OUTPUT / f"{split}.csv")
    run("spidr", "configs/quickstart.toml")


if __name__ == "__main__":
    main()
