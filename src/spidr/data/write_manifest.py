"""Write manifests: one row per recording of folders, tar archives and lists.

``python -m spidr.data.write_manifest [--ext EXT] [--fairseq] [--stats] [--on-error skip] DATASET [DATASET ...] OUTPUT``
"""

import argparse
import io
import logging
import os
import re
import sys
import tarfile
from array import array
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

from spidr.tools.command import Parser, command
from spidr.tools.errors import InputError, first_line
from spidr.tools.files import atomic_write, check_file, expand, find_files, make_folder
from spidr.tools.lazy import command_needs

logger = logging.getLogger(__name__)

OnError = Literal["raise", "skip"]


def _arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = Parser(
        "python -m spidr.data.write_manifest",
        usage="%(prog)s [options] dataset [...] output",
        description="Write the manifest of folders of recordings, uncompressed tar archives (or folders of them), and "
        "lists (of paths, Kaldi's wav.scp and segments, manifests).",
        example="python -m spidr.data.write_manifest recordings train.csv --ext .wav .flac",
    )
    add = parser.add_argument
    text = "folders, .tar files and lists; then the manifest to write: .csv, .jsonl or, with --fairseq, .tsv"
    add("paths", nargs="*", metavar="dataset ... output", help=text)
    text = "suffixes of the recordings' names: .flac, _mic1.wav (default: .wav)"
    add("--ext", nargs="+", action="extend", help=text)
    add("--fairseq", action="store_true", help="write fairseq's format: paths and numbers of samples")
    text = (
        "also write mean and standard deviation of each recording, so that training on parts of hour-long recordings "
    )
    add("--stats", action="store_true", help=f"{text}need not decode the whole (slower: decodes everything now)")
    text = "skip: skip and list bad recordings (default: raise)"
    add("--on-error", choices=["raise", "skip"], default="raise", help=text)
    args = parser.parse_intermixed_args(argv)
    args.ext, rest = _split_extensions(args.ext or [".wav"], missing=max(0, 2 - len(args.paths)))
    is_last = bool(args.paths) and args.paths[-1].lower().endswith((".csv", ".jsonl", ".tsv"))
    *args.dataset, args.output = [*rest, *args.paths] if is_last else [*args.paths, *rest] or [""]
    if not args.dataset:
        parser.error("the following arguments are required: dataset, output")
    if args.fairseq and (args.stats or len(args.dataset) > 1 or os.path.isfile(args.dataset[0])):  # noqa: PTH113
        parser.error("--fairseq is for one folder and has no --stats")
    return args


def _split_extensions(values: list[str], missing: int) -> tuple[list[str], list[str]]:
    """Tell extensions from paths among the values of --ext, for users who write ``--ext .flac DATASET OUTPUT``."""
    paths = (i for i, value in enumerate(values) if i and (os.sep in value or os.path.exists(value)))  # noqa: PTH110
    first = next(paths, len(values) - min(missing, len(values) - 1))
    return values[:first], values[first:]


if __name__ == "__main__":
    _arguments()  # --help works without the imports below

with command_needs("train", __name__):
    import numpy as np
    import polars as pl

    from spidr.config import SAMPLE_RATE, DataConfig
    from spidr.data.audio import num_samples, statistics
    from spidr.data.manifest import ARCHIVE, SCHEMA, SPAN, is_table, iter_recordings, read_manifest, stem
    from spidr.data.measure import measure, problems_of
    from spidr.data.names import AUDIO
    from spidr.data.recording import Recording
    from spidr.data.summary import duration, summarise


class Written(NamedTuple):
    """A written manifest, and why recordings were skipped."""

    manifest: pl.DataFrame
    left_out: list[InputError]


