"""Writing manifests: one row for each recording of a folder or of an uncompressed tar archive.

``python -m spidr.data.write_manifest DATASET OUTPUT [--ext .wav] [--fairseq] [--stats]``
"""

from __future__ import annotations

import argparse
import io
import os
import sys
import tarfile
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from spidr.tools.command import Parser, command
from spidr.tools.errors import InputError, first_line
from spidr.tools.files import atomic_write, make_folder
from spidr.tools.lazy import command_needs

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence
    from contextlib import AbstractContextManager


def _arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = Parser(
        "python -m spidr.data.write_manifest",
        description="Write the manifest of a folder of recordings, or of an uncompressed tar archive of them.",
        example="python -m spidr.data.write_manifest recordings train.csv --ext .wav .flac",
    )
    parser.add_argument("dataset", help="folder or .tar")
    parser.add_argument("output", help="manifest to write: .csv, .jsonl or, with --fairseq, .tsv")
    parser.add_argument("--ext", nargs="+", default=[".wav"], help="extensions of the recordings (default: .wav)")
    parser.add_argument("--fairseq", action="store_true", help="write fairseq's format: paths and numbers of samples")
    parser.add_argument(
        "--stats",
        action="store_true",
        help="also write mean and standard deviation of each recording, so that training on parts of hour-long "
        "recordings need not decode the whole (slower: decodes everything now)",
    )
    args = parser.parse_args(argv)
    if args.fairseq and (args.stats or os.path.isfile(args.dataset)):  # noqa: PTH113
        parser.error("--fairseq is for folders and has no --stats")
    return args


if __name__ == "__main__":
    _arguments()  # help needs nothing else

with command_needs("train", __name__):
    import polars as pl
    from tqdm import tqdm

    from spidr.data.audio import Recording, num_samples, statistics
    from spidr.data.manifest import ARCHIVE, REQUIRED, STATISTICS

CHUNK = 256
"""Recordings per task of a thread."""

MAX_HEADER = 1 << 20
"""Bytes of a header of an archive at most."""


def write_manifest(
    dataset: str | Path, output: str | Path, file_extension: str | Sequence[str] = ".wav", *, stats: bool = False
) -> None:
    """Write the manifest of all recordings in a folder and the folders in it.

    Rows are sorted by path. The file appears when it is complete, or not at all.

    Args:
        dataset: The folder.
        output: The manifest: ``.csv`` or ``.jsonl``.
        file_extension: Which files are recordings, one extension or several; upper and lower case are the same.
        stats: Decode everything and add ``mean`` and ``std`` of the samples: with them, training standardises a part
            of a recording like the whole without decoding the whole.

    Raises:
        InputError: No file matches, or a recording is empty, unreadable or not 16 kHz mono.
    """
    output = _check_output(output, (".csv", ".jsonl"))
    recordings = [Recording(path) for path in _find(dataset, file_extension)]
    _write_table(output, _describe(recordings, len(recordings), stats=stats))


def write_manifest_fairseq(
    dataset: str | Path, output: str | Path, file_extension: str | Sequence[str] = ".wav"
) -> None:
    """Write fairseq's manifest of a folder: the root folder, then ``relative/path<TAB>num_samples``.

    Arguments and errors are those of :func:`write_manifest`; names with tabs or line breaks cannot be written.
    """
    output = _check_output(output, (".tsv",))
    root = os.path.abspath(dataset)  # noqa: PTH100
    paths = _find(dataset, file_extension)
    for path in [root, *paths]:
        if any(character in path for character in "\t\n\r"):
            raise InputError(f"{path!r}: fairseq's manifests cannot hold tabs and line breaks; write a .csv.")
    table = _describe([Recording(path) for path in paths], len(paths), stats=False)
    rows = table.select("path", "num_samples").iter_rows()
    with _new(output) as file:
        file.write(f"{root}\n".encode())
        file.writelines(f"{os.path.relpath(path, root)}\t{samples}\n".encode() for path, samples in rows)


