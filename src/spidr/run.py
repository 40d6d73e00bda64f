"""A run's folder and record: checkpoints, metrics, validation, progress, and resuming where it stopped."""

import logging
import math
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Self, TypeVar, cast

import torch
from torch import Tensor

from spidr.checkpoint import Checkpointer
from spidr.config import Config, may_differ, read_config, schedule_remark, to_dict
from spidr.data import Batch
from spidr.data.loader import SpeechLoader
from spidr.environment import Environment, Preempted, RunEndedError, StopFlag, environment, ranks
from spidr.models.flops import peak_tflops, step_flops
from spidr.state import Hooks, Measured, State, build_state, model_settings, wrap
from spidr.tools.collapse import CollapseWatch
from spidr.tools.command import write_result
from spidr.tools.errors import InputError, first_line
from spidr.tools.files import make_folder, remove_unfinished, write_json
from spidr.tools.healthy import is_base, unlike_published
from spidr.tools.lock import Lock
from spidr.tools.logging import FILE_ONLY, run_log
from spidr.tools.meters import Interval, Readback
from spidr.tools.metrics import MetricsFile, read_metrics
from spidr.tools.profiler import StepProfiler
from spidr.tools.progress import Progress
from spidr.tools.wandb import WandbSink, wandb_mode
from spidr.validate import layer_names, validate_set
from spidr.validation_jobs import ValidationJobs, validates_in_jobs

logger = logging.getLogger(__name__)

T = TypeVar("T")

LOADING = ("num_workers", "pin_memory", "prefetch_factor", "persistent_workers", "on_error")
"""Data settings that do not affect batches."""


