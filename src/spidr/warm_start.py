"""A warm start: ``python -m spidr.warm_start CONFIG OUTPUT.pt`` writes initial weights for ``run.init_ckpt``.

It is not part of SpidR or DinoSR as published, whose first targets come from random weights and say little about
phones. Here extractor, projection and student first learn by regression: each layer that has a codebook learns smoothed
cepstra (MFCC) and their slopes, rotated at random into the model's width. The teacher becomes a copy of the student;
heads and first codewords are those of a new run of CONFIG. No labels are used. Results: docs/decisions.md, "It learns".
"""

import argparse
import json
import math
import os
import sys
from collections.abc import Sequence
from contextlib import closing
from dataclasses import replace
from itertools import chain, count, islice
from pathlib import Path
from typing import Any

from spidr.config import SAMPLE_RATE, Config, DinoSRConfig, read_config, to_dict
from spidr.tools.command import Parser, command, write_result
from spidr.tools.errors import InputError
from spidr.tools.files import atomic_write, check_file, make_folder
from spidr.tools.frames import receptive_field
from spidr.tools.lazy import command_needs

STEPS = 1500  # with 600, twice as much of the targets' variance is left
LR = 4e-3  # several times the rate of a training run


def _arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = Parser(
        "python -m spidr.warm_start",
        description="Initial weights for a small model and little speech: its layers learn to predict cepstra. "
        "Not part of SpidR or DinoSR as published. Name OUTPUT in run.init_ckpt of CONFIG.",
    )
    parser.add_argument("config", metavar="CONFIG", help="the run's configuration (uses model, data, seed, precision)")
    parser.add_argument("output", metavar="OUTPUT", type=Path, help="a .pt file; config.json is written beside it")
    parser.add_argument("--steps", type=int, default=STEPS, help="(default: %(default)s)")
    parser.add_argument("--lr", type=float, default=LR, help="highest learning rate (default: %(default)s)")
    parser.add_argument("--device", choices=("auto", "cuda", "mps", "cpu"), help="(default: run.device of CONFIG)")
    return parser.parse_args(argv)


if __name__ == "__main__":
    _arguments()  # --help need not wait for torch

with command_needs("train", __name__):
    import torch
    from torch import Tensor, nn

    from spidr.adapt import init_codebooks
    from spidr.data import Batch, build_dataloader
    from spidr.data.loader import SpeechLoader
    from spidr.environment import Environment
    from spidr.models import build_model
    from spidr.optimizer import build_optimizer
    from spidr.tools.progress import Progress

CEPSTRA = 13
MELS = 80
SMOOTH = (1, 2, 3, 2, 1)
SLOPE = (-1, -2, 0, 2, 1)
"""Weights of five frames: 80 ms in the base models, about the length of a phone."""


