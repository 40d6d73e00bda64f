"""A run's folder and record: checkpoints, metrics, validation, progress, and going on from where it stopped."""

from __future__ import annotations

import json
import logging
import math
import resource
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, cast

import torch
from torch import Tensor
from tqdm import tqdm

from spidr.checkpoint import Checkpointer, read_checkpoint
from spidr.config import Config, to_dict
from spidr.environment import Environment
from spidr.models.flops import peak_tflops
from spidr.tools.collapse import CollapseWatch
from spidr.tools.errors import InputError
from spidr.tools.files import atomic_write, remove_unfinished
from spidr.tools.logging import run_log
from spidr.tools.metrics import Means, MetricsFile, read_metrics
from spidr.tools.profiler import StepProfiler
from spidr.tools.readback import Readback
from spidr.tools.wandb import WandbSink, wandb_mode
from spidr.validate import layer_names, validate_set
from spidr.validation_jobs import ValidationJobs, validates_in_jobs

if TYPE_CHECKING:
    from spidr.data import Batch
    from spidr.train import State

logger = logging.getLogger(__name__)

T = TypeVar("T")
NOT_AVERAGED = ("lr", "ema_decay")
PER_CODEBOOK = {"target_ppls": "target_ppl", "pred_ppls": "pred_ppl", "active_codewords": "active_codewords"}


