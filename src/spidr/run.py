"""A run's folder and record: checkpoints, metrics, validation, progress, and going on from where it stopped.

May import every module of the package but ``spidr.train`` and the launcher.
"""

from __future__ import annotations

import json
import logging
import math
import resource
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any, TypeVar, cast

import torch
from torch import Tensor
from tqdm import tqdm

from spidr.checkpoint import Checkpointer, atomic_write, read_checkpoint
from spidr.config import Config, InputError, to_dict
from spidr.environment import Environment
from spidr.optimizer import drop_frozen
from spidr.tools.logging import run_log
from spidr.tools.metrics import Means, MetricsFile, WandbSink, read_metrics
from spidr.tools.profiler import StepProfiler
from spidr.tools.readback import Readback
from spidr.validate import layer_names, validate_set

if TYPE_CHECKING:
    from types import TracebackType

    from spidr.data import Batch
    from spidr.train import State

logger = logging.getLogger(__name__)

T = TypeVar("T")
NOT_AVERAGED = ("lr", "ema_decay")
PER_CODEBOOK = {"target_ppls": "target_ppl", "pred_ppls": "pred_ppl", "active_codewords": "active_codewords"}


class Run:
    """What surrounds the training loop. Used as a context, it opens the run folder and closes everything at the end.

    Every method is called by all processes at the same steps; the main one writes.

    Attributes:
        must_stop: Whether a stop signal has reached any process; the same on all of them.
    """

    def __init__(self, cfg: Config, env: Environment) -> None:
        self.cfg, self.env, self.folder = cfg, env, cfg.run.dir
        self.must_stop = False
        self.means = Means()
        self.latest: dict[str, float] = {}
        self.readback = Readback(env.device)
        self._batches_in_flight: dict[int, list[Batch]] = {}
        self._clock = _Clock()
        self._stack = ExitStack()

    def __enter__(self) -> Run:
        cfg, env = self.cfg, self.env
        self._on_main(self._make_folder)
        self._stack.enter_context(run_log(self.folder, env.rank))
        self.checkpointer = Checkpointer(
            self.folder, cfg.run.save_interval, cfg.run.keep_latest, disable=not env.is_main
        )
        self.profiler = StepProfiler(self.folder, enabled=cfg.run.profile and env.is_main)
        self._stack.callback(self.profiler.stop)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._stack.__exit__(kind, error, traceback)

    def _make_folder(self) -> None:
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise InputError(
                f"run.workdir: the run folder {self.folder} cannot be made ({error.strerror}); choose another one"
            ) from error
        with atomic_write(self.folder / "config.json") as file:
            file.write(json.dumps(to_dict(self.cfg), indent=2).encode())

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

    def restore(self, state: State) -> bool:
        """Go on from the newest valid checkpoint of the folder. Returns whether there is one."""
        self.checkpointer.init_state(state.model, state.optimizer, state.scheduler, state.scaler)
        path = self._on_main(lambda: found[0] if (found := self.checkpointer.find_latest()) else None)
        if path is None:
            logger.info("a new %s run in %s", self.cfg.run.model_type, self.folder)
            return False
        checkpoint = read_checkpoint(path)
        if checkpoint["step"] >= state.model.cfg.freeze_step:
            state.model.freeze_extractor()
            drop_frozen(state.optimizer, state.scheduler)
        self.checkpointer.restore(path, checkpoint)
        state.step, state.epoch = self.checkpointer.step, self.checkpointer.epoch
        extra = self.checkpointer.extra
        if "position" not in extra:
            logger.warning("%s does not say which data it had seen: going on with the next epoch", path)
            state.epoch += 1
        else:
            # In batches, so that other numbers of processes go on from the same place.
            state.position = extra["position"] // self._batches_per_step(state)
            self.means = Means(extra["means"])
        logger.info("going on with the %s run from %s", self.cfg.run.model_type, path)
        return True

    def begin(self, state: State) -> None:
        """Open the metrics, save and validate the untrained model, and validate what a killed run left unvalidated."""
        cfg = self.cfg
        if self.env.is_main:
            self.metrics = MetricsFile(self.folder / "metrics.jsonl", state.step)
            self.wandb = WandbSink(
                self.folder, cfg.run.wandb_project, cfg.run.wandb_name, cfg.run.wandb_mode, to_dict(cfg)
            )
            self._stack.callback(self.wandb.close)
            for line in read_metrics(self.metrics.path):
                self.wandb.push(line)
        self.bar = tqdm(
            total=cfg.optimizer.max_steps,
            initial=state.step,
            desc=cfg.run.wandb_name,
            unit="step",
            disable=not self.env.is_main,
            mininterval=0.5 if sys.stderr.isatty() else 60,
        )
        self._stack.callback(self.bar.close)
        if state.step == 0:
            self.save(state)
        self.validate(state)

    def timed(self, rounds: Iterator[list[Batch]]) -> Iterator[list[Batch]]:
        """Measure how long the loop waits for its data."""
        while True:
            start = time.perf_counter()
            try:
                micro_batches = next(rounds)
            except StopIteration:
                return
            self._clock.waited += time.perf_counter() - start
            yield micro_batches

    # ------------------------------------------------------------------------------------------------- every step

    def record(self, state: State, micro_batches: list[Batch], measured: dict[str, Tensor] | None) -> None:
        """Take note of a step: its measurements come in when the device has them.

        Raises:
            InputError: If a loss or gradient was not finite.
        """
        if measured is not None:
            self._batches_in_flight[state.step] = micro_batches
            self.readback.put(state.step, measured)
            self.bar.update()
        self.profiler(state.step)
        self._absorb(state, wait=False)

    def _absorb(self, state: State, *, wait: bool) -> None:
        for step, values in self.readback.take(wait=wait):
            micro_batches = self._batches_in_flight.pop(step)
            if not (math.isfinite(values["loss"][0]) and math.isfinite(values["grad_norm"][0])):
                self._stop_not_finite(state, step, values, micro_batches)
            self.must_stop |= values.pop("stop")[0] > 0
            self._clock.audio_seconds += values.pop("seconds")[0]
            del values["finite_here"], values["frames"]
            named = _by_layer(values, layer_names(state.model))
            self.latest = {name: named.pop(name) for name in NOT_AVERAGED}
            self.means.add(named)

    def _stop_not_finite(
        self, state: State, step: int, values: dict[str, list[float]], micro_batches: list[Batch]
    ) -> None:
        """Say which files the step was about, on the processes whose own loss was not finite, else on all."""
        rows = torch.cat([batch.rows for batch in micro_batches])
        files = [str(recording) for recording in state.loader.dataset.recordings(rows.numpy())]
        everywhere = self.env.gather_objects((bool(values["finite_here"][0]), files))
        guilty = [rank for rank, (finite, _) in enumerate(everywhere) if not finite] or range(len(everywhere))
        raise InputError(
            f"step {step}: loss {values['loss'][0]} and gradient norm {values['grad_norm'][0]} are not finite, nothing "
            "was saved. Lower optimizer.lr or look at the recordings: "
            + "; ".join(f"rank {rank}: {', '.join(everywhere[rank][1])}" for rank in guilty)
        )

    # ------------------------------------------------------------------------------------------------- now and then

    def log(self, state: State) -> None:
        """Every ``log_interval`` steps, write the means since the last time. Waits for the device."""
        if state.step % self.cfg.run.log_interval:
            return
        self._absorb(state, wait=True)
        means = self.means.pop()
        if not means:  # the step was skipped
            return
        line = {"step": state.step, "group": "train", "epoch": state.epoch, **means, **self.latest}
        self._write(line | self._clock.lap(self.env.device))
        self.bar.set_postfix(loss=f"{means['loss']:.3f}", target_ppl=f"{means['target_ppl']:.1f}")

    def _write(self, line: dict[str, Any]) -> None:
        if self.env.is_main and self.metrics.write(line):
            self.wandb.push(line)

    def save(self, state: State, *, force: bool = False) -> bool:
        """Save a checkpoint if it is due. Waits for the device, to be sure that the step went well."""
        if not (force or self.checkpointer.is_due(state.step)):
            return False
        self._absorb(state, wait=True)
        self._set_extra(state)
        self._on_main(lambda: self.checkpointer.save(state.step, state.epoch, force=force))
        return True

    def _set_extra(self, state: State) -> None:
        position = state.position * self._batches_per_step(state)
        self.checkpointer.extra = {"position": position, "means": self.means.sums}

    def _batches_per_step(self, state: State) -> int:
        return self.env.world_size * state.loader.accumulation

    def validate(self, state: State) -> None:
        """Validate the model on every set that has not been, if its step is one whose checkpoint is validated."""
        last = self.cfg.optimizer.max_steps
        if not (state.step in (0, last) or self.checkpointer.is_due(state.step)):
            return
        groups = self._on_main(lambda: [g for g in self.cfg.validation if (state.step, g) not in self.metrics])
        for group in groups:
            start = time.perf_counter()
            values = validate_set(state.model, self.cfg.validation[group], self.cfg.masking, self.env)
            self._write({"step": state.step, "group": group, **values})
            logger.info(
                "step %d, %s: loss %.4f (%.0f s)", state.step, group, values["loss"], time.perf_counter() - start
            )
            self._clock.paused += time.perf_counter() - start

    def finish(self, state: State) -> None:
        """Save and validate the trained model, and say what its units are worth."""
        self._absorb(state, wait=True)
        if self.checkpointer.interval > 0 and not (
            self.checkpointer.last and self.checkpointer.last.name == "final.pt"
        ):
            self._set_extra(state)
            self._on_main(lambda: self.checkpointer.save_final(state.step, state.epoch))
        self.validate(state)
        logger.info("finished %d steps of %s", state.step, self.folder)
        if self.env.is_main:
            for group in self.cfg.validation:
                self._print_units(state, group)

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
    """What an interval of training costs, from the last look at it, or from the start of this process."""

    def __init__(self) -> None:
        self.start = time.perf_counter()
        self.audio_seconds = 0.0  # trained on, by all processes
        self.waited = 0.0  # for data
        self.paused = 0.0  # for validation

    def lap(self, device: torch.device) -> dict[str, float]:
        """Rates and memory of the interval, which ends here."""
        elapsed = time.perf_counter() - self.start - self.paused
        rates = {
            "audio_seconds_per_second": self.audio_seconds / elapsed,
            "data_wait_share": self.waited / elapsed,
            "peak_memory_gib": _peak_memory(device) / 2**30,
        }
        self.__init__()  # type: ignore[misc]
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
