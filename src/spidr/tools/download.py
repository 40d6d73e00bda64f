"""Download files once: resumable, checked, cached."""

from __future__ import annotations

import hashlib
import http.client
import logging
import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, TypeVar
from urllib.error import HTTPError
from urllib.parse import unquote, urljoin, urlparse
from urllib.request import Request, urlopen

import torch.hub

from spidr.tools.errors import InputError, first_line

try:
    import fcntl
except ImportError:  # on Windows, two downloads of one file at once are not kept apart
    fcntl = None  # type: ignore[assignment]

logger = logging.getLogger(__name__)
T = TypeVar("T")


def is_remote(address: str) -> bool:
    """Whether an address is ``https://…``, ``http://…`` or ``hf:OWNER/NAME/FILE``."""
    return address.startswith(("hf:", "https://", "http://"))


@dataclass(frozen=True)
class Remote:
    """A file on a web server or on the Hugging Face hub.

    Attributes:
        address: ``https://…`` or ``hf:OWNER/NAME/FILE``. The latter go to ``huggingface_hub``'s cache if that is
            installed, all others to torch.hub's folder.
        saved_as: Its name in torch.hub's folder. Empty: it gets a subfolder, since many files have the same name,
            together with the ``config.json`` beside it, if there is one.
    """

    address: str
    saved_as: str = ""

    def _hugging_face(self) -> tuple[str, str] | None:
        """Repository and file on the Hugging Face hub, if it is there."""
        if not self.address.startswith("hf:"):
            return None
        match = re.fullmatch(r"hf:([\w.-]+/[\w.-]+)/([\w./-]+)", self.address)
        if match is None or ".." in match[2].split("/"):
            raise InputError(f"{self.address}: expected hf:OWNER/NAME/FILE")
        return match[1], match[2]

    @property
    def url(self) -> str:
        """Where to download it."""
        if (repository := self._hugging_face()) is None:
            return self.address
        host = os.environ.get("HF_ENDPOINT", "https://huggingface.co").rstrip("/")
        return f"{host}/{repository[0]}/resolve/main/{repository[1]}"

    @property
    def path(self) -> Path:
        """Its place in torch.hub's folder."""
        name = self.saved_as or Path(unquote(urlparse(self.url).path)).name
        if name in ("", ".."):
            raise InputError(f"{self.address}: names no file")
        folder = Path(torch.hub.get_dir()) / "checkpoints"
        return (folder if self.saved_as else folder / hashlib.sha256(self.url.encode()).hexdigest()[:16]) / name

    def cached(self) -> Path | None:
        """The file, if it was downloaded or put there by hand."""
        if self.path.exists():
            return self.path
        if (repository := self._hugging_face()) and (hub := _huggingface_hub()):
            found = hub.try_to_load_from_cache(*repository)
            return Path(found) if isinstance(found, str) else None
        return None

    def fetch(self, read: Callable[[Path], T], *, check_hash: bool = False, progress: bool = True) -> T:
        """Read the file, after downloading it unless it is cached and readable; keep only what can be read.

        Args:
            read: Reads and checks it.
            check_hash: Whether to compare a download with the hash in its name, if any, as torch.hub does.
            progress: Show a progress bar on stderr.

        Raises:
            InputError: It cannot be downloaded or read. The message says where to put it by hand.
        """
        if (cached := self.cached()) is not None:
            try:
                return read(cached)
            except InputError as error:
                logger.warning("%s; fetching it again", error)
        try:
            if (repository := self._hugging_face()) and (hub := _huggingface_hub()):
                return read(_from_hub(hub, *repository, force=cached is not None, progress=progress))
            if not self.saved_as:
                self._fetch_config()
            return _download(self.url, self.path, read, check_hash, progress)
        except (OSError, http.client.HTTPException, InputError) as error:
            reason = first_line(error).replace(f"{_partial(self.path)}: ", "")  # which is gone by then
            where = f"cannot download it to {self.path}, where it may be put by hand"
            raise InputError(f"{self.url}: {where}: {reason}") from None

    def _fetch_config(self) -> None:
        config = self.path.with_name("config.json")
        try:
            _download(urljoin(self.url, "config.json"), config, lambda _: None, False, False)
        except HTTPError as error:
            if error.code >= 500:
                raise


def _huggingface_hub() -> Any:
    try:
        import huggingface_hub
    except ImportError:
        return None
    return huggingface_hub


