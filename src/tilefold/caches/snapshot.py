"""A cache as a file that is whole or not there: what its bytes mean, and how they come to lie on the disk.

It is written beside its place under another name, forced to the disk, and then renamed, which replaces an older file in
one step; a crash at any time leaves the older file as it was, and perhaps a `.part` beside it, which may be deleted.

    magic     16 bytes    ends with a carriage return and a line feed, which text modes would change
    fixed     version, bytes of state, bytes of payload; the checksum (CRC-32) of magic, these numbers and the state
    state     JSON: kind, dtype, byte order, and what the cache says of itself
    payload   the rows in use, as they lie in memory: keys, then values, then of codes the scales of both
    end       the checksum of the payload

The fact to know: magic and fixed part are the same in every version, so that a newer file can be told from a damaged
one. Version 2 has quantised rows; a file of version 1 has none, and is read as before.
"""

from __future__ import annotations

import json
import os
import struct
import sys
import zlib
from collections.abc import Iterable, Iterator
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import IO, Any, NoReturn, Self

import numpy as np

from ..dtypes import CODES, ROWS
from .quantised import groups_of
from .rows import bits

MAGIC = b"tilefold cache\r\n"
VERSION = 2
FIXED = struct.Struct("<IQQI")  # version, bytes of state, bytes of payload, checksum
END = struct.Struct("<I")


def write(
    path: str | os.PathLike[str], kind: str, dtype: np.dtype, state: dict[str, Any],
    pieces: Iterable[np.ndarray], size: int,
) -> None:  # fmt: skip
    """Replace the file at `path` by one of `pieces`, `size` bytes of `dtype` together, described by `state`."""
    place = Path(path).resolve()
    if place.is_dir():
        raise ValueError(f"path must name a file, {str(path)!r} is a folder")
    part = place.with_name(f".{place.name}.{os.getpid()}.part")
    whole = {"kind": kind, "dtype": dtype.name, "byteorder": sys.byteorder, **state}
    text = json.dumps(whole, separators=(",", ":")).encode()
    try:
        with part.open("wb") as file:
            file.write(MAGIC + FIXED.pack(VERSION, len(text), size, _header_sum(VERSION, text, size)) + text)
            checksum = 0
            for piece in pieces:
                data = np.ascontiguousarray(bits(piece)).tobytes()
                checksum = zlib.crc32(data, checksum)
                file.write(data)
            file.write(END.pack(checksum))
            file.flush()
            os.fsync(file.fileno())
        part.replace(place)
    finally:
        with suppress(OSError):
            part.unlink(missing_ok=True)
    _settle(place.parent)


def _settle(folder: Path) -> None:
    """Force a folder to the disk, where folders can be opened: only then is a renaming there for good."""
    if os.name != "posix":
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _header_sum(version: int, text: bytes, size: int) -> int:
    return zlib.crc32(text, zlib.crc32(MAGIC + FIXED.pack(version, len(text), size, 0)))


