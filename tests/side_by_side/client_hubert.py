"""What minimal-hubert builds from the blocks, loaders and tools of the installed spidr, run on a CPU.

    python client_hubert.py FOLDER OUTPUT.pt    # FOLDER: that of client_discophon.py

Features of a HuBERT with weights that depend on names and shapes only, three training steps, and a SLURM submission.
"""

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import polars as pl
import torch
from minimal_hubert.config import hubert_data_config
from minimal_hubert.data import build_dataloader_with_labels
from minimal_hubert.model import HuBERTPretrain
from setting import first_weights

from spidr.checkpoint import Checkpointer, find_checkpoints
from spidr.config import MaskingConfig
from spidr.environment import set_seed, setup_environment, setup_pytorch
from spidr.tools import AverageMeters, init_logger, profiler_context


def main(folder: Path, output: Path) -> None:
    work = output.with_suffix("")
    work.mkdir()
    init_logger()
    set_seed(0)
    setup_pytorch(use_deterministic=False)
    setup_environment()
    model = HuBERTPretrain(32)
    model.load_state_dict(dict(first_weights(model)))
    model.eval()
    lengths = torch.tensor([24_000, 17_000])
    x = torch.randn(2, 24_000, generator=torch.Generator().manual_seed(3))
    x[1, 17_000:] = 0
    frames = (lengths - 400) // 320 + 1
    mask = (torch.arange(int(frames.max())) < frames[:, None])[:, None, None]
    with torch.no_grad():
        alone = model.get_intermediate_outputs(x[:1], num_layers=9)
        padded = [layer[1, : frames[1]] for layer in model.get_intermediate_outputs(x, attention_mask=mask)]

    rows = []
    for name, samples in pl.read_csv(folder / "manifest" / "manifest-deu-train-10min.csv").iter_rows():
        path = str(folder / "audio" / "deu" / "train-10min" / f"{name}.wav")
        units = [(7 * i + len(name)) % 32 for i in range((samples - 400) // 320 + 1)]
        rows.append({"fileid": name, "path": path, "num_samples": samples, "units": units})
    pl.DataFrame(rows).write_ndjson(work / "labels.jsonl")
    cfg = replace(
        hubert_data_config(str(work / "labels.jsonl")), min_sample_size=2000, max_sample_size=20_000,
        max_batch_length=60_000, num_workers=1, num_buckets=2,
    )  # fmt: skip
    loader = build_dataloader_with_labels(cfg, MaskingConfig())
    optimizer = torch.optim.AdamW(model.train().parameters(), 1e-5)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)
    checkpointer = Checkpointer(work / "run", 2)
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    checkpointer.init_state(model=model, optimizer=optimizer, scheduler=scheduler, scaler=scaler)
    resumed, step, epoch = checkpointer.load_existing_run(), int(checkpointer.step), int(checkpointer.epoch)
    meters = AverageMeters(["loss", "feature_loss"], device=torch.device("cpu"))
    shapes = []
    with profiler_context(None) as profiler:
        while step < 3:
            epoch += 1
            loader.batch_sampler.set_epoch(epoch)
            for waveforms, labels, attention_mask, masked in loader:
                loss, outputs = model(waveforms, labels, mask=masked, attention_mask=attention_mask)
                loss = loss.sum() / masked.sum()
                loss.backward()
                optimizer.step()
                optimizer.zero_grad()
                scheduler.step()
                step += 1
                shapes.append([waveforms.shape[0], labels.shape[0], str(masked.dtype)])
                meters.update(loss=loss.detach(), feature_loss=outputs["feature_loss"])
                checkpointer.save(step, epoch)
                profiler.step()
                if step == 3:
                    break
    checkpointer.save_final(step, epoch)

    sbatch = work / "bin" / "sbatch"
    sbatch.parent.mkdir()
    sbatch.write_text("#!/bin/sh\necho Submitted batch job 4242\n")
    sbatch.chmod(0o755)
    names = {"manifest": work / "labels.jsonl", "workdir": work / "runs", "wandb_project": "p", "wandb_name": "h"}
    lines = [f'{name} = "{value}"' for name, value in (names | {"wandb_mode": "offline"}).items()]
    (work / "hubert.toml").write_text("\n".join(["num_classes = 32", *lines]) + "\n")
    command = [sys.executable, "-m", "minimal_hubert", work / "hubert.toml", "-A", "a", "-N", "1", "-G", "1"]
    environment = os.environ | {"PATH": f"{sbatch.parent}:{os.environ['PATH']}"}
    submitted = subprocess.run([*command, "--dump", work / "jobs"], env=environment, capture_output=True, check=False)
    found = {
        "features": [*alone, *padded], "resumed": resumed, "shapes": shapes, "means": meters.pop(),
        "checkpoints": [path.name for path in find_checkpoints(work / "run")], "submitted": submitted.returncode,
        "jobs": len(list((work / "jobs").rglob("*submission*"))) > 0,
    }  # fmt: skip
    torch.save(found, output)


if __name__ == "__main__":
    main(Path(sys.argv[1]).resolve(), Path(sys.argv[2]).resolve())