def write_manifest_tar(
    dataset: str | Path, output: str | Path, file_extension: str | Sequence[str] = ".wav", *, stats: bool = False
) -> None:
    """Write the manifest of all recordings in an uncompressed tar archive, reading it once; links are left out.

    Rows are sorted by member name and say where in the archive the recording is. Arguments and errors are those of
    :func:`write_manifest`.
    """
    output = _check_output(output, (".csv", ".jsonl"))
    archive = os.path.abspath(dataset)  # noqa: PTH100
    suffixes = _suffixes(file_extension)
    table = _describe(_members(archive, suffixes), None, stats=stats)
    if table.is_empty():
        raise InputError(
            f"{archive}: no file in it has a name that ends in {' or '.join(suffixes)}. Choose another extension with "
            "--ext; if they are links, pack the archive with --dereference --hard-dereference."
        )
    _write_table(output, table.sort("path", "byte_offset"))


def _suffixes(file_extension: str | Sequence[str]) -> tuple[str, ...]:
    extensions = [file_extension] if isinstance(file_extension, str) else file_extension
    return tuple("." + extension.lower().removeprefix(".") for extension in extensions)


def _find(dataset: str | Path, file_extension: str | Sequence[str]) -> list[str]:
    """Absolute paths of a folder's recordings, sorted."""
    root, suffixes = os.path.abspath(dataset), _suffixes(file_extension)  # noqa: PTH100
    if not os.path.isdir(root):  # noqa: PTH112
        raise InputError(f"{root}: not a folder.")

    def fail(error: OSError) -> None:
        raise InputError(f"{error.filename}: the folder cannot be read ({error.strerror}).")

    found = [
        os.path.join(folder, name)  # noqa: PTH118
        for folder, _, names in os.walk(root, onerror=fail)
        for name in names
        if name.lower().endswith(suffixes) and not name.startswith(".")
    ]
    if not found:
        raise InputError(
            f"{root}: no file's name ends in {' or '.join(suffixes)}. Choose another extension with --ext."
        )
    return sorted(found)


class _Archive(io.FileIO):
    """An archive as tarfile reads it, which believes every size: neither much at once, nor anything a second time."""

    def __init__(self, path: str) -> None:
        super().__init__(path)
        self._size = os.fstat(self.fileno()).st_size

    def read(self, size: int | None = -1, /) -> bytes:
        """Read a header."""
        if size is None or not 0 <= size <= MAX_HEADER:
            raise tarfile.ReadError("a header that is too long")
        return super().read(size)

    def seek(self, position: int, whence: int = os.SEEK_SET, /) -> int:
        """Go to the next header."""
        if position > self._size:
            raise tarfile.ReadError("unexpected end of data")
        if position < self.tell():
            raise tarfile.ReadError("a member of negative size")
        return super().seek(position, whence)


def _members(archive: str, suffixes: tuple[str, ...]) -> Iterator[Recording]:
    """Recordings of an archive, in its order."""
    try:
        if os.path.exists(archive) and not os.path.isfile(archive):  # noqa: PTH110, PTH113
            raise InputError(f"{archive}: not a regular file.")
        with _Archive(archive) as file, tarfile.open(fileobj=file, mode="r:") as tar:
            for member in tar:
                if member.isreg() and member.name.lower().endswith(suffixes):
                    if member.issparse():
                        raise InputError(
                            f"{archive}:{member.name}: a sparse member; pack the archive without --sparse."
                        )
                    yield Recording(member.name, archive, member.offset_data, member.size)
                tar.members = []  # type: ignore[attr-defined]  # Else the archive's whole table of contents is kept.
            # A damaged header ends the loop without an error; an archive ends with zeros.
            with open(archive, "rb") as rest:  # noqa: PTH123
                rest.seek(tar.offset)
                if rest.read(tarfile.BLOCKSIZE).strip(b"\0"):
                    raise InputError(f"{archive}: damaged after byte {tar.offset}; pack the archive once more.")
    except FileNotFoundError:
        raise InputError(f"{archive}: does not exist; expected a folder or a .tar.") from None
    except InputError:
        raise
    except (tarfile.TarError, OverflowError, ValueError) as error:  # the latter two: absurd numbers in a PAX header
        if _is_compressed(archive):
            reason = "a compressed archive; decompress it first, recordings are read from where they lie in it"
        else:
            reason = f"not a complete tar archive ({first_line(error)})"
        raise InputError(f"{archive}: {reason}.") from None
    except OSError as error:
        raise InputError(f"{archive}: the archive cannot be read ({error.strerror}).") from None


