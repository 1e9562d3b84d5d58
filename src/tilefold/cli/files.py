"""Arrays in files. Inputs are mapped, not read; an output is written beside its place and moved there when complete.

`.npy` and `.safetensors` are mapped, `.npz` is read. The room for an output is reserved before any work: writing to a
mapped file on a full disk would kill the process, with no exception to catch.
"""

from __future__ import annotations

import json
import os
from contextlib import suppress
from io import BytesIO
from math import prod
from pathlib import Path
from types import TracebackType
from typing import Any, Self
from zipfile import BadZipFile

import numpy as np

SAFETENSORS = {
    "F64": "float64",
    "F32": "float32",
    "F16": "float16",
    "BF16": "bfloat16",
    "BOOL": "bool",
    "I64": "int64",
    "I32": "int32",
    "I16": "int16",
    "I8": "int8",
    "U8": "uint8",
}
CONTAINERS = (".npz", ".safetensors")
LARGEST_HEADER = 100_000_000  # as in the safetensors library


def dtype_of(name: str) -> np.dtype:
    """A dtype by name; bfloat16 is NumPy's only with `ml_dtypes`."""
    if name != "bfloat16":
        return np.dtype(name)
    try:
        import ml_dtypes
    except ImportError:
        raise ValueError("bfloat16 needs ml_dtypes: pip install 'tilefold[bf16]'") from None
    dtype: np.dtype = np.dtype(ml_dtypes.bfloat16)
    return dtype


def split(spec: str) -> tuple[Path, str]:
    """`file.npz:name` as path and name; the name is '' if there is none."""
    for suffix in CONTAINERS:
        at = spec.lower().rfind(suffix + ":")
        if at >= 0:
            return Path(spec[: at + len(suffix)]), spec[at + len(suffix) + 1 :]
    return Path(spec), ""


def read(spec: str, name: str) -> np.ndarray:
    """The array of `file.npy`, `file.npz:array` or `file.safetensors:array`, for the argument `name`."""
    path, member = split(spec)
    readers = {".npy": _npy, ".npz": _npz, ".safetensors": _safetensors}
    if path.suffix.lower() not in readers:
        raise ValueError(f"{name}: {spec!r} is no .npy, .npz or .safetensors file")
    try:
        return readers[path.suffix.lower()](path, member, name)
    except (ValueError, EOFError, BadZipFile) as error:
        raise ValueError(f"{name}: {path}: {error or 'the file is empty'}") from error
    except (KeyError, AttributeError, TypeError) as error:
        raise ValueError(f"{name}: {path}: its header is wrong ({type(error).__name__}: {error})") from error


def read_all(q: str, k: str | None, v: str | None) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Queries, keys and values; a container of all three may stand alone."""
    path, member = split(q)
    alone = path.suffix.lower() in CONTAINERS and not member
    if (k is None or v is None) and not (alone and k is v):
        raise ValueError(
            "give three files, Q K V, or one .npz or .safetensors that holds arrays named q, k and v"
        )
    return read(q, "q"), read(k or q, "k"), read(v or q, "v")


def _npy(path: Path, member: str, name: str) -> np.ndarray:
    array = np.lib.format.open_memmap(path, mode="r")
    if array.dtype.kind == "V":
        raise ValueError(
            f"holds {array.dtype.itemsize}-byte values without a type; bfloat16 goes into .safetensors"
        )
    return array


def _npz(path: Path, member: str, name: str) -> np.ndarray:
    with path.open("rb") as opened, np.lib.npyio.NpzFile(opened, allow_pickle=False) as file:
        array: np.ndarray = file[_chosen(file.files, member, name)]
    return array


def _safetensors(path: Path, member: str, name: str) -> np.ndarray:
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > min(size - 8, LARGEST_HEADER):
            raise ValueError("is no safetensors file, or is cut short")
        header = json.loads(file.read(length))
    header.pop("__metadata__", None)
    entry = header[_chosen(list(header), member, name)]
    if entry["dtype"] not in SAFETENSORS:
        raise ValueError(f"holds {entry['dtype']}, which NumPy does not have")
    dtype, shape = dtype_of(SAFETENSORS[entry["dtype"]]), tuple(entry["shape"])
    begin, end = entry["data_offsets"]
    if end - begin != prod(shape) * dtype.itemsize or 8 + length + end > size:
        raise ValueError("is cut short, or its header is wrong")
    return _mapped(path, "r", 8 + length + begin, shape, dtype)


def _chosen(there: list[str], member: str, name: str) -> str:
    """The array that was asked for by name, else the only one, else the one named like the argument."""
    if member in there:
        return member
    if not member and len(there) == 1:
        return there[0]
    if not member and name in there:
        return name
    listed = ", ".join(there[:8]) + (", ..." if len(there) > 8 else "")
    raise ValueError(f"has no array {member or name!r}; it holds {listed or 'nothing'}")


def _mapped(path: Path, mode: Any, offset: int, shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    if not prod(shape):  # nothing cannot be mapped
        return np.empty(shape, dtype)
    return np.memmap(path, dtype, mode, offset, shape)


class Output:
    """An array that becomes the file `path` if the block ends well, and else leaves nothing behind."""

    def __init__(self, path: Path, shape: tuple[int, ...], dtype: np.dtype, name: str) -> None:
        self.path = path
        self.part = path.with_name(f".{path.name}.{os.getpid()}.part")
        self._shape, self._dtype = shape, dtype
        self._header = _header(path, shape, dtype, name)

    def __enter__(self) -> Self:
        if self.path.is_dir():
            raise ValueError(f"{self.path} is a folder")
        if not self.path.parent.is_dir():
            raise ValueError(f"{self.path}: there is no folder {str(self.path.parent)!r}")
        try:
            self._reserve()
            self.array = _mapped(self.part, "r+", len(self._header), self._shape, self._dtype)
        except BaseException:
            self.part.unlink(missing_ok=True)
            raise
        return self

    def _reserve(self) -> None:
        total = len(self._header) + prod(self._shape) * self._dtype.itemsize
        with self.part.open("xb") as file:
            file.write(self._header)
            file.truncate(total)
            if hasattr(os, "posix_fallocate"):
                try:
                    os.posix_fallocate(file.fileno(), 0, total)
                except OSError as error:
                    raise OSError(error.errno, error.strerror, str(self.path)) from error

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None
    ) -> None:
        try:
            if kind is None:
                if isinstance(self.array, np.memmap):
                    self.array.flush()
                self.part.replace(self.path)
        finally:
            with suppress(OSError):
                self.part.unlink(missing_ok=True)


def _header(path: Path, shape: tuple[int, ...], dtype: np.dtype, name: str) -> bytes:
    """What stands before the data, which then follows in C order."""
    kind = path.suffix.lower()
    if kind == ".npy" and dtype.name == "bfloat16":
        raise ValueError(f"{path}: .npy cannot say that it holds bfloat16; write a .safetensors file")
    if kind == ".npy":
        buffer = BytesIO()
        entries = {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": shape}
        np.lib.format.write_array_header_1_0(buffer, entries)
        return buffer.getvalue()
    if kind != ".safetensors":
        raise ValueError(f"{path}: results are written as .npy or .safetensors")
    word = next(word for word, known in SAFETENSORS.items() if known == dtype.name)
    end = prod(shape) * dtype.itemsize
    text = json.dumps({name: {"dtype": word, "shape": shape, "data_offsets": [0, end]}}).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text
