"""Whether the package is right and fast on a GPU, in one command of at most eight minutes.

    python benchmarks/gpu.py [--output FOLDER] [--sections NUMBER ...] [--tiny] [--count]

Every check ends with PASS, FAIL or SKIP and why; measurements stand beside what was predicted for an H200. FOLDER gets
``gpu.json`` and a trace of two steps. Only torch and this package are needed: what asks for polars, soundfile or a
published package (0.1.2) is skipped where they are missing. On a CPU, or with ``--tiny``, shapes are tiny and the
script only shows that it runs. ``--count`` prints how many kernels a training step starts and how many bytes they
read and write, by fake tensors, and needs no GPU.
"""

from __future__ import annotations

import argparse
import copy
import importlib
import json
import os
import statistics
import sys
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from spidr.compiled import compile_forward
from spidr.config import OptimizerConfig, SpidRConfig, model_config
from spidr.models import DinoSR, SpidR, build_model, kernels
from spidr.models.flops import peak_tflops, step_flops
from spidr.optimizer import build_optimizer
from spidr.tools.errors import first_line

GOLDEN = Path(__file__).parents[1] / "tests" / "golden"
TINY: dict[str, Any] = {
    "extractor_conv_layer_config": [(16, 10, 5), (16, 3, 2), (16, 3, 2), (16, 2, 2)],
    "encoder_embed_dim": 32,
    "encoder_pos_conv_kernel": 15,
    "encoder_pos_conv_groups": 4,
    "encoder_pos_conv_depth": 3,
    "encoder_num_layers": 3,
    "encoder_num_heads": 4,
    "encoder_ff_interm_features": 64,
    "codebook_size": 12,
    "num_codebooks": 2,
}
NO_DROPOUT = {
    "encoder_dropout": 0.0,
    "encoder_attention_dropout": 0.0,
    "encoder_ff_interm_dropout": 0.0,
    "encoder_projection_dropout": 0.0,
}
PREDICTED = {
    "eager, ms a step": "70 to 90",
    "compiled, ms a step": "47 to 57",
    "compiled, audio seconds a second": "4,200 to 5,000",
    "compiled, MFU": "23 to 28 %",
    "memory, GB": "10 to 12",
    "large product, TFLOP/s": "790",
}


class SkipError(Exception):
    """Why a check cannot be made here."""


@dataclass
class Result:
    """One line of the table."""

    section: str
    what: str
    status: str
    detail: str


