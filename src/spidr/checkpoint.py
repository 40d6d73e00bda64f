"""Checkpoints that survive crashes: written to a temporary file and renamed; the newest valid one is loaded."""

import logging
import math
import re
from collections import defaultdict
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.amp import GradScaler
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from torch.utils._pytree import tree_map_only

from spidr.optimizer import Schedule, drop_frozen, load_optimizer
from spidr.tools.errors import InputError, first_line
from spidr.tools.files import atomic_write, check_file, make_folder
from spidr.tools.lazy import names_from
from spidr.tools.metrics import read_metrics
from spidr.tools.tensors import read_tensors

logger = logging.getLogger(__name__)

__getattr__ = names_from(__name__, "spidr.compat.training")  # what published packages also have here

CONTENTS = {"model": dict, "optimizer": dict, "scheduler": dict, "scaler": dict, "epoch": int, "step": int}
"""Entries of every training checkpoint."""

EXTRA = {"position": int, "means": dict, "idle": list}
"""Further entries of a run's checkpoints, see :class:`spidr.run.Run`."""


def find_checkpoints(folder: str | Path) -> list[Path]:
    """The checkpoints of a run folder: ``step_N.pt`` by step, then ``final.pt``."""
    numbered = (path for path in Path(folder).glob("step_*.pt") if path.stem.removeprefix("step_").isdecimal())
    final = Path(folder) / "final.pt"
    return sorted(numbered, key=_step_of) + [final] * final.exists()


def read_checkpoint(path: str | Path) -> dict[str, Any]:
    """Read a training checkpoint on the CPU, without running code from it.

    Raises:
        InputError: It is missing, truncated, damaged (checksums are verified) or something else, or some of its weights
            are not finite.
    """
    check_file(path)
    try:
        checkpoint = read_tensors(path, strict=True)
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror or error})") from error
    except Exception as error:  # a damaged archive or pickle can fail in any way
        raise InputError(f"{path}: not a valid checkpoint ({first_line(error)})") from error
    found = checkpoint if isinstance(checkpoint, dict) else {}
    for key, kind in (CONTENTS | EXTRA).items():
        value = found.get(key, None if key in CONTENTS else kind())
        if kind is int and isinstance(value, Tensor) and value.numel() == 1 and not value.is_floating_point():
            value = found[key] = int(value)  # as published
        if not isinstance(value, kind) or (isinstance(value, int) and value < 0):
            raise InputError(f"{path}: not a training checkpoint, it has no {key!r} or a wrong one")
    weights = {name: value for name, value in found["model"].items() if isinstance(value, Tensor)}
    if broken := [name for name, value in weights.items() if not torch.isfinite(value).all()]:
        raise InputError(f"{path}: {len(broken)} weights are not finite, the first are {', '.join(broken[:3])}")
    return found