def write_manifest(
    dataset: str | Path | list[str] | list[Path],
    output: str | Path,
    file_extension: str | Sequence[str] = ".wav",
    *,
    fairseq: bool = False,
    stats: bool = False,
    on_error: OnError = "raise",
) -> Written:
    """Write the manifest of all recordings in folders, archives and lists.

    Linked folders are followed. A recording is named after its file or, if several files have the same name, after its
    path below the dataset. Rows are sorted by path within each dataset. The manifest appears complete or not at all.

    Args:
        dataset: A folder, an uncompressed tar archive, a folder of archives, or a list that
            :func:`spidr.data.read_manifest` reads; or several of them.
        output: The manifest: ``.csv`` or ``.jsonl``; ``.tsv`` for fairseq's.
        file_extension: Suffix or suffixes of the recordings' names, in upper or lower case.
        fairseq: Write fairseq's manifest of one folder: the folder, then ``relative/path<TAB>num_samples``.
        stats: Decode everything and add ``mean`` and ``std`` of the samples, with which training standardises a part of
            a recording like the whole without decoding the whole.
        on_error: "skip" skips recordings that cannot be read.

    Raises:
        InputError: No file matches, or recordings are empty, unreadable or not 16 kHz mono (all are named).
    """
    output, endings = expand(output), (".tsv",) if fairseq else (".csv", ".jsonl")
    if output.suffix.lower() not in endings:
        raise InputError(f"{output}: the manifest's name must end in {' or '.join(endings)}.")
    if os.path.isdir(output):  # noqa: PTH112
        raise InputError(f"{output}: is a folder.")
    extensions = [file_extension] if isinstance(file_extension, str) else file_extension
    suffixes = tuple(name.lower() if "." in name else f".{name.lower()}" for name in extensions)
    sources = [os.path.abspath(expand(source)) for source in (dataset if isinstance(dataset, list) else [dataset])]  # noqa: PTH100
    bad: list[InputError] = []
    found = pl.concat([_find(source, suffixes, bad) for source in sources], how="diagonal_relaxed")
    written = _describe(_named(found, suffixes), bad, stats=stats, on_error=on_error)
    table = written.manifest
    nested = [name for name, kind in table.schema.items() if kind.is_nested()]
    if nested and output.suffix.lower() == ".csv":
        raise InputError(f"{output}: column {nested[0]!r} holds lists; write a .jsonl.")
    if fairseq:
        paths = pl.Series([sources[0], *table["path"]])
        for bad_path in paths.filter(paths.str.contains(r"[\t\n\r]")):
            raise InputError(f"{bad_path!r}: fairseq's manifests cannot hold tabs and line breaks; write a .csv.")
        table = table.select(pl.col("path").str.strip_prefix(f"{sources[0]}/"), "num_samples")
    make_folder(output.parent)
    with atomic_write(output) as file:
        if fairseq:
            file.write(f"{sources[0]}\n".encode())
            table.write_csv(file, include_header=False, separator="\t", quote_style="never")
        elif output.suffix.lower() == ".csv":
            table.write_csv(file)
        else:
            table.write_ndjson(file)
    return written


write_manifest_tar = write_manifest
"""Kept for code written for the published package."""


def write_manifest_fairseq(
    dataset: str | Path,
    output: str | Path,
    file_extension: str | Sequence[str] = ".wav",
    *,
    on_error: OnError = "raise",
) -> None:
    """Write fairseq's manifest of a folder; see :func:`write_manifest`."""
    write_manifest(dataset, output, file_extension, fairseq=True, on_error=on_error)


# --------------------------------------------------------------------------------------------------------------------
# Find recordings: a manifest's columns that say where they are, and "relative", the path below the source


def _find(source: str, suffixes: tuple[str, ...], bad: list[InputError]) -> pl.DataFrame:
    """List the recordings of a source; add those that a row cannot name to ``bad``."""
    if not os.path.exists(source):  # noqa: PTH110
        raise InputError(f"{source}: does not exist; expected a folder, a .tar or a list.")
    if os.path.isdir(source):  # noqa: PTH112
        return _in_folder(source, suffixes, bad)
    check_file(source)
    name = os.path.basename(source).lower()  # noqa: PTH119
    if ".tar" in name or name.endswith((".tgz", ".tbz2")):
        return _in_archives([source], suffixes, bad)
    if is_table(source) and not name.endswith(AUDIO):
        table = read_manifest(source, needs_audio=True)
        return table.drop("num_samples", "mean", "std", strict=False).with_columns(relative="path")
    return _in_files([source], os.path.dirname(source), bad)  # noqa: PTH120


