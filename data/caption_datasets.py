"""Image-caption annotations: which captions belong to which image file.

Layouts are told apart by their content:
- Karpathy (Flickr30k, COCO, and what data/scenes.py writes): {"images": [{"filepath" (optional), "filename", "split",
  "subset" (optional), "sentences": [{"raw": ...}, ...]}, ...]}; split `restval` counts as `train`.
- All others (annotation_files.py: lists of BLIP and ALBEF, COCO's own JSON, CSV, JSON lines, parquet, folders): rows of
  an image and its captions; rows of one image are put together. They may be millions, and are read one by one. Where no
  column says which split a row is of, the file is one split, or is divided by `val_share`.

Held as columns (data/columns.py), not as objects, so that millions of captions fit, in every process.

    dataset = load_annotations("dataset_flickr30k.json", root="flickr30k-images", split="test")
    len(dataset), len(dataset.captions)               # 1000, 5000
"""

from __future__ import annotations

import hashlib
import os
import posixpath
from array import array
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, SupportsIndex

import numpy as np
from PIL import Image

from models.errors import UserError
from models.vision.images import may_be_image, open_image

from .annotation_files import open_annotations
from .annotation_records import USUAL_NAMES, Annotations, ColumnNames, Record, RowImages, check_names
from .coco import coco_file
from .columns import Columns, TextBuilder, TextColumn, cached_columns, numbers, open_columns, texts
from .huggingface_datasets import is_dataset
from .json_documents import list_elements, read_json

Row = tuple[str, object, str | None]
"""Image id, its caption or list of captions, its subset."""


@dataclass(frozen=True, eq=False)
class CaptionDataset:
    """The images of one split and their captions, grouped by image."""

    root: Path
    """Folder that image ids are relative to."""
    image_ids: Sequence[str]
    """N unique paths relative to `root`, in the file's order."""
    captions: Sequence[str]
    """C raw captions, none blank, sorted by image."""
    caption_image: np.ndarray
    """[C] int64, ascending: index into image_ids of each caption's image. Every image occurs."""
    subsets: Sequence[str | None]
    """[N] label of a part of the split that is reported separately, None where the file gives none."""
    folder: Path | None = None
    """The cached columns it was opened from: a spawned process opens them again instead of receiving a copy."""
    left_out: Sequence[str] = ()
    """What the annotations hold that cannot be trained on, one line each: images and captions without text."""
    row_images: RowImages | None = None
    """The images, where they lie in the rows of the annotations; None: they are files."""

    def __len__(self) -> int:
        """Number of images."""
        return len(self.image_ids)

    def __reduce_ex__(self, protocol: SupportsIndex) -> str | tuple[Any, ...]:
        if self.folder is None:
            return super().__reduce_ex__(protocol)
        return _open, (self.folder, self.root, self.row_images)

    def path(self, image: int) -> Path:
        """The file of image number `image`; of a COCO picture also where the folders of 2017 have it."""
        return coco_file(self.root / self.image_ids[image])

    def open_image(self, image: int) -> Image.Image:
        """Image number `image`, decoded. Raises ImageError naming it if it cannot be."""
        return open_image(self.path(image)) if self.row_images is None else self.row_images.open(self.image_ids[image])

    def has_image(self, image: int) -> bool:
        """Whether image number `image` is here, as far as a look at the folder tells."""
        return self.row_images is not None or may_be_image(self.path(image))

    def epoch_order(self, stream: np.random.Generator) -> np.ndarray:
        """[N] int32: the images in an order drawn from `stream`."""
        return stream.permutation(np.arange(len(self), dtype=np.int32))

    def check_images(self, file: str | Path) -> None:
        """Raise UserError, naming the first, if image files are missing or empty; `file` lists them."""
        missing = [i for i in range(len(self)) if not self.has_image(i)]
        if missing:
            raise UserError(
                f"{self.path(missing[0])}: no such image, or an empty file; {len(missing)} of the {len(self)} images "
                f"of {file} are missing or empty under {self.root}; pass the folder that the file's paths are relative "
                "to as data root, or download the images again"
            )

    def caption_range(self, image: int) -> tuple[int, int]:
        """Captions start .. stop - 1 are those of image number `image`."""
        start, stop = np.searchsorted(self.caption_image, (image, image + 1))
        return int(start), int(stop)


