"""Checkpoints that cannot be lost: written aside, flushed and renamed; read back from the newest valid one."""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from spidr.tools.errors import InputError
from spidr.tools.files import atomic_write
from spidr.tools.lazy import names_from
from spidr.tools.metrics import read_metrics
from spidr.tools.tensors import load_verified

logger = logging.getLogger(__name__)

__getattr__ = names_from(__name__, "spidr.compat.training")  # what published packages also have here

CONTENTS: dict[str, type] = {
    "model": dict, "optimizer": dict, "scheduler": dict, "scaler": dict, "epoch": int, "step": int
}  # fmt: skip
"""What every training checkpoint holds."""

EXTRA: dict[str, type] = {"position": int, "means": dict, "idle": list}
"""What those of a run hold too, see :class:`spidr.run.Run`."""


def read_checkpoint(path: str | Path) -> dict[str, Any]:
    """Read a training checkpoint on the CPU, without running code from it.

    Raises:
        InputError: If it is missing, truncated, damaged (its checksums are verified) or something else.
    """
    try:
        checkpoint = load_verified(path)
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror or error})") from error
    except Exception as error:  # a damaged archive or pickle can fail in any way
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise InputError(f"{path}: not a valid checkpoint ({reason})") from error
    found = checkpoint if isinstance(checkpoint, dict) else {}
    for key, kind in (CONTENTS | EXTRA).items():
        value = found.get(key, None if key in CONTENTS else kind())
        if not isinstance(value, kind) or (isinstance(value, int) and value < 0):
            raise InputError(f"{path}: not a training checkpoint, it has no {key!r} or a wrong one")
    return found