class Run:
    """A run, as a context manager: its state, its folder, and the side effects of training.

    All processes call every method at the same steps; only rank 0 writes. Nothing but a lock is written before
    :meth:`begin` has found that the run can be resumed. ``must_stop``, the same on all processes, says whether a
    stop signal has reached any.
    """

    env: Environment
    state: State

    def __init__(self, cfg: Config, hooks: Hooks | None = None) -> None:
        self.cfg, self.folder = cfg, cfg.run.dir
        self.must_stop = False
        self.jobs: ValidationJobs | None = None
        self._hooks = hooks or Hooks()
        self._final_step: int | None = None  # the contents of final.pt
        self._rows_in_flight: dict[int, Tensor] = {}
        self._clock = _Clock()

    def __enter__(self) -> Self:
        with ExitStack() as stack:
            rank, _, processes = ranks()
            run = self.cfg.run
            self._open_log = stack.enter_context(run_log(rank, processes))
            stack.enter_context(_reason_in_log())
            self.stop = stack.enter_context(StopFlag().listening())
            self.stop.immediate = True
            self.env = stack.enter_context(environment(run.device, use_deterministic=run.use_deterministic))
            # Processes that end tell each other why, undisturbed.
            stack.callback(setattr, self.stop, "immediate", False)
            self._on_main(lambda: self._take_folder(stack))
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *error: Any) -> None:
        if error[0] is not None:
            with suppress(Exception):  # the last measurements; the reason for the end is more important
                self._write_interval()
        self._stack.__exit__(*error)

    def _take_folder(self, stack: ExitStack) -> None:
        missing = [folder for folder in (self.folder, *self.folder.parents) if not folder.exists()]

        def remove_empty() -> None:
            with suppress(OSError):
                for folder in missing:
                    folder.rmdir()

        try:
            make_folder(self.folder)
        except InputError as error:
            raise InputError(f"run.workdir: {error}") from error
        stack.callback(remove_empty)
        self._lock = stack.enter_context(Lock(self.folder, "is training in this folder"))
        remove_unfinished(self.folder)

    def _on_main(self, function: Callable[[], T]) -> T:
        """Run a function on rank 0 and broadcast its result, or its InputError, to all ranks."""
        result, error = None, None
        if self.env.is_main:
            try:
                result = function()
            except InputError as caught:
                error = caught.with_guide()
        result, error = self.env.broadcast_object((result, error))
        if error is not None:
            raise InputError(error)
        return cast("T", result)

    # ------------------------------------------------------------------------------------------------- start

    def begin(self) -> None:
        """Build or restore the state, open the run's files, and save and validate if due before the first step."""
        env, run, on_gpu = self.env, self.cfg.run, self.env.device.type == "cuda"
        self.checkpointer = Checkpointer(
            self.folder, run.save_interval, run.keep_latest, disable=not env.is_main, background=on_gpu
        )
        latest = self._on_main(self.checkpointer.find_latest)
        how = f"resuming from {latest}" if latest else f"new in {self.folder}"
        logger.info("training %s: %s", run.model_type, how)
        self.cfg = cfg = replace(self.cfg, model=model_settings(self.cfg))
        finished = self._on_main(lambda: latest is not None and self._compare_settings(latest))
        self.profiler = StepProfiler(self.folder / "trace.html" if cfg.run.profile and env.is_main else None)
        self._stack.callback(self.profiler.stop)
        self.state = build_state(cfg, env, self.stop, self._hooks, new=latest is None)
        self._stack.callback(self.state.loader.close)
        self.layers = layer_names(self.state.model)
        self._interval = Interval(Measured, self.layers)
        self._readback = Readback(env.device)
        self._collapse = CollapseWatch(cfg.run.collapse_share, cfg.run.collapse_steps, cfg.model.codebook_size)
        self.checkpointer.init_state(self.state.model, self.state.optimizer, self.state.scheduler, self.state.scaler)
        if latest is not None:
            self._restore(latest)
        self.state.network = wrap(self.state.model, cfg, env)
        self.stop.immediate = False  # from here on the loop checks the flag
        if not finished:
            self._on_main(lambda: write_json(self.folder / "config.json", to_dict(cfg), indent=2))
        self._open_log(self.folder / f"log_{env.rank}.txt")
        if env.is_main:
            self._open_metrics(latest)
            self._remark()
        name, steps, begin = cfg.run.wandb_name, cfg.optimizer.max_steps, self.state.step
        self.progress = Progress(name, steps, "steps", initial=begin, shown=env.is_main)
        self._stack.callback(self.progress.close)
        self._stack.callback(self.checkpointer.wait)
        if latest is None:
            self.save()
        self.validate(due=self.state.step == 0)
        self.env.gather_objects(None, self.stop)  # a step of a large model takes long, and nothing can be lost yet

    def _compare_settings(self, latest: Path) -> bool:
        """Compare the configuration with the run's in the folder. Returns whether that run is finished."""
        path = self.folder / "config.json"
        if not path.exists():
            return False
        try:
            recorded = read_config(path)
        except InputError as error:
            logger.warning("the settings that the run began with are not known: %s", error)
            return False
        finished = latest.name == "final.pt" and self.cfg.optimizer.max_steps <= recorded.optimizer.max_steps
        before, now = _flat(asdict(recorded)), _flat(asdict(self.cfg))
        changed = {
            name: f"{name} = {before.get(name)} there, {now.get(name)} here"
            for name in sorted(before.keys() | now.keys())
            if before.get(name) != now.get(name) and name not in ("run.workdir", "run.wandb_project", "run.wandb_name")
        }
        if forbidden := [text for name, text in changed.items() if _must_stay(name, finished=finished)]:
            what = "holds a finished run" if finished else "holds a run"
            raise InputError(
                f"{self.folder} {what} with other settings: {'; '.join(forbidden)}. Use its settings to resume it, or "
                "another run.wandb_name for a new run.",
                guide="questions.md#can-i-change-settings-of-a-run",
            )
        if changed:
            logger.warning("changed since the run began: %s", "; ".join(changed.values()))
        return finished

    def _restore(self, path: Path) -> None:
        """Resume from a checkpoint."""
        state = self.state
        self.checkpointer.restore(path)
        state.step, state.epoch, extra = self.checkpointer.step, self.checkpointer.epoch, self.checkpointer.extra
        if path.name == "final.pt":
            self._final_step = state.step
        state.freeze_if_due()
        if "position" not in extra:
            logger.warning("%s does not say which data it had seen: resuming with the next epoch", path)
            state.epoch += 1
            return
        # Counted in batches, so that any number of processes resumes at the same place.
        state.position = extra["position"] // self._batches_per_step
        try:
            self._interval = Interval(Measured, self.layers, extra["means"])
            for codebook, idle in zip(state.model.codebooks, extra.get("idle", ()), strict=False):
                cast("Tensor", codebook.idle).copy_(idle)
        except (KeyError, RuntimeError, TypeError, ValueError) as error:
            raise InputError(f"{path}: 'means' or 'idle' is not what a run has saved ({error})") from error

    def _open_metrics(self, latest: Path | None) -> None:
        cfg, step = self.cfg, self.state.step
        # The line of an interrupted interval is rewritten when the interval is complete.
        partial = step % cfg.run.log_interval > 0 and latest is not None and latest.name != "final.pt"
        self.metrics = MetricsFile(self.folder / "metrics.jsonl", step, again=(step, "train") if partial else None)
        mode = wandb_mode(cfg.run.wandb_mode)
        self.wandb = WandbSink(self.folder, cfg.run.wandb_project, cfg.run.wandb_name, mode, to_dict(cfg))
        self._stack.callback(self.wandb.close)
        for line in read_metrics(self.metrics.path):
            self.wandb.push(line)
        if cfg.validation and validates_in_jobs(cfg):
            self.jobs = ValidationJobs(self.folder)
            self._stack.callback(self.jobs.close)
            self.checkpointer.needed = self.jobs.needed
            self._collect_validation()
            self.jobs.submit_again(cfg)

    def _remark(self) -> None:
        """Log what the run needs: data, disk space for its checkpoints and, on a CPU, time."""
        cfg, state = self.cfg, self.state
        if (remark := schedule_remark(cfg.optimizer)) is not None:
            logger.warning("%s", remark)
        if isinstance(state.loader, SpeechLoader):  # a custom loader may not have one
            summary = state.loader.summary()
            summary.log(logger, cfg.data)
            write_json(self.folder / "data.json", asdict(summary), indent=2)
        steps, interval, keep = cfg.optimizer.max_steps - state.step, cfg.run.save_interval, cfg.run.keep_latest
        trained = sum(p.numel() for group in state.optimizer.param_groups for p in group["params"])
        if interval > 0:
            size = (sum(value.nbytes for value in state.model.state_dict().values()) + 8 * trained) / 1e9
            count = min(steps // interval, keep if keep > 0 else steps) + 1
            free = shutil.disk_usage(self.folder).free / 1e9
            hint = "; set run.keep_latest to keep fewer" if keep <= 0 and count > 1 else ""
            logger.log(
                logging.WARNING if count * size > free else logging.INFO,
                "checkpoints: up to %d, %.2g GB each, %.3g GB in all; %.3g GB are free%s",
                count, size, count * size, free, hint,
            )  # fmt: skip
        if self.env.device.type == "cpu" and trained > 50_000_000 and steps > 0:
            samples, total = cfg.data.max_sample_size, state.loader.accumulation * cfg.data.max_batch_length
            flops = total / samples * step_flops(cfg.model, samples, 0, frozen=state.model.extractor_frozen)
            days = steps * flops / (5e10 * torch.get_num_threads()) / 86_400  # 0.05 TFLOP/s a core, roughly
            text = "a large model on a CPU: %d steps take about %.2g days; configs/laptop.toml is one for CPUs"
            logger.warning(text, steps, days)

    # ------------------------------------------------------------------------------------------------- every step

    def rounds(self) -> Iterator[list[Batch]]:
        """This process's micro-batches, one optimizer step after another, until all are done."""
        rounds = self.state.rounds()
        while self.state.step < self.cfg.optimizer.max_steps:
            start = time.perf_counter()
            micro_batches = next(rounds)
            self._clock.waited += time.perf_counter() - start
            yield micro_batches

    def record(self, micro_batches: list[Batch], measured: Measured) -> None:
        """Record a step. Once the device has computed its measurements, raise InputError if they are not finite."""
        self._rows_in_flight[self.state.step] = torch.cat([batch.rows for batch in micro_batches])
        self._readback.put(self.state.step, measured)
        self.progress(1)
        self.profiler(self.state.step)
        self._absorb(wait=False)

    def _absorb(self, *, wait: bool) -> None:
        for step, values in self._readback.take(wait=wait):
            rows = self._rows_in_flight.pop(step)
            if not (math.isfinite(values["loss"][0]) and math.isfinite(values["grad_norm"][0])):
                self._stop_not_finite(step, values, rows)
            self.must_stop |= values["stop"][0] > 0
            self._clock.audio_seconds += values["seconds"][0]
            self._clock.tflop += values["tflop"][0]
            if self.env.is_main:
                self._collapse.step(step, self.layers, values["active_codewords"], values["frames"][0])
            self._interval.add(values)

    def _stop_not_finite(self, step: int, values: dict[str, list[float]], rows: Tensor) -> None:
        """Name the step's files on the processes whose own loss was not finite, or on all."""
        files = [str(recording) for recording in self.state.loader.dataset.recordings(rows.numpy())]
        everywhere = self.env.gather_objects((bool(values["finite_here"][0]), files))
        guilty = [rank for rank, (finite, _) in enumerate(everywhere) if not finite] or range(len(everywhere))
        raise InputError(
            f"step {step}: loss {values['loss'][0]} and gradient norm {values['grad_norm'][0]} are not finite; nothing "
            "was saved since the step before. Lower optimizer.lr or look at the recordings: "
            + "; ".join(f"rank {rank}: {', '.join(everywhere[rank][1])}" for rank in guilty),
            guide="questions.md#my-loss-is-not-finite",
        )

    # ------------------------------------------------------------------------------------------------- at intervals

    def log(self) -> None:
        """Every ``log_interval`` steps, wait for the device and write the means since the last time."""
        if self.state.step % self.cfg.run.log_interval:
            return
        self._absorb(wait=True)
        self._write_interval()
        self._on_main(self._collect_validation)

    def _write_interval(self) -> None:
        """Write a metrics line for the steps since the last one."""
        if not self._interval:
            return
        values = self._interval.pop()
        line = {"step": self.state.step, "group": "train", "epoch": self.state.epoch, **values}
        self._write(line | self._clock.rates(self.env, self.cfg.optimizer.dtype))
        self._clock = _Clock()
        self.progress(0, f"loss {values['loss']:.3f}")

    def _write(self, line: dict[str, Any]) -> None:
        if self.env.is_main:
            self._lock.check()
            if self.metrics.write(line):
                self.wandb.push(line)
                self._compare_with_published(line)

    def _compare_with_published(self, line: dict[str, Any]) -> None:
        """Warn if a base model, trained from scratch, validates unlike the published ones."""
        if line["group"] in self.cfg.validation and self.cfg.run.init_ckpt is None and is_base(self.cfg.model):
            active = [value for name, value in line.items() if name.startswith("active_codewords_")]
            if said := unlike_published(line["step"], line["loss"], active):
                logger.warning("step %d, %s: %s", line["step"], line["group"], said)

    def save(self) -> None:
        """Save a checkpoint if due, or if the run must stop, which raises Preempted. Waits for the device."""
        if not (self.must_stop or self.checkpointer.is_due(self.state.step)):
            return
        self._absorb(wait=True)
        self._save()
        if self.must_stop:
            self._write_interval()
            raise Preempted(self.stop.signum, agreed=True)

    def _save(self, *, final: bool = False) -> None:
        position = self.state.position * self._batches_per_step
        idle = [codebook.idle for codebook in self.state.model.codebooks]
        self.checkpointer.extra = {"position": position, "means": self._interval.sums, "idle": idle}

        def write() -> None:
            self._lock.check()
            if not final:
                self.checkpointer.save(self.state.step, self.state.epoch, force=True)
            elif self.state.step != self._final_step:
                self.checkpointer.save_final(self.state.step, self.state.epoch)
            if final or self.must_stop:
                self.checkpointer.wait()

        self._on_main(write)

    @property
    def _batches_per_step(self) -> int:
        return self.env.world_size * self.state.loader.accumulation

    def finish(self) -> None:
        """Save and validate the trained model, and print the quality of its units."""
        self._absorb(wait=True)
        self._write_interval()
        self._save(final=True)
        self.validate(due=True)
        self._on_main(self._collect_validation)
        logger.info("finished %d steps of %s", self.state.step, self.folder)
        if self.env.is_main:
            self.progress.close()
            for group in self.cfg.validation:
                self._print_units(group)
        self.stop.immediate = True

    # ------------------------------------------------------------------------------------------------- validation

    def validate(self, *, due: bool = False) -> None:
        """Validate the model, if ``due`` or if its checkpoint was due, on each set not yet validated at this step.

        Runs here, or in jobs whose results come back later. Raises Preempted if a signal arrives meanwhile.
        """
        step, cfg = self.state.step, self.cfg
        due = due or self.checkpointer.is_due(step)
        for group in self._on_main(self._unvalidated) if due else ():
            start = time.perf_counter()
            values = validate_set(self.state.model, cfg.validation[group], cfg.masking, self.env, stop=self.stop)
            self._write({"step": step, "group": group, **values})
            seconds = time.perf_counter() - start
            logger.info("step %d, %s: loss %.4f (%.0f s)", step, group, values["loss"], seconds)
            self._clock.paused += seconds

    def _unvalidated(self) -> list[str]:
        """List the sets to validate in this process, after submitting those that are validated in jobs."""
        self._collect_validation()
        step = self.state.step
        groups = [group for group in self.cfg.validation if (step, group) not in self.metrics]
        saved = next(filter(Path.exists, (self.checkpointer.path(step), self.folder / "final.pt")), None)
        if self.jobs is None or saved is None:
            return groups
        if groups and step not in self.jobs.pending():
            self.checkpointer.wait()
            self.jobs.submit(self.cfg, step, saved)
        return []

    def _collect_validation(self) -> None:
        """Collect the results of validation jobs that have finished."""
        if self.jobs is None:
            return
        for line in self.jobs.collect():
            self._write(line)
            self.checkpointer.remove_old(self.state.step)
        self.jobs.report()

    def _print_units(self, group: str) -> None:
        found = {line["step"]: line for line in read_metrics(self.metrics.path) if line["group"] == group}
        before, after = found.get(0), found.get(self.state.step)
        if before is None or after is None or f"pnmi_{self.layers[0]}" not in after:
            return
        start = "untrained" if self.cfg.run.init_ckpt is None else "at the start"
        text = f"\nUnits of {group}, {start} -> after {self.state.step} steps\n"
        text += "layer  PNMI              active codewords  perplexity\n"
        for layer in self.layers:
            pnmi, active, ppl = (
                f"{before[name]:.{digits}f} -> {after[name]:.{digits}f}"
                for name, digits in ((f"pnmi_{layer}", 3), (f"active_codewords_{layer}", 0), (f"unit_ppl_{layer}", 1))
            )
            text += f"{layer[1:]:5}  {pnmi:16}  {active:16}  {ppl}\n"
        write_result(text)


@contextmanager
def _reason_in_log() -> Iterator[None]:
    """Log why the run ended. The command reports it on standard error."""
    try:
        yield
    except BaseException as error:
        match error:
            case RunEndedError():
                reason = error.cause.text
            case InputError() | Preempted():
                reason = str(error)
            case _:
                reason = f"{type(error).__name__}: {first_line(error)}"
        is_bug = isinstance(error, Exception) and not isinstance(error, InputError)
        logger.error("the run ended: %s", reason, extra=FILE_ONLY, exc_info=is_bug)
        raise


def _flat(table: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Flatten nested tables to dotted names."""
    result: dict[str, Any] = {}
    for key, value in table.items():
        result |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return result


def _must_stay(name: str, *, finished: bool) -> bool:
    """Whether a setting is fixed: it shapes the model or, once the run has finished, the result."""
    section, _, rest = name.partition(".")
    if section == "model" or name == "run.model_type":
        return finished or not may_differ(rest)
    return finished and (
        section in ("optimizer", "masking") or (section == "data" and rest not in LOADING) or name == "run.random_seed"
    )


@dataclass
class _Clock:
    """Measures the time and memory of an interval of training, starting now."""

    start: float = field(default_factory=time.perf_counter)
    audio_seconds: float = 0.0  # trained on, by all processes
    tflop: float = 0.0  # of the model, on all processes
    waited: float = 0.0  # for data
    paused: float = 0.0  # for validation

    def rates(self, env: Environment, dtype: str) -> dict[str, float]:
        """Rates and memory of the interval; TFLOP/s are per device, ``mfu`` is their share of its peak."""
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


def _peak_memory(device: torch.device) -> float:
    """Peak memory of this process in bytes, on the GPU if it has one; NaN if unknown."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        import resource
    except ImportError:  # on Windows
        return math.nan
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak  # Linux counts in KiB