def _in_folder(root: str, suffixes: tuple[str, ...], bad: list[InputError]) -> pl.DataFrame:
    audio = find_files(root, lambda name: name.lower().endswith((*suffixes, *AUDIO)))
    found = [path for path in audio if path.lower().endswith(suffixes)]
    endings = Counter(os.path.splitext(path)[1].lower() for path in audio).most_common()  # noqa: PTH122
    if found:
        # Those with the same extension are skipped on purpose, like _mic2.flac beside _mic1.flac.
        others = [f"{count:,} {end}" for end, count in endings if not any(name.endswith(end) for name in suffixes)]
        if others:
            logger.warning("%s: skipping %s; to include them, name their extension with --ext", root, ", ".join(others))
        return _in_files(found, root, bad)
    if archives := find_files(root, lambda name: name.lower().endswith(".tar")):
        return _in_archives(archives, suffixes, bad)
    there = f" (there are {', '.join(f'{count:,} {end}' for end, count in endings)})" if endings else ""
    raise InputError(
        f"{root}: no file's name ends in {' or '.join(suffixes)}. Choose another extension with --ext{there}."
    )


def _in_files(paths: list[str], root: str, bad: list[InputError]) -> pl.DataFrame:
    named = pl.Series([path for path in paths if _has_a_name(path, path, bad)], dtype=pl.String)
    return pl.DataFrame({"path": named, "relative": named.str.strip_prefix(root).str.strip_chars_start("/")})


def _in_archives(archives: list[str], suffixes: tuple[str, ...], bad: list[InputError]) -> pl.DataFrame:
    rows = [row for archive in archives for row in _members(archive, suffixes, bad)]
    if not rows and not bad:
        raise InputError(
            f"{archives[0]}: no file in it has a name that ends in {' or '.join(suffixes)}. Choose another extension "
            "with --ext; if they are links, pack the archive with --dereference --hard-dereference."
        )
    table = pl.DataFrame(rows, schema={name: SCHEMA[name] for name in ("path", *ARCHIVE)}, orient="row")
    return table.with_columns(relative="path").sort("archive", "path", "byte_offset")


def _has_a_name(name: str, place: str, bad: list[InputError]) -> bool:
    """Whether a table can hold a file's name."""
    if is_wrong := bool(re.search("[\0\ud800-\udfff]", name)):
        bad.append(InputError(f"{place!r}: the name is not valid UTF-8; rename the file."))
    return not is_wrong


def _named(found: pl.DataFrame, suffixes: tuple[str, ...]) -> pl.DataFrame:
    """Give each recording a ``fileid``: its file's name without the suffix, or more of its path to make it unique."""
    ending = f"(?i)(?:{'|'.join(map(re.escape, suffixes))})$"
    path, relative = (pl.col(name).str.replace(ending, ".") for name in ("path", "relative"))
    if "fileid" not in found.columns:
        found = found.with_columns(fileid=pl.lit(None, pl.String))
    where = [name for name in ("archive", "path") if name in found.columns]
    place = pl.concat_str(where, separator="/", ignore_nulls=True)
    choices = [relative.str.replace(r"\.[^./]*$", ""), pl.col("relative"), place.str.strip_prefix("/")]
    own = found["fileid"].is_not_null()
    found = found.with_columns(fileid=pl.coalesce("fileid", stem(path)))
    for choice in choices:
        longer = found["fileid"].is_duplicated() & ~own
        if longer.any():
            found = found.with_columns(fileid=pl.when(longer).then(choice).otherwise("fileid"))
    return found.drop("relative")


class _Archive(io.FileIO):
    """A guard against tarfile's trust in the sizes in headers: no large reads, no going back."""

    def read(self, size: int | None = -1, /) -> bytes:
        """Read a header."""
        if size is None or not 0 <= size <= 1 << 20:
            raise tarfile.ReadError("a header that is too long")
        return super().read(size)

    def seek(self, position: int, whence: int = os.SEEK_SET, /) -> int:
        """Go to the next header."""
        if position < self.tell():
            raise tarfile.ReadError("a member with a negative size")
        return super().seek(position, whence)