def _is_compressed(path: str) -> bool:
    with Path(path).open("rb") as file:
        return file.read(6).startswith((b"\x1f\x8b", b"BZh", b"\xfd7zXZ", b"\x28\xb5\x2f\xfd"))


def _describe(recordings: Iterable[Recording], total: int | None, *, stats: bool) -> pl.DataFrame:
    """A manifest's rows in the given order, several recordings at once."""

    def describe(chunk: list[Recording]) -> pl.DataFrame:
        columns = zip(*(_row(recording, stats=stats) for recording in chunk), strict=True)
        return pl.DataFrame(list(columns), schema=_schema(chunk[0], stats=stats), orient="col")

    threads = min(32, (os.cpu_count() or 1) + 4)
    iterator = iter(recordings)
    pending: deque[Future[pl.DataFrame]] = deque()
    tables: list[pl.DataFrame] = []
    pool = ThreadPoolExecutor(threads)
    with tqdm(total=total, desc="Manifest", unit="file", disable=None) as progress:

        def finish_one() -> None:
            tables.append(pending.popleft().result())
            progress.update(tables[-1].height)

        try:
            # Never far ahead of the results: after an error, little remains to be waited for.
            while chunk := list(islice(iterator, CHUNK)):
                pending.append(pool.submit(describe, chunk))
                if len(pending) > 2 * threads:
                    finish_one()
            while pending:
                finish_one()
        finally:
            pool.shutdown(cancel_futures=True)
    return pl.concat(tables) if tables else pl.DataFrame(schema=REQUIRED)


def _schema(recording: Recording, *, stats: bool) -> dict[str, Any]:
    return REQUIRED | (ARCHIVE if recording.archive is not None else {}) | (STATISTICS if stats else {})


def _row(recording: Recording, *, stats: bool) -> tuple[Any, ...]:
    """Values in the order of the schema."""
    try:
        is_name = b"\0" not in str(recording).encode()
    except UnicodeEncodeError:
        is_name = False
    if not is_name:
        raise InputError(f"{str(recording)!r}: the name is not valid UTF-8; rename the file.")
    fileid = os.path.splitext(os.path.basename(recording.path))[0]  # noqa: PTH119, PTH122
    place = () if recording.archive is None else (recording.archive, recording.byte_offset, recording.byte_size)
    return fileid, recording.path, num_samples(recording), *place, *(statistics(recording) if stats else ())


def _check_output(output: str | Path, suffixes: tuple[str, ...]) -> Path:
    output = Path(output)
    if output.suffix not in suffixes:
        raise InputError(f"{output}: the manifest's name must end in {' or '.join(suffixes)}.")
    if os.path.isdir(output):  # noqa: PTH112
        raise InputError(f"{output}: is a folder.")
    return output


def _write_table(output: Path, table: pl.DataFrame) -> None:
    with _new(output) as file:
        if output.suffix == ".csv":
            table.write_csv(file)
        else:
            table.write_ndjson(file)


def _new(output: Path) -> AbstractContextManager[IO[bytes]]:
    make_folder(output.parent)
    return atomic_write(output)


@command
def main(argv: list[str] | None = None) -> None:
    """Run the command line."""
    args = _arguments(argv)
    is_folder = os.path.isdir(args.dataset)  # noqa: PTH112
    write: Callable[..., None] = write_manifest if is_folder else write_manifest_tar
    if args.fairseq:
        write_manifest_fairseq(args.dataset, args.output, args.ext)
    else:
        write(args.dataset, args.output, args.ext, stats=args.stats)


if __name__ == "__main__":
    sys.exit(main())
