"""Hugging Face datasets as annotations: what `save_to_disk` wrote, or `hf:OWNER/NAME` as `load_dataset` finds it.

    open_dataset(Path("photos"))                    # the directory of a Dataset or a DatasetDict
    open_dataset(Path("hf:OWNER/NAME:CONFIG"))      # on the Hub or in its cache; CONFIG only where there are several

Images are an Image feature, whose bytes lie in the rows, or a column of paths; captions are a column of text or of
lists of text. A split is the value of a column `split`, or else a key of the DatasetDict. An image in a row has an id
that says which row, SPLIT/ROW, by which it is found again.
"""

from __future__ import annotations

import hashlib
import io
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from models.errors import UserError, one_line
from models.vision.images import ImageError, open_image

from .annotation_records import (
    SPLIT_COLUMNS,
    USUAL_NAMES,
    Annotations,
    ColumnNames,
    Record,
    check_names,
    find_column,
    require_columns,
)

if TYPE_CHECKING:
    from datasets import Dataset, DatasetDict

HUB = "hf:"
"""What the name of a dataset that load_dataset() is to find begins with."""
_SAVED = (("dataset_dict.json",), ("dataset_info.json", "state.json"))
"""Files that only the directory of a DatasetDict, or of a Dataset, holds."""
_ROWS = 256
"""Rows that are read at a time."""
_DIGEST_BYTES = 16


def is_dataset(path: Path) -> bool:
    """Whether annotations are a saved dataset, told by its files, or the name of one for load_dataset()."""
    return is_hub_name(path) or any(all((path / name).is_file() for name in names) for names in _SAVED)


def is_hub_name(path: str | Path) -> bool:
    """Whether annotations are a name for load_dataset()."""
    return str(path).startswith(HUB)


def annotation_path(root: str | Path, name: str) -> Path:
    """The annotations that a configuration names: a path relative to `root`, or a name for load_dataset()."""
    return Path(name) if is_hub_name(name) else Path(root) / name


