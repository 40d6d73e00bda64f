"""Check that the package is right and fast on a GPU, in at most eight minutes.

    python benchmarks/gpu.py [--output FOLDER] [--sections NUMBER ...] [--published FOLDER] [--tiny] [--count]

Every check ends with PASS, FAIL or SKIP and a reason; measurements appear beside predictions for an H200. FOLDER gets
``gpu.json`` and a trace of two steps. Training is the package's own (state, step, loader, run) on noise, so polars and
soundfile need not be installed. ``--published`` names a folder filled by
``pip install --no-deps --target FOLDER spidr==0.1.2``, whose step is timed on the same batch. On a CPU, or with
``--tiny``, shapes are tiny and the script only shows that it runs. ``--count`` prints the kernels that a training step
starts and the bytes they read and write, computed without values or a GPU.
"""

# ruff: noqa: E402

from __future__ import annotations

import argparse
import copy
import importlib
import json
import os
import shutil
import signal
import statistics
import subprocess
import sys
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, field, fields, replace
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock, patch

os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # for deterministic runs; read when cuBLAS starts

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode

for missing in ("polars", "polars.selectors", "soundfile"):  # nothing here reads a recording or a table
    try:
        importlib.import_module(missing)
    except ImportError:
        sys.modules[missing] = MagicMock()

from spidr.config import (
    Config,
    DataConfig,
    MaskingConfig,
    OptimizerConfig,
    RunConfig,
    SpidRConfig,
    model_config,
    read_config,
    to_dict,
)
from spidr.data.batch import Batch, Collator, Loaded
from spidr.data.loader import SpeechLoader
from spidr.data.sampler import BatchSampler
from spidr.environment import Environment, StopFlag, environment
from spidr.models import SpidR, build_model, kernels
from spidr.models.flops import peak_tflops, step_flops
from spidr.optimizer import build_optimizer
from spidr.state import Hooks, Replica, State, build_state, wrap
from spidr.tools.errors import first_line
from spidr.tools.frames import conv_length
from spidr.train import train, train_step
from spidr.validate import validate
from spidr.warm_start import warm_start

LIMIT = 480
"""Seconds after which no check is started."""

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
    "compiled, memory, GB": "10 to 12",
    "large product, TFLOP/s": "790",
}


class SkipError(Exception):
    """A check cannot run here."""


@dataclass
class Result:
    """One line of the table."""

    section: str
    what: str
    status: str
    detail: str