class Reader:
    """A file that `write` made: checked as a whole before anything of it is believed.

    Every fault of its bytes is a ValueError that begins with its path.
    """

    def __init__(self, path: str | os.PathLike[str], kind: str) -> None:
        self.path, self.kind = Path(path), kind

    def __enter__(self) -> Self:
        self._file: IO[bytes] = self.path.open("rb")
        try:
            self._read_state()
        except BaseException:
            self._file.close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None
    ) -> None:
        self._file.close()

    def refuse(self, why: str) -> NoReturn:
        raise ValueError(f"{self.path}: {why}")

    def expect(self, holds: bool, fault: str) -> None:
        """Refuse a file whose checksums are right and whose state is not: no program of ours wrote it."""
        if not holds:
            self.refuse(f"its description contradicts itself: {fault}")

    def _read_state(self) -> None:
        start = self._file.read(len(MAGIC) + FIXED.size)
        if start[: len(MAGIC)] != MAGIC[: len(start)] or not start:
            self.refuse("is not a snapshot of a tilefold cache")
        if len(start) < len(MAGIC) + FIXED.size:
            self.refuse(f"is cut off after {len(start)} bytes")
        version, length, size, checksum = FIXED.unpack(start[len(MAGIC) :])
        there = os.fstat(self._file.fileno()).st_size
        text = self._file.read(min(length, there))
        if _header_sum(version, text, size) != checksum:
            self.refuse("is damaged or cut off: the checksum of its description is wrong")
        if version > VERSION:
            self.refuse(
                f"was written by a later version: its format is {version}, this version reads {VERSION}"
            )
        whole = len(start) + length + size + END.size
        if there < whole:
            self.refuse(f"is cut off: it has {there} of {whole} bytes")
        if there > whole:
            self.refuse(f"is damaged: {there - whole} bytes follow its end")
        self.state: dict[str, Any] = json.loads(text)
        self.size = size
        if self.state.get("kind") != self.kind:
            self.refuse(f"is a snapshot of a {self.state.get('kind')}, not of a {self.kind}")
        if self.state.get("byteorder") != sys.byteorder:
            self.refuse(f"was written on a {self.state.get('byteorder')}-endian machine, this one is not")

    def integers(self, *names: str) -> list[int]:
        """Entries that are integers."""
        return [self._integer(name, self.state.get(name)) for name in names]

    def limit(self, name: str) -> int | None:
        """An entry that is an integer or null."""
        return None if self.state.get(name) is None else self._integer(name, self.state[name])

    def counts(self, name: str, length: int | None = None) -> list[int]:
        """An entry that is a list of integers, of a known length if one is given."""
        given = self.state.get(name)
        if not isinstance(given, list) or (length is not None and len(given) != length):
            self.refuse(f"its description contradicts itself: {name} is no list of the right length")
        return [self._integer(name, x) for x in given]

    def _integer(self, name: str, x: Any) -> int:
        if type(x) is not int or x < 0:
            self.refuse(f"its description contradicts itself: {name} is {x!r}")
        return x

    def rows(self, like: Any) -> dict[str, Any]:
        """What rows are, as a cache takes it: `dtype` or `like`, `quantised` and `group`."""
        name, code = self.state.get("dtype"), self.state.get("quantised")
        self.expect(name in ROWS, f"there is no type {name!r}")
        self.expect(code is None or (code in CODES and name != "float64"), f"{name} is not kept as {code!r}")
        group = self.limit("group")
        if code is None:
            self.expect(group is None, f"there are groups of {group} where nothing is quantised")
        else:
            for dim in self.integers("dim", "v_dim"):
                try:
                    groups_of("a row", dim, CODES[code], group)
                except ValueError as wrong:
                    self.expect(False, str(wrong))
        if like is not None:
            other = str(like.dtype).removeprefix("torch.")
            if other != name:
                raise TypeError(f"like must be {name} as the snapshot {self.path} is, got {other}")
        return {"dtype": name if like is None else None, "like": like, "quantised": code, "group": group}

    def sequences(self, last: int, page: int, filled: Any) -> Iterator[tuple[int, int, int, Any]]:
        """(id, length, first, pages) of each sequence of a paged cache; `filled` are the rows of its pages."""
        for entry in self.state.get("sequences", ()):
            self.expect(
                isinstance(entry, list) and len(entry) == 4, "a sequence is not described by four entries"
            )
            id, length, first = (self._integer("a sequence", x) for x in entry[:3])
            pages = entry[3]
            self.expect(
                id < last
                and first <= length
                and len(pages) == -(-length // page)
                and all(
                    type(n) is int
                    and -1 <= n < len(filled)
                    and (n < 0 or filled[n] >= min(length - at, page))
                    for at, n in zip(range(0, length, page), pages, strict=True)
                ),
                f"sequence {id} has pages that are not there",
            )
            yield id, length, first, pages

    def evicted(self, lengths: dict[int, int]) -> Iterator[tuple[int, int, int]]:
        """(id, dropped, settled) of each sequence of a paged cache that lost rows, of these lengths."""
        for entry in self.state.get("evicted", ()):
            self.expect(
                isinstance(entry, list) and len(entry) == 3, "an eviction is not described by three entries"
            )
            id, dropped, settled = (self._integer("an eviction", x) for x in entry)
            self.expect(settled <= lengths.get(id, -1), f"sequence {id} kept more rows than there are")
            yield id, dropped, settled

    def fill(self, pieces: Iterable[np.ndarray], size: int) -> None:
        """Read the payload into arrays of `size` bytes together, and check it."""
        self.expect(size == self.size, f"it promises {self.size} bytes where {size} belong")
        checksum = 0
        for piece in pieces:
            data = self._file.read(piece.nbytes)
            if len(data) < piece.nbytes:
                self.refuse("is cut off")
            checksum = zlib.crc32(data, checksum)
            mine = bits(piece)
            mine[...] = np.frombuffer(data, mine.dtype).reshape(mine.shape)
        if self._file.read() != END.pack(checksum):
            self.refuse("is damaged: the checksum of its rows is wrong")
