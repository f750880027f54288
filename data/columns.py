"""Columns: millions of strings and numbers as a few Arrow arrays, in memory or mapped from a cache written once.

A Python string costs some 60 bytes beside its text, and processes forked from one another end up with a copy of each,
because reading it counts references. Arrow arrays have neither cost; mapped ones are shared by all processes of a
machine.

    captions = TextColumn.of(["a red ball", "two dogs"])     # a sequence of strings, read-only
    captions[1], len(captions), list(captions)
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import overload

import numpy as np
import pyarrow as pa

from models.errors import UserError

_VERSION = 4
"""Of the cached columns' layout and content: raise it when either changes, and old caches are built again."""
_CHUNK = 1 << 14
"""Strings that are Python objects at a time, while a column is built or read through."""
_ENCODING = ("utf-8", "surrogatepass")
"""Names of files may hold half a surrogate pair, which neither strict UTF-8 nor Arrow's own strings can."""
_BYTES = pa.large_binary()


class TextColumn(Sequence[str]):
    """N strings, kept as UTF-8 in an Arrow array of bytes."""

    def __init__(self, array: pa.LargeBinaryArray):
        self.array = array

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
        return cls(pa.concat_arrays([part.array for part in parts]))

    def __len__(self) -> int:
        return len(self.array)

    @overload
    def __getitem__(self, index: int) -> str: ...
    @overload
    def __getitem__(self, index: slice) -> list[str]: ...
    def __getitem__(self, index: int | slice) -> str | list[str]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        text: bytes = self.array[int(index)].as_py()  # negative numbers count from the end; IndexError beyond
        return text.decode(*_ENCODING)

    def __iter__(self) -> Iterator[str]:
        for start in range(0, len(self), _CHUNK):
            for text in self.array.slice(start, _CHUNK).to_pylist():
                yield text.decode(*_ENCODING)

    def __eq__(self, other: object) -> bool:
        """Equal to any sequence of the same strings, a list too."""
        if not isinstance(other, Sequence) or isinstance(other, str):
            return NotImplemented
        return len(self) == len(other) and all(a == b for a, b in zip(self, other, strict=True))

    def __repr__(self) -> str:
        return f"TextColumn({self[:3]!r}{', ...' if len(self) > 3 else ''}, {len(self):,} strings)"

    def take(self, index: np.ndarray) -> TextColumn:
        """The strings at the positions `index` [n], in that order."""
        return TextColumn(self.array.take(pa.array(index)))


class TextBuilder:
    """Collects strings for a TextColumn without keeping them as objects."""

    def __init__(self) -> None:
        self._chunks: list[pa.Array] = []
        self._pending: list[bytes] = []

    def append(self, text: str) -> None:
        self._pending.append(text.encode(*_ENCODING))
        if len(self._pending) == _CHUNK:
            self._close_chunk()

    def column(self) -> TextColumn:
        """All strings appended so far. One array, kept instead of the chunks: take() would join those each time."""
        self._close_chunk()
        self._chunks = [pa.concat_arrays(self._chunks)]
        pa.default_memory_pool().release_unused()  # the chunks' memory, which Arrow keeps for later arrays
        return TextColumn(self._chunks[0])

    def _close_chunk(self) -> None:
        self._chunks.append(pa.array(self._pending, _BYTES))
        self._pending.clear()


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
        pa.default_memory_pool().release_unused()  # the built columns' memory, which the processes forked later share
    return folder, open_columns(folder)


def _write(folder: Path, columns: Columns) -> None:
    temporary = folder.with_name(f".{folder.name}.{platform.node()}.{os.getpid()}")
    try:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        for name, column in columns.items():
            _write_column(temporary / f"{name}.arrow", column)
        os.rename(temporary, folder)
    except OSError as error:
        if not folder.is_dir():  # else another process was first
            raise UserError(f"{folder}: cannot be written ({error.strerror}); choose another data.cache") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _write_column(file: Path, column: np.ndarray | TextColumn) -> None:
    """An Arrow IPC file with one column, flushed to disk."""
    batch = pa.record_batch({"column": column.array if isinstance(column, TextColumn) else pa.array(column)})
    with file.open("wb") as stream:
        with pa.ipc.new_file(stream, batch.schema) as writer:
            writer.write_batch(batch)
        stream.flush()
        os.fsync(stream.fileno())


def open_columns(folder: Path) -> Columns:
    """The columns that a folder of the cache holds, memory-mapped. Raises UserError if it is damaged."""
    try:
        return {file.stem: _open_column(file) for file in sorted(folder.glob("*.arrow"))}
    except (OSError, pa.ArrowException) as error:
        raise UserError(f"{folder}: damaged ({error}); remove this folder, it will be built again") from error


def _open_column(file: Path) -> np.ndarray | TextColumn:
    array = pa.ipc.open_file(pa.memory_map(str(file))).get_batch(0).column(0)
    return TextColumn(array) if array.type == _BYTES else array.to_numpy()