@dataclass
class Bench:
    """The device, the sizes, and what has been found."""

    device: torch.device
    tiny: bool
    output: Path
    results: list[Result] = field(default_factory=list)
    section: str = ""

    def check(self, what: str, function: Callable[[], object]) -> None:
        """Run a check. What it returns is the detail; an exception is a failure."""
        start = time.perf_counter()
        try:
            status, detail = "PASS", function()
        except SkipError as reason:
            status, detail = "SKIP", str(reason)
        except Exception as error:
            status, detail = "FAIL", f"{type(error).__name__}: {first_line(error)}"
        predicted = f" (predicted {PREDICTED[what]})" if what in PREDICTED else ""
        detail = f"{'' if detail is None else detail}{predicted}"
        self.results.append(Result(self.section, what, status, detail))
        print(f"{status}  {self.section}: {what}  {detail}  [{time.perf_counter() - start:.1f} s]", flush=True)

    @property
    def on_gpu(self) -> bool:
        """Whether there is a GPU to measure."""
        return self.device.type == "cuda"

    def need_gpu(self) -> None:
        """Skip a check on a CPU."""
        if not self.on_gpu:
            raise SkipError("needs a GPU")

    def time_of(self, function: Callable[[], object], repeat: int = 20) -> list[float]:
        """Milliseconds of each of several calls, after two to warm up."""
        repeat = repeat if self.on_gpu else 2
        times = []
        for i in range(repeat + 2):
            if self.on_gpu:
                start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
                start.record()
                function()
                end.record()
                end.synchronize()
                taken = start.elapsed_time(end)
            else:
                before = time.perf_counter()
                function()
                taken = 1000 * (time.perf_counter() - before)
            if i >= 2:
                times.append(taken)
        return times

    def milliseconds(self, function: Callable[[], object]) -> str:
        """Median of a call, for the table."""
        return f"{statistics.median(self.time_of(function)):.3f} ms"

    def config(self, **changes: Any) -> SpidRConfig:
        """The base model's or a tiny one's."""
        return SpidRConfig(**((TINY if self.tiny else {}) | changes))

    def batch(self, seed: int = 0, rows: int = 0, samples: int = 0) -> tuple[Tensor, Tensor]:
        """Waveforms and the indices of masked frames; by default 16 of 14.84 s."""
        rows, samples = rows or (2 if self.tiny else 16), samples or (4000 if self.tiny else 237_440)
        generator = torch.Generator().manual_seed(seed)
        frames = build_shapes(self.config(), samples)
        order = torch.stack([torch.randperm(frames, generator=generator) for _ in range(rows)])
        mask = order[:, : frames // 2].sort().values
        return torch.randn(rows, samples, generator=generator).to(self.device), mask.to(self.device)


def build_shapes(cfg: SpidRConfig, samples: int) -> int:
    """Frames of a waveform."""
    for _, kernel, stride in cfg.extractor_conv_layer_config:
        samples = (samples - kernel) // stride + 1
    return samples


class Trainer:
    """A model with its optimizer, as the training loop drives it."""

    def __init__(
        self, model: DinoSR, device: torch.device, dtype: str = "bfloat16", *, compiled: bool = False, **options: Any
    ) -> None:
        self.model, self.device = model.to(device).train(), device
        self.dtype = getattr(torch, dtype)
        self.optimizer, self.scaler, self.scheduler = build_optimizer(model, OptimizerConfig(dtype=dtype))
        self.call: Callable[..., Any] = compile_forward(model, **options) if compiled else model
        self.steps = 0

    def backward(self, waveforms: Tensor, mask: Tensor, **options: Any) -> Tensor:
        """Forward and backward; the mean loss."""
        with torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32):
            loss = self.call(waveforms, mask=mask, **options)[0].mean()
        self.scaler.scale(loss).backward()
        return loss.detach()

    def update(self) -> None:
        """Clipping, AdamW, schedule, teacher."""
        self.scaler.unscale_(self.optimizer)
        parameters = [p for group in self.optimizer.param_groups for p in group["params"] if p.grad is not None]
        nn.utils.clip_grad_norm_(parameters, 10.0)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad()
        self.scheduler.step()
        self.steps += 1
        self.model.update_ema(self.steps)

    def step(self, waveforms: Tensor, mask: Tensor, **options: Any) -> Tensor:
        """A whole step."""
        loss = self.backward(waveforms, mask, **options)
        self.update()
        return loss


def needs(*modules: str) -> None:
    """Skip a check where a package is missing."""
    for module in modules:
        try:
            importlib.import_module(module)
        except ImportError:
            raise SkipError(f"{module} is not installed") from None


def close(a: Tensor, b: Tensor, tolerance: float) -> str:
    """Relative difference of two tensors, which must be small."""
    a, b = a.detach().float().cpu(), b.detach().float().cpu()
    difference = float((a - b).norm() / b.norm().clamp(min=1e-12))
    assert difference <= tolerance, f"relative difference {difference:.2e}, at most {tolerance:.0e} expected"
    return f"relative difference {difference:.1e}"


# ------------------------------------------------------------------------------------------------------ 0 the machine


def machine(bench: Bench) -> None:
    """Versions, memory, and what the device reaches at best."""

    def versions() -> str:
        found = f"torch {torch.__version__}, CUDA {torch.version.cuda}, Python {sys.version.split()[0]}"
        if not bench.on_gpu:
            return f"{found}, no GPU"
        free, total = torch.cuda.mem_get_info()
        return f"{found}, {torch.cuda.get_device_name()}, {free / 1e9:.0f} of {total / 1e9:.0f} GB free"

    bench.check("versions", versions)
    size = 256 if bench.tiny else 8192
    a, b = (torch.randn(size, size, device=bench.device, dtype=torch.bfloat16) for _ in range(2))
    bench.check(
        "large product, TFLOP/s",
        lambda: f"{2 * size**3 / 1e9 / statistics.median(bench.time_of(lambda: a @ b)):.1f}",
    )
    bench.check(
        "copy, TB/s",
        lambda: f"{2 * a.nbytes / 1e9 / statistics.median(bench.time_of(a.clone)):.2f}",
    )


# ------------------------------------------------------------------------------------------------------ 1 correctness


