"""Data, weights and masks that the training scripts here share, the same for every package."""

import hashlib
import json
import os
import wave
from pathlib import Path

import torch
import torch.distributed as dist

CONFIG = """
[run]
workdir = "{folder}"
wandb_project = "project"
wandb_name = "run"
wandb_mode = "disabled"
save_interval = 10
model_type = "spidr"

[data]
manifest = "{folder}/manifest.csv"
rand_crop = false
num_buckets = 2
min_sample_size = 7000
max_sample_size = 8000
max_batch_length = {batch}
num_workers = 1

[model]
extractor_conv_layer_config = [[32, 10, 5], [32, 8, 8], [32, 4, 4]]
encoder_embed_dim = 32
encoder_pos_conv_kernel = 9
encoder_pos_conv_groups = 2
encoder_pos_conv_depth = 2
encoder_num_layers = 3
encoder_num_heads = 2
encoder_attention_dropout = 0.0
encoder_ff_interm_features = 64
encoder_dropout = 0.0
codebook_size = 16
num_codebooks = 2
ema_start_decay = 0.9
ema_timescale = 20
freeze_step = 15

[optimizer]
lr = 2e-3
dtype = "float32"
warmup_steps = 5
hold_steps = 5
decay_steps = 10
max_norm = 1.0
"""


def join() -> tuple[int, int]:
    """Join the process group, if started by torchrun."""
    if "RANK" in os.environ:
        dist.init_process_group("gloo")
    else:
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    return dist.get_rank(), dist.get_world_size()


def prepare(folder: Path, rank: int) -> Path:
    """Write 8 recordings, their manifest and the configuration. Returns the configuration's path.

    Each process gets one batch per epoch, of recordings of one length, so shuffling does not affect an epoch.
    """
    if rank == 0 and not (folder / "config.toml").exists():
        rows, generator = ["fileid,path,num_samples"], torch.Generator().manual_seed(0)
        for number in range(8):
            length = (7200, 8000)[number % 2]
            pitch = torch.rand(4, 1, generator=generator) * 0.2 + 0.01
            noise = torch.randn(length, generator=generator)
            sound = torch.sin(pitch * torch.arange(length)).mean(0) / 4 + noise / 13
            with wave.open(str(folder / f"{number}.wav"), "wb") as file:
                file.setnchannels(1)
                file.setsampwidth(2)
                file.setframerate(16_000)
                file.writeframes((sound.clamp(-1, 1) * 32_767).to(torch.int16).numpy().tobytes())
            rows.append(f"{number},{folder.resolve() / f'{number}.wav'},{length}")
        (folder / "manifest.csv").write_text("\n".join(rows) + "\n")
        batch = 64_000 // dist.get_world_size()
        (folder / "config.toml").write_text(CONFIG.format(folder=folder.resolve(), batch=batch))
    dist.barrier()
    return folder / "config.toml"


def first_weights(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Weights that depend on their names and shapes only, scaled like the model's own."""
    weights = {}
    for name, value in model.state_dict().items():
        seed = int.from_bytes(hashlib.sha256(name.removeprefix("teacher.").encode()).digest()[:4], "little")
        draw = torch.randn(value.shape, generator=torch.Generator().manual_seed(seed))
        if not value.is_floating_point() or name.endswith("counts") or "layer_norm" in name:
            weights[name] = value.clone()
        elif name.endswith("codebook"):
            weights[name] = draw
        else:
            weights[name] = draw / max(1, value[0].numel() if value.dim() > 1 else 100) ** 0.5
    return weights


def same_masks(waveforms: torch.Tensor, mask: torch.Tensor, step: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The batch in a fixed order, with masks of the kind of ``mask`` that depend on step, length and row only.

    Packages draw different masks; here half of the frames are masked.
    """
    waveforms, frames = waveforms[waveforms[:, 0].argsort()], waveforms.shape[1]
    for kernel, stride in ((10, 5), (8, 8), (4, 4)):
        frames = (frames - kernel) // stride + 1
    generator = torch.Generator().manual_seed(1000 * step + frames)
    keys = torch.rand(len(waveforms), frames, generator=generator)
    indices = keys.argsort(1)[:, : frames // 2].sort(1).values
    if mask.dtype != torch.bool:
        return waveforms, indices
    return waveforms, torch.zeros(keys.shape, dtype=torch.bool).scatter_(1, indices, value=True)


def log(folder: Path, rank: int, step: int, loss: torch.Tensor, **values: torch.Tensor | float) -> None:
    """Append a line of measurements over all processes."""
    loss = loss.detach().clone()
    dist.all_reduce(loss)
    values |= {"loss": loss / dist.get_world_size()}
    if rank == 0:
        with (folder / "losses.jsonl").open("a") as file:
            file.write(json.dumps({"step": step} | {name: float(value) for name, value in values.items()}) + "\n")
