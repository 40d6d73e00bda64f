"""Read untrusted ``torch.save`` files: run no code, trust no size."""

import io
import logging
import pickle
import struct
import sys
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any, Self

import torch
from torch import Tensor

from spidr.tools.files import check_file

logger = logging.getLogger(__name__)


def read_tensors(path: str | Path, *, strict: bool = False) -> Any:
    """Read a ``torch.save`` file: containers, numbers and tensors; all other objects become :class:`Inert`.

    This verifies the checksums that torch writes; files from before torch 1.6 have none, which is logged. torch.load
    refuses other classes or imports them, verifies nothing, and allocates any amount of memory that 200 bytes ask for.

    A damaged file raises any exception, and so does one with other objects if ``strict``.
    """
    check_file(path)
    if not zipfile.is_zipfile(path):
        document = _read_old(Path(path), strict)
        logger.warning("%s: an old file format without a checksum: damage would not be noticed", path)
        return document
    with open_archive(path) as archive:  # zipfile verifies the checksum of what is read whole
        folder = next(name.removesuffix("/data.pkl") for name in archive.namelist() if name.endswith("/data.pkl"))
        order = f"{folder}/byteorder"
        if order in archive.namelist() and archive.read(order).decode() != sys.byteorder:
            raise ValueError("written on a machine with another byte order")

        def storage(dtype: torch.dtype, key: str, _: int) -> Tensor:
            return _tensor(archive.read(f"{folder}/data/{key}"), dtype)

        return _Unpickler(io.BytesIO(archive.read(f"{folder}/data.pkl")), storage, strict).load()


def _read_old(path: Path, strict: bool) -> Any:
    """Read the format before torch 1.6: five pickles, then the data of the storages that they name."""
    storages: dict[str, Tensor] = {}
    left = path.stat().st_size

    def storage(dtype: torch.dtype, key: str, size: int) -> Tensor:
        nonlocal left
        left -= size * dtype.itemsize
        if left < 0 or size < 0:
            raise ValueError("more data announced than there is")
        storages[key] = torch.empty(size, dtype=dtype, device="cpu")
        return storages[key]

    with path.open("rb") as file:
        if _Unpickler(file, storage, strict).load() != torch.serialization.MAGIC_NUMBER:
            raise ValueError("not a file of torch.save")
        _protocol, system, document, keys = (_Unpickler(file, storage, strict).load() for _ in range(4))
        if system.get("little_endian") != (sys.byteorder == "little"):
            raise ValueError("written on a machine with another byte order")
        for key in keys:
            (size,) = struct.unpack("<q", file.read(8))
            content = file.read(storages[key].nbytes)
            if size != len(storages[key]) or len(content) < storages[key].nbytes:
                raise ValueError("the file is cut short")
            storages[key].copy_(_tensor(content, storages[key].dtype))
    return document


def _tensor(content: bytes, dtype: torch.dtype) -> Tensor:
    return torch.frombuffer(bytearray(content), dtype=dtype) if content else torch.empty(0, dtype=dtype, device="cpu")


def check_plain(value: Any, place: str) -> Tensor:
    """Check that a value is a tensor with as much data as its shape says. Raises ValueError if not."""
    if not isinstance(value, (Tensor, Inert)):
        raise ValueError(f"expected only tensors, found a {type(value).__name__} at {place}")
    # An inert object may have been a sparse, nested or quantised tensor, or none.
    if isinstance(value, Inert) or value.layout is not torch.strided or value.is_quantized or value.is_nested:
        raise ValueError(f"expected only plain tensors, found another kind at {place}")
    if value.is_meta or value.nbytes > value.untyped_storage().nbytes():
        raise ValueError(f"a tensor that is larger than its data at {place}")
    return value.detach()


def open_archive(path: str | Path) -> zipfile.ZipFile:
    """Open a zip file of torch or numpy, in which nothing is compressed, so that it cannot be a bomb.

    If the file is another one, this raises an exception of any type.
    """
    check_file(path)
    archive = zipfile.ZipFile(path)
    entries = archive.infolist()
    stored = all(entry.compress_type == zipfile.ZIP_STORED for entry in entries)
    if not stored or sum(entry.file_size for entry in entries) > Path(path).stat().st_size:
        archive.close()
        raise ValueError("entries that are compressed or overlap")
    return archive


class Inert:
    """Stands for an object that is not a tensor or container; whatever a pickle does to it has no effect."""

    def __new__(cls, *_: Any, **__: Any) -> Self:  # noqa: D102
        return super().__new__(cls)

    def __init__(self, *_: Any, **__: Any) -> None: ...

    def __call__(self, *_: Any, **__: Any) -> Self:  # noqa: D102
        return self

    def __setstate__(self, _: Any) -> None: ...

    def __setitem__(self, _: Any, __: Any) -> None: ...

    append = extend = add = __setstate__


_STORAGES = {
    "DoubleStorage": torch.float64,
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
}


_KNOWN: dict[tuple[str, str], Any] = {
    ("collections", "OrderedDict"): OrderedDict,
    ("torch", "Size"): torch.Size,
    # as_strided checks the bounds.
    ("torch._utils", "_rebuild_tensor_v2"): lambda data, start, size, stride, *_: data.as_strided(size, stride, start),
    ("torch._utils", "_rebuild_parameter"): lambda data, *_: data,
    **{("torch", name): dtype for name, dtype in _STORAGES.items()},
}


class _Unpickler(pickle._Unpickler):
    """Imports nothing and runs only what is in ``_KNOWN``.

    It is pure Python, since the C unpickler takes gigabytes for a ten-byte pickle with a memo index of 2^32.
    """

    def __init__(self, file: IO[bytes], storage: Callable[[torch.dtype, str, int], Tensor], strict: bool) -> None:
        super().__init__(file)
        self.storage, self.strict = storage, strict
        self.storages: dict[tuple[str, torch.dtype], Tensor] = {}

    def find_class(self, module: str, name: str, /) -> Any:
        if self.strict and (module, name) not in _KNOWN:
            raise pickle.UnpicklingError(f"holds an object of {module}.{name}")
        return _KNOWN.get((module, name), Inert)

    def persistent_load(self, key: Any, /) -> Tensor:
        _, dtype, name, _, size, *view = key
        if any(view):
            raise ValueError("a view of a storage, as torch before 0.4 saved it")
        if (name, dtype) not in self.storages:
            self.storages[name, dtype] = self.storage(dtype, name, size)
        return self.storages[name, dtype]
