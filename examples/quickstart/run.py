"""Train a small SpidR on the recorded prompts in this folder, on two CPU cores in at most ten minutes.

This writes manifests for training and validation to ``runs/quickstart`` and trains ``configs/quickstart.toml``. It ends
with a table: how well each codebook's units predict the phones, before and after training. Interrupt it at any time;
rerun it to resume.
"""

import argparse
import json
import os
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
OUTPUT = Path("runs/quickstart")

BEFORE = """\
This trains a small SpidR on {train} recorded prompts ({minutes:.0f} minutes of speech) and evaluates its units on
{valid} others, in three to ten minutes on two CPU cores. All output goes to {folder}.
"""
AFTER = """
PNMI is the share of the phones' information that the units carry, from 0 to 1. It should have risen in both layers.
The model is {model}. Next, in {here}:

  {python} -m spidr.extract units examples/quickstart/audio runs/units.jsonl --model {model} --layer 2
  {python} -m spidr.evaluate units runs/units.jsonl examples/quickstart/alignments.jsonl
  {python} -m spidr.report {run}

For your own recordings, copy configs/laptop.toml.
"""


def write_manifests() -> str:
    """Write the manifests of both sets. Returns the message to print before training."""
    import polars as pl

    from spidr.data import read_manifest
    from spidr.data.write_manifest import write_manifest

    OUTPUT.mkdir(parents=True, exist_ok=True)
    write_manifest(HERE / "audio", OUTPUT / "all.csv", ".flac")
    manifest = read_manifest(OUTPUT / "all.csv")
    prompts = [json.loads(line) for line in (HERE / "alignments.jsonl").read_text(encoding="utf-8").splitlines()]
    counts = {}
    for split in ("train", "valid"):
        fileids = [prompt["fileid"] for prompt in prompts if prompt["split"] == split]
        manifest.filter(pl.col("fileid").is_in(fileids)).write_csv(OUTPUT / f"{split}.csv")
        counts[split] = len(fileids)
    minutes = sum(prompt["duration"] for prompt in prompts if prompt["split"] == "train") / 60
    return BEFORE.format(**counts, minutes=minutes, folder=ROOT / "runs/quickstart")


def main() -> int:
    """Run the quick start. Returns the exit status."""
    from spidr.tools.threads import set_up_threads

    set_up_threads()  # before torch is loaded
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("settings", nargs="*", help="settings to change, such as optimizer.max_steps=100")
    settings = parser.parse_args().settings
    os.chdir(ROOT)  # the configuration's paths are relative to it

    from spidr.__main__ import main as train
    from spidr.config import read_config

    print(write_manifests(), flush=True)
    status = train(["configs/quickstart.toml", *settings])
    if status == 0:
        run = read_config("configs/quickstart.toml", settings).run.dir
        python = Path(sys.executable)
        python = python.relative_to(ROOT) if python.is_relative_to(ROOT) else python
        print(AFTER.format(run=run, model=run / "final.pt", here=ROOT, python=python))
    return status


if __name__ == "__main__":
    sys.exit(main())