class Run:
    """What surrounds the training loop.

    Every method is called by all processes at the same steps; the main one writes. Nothing is written before
    :meth:`begin`.

    Attributes:
        must_stop: Whether a stop signal has reached any process; the same on all of them.
    """

    def __init__(self, cfg: Config, env: Environment) -> None:
        self.cfg, self.env, self.folder = cfg, env, cfg.run.dir
        self.must_stop = False
        self.checkpointer = Checkpointer(
            self.folder, cfg.run.save_interval, cfg.run.keep_latest, disable=not env.is_main
        )
        self.profiler = StepProfiler(self.folder / "trace.html", enabled=cfg.run.profile and env.is_main)
        self._collapse = CollapseWatch(cfg.run.collapse_share, cfg.run.collapse_steps, cfg.model.codebook_size)
        self._means = Means()
        self._latest: dict[str, float] = {}
        self._readback = Readback(env.device)
        self._rows_in_flight: dict[int, Tensor] = {}
        self._clock = _Clock()
        self._stack = ExitStack()
        self._open_log = self._stack.enter_context(run_log(env.rank))
        self._stack.callback(self.profiler.stop)

    def close(self) -> None:
        """Close everything, whatever has happened."""
        self._stack.close()

    def _on_main(self, function: Callable[[], T]) -> T:
        """Do something on the main process and tell all what came of it, so that no one waits for one that failed."""
        result, error = None, None
        if self.env.is_main:
            try:
                result = function()
            except InputError as caught:
                error = str(caught)
        result, error = self.env.broadcast_object((result, error))
        if error is not None:
            raise InputError(error)
        return cast("T", result)

    # ------------------------------------------------------------------------------------------------- beginning

    def find_checkpoint(self) -> Path | None:
        """The newest valid checkpoint of the folder, None for a new run."""
        return self._on_main(self.checkpointer.find_latest)

    def restore(self, state: State, path: Path) -> None:
        """Go on from a checkpoint."""
        checkpoint = read_checkpoint(path)
        state.step = checkpoint["step"]
        state.freeze_if_due()
        self._hand_over(state)
        self.checkpointer.restore(path, checkpoint)
        state.epoch, extra = self.checkpointer.epoch, self.checkpointer.extra
        if "position" in extra:
            # In batches, so that other numbers of processes go on from the same place.
            state.position = extra["position"] // self._batches_per_step(state)
            try:
                self._means = Means({name: [float(total), int(n)] for name, (total, n) in extra["means"].items()})
                for codebook, idle in zip(state.model.codebooks, extra.get("idle", ()), strict=False):
                    cast("Tensor", codebook.idle).copy_(idle)
            except (KeyError, RuntimeError, TypeError, ValueError) as error:
                raise InputError(f"{path}: 'means' or 'idle' is not what a run has saved ({error})") from error
        else:
            logger.warning("%s does not say which data it had seen: going on with the next epoch", path)
            state.epoch += 1

    def _hand_over(self, state: State) -> None:
        self.checkpointer.init_state(state.model, state.optimizer, state.scheduler, state.scaler)

    def begin(self, state: State) -> None:
        """Open the run folder, save and validate the untrained model, validate what a killed run did not get to."""
        cfg, last = self.cfg, self.checkpointer.last
        self._on_main(self._make_folder)
        self._open_log(self.folder / f"log_{self.env.rank}.txt")
        logger.info("training %s: %s", cfg.run.model_type, f"going on from {last}" if last else f"new in {self.folder}")
        if self.env.is_main:
            self.metrics = MetricsFile(self.folder / "metrics.jsonl", state.step)
            mode = wandb_mode(cfg.run.wandb_mode)
            self.wandb = WandbSink(self.folder, cfg.run.wandb_project, cfg.run.wandb_name, mode, to_dict(cfg))
            self._stack.callback(self.wandb.close)
            for line in read_metrics(self.metrics.path):
                self.wandb.push(line)
            self.jobs = ValidationJobs(self.folder) if cfg.validation and validates_in_jobs(cfg) else None
            if self.jobs is not None:
                self._stack.callback(self.jobs.close)
                self.checkpointer.needed = self.jobs.needed
                self._collect_validation()
                self.jobs.submit_again(cfg)
        self.bar = tqdm(
            total=cfg.optimizer.max_steps,
            initial=state.step,
            desc=cfg.run.wandb_name,
            unit="step",
            disable=not self.env.is_main,
            mininterval=0.5 if sys.stderr.isatty() else 60,
        )
        self._stack.callback(self.bar.close)
        self._hand_over(state)
        if last is None:
            self.save(state)
        self.validate(state)

    def _make_folder(self) -> None:
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise InputError(
                f"run.workdir: the run folder {self.folder} cannot be made ({error.strerror}); choose another one"
            ) from error
        remove_unfinished(self.folder)
        with atomic_write(self.folder / "config.json") as file:
            file.write(json.dumps(to_dict(self.cfg), indent=2).encode())

    def timed(self, rounds: Iterator[list[Batch]]) -> Iterator[list[Batch]]:
        """Measure how long the loop waits for its data."""
        while True:
            start = time.perf_counter()
            micro_batches = next(rounds)
            self._clock.waited += time.perf_counter() - start
            yield micro_batches

    # ------------------------------------------------------------------------------------------------- every step

    def record(self, state: State, micro_batches: list[Batch], measured: Mapping[str, Tensor | float]) -> None:
        """Take note of a step: its measurements come in when the device has them.

        Raises:
            InputError: If a loss or gradient was not finite.
        """
        self._rows_in_flight[state.step] = torch.cat([batch.rows for batch in micro_batches])
        self._readback.put(state.step, measured)
        self.bar.update()
        self.profiler(state.step)
        self._absorb(state, wait=False)

    def _absorb(self, state: State, *, wait: bool) -> None:
        for step, values in self._readback.take(wait=wait):
            rows = self._rows_in_flight.pop(step)
            if not (math.isfinite(values["loss"][0]) and math.isfinite(values["grad_norm"][0])):
                self._stop_not_finite(state, step, values, rows)
            self.must_stop |= values.pop("stop")[0] > 0
            self._clock.audio_seconds += values.pop("seconds")[0]
            self._clock.tflop += values.pop("tflop")[0]
            layers = layer_names(state.model)
            if self.env.is_main:
                self._collapse.step(step, layers, values["active_codewords"], values["frames"][0])
            del values["finite_here"], values["frames"]
            named = _by_layer(values, layers)
            self._latest = {name: named.pop(name) for name in NOT_AVERAGED}
            self._means.add(named)

    def _stop_not_finite(self, state: State, step: int, values: dict[str, list[float]], rows: Tensor) -> None:
        """Say which files the step was about, on the processes whose own loss was not finite, else on all."""
        files = [str(recording) for recording in state.loader.dataset.recordings(rows.numpy())]
        everywhere = self.env.gather_objects((bool(values["finite_here"][0]), files))
        guilty = [rank for rank, (finite, _) in enumerate(everywhere) if not finite] or range(len(everywhere))
        raise InputError(
            f"step {step}: loss {values['loss'][0]} and gradient norm {values['grad_norm'][0]} are not finite; nothing "
            "was saved since the step before. Lower optimizer.lr or look at the recordings: "
            + "; ".join(f"rank {rank}: {', '.join(everywhere[rank][1])}" for rank in guilty)
        )

    # ------------------------------------------------------------------------------------------------- now and then

    def log(self, state: State) -> None:
        """Every ``log_interval`` steps, write the means since the last time. Waits for the device."""
        if state.step % self.cfg.run.log_interval:
            return
        self._absorb(state, wait=True)
        means = self._means.pop()
        line = {"step": state.step, "group": "train", "epoch": state.epoch, **means, **self._latest}
        self._write(line | self._clock.rates(self.env, self.cfg.optimizer.dtype))
        self._clock = _Clock()
        self.bar.set_postfix(loss=f"{means['loss']:.3f}", target_ppl=f"{means['target_ppl']:.1f}")
        self._on_main(self._collect_validation)

    def _write(self, line: dict[str, Any]) -> None:
        if self.env.is_main and self.metrics.write(line):
            self.wandb.push(line)

    def save(self, state: State) -> bool:
        """Save a checkpoint if it is due or the run must stop. Waits for the device, to be sure that all went well."""
        interval = self.checkpointer.interval
        if interval <= 0 or not (self.must_stop or self.checkpointer.is_due(state.step)):
            return False
        self._absorb(state, wait=True)
        self._set_extra(state)
        self._on_main(lambda: self.checkpointer.save(state.step, state.epoch, force=True))
        return True

    def _set_extra(self, state: State) -> None:
        position = state.position * self._batches_per_step(state)
        idle = [codebook.idle for codebook in state.model.codebooks]
        self.checkpointer.extra = {"position": position, "means": self._means.sums, "idle": idle}

    def _batches_per_step(self, state: State) -> int:
        return self.env.world_size * state.loader.accumulation

    def finish(self, state: State) -> None:
        """Save and validate the trained model, and say what its units are worth."""
        self._absorb(state, wait=True)
        saved = self.checkpointer.last
        if self.checkpointer.interval > 0 and not (
            saved is not None and saved.name == "final.pt" and self.checkpointer.step == state.step
        ):
            self._set_extra(state)
            self._on_main(lambda: self.checkpointer.save_final(state.step, state.epoch))
        self.validate(state)
        self._on_main(self._collect_validation)
        logger.info("finished %d steps of %s", state.step, self.folder)
        if self.env.is_main:
            for group in self.cfg.validation:
                self._print_units(state, group)

    # ------------------------------------------------------------------------------------------------- validation

    def validate(self, state: State) -> None:
        """Validate the model on every set on which it has not been, if its step is one whose checkpoint is validated.

        In this process, or in jobs whose results come back later.

        Raises:
            Preempted: A signal asked to stop; the validation is done after the restart.
        """
        due = state.step in (0, self.cfg.optimizer.max_steps) or self.checkpointer.is_due(state.step)
        for group in self._on_main(lambda: self._unvalidated(state.step)) if due else ():
            start = time.perf_counter()
            values = validate_set(state.model, self.cfg.validation[group], self.cfg.masking, self.env, stop=state.stop)
            self._write({"step": state.step, "group": group, **values})
            seconds = time.perf_counter() - start
            logger.info("step %d, %s: loss %.4f (%.0f s)", state.step, group, values["loss"], seconds)
            self._clock.paused += seconds

    def _unvalidated(self, step: int) -> list[str]:
        """The sets to validate here and now; what is to be done in a job is submitted."""
        self._collect_validation()
        groups = [group for group in self.cfg.validation if (step, group) not in self.metrics]
        if self.jobs is None or self.checkpointer.last is None:
            return groups
        if groups and step not in self.jobs.pending():
            self.jobs.submit(self.cfg, step, self.checkpointer.last)
        return []

    def _collect_validation(self) -> None:
        """Take the results of validation jobs that have come in."""
        if self.jobs is None:
            return
        for line in self.jobs.collect():
            self._write(line)
            self.checkpointer.remove_old(self.checkpointer.step)
        self.jobs.report()

    def _print_units(self, state: State, group: str) -> None:
        lines = {line["step"]: line for line in read_metrics(self.metrics.path) if line["group"] == group}
        before, after = lines.get(0), lines.get(state.step)
        layers = layer_names(state.model)
        if before is None or after is None or f"pnmi_{layers[0]}" not in after:
            return
        print(f"\nUnits of {group}, untrained -> after {state.step} steps")  # noqa: T201
        print("layer  PNMI              active codewords  perplexity")  # noqa: T201
        for layer in layers:
            pnmi, active, ppl = (
                f"{before[name]:.{digits}f} -> {after[name]:.{digits}f}"
                for name, digits in ((f"pnmi_{layer}", 3), (f"active_codewords_{layer}", 0), (f"unit_ppl_{layer}", 1))
            )
            print(f"{layer[1:]:5}  {pnmi:16}  {active:16}  {ppl}")  # noqa: T201


