"""DiscoPhon's own fine-tuning and extraction (``discophon[baselines]``) with the installed spidr, on a CPU.

    python client_discophon.py FOLDER OUTPUT.pt

Fine-tunes for 3 steps, stops, resumes up to step 5, validates the checkpoints, and extracts units and features. Of
the client, only "cuda", the batch size and the number of steps are changed. FOLDER/base.pt has the weights.
"""

import json
import sys
import wave
from dataclasses import replace
from pathlib import Path
from typing import Any

import discophon.baselines.spidr as client
import torch

from spidr.config import SpidRConfig

torch.Tensor.cuda = lambda self, *args, **kwargs: self
torch.nn.Module.cuda = lambda self, *args, **kwargs: self
torch.nn.Module.compile = lambda self, *args, **kwargs: None
LINES: list[dict[str, float]] = []


class OnCPU:
    """The module torch, with "cuda" meaning the CPU."""

    class cuda:
        get_device_capability = staticmethod(lambda *args: (8, 0))

    device = staticmethod(lambda *args: torch.device("cpu"))
    autocast = staticmethod(lambda _, dtype, enabled=True: torch.autocast("cpu", dtype, enabled=False))

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)


class NoWandb:
    """Collects what would be logged."""

    init = staticmethod(lambda **settings: None)
    finish = staticmethod(lambda: None)
    log = staticmethod(lambda line: LINES.append({name: float(value) for name, value in line.items()}))


def prepare(folder: Path) -> None:
    """Make a tiny copy of the benchmark's folder."""
    for split, count in {"train-10min": 6, "dev": 4}.items():
        rows = ["fileid,num_samples"]
        (folder / "audio" / "deu" / split).mkdir(parents=True)
        (folder / "manifest").mkdir(exist_ok=True)
        for number in range(count):
            generator = torch.Generator().manual_seed(number)
            length = 22_000 + 1000 * number
            tones = torch.sin(torch.rand(8, 1, generator=generator) * torch.arange(length)).mean(0)
            sound = tones / 3 + torch.randn(length, generator=generator) / 20
            with wave.open(str(folder / "audio" / "deu" / split / f"{split}-{number}.wav"), "wb") as file:
                file.setnchannels(1)
                file.setsampwidth(2)
                file.setframerate(16_000)
                file.writeframes((sound.clamp(-1, 1) * 32_767).to(torch.int16).numpy().tobytes())
            rows.append(f"{split}-{number},{length}")
        (folder / "manifest" / f"manifest-deu-{split}.csv").write_text("\n".join(rows) + "\n")


def main(folder: Path, output: Path) -> None:
    client.torch, client.wandb = OnCPU(), NoWandb
    optimizer, data = client.ft_optimizer_config, client.spidr_ft_data_config
    client.spidr_ft_data_config = lambda manifest: replace(
        data(manifest), max_sample_size=20_000, max_batch_length=60_000, num_workers=1
    )
    client.SAVE_INTERVAL, client.LOG_INTERVAL = 3, 1
    if not (folder / "manifest").exists():
        prepare(folder)
        torch.manual_seed(1)
        torch.save(client.build_model(cfg=SpidRConfig()).state_dict(), folder / "base.pt")
    base, work = folder / "base.pt", output.with_suffix("")
    work.mkdir()
    train, dev = (folder / "manifest" / f"manifest-deu-{split}.csv" for split in ("train-10min", "dev"))
    for steps in (3, 5):
        settings = replace(optimizer(), max_steps=steps, warmup_steps=1, hold_steps=2, decay_steps=2)
        client.ft_optimizer_config = lambda settings=settings: settings
        client.finetune_spidr("run", "project", work, base, str(train))
    run = work / "project" / "run"
    client.validate_all_spidr_checkpoints(work / "validation.jsonl", run, dev)
    client.extract_spidr_discrete_units(folder, work / "units", "deu", "dev", base, layers=[6, 12], batch_size=2)
    client.extract_spidr_continuous_features(folder, work / "features", "deu", "dev", base, layers=[6], batch_size=2)
    units = {}
    for path in sorted((work / "units").rglob("*.jsonl")):
        for row in map(json.loads, path.read_text().splitlines()):
            units[f"{path.parent.name} {row['file']}"] = torch.tensor(row["units"])
    before, after = torch.load(base), torch.load(run / "final.pt", weights_only=False)["model"]
    changes = {
        part: max(float((after[name].float() - before[name].float()).abs().max()) for name in before if part in name)
        for part in ("teacher", "codebooks", "student")
    }
    found = {
        "training": LINES, "changes": changes, "files": sorted(path.name for path in run.iterdir()),
        "validation": [json.loads(line) for line in (work / "validation.jsonl").read_text().splitlines()],
        "units": units, "features": {path.stem: torch.load(path) for path in (work / "features").rglob("*.pt")},
    }  # fmt: skip
    torch.save(found, output)


if __name__ == "__main__":
    main(Path(sys.argv[1]).resolve(), Path(sys.argv[2]).resolve())
