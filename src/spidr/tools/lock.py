"""Locks on folders and files, for one process at a time. A lock whose owner is gone is taken over."""

import hashlib
import json
import logging
import os
import secrets
import socket
import threading
import time
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from functools import cache
from pathlib import Path
from typing import Self

from spidr.tools.errors import InputError

logger = logging.getLogger(__name__)

BEAT = 5.0  # seconds between two heartbeats of an owner
SILENCE = 60.0  # seconds without a heartbeat after which an owner on another machine counts as dead
PATIENCE = 120.0  # seconds to wait for a predecessor of the same SLURM job or torchrun that is still ending


@dataclass(frozen=True)
class Process:
    """A process, distinct from those of other machines and from later ones with the same id."""

    machine: str
    pid: int
    started: str

    @classmethod
    def current(cls) -> Self:
        """This process."""
        return cls(_machine(), os.getpid(), _start_time(os.getpid()) or "")

    def is_alive(self) -> bool | None:
        """Whether it still runs; None if this machine cannot tell."""
        if not self.machine or self.machine != _machine():
            return None
        return _start_time(self.pid) == self.started


@cache
def _machine() -> str:
    """The scope of process ids: a boot of a machine and a container on it; empty without /proc."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text("utf-8")
        names = f"{boot.strip()} {os.readlink('/proc/self/ns/pid')}"  # noqa: PTH115
    except OSError:
        return ""
    return hashlib.sha256(names.encode()).hexdigest()[:12]


def _start_time(pid: int) -> str | None:
    """When a process started, in clock ticks since boot; None if it has ended."""
    try:
        # The name, in parentheses, may hold anything.
        state, *fields = Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()
    except (OSError, ValueError):
        return None
    return None if state in (b"Z", b"X") else fields[18].decode()


@dataclass(frozen=True)
class Owner:
    """The holder of a lock."""

    host: str
    process: Process
    job: str
    since: str
    token: str

    @classmethod
    def current(cls) -> Self:
        """This process, from now on."""
        run = os.environ.get("TORCHELASTIC_RUN_ID", "none")
        job = os.environ.get("SLURM_JOB_ID", "") or ("" if run == "none" else run)
        now = datetime.now(UTC).astimezone().isoformat(" ", timespec="seconds")
        return cls(socket.gethostname(), Process.current(), job, now, secrets.token_hex(8))

    def __str__(self) -> str:
        job = f", job {self.job}" if self.job else ""
        return f"process {self.process.pid} on {self.host}{job}, since {self.since}"


_UNKNOWN = Owner("an unknown machine", Process("", 0, ""), "", "an unknown time", "")
_NAMELESS = replace(_UNKNOWN, host="a machine that it did not get to name")


class Lock:
    """A lock on an existing folder, or on a file in one, held inside a ``with`` block.

    It is a small hidden file beside the file, or in the folder, which says who holds it and is touched every few
    seconds. It works across machines on a shared file system and compares no clocks. ``doing`` is what the owner
    does, for the message ("is training in this folder"), and ``patience`` the seconds to wait for a living one.

    Raises:
        InputError: On entering, if another process holds the lock or the folder cannot be written to.
    """

    def __init__(self, target: Path, doing: str, *, patience: float = 0.0) -> None:
        self.target, self.doing, self.patience = target, doing, patience
        name = target.name if len(os.fsencode(target.name)) < 200 else hashlib.sha256(target.name.encode()).hexdigest()
        self.path = target / ".spidr.lock" if target.is_dir() else target.with_name(f".{name}.lock")
        self._owner = _UNKNOWN
        self._successor: Owner | None = None
        self._ended = threading.Event()

    def __enter__(self) -> Self:
        self._owner = Owner.current()
        try:
            self._acquire()
        except OSError as error:
            raise InputError(f"{self.target}: cannot be locked ({error.strerror}); choose another place") from error
        self._ended.clear()
        self._thread = threading.Thread(target=self._beat, name="lock", daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join(BEAT)
        with suppress(OSError):
            if self._read()[0].token == self._owner.token:
                self.path.unlink()

    def check(self) -> None:
        """Check that the lock is still held; nothing may be written otherwise.

        Raises:
            InputError: This process seemed dead, since its machine or file system had stalled, and another took over.
        """
        if self._successor is not None:
            raise InputError(
                f"{self.target}: this process gave no sign of life for {SILENCE:g} s; {self._successor} has taken over"
            )

    def _acquire(self) -> None:
        """Create the lock file, or take over that of an owner that is gone."""
        seen, beat, moves, waits = None, 0, False, False
        first = since = 0.0  # when this owner and its last heartbeat were first seen
        while not self._create():
            try:
                owner, new_beat = self._read()
            except FileNotFoundError:  # released just now
                continue
            now = time.monotonic()
            if owner != seen:
                first = since = now
                moves = False
            elif new_beat != beat:
                since, moves = now, True
            seen, beat = owner, new_beat
            alive = owner.process.is_alive()
            if alive is None:
                silence = 2 * BEAT if owner == _NAMELESS else SILENCE
                alive = False if now - since > silence else moves or None
            if alive is False:
                if self._take_over(owner, stuck=now - since > 2 * SILENCE):
                    logger.warning("%s: taken over from %s, which is gone", self.target, owner)
                    return
            elif alive and now - first > (PATIENCE if owner.job and owner.job == self._owner.job else self.patience):
                raise InputError(
                    f"{self.target}: another process {self.doing} ({owner}). Wait for it, or end it first.",
                    guide="questions.md#it-says-that-another-process-is-at-work-in-this-folder",
                )
            elif now > first and not waits:
                waits = True
                logger.warning("%s: waiting for %s", self.target, owner)
            time.sleep(0.5)

    def _create(self) -> bool:
        """Create the lock file, unless it exists. Exclusive on network file systems, too."""
        try:
            file = self.path.open("x", encoding="utf-8")
        except FileExistsError:
            return False
        try:
            with file:
                file.write(json.dumps(asdict(self._owner)))
        except OSError:
            self.path.unlink()
            raise
        return True

    def _take_over(self, gone: Owner, *, stuck: bool) -> bool:
        """Overwrite the lock file of an owner that is gone, unless another process was faster."""
        guard = self.path.with_name(f"{self.path.name}.taking")
        try:
            guard.mkdir()
        except FileExistsError:
            if stuck:  # another process was killed right here
                with suppress(OSError):
                    guard.rmdir()
            return False
        try:
            with suppress(FileNotFoundError):
                if self._read()[0] == gone:
                    self.path.write_text(json.dumps(asdict(self._owner)), encoding="utf-8")
                    return True
            return False
        finally:
            guard.rmdir()

    def _read(self) -> tuple[Owner, int]:
        """The owner, and a number that changes with each heartbeat."""
        with self.path.open("rb") as file:  # opening asks the file server, while stat may be cached
            text = file.read(10_000)
            try:
                fields = json.loads(text)
                owner = Owner(**fields | {"process": Process(**fields["process"])})
            except (ValueError, TypeError, KeyError):
                owner = _UNKNOWN if text else _NAMELESS
            return owner, os.fstat(file.fileno()).st_mtime_ns

    def _beat(self) -> None:
        while not self._ended.wait(BEAT):
            with suppress(OSError):  # the file server does not answer: try later
                if self._create():  # another process took it for a stale lock
                    continue
                owner, _ = self._read()
                if owner.token != self._owner.token:
                    self._successor = owner
                    return
                os.utime(self.path)
