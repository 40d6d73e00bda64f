"""One extraction, from sources to an output, of features or units."""

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch.distributed as dist

from spidr.environment import Environment, environment
from spidr.extract.options import Options
from spidr.extract.outputs import Output
from spidr.extract.session import Session, Skipped, Summary
from spidr.extract.sources import find_items, find_lengths, name_items


def extract(
    sources: str | Path | Sequence[str | Path],
    output: Output,
    options: Options,
    make_session: Callable[[Environment], Session],
    description: str,
) -> Skipped:
    """Encode the recordings of sources that an output lacks.

    Returns:
        The recordings that were skipped, of all processes.
    """
    with ExitStack() as stack:
        env = stack.enter_context(environment(options.device))
        found = find_items(sources) if env.is_main else []
        session = stack.enter_context(make_session(env))
        job: Any = None
        if env.is_main:
            named = name_items(found, output.known(), tree=output.tree)
            items, problems = find_lengths(named, options, shortest=session.shortest)
            folders = stack.enter_context(output.claimed({item.name for item in items}))
            with output.alone():
                output.begin(items, session, folders)
            pending = [item for item in items if item.name not in output.done]
            job = named, pending, problems, folders
        named, pending, problems, folders = env.broadcast_object(job)

        with output.writing(folders[0], env.rank):
            session.encode(pending, output.write, description, writers=output.writers)
        parts: list[Any] = [session.summary] * env.world_size
        if env.world_size > 1:  # waits for the slowest, however long it takes
            group: Any = dist.new_group(backend="gloo", timeout=timedelta(days=100))
            dist.all_gather_object(parts, session.summary, group=group)
        summary = Summary.joined(parts)
        if env.is_main:
            for name, why in problems.items():
                summary.skip(name, why)
            with output.alone():
                output.finish(named, summary.skipped, folders)
                output.release(folders)
            summary.report(output.path, len(pending) + len(problems))
        return summary.skipped