@dataclass(frozen=True)
class Reading:
    """What of an annotation file is wanted."""

    split: str | None
    root: str
    """Absolute."""
    columns: ColumnNames
    val_share: float
    lenient: bool

    def __post_init__(self) -> None:
        if not 0 <= self.val_share < 1:
            raise UserError(f"val_share is {self.val_share}; it must be at least 0 and below 1")

    @property
    def label(self) -> str:
        """Differs between readings that may find other rows in the same files; empty for the usual one."""
        unusual = (self.columns, self.val_share, self.lenient)
        return "" if unusual == (USUAL_NAMES, 0.0, False) else f"-{_digest(repr((self.root, *unusual))).hex()[:8]}"

    @property
    def splits(self) -> tuple[str | None, ...] | None:
        """What files call the split; None: all are wanted."""
        return None if self.split is None else _split_names(self.split)

    def wants(self, record: Record) -> bool:
        """Whether a row is of the split, in a file whose rows do not say it."""
        if self.split is None or not self.val_share:
            return True
        return (self.split == "val") == is_validation(_plain_path(record.image, self.root), self.val_share)


def is_validation(image_id: str, val_share: float) -> bool:
    """Whether an image is among the `val_share` of images that are held out, by a hash of its path."""
    return int.from_bytes(_digest(image_id)[:8], "big") < val_share * 2**64


def load_annotations(
    files: str | Path | Sequence[str | Path],
    root: str | Path,
    split: str | None,
    check_images: bool = False,
    cache: str | Path | None = None,
    document: Any = None,
    columns: ColumnNames = USUAL_NAMES,
    val_share: float = 0.0,
    lenient: bool = False,
) -> CaptionDataset:
    """Read one split of an annotation file, or all (None); `check_images` also checks that every image file exists.

    Several files are read as one: an image that two of them list has the captions of both. With `cache`, a folder, the
    columns are written there once and memory-mapped from then on. `document` is the content of a Karpathy file that was
    read before, for another split. `columns` names columns that have unusual names. A file whose rows do not say their
    split is one split, so `split` has no effect on it, unless `val_share` divides it: `val` are then about this share
    of the images, by a hash of their paths, so that none ever moves, and `train` are the others. Reading 5M pairs peaks
    at 1.6 GB, once; training from them then takes 1.5 GB in all, with 4 workers and the libraries
    (benchmarks/results/lists_cpu.json).

    lenient: for training. Images without a caption, blank captions and captions that are no text are left out and
    listed in `left_out`; in an evaluation they are an error, for recall is a share of what the file lists.

    Raises UserError naming the file and the first row that is wrong: missing file, no JSON, no such split (with those
    there are), no images, a path, split or subset that is no text of one line, an image without captions, twice in a
    split, in two splits, or in two spellings of its path, a blank caption or one that is no text; `imgid` or `sentid`
    twice in a Karpathy file; missing image files."""
    paths = [Path(file) for file in ((files,) if isinstance(files, str | Path) else files)]
    twice = [str(file) for file, count in Counter(paths).items() if count > 1]
    if twice:
        raise UserError(f"{twice[0]}: given twice; name each annotation file once")
    reading = Reading(split, os.path.abspath(root), columns, val_share, lenient)
    saved = _only_dataset(paths, reading)
    row_images, held_in = (None, paths) if saved is None else (saved.images, saved.held_in)
    # A folder's time of change does not tell what is in it.
    if cache is None or not held_in or any(path.is_dir() for path in held_in):
        dataset = _dataset(_read_columns(paths, reading, document), Path(root), None, row_images)
    else:
        name = f"captions-{split or 'all'}{reading.label}"
        folder, held = cached_columns(Path(cache), name, held_in, lambda: _read_columns(paths, reading, document))
        dataset = _dataset(held, Path(root), folder, row_images)
    if check_images:
        dataset.check_images(", ".join(map(str, paths)))
    return dataset


def _only_dataset(files: Sequence[Path], reading: Reading) -> Annotations | None:
    """The Hugging Face dataset that is read, None where files are."""
    found = [file for file in files if is_dataset(file)]
    if found and len(files) > 1:
        raise UserError(
            f"{found[0].as_posix()}: a Hugging Face dataset is read alone; name no other annotations, or put "
            "several into one by datasets.concatenate_datasets"
        )
    return open_annotations(found[0], reading.columns, None, reading.splits) if found else None


def _dataset(
    columns: Columns, root: Path, folder: Path | None = None, row_images: RowImages | None = None
) -> CaptionDataset:
    image_ids = texts(columns, "image_ids")
    subsets = texts(columns, "subsets") if "subsets" in columns else [None] * len(image_ids)
    return CaptionDataset(
        root,
        image_ids,
        texts(columns, "captions"),
        numbers(columns, "caption_image"),
        [subset or None for subset in subsets],
        folder,
        texts(columns, "left_out") if "left_out" in columns else (),
        row_images,
    )


