"""Files and directories that appear whole or not at all, even if the writer is killed; and files read at positions.

Everything works on any system. Where one lacks a POSIX call, a plainer one gives the same bytes.
"""

from __future__ import annotations

import os
import shutil
import uuid
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from threading import Lock

from .errors import UserError


@contextmanager
def atomic_directory(final: str | Path) -> Iterator[Path]:
    """A temporary directory that becomes `final` if the block ends well, and disappears if it does not.

    Its files are flushed to disk before the rename. An older `final` is replaced; a kill between the two renames
    that this takes leaves it whole as `.NAME.old`. Raises UserError if `final` cannot be created, or is `.` or `..`,
    which cannot be renamed."""
    final = Path(final)
    if final.name in ("", ".."):
        raise UserError(f"{final}: no directory by its name; name the one to write, e.g. {final / 'checkpoint'}")
    temporary, old = final.with_name(f".{final.name}.tmp"), final.with_name(f".{final.name}.old")
    shutil.rmtree(temporary, ignore_errors=True)  # left by a killed writer
    try:
        temporary.mkdir(parents=True)
    except OSError as error:
        raise UserError(f"{final}: cannot be created ({error.strerror}); choose a directory to write to") from error
    try:
        yield temporary
        for path in (*temporary.rglob("*"), temporary):
            _flush(path)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    shutil.rmtree(old, ignore_errors=True)
    if final.exists():
        os.rename(final, old)
    os.rename(temporary, final)
    _flush(final.parent)
    shutil.rmtree(old, ignore_errors=True)


def make_directory(path: str | Path) -> Path:
    """The directory `path`, made with its parents if need be. Raises UserError if something else is there."""
    path = Path(path)
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{path}: cannot be a directory to write to ({error.strerror}); choose another") from None
    return path


def write_atomically(path: str | Path, content: str | bytes | Iterable[bytes | memoryview]) -> None:
    """Write a file in one step: a reader sees the old content or the new, never a part, even if the writer is killed.

    Text is written as UTF-8; parts one behind the other. Written beside the file, flushed to disk, renamed; where that
    fails (a full disk) the temporary file is removed and the old file stays."""
    path = Path(path)
    parts = [content.encode()] if isinstance(content, str) else [content] if isinstance(content, bytes) else content
    temporary = path.with_name(f"{path.name}.tmp-{uuid.uuid4().hex[:8]}")
    try:
        with temporary.open("wb") as stream:
            for part in parts:
                stream.write(part)
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(temporary, path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise
    _flush(path.parent)


class PositionedReader:
    """A file that is read at given positions, by any number of threads at once, without a position of its own."""

    def __init__(self, path: str | Path, random: bool = False):
        """random: tell the system that reads jump about, so that it reads nothing beyond what is asked for."""
        self._file = open(path, "rb", buffering=0)  # noqa: SIM115  # open as long as the reader is
        self._lock = Lock()
        if random and hasattr(os, "posix_fadvise"):
            os.posix_fadvise(self._file.fileno(), 0, 0, os.POSIX_FADV_RANDOM)

    def will_need(self, offset: int, count: int) -> None:
        """Announce a read, so that several overlap; systems without such a call read when they are asked."""
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(self._file.fileno(), offset, count, os.POSIX_FADV_WILLNEED)

    def read(self, offset: int, count: int) -> bytes:
        """`count` bytes at `offset`, or those up to the file's end."""
        buffer = memoryview(bytearray(count))
        return bytes(buffer[: self.read_into(buffer, offset)])

    def read_into(self, buffer: memoryview, offset: int) -> int:
        """Fill `buffer` with the bytes at `offset`; returns how many there were: fewer at the file's end."""
        done = 0
        while done < len(buffer):
            count = self._read_some(buffer[done:], offset + done)
            if not count:
                break
            done += count
        return done

    def _read_some(self, buffer: memoryview, offset: int) -> int:
        if hasattr(os, "preadv"):
            return os.preadv(self._file.fileno(), [buffer], offset)
        if hasattr(os, "pread"):
            content = os.pread(self._file.fileno(), len(buffer), offset)
            buffer[: len(content)] = content
            return len(content)
        with self._lock:  # Windows: the position is the file's, so threads take turns
            self._file.seek(offset)
            return self._file.readinto(buffer) or 0

    def __del__(self) -> None:
        if hasattr(self, "_file"):
            self._file.close()


def _flush(path: Path) -> None:
    """Write a file's content, or a directory's entries, to disk.

    Windows opens no directory, and orders renames by itself; and it flushes only files that may be written."""
    on_windows = not hasattr(os, "O_DIRECTORY")
    if on_windows and path.is_dir():
        return
    descriptor = os.open(path, os.O_RDWR if on_windows else os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
