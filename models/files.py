"""Files and directories that appear whole or not at all, even if the writer is killed."""

from __future__ import annotations

import os
import shutil
import uuid
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

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


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