def correct(bench: Bench) -> None:
    """The device against the CPU and against recorded values."""

    def golden(name: str) -> str:
        folder = GOLDEN / name
        if not folder.exists():
            raise SkipError(f"{folder} is missing")
        document = json.loads((folder / "config.json").read_text("utf-8"))
        model = build_model(cfg=model_config(document["model_type"], document["model"]))
        model.load_state_dict(torch.load(folder / "checkpoint.pt")["model"])
        trajectory = json.loads((folder / "trajectory.json").read_text("utf-8"))
        tensors = torch.load(folder / "tensors.pt")
        trainer = Trainer(model, bench.device, "float32")
        inputs = (tensors[name][0].to(bench.device) for name in ("train_waveforms", "masks"))
        exists = tensors["attention_mask_keys"][:, None, None].to(bench.device)
        loss = trainer.backward(*inputs, attention_mask=exists)
        return close(loss, torch.tensor(trajectory["steps"][0]["loss"]), 1e-4)

    for name in ("spidr-tiny", "dinosr-tiny"):
        bench.check(f"golden loss, {name}", lambda name=name: golden(name))  # type: ignore[misc]

    torch.manual_seed(0)
    here = SpidR(bench.config(**NO_DROPOUT))
    there = copy.deepcopy(here)
    waveforms, mask = bench.batch(rows=2, samples=4000 if bench.tiny else 64_000)
    losses: dict[str, Tensor] = {}

    def gradients() -> str:
        for name, model, device in (("cpu", here, torch.device("cpu")), ("device", there, bench.device)):
            losses[name] = Trainer(model, device, "float32").backward(waveforms.to(device), mask.to(device))
        pairs = zip(here.parameters(), there.parameters(), strict=True)
        flat = [
            torch.cat([x.flatten().cpu() for x in found])
            for found in zip(*((a.grad, b.grad) for a, b in pairs if a.grad is not None), strict=True)  # type: ignore[misc]
        ]
        return f"{close(losses['device'], losses['cpu'], 1e-4)}, gradients {close(flat[1], flat[0], 1e-4)}"

    bench.check("loss and gradients, float32", gradients)

    def bfloat16() -> str:
        model = copy.deepcopy(here)
        return close(Trainer(model, bench.device).backward(waveforms, mask), losses["cpu"], 0.01)

    bench.check("loss, bfloat16", bfloat16)
    encoder, reference, last = there.eval(), here.cpu().eval(), here.cfg.encoder_num_layers

    def units() -> str:
        a, b = (m.units(x, layer=last)[0].cpu() for m, x in ((encoder, waveforms), (reference, waveforms.cpu())))
        share = float((a == b).float().mean())
        assert share > 0.999, f"{100 * share:.2f} % of the units are equal"
        return f"{100 * share:.2f} % equal"

    bench.check("units", units)

    def padded() -> str:
        length = waveforms.shape[1] * 3 // 4
        x = waveforms.clone()
        x[1, length:] = 0
        together, frames = encoder.encode(x, [x.shape[1], length], layer=last)
        alone, _ = encoder.encode(x[1:, :length], layer=last)
        return close(together[1, : frames[1]], alone[0], 1e-4)

    bench.check("padded as alone", padded)

    def tf32() -> str:
        bench.need_gpu()
        expected = encoder.encode(waveforms, layer=last)[0]
        before = torch.backends.cudnn.allow_tf32
        try:
            torch.backends.cudnn.allow_tf32 = not before
            return close(encoder.encode(waveforms, layer=last)[0], expected, 1e-5)
        finally:
            torch.backends.cudnn.allow_tf32 = before

    bench.check("features whatever cuDNN's TF32 setting is", tf32)


# ------------------------------------------------------------------------------------------------------------- 2 runs


