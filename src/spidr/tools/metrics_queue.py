"""``python -m spidr.tools.metrics_queue PATH [--entity E [--runid ID]]``: bring a finished run up to date.

Validation jobs may end after training has. This collects their results into ``metrics.jsonl`` and, with an entity,
pushes to wandb every line that it does not have, in the order of the steps.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from spidr.config import Config, read_config, to_dict
from spidr.slurm import ValidationJobs
from spidr.tools.errors import InputError
from spidr.tools.metrics import MetricsFile, WandbSink, find_wandb_run, import_wandb, read_metrics
from spidr.tools.untrusted import parse_json


def collect_metrics(folder: Path) -> int:
    """Collect the results of validation that have come in, and say on standard error which are yet to come.

    Args:
        folder: The folder of a run that is not training.

    Returns:
        How many lines ``metrics.jsonl`` has got.

    Raises:
        InputError: If the folder is not a run's.
    """
    if not os.path.isfile(folder / "config.json"):  # noqa: PTH113 (False for all that cannot be a file)
        raise InputError(f"{folder}: not a run folder, it has no config.json")
    metrics = MetricsFile(folder / "metrics.jsonl", sys.maxsize)
    jobs, count = ValidationJobs(folder), 0
    jobs.forget_lost()
    for line in jobs.collect():
        metrics.write(line)
        count += 1
    if waiting := jobs.pending():
        sys.stderr.write(f"not validated yet: steps {', '.join(map(str, sorted(waiting)))}; run this again later\n")
    return count


def push_metrics(folder: Path, entity: str, run_id: str | None = None) -> int:
    """Collect what has come in and push what wandb does not have.

    Args:
        folder: The folder of a run that is not training.
        entity: The wandb user or team.
        run_id: wandb's id of the run. None: the one that the folder knows, else the one finished run that has the
            configuration's project and name.

    Returns:
        How many lines were pushed.

    Raises:
        InputError: If the folder is not a run's, the run cannot be told, or wandb does not take the lines.
    """
    import_wandb()
    collect_metrics(folder)
    cfg = read_config(folder / "config.json")
    lines = sorted(read_metrics(folder / "metrics.jsonl"), key=lambda line: line["step"])
    if not lines:
        raise InputError(f"{folder / 'metrics.jsonl'}: there is nothing to push")
    _choose_run(folder, cfg, entity, run_id)
    # Nobody asks to push to a run whose mode is "disabled" without wanting it online.
    mode: Any = os.environ.get("WANDB_MODE") or {"disabled": "online"}.get(cfg.run.wandb_mode, cfg.run.wandb_mode)
    os.environ["WANDB_ENTITY"] = entity
    sink = WandbSink(folder, cfg.run.wandb_project, cfg.run.wandb_name, mode, to_dict(cfg))
    if sink.run is None:
        raise InputError(f"wandb cannot be reached as {entity}/{cfg.run.wandb_project}; the reason is above")
    missing = [line for line in lines if line["step"] > sink.pushed.get(line["group"], -1)]
    for line in missing:
        sink.push(line)
    sink.close()
    if refused := [line for line in missing if line["step"] > sink.pushed.get(line["group"], -1)]:
        raise InputError(f"wandb did not take {len(refused)} of {len(missing)} lines; the reason is above")
    return len(missing)


def _choose_run(folder: Path, cfg: Config, entity: str, run_id: str | None) -> None:
    """Write down, where the run's sink looks for it, which wandb run it is and how far it has got."""
    state_path = folder / "wandb.json"
    known: Any = None
    with suppress(OSError, ValueError):  # as if there were none
        known = parse_json(state_path.read_text())
    if isinstance(known, dict) and "id" in known and run_id in (None, known["id"]):
        return
    state: dict[str, Any] = {"id": run_id, "pushed": {}}
    if os.environ.get("WANDB_MODE", cfg.run.wandb_mode) != "offline":
        run = find_wandb_run(f"{entity}/{cfg.run.wandb_project}", cfg.run.wandb_name, run_id)
        state["id"] = run.id
        for name, value in run.summary.items():
            group, _, key = name.rpartition("/")
            if key == "step":
                state["pushed"][group] = value
    elif run_id is None:
        raise InputError(f"{folder}: no wandb run is known here; give --runid")
    state_path.write_text(json.dumps(state))


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line. Returns the exit status."""
    parser = argparse.ArgumentParser("python -m spidr.tools.metrics_queue", description=__doc__.split("\n\n")[1])
    parser.add_argument("path", type=Path, help="a run's folder, or its metrics.jsonl")
    parser.add_argument("--entity", help="wandb user or team (default: none, nothing is pushed)")
    parser.add_argument(
        "--runid", help="wandb's id of the run (default: the one finished run of that project and name)"
    )
    args = parser.parse_args(argv)
    if args.runid is not None and args.entity is None:
        parser.error("--runid needs --entity")
    try:
        folder = args.path.parent if args.path.name == "metrics.jsonl" else args.path
        count = collect_metrics(folder) if args.entity is None else push_metrics(folder, args.entity, args.runid)
    except InputError as error:
        sys.stderr.write(f"error: {error}\n")
        return 2
    sys.stdout.write(f"{count} lines {'collected' if args.entity is None else 'pushed'}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
