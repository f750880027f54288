"""Columns: millions of strings and numbers as a few arrays, in memory or mapped from a cache that is written once.

A Python string costs some 60 bytes beside its text, and processes forked from one another end up with a copy of each,
because reading it counts references. Arrays have neither cost; mapped ones are shared by all processes of a machine.

    captions = TextColumn.of(["a red ball", "two dogs"])     # a sequence of strings, read-only
    captions[1], len(captions), list(captions)
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import overload

import numpy as np

from models.errors import UserError

_VERSION = 2
"""Of the cached columns' layout and content: raise it when either changes."""
_TAKE = 1 << 13
"""Strings that take() moves at once; it holds an index of 8 bytes for each of their bytes."""
_ENCODING = ("utf-8", "surrogatepass")
"""JSON may hold half a surrogate pair, which strict UTF-8 cannot."""


class TextColumn(Sequence[str]):
    """N strings: one blob of UTF-8, [bytes] uint8, and where each starts, [N + 1] int64."""

    def __init__(self, blob: np.ndarray, offsets: np.ndarray):
        self.blob, self.offsets = blob, offsets

    @classmethod
    def of(cls, texts: Iterable[str]) -> TextColumn:
        """A column of the strings."""
        builder = TextBuilder()
        for text in texts:
            builder.append(text)
        return builder.column()

    @classmethod
    def cat(cls, parts: Sequence[TextColumn]) -> TextColumn:
        """The strings of all parts, in order; at least one part."""
        ends = np.cumsum([0, *(len(part.blob) for part in parts)])
        offsets = [part.offsets[1:] + end for part, end in zip(parts, ends[:-1], strict=True)]
        return cls(np.concatenate([part.blob for part in parts]), np.concatenate([[0], *offsets]))

    def __len__(self) -> int:
        return len(self.offsets) - 1

    @overload
    def __getitem__(self, index: int) -> str: ...
    @overload
    def __getitem__(self, index: slice) -> list[str]: ...
    def __getitem__(self, index: int | slice) -> str | list[str]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        position = range(len(self))[index]  # negative numbers count from the end; IndexError beyond
        return self.blob[self.offsets[position] : self.offsets[position + 1]].tobytes().decode(*_ENCODING)

    def __iter__(self) -> Iterator[str]:
        return (self[i] for i in range(len(self)))

    def __eq__(self, other: object) -> bool:
        """Equal to any sequence of the same strings, a list too."""
        if not isinstance(other, Sequence) or isinstance(other, str):
            return NotImplemented
        return len(self) == len(other) and all(a == b for a, b in zip(self, other, strict=True))

    def __repr__(self) -> str:
        return f"TextColumn({self[:3]!r}{', ...' if len(self) > 3 else ''}, {len(self):,} strings)"

    def take(self, index: np.ndarray) -> TextColumn:
        """The strings of the numbers `index` [n], in that order."""
        starts, sizes = self.offsets[index], np.diff(self.offsets)[index]
        offsets = np.concatenate([[0], np.cumsum(sizes)])
        blob = np.empty(offsets[-1], np.uint8)
        for first in range(0, len(index), _TAKE):
            part = slice(first, first + _TAKE)
            begin, end = offsets[first], offsets[min(first + _TAKE, len(index))]
            # Byte p of the result lies at p + (where its string starts here - where it starts in the result).
            source = np.arange(begin, end) + np.repeat(starts[part] - offsets[:-1][part], sizes[part])
            blob[begin:end] = self.blob[source]
        return TextColumn(blob, offsets)


class TextBuilder:
    """Collects strings for a TextColumn without keeping them as objects."""

    def __init__(self) -> None:
        self._blob, self._offsets = bytearray(), array("q", [0])

    def append(self, text: str) -> None:
        self._blob += text.encode(*_ENCODING)
        self._offsets.append(len(self._blob))

    def column(self) -> TextColumn:
        """What was appended, without a copy; nothing can be appended afterwards."""
        return TextColumn(np.frombuffer(self._blob, np.uint8), np.frombuffer(self._offsets, np.int64))


Columns = dict[str, np.ndarray | TextColumn]


def texts(columns: Columns, name: str) -> TextColumn:
    """A column that holds strings."""
    column = columns[name]
    assert isinstance(column, TextColumn), f"{name} holds numbers"
    return column


def numbers(columns: Columns, name: str) -> np.ndarray:
    """A column that holds numbers."""
    column = columns[name]
    assert isinstance(column, np.ndarray), f"{name} holds strings"
    return column


def cached_columns(cache: Path, name: str, files: Sequence[Path], build: Callable[[], Columns]) -> tuple[Path, Columns]:
    """The folder in `cache` that holds what `build` reads from `files`, and its columns, memory-mapped.

    Built where it is not there yet, under a temporary name: of several processes, one's result stays. A file of another
    name, size or time of change makes another folder. Raises UserError if it cannot be written or is damaged."""
    try:
        stats = [(str(file.resolve()), file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    except OSError as error:
        raise UserError(f"{error.filename}: cannot be read ({error.strerror}); check the path") from None
    key = hashlib.sha256(json.dumps([_VERSION, name, stats]).encode()).hexdigest()[:16]
    folder = Path(cache) / f"{name}-{key}"
    if not folder.is_dir():
        _write(folder, build())
    return folder, open_columns(folder)


def _write(folder: Path, columns: Columns) -> None:
    temporary = folder.with_name(f".{folder.name}.{os.uname().nodename}.{os.getpid()}")
    try:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        for name, column in columns.items():
            parts = (
                {"": column} if isinstance(column, np.ndarray) else {".text": column.blob, ".offsets": column.offsets}
            )
            for suffix, values in parts.items():
                with (temporary / f"{name}{suffix}.npy").open("wb") as stream:
                    np.save(stream, values)
                    stream.flush()
                    os.fsync(stream.fileno())
        os.rename(temporary, folder)
    except OSError as error:
        if not folder.is_dir():  # else another process was first
            raise UserError(f"{folder}: cannot be written ({error.strerror}); choose another data.cache") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def open_columns(folder: Path) -> Columns:
    """The columns that a folder of the cache holds, memory-mapped. Raises UserError if it is damaged."""
    columns: Columns = {}
    try:
        # Plain arrays over the map: slicing np.memmap itself costs ten times as much.
        arrays = {file.stem: np.asarray(np.load(file, mmap_mode="r")) for file in sorted(folder.glob("*.npy"))}
        for name, values in arrays.items():
            name, _, part = name.partition(".")
            if part == "text":
                columns[name] = TextColumn(values, arrays[f"{name}.offsets"])
            elif not part:
                columns[name] = values
    except (OSError, ValueError, EOFError, KeyError) as error:
        raise UserError(f"{folder}: damaged ({error}); remove this folder, it will be built again") from error
    return columns