def _open(folder: Path, root: Path, row_images: RowImages | None) -> CaptionDataset:
    return _dataset(open_columns(folder), root, folder, row_images)


def read_field(file: str | Path, dataset: CaptionDataset, field: str) -> list[Any]:
    """A further field of each image of a Karpathy file, e.g. `style`, in the data set's order: None where it has none.

    A list and a Hugging Face dataset have no such fields. Raises UserError naming the file if it cannot be read."""
    file = Path(file)
    document = None if is_dataset(file) else read_json(file)
    images = (document.get("images") if isinstance(document, dict) else None) or []
    records = [i for i in images if isinstance(i, dict) and isinstance(i.get("filename"), str)]
    values = {_image_id(record): record.get(field) for record in records}
    return [values.get(image) for image in dataset.image_ids]


def check_evaluation_rows(
    file: Path, columns: ColumnNames = USUAL_NAMES, root: Path | None = None, split: str | None = None
) -> None:
    """Raise UserError if a file of rows gives an image one caption in two rows, which would count twice, or a list one
    `image_id` to two images. Training files are free to: their rows are many, and their sources may number alike.
    Karpathy's layout has no rows; it is checked wherever it is read."""
    annotations = open_annotations(file, columns, root, None if split is None else _split_names(split))
    rows: set[tuple[str, str]] = set()
    for record in annotations.records():
        if isinstance(record.captions, str):
            if (record.image, record.captions) in rows:
                raise UserError(
                    f"{file}: image {record.image!r} has the caption {record.captions!r} in two rows; remove one"
                )
            rows.add((record.image, record.captions))
    image_of_number: dict[int | str, str] = {}
    for row in list_elements(file) if annotations.layout == "list" else ():
        number = row.get("image_id")
        if isinstance(number, int | str):
            other = image_of_number.setdefault(number, row["image"])
            if other != row["image"]:
                raise UserError(
                    f"{file}: images {other!r} and {row['image']!r} have one image_id, {number!r}; give each its own"
                )


def is_unicode(text: str) -> bool:
    """Whether a text can be written as UTF-8: JSON may hold half a surrogate pair, which no file or tokenizer takes."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _image_id(image: dict[str, Any]) -> str:
    """Path of a Karpathy record's file, relative to the root."""
    folder, name = image.get("filepath") or "", image["filename"]
    path = f"{folder}/{name}" if folder else name
    return (Path(folder) / name).as_posix() if _may_be_respelled(path) else path


def _may_be_respelled(path: str) -> bool:
    """Whether a path may have a shorter spelling: a cheap check, for millions of them."""
    return path[:1] in "./" or "/." in path or "//" in path or path[-1:] == "/"


def _plain_path(image_id: str, root: str) -> str:
    """The normalised spelling of a path under the absolute `root`, from its text alone: no file is read."""
    if not _may_be_respelled(image_id):
        return image_id
    return posixpath.normpath(posixpath.join(root, image_id)).removeprefix(root.rstrip("/") + "/")


def _digest(text: str) -> bytes:
    return hashlib.blake2b(text.encode(errors="surrogatepass"), digest_size=16).digest()