@dataclass
class Bench:
    """The device, the sizes, and the results."""

    env: Environment
    tiny: bool
    output: Path
    published: Path | None = None
    results: list[Result] = field(default_factory=list)
    section: str = ""
    product: float | None = None  # TFLOP/s of a large one
    begin: float = field(default_factory=time.monotonic)

    def check(self, what: str, function: Callable[[], object], *, gpu: bool = False) -> None:
        """Run a check. Its return value is the detail, an exception a failure. ``gpu``: skip it without a GPU."""
        start = time.perf_counter()
        try:
            if gpu and not self.on_gpu:
                raise SkipError("needs a GPU")
            if self.on_gpu and time.monotonic() - self.begin > LIMIT:
                raise SkipError(f"the {LIMIT} s are over")
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
    def device(self) -> torch.device:
        """The device to compute on."""
        return self.env.device

    @property
    def on_gpu(self) -> bool:
        """Whether there is a GPU to measure."""
        return self.device.type == "cuda"

    def time_of(self, function: Callable[[], object], repeat: int = 20) -> list[float]:
        """Milliseconds of each of several calls, after two warm-up calls."""
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
        """Median time of a call, for the table."""
        return f"{statistics.median(self.time_of(function)):.3f} ms"

    def model_config(self, **changes: Any) -> SpidRConfig:
        """The configuration of the base model or of a tiny one."""
        return SpidRConfig(**((TINY if self.tiny else {}) | changes))

    def config(self, *, dtype: str = "bfloat16", run: dict[str, Any] | None = None, **model: Any) -> Config:
        """A run of that model on noise."""
        size = 4000 if self.tiny else 237_440
        data = DataConfig(
            manifest="noise",
            max_sample_size=size * 4 // 3,
            max_batch_length=(2 if self.tiny else 16) * size,
            num_workers=0 if self.tiny else min(10, os.cpu_count() or 1),
        )
        folder = {"workdir": str(self.output), "wandb_project": "runs", "wandb_name": "noise"}
        others = {"wandb_mode": "disabled", "model_type": "spidr", "compile": False}
        chosen = RunConfig(**(folder | others | (run or {})))
        return Config(chosen, data, self.model_config(**model), OptimizerConfig(dtype=dtype, warmup_steps=10))

    def state(self, **options: Any) -> State:
        """The state of a training run; for the arguments see :meth:`config`."""
        cfg = self.config(**options)
        state = build_state(cfg, self.env, StopFlag(), Hooks(loader=noise_loader), new=True)
        state.network = wrap(state.model, cfg, self.env)
        return state

    def batch(self, seed: int = 0, rows: int = 0, samples: int = 0, *, padded: bool = False) -> Batch:
        """A batch on the device, with half of its frames masked; by default 16 waveforms of 14.84 s."""
        rows, samples = rows or (2 if self.tiny else 16), samples or (4000 if self.tiny else 237_440)
        generator = torch.Generator().manual_seed(seed)
        shapes = self.model_config().extractor_conv_layer_config
        frames = conv_length(shapes, samples)
        order = torch.stack([torch.randperm(frames, generator=generator) for _ in range(rows)])
        lengths = torch.linspace(samples, samples * 3 // 4, rows).long() if padded else None
        return Batch(
            torch.randn(rows, samples, generator=generator),
            rows=torch.arange(rows),
            starts=torch.zeros(rows, dtype=torch.int64),
            num_samples=rows * samples,
            num_frames=rows * frames,
            max_frames=frames,
            lengths=lengths,
            frame_lengths=None if lengths is None else conv_length(shapes, lengths),
            mask_indices=order[:, : frames // 2].sort().values,
        ).to(self.device)


class Noise(Collator):
    """Makes batches of noise instead of recordings. With ``pageable``, they are not pinned."""

    pageable = False

    def load(self, recording: Any, length: int) -> Loaded:
        """Noise as long as the recording."""
        samples = np.random.default_rng(length).standard_normal(length, dtype=np.float32)
        return Loaded(recording, length, samples, None)

    def __call__(self, request: Any) -> Batch:
        """Make a batch."""
        batch = super().__call__(request)
        return Pageable(**{f.name: getattr(batch, f.name) for f in fields(batch)}) if self.pageable else batch


class Pageable(Batch):
    """A batch that is not pinned."""

    def pin_memory(self) -> Pageable:
        """Return the batch unpinned."""
        return self


class NoManifest:
    """A manifest of nothing but lengths."""

    def __init__(self, lengths: np.ndarray) -> None:
        self.lengths = lengths

    def recordings(self, rows: np.ndarray) -> list[Any]:
        """Names of the recordings."""
        return [f"noise {row}" for row in rows]


def noise_loader(
    cfg: DataConfig,
    masking: MaskingConfig | None,
    *,
    conv_layer_config: Any,
    channels: int | None = None,
    rank: int = 0,
    world_size: int = 1,
) -> SpeechLoader:
    """Like :func:`spidr.data.build_dataloader`, for noise that is 3/8 to 1 of ``max_sample_size`` long."""
    longest = cfg.max_sample_size
    lengths = np.random.default_rng(0).integers(longest * 3 // 8, longest, size=20 * cfg.max_batch_length // longest)
    sampler = BatchSampler(lengths, cfg, world_size=world_size)
    collator = Noise(cfg, masking, conv_layer_config, channels)
    return SpeechLoader(NoManifest(lengths), collator, sampler.epoch, rank, world_size)  # type: ignore[arg-type]


def backward(model: Any, batch: Batch, dtype: str = "float32") -> Tensor:
    """Run forward and backward passes. Returns the mean loss."""
    batch = batch.to(next(model.parameters()).device)
    with torch.autocast(batch.waveforms.device.type, getattr(torch, dtype), enabled=dtype != "float32"):
        loss: Tensor = model(batch.waveforms, **batch.options)[0].mean()
    loss.backward()
    return loss.detach()


def gradient(model: nn.Module) -> Tensor:
    """All gradients, concatenated."""
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


def close(a: Tensor, b: Tensor, tolerance: float) -> str:
    """Assert that two tensors are close. Returns their relative difference."""
    a, b = a.detach().float().cpu(), b.detach().float().cpu()
    difference = float((a - b).norm() / b.norm().clamp(min=1e-12))
    assert difference <= tolerance, f"relative difference {difference:.2e}, at most {tolerance:.0e} expected"
    return f"relative difference {difference:.1e}"


# ------------------------------------------------------------------------------------------------------ 0 the machine


def machine(bench: Bench) -> None:
    """Report versions, memory, and the device's peak speed."""

    def versions() -> str:
        found = f"torch {torch.__version__}, CUDA {torch.version.cuda}, Python {sys.version.split()[0]}"
        if not bench.on_gpu:
            return f"{found}, no GPU"
        free, total = torch.cuda.mem_get_info()
        return f"{found}, {torch.cuda.get_device_name()}, {free / 1e9:.0f} of {total / 1e9:.0f} GB free"

    bench.check("versions", versions)
    size = 256 if bench.tiny else 8192
    a, b = (torch.randn(size, size, device=bench.device, dtype=torch.bfloat16) for _ in range(2))

    def product() -> str:
        bench.product = 2 * size**3 / 1e9 / statistics.median(bench.time_of(lambda: a @ b))
        return f"{bench.product:.1f}"

    bench.check("large product, TFLOP/s", product)
    bench.check("copy, TB/s", lambda: f"{2 * a.nbytes / 1e9 / statistics.median(bench.time_of(a.clone)):.2f}")


# ------------------------------------------------------------------------------------------------------ 1 correctness


def correct(bench: Bench) -> None:
    """Compare the device with the CPU and with recorded values."""

    def golden(name: str) -> str:
        folder = GOLDEN / name
        if not folder.exists():
            raise SkipError(f"{folder} is missing")
        document = json.loads((folder / "config.json").read_text("utf-8"))
        model = build_model(cfg=model_config(document["model_type"], document["model"]))
        model.load_state_dict(torch.load(folder / "checkpoint.pt")["model"])
        trajectory = json.loads((folder / "trajectory.json").read_text("utf-8"))
        tensors = torch.load(folder / "tensors.pt")
        waveforms, mask, exists = (
            tensors[key].to(bench.device) for key in ("train_waveforms", "masks", "attention_mask_keys")
        )
        with kernels.exact_products(bench.device):
            loss = model.to(bench.device).train()(waveforms[0], mask=mask[0], attention_mask=exists[:, None, None])[0]
        return close(loss.mean(), torch.tensor(trajectory["steps"][0]["loss"]), 1e-4)

    for name in ("spidr-tiny", "dinosr-tiny"):
        bench.check(f"golden loss, {name}", partial(golden, name))

    torch.manual_seed(0)
    here = SpidR(bench.model_config(**NO_DROPOUT)).train()
    there, again = copy.deepcopy(here).to(bench.device), copy.deepcopy(here).to(bench.device)
    batch = bench.batch(rows=2, samples=4000 if bench.tiny else 64_000)
    losses: list[Tensor] = []

    def gradients() -> str:
        with kernels.exact_products(bench.device):
            losses.extend(backward(model, batch) for model in (here, there))
        return f"{close(losses[1], losses[0], 1e-4)}, gradients {close(gradient(there), gradient(here), 1e-4)}"

    bench.check("loss and gradients, float32", gradients)
    bench.check("loss, bfloat16", lambda: close(backward(again, batch, "bfloat16"), losses[0], 0.01))
    encoder, reference, last = there.eval(), here.eval(), here.cfg.encoder_num_layers
    waveforms = batch.waveforms

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
        expected = encoder.encode(waveforms, layer=last)[0]
        with patch_tf32():
            return close(encoder.encode(waveforms, layer=last)[0], expected, 1e-5)

    bench.check("features whatever cuDNN's TF32 setting is", tf32, gpu=True)


@contextmanager
def patch_tf32() -> Iterator[None]:
    """TF32 in convolutions, which is PyTorch's default."""
    conv: Any = torch.backends.cudnn
    name, value = "allow_tf32", True
    if hasattr(torch.backends.cuda.matmul, "fp32_precision"):  # from torch 2.9 on
        conv, name, value = torch.backends.cudnn.conv, "fp32_precision", "tf32"  # type: ignore[attr-defined]
    before = getattr(conv, name)
    setattr(conv, name, value)
    try:
        yield
    finally:
        setattr(conv, name, before)


# ------------------------------------------------------------------------------------------------------------- 2 runs


def runs(bench: Bench) -> None:
    """Try every kind of run with a tiny model."""
    tiny = replace(bench, tiny=True)
    plain, padded = tiny.batch(), tiny.batch(padded=True)
    channels = torch.zeros(2, TINY["encoder_embed_dim"], dtype=torch.bool, device=bench.device)
    channels[:, :4] = True

    def trained(*batches: Batch, **options: Any) -> str:
        state = tiny.state(**options)
        losses = []
        for _ in range(3):
            measured = train_step(state, list(batches or (plain,)))
            assert measured is not None
            losses.append(float(measured.loss))
        assert np.isfinite(losses).all(), losses
        return f"loss {losses[0]:.3f} to {losses[-1]:.3f}"

    bench.check("eager", trained)
    bench.check("compiled", lambda: trained(run={"compile": True}), gpu=True)
    bench.check("compiled, both kinds of batch", lambda: trained(plain, padded, run={"compile": True}), gpu=True)
    bench.check("accumulation", lambda: trained(plain, plain))
    bench.check("padding", lambda: trained(padded))
    bench.check("channel mask", lambda: trained(replace(plain, channel_mask=channels)))
    bench.check("group norm", lambda: trained(padded, extractor_mode="group_norm"))
    bench.check("pre-norm", lambda: trained(encoder_layer_norm_first=True))
    bench.check("freeze", lambda: trained(freeze_step=2))
    bench.check("codewords revived", lambda: trained(codebook_revive_after=1))
    bench.check("float32", lambda: trained(dtype="float32"))

    def overflow() -> str:
        state = tiny.state(dtype="float16")
        state.scaler = torch.amp.GradScaler(bench.device.type, init_scale=2.0**40)
        before = [p.clone() for p in state.model.student.parameters()]
        assert train_step(state, [plain]) is None
        assert all(torch.equal(a, b) for a, b in zip(before, state.model.student.parameters(), strict=True))
        return f"scale {state.scaler.get_scale():.0f} after it"

    bench.check("float16, forced overflow", overflow, gpu=True)

    def killed() -> str:
        shutil.rmtree(bench.output / "runs", ignore_errors=True)
        found = []
        for name in ("undisturbed", "killed"):
            cfg = tiny.config(
                run={"wandb_name": name, "save_interval": 2, "log_interval": 2, "use_deterministic": True}
            )
            cfg = replace(cfg, optimizer=replace(cfg.optimizer, max_steps=6))
            if name == "killed":
                path = bench.output / "killed.json"
                path.write_text(json.dumps(to_dict(cfg)), encoding="utf-8")
                status = subprocess.run([sys.executable, __file__, "--kill", str(path)], check=False).returncode
                assert status == -signal.SIGKILL, f"ended with {status} before it was killed"
                assert (cfg.run.dir / "step_2.pt").exists()  # step 4's may be incomplete
            train(cfg, Hooks(loader=noise_loader))
            found.append(torch.load(cfg.run.dir / "final.pt")["model"])
        different = [name for name, value in found[0].items() if not torch.equal(value, found[1][name])]
        assert not different, f"{len(different)} tensors differ, {different[0]} first"
        return "every bit equal, with deterministic algorithms"

    bench.check("killed and resumed", killed)
    bench.check("validation", lambda: f"loss {validate(tiny.state().model, [plain, padded], bench.device)['loss']:.3f}")
    encoder = tiny.state().model.eval()
    bench.check("features", lambda: str(tuple(encoder.encode(plain.waveforms, layer=2)[0].shape)))
    bench.check("units", lambda: str(tuple(encoder.units(plain.waveforms, layer=3)[0].shape)))

    def warm() -> str:
        output = bench.output / "warm" / "warm.pt"
        shutil.rmtree(output.parent, ignore_errors=True)
        with patch("spidr.warm_start.build_dataloader", noise_loader):
            left = warm_start(tiny.config(codebook_init="data"), output, steps=3, device=bench.device.type)
        return f"{left:.2f} of the variance is left; {trained(run={'init_ckpt': str(output)})}"

    bench.check("warm start", warm)


# ---------------------------------------------------------------------------------------------- 3 waiting, 4 processes


def waiting(bench: Bench) -> None:
    """Check that nothing in a step waits for the device."""

    def quiet() -> str:
        state = bench.state()
        batch = bench.batch(padded=True).to("cpu").pin_memory()
        train_step(state, [batch])
        torch.cuda.set_sync_debug_mode("warn")
        try:
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                for _ in range(3):
                    train_step(state, [batch])
        finally:
            torch.cuda.set_sync_debug_mode("default")
        found = Counter(f"{Path(w.filename).name}:{w.lineno}" for w in caught if "synchroniz" in str(w.message))
        assert not found, f"waits at {dict(found)}"
        return "three steps without waiting"

    bench.check("no synchronisation", quiet, gpu=True)


def processes(bench: Bench) -> None:
    """Run one NCCL process (Gloo on a CPU), and DistributedDataParallel around the compiled model, both ways."""

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
        batch, gradients, seconds = bench.batch(rows=2), [], 0.0
        for wraps in (False, True):
            torch._dynamo.reset()
            torch._dynamo.utils.counters.clear()
            state = bench.state(run={"compile": bench.on_gpu}, **NO_DROPOUT)
            torch._dynamo.config.optimize_ddp = splits
            call: Any = state.network
            if wraps:
                call = nn.parallel.DistributedDataParallel(Replica(state.model, state.network))
            start = time.perf_counter()
            with torch.autocast(bench.device.type, torch.bfloat16):
                loss = call(batch.waveforms, **batch.options)[0].mean()
            loss.backward()
            seconds = time.perf_counter() - start
            gradients.append(gradient(state.model))
        graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
        return f"{close(gradients[1], gradients[0], 1e-2)}, first step {seconds:.0f} s, {graphs} graphs"

    bench.check("collectives", collectives)
    splits = torch._dynamo.config.optimize_ddp
    bench.check("DDP, whole graph", lambda: replicated(False))
    bench.check("DDP, split graph", lambda: replicated(True), gpu=True)
    torch._dynamo.config.optimize_ddp = splits
    if dist.is_initialized():
        dist.destroy_process_group()


# ----------------------------------------------------------------------------------------------------------- 5 pieces


def pieces(bench: Bench) -> None:
    """Time each part of a step on its own, in bfloat16."""
    device, dtype = bench.device, torch.bfloat16
    rows, frames, dim, groups = (2, 99, 32, 4) if bench.tiny else (16, 741, 768, 16)

    def random(*shape: int, grad: bool = False) -> Tensor:
        return torch.randn(*shape, device=device, dtype=dtype, requires_grad=grad)

    def both(function: Callable[..., Tensor], *inputs: Tensor) -> Callable[[], object]:
        return lambda: torch.autograd.grad(function(*inputs).square().sum(), inputs)

    conv = nn.Conv1d(dim, dim, 19, padding=9, groups=groups, device=device, dtype=dtype)
    x = random(rows, dim, frames, grad=True)
    weights = (x, *conv.parameters())
    bench.check(
        "positional convolution, forward and backward",
        lambda: bench.milliseconds(both(lambda x, *_: conv(x), *weights)),
    )

    def by_products(chunk: int) -> str:
        def convolve(x: Tensor, *_: Tensor) -> Tensor:
            return kernels.convolve_by_products(x, conv.weight, conv.bias, 9, groups, chunk=chunk)

        return f"{bench.milliseconds(both(convolve, *weights))}, {close(convolve(x), conv(x), 0.02)}"

    for chunk in (8, 16, 32):
        bench.check(f"the same as a batched product of {chunk} frames", partial(by_products, chunk))
    width, long = (16, 3200) if bench.tiny else (512, rows * 47_487)
    grad, taps, split = random(long, width), random(long, 10), 8
    padded = F.pad(taps, (0, 6))
    bench.check("first layer's weight gradient", lambda: bench.milliseconds(lambda: taps.T @ grad))
    bench.check("the same, kernel padded to 16", lambda: bench.milliseconds(lambda: padded.T @ grad))
    bench.check(
        "the same, split and summed",
        lambda: bench.milliseconds(lambda: torch.bmm(taps.view(split, -1, 10).mT, grad.view(split, -1, width)).sum(0)),
    )
    for layer, (kernel_size, length) in enumerate(((3, long), (3, long // 2), (2, long // 16)), start=2):
        length -= length % 4
        signal_, weight = random(1, width, length), random(width, width, kernel_size)
        last = signal_.transpose(1, 2).contiguous()
        pairs, parts = last.view(-1, 2 * width), weight.permute(2, 1, 0).flatten(0, 1).split(2 * width)

        def products(pairs: Tensor = pairs, parts: Any = parts) -> Tensor:
            out = pairs @ parts[0]
            if len(parts) > 1:
                out[:-1].addmm_(pairs[1:, : pairs.shape[1] // 2], parts[1])
            return out

        ways: dict[str, Callable[[], object]] = {
            "products": products,
            "channels last": partial(F.conv1d, last.transpose(1, 2), weight, stride=2),
            "channels first": partial(F.conv1d, signal_, weight, stride=2),
        }
        for name, function in ways.items():
            bench.check(f"extractor layer {layer}, {name}", partial(bench.milliseconds, function))

    def attention(length: int, backend: str) -> str:
        heads, size = (4, 8) if bench.tiny else (12, 64)
        q = random(3, rows, heads, length, size)
        with sdpa_kernel(getattr(SDPBackend, backend)):
            try:
                return bench.milliseconds(lambda: F.scaled_dot_product_attention(*q, dropout_p=0.1))
            except RuntimeError as error:
                raise SkipError(first_line(error)) from None

    for length in (frames, -(-frames // 8) * 8):
        for backend in ("FLASH_ATTENTION", "EFFICIENT_ATTENTION", "CUDNN_ATTENTION", "MATH"):
            bench.check(f"attention, T = {length}, {backend.lower()}", partial(attention, length, backend))

    def product(n: int, k: int) -> str:
        a, b = random(rows * frames, k), random(k, n)
        return f"{2 * rows * frames * k * n / 1e9 / statistics.median(bench.time_of(lambda: a @ b)):.0f} TFLOP/s"

    hidden = 64 if bench.tiny else 3072
    for n, k in ((3 * dim, dim), (dim, dim), (hidden, dim), (dim, hidden)):
        bench.check(f"product {rows * frames} x {k} x {n}", partial(product, n, k))
    state = bench.state()
    model, batch = state.model, bench.batch(rows=2)
    backward(model, batch, "bfloat16")
    parameters = [p for p in model.parameters() if p.grad is not None]
    masked = batch.mask_indices.numel()  # type: ignore[union-attr]
    targets = torch.randn(model.num_codebooks, masked, model.cfg.encoder_embed_dim, device=device)
    labels = torch.randint(model.cfg.codebook_size, targets.shape[:2], device=device)
    predicted = torch.rand(model.num_codebooks, model.cfg.codebook_size, device=device)
    loss = torch.rand(masked, device=device)
    for what, function in {
        "AdamW": state.optimizer.step,
        "teacher and codebooks": partial(model.update_ema, 1),
        "clipping": partial(nn.utils.clip_grad_norm_, parameters, 10.0),
        "statistics": partial(model.statistics.add, targets, labels, predicted, loss),
    }.items():
        bench.check(what, partial(bench.milliseconds, function))


# ------------------------------------------------------------------------------------------------------ 6 whole steps


def whole_step(bench: Bench) -> None:
    """Measure time, memory and utilisation of a training step."""
    batch = bench.batch()
    mask = batch.mask_indices
    assert mask is not None
    tflop = len(mask) * step_flops(bench.model_config(), batch.waveforms.shape[1], mask.shape[1]) / 1e12
    peak = peak_tflops(torch.cuda.get_device_name(), "bfloat16") if bench.on_gpu else None

    def measured(state: State, prefix: str, *batches: Batch) -> None:
        if bench.on_gpu:
            torch.cuda.reset_peak_memory_stats()
        order = iter(batches * 40)
        times: list[float] = []

        def milliseconds() -> str:
            times.extend(bench.time_of(lambda: train_step(state, [next(order)]), 30 if len(batches) > 1 else 10))
            return f"{statistics.median(times):.1f}, p90 {sorted(times)[int(0.9 * (len(times) - 1))]:.1f}"

        bench.check(f"{prefix}, ms a step", milliseconds)
        if not times or len(batches) > 1:
            return
        step = statistics.median(times) / 1000
        shares = [
            f"{100 * tflop / step / most:.1f} % of {what}"
            for what, most in (("the data sheet", peak), ("the measured product", bench.product))
            if most
        ]
        bench.check(f"{prefix}, audio seconds a second", lambda: f"{batch.num_samples / 16_000 / step:,.0f}")
        bench.check(f"{prefix}, MFU", lambda: ", ".join([f"{tflop / step:.3g} TFLOP/s", *shares]))
        bench.check(f"{prefix}, memory, GB", lambda: f"{torch.cuda.max_memory_allocated() / 1e9:.1f}", gpu=True)

    measured(bench.state(), "eager", batch)
    frozen = bench.state()
    frozen.model.freeze_extractor()
    measured(frozen, "eager, frozen extractor", batch)
    del frozen

    states: list[State] = []

    def compiled() -> str:
        torch._dynamo.reset()
        torch._dynamo.utils.counters.clear()
        stats = torch._dynamo.utils.counters["stats"]
        state = bench.state(run={"compile": True})
        states.append(state)
        start = time.perf_counter()
        train_step(state, [batch])
        torch.cuda.synchronize()
        taken = time.perf_counter() - start
        measured(state, "compiled", batch)
        lengths = np.random.default_rng(1).integers(160_000, 320_000, size=30).tolist()
        batches = [bench.batch(i, 237_440 * 16 // length, length) for i, length in enumerate(lengths)]
        before = stats["unique_graphs"]
        measured(state, "compiled, 30 lengths", *batches)
        graphs = stats["unique_graphs"]
        assert graphs == before, f"{graphs - before} recompilations over 30 lengths"
        return f"{taken:.0f} s to compile, {graphs} graphs, none more over 30 lengths"

    bench.check("compilation", compiled, gpu=True)

    def loaded(*, pinned: bool) -> str:
        state, times = states[-1] if states else bench.state(), []
        shapes, width = state.model.cfg.extractor_conv_layer_config, state.model.cfg.encoder_embed_dim
        with patch.object(Noise, "pageable", not pinned):
            state.loader = noise_loader(state.cfg.data, state.cfg.masking, conv_layer_config=shapes, channels=width)
            rounds = state.rounds()
            try:
                for _ in range(23 if bench.on_gpu else 3):
                    start = time.perf_counter()
                    measured = train_step(state, next(rounds))
                    assert measured is not None
                    float(measured.loss)
                    times.append(1000 * (time.perf_counter() - start))
            finally:
                state.loader.close()
        return f"{statistics.median(times[2:]):.1f} ms a step with its batch and the read-back of the loss"

    bench.check("from the loader, pinned", partial(loaded, pinned=True))
    bench.check("from the loader, pageable", partial(loaded, pinned=False))

    def published() -> str:
        if bench.published is None:
            raise SkipError("--published FOLDER names no spidr 0.1.2")
        inputs = bench.output / "batch.pt"
        settings = asdict(bench.model_config()) if bench.tiny else {}
        torch.save([batch.waveforms.cpu(), mask.cpu(), settings], inputs)
        command = [sys.executable, "-c", PUBLISHED, str(bench.published), str(inputs), bench.device.type]
        environ = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
        done = subprocess.run(command, check=False, capture_output=True, text=True, env=environ)
        assert done.returncode == 0, done.stderr[-300:]
        return done.stdout.strip()

    bench.check("the published package on the same batch", published)


PUBLISHED = """
import inspect, statistics, sys, time
folder, inputs, device = sys.argv[1:]
sys.path.insert(0, folder)
import torch
from importlib.metadata import version
from spidr.config import SpidRConfig
from spidr.models import SpidR
waveforms, mask, settings = torch.load(inputs)
known = inspect.signature(SpidRConfig).parameters
model = SpidR(SpidRConfig(**{k: v for k, v in settings.items() if k in known})).to(device).train()
waveforms, mask = waveforms.to(device), mask.to(device)
optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=5e-4, fused=True)
times, gpu = [], device == "cuda"
call = torch.compile(model, dynamic=True) if gpu else model
options = {"mask_indices": mask}
if "mask" in inspect.signature(model.forward).parameters:
    probe = torch.zeros(1, waveforms.shape[1], device=device)
    with torch.no_grad():
        frames = model.feature_extractor(probe)
    frames = (frames[0] if isinstance(frames, tuple) else frames).shape[1]
    options = {"mask": torch.zeros(len(mask), frames, dtype=torch.bool, device=device).scatter_(1, mask, True)}
for step in range(12 if gpu else 3):
    start = time.perf_counter()
    with torch.autocast(device, torch.bfloat16):
        loss = call(waveforms, **options)[0].mean()
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 10.0)
    optimizer.step()
    optimizer.zero_grad()
    model.update_ema(step + 1)
    loss.item()
    if gpu:
        torch.cuda.synchronize()
    times.append(1000 * (time.perf_counter() - start))
memory = f", {torch.cuda.max_memory_allocated() / 1e9:.1f} GB" if gpu else ""
print(f"spidr {version('spidr')}: {statistics.median(times[2:]):.1f} ms a step{memory}, loss {loss.item():.3f}")
"""
"""A step of the published package, written as its users do, compiled on a GPU."""


# ---------------------------------------------------------------------------------------------------------- 7 profile


def profile(bench: Bench) -> None:
    """Profile two steps."""

    def two_steps() -> str:
        state, batch = bench.state(run={"compile": bench.on_gpu}), bench.batch()
        for _ in range(2):
            train_step(state, [batch])
        activities = [torch.profiler.ProfilerActivity.CPU]
        if bench.on_gpu:
            activities.append(torch.profiler.ProfilerActivity.CUDA)
            torch.cuda.synchronize()
        start = time.perf_counter()
        with torch.profiler.profile(activities=activities) as found:
            for _ in range(2):
                train_step(state, [batch])
            if bench.on_gpu:
                torch.cuda.synchronize()
        elapsed = time.perf_counter() - start
        found.export_chrome_trace(str(bench.output / "trace.json.gz"))
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
    """Guess from a kernel's name what it is for."""
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
    """Counts operations that start a kernel, and the bytes that they read and write."""

    def __init__(self) -> None:
        super().__init__()
        self.kernels, self.bytes = Counter[str](), 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Count an operation unless it only returns a view."""
        out = func(*args, **(kwargs or {}))
        is_kernel = func.namespace == "aten" and not func.is_view
        if is_kernel and not any(part in func.name() for part in ("empty", "detach", "_unsafe_view", "sym_")):
            tensors = [x for x in torch.utils._pytree.tree_leaves((args, kwargs, out)) if isinstance(x, Tensor)]
            self.kernels[func.overloadpacket.__name__] += 1
            self.bytes += sum(x.numel() * x.element_size() for x in tensors)
        return out


def count(bench: Bench) -> str:
    """Kernels and bytes of a training step in eager mode, with attention in one operation.

    The tensors have no values and are on the CPU (without a GPU there is no backward pass on CUDA); the code is what a
    GPU runs. An operation on a list of tensors counts as one kernel.
    """
    parts = {name: Traffic() for name in ("forward", "backward", "clipping and AdamW", "teacher and codebooks")}
    with FakeTensorMode(), patch.object(kernels, "is_lean", lambda _: False):
        model, batch = SpidR(bench.model_config(encoder_attention_dropout=0.0)).train(), bench.batch()
        model.defer_codebook_updates = True
        optimizer, _, _ = build_optimizer(model, OptimizerConfig())
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        with parts["forward"], torch.autocast("cpu", torch.bfloat16):
            loss = model(batch.waveforms, **batch.options)[0].mean()
        with parts["backward"]:
            loss.backward()
        optimizer.step()  # the first step creates the optimizer's state
        with parts["clipping and AdamW"]:
            nn.utils.clip_grad_norm_(parameters, 10.0, foreach=True)  # as on a GPU
            optimizer.step()
        with parts["teacher and codebooks"]:
            model.update_ema(1)
    lines = []
    for name, part in parts.items():
        lines.append(f"{name}: {part.kernels.total():,} kernels, {part.bytes / 1e9:.1f} GB")
        lines.append("    " + ", ".join(f"{key} {number}" for key, number in part.kernels.most_common(12)))
    total, size = sum(part.kernels.total() for part in parts.values()), sum(part.bytes for part in parts.values())
    return "\n".join([*lines, f"step: {total:,} kernels, {size / 1e9:.1f} GB"])


SECTIONS = (machine, correct, runs, waiting, processes, pieces, whole_step, profile)


def be_killed(path: str) -> None:
    """Train until the fifth step."""

    def after_step(state: State) -> None:
        if state.step == 5:
            os.kill(os.getpid(), signal.SIGKILL)

    train(read_config(path), Hooks(loader=noise_loader, after_step=after_step))


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("gpu-check"), help="folder for gpu.json and the trace")
    parser.add_argument("--sections", type=int, nargs="+", choices=range(len(SECTIONS)), default=range(len(SECTIONS)))
    parser.add_argument("--published", type=Path, help="folder with spidr 0.1.2")
    parser.add_argument("--tiny", action="store_true", help="tiny shapes")
    parser.add_argument("--count", action="store_true", help="print kernels and bytes of a step; needs no GPU")
    parser.add_argument("--kill", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.kill:
        be_killed(args.kill)
    if args.count:
        print(count(Bench(Environment.alone("cpu"), args.tiny, args.output)))
        return
    args.output.mkdir(parents=True, exist_ok=True)
    env = Environment.alone()
    bench = Bench(env, args.tiny or env.device.type != "cuda", args.output, args.published)
    for number in args.sections:
        run_section(bench, number)
    print("\n| section | check | | |\n| --- | --- | --- | --- |")
    for result in bench.results:
        print(f"| {result.section} | {result.what} | {result.status} | {result.detail} |")
    failed = sum(result.status == "FAIL" for result in bench.results)
    print(f"\n{len(bench.results)} checks, {failed} failed, {time.monotonic() - bench.begin:.0f} s")
    sys.exit(min(1, failed))


def run_section(bench: Bench, number: int) -> None:
    """Run a section and save the results so far."""
    section = SECTIONS[number]
    bench.section = f"{number} {section.__name__}"
    try:
        # As in a run; features must be right whatever the caller's settings are.
        with nullcontext() if section is correct else environment("auto"):
            section(bench)
    except Exception as caught:
        reason = f"{type(caught).__name__}: {first_line(caught)}"
        bench.results.append(Result(bench.section, "the section", "FAIL", reason))
        print(f"FAIL  {bench.section}: {reason}", flush=True)
    if bench.on_gpu:
        torch.cuda.empty_cache()
    found = json.dumps([asdict(result) for result in bench.results], indent=1)
    (bench.output / "gpu.json").write_text(found, encoding="utf-8")


if __name__ == "__main__":
    main()