def runs(bench: Bench) -> None:
    """Every kind of run, with a tiny model."""
    device = bench.device
    tiny = Bench(device, True, bench.output)
    waveforms, mask = tiny.batch()

    def trainer(dtype: str = "bfloat16", *, compiled: bool = False, **changes: Any) -> Trainer:
        torch.manual_seed(0)
        return Trainer(build_model(cfg=SpidRConfig(**(TINY | changes))), device, dtype, compiled=compiled)

    def finite(subject: Trainer, **options: Any) -> str:
        losses = [float(subject.step(waveforms, mask, **options)) for _ in range(3)]
        assert all(map(torch.isfinite, map(torch.tensor, losses))), losses
        return f"loss {losses[0]:.3f} to {losses[-1]:.3f}"

    bench.check("eager", lambda: finite(trainer()))

    def compiled() -> str:
        bench.need_gpu()
        return finite(trainer(compiled=True))

    bench.check("compiled", compiled)

    def accumulation() -> str:
        subject = trainer()
        for _ in range(2):
            subject.backward(waveforms, mask)
        subject.update()
        return finite(subject)

    bench.check("accumulation", accumulation)
    bench.check("padding", lambda: finite(trainer(), lengths=torch.tensor([4000, 3000])))
    channels = torch.zeros(2, 32, dtype=torch.bool, device=device)
    channels[:, :4] = True
    bench.check("channel mask", lambda: finite(trainer(), channel_mask=channels))
    bench.check("group norm", lambda: finite(trainer(extractor_mode="group_norm")))
    bench.check("pre-norm", lambda: finite(trainer(encoder_layer_norm_first=True)))
    bench.check("freeze", lambda: finite(trainer(freeze_step=2)))

    def overflow() -> str:
        bench.need_gpu()
        subject = trainer("float16")
        subject.scaler = torch.amp.GradScaler(device.type, init_scale=2.0**40)
        before = [p.clone() for p in subject.model.student.parameters()]
        subject.backward(waveforms, mask)
        subject.update()
        assert all(torch.equal(a, b) for a, b in zip(before, subject.model.student.parameters(), strict=True))
        return f"scale {subject.scaler.get_scale():.0f} after it"

    bench.check("float16, forced overflow", overflow)

    def resumed() -> str:
        found = []
        for stops in (False, True):
            subject = trainer("float32", **NO_DROPOUT)
            for step in range(4):
                if stops and step == 2:
                    saved = copy.deepcopy((subject.model.state_dict(), subject.optimizer.state_dict()))
                    subject = trainer("float32", **NO_DROPOUT)
                    subject.model.load_state_dict(saved[0])
                    subject.optimizer.load_state_dict(saved[1])
                    subject.steps = 2
                    for _ in range(2):
                        subject.scheduler.step()
                subject.step(waveforms, mask)
            found.append(torch.cat([p.flatten() for p in subject.model.parameters()]))
        different = int((found[0] != found[1]).sum())
        assert not different, f"{different} of {len(found[0])} weights differ"
        return "every bit equal"

    bench.check("stopped and resumed", resumed)

    def validation() -> str:
        needs("polars", "soundfile")
        from spidr.validate import validate

        return f"loss {validate(trainer().model, [(waveforms, None, mask)], device)['loss']:.3f}"  # type: ignore[arg-type]

    bench.check("validation", validation)
    encoder = trainer().model.eval()
    bench.check("features", lambda: str(tuple(encoder.encode(waveforms, layer=2)[0].shape)))
    bench.check("units", lambda: str(tuple(encoder.units(waveforms, layer=3)[0].shape)))

    def warm_start() -> str:
        subject = trainer()
        subject.model.init_codebooks(waveforms)
        return finite(subject)

    bench.check("codebooks from data", warm_start)


# ---------------------------------------------------------------------------------------------- 3 waiting, 4 processes


def waiting(bench: Bench) -> None:
    """Nothing in a step waits for the device."""

    def quiet() -> str:
        bench.need_gpu()
        torch.manual_seed(0)
        subject = Trainer(SpidR(bench.config()), bench.device)
        waveforms, mask = bench.batch()
        subject.step(waveforms, mask)
        torch.cuda.set_sync_debug_mode("warn")
        try:
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                for _ in range(3):
                    subject.step(waveforms, mask)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        found = Counter(f"{Path(w.filename).name}:{w.lineno}" for w in caught if "synchroniz" in str(w.message))
        assert not found, f"waits at {dict(found)}"
        return "three steps without waiting"

    bench.check("no synchronisation", quiet)


def processes(bench: Bench) -> None:
    """One process of NCCL (Gloo on a CPU), and DistributedDataParallel around the compiled model, both ways."""

    def collectives() -> str:
        start = time.perf_counter()
        os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
        os.environ.setdefault("MASTER_PORT", "29517")
        dist.init_process_group("nccl" if bench.on_gpu else "gloo", rank=0, world_size=1)
        x = torch.ones(8, device=bench.device)
        dist.all_reduce(x)
        dist.broadcast(x, 0)
        assert float(x.sum()) == 8
        return f"{time.perf_counter() - start:.1f} s"

    def replicated(splits: bool) -> str:
        if not dist.is_initialized():
            raise SkipError("no process group")
        waveforms, mask = bench.batch(rows=2)
        gradients, seconds = [], []
        for wraps in (False, True):
            torch._dynamo.reset()
            torch.manual_seed(0)
            subject = Trainer(SpidR(bench.config(**NO_DROPOUT)), bench.device, compiled=bench.on_gpu)
            if bench.on_gpu:
                torch._dynamo.config.optimize_ddp = splits
            if wraps:
                subject.call = nn.parallel.DistributedDataParallel(_Caller(subject.model, subject.call))
            start = time.perf_counter()
            subject.backward(waveforms, mask)
            seconds.append(time.perf_counter() - start)
            gradients.append(torch.cat([p.grad.flatten() for p in subject.model.parameters() if p.grad is not None]))
        graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
        return f"{close(gradients[1], gradients[0], 1e-2)}, first step {seconds[1]:.0f} s, {graphs} graphs"

    bench.check("collectives", collectives)
    bench.check("DDP, whole graph", lambda: replicated(False))
    bench.check("DDP, split graph", lambda: replicated(True))
    if dist.is_initialized():
        dist.destroy_process_group()