def _read_columns(files: Sequence[Path], reading: Reading, document: Any) -> Columns:
    """The columns of a CaptionDataset, as dataset fields are named, from the rows of all files."""
    ids, captions, labels, left_out = TextBuilder(), TextBuilder(), TextBuilder(), TextBuilder()
    digests, captions_of_row, is_list_row, first_rows = bytearray(), array("q"), bytearray(), [0]
    respelled_rows, respelled_digests, root = array("q"), bytearray(), reading.root
    has_subsets = any_left_out = False
    for file in files:
        for image_id, caption, label in _rows(file, reading, document):
            given = caption if isinstance(caption, list) else [caption]
            try:
                captions_here = _checked(given, image_id, file)
            except UserError:
                if not reading.lenient:
                    raise
                captions_here, wrong = _usable(given, image_id, file)
                any_left_out = True
                for line in wrong:
                    left_out.append(line)
                if not captions_here:
                    continue
            for text in captions_here:
                captions.append(text)
            ids.append(image_id)
            labels.append(label or "")
            has_subsets |= bool(label)
            digests += _digest(image_id)
            if _may_be_respelled(image_id) and (path := _plain_path(image_id, root)) != image_id:
                respelled_rows.append(len(captions_of_row))
                respelled_digests += _digest(path)
            captions_of_row.append(len(captions_here))
            is_list_row.append(isinstance(caption, list))
        first_rows.append(len(captions_of_row))
        if first_rows[-1] == first_rows[-2]:
            without = " with captions" if any_left_out else ""
            raise UserError(f"{file}: lists no images{without}; pass an annotation file of a data set")
    digest_of_row = np.frombuffer(digests, np.uint64).reshape(-1, 2)
    image_of_row = _number_by_first(digest_of_row)
    if respelled_rows:
        plain = digest_of_row.copy()
        plain[np.frombuffer(respelled_rows, np.int64)] = np.frombuffer(respelled_digests, np.uint64).reshape(-1, 2)
        _refuse_two_spellings(files, ids.column(), image_of_row, _number_by_first(plain), first_rows)
    rows = np.argsort(image_of_row, kind="stable")  # the rows of an image one behind the other, in the files' order
    again = np.concatenate([[False], np.diff(image_of_row[rows]) == 0])
    _refuse_second_lists(files, ids.column(), rows, again, np.frombuffer(is_list_row, np.uint8), np.array(first_rows))
    caption_image = np.repeat(image_of_row, captions_of_row)
    order = np.argsort(caption_image, kind="stable")
    columns: Columns = {
        "image_ids": ids.column().take(rows[~again]),
        "captions": captions.column().take(order),
        "caption_image": caption_image[order],
    }
    if has_subsets:
        columns["subsets"] = labels.column().take(rows[~again])
    if any_left_out:
        columns["left_out"] = left_out.column()
    return columns


def _number_by_first(digests: np.ndarray) -> np.ndarray:
    """[R, 2] digests of the rows' images -> [R] int64 image numbers, in the order of their first rows."""
    order = np.lexsort(digests.T)  # stable: the first of equal ones is the first row
    is_first = np.concatenate([[True], (np.diff(digests[order], axis=0) != 0).any(1)])
    numbers = np.empty(is_first.sum(), np.int64)
    numbers[np.argsort(order[is_first])] = np.arange(len(numbers))
    image_of_row = np.empty(len(order), np.int64)
    image_of_row[order] = numbers[np.cumsum(is_first) - 1]
    return image_of_row


def _refuse_two_spellings(
    files: Sequence[Path],
    ids: TextColumn,
    image_of_row: np.ndarray,
    plain_of_row: np.ndarray,
    first_rows: list[int],
) -> None:
    """Raise UserError if two image ids are the same file; images are numbered in the order of their first rows."""
    wrong = np.flatnonzero(plain_of_row != image_of_row)
    if len(wrong):
        row = int(wrong[0])
        other = int(np.argmax(plain_of_row == plain_of_row[row]))
        raise UserError(
            f"{files[int(np.searchsorted(first_rows, row, side='right')) - 1]}: image {ids[row]!r} is the same file as "
            f"{ids[other]!r}, spelled differently; spell its path one way"
        )


def _refuse_second_lists(
    files: Sequence[Path],
    ids: TextColumn,
    rows: np.ndarray,
    again: np.ndarray,
    is_list_row: np.ndarray,
    first_rows: np.ndarray,
) -> None:
    """Within a file, an image that has a row already cannot have another with a list of captions."""
    file_of_row = np.searchsorted(first_rows, rows, side="right") - 1
    same_file = np.concatenate([[False], np.diff(file_of_row) == 0])
    wrong = np.flatnonzero(again & same_file & (is_list_row[rows] > 0))
    if len(wrong):
        first = wrong[rows[wrong].argmin()]
        raise UserError(
            f"{files[file_of_row[first]]}: image {ids[rows[first]]!r} is listed twice; put its captions in one entry"
        )


def _rows(file: Path, reading: Reading, document: Any) -> Iterator[Row]:
    if document is None:
        annotations = open_annotations(file, reading.columns, Path(reading.root), reading.splits)
        if annotations.layout != "karpathy":
            yield from _rows_of(annotations, reading)
            return
        document = read_json(file)
    if reading.val_share:
        raise UserError(f"{file}: says itself which split an image is of; leave val_share out")
    yield from _karpathy_rows(document["images"], reading.split, file, reading.root)


def _rows_of(annotations: Annotations, reading: Reading) -> Iterator[Row]:
    """The rows of the wanted split."""
    if not annotations.has_splits:
        if reading.val_share and reading.split not in (None, "train", "val"):
            raise UserError(f"{annotations.file}: no split {reading.split!r}; val_share makes train and val of it")
        yield from (record[:3] for record in annotations.records() if reading.wants(record))
        return
    if reading.val_share:
        raise UserError(f"{annotations.file}: says itself which split an image is of; leave val_share out")
    found: Counter[str] = Counter()
    for record in annotations.records():
        found[str(record.split)] += 1
        if reading.split is None or record.split in _split_names(reading.split):
            yield record[:3]
    _refuse_absent_split(annotations.file, reading.split, found, "rows")