@dataclass(frozen=True)
class DatasetImages:
    """Images in the rows of a dataset. Pickled, it names the files that hold them and does not copy them."""

    name: str
    """Of the dataset, in errors."""
    splits: Mapping[str, Dataset]
    """By key of the DatasetDict, "" where it is a Dataset; nothing but the images, not decoded."""
    column: str

    def open(self, image_id: str) -> Image.Image:
        """The image with this id, decoded. Raises ImageError naming its row if it cannot be."""
        split, _, row = image_id.rpartition("/")
        name = f"{self.name}: row {int(row)}" + (f" of {split}" if split else "")
        stored = self.splits[split][int(row)][self.column] or {}
        if stored.get("bytes") is not None:
            content = io.BytesIO(stored["bytes"])
            content.name = name
            return open_image(content)
        if stored.get("path"):
            return open_image(stored["path"])
        raise ImageError(f"{name} has no image; remove the row")

    def first_rows(self, split: str) -> list[int]:
        """For each row of a split, the first one whose image is the same file. Reads every image once."""
        digests = bytearray()
        for table in self.splits[split].with_format("arrow").iter(_ROWS):
            for image in table[self.column]:
                digests += _digest(image, row=len(digests) // _DIGEST_BYTES)
        of_rows = np.frombuffer(digests, np.uint64).reshape(-1, _DIGEST_BYTES // 8)
        _, first, number = np.unique(of_rows, axis=0, return_index=True, return_inverse=True)
        return first[number.ravel()].tolist()


def _image_id(split: str, row: int) -> str:
    """Rows have eight digits, so that ids sort like them."""
    return f"{split}/{row:08d}" if split else f"{row:08d}"


def _digest(image: Any, row: int) -> bytes:
    """Of an Image feature's Arrow value: its bytes, else its path. An image that is missing is like no other."""
    content, path = image["bytes"].as_buffer(), image["path"].as_buffer()
    if content is not None:
        return hashlib.blake2b(content, digest_size=_DIGEST_BYTES).digest()
    what, told_apart_by = (b"row %d" % row, b"row") if path is None else (path, b"path")
    return hashlib.blake2b(what, digest_size=_DIGEST_BYTES, person=told_apart_by).digest()


def open_dataset(
    path: Path, columns: ColumnNames = USUAL_NAMES, wanted_splits: Collection[str | None] | None = None
) -> Annotations:
    """The rows of a dataset, and its images where the rows hold them.

    Captions in lists: a row is an image. One caption a row: rows whose image is the same file are one image, for which
    all images of the keys in `wanted_splits` are read (None: of all keys). Raises UserError naming the dataset: not
    found, damaged, without a column of images or captions, or the package `datasets` is not installed."""
    splits = _load(path)
    features = _common_features(path, splits)
    image, caption = _find_columns(path, features, columns)
    split = find_column(features, columns.split, SPLIT_COLUMNS)
    names, one_a_row, images = ColumnNames(image, caption, split or ""), not _is_list(features[caption]), None
    if _is_image(features[image]):
        images = DatasetImages(path.as_posix(), {key: _undecoded(d, image) for key, d in splits.items()}, image)

    def records() -> Iterator[Record]:
        for key, dataset in splits.items():
            ids = None
            if images is not None:
                is_wanted = wanted_splits is None or split is not None or not key or key in wanted_splits
                rows = images.first_rows(key) if is_wanted and one_a_row else range(len(dataset))
                ids = (_image_id(key, row) for row in rows)
            yield from _records(path, key, dataset, names, ids)

    files = [Path(file["filename"]) for dataset in splits.values() for file in dataset.cache_files]
    return Annotations(path, "dataset", bool(split or any(splits)), records, images, files)


def _records(
    path: Path, key: str, dataset: Dataset, columns: ColumnNames, ids: Iterator[str] | None
) -> Iterator[Record]:
    """A record for each row; ids: of its images, None where a column holds their paths."""
    wanted = [columns.caption, *filter(None, [columns.split]), *([columns.image] if ids is None else [])]
    number = 0
    for batch in dataset.select_columns(wanted).with_format(None).iter(_ROWS):
        for row in range(len(batch[columns.caption])):
            captions = batch[columns.caption][row]
            if isinstance(captions, list):
                captions = [caption for caption in captions if caption is not None]
            if ids is None:
                name = batch[columns.image][row]
                where = f"{path}: row {number}" + (f" of {key}" if key else "")
                if not name:
                    raise UserError(f"{where} names no image; remove the row")
                check_names({columns.image: name}, (columns.image,), where)
            else:
                name = next(ids)
            yield Record(
                name,
                [] if captions is None else captions,
                split=batch[columns.split][row] if columns.split else key or None,
            )
            number += 1


def _load(path: Path) -> dict[str, Dataset]:
    """The dataset's splits by name; "" for a Dataset, which is not divided."""
    try:
        import datasets
    except ModuleNotFoundError:
        raise UserError(f"{path}: a Hugging Face dataset, which needs a package; pip install datasets") from None
    try:
        found = _load_by_name(path.as_posix()) if is_hub_name(path) else datasets.load_from_disk(str(path))
    # Files that are damaged or of another version come up as any of these.
    except (datasets.exceptions.DatasetsError, OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        what = "check the name and the network" if is_hub_name(path) else "save it again with save_to_disk"
        raise UserError(f"{path.as_posix()}: cannot be loaded ({one_line(error)}); {what}") from error
    return {"": found} if isinstance(found, datasets.Dataset) else {str(key): found[key] for key in found}


@lru_cache(maxsize=2)
def _load_by_name(name: str) -> DatasetDict:
    """Once a process: each time, it asks the Hub whether there is something newer."""
    from datasets import load_dataset

    repository, _, config = name.removeprefix(HUB).partition(":")
    if not repository:
        raise ValueError(f"expected {HUB}OWNER/NAME")
    return load_dataset(repository, config or None)


def _common_features(path: Path, splits: Mapping[str, Dataset]) -> dict[str, Any]:
    """The columns that all splits have alike, and their kinds."""
    if not any(map(len, splits.values())):
        raise UserError(f"{path.as_posix()}: has no rows; pass a dataset of images and captions")
    first, *others = (dataset.features for dataset in splits.values())
    return {name: kind for name, kind in first.items() if all(other.get(name) == kind for other in others)}


def _find_columns(path: Path, features: Mapping[str, Any], columns: ColumnNames) -> tuple[str, str]:
    """The columns of images and of captions. Raises UserError if there is none, or one that holds something else."""
    pictures = [name for name, kind in features.items() if _is_image(kind)]
    if not columns.image and len(pictures) == 1:
        columns = replace(columns, image=pictures[0])
    image, caption = require_columns(features, columns, path, "its features")
    if not _is_image(features[image]) and not _is_text(features[image]):
        raise UserError(
            f"{path.as_posix()}: column {image!r} holds {features[image]}, not images or paths; name another one: "
            "data.image_column=NAME, or --image-column NAME"
        )
    if not _is_text(features[caption]) and not _is_list(features[caption]):
        raise UserError(
            f"{path.as_posix()}: column {caption!r} holds {features[caption]}, not captions or lists of captions; name "
            "another one: data.caption_column=NAME, or --caption-column NAME"
        )
    return image, caption


def _is_image(kind: Any) -> bool:
    import datasets

    return isinstance(kind, datasets.Image)


def _is_text(kind: Any) -> bool:
    return getattr(kind, "dtype", None) in ("string", "large_string")


def _is_list(kind: Any) -> bool:
    """Whether a column holds lists of text."""
    return _is_text(getattr(kind, "feature", None))


def _undecoded(dataset: Dataset, column: str) -> Dataset:
    """The images alone, as {"bytes", "path"}."""
    from datasets import Image as ImageFeature

    return dataset.select_columns([column]).cast_column(column, ImageFeature(decode=False))
