"""Reading files of ``torch.save`` that anybody may have written: no code runs, and no size is believed.

Two readers: :func:`read_tensors` for what others hand over (weights, features), and :func:`load_verified` for
checkpoints of our own runs.
"""

from __future__ import annotations

import io
import logging
import pickle
import sys
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from spidr.tools.files import check_file

logger = logging.getLogger(__name__)


def load_verified(path: str | Path) -> Any:
    """``torch.load`` on the CPU, without code and with the checksums, which torch writes but does not verify.

    Raises:
        Exception: Any, as from ``torch.load``, if the file is damaged.
    """
    if is_archive(path):
        with open_archive(path) as archive:
            if damaged := archive.testzip():
                raise ValueError(f"the checksum of {damaged} is wrong")
    return torch.load(path, map_location="cpu", weights_only=True)


def read_tensors(path: str | Path) -> Any:
    """Read a ``torch.save`` file: containers, numbers and tensors; any other object is an :class:`Inert` one.

    torch.load has no such mode: it refuses unknown classes or imports them. Files of the format before torch 1.6 go
    through it all the same, with a warning: they have no checksum.

    Raises:
        Exception: Any, if the file is damaged.
    """
    if not is_archive(path):
        document = load_verified(path)
        logger.warning("%s: an old file format without a checksum: damage would not be noticed", path)
        return document
    with open_archive(path) as archive:  # what is read whole has its checksum verified
        folder = next(name.removesuffix("/data.pkl") for name in archive.namelist() if name.endswith("/data.pkl"))
        order = f"{folder}/byteorder"
        if order in archive.namelist() and archive.read(order).decode() != sys.byteorder:
            raise ValueError("written on a machine with another byte order")
        return _Unpickler(archive, folder).load()


def check_plain(value: Any, place: str) -> Tensor:
    """Check that a value is a tensor with as much data as its shape says.

    Raises:
        ValueError: It is something else.
    """
    if not isinstance(value, (Tensor, Inert)):
        raise ValueError(f"expected only tensors, found a {type(value).__name__} at {place}")
    # An inert object stands for a sparse, nested or quantised tensor, or for none at all.
    if isinstance(value, Inert) or value.layout is not torch.strided or value.is_quantized or value.is_nested:
        raise ValueError(f"expected only plain tensors, found another kind at {place}")
    if value.is_meta or value.nbytes > value.untyped_storage().nbytes():
        raise ValueError(f"a tensor that is larger than its data at {place}")
    return value.detach()


def is_archive(path: str | Path) -> bool:
    """Whether a file is a zip archive, as ``torch.save`` has written since torch 1.6."""
    check_file(path)
    return zipfile.is_zipfile(path)


def open_archive(path: str | Path) -> zipfile.ZipFile:
    """Open a zip file that cannot be larger unpacked than it is: neither torch nor numpy writes any other by itself.

    Raises:
        Exception: Any, as from ``zipfile``, if it is no such file.
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
    """Stands for any object that is not a tensor or container, and takes whatever a pickle does to it."""

    def __new__(cls, *_: Any, **__: Any) -> Inert:  # noqa: D102
        return super().__new__(cls)

    def __init__(self, *_: Any, **__: Any) -> None: ...

    def __call__(self, *_: Any, **__: Any) -> Inert:  # noqa: D102
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


def _rebuild_tensor(storage: Tensor, offset: int, size: tuple[int, ...], stride: tuple[int, ...], *_: Any) -> Tensor:
    return storage.as_strided(size, stride, offset)  # which checks the bounds


def _rebuild_parameter(data: Tensor, *_: Any) -> Tensor:
    return data


_KNOWN: dict[tuple[str, str], Any] = {
    ("collections", "OrderedDict"): OrderedDict,
    ("torch._utils", "_rebuild_tensor_v2"): _rebuild_tensor,
    ("torch._utils", "_rebuild_parameter"): _rebuild_parameter,
    **{("torch", name): dtype for name, dtype in _STORAGES.items()},
}


class _Unpickler(pickle._Unpickler):
    """Imports nothing, and runs nothing but what is in ``_KNOWN``.

    It is the one in Python: the one in C takes gigabytes for a pickle of ten bytes that numbers an object with 2^32.
    """

    def __init__(self, archive: zipfile.ZipFile, folder: str) -> None:
        super().__init__(io.BytesIO(archive.read(f"{folder}/data.pkl")))
        self.archive, self.folder = archive, folder
        self.storages: dict[tuple[str, torch.dtype], Tensor] = {}

    def find_class(self, module: str, name: str, /) -> Any:
        return _KNOWN.get((module, name), Inert)

    def persistent_load(self, key: Any, /) -> Tensor:
        _, dtype, name, *_ = key
        if (name, dtype) not in self.storages:
            content = bytearray(self.archive.read(f"{self.folder}/data/{name}"))
            self.storages[name, dtype] = (
                torch.frombuffer(content, dtype=dtype) if content else torch.empty(0, dtype=dtype, device="cpu")
            )
        return self.storages[name, dtype]
