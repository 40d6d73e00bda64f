"""Download files once: resumable, checked, cached."""

import hashlib
import http.client
import logging
import math
import os
import re
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar
from urllib.error import HTTPError
from urllib.parse import unquote, urljoin, urlparse
from urllib.request import Request, urlopen

import torch.hub

from spidr.tools.errors import InputError, first_line
from spidr.tools.lock import Lock

logger = logging.getLogger(__name__)
T = TypeVar("T")


def is_remote(address: str) -> bool:
    """Whether an address is ``https://…``, ``http://…`` or ``hf:OWNER/NAME/FILE``."""
    return address.startswith(("hf:", "https://", "http://"))


@dataclass(frozen=True)
class Remote:
    """A file on a web server or on the Hugging Face hub: ``https://…`` or ``hf:OWNER/NAME/FILE``.

    The latter go to ``huggingface_hub``'s cache if that is installed, all others to torch.hub's folder under the name
    ``saved_as``. Without it, the file gets its own subfolder, since many have the same name, together with the
    ``config.json`` beside it, if any.
    """

    address: str
    saved_as: str = ""

    def _repository(self) -> tuple[str, str] | None:
        """Repository and file on the Hugging Face hub, if it is an ``hf:`` address."""
        if not self.address.startswith("hf:"):
            return None
        match = re.fullmatch(r"hf:([\w.-]+/[\w.-]+)/([\w./-]+)", self.address)
        if match is None or ".." in match[2].split("/"):
            raise InputError(f"{self.address}: expected hf:OWNER/NAME/FILE")
        return match[1], match[2]

    @property
    def url(self) -> str:
        """The URL to download from."""
        if (repository := self._repository()) is None:
            return self.address
        host = os.environ.get("HF_ENDPOINT", "https://huggingface.co").rstrip("/")
        return f"{host}/{repository[0]}/resolve/main/{repository[1]}"

    @property
    def path(self) -> Path:
        """Its path in torch.hub's folder."""
        name = self.saved_as or Path(unquote(urlparse(self.url).path)).name
        if name in ("", ".."):
            raise InputError(f"{self.address}: names no file")
        folder = Path(torch.hub.get_dir()) / "checkpoints"
        return (folder if self.saved_as else folder / hashlib.sha256(self.url.encode()).hexdigest()[:16]) / name

    def cached(self) -> Path | None:
        """The file, if it was downloaded or put there by hand."""
        if self.path.exists():
            return self.path
        if (repository := self._repository()) and (hub := _huggingface_hub()):
            found = hub.try_to_load_from_cache(*repository)
            return Path(found) if isinstance(found, str) else None
        return None

    def fetch(self, read: Callable[[Path], T], *, check_hash: bool = False, progress: bool = True) -> T:
        """Read the file, downloading it unless it is cached and readable. Only keep what ``read`` can read.

        ``check_hash`` compares a download with the hash in its name, if any, as torch.hub does.

        Raises:
            InputError: It cannot be downloaded or read. The message says where to put it by hand.
        """
        if (cached := self.cached()) is not None:
            try:
                return read(cached)
            except InputError as error:
                logger.warning("%s; fetching it again", error)
        try:
            if (repository := self._repository()) and (hub := _huggingface_hub()):
                return read(_from_hub(hub, *repository, force=cached is not None, progress=progress))
            if not self.saved_as:
                try:
                    _download(urljoin(self.url, "config.json"), self.path.with_name("config.json"), lambda _: None)
                except HTTPError as error:  # most have none
                    if error.code >= 500:
                        raise
            return _download(self.url, self.path, read, check_hash=check_hash, progress=progress)
        except (OSError, http.client.HTTPException, InputError) as error:
            reason = first_line(error).replace(f"{_partial(self.path)}: ", "")  # which is gone by then
            where = f"cannot download it to {self.path}, where it may be put by hand"
            raise InputError(f"{self.url}: {where}: {reason}") from None


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


def _download(
    url: str, path: Path, read: Callable[[Path], T], *, check_hash: bool = False, progress: bool = False
) -> T:
    """Download to ``NAME.partial``, resuming an earlier attempt, and rename it to ``path`` if it can be read."""
    partial, before = _partial(path), _written(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with Lock(path, "is downloading it", patience=math.inf):
        if _written(path) != before:
            with suppress(InputError):
                return read(path)
        while True:
            resumed = partial.exists()
            _append(url, partial, progress)
            try:
                _check_hash(partial, path.name if check_hash else "")
                result = read(partial)
            except InputError:
                _drop(partial)
                if not resumed:
                    raise
                continue  # the file may have changed meanwhile: start over
            partial.replace(path)
            _drop(partial)
            return result


def _partial(path: Path) -> Path:
    return path.with_name(f"{path.name}.partial")


def _version(partial: Path) -> Path:
    """The file that keeps the server's version tag of a partial file."""
    return partial.with_name(f"{partial.name}.version")


def _drop(partial: Path) -> None:
    for path in (partial, _version(partial)):
        path.unlink(missing_ok=True)


def _written(path: Path) -> int | None:
    return path.stat().st_mtime_ns if path.exists() else None


def _append(url: str, partial: Path, progress: bool) -> None:
    """Download the rest of a file, or all of it if it has changed or the server sends no ranges."""
    offset, version = partial.stat().st_size if partial.exists() else 0, _version(partial)
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
        _drop(partial)  # it is at least as long as the server's
        _append(url, partial, progress)
        return
    if response.status != http.HTTPStatus.PARTIAL_CONTENT:
        offset = 0
    with response, partial.open("ab" if offset else "wb") as file:
        tag = response.headers.get("ETag") or response.headers.get("Last-Modified")
        if tag and not tag.startswith("W/"):
            version.write_text(tag, encoding="utf-8")
        length = response.headers.get("Content-Length")
        total = offset + int(length) if length else None
        # tqdm if it is installed, else torch.hub's substitute
        with torch.hub.tqdm(total=total, initial=offset, disable=not progress, unit="B", unit_scale=True) as bar:  # type: ignore[attr-defined]
            while chunk := response.read(1 << 20):
                bar.update(file.write(chunk))
        received = file.tell()
    # A connection that closes early only ends the stream.
    if total is not None and received != total:
        raise InputError(f"it stopped after {received:,} of {total:,} bytes; try again to resume it")


def _check_hash(path: Path, name: str) -> None:
    if expected := torch.hub.HASH_REGEX.search(name):
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        if not digest.startswith(expected[1]):
            raise InputError(f"the SHA-256 is {digest}, expected {expected[1]}…")