class Checkpointer:
    """The checkpoints ``step_N.pt`` and ``final.pt`` of a run folder.

    Args:
        folder: The run folder.
        interval: Save when the step is a multiple of it; 0 or less: only when forced.
        keep_latest: How many ``step_N.pt`` to keep, besides those that :attr:`needed` names; 0 or less: all.
        disable: Do not write (processes other than the main one).
        start: What :attr:`step` is at first.

    Attributes:
        step: Optimiser steps done by the loaded or last saved checkpoint.
        epoch: Its epoch.
        last: Its path, None at first.
        extra: What is saved beside model, optimizer, scheduler, scaler, epoch and step: set it before saving, find it
            after loading.
        needed: Gives the steps whose checkpoints must stay because something still reads them.
        metrics: The run's ``metrics.jsonl``.
    """

    def __init__(
        self, folder: str | Path, interval: int, keep_latest: int = -1, *, disable: bool = False, start: int = 0
    ) -> None:
        self.folder = Path(folder)
        self.interval = interval
        self.keep_latest = keep_latest
        self.disable = disable
        self.step = start
        self.epoch = 0
        self.last: Path | None = None
        self.extra: dict[str, Any] = {}
        self.needed: Callable[[], set[int]] = set
        self.metrics = self.folder / "metrics.jsonl"
        self._seen_metrics = 0

    def init_state(
        self, model: nn.Module, optimizer: Optimizer, scheduler: LambdaLR, scaler: torch.amp.GradScaler
    ) -> None:
        """Hand over what :meth:`save` saves and :meth:`load` restores."""
        self.model, self.optimizer, self.scheduler, self.scaler = model, optimizer, scheduler, scaler

    def path(self, step: int) -> Path:
        """Where the checkpoint of a step is, or would be."""
        return self.folder / f"step_{step}.pt"

    # ------------------------------------------------------------------------------------------------- saving

    def is_due(self, step: int) -> bool:
        """Whether a checkpoint is to be saved after ``step``."""
        return self.interval > 0 and step % self.interval == 0

    def save(self, step: int, epoch: int, *, force: bool = False) -> bool:
        """Save ``step_N.pt`` if it is due, then remove the oldest ones beyond ``keep_latest``.

        Returns:
            Whether a checkpoint was due.
        """
        if not (force or self.is_due(step)):
            return False
        self._write(self.path(step), step, epoch)
        self.remove_old(step)
        return True

    def remove_old(self, until: float = math.inf) -> None:
        """Remove the oldest ``step_N.pt`` beyond ``keep_latest`` that are not needed.

        Args:
            until: The run's step. Files of later ones were passed over as damaged: they do not count.
        """
        if self.keep_latest > 0 and not self.disable:
            needed = self.needed()
            for path in [path for path in self._saved() if _step_of(path) <= until][: -self.keep_latest]:
                if _step_of(path) not in needed:
                    path.unlink(missing_ok=True)

    def save_final(self, step: int, epoch: int) -> None:
        """Save ``final.pt``."""
        self._write(self.folder / "final.pt", step, epoch)

    def _write(self, path: Path, step: int, epoch: int) -> None:
        self.step, self.epoch, self.last = step, epoch, path
        if self.disable:
            return
        state = {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scheduler": self.scheduler.state_dict(),
            "scaler": self.scaler.state_dict(),
            "epoch": epoch,
            "step": step,
            **self.extra,
        }
        with atomic_write(path) as file:
            torch.save(state, file)
        logger.info("saved %s", path)

    # ------------------------------------------------------------------------------------------------- loading

    def _saved(self) -> list[Path]:
        """The files ``step_N.pt``, oldest step first."""
        paths = (path for path in self.folder.glob("step_*.pt") if re.fullmatch(r"step_\d+\.pt", path.name))
        return sorted(paths, key=_step_of)

    def find_latest(self) -> Path | None:
        """The newest valid checkpoint of the run; damaged and foreign files are passed over with a warning."""
        final = self.folder / "final.pt"
        final_step = self._valid_step(final) if final.exists() else None
        for path in reversed(self._saved()):
            if final_step is not None and _step_of(path) <= final_step:
                break
            if self._valid_step(path) is not None:
                return path
        return None if final_step is None else final

    def _valid_step(self, path: Path) -> int | None:
        """The step of a checkpoint, None if it is damaged or foreign."""
        try:
            step: int = read_checkpoint(path)["step"]
            if path.name != "final.pt" and step != _step_of(path):
                raise InputError(f"{path}: holds step {step}, which is not what its name says")
        except InputError as error:
            logger.warning("passed over a checkpoint: %s", error)
            return None
        return step

    def load_existing_run(self) -> bool:
        """Go on from the newest valid checkpoint of the folder. Returns whether there was one."""
        path = self.find_latest()
        if path is not None:
            self.restore(path, read_checkpoint(path))
        return path is not None

    def load(self, step: int) -> None:
        """Go on from ``step_N.pt``.

        Raises:
            InputError: If it is missing or damaged, or does not fit the model.
        """
        self.restore(self.path(step), read_checkpoint(self.path(step)))

    def restore(self, path: Path, checkpoint: dict[str, Any]) -> None:
        """Put the state of a checkpoint that was read from ``path`` into model, optimizer, scheduler and scaler.

        Raises:
            InputError: If it does not fit them.
        """
        configured = [{k: v for k, v in group.items() if k != "params"} for group in self.optimizer.param_groups]
        try:
            weights = {name.removeprefix("module."): value for name, value in checkpoint["model"].items()}
            self.model.load_state_dict(weights)
            _check_adam(self.optimizer, checkpoint["optimizer"])
            self.optimizer.load_state_dict(checkpoint["optimizer"])
            if checkpoint["scaler"]:  # empty unless float16
                self.scaler.load_state_dict(checkpoint["scaler"])
        except Exception as error:  # what is not what it should be can fail in any way
            raise InputError(
                f"{path}: does not fit the configured model ({' '.join(str(error).split())[:500]}); use the "
                "configuration that the run began with, or another run.wandb_name for a new run"
            ) from error
        self.step, self.epoch, self.last = checkpoint["step"], checkpoint["epoch"], path
        # The rate is a function of the number of updates, whatever kind of scheduler wrote the file.
        self.scheduler.last_epoch, self.scheduler._step_count = self.step, self.step + 1
        schedules = zip(self.scheduler.base_lrs, self.scheduler.lr_lambdas, strict=True)
        for group, settings, (base, factor) in zip(self.optimizer.param_groups, configured, schedules, strict=True):
            group.update(settings)  # the file's state, the configuration's settings
            group["lr"] = base * factor(self.step)
        self.scheduler._last_lr = [group["lr"] for group in self.optimizer.param_groups]
        self.extra = {key: value for key, value in checkpoint.items() if key not in CONTENTS}

    # ------------------------------------------------------------------------------------------------- metrics

    def find_new_metrics(self) -> list[dict[str, Any]]:
        """The lines of ``metrics.jsonl`` that have been written since the last call."""
        lines = read_metrics(self.metrics)
        new = lines[self._seen_metrics :]
        self._seen_metrics = len(lines)
        return new


def _check_adam(optimizer: Optimizer, state: dict[str, Any]) -> None:
    """Look at what the optimizer itself takes for granted, and would only miss in its next step."""
    names = [name for group in state["param_groups"] for name in group["params"]]
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    of_name = dict(zip(names, parameters, strict=True))
    for name, values in state["state"].items():
        float(values["step"])
        for key in ("exp_avg", "exp_avg_sq"):
            if (found := values[key].shape) != (expected := of_name[name].shape):
                raise ValueError(f"{key} of the optimizer's parameter {name} is {tuple(found)}, not {tuple(expected)}")


def _step_of(path: Path) -> int:
    return int(path.stem.removeprefix("step_"))
