"""Features of recordings, one file each."""

import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import IO, Any, Literal, get_args

import numpy as np
import torch
from numpy.typing import NDArray

from spidr.extract.job import extract
from spidr.extract.options import Options, check_choice
from spidr.extract.outputs import Output
from spidr.extract.session import Session, Skipped
from spidr.extract.sources import Item
from spidr.models import DinoSR
from spidr.models.hub import check_name
from spidr.tools.errors import InputError
from spidr.tools.files import atomic_write, expand, make_folder, remove_unfinished

FileFormat = Literal["npy", "pt"]
OutputDtype = Literal["float32", "float16"]


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
    """Write the features of recordings, one file with an array (T, D) each.

    Frame ``t`` covers about 25 ms from ``t * 20`` ms on. Called again, it resumes where it stopped; processes started
    by torchrun or SLURM share the work, and several jobs may add to one output at the same time.

    Args:
        sources: Manifests, lists, folders of recordings, audio files.
        output: A folder, with the same subfolders as the recordings'; ``extract.json`` says how the files were made,
            ``recordings.json`` from which recordings.
        model: A published model's name, a checkpoint, or a model.
        layer: Counted from 1; None: the model's best.
        file_format: "npy", or "pt" for a tensor by ``torch.save``.
        output_dtype: The stored type.
        flat: Put all files directly into the output, named after their recordings if that is unique.
        options: How recordings are encoded.

    Returns:
        The recordings that were skipped, of all processes.

    Raises:
        InputError: The input or model is wrong, the output was made with other settings or has another recording
            of the same name, or a recording cannot be encoded, without ``on_error="skip"``.
    """
    chosen = options or Options()
    check_choice("file_format", file_format, FileFormat)
    check_choice("output_dtype", output_dtype, OutputDtype)
    check_name(model)
    folder = _FeatureFolder(expand(output), file_format, output_dtype, tree=not flat)
    if os.path.isfile(folder.path):  # noqa: PTH113 (False for a name that is too long, which writing complains about)
        raise InputError(f"{folder.path}: is a file; features need a folder.")
    return extract(sources, folder, chosen, lambda env: Session(model, layer, chosen, env), "Features")


class _FeatureFolder(Output):
    writers = 4

    def __init__(self, path: Path, file_format: FileFormat, dtype: OutputDtype, *, tree: bool) -> None:
        beside = [path / name for name in ("extract.json", "recordings.json", ".unfinished")]
        super().__init__(path, beside, {"kind": "features", "format": file_format, "stored": dtype})
        self.file_format, self.dtype, self.tree = file_format, np.dtype(dtype), tree  # type: ignore[misc]

    def path_of(self, name: str) -> Path:
        return self.path / f"{name}.{self.file_format}"

    def has_values(self) -> bool:
        return any(next(self.path.rglob(f"*.{ending}"), None) for ending in get_args(FileFormat))

    def check_new(self) -> None:
        if os.path.isdir(self.path) and any(path.name[0] != "." for path in self.path.iterdir()):  # noqa: PTH112
            raise InputError(f"{self.path}: is not empty, and has no {self.record.name}. Choose another folder.")

    def find(self, items: Sequence[Item], session: Session, folders: Sequence[Path]) -> int:  # noqa: ARG002
        there = [item for item in items if os.path.exists(self.path_of(item.name))]  # noqa: PTH110 (False if too long)
        for item in there:
            frames, dim = self._shape(self.path_of(item.name))
            # The manifest may be one sample off; resampled recordings or unknown lengths, more.
            exact = item.num_samples > 0 and not session.options.resample
            right = abs(frames - session.num_frames(item.num_samples)) <= 1 or not exact
            if right and dim == session.model.cfg.encoder_embed_dim:
                self.done.add(item.name)
        for folder in {self.path_of(item.name).parent for item in items}:
            make_folder(folder)
            remove_unfinished(folder)
        return len(there) - len(self.done)

    def _shape(self, path: Path) -> tuple[int, int]:
        """Frames and channels in a file; none if it is damaged."""
        try:
            if self.file_format == "npy":
                array = np.load(path, mmap_mode="r", allow_pickle=False)
                whole = array.offset + array.nbytes == path.stat().st_size
            else:
                array, whole = torch.load(path, weights_only=True, mmap=True).numpy(), True
        except Exception:  # a damaged file can fail in any way
            return 0, 0
        return array.shape if whole and array.ndim == 2 and array.dtype == self.dtype else (0, 0)

    def write(self, item: Item, pieces: Iterable[NDArray[Any]]) -> None:
        pieces = (piece.astype(self.dtype, copy=False) for piece in pieces)
        with atomic_write(self.path_of(item.name)) as file:
            if self.file_format == "npy":
                _save_npy(file, pieces)
            else:
                torch.save(torch.from_numpy(np.concatenate(list(pieces))), file)


def _save_npy(file: IO[bytes], pieces: Iterable[NDArray[Any]]) -> None:
    """Write an array piece by piece, and its number of rows at the end."""
    header: dict[str, Any] = {"fortran_order": False}
    count = size = 0
    for piece in pieces:
        if count == 0:
            header |= {"descr": np.lib.format.dtype_to_descr(piece.dtype), "shape": (0, piece.shape[1])}
            np.lib.format.write_array_header_1_0(file, header)
            size = file.tell()
        file.write(np.ascontiguousarray(piece).data)
        count += len(piece)
    file.seek(0)
    np.lib.format.write_array_header_1_0(file, header | {"shape": (count, header["shape"][1])})
    assert file.tell() == size  # NumPy leaves room for the number of rows
