"""The processes of a run watch each other: none waits for one that is gone, and one of them says why.

torchrun and ``srun --kill-on-bad-exit`` end a run when one of its processes exits. Neither notices one that hangs or
whose machine has vanished, and a collective operation waits an hour for it.
"""

import json
import logging
import os
import socket
import sys
import threading
import time
from contextlib import suppress
from dataclasses import astuple, dataclass
from datetime import timedelta
from typing import Any

from torch import distributed as dist

from spidr.tools.logging import FILE_ONLY

logger = logging.getLogger(__name__)

BEAT = 1.0  # seconds between two heartbeats

SILENCE = 30.0
"""Seconds without a heartbeat after which a process counts as dead; ``5 * BEAT`` once something has gone wrong."""

GRACE = 10.0  # seconds that a process has to end by itself once the run cannot continue


@dataclass(frozen=True)
class Cause:
    """Why the run ends: the rank that found out first and reports it, the rank at fault, exit status and message."""

    told_by: int
    about: int
    status: int
    text: str


class Peers:
    """Exchanges heartbeats, and the cause if the run cannot continue, through the store where the processes meet.

    Rank 0 watches all others and they watch rank 0, so the store answers a few requests a second from each. One thread
    sends them; another notices when answers fail to come, and ends the process if it is stuck. Time is counted in
    heartbeats, so that a process that was itself suspended does not take the others for dead.
    """

    def __init__(self, store: Any, rank: int, world_size: int) -> None:
        self.rank, self.world_size = rank, world_size
        prefix = f"spidr/{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}"
        # A connection of its own: the other one is blocked while a collective operation is being set up.
        self._store = dist.PrefixStore(prefix, store.clone())  # type: ignore[attr-defined]
        self._status = socket.gethostname()
        self._beats = 0
        self._beat()
        self._store.append("come", f"{rank} ")  # type: ignore[attr-defined]
        self._seen: dict[int, tuple[bytes, int]] = {}  # last heartbeat, and the number of own beats since
        self._cause: Cause | None = None
        self._closed = threading.Event()
        self._news = threading.Event()  # set when all have joined, or when there is a cause
        self._threads = [threading.Thread(target=f, name="peers", daemon=True) for f in (self._talk, self._guard)]
        for thread in self._threads:
            thread.start()

    def meet(self, timeout: timedelta) -> None:
        """Wait until all processes have joined: a cluster may start them one by one.

        One that has joined and stops sending heartbeats is noticed much sooner. Raises RuntimeError if a process is
        missing; :meth:`explain` says which.
        """
        if not self._news.wait(timeout.total_seconds()):
            come = self._store.get("come").decode().split()
            missing = [str(rank) for rank in range(self.world_size) if str(rank) not in come]
            place = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
            met = f"{len(come)} of {self.world_size} processes have met at {place} within {timeout}"
            self._tell(int(missing[0]), 1, f"{met}; nothing was heard of rank {', '.join(missing)}")
        if self._cause is not None:
            raise RuntimeError(self._cause.text)

    def explain(self, error: BaseException, status: int) -> Cause:
        """Find the cause of the run's end, given an error of this process and the exit status if that is the cause.

        Another process may be behind a RuntimeError, such as that of a failed collective operation.
        """
        if isinstance(error, RuntimeError):
            with suppress(RuntimeError):
                self._store.set("trouble", "")
            enough = self._beats + 10  # with a slow store, these take longer, and so does noticing a silence
            while self._cause is None and self._beats < enough:
                time.sleep(BEAT / 10)
        cause = self._cause or self._tell(self.rank, status, str(error))
        if cause.told_by != self.rank:
            time.sleep(5 * BEAT)  # a launcher ends all as soon as one has ended: the one that says why goes first
        elif self.rank == 0:
            time.sleep(4 * BEAT)  # the store may end with this process: the others must have read why
        return cause

    def leave(self) -> None:
        """Say goodbye once all are about to end: from now on, silence is normal."""
        self._status = "left"
        with suppress(RuntimeError):
            dist.barrier()
            self._beat()  # unless the store ended first

    def close(self) -> None:
        """Stop watching."""
        self._closed.set()
        for thread in self._threads:
            thread.join(BEAT)

    # ------------------------------------------------------------------------------------------------- internals

    def _beat(self) -> None:
        self._beats += 1
        self._store.set(f"rank {self.rank}", f"{self._beats} {self._status}")

    def _tell(self, about: int, status: int, text: str) -> Cause:
        """Publish why the run ends, unless another process was faster. Returns the published cause."""
        mine = json.dumps(astuple(Cause(self.rank, about, status, text)))
        try:
            said = self._store.compare_set("cause", "", mine).decode()
        except RuntimeError:  # nobody is left to be told
            said = mine
        self._cause = Cause(*json.loads(said))
        return self._cause

    def _talk(self) -> None:
        pause = BEAT / 16  # processes that join at the same time should not wait for each other
        while self._cause is None and not self._closed.wait(pause):
            pause = min(BEAT, 2 * pause)
            try:
                self._beat()
                if self._store.check(["cause"]):
                    self._cause = Cause(*json.loads(self._store.get("cause")))
                else:
                    self._look()
            except RuntimeError:
                text = "lost contact with the process at which all meet: rank 0 or the launcher has ended"
                self._cause = Cause(self.rank, 0, 1, text)

    def _look(self) -> None:
        """Check whether all have joined and none has been silent for too long."""
        if not self._news.is_set():
            if self.rank == 0:
                self._seen = dict.fromkeys(map(int, self._store.get("come").split()), (b"", 0)) | self._seen
                if len(self._seen) == self.world_size:
                    self._store.set("all", "")
            elif self._store.check(["rank 0"]):
                self._seen.setdefault(0, (b"", 0))
            if self._store.check(["all"]):
                self._news.set()
        patience = 5 if self._store.check(["trouble"]) else SILENCE / BEAT
        values = self._store.multi_get([f"rank {rank}" for rank in self._seen]) if self._seen else []
        for rank, value in zip(self._seen, values, strict=True):
            last, beats = self._seen[rank]
            self._seen[rank] = (value, beats + 1 if value == last else 0)
            host = value.decode().partition(" ")[2]
            if beats > patience and host != "left":
                text = f"rank {rank} on {host} shows no sign of life: it was killed, hangs or lost its machine"
                self._tell(rank, 1, f"{text}. The same command resumes from the last checkpoint.")
                return

    def _guard(self) -> None:
        """End this process if it is stuck although the run cannot continue."""
        beats, waited = self._beats, 0
        while self._cause is None:
            if self._closed.wait(BEAT):
                return
            beats, waited = self._beats, (waited + 1 if beats == self._beats else 0)
            if waited * BEAT > SILENCE:
                place = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
                text = f"rank 0 or the launcher, at {place}, no longer responds: it hangs or lost its machine"
                self._cause = Cause(self.rank, 0, 1, f"{text}. The same command resumes from the last checkpoint.")
        self._news.set()
        if self._closed.wait(GRACE):
            return
        logger.error("%s", self._cause.text, extra=FILE_ONLY)
        if self._cause.told_by == self.rank:
            sys.stderr.write(f"\nerror: {self._cause.text}\n")
            sys.stderr.flush()
        os._exit(self._cause.status)  # the main thread waits for something that will never come