def log_mel(waveforms: Tensor, shapes: Sequence[tuple[int, int, int]]) -> Tensor:
    """Log-mel energies (B, T, 80) of waveforms (B, S) at 16 kHz, at the extractor's frames.

    Windows are Hann windows as long as the receptive field of the convolutions (25 ms in the base models).
    """
    field, hop = receptive_field(shapes), math.prod(stride for _, _, stride in shapes)
    size = 1 << (field - 1).bit_length()
    window = torch.hann_window(field, device=waveforms.device)
    power = torch.fft.rfft(waveforms.unfold(1, field, hop) * window, size).abs().square()
    # Triangles on the mel scale, 2595 log10(1 + f / 700), from 0 to 8 kHz.
    edges = 700 * (10 ** torch.linspace(0, math.log10(1 + SAMPLE_RATE / 1400), MELS + 2) - 1)
    bins = torch.linspace(0, SAMPLE_RATE / 2, size // 2 + 1).unsqueeze(1)
    rising = (bins - edges[:-2]) / (edges[1:-1] - edges[:-2])
    falling = (edges[2:] - bins) / (edges[2:] - edges[1:-1])
    return (power @ torch.minimum(rising, falling).clamp(min=0).to(power)).clamp(min=1e-6).log()


def cepstra(waveforms: Tensor, shapes: Sequence[tuple[int, int, int]]) -> Tensor:
    """The first 13 cepstra, (B, T, 13): the DCT of :func:`log_mel`."""
    mels = log_mel(waveforms, shapes)
    phases = (torch.arange(MELS).unsqueeze(1) + 0.5) * torch.arange(CEPSTRA) * (math.pi / MELS)
    return mels @ (phases.cos() * math.sqrt(2 / MELS)).to(mels)


def smooth_and_slope(x: Tensor, num_frames: Tensor) -> Tensor:
    """Weighted means over five frames, then slopes: (B, T, C) to (B, T, 2 C).

    The first and the last of a row's ``num_frames`` (B,) frames are repeated at the edges.
    """
    around, frames = len(SMOOTH) // 2, torch.arange(x.shape[1], device=x.device)
    smooth, slope = torch.zeros_like(x), torch.zeros_like(x)
    for offset in range(-around, around + 1):
        index = (frames + offset).clamp(min=0).minimum(num_frames.unsqueeze(1) - 1)
        neighbours = x.gather(1, index.unsqueeze(-1).expand_as(x))
        smooth += neighbours * (SMOOTH[offset + around] / sum(SMOOTH))
        slope += neighbours * (SLOPE[offset + around] / sum(map(abs, SLOPE)))
    return torch.cat([smooth, slope], dim=-1)


def weights() -> Tensor:
    """Standard deviations of smoothed cepstra and slopes in the targets, (26,).

    Cepstra 0, 1, 2, ... have 1, 1, 1/sqrt(2), 1/sqrt(3) and so on, since lower ones say more about phones; slopes have
    half of that.
    """
    of_cepstra = torch.arange(CEPSTRA).clamp(min=1).rsqrt()
    return torch.cat([of_cepstra, 0.5 * of_cepstra])


class Targets:
    """The layers' targets: smoothed cepstra and slopes, as features with a mean variance of 1."""

    def __init__(self, cfg: DinoSRConfig, loader: SpeechLoader, seed: int) -> None:
        self.shapes, dim = cfg.extractor_conv_layer_config, cfg.encoder_embed_dim
        batches = islice(loader.epoch(0), 200)  # an hour of speech at 20 s each
        frames = torch.cat([self._describe(batch) for batch in batches]).double()
        self.mean, std = frames.mean(0).float(), frames.std(0, correction=0).float().clamp(min=1e-5)
        scale = weights()
        kept = scale.argsort(descending=True, stable=True)[:dim]  # only the most important ones if the model is narrow
        draw = torch.randn(dim, len(kept), generator=torch.Generator().manual_seed(seed))
        rotation = torch.linalg.qr(draw).Q.T * (math.sqrt(dim) / scale[kept].norm())
        self.map = torch.zeros(len(scale), dim)
        self.map[kept] = rotation * (scale / std)[kept].unsqueeze(1)

    def _describe(self, batch: Batch) -> Tensor:
        x, mask = cepstra(batch.waveforms, self.shapes), batch.attention_mask
        num_frames = x.new_full(x.shape[:1], x.shape[1]).long() if mask is None else mask[:, 0, 0].sum(-1)
        return frames_of(batch, smooth_and_slope(x, num_frames))

    def __call__(self, batch: Batch) -> Tensor:
        """The targets (N, D) of a batch's frames, without the padding."""
        found = self._describe(batch)
        return (found - self.mean.to(found)) @ self.map.to(found)


def frames_of(batch: Batch, x: Tensor) -> Tensor:
    """(B, T, C) to (N, C), without the padding."""
    mask = batch.attention_mask
    return x.flatten(0, 1) if mask is None else x[mask[:, 0, 0]]


def warm_start(cfg: Config, output: Path, *, steps: int = STEPS, lr: float = LR, device: str = "auto") -> float:
    """Train a new model's extractor, projection and student, in one process; save model and ``config.json``.

    Args:
        cfg: The configuration of the run, whose model, data, seed and optimizer are used, but not its schedule.
        output: The checkpoint, ``.pt``. It must not exist, nor another run's ``config.json`` beside it.
        steps: Number of steps, of one batch each.
        lr: The peak rate; it rises over the first tenth of the steps and falls to zero along a cosine.
        device: As ``run.device``.

    Returns:
        The mean squared error as a share of the targets' variance, over the last tenth of the steps.

    Raises:
        InputError: Some input is wrong, or the loss is not finite.
    """
    config = json.dumps(to_dict(cfg), indent=2).encode()
    _check_output(output, config)
    env = Environment.alone(device)
    torch.manual_seed(cfg.run.random_seed)
    model = build_model(cfg=cfg.model, model_type=cfg.run.model_type).to(env.device).eval()  # without dropout
    trained = nn.ModuleList([model.feature_extractor, model.feature_projection, model.student])
    skip = len(model.student.layers) - model.num_codebooks
    loader = build_dataloader(cfg.data, None, conv_layer_config=cfg.model.extractor_conv_layer_config)
    schedule: Any = {"scheduler": "cosine", "max_steps": steps, "warmup_steps": steps // 10, "final_lr_scale": 0.0}
    optimizer_cfg = replace(cfg.optimizer, lr=lr, **schedule)
    optimizer, scaler, scheduler = build_optimizer(trained, optimizer_cfg)
    dtype = getattr(torch, optimizer_cfg.dtype)
    losses: list[Tensor] = []

    draws = cfg.model.codebook_init == "data"
    with closing(loader), closing(Progress("warm start", steps, "steps")) as progress:
        if draws:
            init_codebooks(model, loader, env, cfg.run.random_seed)  # for its checks
        targets = Targets(cfg.model, loader, cfg.run.random_seed)
        for cpu_batch in islice(chain.from_iterable(map(loader.epoch, count())), steps):
            batch = cpu_batch.to(env.device, non_blocking=True)
            with torch.autocast(env.device.type, dtype, enabled=optimizer_cfg.mixed_precision):
                features, mask = model.project(batch.waveforms, batch.attention_mask, batch.lengths)
                outputs = model.student.get_intermediate_outputs(features, mask, skip=skip)
            found = torch.stack([frames_of(batch, output) for output in outputs])
            loss = (found.float() - targets(batch)).square().mean()
            scaler.scale(loss).backward()
            scaler.unscale_(optimizer)
            nn.utils.clip_grad_norm_(trained.parameters(), optimizer_cfg.max_norm)
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
            scheduler.step()
            losses.append(loss.detach())
            progress(1)
        assert model.teacher is not None
        model.teacher.load_state_dict(model.student.state_dict())
        if draws:
            init_codebooks(model, loader, env, cfg.run.random_seed)
    left = torch.stack(losses[-max(1, steps // 10) :]).mean().item()
    if not math.isfinite(left):
        raise InputError(f"after {steps} steps the loss is {left}: lower --lr, which is {lr:g}")
    with atomic_write(output.with_name("config.json")) as file:
        file.write(config)
    with atomic_write(output) as file:
        torch.save({"model": {name: value.cpu() for name, value in model.state_dict().items()}}, file)
    return left


def _check_output(output: Path, config: bytes) -> None:
    """Before training, refuse an output that cannot be written or would be taken for another model."""
    if output.suffix != ".pt":
        raise InputError(f"{output}: the name must end in .pt")
    if os.path.exists(output):  # noqa: PTH110 (this knows no name that is too long)
        raise InputError(f"{output}: exists; choose another output")
    make_folder(output.parent)
    if len(os.fsencode(output.name)) > 200:  # fewer than file systems take, for the temporary name
        raise InputError(f"{output}: the name is too long; choose another output")
    beside = output.with_name("config.json")
    if beside.exists():
        check_file(beside)
        if beside.read_bytes() != config:
            raise InputError(f"{beside}: is of another run, so the checkpoint needs its own folder")
    if not os.access(output.parent, os.W_OK):
        raise InputError(f"{output.parent}: cannot be written to; choose another output")


@command
def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line."""
    args = _arguments(argv)
    if args.steps < 1:
        raise InputError(f"--steps must be at least 1, not {args.steps}")
    cfg = read_config(args.config)
    left = warm_start(cfg, args.output, steps=args.steps, lr=args.lr, device=args.device or cfg.run.device)
    write_result(f"{args.output}: {left:.3f} of the targets' variance is left after {args.steps} steps\n")


if __name__ == "__main__":
    sys.exit(main())