class _Clock:
    """What an interval of training costs, from now on."""

    def __init__(self) -> None:
        self.start = time.perf_counter()
        self.audio_seconds = 0.0  # trained on, by all processes
        self.tflop = 0.0  # of the model, on all processes
        self.waited = 0.0  # for data
        self.paused = 0.0  # for validation

    def rates(self, env: Environment, dtype: str) -> dict[str, float]:
        """Rates and memory of the interval: TFLOP/s of a device, and their share of what it can do."""
        elapsed = time.perf_counter() - self.start - self.paused
        rates = {
            "audio_seconds_per_second": self.audio_seconds / elapsed,
            "data_wait_share": self.waited / elapsed,
            "peak_memory_gib": _peak_memory(env.device) / 2**30,
            "tflops": self.tflop / elapsed / env.world_size,
        }
        if env.device.type == "cuda" and (peak := peak_tflops(torch.cuda.get_device_name(env.device), dtype)):
            rates["mfu"] = rates["tflops"] / peak
        return rates


def _peak_memory(device: torch.device) -> int:
    """Bytes that this process has used at most: of the GPU's memory, elsewhere of the machine's."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak  # Linux counts in KiB


def _by_layer(values: dict[str, list[float]], layers: list[str]) -> dict[str, float]:
    """One name for each number: what comes for every codebook is named by its layer, perplexities also averaged."""
    named = {name: value[0] for name, value in values.items() if name not in PER_CODEBOOK}
    for name, singular in PER_CODEBOOK.items():
        if singular.endswith("_ppl"):
            named[singular] = sum(values[name]) / len(layers)
        named |= {f"{singular}_{layer}": value for layer, value in zip(layers, values[name], strict=True)}
    return named