class _Caller(nn.Module):
    """A model whose forward is another function of it."""

    def __init__(self, model: nn.Module, call: Callable[..., Any]) -> None:
        super().__init__()
        self.model, self.call = model, lambda *args, **options: call(*args, **options)

    def forward(self, *args: Any, **options: Any) -> Any:
        """Call it."""
        return self.call(*args, **options)


# ----------------------------------------------------------------------------------------------------------- 5 pieces


def pieces(bench: Bench) -> None:
    """The parts of a step, each on its own, in bfloat16."""
    device, dtype = bench.device, torch.bfloat16
    rows, frames, dim, groups = (2, 99, 32, 4) if bench.tiny else (16, 741, 768, 16)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, device=device, dtype=dtype, requires_grad=True)

    def both(function: Callable[..., Tensor], *inputs: Tensor) -> Callable[[], object]:
        return lambda: torch.autograd.grad(function(*inputs).square().sum(), inputs)

    x, kernel = random(rows, dim, frames), random(dim, dim // groups, 19)
    bench.check(
        "positional convolution, forward and backward",
        lambda: bench.milliseconds(both(lambda x, w: F.conv1d(x, w, padding=9, groups=groups), x, kernel)),
    )
    for chunk in (8, 16, 32):
        bench.check(
            f"the same as a batched product of {chunk} frames",
            lambda chunk=chunk: (  # type: ignore[misc]
                bench.milliseconds(both(lambda x, w: toeplitz_conv(x, w, groups, chunk), x, kernel))
                + ", "
                + close(toeplitz_conv(x, kernel, groups, chunk), F.conv1d(x, kernel, padding=9, groups=groups), 0.02)  # type: ignore[misc]
            ),
        )
    width, long = (16, 3200) if bench.tiny else (512, rows * 47_487)
    grad, taps = random(long, width).detach(), random(long, 10).detach()
    padded = F.pad(taps, (0, 6))
    split = 8
    bench.check("first layer's weight gradient", lambda: bench.milliseconds(lambda: taps.T @ grad))
    bench.check("the same, kernel padded to 16", lambda: bench.milliseconds(lambda: padded.T @ grad))
    bench.check(
        "the same, split and summed",
        lambda: bench.milliseconds(lambda: torch.bmm(taps.view(split, -1, 10).mT, grad.view(split, -1, width)).sum(0)),
    )
    for layer, (kernel_size, length) in enumerate(((3, long), (3, long // 2), (2, long // 16)), start=2):
        length -= length % 4
        signal, weight = random(1, width, length).detach(), random(width, width, kernel_size).detach()
        last = signal.transpose(1, 2).contiguous()
        pairs, parts = last.view(-1, 2 * width), weight.permute(2, 1, 0).flatten(0, 1).split(2 * width)

        def products(pairs: Tensor = pairs, parts: Any = parts, width: int = width) -> Tensor:
            out = pairs @ parts[0]
            if len(parts) > 1:
                out[:-1].addmm_(pairs[1:, :width], parts[1])
            return out

        ways: dict[str, Callable[[], object]] = {
            "products": products,
            "channels last": lambda last=last, weight=weight: F.conv1d(last.transpose(1, 2), weight, stride=2),
            "channels first": lambda signal=signal, weight=weight: F.conv1d(signal, weight, stride=2),
        }
        for name, function in ways.items():
            bench.check(f"extractor layer {layer}, {name}", lambda f=function: bench.milliseconds(f))  # type: ignore[misc]
    for length in (frames, -(-frames // 8) * 8):
        q = torch.randn(3, rows, dim // 8 if bench.tiny else 12, length, 8 if bench.tiny else 64, device=device).to(
            dtype
        )
        for backend in ("FLASH_ATTENTION", "EFFICIENT_ATTENTION", "CUDNN_ATTENTION", "MATH"):

            def attention(q: Tensor = q, backend: str = backend) -> str:
                from torch.nn.attention import SDPBackend, sdpa_kernel

                with sdpa_kernel(getattr(SDPBackend, backend)):
                    try:
                        return bench.milliseconds(lambda: F.scaled_dot_product_attention(*q, dropout_p=0.1))
                    except RuntimeError as error:
                        raise SkipError(first_line(error)) from None

            bench.check(f"attention, T = {length}, {backend.lower()}", attention)
    hidden = 64 if bench.tiny else 3072
    for n, k in ((3 * dim, dim), (dim, dim), (hidden, dim), (dim, hidden)):
        a, b = random(rows * frames, k).detach(), random(k, n).detach()
        flop = 2 * rows * frames * k * n
        bench.check(
            f"product {rows * frames} x {k} x {n}",
            lambda a=a, b=b, flop=flop: (  # type: ignore[misc]
                f"{flop / 1e9 / statistics.median(bench.time_of(lambda: a @ b)):.0f} TFLOP/s"
            ),
        )
    torch.manual_seed(0)
    subject = Trainer(SpidR(bench.config()), device)
    subject.backward(*bench.batch(rows=2))
    parameters = [p for p in subject.model.parameters() if p.grad is not None]
    bench.check("AdamW", lambda: bench.milliseconds(subject.optimizer.step))
    bench.check("teacher and codebooks", lambda: bench.milliseconds(lambda: subject.model.update_ema(1)))
    bench.check("clipping", lambda: bench.milliseconds(lambda: nn.utils.clip_grad_norm_(parameters, 10.0)))


def toeplitz_conv(x: Tensor, weight: Tensor, groups: int, chunk: int) -> Tensor:
    """A grouped convolution of stride 1 and odd kernel as one batched product over the groups.

    ``chunk`` frames at a time meet the kernel expanded to a band matrix of (chunk + kernel - 1) rows of frames.

    Args:
        x: (B, C, T).
        weight: (C, C / groups, kernel).
        groups: Of channels.
        chunk: More frames make fewer copies and more products with zeros.
    """
    batch, channels, frames = x.shape
    width, kernel = channels // groups, weight.shape[2]
    chunks, window = -(-frames // chunk), chunk + kernel - 1
    padded = F.pad(x, (kernel // 2, chunks * chunk - frames + kernel // 2))
    windows = padded.view(batch, groups, width, -1).unfold(3, window, chunk)  # (B, G, C', chunks, window)
    rows = windows.permute(1, 0, 3, 4, 2).reshape(groups, batch * chunks, window * width)
    taps = weight.view(groups, width, width, kernel).permute(0, 3, 2, 1)  # (G, kernel, in, out)
    # Row block j of column block i is tap j - i: pad each column with zeros, so that the next begins one row lower.
    band = F.pad(taps, (0, 0, 0, 0, 0, chunk)).unsqueeze(1).expand(-1, chunk, -1, -1, -1)
    band = band.reshape(groups, chunk * (kernel + chunk), width, width)[:, : chunk * window]
    band = band.view(groups, chunk, window, width, width).permute(0, 2, 3, 1, 4).reshape(groups, window * width, -1)
    out = torch.bmm(rows, band).view(groups, batch, chunks * chunk, width)
    return out.permute(1, 0, 3, 2).reshape(batch, channels, -1)[..., :frames]


# ------------------------------------------------------------------------------------------------------ 6 whole steps


def whole_step(bench: Bench) -> None:
    """Time, memory and use of the device of a training step."""
    waveforms, mask = bench.batch()
    seconds, cfg = waveforms.numel() / 16_000, bench.config()
    tflop = len(waveforms) * step_flops(cfg, waveforms.shape[1], mask.shape[1]) / 1e12
    name = torch.cuda.get_device_name() if bench.on_gpu else "none"
    peak = peak_tflops(name, "bfloat16")

    def measured(subject: Trainer, prefix: str, *batches: tuple[Tensor, Tensor]) -> None:
        if bench.on_gpu:
            torch.cuda.reset_peak_memory_stats()
        order = iter(batches * 40)
        times: list[float] = []

        def milliseconds() -> str:
            times.extend(bench.time_of(lambda: subject.step(*next(order)), 30 if len(batches) > 1 else 10))
            return f"{statistics.median(times):.1f}, p90 {sorted(times)[int(0.9 * (len(times) - 1))]:.1f}"

        bench.check(f"{prefix}, ms a step", milliseconds)
        if not times or len(batches) > 1:
            return
        step = statistics.median(times) / 1000
        bench.check(f"{prefix}, audio seconds a second", lambda: f"{seconds / step:,.0f}")
        bench.check(
            f"{prefix}, MFU",
            lambda: f"{tflop / step:.0f} TFLOP/s" + (f", {100 * tflop / step / peak:.1f} %" if peak else ""),
        )
        if bench.on_gpu:
            bench.check("memory, GB", lambda: f"{torch.cuda.max_memory_allocated() / 1e9:.1f}")

    torch.manual_seed(0)
    measured(Trainer(SpidR(cfg), bench.device), "eager", (waveforms, mask))
    frozen = Trainer(SpidR(cfg), bench.device)
    frozen.model.freeze_extractor()
    measured(frozen, "eager, frozen extractor", (waveforms, mask))

    def compiled() -> str:
        bench.need_gpu()
        torch._dynamo.reset()
        torch._dynamo.utils.counters.clear()
        torch.manual_seed(0)
        subject = Trainer(SpidR(cfg), bench.device, compiled=True)
        start = time.perf_counter()
        subject.step(waveforms, mask)
        torch.cuda.synchronize()
        taken = time.perf_counter() - start
        measured(subject, "compiled", (waveforms, mask))
        generator = torch.Generator().manual_seed(1)
        lengths = torch.randint(160_000, 320_000, (30,), generator=generator).tolist()
        batches = [bench.batch(i, 237_440 * 16 // length, length) for i, length in enumerate(lengths)]
        before = torch._dynamo.utils.counters["stats"]["unique_graphs"]
        measured(subject, "compiled, 30 lengths", *batches)
        graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
        assert graphs == before, f"{graphs - before} recompilations over 30 lengths"
        return f"{taken:.0f} s to compile, {graphs} graphs, none more over 30 lengths"

    bench.check("compilation", compiled)

    def loader(pinned: bool) -> str:
        bench.need_gpu()
        host = [tuple(x.cpu().pin_memory() if pinned else x.cpu() for x in bench.batch(i)) for i in range(4)]
        subject, number = Trainer(SpidR(cfg), bench.device), iter(range(1000))

        def step() -> None:
            batch = host[next(number) % 4]
            subject.step(*(x.to(bench.device, non_blocking=True) for x in batch))

        return f"{statistics.median(bench.time_of(step, 10)):.1f} ms a step"

    bench.check("batches copied from pinned memory", lambda: loader(True))
    bench.check("batches copied from pageable memory", lambda: loader(False))

    def published() -> str:
        raise SkipError("install spidr==0.1.2 in an environment of its own and run benchmarks/speed.py --published")

    bench.check("the published package on the same batch", published)


# ---------------------------------------------------------------------------------------------------------- 7 profile


def profile(bench: Bench) -> None:
    """Two steps under the profiler."""

    def two_steps() -> str:
        torch.manual_seed(0)
        subject = Trainer(SpidR(bench.config()), bench.device, compiled=bench.on_gpu)
        waveforms, mask = bench.batch()
        for _ in range(2):
            subject.step(waveforms, mask)
        activities = [torch.profiler.ProfilerActivity.CPU]
        if bench.on_gpu:
            activities.append(torch.profiler.ProfilerActivity.CUDA)
            torch.cuda.synchronize()
        start = time.perf_counter()
        with torch.profiler.profile(activities=activities) as found:
            for _ in range(2):
                subject.step(waveforms, mask)
            if bench.on_gpu:
                torch.cuda.synchronize()
        elapsed = time.perf_counter() - start
        found.export_chrome_trace(str(bench.output / "trace.json"))
        time_of = "self_device_time_total" if bench.on_gpu else "self_cpu_time_total"
        events = sorted(found.key_averages(), key=lambda event: -getattr(event, time_of))
        busy = sum(getattr(event, time_of) for event in events) / 1e6
        categories: Counter[str] = Counter()
        for event in events:
            categories[category(event.key)] += getattr(event, time_of) / 2000
        for event in events[:25]:
            print(f"    {getattr(event, time_of) / 2000:8.2f} ms  {event.count // 2:5} x  {event.key[:90]}")
        shares = ", ".join(f"{key} {value:.1f} ms" for key, value in categories.most_common())
        launches = sum(event.count for event in events if "aunchKernel" in event.key) // 2
        return f"{shares}; {launches} launches; busy {100 * min(1.0, busy / elapsed):.0f} %"

    bench.check("two steps", two_steps)


def category(kernel: str) -> str:
    """What a kernel is for, by its name."""
    name = kernel.lower()
    for found, parts in {
        "products": ("gemm", "matmul", "addmm", "::mm", "bmm", "nvjet", "cutlass", "linear_pointwise"),
        "attention": ("attention", "fmha", "flash"),
        "convolutions": ("conv",),
        "communication": ("nccl",),
        "optimizer": ("adam", "foreach", "multi_tensor", "lerp"),
        "copies": ("copy", "memcpy", "memset"),
        "compiled": ("triton",),
    }.items():
        if any(part in name for part in parts):
            return found
    return "other"


# -------------------------------------------------------------------------------------------------------------- count


class Traffic(TorchDispatchMode):
    """Counts operations that start a kernel, and the bytes they read and write."""

    def __init__(self) -> None:
        super().__init__()
        self.kernels, self.bytes = Counter[str](), 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Count one, unless it only gives another view."""
        out = func(*args, **(kwargs or {}))
        is_kernel = func.namespace == "aten" and not func.is_view
        if is_kernel and not any(part in func.name() for part in ("empty", "detach", "_unsafe_view", "sym_")):
            tensors = [x for x in torch.utils._pytree.tree_leaves((args, kwargs, out)) if isinstance(x, Tensor)]
            self.kernels[func.overloadpacket.__name__] += 1
            self.bytes += sum(x.numel() * x.element_size() for x in tensors)
        return out


def count(bench: Bench) -> str:
    """Kernels and bytes of a training step in eager mode, with attention in one operation.

    The tensors are fake, on the CPU (without a GPU there is no backward pass on CUDA), the code is what a GPU runs.
    """
    bench.device, lines = torch.device("cpu"), []
    with FakeTensorMode(), as_on_a_gpu():
        model = SpidR(bench.config(encoder_attention_dropout=0.0)).train()
        waveforms, mask = bench.batch()
        with Traffic() as forward, torch.autocast("cpu", torch.bfloat16):
            loss = model(waveforms, mask=mask)[0].mean()
        with Traffic() as backward:
            loss.backward()
    for part, traffic in (("forward", forward), ("backward", backward)):
        lines.append(f"{part}: {sum(traffic.kernels.values()):,} kernels, {traffic.bytes / 1e9:.1f} GB")
        lines.append("    " + ", ".join(f"{key} {number}" for key, number in traffic.kernels.most_common(12)))
    return "\n".join(lines)


@contextmanager
def as_on_a_gpu() -> Iterator[None]:
    """Inside, nothing that serves CPUs only is used."""
    before = kernels.is_lean
    kernels.is_lean = lambda _: False
    try:
        yield
    finally:
        kernels.is_lean = before


SECTIONS = (machine, correct, runs, waiting, processes, pieces, whole_step, profile)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("gpu-check"), help="folder for gpu.json and the trace")
    parser.add_argument("--sections", type=int, nargs="+", choices=range(len(SECTIONS)), default=range(len(SECTIONS)))
    parser.add_argument("--tiny", action="store_true", help="tiny shapes")
    parser.add_argument("--count", action="store_true", help="print kernels and bytes of a step; needs no GPU")
    args = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    bench = Bench(device, args.tiny or (device.type == "cpu" and not args.count), args.output)
    if args.count:
        print(count(bench))
        return
    args.output.mkdir(parents=True, exist_ok=True)
    for number in args.sections:
        section = SECTIONS[number]
        bench.section = f"{number} {section.__name__}"
        try:
            section(bench)
        except Exception as error:
            bench.check("the section", lambda error=error: (_ for _ in ()).throw(error))  # type: ignore[misc]
        if bench.on_gpu:
            torch.cuda.empty_cache()
        (args.output / "gpu.json").write_text(
            json.dumps([asdict(result) for result in bench.results], indent=1), encoding="utf-8"
        )
    print("\n| section | check | | |\n| --- | --- | --- | --- |")
    for result in bench.results:
        print(f"| {result.section} | {result.what} | {result.status} | {result.detail} |")
    failed = sum(result.status == "FAIL" for result in bench.results)
    print(f"\n{len(bench.results)} checks, {failed} failed")
    sys.exit(min(1, failed))


if __name__ == "__main__":
    main()
