"""Metrics of a run: ``metrics.jsonl``, the source of truth, and wandb, which follows it.

A line is a flat JSON object with ``step``, ``group`` ("train" or the name of a validation set) and values. May import
``spidr.config``, ``spidr.tools.lazy`` and ``spidr.tools.files``.
"""

from __future__ import annotations

import json
import logging
import math
import os
import secrets
import threading
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal

from spidr.tools.errors import InputError, first_line
from spidr.tools.files import atomic_write, why_not_written
from spidr.tools.lazy import needs_extra
from spidr.tools.untrusted import parse_json

logger = logging.getLogger(__name__)

TIMEOUT = 30.0
"""Seconds that training waits for wandb, when it begins and when it ends."""

Line = dict[str, Any]
WandbMode = Literal["online", "offline", "disabled"]


def read_metrics(path: Path) -> list[Line]:
    """The complete lines of a metrics file; what is none, such as the beginning of one, is left out.

    Raises:
        InputError: If the file is there but cannot be read.
    """
    lines = []
    try:
        for text in path.read_bytes().splitlines():
            with suppress(ValueError):
                line = parse_json(text.decode())
                if _is_line(line):
                    lines.append(line)
    except FileNotFoundError:
        return []
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})") from None
    return lines


def _is_line(line: Any) -> bool:
    if not isinstance(line, dict):
        return False
    values = {**line}
    step, group = values.pop("step", None), values.pop("group", None)
    return (
        isinstance(step, int)
        and isinstance(group, str)
        and all(value is None or isinstance(value, (int, float)) for value in values.values())
    )


class MetricsFile:
    """Appends lines to ``metrics.jsonl``, each once.

    Args:
        path: The file.
        step: The step that the run goes on from. What a killed run wrote of later training steps is removed: it will be
            written again.
        again: Step and group of another line that will be.
    """

    def __init__(self, path: Path, step: int, again: tuple[int, str] | None = None) -> None:
        self.path = path
        lines = read_metrics(path)
        kept = [line for line in lines if line["step"] <= step and (line["step"], line["group"]) != again]
        self._written = {(line["step"], line["group"]) for line in kept}
        if path.exists():
            with atomic_write(path) as file:
                file.writelines(_to_text(line).encode() for line in kept)

    def __contains__(self, key: tuple[int, str]) -> bool:
        return key in self._written

    def write(self, line: Line) -> bool:
        """Append a line. Returns False, without writing, if its step and group are there already.

        Raises:
            InputError: If the disk is full or gone.
        """
        key = (line["step"], line["group"])
        if key in self._written:
            return False
        try:
            with self.path.open("a") as file:
                file.write(_to_text(line))
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise why_not_written(self.path, error) from error
        self._written.add(key)
        return True


def _to_text(line: Line) -> str:
    # NaN is no JSON; a value that does not exist (perplexity of nothing, say) is null.
    finite = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in line.items()}
    return json.dumps(finite) + "\n"


class WandbSink:
    """The run's page on wandb. It keeps one id over all restarts, kept in ``wandb.json``, and gets each line once.

    Training never stops because of wandb: what fails is logged, and ``python -m spidr.tools.metrics_queue`` can push
    the missing lines later.

    Args:
        folder: The run folder.
        project: wandb project.
        name: Name of the run.
        mode: "online", "offline" or "disabled".
        config: The configuration to show.
    """

    def __init__(self, folder: Path, project: str, name: str, mode: WandbMode, config: dict[str, Any]) -> None:
        self.state_path = folder / "wandb.json"
        self.run: Any = None
        self.pushed: dict[str, int] = {}
        if mode == "disabled":
            return
        try:
            wandb = import_wandb()
            state = json.loads(self.state_path.read_text()) if self.state_path.exists() else {}
            self.pushed = {group: step for group, step in state.get("pushed", {}).items() if isinstance(step, int)}
            self.id = state.get("id") or secrets.token_hex(4)
            self.run = wandb.init(
                project=project, name=name, id=self.id, resume="allow", mode=mode, dir=folder, config=config,
                settings=wandb.Settings(console="off", silent=True, init_timeout=TIMEOUT),
            )  # fmt: skip
            self._save()
        except InputError as error:
            logger.warning("%s; training goes on without wandb", error)
        except Exception as error:
            logger.warning("wandb is not available (%s); training goes on without it", first_line(error))
            logger.debug("wandb", exc_info=True)
            self.run = None

    def push(self, line: Line) -> None:
        """Log a line as ``GROUP/NAME`` against ``GROUP/step``, unless it or a later one of its group has been."""
        group, step = line["group"], line["step"]
        if self.run is None or step <= self.pushed.get(group, -1):
            return
        try:
            self.run.define_metric(f"{group}/*", step_metric=f"{group}/step")
            self.run.log({f"{group}/{key}": value for key, value in line.items() if key != "group"})
            self.pushed[group] = step
            self._save()
        except Exception:
            logger.warning("wandb refused the metrics of step %d (%s); it gets no more", step, group, exc_info=True)
            self.close()
            self.run = None  # a later line would hide that this one is missing

    def _save(self) -> None:
        with atomic_write(self.state_path) as file:
            file.write(json.dumps({"id": self.id, "pushed": self.pushed}).encode())

    def close(self) -> None:
        """End the session, or leave it to itself if wandb cannot be reached."""
        if self.run is not None:
            finish = threading.Thread(target=self.run.finish, name="wandb", daemon=True)
            finish.start()
            finish.join(TIMEOUT)


def import_wandb() -> Any:
    """The package.

    Raises:
        InputError: It is not installed.
    """
    with needs_extra("train"):
        import wandb

    return wandb


def find_wandb_run(project: str, name: str, run_id: str | None) -> Any:
    """The run that wandb has under an id, or the one finished run of a name.

    Raises:
        InputError: If there is none, or several, or wandb cannot be asked.
    """
    api = import_wandb().Api()
    try:
        if run_id is not None:
            return api.run(f"{project}/{run_id}")
        runs = list(api.runs(project, filters={"display_name": name, "state": "finished"}))
    except Exception as error:  # network, permissions, no such project
        raise InputError(f"wandb, {project}: {error}") from error
    if len(runs) != 1:
        found = ", ".join(run.id for run in runs) or "none"
        raise InputError(f"wandb, {project}: expected one finished run {name!r}, found {found}; give --runid")
    return runs[0]
