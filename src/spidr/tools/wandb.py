"""The run's page on wandb, which follows ``metrics.jsonl``."""

import logging
import os
import secrets
import threading
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal, cast

from spidr.tools.errors import InputError, first_line
from spidr.tools.files import write_json
from spidr.tools.lazy import needs_extra
from spidr.tools.metrics import Line
from spidr.tools.untrusted import parse_json

logger = logging.getLogger(__name__)

TIMEOUT = 30.0  # seconds that training waits for wandb at its beginning and end

WandbMode = Literal["online", "offline", "disabled"]


def wandb_mode(configured: WandbMode) -> WandbMode:
    """Choose the mode: from wandb's environment variables, otherwise from the configuration.

    Raises:
        InputError: ``$WANDB_MODE`` is not a mode of wandb.
    """
    if os.environ.get("WANDB_DISABLED", "").lower() in ("true", "1", "yes", "on"):
        return "disabled"
    mode = os.environ.get("WANDB_MODE") or configured
    mode = {"dryrun": "offline", "run": "online"}.get(mode, mode)
    if mode not in ("online", "offline", "disabled"):
        raise InputError(f"the environment variable WANDB_MODE is {mode!r}, not online, offline or disabled")
    return cast("WandbMode", mode)


class WandbSink:
    """The run's page on wandb, with one id over all restarts, which gets each line once.

    ``wandb.json`` in the run folder holds the id and what was pushed, separately for online and offline. wandb never
    stops training: failures are logged, and :func:`spidr.validation_jobs.push_metrics` can push missing lines later.
    Without ``run_id``, the id is that of ``wandb.json`` or a new one.
    """

    def __init__(
        self, folder: Path, project: str, name: str, mode: WandbMode, config: dict[str, Any], run_id: str | None = None
    ) -> None:
        self.state_path = folder / "wandb.json"
        self.run: Any = None
        self._pushed: dict[str, list[int]] = {}  # group → the step up to which all were pushed, and later pushed steps
        if mode == "disabled":
            return
        try:
            wandb = import_wandb()
            known, pushed = _read_state(self.state_path)
            if run_id not in (None, known):
                known, pushed = run_id, {}
            pushed = {"online": {}, "offline": {}} | pushed
            self._state = {"id": known or secrets.token_hex(4), "pushed": pushed}
            self._pushed = pushed[mode]
            self.run = wandb.init(
                project=project, name=name, id=self._state["id"], resume="allow", mode=mode, dir=folder, config=config,
                settings=wandb.Settings(console="off", silent=True, init_timeout=TIMEOUT),
            )  # fmt: skip
            if mode == "online" and not self._pushed:  # the page may have lines that this folder does not know about
                for key, step in dict(getattr(self.run, "summary", None) or {}).items():
                    group, _, metric = key.rpartition("/")
                    if metric == "step" and isinstance(step, int):
                        self._pushed[group] = [step]
            write_json(self.state_path, self._state)
        except InputError as error:
            logger.warning("%s; training continues without wandb", error)
        except Exception as error:
            logger.warning("wandb is not available (%s); training continues without it", first_line(error))
            logger.debug("wandb", exc_info=True)
            self.run = None

    def missing(self, lines: Iterable[Line]) -> list[Line]:
        """Lines not yet pushed, in the order of steps."""
        return sorted((line for line in lines if not self._has(line)), key=lambda line: line["step"])

    def _has(self, line: Line) -> bool:
        pushed = self._pushed.get(line["group"]) or [-1]
        return line["step"] <= pushed[0] or line["step"] in pushed

    def push(self, line: Line) -> None:
        """Log a line as ``GROUP/NAME`` against ``GROUP/step``, unless it has been logged."""
        if self.run is None or self._has(line):
            return
        group, step = line["group"], line["step"]
        try:
            self.run.define_metric(f"{group}/*", step_metric=f"{group}/step")
            self.run.log({f"{group}/{key}": value for key, value in line.items() if key != "group"})
            if group == "train":
                self._pushed[group] = [step]
            else:  # validation results may come late
                self._pushed.setdefault(group, [-1]).append(step)
            write_json(self.state_path, self._state)
        except Exception:
            logger.warning("wandb refused the metrics of step %d (%s); no more are sent", step, group, exc_info=True)
            self.close()
            self.run = None  # later lines would hide that this one is missing

    def close(self) -> None:
        """End the session, or abandon it if wandb cannot be reached."""
        if self.run is not None:
            finish = threading.Thread(target=self.run.finish, name="wandb", daemon=True)
            finish.start()
            finish.join(TIMEOUT)


def _read_state(path: Path) -> tuple[str | None, dict[str, dict[str, list[int]]]]:
    """Read id and pushed steps from ``wandb.json``; if it is damaged, warn and start over."""
    try:
        state = parse_json(path.read_text("utf-8"))
        modes = {mode: state["pushed"].get(mode, {}) for mode in ("online", "offline")}
        return str(state["id"]), {mode: {k: list(map(int, v)) for k, v in of.items()} for mode, of in modes.items()}
    except FileNotFoundError:
        return None, {}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        logger.warning("%s is damaged and is replaced: the run gets a new id and page on wandb", path)
        return None, {}


def import_wandb() -> Any:
    """Import wandb. Raises InputError if it is not installed."""
    with needs_extra("train"):
        import wandb

    return wandb


def find_wandb_run(project: str, name: str) -> str:
    """Ask wandb for the id of the one finished run with a name. Raises InputError unless there is exactly one."""
    try:
        runs = list(import_wandb().Api().runs(project, filters={"display_name": name, "state": "finished"}))
    except InputError:
        raise
    except Exception as error:  # network, permissions, no such project
        raise InputError(f"wandb, {project}: {first_line(error)}") from error
    if len(runs) != 1:
        found = ", ".join(run.id for run in runs) or "none"
        raise InputError(f"wandb, {project}: expected one finished run {name!r}, found {found}; give --runid")
    run_id: str = runs[0].id
    return run_id
