"""Features of recordings, one file for each."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from contextlib import closing
from pathlib import Path
from typing import Literal

import numpy as np
import torch

from spidr.environment import environment
from spidr.extract.encoder import Encoded, Encoder, Options, Skipped, ahead, check_choice
from spidr.extract.outputs import (
    check_record,
    check_recordings,
    gather_skipped,
    names_of,
    record,
    report,
    write_record,
)
from spidr.extract.sources import Item, find_items
from spidr.models import DinoSR
from spidr.models.hub import check_name
from spidr.tools.errors import InputError
from spidr.tools.files import atomic_write, make_folder, remove_unfinished

FileFormat = Literal["npy", "pt"]
OutputDtype = Literal["float32", "float16"]

RECORD = "extract.json"
RECORDINGS = "recordings.json"
WRITERS = 4


def extract_features(
    sources: str | Path | Sequence[str | Path],
    output: str | Path,
    *,
    model: str | Path | DinoSR = "spidr_base",
    layer: int | None = None,
    file_format: FileFormat = "npy",
    output_dtype: OutputDtype = "float32",
    flat: bool = False,
    options: Options | None = None,
) -> Skipped:
    """Write the features of recordings, one array (T, D) in a file of its own for each.

    Frame ``t`` is about the 25 ms from ``t * 20`` ms on. Started again, it goes on where it has stopped; processes
    started by torchrun or SLURM share the work.

    Args:
        sources: Manifests, folders of recordings, audio files.
        output: A folder. Files lie in it as recordings do in theirs; ``extract.json`` says how they were made,
            ``recordings.json`` of which recordings.
        model: A published model's name, a checkpoint, or a model.
        layer: Counted from 1; None: the model's best.
        file_format: "npy", or "pt" for a tensor by ``torch.save``.
        output_dtype: What is stored.
        flat: All files lie in the output itself, by the names of their recordings, as far as those are unique.
        options: How recordings are encoded.

    Returns:
        The recordings that were skipped, of all processes.

    Raises:
        InputError: The input or model is wrong, the output was made with other settings or has another recording
            of the same name, or a recording cannot be encoded, without ``on_error="skip"``.
    """
    options, output = options or Options(), Path(output)
    check_choice("file_format", file_format, FileFormat)
    check_choice("output_dtype", output_dtype, OutputDtype)
    skip = options.on_error == "skip"
    check_name(model)
    with environment(options.run_config()) as env:
        items = find_items(names_of(sources), tree=not flat, resample=options.resample, skip=skip)
        encoder = Encoder(model, layer, options, env, codebook=False)
        content = record("features", encoder.settings() | {"format": file_format, "stored": output_dtype})
        batches = encoder.plan(items)

        def path_of(item: Item) -> Path:
            return output / f"{item.name}.{file_format}"

        pending: list[int] = []
        if env.is_main:
            done = _prepare(output, content, items, path_of)
            for folder in {path_of(item).parent for item in items}:
                make_folder(folder)
                remove_unfinished(folder)
            pending = [i for i, batch in enumerate(batches) if any(item.name not in done for item in batch)]
        pending = env.broadcast_object(pending)
        skipped = Skipped()

        def write(encoded: list[Encoded]) -> list[Encoded]:
            for item, values, _ in encoded:
                if values is not None:
                    stored = values.astype(output_dtype)
                    with atomic_write(path_of(item)) as file:
                        if file_format == "npy":
                            np.save(file, stored, allow_pickle=False)
                        else:
                            torch.save(torch.from_numpy(stored), file)
            return encoded

        results = encoder.run([batches[i] for i in pending], encoder.features, "Features")
        with closing(results), closing(ahead(write, results, workers=WRITERS, depth=WRITERS)) as written:
            for encoded in written:
                skipped.note(encoded)
        skipped = gather_skipped(env, skipped)
        if env.is_main:
            write_record(output / RECORD, content, skipped)
        report(skipped, len(items), env)
        return skipped


def _prepare(
    output: Path, content: dict[str, object], items: Sequence[Item], path_of: Callable[[Item], Path]
) -> set[str]:
    """Make the folder, or check that it is one of the same kind; returns the names of what is done."""
    path = output / RECORD
    if os.path.isfile(output):  # noqa: PTH113 (False for a name that is too long, which writing complains about)
        raise InputError(f"{output}: is a file; features need a folder.")
    if os.path.exists(path):  # noqa: PTH110
        check_record(path, content)
    elif os.path.isdir(output) and any(output.iterdir()):  # noqa: PTH112
        raise InputError(f"{output}: is not empty, and there is no {RECORD} in it. Choose another folder.")
    else:
        write_record(path, content)
    # os.path.exists: False for a name that is too long, which writing complains about.
    done = {item.name for item in items if os.path.exists(path_of(item))}  # noqa: PTH110
    check_recordings(output / RECORDINGS, items, done)
    return done
