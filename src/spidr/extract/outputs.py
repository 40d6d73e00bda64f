"""Shared by features and units: records of how and from which recordings they were made, and claims of running jobs.

Several jobs may add to one output at once, such as those of a SLURM array. Each works in its own folder in
``OUTPUT.unfinished``, locked while it runs, and removes nothing else. A recording belongs to one job: another job that
wants it is refused or, if the first job is gone, takes over its work.
"""

import json
import logging
import os
import shutil
import time
from abc import ABC, abstractmethod
from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from pathlib import Path
from typing import Any, ClassVar

from numpy.typing import NDArray

import spidr
from spidr.extract.session import Session
from spidr.extract.sources import Item
from spidr.tools.errors import InputError
from spidr.tools.files import make_folder, write_json
from spidr.tools.lock import Lock
from spidr.tools.untrusted import parse_json

logger = logging.getLogger(__name__)

INFORMATIVE = ("model", "spidr", "num_units", "skipped", "recordings", "crc32")
"""Keys of a record that may change, since the weights decide, not their name or the version that used them."""

NAMES = "recordings.json"  # file in a job's folder with the recordings that it encodes


class Output(ABC):
    """An output on disk.

    ``beside`` it are the file that says how it was made (from ``settings`` and the session's), the JSON object of its
    recordings, name to place, and the folder of jobs. ``done`` are the names of recordings that were done when the job
    began.
    """

    tree: ClassVar[bool] = False  # whether to name recordings by their paths below the source
    writers: ClassVar[int] = 1  # threads that write

    def __init__(self, path: Path, beside: Sequence[Path], settings: dict[str, Any]) -> None:
        self.path, self.settings = path, settings
        self.record, self.recordings, self.unfinished = beside
        self.done: set[str] = set()

    @abstractmethod
    def find(self, items: Sequence[Item], session: Session, folders: Sequence[Path]) -> int:
        """Look for finished recordings, add them to :attr:`done`, and return the number of damaged ones."""

    @abstractmethod
    def write(self, item: Item, pieces: Iterable[NDArray[Any]]) -> None:
        """Write the values of a recording, while :meth:`writing`."""

    def writing(self, folder: Path, rank: int) -> AbstractContextManager[object]:  # noqa: ARG002
        """Open the files to write in a job's folder, and close them."""
        return nullcontext()

    def begin(self, items: Sequence[Item], session: Session, folders: Sequence[Path]) -> None:
        """Check that existing values were made in the same way from the same recordings."""
        self.settings = {"spidr": spidr.__version__, **session.settings(), **self.settings}
        has_record = os.path.exists(self.record)  # noqa: PTH110
        if not has_record:
            self.check_new()
        damaged = self.find(items, session, folders)
        other_jobs = len(self._jobs()) > len(folders)
        if has_record and (self.done or damaged or other_jobs or self.has_values()):
            self._check_record()
        else:  # even if a job with other settings has made nothing
            write_json(self.record, self.settings, indent=2)
        if damaged:
            logger.warning("%s: %d recordings have damaged values, which are recomputed", self.path, damaged)
        self._note(items)

    def finish(self, items: Sequence[Item], skipped: dict[str, str], folders: Sequence[Path]) -> None:  # noqa: ARG002
        """Move everything to its place."""
        write_json(self.record, self.settings | ({"skipped": skipped} if skipped else {}), indent=2)

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Keep other jobs from changing these files inside the block."""
        make_folder(self.unfinished.parent)
        with Lock(self.record, "is writing it", patience=600):
            yield

    def known(self) -> dict[str, str]:
        """Map every name given so far to the place of its recording."""
        if not os.path.exists(self.recordings):  # noqa: PTH110 (an earlier version wrote none: trust its names)
            return {}
        remedy = "Choose another output; if the recordings are the same, remove that file."
        return _read_object(self.recordings, "says of which recordings the outputs are", remedy)

    def _check_record(self) -> None:
        """Check that existing values were made in the same way."""
        found = _read_object(self.record, "says how the outputs were made", "Choose another output.", strings=False)
        expected = json.loads(json.dumps(self.settings))
        for key in [*expected, *(key for key in found if key not in expected)]:
            if key not in INFORMATIVE and found.get(key) != expected.get(key):
                raise InputError(
                    f"{self.record}: the outputs there were made with {key} = {json.dumps(found.get(key))}, now it is "
                    f"{json.dumps(expected.get(key))}. Choose another output, or remove that one."
                )

    @abstractmethod
    def has_values(self) -> bool:
        """Whether the output has values of any recordings."""

    @abstractmethod
    def check_new(self) -> None:
        """Refuse values that come without a record of how they were made."""

    def _note(self, items: Sequence[Item]) -> None:
        """Record which recording each name stands for, or a later recording of that name would get its output."""
        known = self.known()
        for item in items:
            if item.name in self.done and known.get(item.name, item.place) != item.place:
                raise InputError(
                    f"{self.recordings}: the output of {item.name} there is that of {known[item.name]}, now the name "
                    f"is that of {item.place}. Choose another output; if the recordings have only been moved, remove "
                    "that file."
                )
        if (both := known | {item.name: item.place for item in items}) != known:
            write_json(self.recordings, both, indent=0)

    @contextmanager
    def claimed(self, names: Collection[str]) -> Iterator[list[Path]]:
        """Claim recordings for this job. Raises InputError if a running job has claimed some of them.

        Yields:
            Its own new folder, then those of dead jobs that had claimed some of the same recordings: all belong to this
            job now, which removes them when they are merged.
        """

        def shared() -> list[Path]:
            return [folder for folder in self._jobs() if _claims(folder, names)]

        while True:
            with ExitStack() as stack:
                folders = []
                for folder in shared():
                    try:
                        stack.enter_context(Lock(folder, "is encoding some of these recordings"))
                        folders.append(folder)
                    except InputError:
                        if folder.is_dir():
                            raise  # otherwise it has been merged meanwhile
                with self.alone():
                    if set(shared()) - set(folders):
                        continue  # another job was faster
                    own = self.unfinished / f"{time.time_ns()}-{os.getpid()}"
                    make_folder(own)
                    write_json(own / NAMES, dict.fromkeys(sorted(names), ""), indent=0)
                    stack.enter_context(Lock(own, "is encoding some of these recordings"))
                try:
                    yield [own, *(folder for folder in folders if folder.is_dir())]
                finally:
                    if not any(own.glob("[0-9]*.jsonl")):  # nothing is lost with it
                        self.release([own])
                return

    def _jobs(self) -> list[Path]:
        return sorted(self.unfinished.glob("[0-9]*-[0-9]*/"))  # whatever else is there is not ours

    def release(self, folders: Sequence[Path]) -> None:
        """Remove folders whose contents have been merged."""
        for folder in folders:
            shutil.rmtree(folder, ignore_errors=True)
        if os.path.isdir(self.unfinished) and not any(self.unfinished.iterdir()):  # noqa: PTH112
            self.unfinished.rmdir()


def _claims(folder: Path, names: Collection[str]) -> bool:
    """Whether a job's folder claims some of these recordings, or its job was killed before claiming any."""
    try:
        return not _read_object(folder / NAMES, "", "").keys().isdisjoint(names)
    except InputError:
        return True


def _read_object(path: Path, what: str, remedy: str, *, strings: bool = True) -> dict[str, Any]:
    try:
        found = parse_json(path.read_text(encoding="utf-8"))
        if not isinstance(found, dict) or (strings and not all(isinstance(value, str) for value in found.values())):
            raise ValueError(f"it is not a JSON object{' of strings' if strings else ''}")
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: {what}, but cannot be read ({error}). {remedy}") from None
    return found