def _members(archive: str, suffixes: tuple[str, ...], bad: list[InputError]) -> Iterator[tuple[str, str, int, int]]:
    """Yield name, archive, offset and size of each recording, through all archives joined with ``cat``."""
    begin: int | None = 0
    try:
        while begin is not None:
            with _Archive(archive) as file:
                file.seek(begin)
                tar = tarfile.open(fileobj=file, mode="r:")  # noqa: SIM115
                for member in tar:
                    name, place = member.name.lower(), f"{archive}:{member.name}"
                    if not member.isreg() or not name.endswith(suffixes) or name.rpartition("/")[2].startswith("."):
                        continue
                    if member.issparse():
                        bad.append(InputError(f"{place}: a sparse member; pack the archive without --sparse."))
                    elif _has_a_name(member.name, place, bad):
                        yield member.name, archive, member.offset_data, member.size
                    tar.members = []  # type: ignore[attr-defined]  # or it keeps the whole table of contents
            begin = _after_zeros(archive, tar.offset)
            # tarfile stops at a damaged header without an error, but an archive ends with zeros.
            if begin == tar.offset:
                raise InputError(f"{archive}: damaged after byte {tar.offset}; pack the archive again.")
    except InputError:
        raise
    except (tarfile.TarError, OverflowError, ValueError) as error:  # the last two: absurd numbers in a PAX header
        with Path(archive).open("rb") as raw:
            is_compressed = raw.read(6).startswith((b"\x1f\x8b", b"BZh", b"\xfd7zXZ", b"\x28\xb5\x2f\xfd"))
        reason = f"not a complete tar archive ({first_line(error)})"
        if is_compressed:
            reason = "a compressed archive; decompress it first, as recordings are read in place"
        raise InputError(f"{archive}: {reason}.") from None
    except OSError as error:
        raise InputError(f"{archive}: the archive cannot be read ({error.strerror}).") from None


def _after_zeros(archive: str, position: int) -> int | None:
    """Find the next archive after the zeros that end one; None at the end of the file."""
    with Path(archive).open("rb") as file:
        file.seek(position)
        while block := file.read(1 << 20):
            if rest := block.lstrip(b"\0"):
                return position + (len(block) - len(rest)) // tarfile.BLOCKSIZE * tarfile.BLOCKSIZE
            position += len(block)
    return None


# --------------------------------------------------------------------------------------------------------------------
# Measure them


def _describe(found: pl.DataFrame, bad: list[InputError], *, stats: bool, on_error: OnError) -> Written:
    """Read the length of every recording; skip those that cannot be read, or name them all in one error."""

    def describe(recording: Recording) -> tuple[int, float, float]:
        return num_samples(recording), *(statistics(recording) if stats else (0.0, 0.0))

    total = found.height + len(bad)
    names = ("num_samples", "mean", "std") if stats else ("num_samples",)
    columns: list[array[Any]] = [array("q"), array("d"), array("d")]
    for result in measure(describe, iter_recordings(found), total=found.height):
        if isinstance(result, InputError):
            bad.append(result)
            result = -1, 0.0, 0.0
        for column, value in zip(columns, result, strict=True):
            column.append(value)
    if len(bad) == total or (bad and on_error == "raise"):
        raise problems_of(bad, total, "" if on_error == "skip" else "--on-error skip leaves them out")
    described = found.with_columns(map(pl.Series, names, columns))
    if not SPAN.keys().isdisjoint(described.columns):
        # Without both, readers could not tell whether a length is the span's or the file's.
        start = pl.col("start").fill_null(0.0) if "start" in described.columns else pl.lit(0.0)
        described = described.with_columns(start=start, end=start + pl.col("num_samples") / SAMPLE_RATE)
    order = [column for column in SCHEMA if column in described.columns]
    return Written(described.select(*order, pl.exclude(order)).filter(pl.col("num_samples") >= 0), bad)


@command
def main(argv: list[str] | None = None) -> None:
    """Run the command line."""
    args = _arguments(argv)
    options = {"fairseq": args.fairseq, "stats": args.stats, "on_error": args.on_error}
    manifest, left_out = write_manifest(args.dataset, args.output, args.ext, **options)
    lengths = manifest["num_samples"].to_numpy() / SAMPLE_RATE
    say = sys.stderr.write
    say(f"{args.output}: {len(lengths):,} recording{'s' * (len(lengths) > 1)}, {duration(lengths.sum() / 3600)} ")
    say(f"(each {np.min(lengths):,.2f} s to {np.max(lengths):,.2f} s)\n")
    cfg = DataConfig(str(args.output))
    for warning in summarise(manifest["num_samples"].to_numpy(), cfg, cfg.min_sample_size, None).warnings(cfg):
        say(f"With the default settings of [data], {warning}.\n")
    if left_out:
        say(f"left out, because they cannot be read: {len(left_out):,}\n")
        say("".join(f"  {error}\n" for error in left_out))


if __name__ == "__main__":
    sys.exit(main())