def _from_hub(hub: Any, repository: str, file: str, *, force: bool, progress: bool) -> Path:
    from tqdm import tqdm

    class Bar(tqdm):  # type: ignore[misc]
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs | {"disable": not progress})

    try:
        with suppress(hub.errors.EntryNotFoundError):
            config = (Path(file).parent / "config.json").as_posix()
            hub.hf_hub_download(repository, config, force_download=force, tqdm_class=Bar)
        return Path(hub.hf_hub_download(repository, file, force_download=force, tqdm_class=Bar))
    except (OSError, ValueError, hub.errors.HfHubHTTPError) as error:
        raise InputError(first_line(error)) from None


def _partial(path: Path) -> Path:
    return path.with_name(f"{path.name}.partial")


def _download(url: str, path: Path, read: Callable[[Path], T], check_hash: bool, progress: bool) -> T:
    """Download to ``NAME.partial``, resuming an earlier attempt, and rename it to ``path`` if it can be read."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = _partial(path)
    with _alone(partial) as (file, waited):
        if waited and path.exists():
            with suppress(InputError):
                return _drop(partial, read(path))
        while True:
            resumed = file.tell() > 0
            try:
                _append(url, file, progress)
                file.flush()
            except BaseException:
                if not file.tell():
                    _drop(partial)
                raise
            try:
                _check_hash(partial, path.name if check_hash else "")
                result = read(partial)
            except InputError:
                if not resumed:
                    _drop(partial)
                    raise
                file.truncate(0)  # the file may have changed meanwhile: start over
                continue
            partial.replace(path)
            return _drop(partial, result)


def _drop(partial: Path, result: Any = None) -> Any:
    for path in (partial, _validator(partial)):
        path.unlink(missing_ok=True)
    return result


def _validator(partial: Path) -> Path:
    """Where the server's version tag of a partial file is kept."""
    return partial.with_name(f"{partial.name}.version")


@contextmanager
def _alone(path: Path) -> Iterator[tuple[IO[bytes], bool]]:
    """Open a file for appending by this process alone, and say whether another one had it until now."""
    waited = False
    while True:
        with path.open("ab") as file:
            if fcntl is not None:
                with suppress(OSError):  # not every file system has locks
                    try:
                        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    except BlockingIOError:
                        logger.warning("%s: another process is downloading it; waiting", path)
                        waited = True
                        fcntl.flock(file, fcntl.LOCK_EX)
            # The other process may have renamed it meanwhile.
            if path.exists() and path.stat().st_ino == os.fstat(file.fileno()).st_ino:
                file.seek(0, os.SEEK_END)
                yield file, waited
                return


def _append(url: str, file: IO[bytes], progress: bool) -> None:
    """Download the rest of a file, or all of it if it has changed or the server sends no parts."""
    offset, version = file.seek(0, os.SEEK_END), _validator(Path(file.name))
    headers = {"User-Agent": "spidr"}
    if offset:
        headers["Range"] = f"bytes={offset}-"
        if version.exists():
            headers["If-Range"] = version.read_text(encoding="utf-8")
    try:
        response = urlopen(Request(url, headers=headers), timeout=60)
    except HTTPError as error:
        if not offset or error.code != http.HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE:
            raise
        file.truncate(0)  # it is as long as the server's
        _append(url, file, progress)
        return
    with response:
        if offset and response.status != http.HTTPStatus.PARTIAL_CONTENT:
            offset = 0
            file.truncate(0)
        tag = response.headers.get("ETag") or response.headers.get("Last-Modified")
        if tag and not tag.startswith("W/"):
            version.write_text(tag, encoding="utf-8")
        length = response.headers.get("Content-Length")
        total = offset + int(length) if length else None
        received = offset
        # tqdm if it is installed, else torch.hub's substitute
        with torch.hub.tqdm(total=total, initial=offset, disable=not progress, unit="B", unit_scale=True) as bar:  # type: ignore[attr-defined]
            while chunk := response.read(1 << 20):
                file.write(chunk)
                received += len(chunk)
                bar.update(len(chunk))
    # A connection that closes early only ends the stream.
    if total is not None and received != total:
        raise InputError(f"it stopped after {received:,} of {total:,} bytes; try again to resume it")


def _check_hash(path: Path, name: str) -> None:
    if expected := torch.hub.HASH_REGEX.search(name):
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        if not digest.startswith(expected[1]):
            raise InputError(f"the SHA-256 is {digest}, expected {expected[1]}…")