class Checkpointer:
    """The checkpoints ``step_N.pt`` and ``final.pt`` of a run folder.

    Args:
        folder: The run folder, made if it is missing.
        interval: Save when the step is a multiple of it; 0 or less: never.
        keep_latest: How many ``step_N.pt`` to keep, besides those that :attr:`needed` names; 0 or less: all.
        disable: Do not write, as on processes other than rank 0.
        start: What :attr:`step` is at first, and the first step whose metrics are waited for.
        background: Copy the state and save the copy on a thread. A second save waits for the first.

    Attributes:
        step: Optimizer steps in the loaded or last saved checkpoint.
        epoch: Its epoch.
        extra: Saved besides model, optimizer, scheduler, scaler, epoch and step: set it before saving, read it after
            loading.
        needed: Gives the steps whose checkpoints must stay because something still reads them.
        metrics: The run's ``metrics.jsonl``.
    """

    def __init__(
        self,
        folder: str | Path,
        interval: int,
        keep_latest: int = -1,
        *,
        disable: bool = False,
        start: int = 0,
        background: bool = False,
    ) -> None:
        self.folder, self.interval, self.keep_latest, self.disable = Path(folder), interval, keep_latest, disable
        self.step, self.epoch = start, 0
        self.extra: dict[str, Any] = {}
        self.needed: Callable[[], set[int]] = set
        self.metrics = self.folder / "metrics.jsonl"
        self._next_metrics: dict[str, int] = defaultdict(lambda: start)
        self._background = background
        self._writing: Future[None] | None = None
        if not disable:
            make_folder(self.folder)

    def init_state(self, model: nn.Module, optimizer: Optimizer, scheduler: LRScheduler, scaler: GradScaler) -> None:
        """Set what :meth:`save` saves and :meth:`load` restores."""
        self.model, self.optimizer, self.scheduler, self.scaler = model, optimizer, scheduler, scaler

    def path(self, step: int) -> Path:
        """The path of a step's checkpoint, whether it exists or not."""
        return self.folder / f"step_{step}.pt"

    @property
    def last(self) -> Path | None:
        """The newest file of the folder, ``final.pt`` if there is one."""
        return next(reversed(find_checkpoints(self.folder)), None)

    def is_due(self, step: int) -> bool:
        """Whether a checkpoint is to be saved after ``step``."""
        return self.interval > 0 and step % self.interval == 0

    def save(self, step: int, epoch: int, *, force: bool = False) -> bool:
        """Save ``step_N.pt`` if due, then remove the oldest beyond ``keep_latest``. Returns whether it was due."""
        if self.interval <= 0 or not (force or self.is_due(int(step))):
            return False
        self._write(self.path(int(step)), int(step), int(epoch))
        return True

    def save_final(self, step: int, epoch: int) -> bool:
        """Save ``final.pt``. Returns whether checkpoints are saved at all."""
        if self.interval > 0:
            self._write(self.folder / "final.pt", int(step), int(epoch))
        return self.interval > 0

    def _write(self, path: Path, step: int, epoch: int) -> None:
        self.step, self.epoch = step, epoch
        if self.disable:
            return
        parts = ("model", "optimizer", "scheduler", "scaler")
        state = {name: getattr(self, name).state_dict() for name in parts} | {"epoch": epoch, "step": step} | self.extra
        self.wait()
        if self._background:
            self._writing = ThreadPoolExecutor(1, "checkpoint").submit(self._write_now, path, copy_to_host(state))
        else:
            self._write_now(path, state)

    def _write_now(self, path: Path, state: dict[str, Any]) -> None:
        with atomic_write(path) as file:
            torch.save(state, file)
        logger.info("saved %s", path)
        self.remove_old(state["step"])

    def wait(self) -> None:
        """Wait for the checkpoint that is written in the background. Raises InputError if that fails."""
        if (writing := self._writing) is not None:
            self._writing = None
            writing.result()

    def remove_old(self, until: float = math.inf) -> None:
        """Remove the oldest ``step_N.pt`` beyond ``keep_latest`` that are not needed.

        Those after ``until``, the run's step, were skipped as damaged and do not count.
        """
        if self.keep_latest > 0 and not self.disable:
            needed = self.needed()
            for path in [path for path in self._saved() if _step_of(path) <= until][: -self.keep_latest]:
                if _step_of(path) not in needed:
                    path.unlink(missing_ok=True)

    def _saved(self) -> list[Path]:
        """The files ``step_N.pt``, oldest step first."""
        return [path for path in find_checkpoints(self.folder) if path.name != "final.pt"]

    def find_latest(self) -> Path | None:
        """Find the newest valid checkpoint of the run. Damaged and foreign files are skipped with a warning.

        Raises:
            InputError: There are checkpoints, but none of them can be used.
        """
        problems: list[str] = []
        final = self.folder / "final.pt"
        final_step = self._valid_step(final, problems) if final.exists() else None
        for path in reversed(self._saved()):
            if final_step is not None and _step_of(path) <= final_step:
                break
            if self._valid_step(path, problems) is not None:
                return path
        if final_step is None and problems:
            raise InputError(
                f"{self.folder}: none of its checkpoints can be used, so nothing was changed. Put a good one there, or "
                f"choose another run.wandb_name for a new run. {'; '.join(problems)}"
            )
        return None if final_step is None else final

    def _valid_step(self, path: Path, problems: list[str]) -> int | None:
        """The step of a checkpoint, None if it is damaged or foreign."""
        try:
            step: int = read_checkpoint(path)["step"]
            if path.name != "final.pt" and step != _step_of(path):
                raise InputError(f"{path}: holds step {step}, unlike its name")
        except InputError as error:
            logger.warning("passed over a checkpoint: %s", error)
            problems.append(str(error))
            return None
        return step

    def load_existing_run(self) -> bool:
        """Resume from the newest valid checkpoint of the folder. Returns whether there was one."""
        if (path := self.find_latest()) is None:
            return False
        self.restore(path)
        return True

    def load(self, step: int) -> bool:
        """Resume from ``step_N.pt``. Returns whether it exists."""
        if not (path := self.path(int(step))).exists():
            return False
        self.restore(path)
        return True

    def restore(self, path: Path) -> None:
        """Load a checkpoint. Raises InputError if it is damaged or does not fit what :meth:`init_state` has set."""
        checkpoint = read_checkpoint(path)
        scheduler, model = self.scheduler, cast("Any", getattr(self.model, "module", self.model))
        try:
            weights = {_PREFIXES.sub("", name): value for name, value in checkpoint["model"].items()}
            model.load_state_dict(weights)
            load_optimizer(self.optimizer, checkpoint["optimizer"], keep_settings=isinstance(scheduler, Schedule))
            if checkpoint["scaler"]:  # empty unless float16
                self.scaler.load_state_dict(checkpoint["scaler"])
            if isinstance(scheduler, Schedule):  # whatever kind of scheduler wrote the file
                scheduler.go_to(checkpoint["step"])
                was_frozen = len(checkpoint["optimizer"]["param_groups"]) < len(self.optimizer.param_groups)
                if was_frozen and checkpoint["step"] >= getattr(model, "freeze_step", math.inf):
                    model.freeze_extractor()
                    drop_frozen(self.optimizer, scheduler)
            else:
                scheduler.load_state_dict(checkpoint["scheduler"])
        except Exception as error:  # wrong contents can fail in any way
            raise InputError(
                f"{path}: does not fit the configured model ({' '.join(str(error).split())[:500]}); use the "
                "configuration that the run began with, or another run.wandb_name for a new run"
            ) from error
        self.step, self.epoch = checkpoint["step"], checkpoint["epoch"]
        self.extra = {key: value for key, value in checkpoint.items() if key not in CONTENTS}

    def find_new_metrics(self) -> Iterator[dict[str, Any]]:
        """Yield the metrics that have arrived since the last call, as ``{"GROUP/NAME": value, "GROUP/step": step}``.

        Each group's come in the order of steps, one for each checkpoint: what follows a gap waits until it is filled.
        """
        found: dict[str, dict[int, dict[str, Any]]] = defaultdict(dict)
        for line in read_metrics(self.metrics):
            found[line["group"]][line["step"]] = line
        for group, lines in found.items():
            while (step := self._next_metrics[group]) in lines:
                values = {key: value for key, value in lines[step].items() if key not in ("step", "group")}
                yield {f"{group}/{key}": value for key, value in (values | {"step": step}).items()}
                self._next_metrics[group] += max(1, self.interval)


_PREFIXES = re.compile(r"^((module|_orig_mod)\.)+")
"""Prefixes that DistributedDataParallel and torch.compile add to the names of weights."""


def copy_to_host(state: Any) -> Any:
    """Copy the tensors in nested containers to the CPU, from a GPU into page-locked memory. Waits for the copies."""
    devices: set[torch.device] = set()

    def copy(value: Tensor) -> Tensor:
        if value.device.type != "cuda":
            return value.detach().to("cpu", copy=True)
        devices.add(value.device)
        return torch.empty(value.shape, dtype=value.dtype, pin_memory=True).copy_(value.detach(), non_blocking=True)

    copied = tree_map_only(Tensor, copy, state)
    for device in devices:
        torch.cuda.current_stream(device).synchronize()
    return copied


def _step_of(path: Path) -> int:
    return int(path.stem.removeprefix("step_"))
