"""Compare the speed of this package, the published ones (0.1.2, 0.2.0) and HuBERT in ``transformers``.

    python benchmarks/speed.py [--published PYTHON ...] [--rows NAME ...] [--dtypes NAME ...] [--size SIZE]

Each system has its own process for the whole run. They take turns on the same inputs, and the table shows medians.
``--published`` names Pythons of environments with published versions: each gets our model's weights from a checkpoint,
and its features and loss are compared with ours. HuBERT-base, with random weights and a masked-prediction loss, takes
part if ``transformers`` is installed. The limit is the speed of a large matrix product, with the faster of MKL and
oneDNN, measured in between. Memory is that of two steps in a fresh process, beyond what its imports took. bfloat16
(autocast) is measured if the machine multiplies it natively, or on request. This package keeps its memory, as its
training command does.

``--processor-time`` counts processor seconds of one thread, for a machine with other work. ``--size`` selects the quick
start's shape, or one so small that Python's own time matters. ``--compile`` adds this package under ``torch.compile``.
A run with HuBERT and one published version needs less than 20 GB.
"""

from __future__ import annotations

import argparse
import importlib.util
import inspect
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

SIZES: dict[str, dict[str, Any]] = {
    "base": {},
    "quickstart": {
        "extractor_mode": "group_norm",
        "extractor_conv_layer_config": [(64, 10, 5), *[(64, 3, 2)] * 4, *[(64, 2, 2)] * 2],
        "encoder_embed_dim": 192,
        "encoder_num_layers": 3,
        "encoder_num_heads": 4,
        "encoder_ff_interm_features": 768,
        "encoder_dropout": 0.0,
        "encoder_attention_dropout": 0.0,
        "num_codebooks": 2,
        "codebook_size": 64,
    },
    "tiny": {
        "extractor_conv_layer_config": [(32, 10, 5), *[(32, 3, 2)] * 4, *[(32, 2, 2)] * 2],
        "encoder_embed_dim": 48,
        "encoder_pos_conv_groups": 4,
        "encoder_num_layers": 8,
        "encoder_num_heads": 4,
        "encoder_ff_interm_features": 96,
        "num_codebooks": 4,
        "codebook_size": 16,
    },
}
"""Settings of the models."""

LENGTHS = {"base": (8, (3, 6, 10, 15)), "quickstart": (5, (3, 6, 10)), "tiny": (1, (1, 2))}
"""Durations of the four utterances of a step, and of single utterances, in seconds."""

TIMES = {"base": 1, "quickstart": 5, "tiny": 20}
"""Repetitions within a system's turn: small work takes longer right after a pause."""

ROWS = ("step", "features", "units", "memory")
TARGETS = {"step": 2.0, "features": 1.7, "units": 2.4, "memory": 1 / 0.6}
TITLES = {
    "step": "training step, 4 x {0:g} s (s)",
    "features": "features of all layers, utterances of {1} s (s)",
    "units": "units of layer 6, the same utterances (s)",
    "memory": "peak memory of two steps (GB)",
}


