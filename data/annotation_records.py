"""What annotations of any layout are read into: records of an image and its captions, from columns of usual names."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from PIL import Image

from models.errors import UserError

IMAGE_COLUMNS = ("image", "filepath", "file_name", "filename", "image_path", "image_name", "path", "img")
CAPTION_COLUMNS = ("caption", "captions", "title", "text", "comment", "sentence", "raw")
SPLIT_COLUMNS = ("split",)
"""Names of columns that are recognised, the first that a file has."""


class Record(NamedTuple):
    """A row: image path relative to the data root, its caption or list of captions, and what else is known."""

    image: str
    captions: object
    subset: str | None = None
    split: str | None = None


@dataclass(frozen=True)
class ColumnNames:
    """Names of columns, where a file's are not the usual ones; empty: the first of the usual ones that it has."""

    image: str = ""
    caption: str = ""
    split: str = ""


USUAL_NAMES = ColumnNames()


class RowImages(Protocol):
    """Images that lie in the rows of annotations."""

    def open(self, image_id: str) -> Image.Image:
        """The image with this id, decoded. Raises ImageError naming its row if it cannot be."""


@dataclass(frozen=True)
class Annotations:
    """A file (or folder) of a known layout."""

    file: Path
    layout: str
    has_splits: bool
    """Whether its rows say which split they are of. Else the file is one split."""
    records: Callable[[], Iterator[Record]]
    """Its rows, in order. Raises UserError naming file and row where one has no image."""
    images: RowImages | None = None
    """Its images, where the rows hold them; None: they are files."""
    held_in: Sequence[Path] = ()
    """The files that hold the rows, where `file` is a folder or a name."""


def require_columns(row: Iterable[str], columns: ColumnNames, where: Path, shown: str) -> tuple[str, str]:
    """The names of the columns of image and caption. Raises UserError that lists those that there are."""
    names = list(row)
    found = (
        find_column(names, columns.image, IMAGE_COLUMNS),
        find_column(names, columns.caption, CAPTION_COLUMNS),
    )
    for kind, name, wanted in zip(("image", "caption"), found, (columns.image, columns.caption), strict=True):
        if name is None:
            what = f"no column {wanted!r}" if wanted else f"no column for the {kind}"
            raise UserError(
                f"{where}: {what} among {', '.join(map(repr, names))[:200]} (in {shown!r}); "
                f"name it: data.{kind}_column=NAME, or --{kind}-column NAME"
            )
    image, caption = found
    assert image is not None and caption is not None
    return image, caption


def find_column(names: Iterable[str], wanted: str, usual: tuple[str, ...]) -> str | None:
    """The column that is wanted, else the first of the usual ones, in capitals or not; None where it is not there."""
    there = list(names)
    if wanted:
        return wanted if wanted in there else None
    by_lower_case = {name.lower(): name for name in reversed(there)}
    return next((by_lower_case[name] for name in usual if name in by_lower_case), None)


_UNFIT_FOR_NAMES = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]")
"""Control characters, ends of lines and halves of surrogate pairs."""


def check_names(record: dict[str, Any], fields: Iterable[str], where: str) -> None:
    """Raise UserError unless each of these fields that is present is text of one line."""
    for field in fields:
        value = record.get(field)
        if value is None or (isinstance(value, str) and (value.isprintable() or not _UNFIT_FOR_NAMES.search(value))):
            continue
        raise UserError(f'{where}: "{field}" is {value!r}; expected text of one line')