def _split_names(split: str | None) -> tuple[str | None, ...]:
    """What files call a split: COCO's `restval` counts as `train`, and Hugging Face says `validation`."""
    return {"train": ("train", "restval"), "val": ("val", "validation", "dev")}.get(split or "", (split,))


def _refuse_absent_split(file: Path, split: str | None, found: Counter[str], what: str) -> None:
    if split is not None and found and not any(found[str(name)] for name in _split_names(split)):
        there = ", ".join(f"{name} ({count} {what})" for name, count in sorted(found.items()))
        raise UserError(f"{file}: no split {split!r}; there are {there}")


def _karpathy_rows(images: list[Any], split: str | None, file: Path, root: str) -> Iterator[Row]:
    names = _split_names(split)
    found: Counter[str] = Counter()
    for number, image in enumerate(images):
        if not isinstance(image, dict) or not isinstance(image.get("filename"), str):
            raise UserError(f'{file}: images[{number}] has no "filename"; expected Karpathy\'s layout')
        check_names(image, ("filename", "filepath", "split", "subset"), f"{file}: images[{number}]")
    ids = [_image_id(image) for image in images]
    _refuse_repeated_numbers(images, ids, file, root)
    for image, image_id in zip(images, ids, strict=True):
        found[str(image.get("split"))] += 1
        if split is not None and image.get("split") not in names:
            continue
        sentences = image.get("sentences") or []
        if not isinstance(sentences, list):
            raise UserError(f"{file}: sentences of image {image_id!r} are {sentences!r}; expected a list")
        captions = [s.get("raw") if isinstance(s, dict) else s for s in sentences]
        yield image_id, captions, image.get("subset")
    _refuse_absent_split(file, split, found, "images")


def _refuse_repeated_numbers(images: list[dict[str, Any]], ids: list[str], file: Path, root: str) -> None:
    """Over all splits of a Karpathy file: an image in one split, `imgid` and `sentid` once where they are given."""
    split_of_path: dict[str, Any] = {}
    image_of_number: dict[int | str, str] = {}
    image_of_sentence: dict[int | str, str] = {}
    for image, image_id in zip(images, ids, strict=True):
        path, split, number = _plain_path(image_id, root), image.get("split"), image.get("imgid")
        if path in split_of_path:
            if split != split_of_path[path]:
                raise UserError(
                    f"{file}: image {image_id!r} is in the splits {split_of_path[path]!r} and {split!r}; an image "
                    "belongs to one, remove it from the other"
                )
            continue  # twice in one split, which is said where that split is read
        split_of_path[path] = split
        if isinstance(number, int | str) and image_of_number.setdefault(number, image_id) != image_id:
            raise UserError(
                f"{file}: images {image_of_number[number]!r} and {image_id!r} have one imgid, {number!r}; "
                "give each its own"
            )
        sentences = image.get("sentences")
        for sentence in sentences if isinstance(sentences, list) else ():
            number = sentence.get("sentid") if isinstance(sentence, dict) else None
            if not isinstance(number, int | str):
                continue
            if number in image_of_sentence:
                raise UserError(
                    f"{file}: two captions, of the images {image_of_sentence[number]!r} and {image_id!r}, have one "
                    f"sentid, {number!r}; give each its own"
                )
            image_of_sentence[number] = image_id


def _checked(captions: list[Any], image_id: str, file: Path) -> list[str]:
    if not captions:
        raise UserError(f"{file}: image {image_id!r} has no captions; give it one or remove it")
    for caption in captions:
        if not isinstance(caption, str):
            raise UserError(f"{file}: image {image_id!r} has the caption {caption!r}; expected text")
        if not (caption.isascii() or is_unicode(caption)):
            raise UserError(
                f"{file}: image {image_id!r} has the caption {caption!r}, with half a surrogate pair; write it as UTF-8"
            )
        if not caption.strip():
            raise UserError(f"{file}: image {image_id!r} has an empty caption; remove it")
    return captions


def _usable(captions: list[Any], image_id: str, file: Path) -> tuple[list[str], list[str]]:
    """Those of an image's captions that have text, and a line for each that has none, or for the image without any."""
    usable, wrong = [], []
    for caption in captions or [None]:
        try:
            usable += _checked([] if caption is None and not captions else [caption], image_id, file)
        except UserError as error:
            wrong.append(str(error))
    return usable, wrong