def inputs(size: str) -> tuple[Tensor, Tensor, list[Tensor]]:
    """A batch with its masked frames, and single utterances."""
    generator = torch.Generator().manual_seed(0)
    seconds, lengths = LENGTHS[size]
    batch = torch.randn(4, seconds * 16_000, generator=generator)
    frames = (seconds * 16_000 - 400) // 320 + 1
    mask = torch.zeros(4, frames, dtype=torch.bool)
    for row in mask:
        row[torch.randperm(frames, generator=generator)[: frames * 55 // 100]] = True
    return batch, mask, [torch.randn(1, length * 16_000, generator=generator) for length in lengths]


class Spidr:
    """SpidR from the installed ``spidr``, through names that all versions have."""

    def __init__(self, size: str, *, compiled: bool) -> None:
        from spidr.config import OptimizerConfig, SpidRConfig
        from spidr.models import SpidR
        from spidr.optimizer import build_optimizer

        torch.manual_seed(0)
        self.cfg = SpidRConfig(**SIZES[size])
        self.model = SpidR(self.cfg).train()
        self.optimizer = build_optimizer(self.model, OptimizerConfig(dtype="float32"))[0]
        self.stops_early = hasattr(self.model, "units")
        self.call: Callable[..., Any] = self.model
        self.all_layers: Callable[..., Any] = self.model.get_intermediate_outputs
        self.layer: Callable[..., Any] = self.model.units if self.stops_early else self.model.get_codebooks
        if compiled:
            self.call = torch.compile(self.call)
            self.all_layers, self.layer = (torch.compile(f, dynamic=True) for f in (self.all_layers, self.layer))
        self.steps = 0
        self.best = min(6, self.cfg.encoder_num_layers)

    def step(self, batch: Tensor, mask: Tensor, autocast: torch.autocast) -> None:
        """Forward, backward, clipping, AdamW and the teacher."""
        self.model.train()
        with autocast:
            loss, _ = self.call(batch, **self.masked(mask))
        loss.mean().backward()
        parameters = [p for group in self.optimizer.param_groups for p in group["params"] if p.grad is not None]
        nn.utils.clip_grad_norm_(parameters, 10.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.steps += 1
        self.model.update_ema(self.steps)

    def masked(self, mask: Tensor) -> dict[str, Tensor]:
        """The masked frames, in the form that this version takes."""
        if "mask" in inspect.signature(self.model.forward).parameters:
            return {"mask": mask}
        return {"mask_indices": mask.nonzero()[:, 1].view(len(mask), -1)}

    def features(self, x: Tensor) -> list[Tensor]:
        """Of all layers."""
        return self.all_layers(x)

    def units(self, x: Tensor) -> Tensor:
        """Of layer 6, or of the last one."""
        if self.stops_early:
            return self.layer(x, layer=self.best, normalize=False)[0]
        return self.layer(x)[self.best - 1].argmax(-1)


class Hubert:
    """HuBERT-base with random weights."""

    def __init__(self, size: str) -> None:
        from transformers import HubertConfig, HubertModel

        torch.manual_seed(0)
        ours = SIZES[size]
        smaller = (
            {
                "hidden_size": ours["encoder_embed_dim"],
                "num_hidden_layers": ours["encoder_num_layers"],
                "num_attention_heads": ours["encoder_num_heads"],
                "intermediate_size": ours["encoder_ff_interm_features"],
                "conv_dim": [width for width, _, _ in ours["extractor_conv_layer_config"]],
                "num_conv_pos_embedding_groups": ours.get("encoder_pos_conv_groups", 16),
            }
            if ours
            else {}
        )
        cfg = HubertConfig(**smaller)
        self.model = HubertModel(cfg).train()
        self.head = nn.Linear(cfg.hidden_size, 504)
        self.parameters = [*self.model.parameters(), *self.head.parameters()]
        self.optimizer = torch.optim.AdamW(self.parameters, lr=5e-4, fused=True)

    def step(self, batch: Tensor, mask: Tensor, autocast: torch.autocast) -> None:
        """Masked prediction of one of 504 classes, clipping and AdamW."""
        self.model.train()
        with autocast:
            hidden = self.model(batch, mask_time_indices=mask).last_hidden_state
            logits = self.head(hidden[mask])
        labels = torch.arange(len(logits)) % 504
        nn.functional.cross_entropy(logits.float(), labels).backward()
        nn.utils.clip_grad_norm_(self.parameters, 10.0)
        self.optimizer.step()
        self.optimizer.zero_grad()

    def features(self, x: Tensor) -> list[Tensor]:
        """Of all layers."""
        return list(self.model(x, output_hidden_states=True).hidden_states)


def worker(system: str, size: str, folder: Path, clock: Callable[[], float]) -> None:
    """Answer requests, one per line, until there are no more."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # what libraries print must not mix with answers
    if system == "here":
        from spidr.tools.threads import keep_memory

        keep_memory()  # as training does
    batch, mask, utterances = inputs(size)
    __import__("transformers.models.hubert.modeling_hubert" if system == "hubert" else "spidr.models")
    before = _peak_memory()
    subject: Any = Hubert(size) if system == "hubert" else Spidr(size, compiled=system == "compiled")
    weights = folder / "weights.pt"
    if system == "here" and not weights.exists():
        torch.save(subject.model.state_dict(), weights)
    elif system != "hubert":
        subject.model.load_state_dict(torch.load(weights, weights_only=True))
    for line in sys.stdin:
        task, dtype = json.loads(line)
        autocast = torch.autocast("cpu", torch.bfloat16, enabled=dtype == "bfloat16")
        start = clock()
        if task == "step":
            for _ in range(TIMES[size]):
                subject.step(batch, mask, autocast)
        elif task == "compare":
            subject.model.eval()
            with torch.no_grad():
                loss = subject.model(batch, **subject.masked(mask))[0]
                found = [torch.stack(subject.features(utterances[0])), loss]
            torch.save(found, folder / f"{system}.pt")
        elif task in ("features", "units"):
            subject.model.eval()
            with torch.no_grad(), autocast:
                for x in utterances * TIMES[size]:
                    getattr(subject, task)(x)
        elapsed = (clock() - start) / TIMES[size]
        answers.write(json.dumps((_peak_memory() - before) / 1e9 if task == "memory" else elapsed) + "\n")
        answers.flush()


def _peak_memory() -> int:
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


class Process:
    """A system in its own process."""

    def __init__(self, python: str, system: str, args: argparse.Namespace, folder: Path) -> None:
        command = [python, __file__, "--worker", system, "--folder", str(folder), "--size", args.size]
        command += ["--processor-time"] if args.processor_time else []
        # Otherwise the other environment would measure this package.
        environ = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
        environ |= {"OMP_NUM_THREADS": "1"} if args.processor_time else {}
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environ)

    def ask(self, task: str, dtype: str = "float32") -> float:
        """Seconds for a task, or GB for "memory"."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        time.sleep(0.3)  # OpenMP's threads in the process that has just answered spin for 0.2 s
        self.process.stdin.write(json.dumps([task, dtype]) + "\n")
        self.process.stdin.flush()
        answer = self.process.stdout.readline()
        if not answer:
            raise SystemExit(f"{' '.join(map(str, self.process.args))} ended early")  # type: ignore[arg-type]
        return float(json.loads(answer))

    def close(self) -> None:
        """End it."""
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()


def matrix_product(dtype: str, size: int, clock: Callable[[], float]) -> float:
    """TFLOP/s of a square matrix product, with the faster of PyTorch's own library and oneDNN."""
    a, b = (torch.randn(size, size, dtype=getattr(torch, dtype)) for _ in range(2))
    ways: list[Callable[[], Tensor]] = [lambda: a @ b]
    if hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        ways.append(lambda: torch.ops.mkldnn._linear_pointwise(a, b, None, "none", [], ""))
    taken = []
    for product in ways:
        product()
        start = clock()
        product()
        taken.append(clock() - start)
    return 2 * size**3 / min(taken) / 1e12


def clock_of(args: argparse.Namespace) -> Callable[[], float]:
    """The clock."""
    return time.process_time if args.processor_time else time.perf_counter


def version_of(python: str) -> str:
    """``spidr`` and its version in an environment."""
    code = "import importlib.metadata as m; print('spidr', m.version('spidr'))"
    return subprocess.run([python, "-c", code], check=True, capture_output=True, text=True).stdout.strip()


def step_tflop(size: str) -> float:
    """TFLOP of a training step, by the formula that training logs."""
    from spidr.config import SpidRConfig
    from spidr.models.flops import step_flops

    batch, mask, _ = inputs(size)
    cfg = SpidRConfig(**SIZES[size])
    return sum(step_flops(cfg, batch.shape[1], int(row.sum())) for row in mask) / 1e12


def measure(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Measure all that was asked for: {"times": {dtype: {row: {system: [...]}}}, ...}."""
    pythons = {"here": sys.executable}
    pythons |= {version_of(python): python for python in args.published}
    if importlib.util.find_spec("transformers") and not args.no_hubert:
        pythons["hubert"] = sys.executable
    if args.compile:
        pythons["compiled"] = sys.executable
    results: dict[str, Any] = {"times": {}, "peaks": {}, "compile_seconds": {}, "differences": {}}
    processes = {}
    for system, python in pythons.items():
        processes[system] = Process(python, system, args, folder)
        if system != "hubert":
            processes[system].ask("compare")  # the first system writes the weights that the others read
    versions = [name for name in processes if name.startswith("spidr ")]
    for version in versions:
        ours, theirs = (torch.load(folder / f"{name}.pt", weights_only=True) for name in ("here", version))
        results["differences"][version] = {
            name: float((a - b).abs().max()) for name, a, b in zip(("features", "loss"), ours, theirs, strict=True)
        }
    for dtype in args.dtypes:
        rows = results["times"].setdefault(dtype, {})
        peaks = results["peaks"].setdefault(dtype, [])
        for row in (r for r in args.rows if r != "memory"):
            times = rows.setdefault(row, {name: [] for name in processes if (name, row) != ("hubert", "units")})
            for repetition in range(args.repeat + 1):
                peaks.append(matrix_product(dtype, 3072 if args.size == "base" else 512, clock_of(args)))
                for name, process in processes.items():
                    if name in times:
                        taken = process.ask(row, dtype)
                        print(f"{dtype} {row} {name} {taken:.2f} s, matrix product {peaks[-1]:.3f}", file=sys.stderr)
                        if repetition:  # the first one warms up
                            times[name].append(taken)
                        elif name == "compiled":
                            results["compile_seconds"][f"{row}, {dtype}"] = taken
    for process in processes.values():
        process.close()
    if "memory" in args.rows:
        for dtype in args.dtypes:
            memory = results["times"][dtype].setdefault("memory", {})
            for system, python in pythons.items():
                process = Process(python, system, args, folder)
                for _ in range(2):
                    process.ask("step", dtype)
                memory[system] = [process.ask("memory")]
                process.close()
    return results


def table(results: dict[str, Any], size: str) -> str:
    """Markdown."""
    batch, _, utterances = inputs(size)
    lengths = [len(x[0]) // 16_000 for x in utterances]
    found = {name for rows in results["times"].values() for times in rows.values() for name in times}
    versions = sorted(name for name in found if name.startswith("spidr "))
    systems = ["here", "compiled", *versions, "hubert"]
    lines = [
        f"| work | {' | '.join(systems)} | {versions[-1] if versions else 'published'} / here | target |",
        "| --- |" + " --- |" * (len(systems) + 2),
    ]
    for dtype, rows in results["times"].items():
        for row, times in rows.items():
            medians = {name: statistics.median(values) for name, values in times.items()}
            ratio = medians[versions[-1]] / medians["here"] if versions and versions[-1] in medians else None
            title = TITLES[row].format(batch.shape[1] / 16_000, f"{lengths[0]} to {lengths[-1]}")
            cells = [f"{medians[name]:.3g}" if name in medians else "" for name in systems]
            cells += [f"{ratio:.2f}" if ratio else "", f"{TARGETS[row]:.2f}" if dtype == "float32" else ""]
            lines.append(f"| {title}, {dtype} | {' | '.join(cells)} |")
        if "step" in rows:
            peak = statistics.median(results["peaks"][dtype])
            shares = [
                f"{100 * step_tflop(size) / statistics.median(rows['step'][name]) / peak:.0f} %"
                if name in rows["step"] and name != "hubert"
                else ""
                for name in systems
            ]
            target = "65 %" if dtype == "float32" else ""
            lines.append(f"| share of {peak:.3f} TFLOP/s, {dtype} | {' | '.join(shares)} | | {target} |")
    return "\n".join(lines)


def main() -> None:
    """Run the command line."""
    native = ["float32", "bfloat16"] if torch.ops.mkldnn._is_mkldnn_bf16_supported() else ["float32"]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--published", nargs="+", default=[], help="pythons of environments with published versions")
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=list(ROWS))
    parser.add_argument("--dtypes", nargs="+", choices=["float32", "bfloat16"], default=native)
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--compile", action="store_true", help="also measure torch.compile")
    parser.add_argument("--no-hubert", action="store_true", help="leave HuBERT out")
    parser.add_argument("--json", type=Path, help="write every measurement here")
    parser.add_argument("--size", choices=SIZES, default="base", help="shape of the model")
    parser.add_argument("--processor-time", action="store_true", help="processor seconds of one thread")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        worker(args.worker, args.size, args.folder, clock_of(args))
        return
    if args.processor_time:
        torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        results = measure(args, Path(folder))
    machine = [line.split(":")[1].strip() for line in _cpuinfo() if line.startswith("model name")]
    results["machine"] = (
        f"{machine[0] if machine else platform.processor()}, {torch.backends.cpu.get_cpu_capability()}, "
        f"{torch.get_num_threads()} threads, torch {torch.__version__}"
    )
    print(results["machine"])
    if results["differences"]:
        print("largest differences from published versions:", results["differences"])
    if results["compile_seconds"]:
        first = ", ".join(f"{seconds:.0f} s ({row})" for row, seconds in results["compile_seconds"].items())
        print(f"compiled for the first time: {first}")
    print(table(results, args.size))
    if args.json:
        args.json.write_text(json.dumps(results, indent=1), encoding="utf-8")


def _cpuinfo() -> list[str]:
    path = Path("/proc/cpuinfo")
    return path.read_text("utf-8").splitlines() if path.exists() else []


if __name__ == "__main__":
    main()
