"""Image-caption annotations: which captions belong to which image file.

Two layouts, told apart by their content:
- Karpathy (Flickr30k, COCO, and what data/scenes.py writes): {"images": [{"filepath" (optional), "filename", "split",
  "subset" (optional), "sentences": [{"raw": ...}, ...]}, ...]}; split `restval` counts as `train`.
- BLIP and ALBEF: [{"image": ..., "caption": one or a list}, ...]; such a file is one split. Training lists have a
  row a caption; rows of one image are put together. They may have millions of rows, and are read one by one.

Held as columns (data/columns.py), not as objects, so that millions of captions fit, in every process.

    dataset = load_annotations("dataset_flickr30k.json", root="flickr30k-images", split="test")
    len(dataset), len(dataset.captions)               # 1000, 5000
"""

from __future__ import annotations

import hashlib
from array import array
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from models.errors import UserError
from models.images import open_image

from .columns import Columns, TextBuilder, TextColumn, cached_columns, open_columns
from .json_documents import is_list, list_elements, read_json

Row = tuple[str, str | list[str], str | None]
"""Image id, its caption or list of captions, its subset."""


@dataclass(frozen=True, eq=False)
class CaptionDataset:
    """The images of one split and their captions, one image's captions behind the other's."""

    root: Path
    """Folder that image ids are relative to."""
    image_ids: Sequence[str]
    """N unique paths relative to `root`, in the file's order."""
    captions: Sequence[str]
    """C raw captions, none blank, sorted by image."""
    caption_image: np.ndarray
    """[C] int64, ascending: index into image_ids of each caption's image. Every image occurs."""
    subsets: Sequence[str | None]
    """[N] label of a part of the split that is reported by itself, None where the file has none."""
    folder: Path | None = None
    """The cached columns that it was opened from: a process started afresh opens them again instead of a copy."""

    def __len__(self) -> int:
        """Number of images."""
        return len(self.image_ids)

    def __reduce_ex__(self, protocol):
        return super().__reduce_ex__(protocol) if self.folder is None else (_open, (self.folder, self.root))

    def path(self, image: int) -> Path:
        """The file of image number `image`."""
        return self.root / self.image_ids[image]

    def open_image(self, image: int) -> Image.Image:
        """Image number `image`, decoded. Raises ImageError naming it if it cannot be."""
        return open_image(self.path(image))

    def epoch_order(self, stream: np.random.Generator) -> np.ndarray:
        """[N] int32: the images in an order drawn from `stream`."""
        return stream.permutation(np.arange(len(self), dtype=np.int32))

    def check_images(self, file: str | Path) -> None:
        """Raise UserError, naming the first, if image files are missing; `file` lists them."""
        missing = [i for i in range(len(self)) if not self.path(i).is_file()]
        if missing:
            raise UserError(
                f"{self.path(missing[0])}: no such image; {len(missing)} of the {len(self)} images of {file} are "
                f"missing under {self.root}; pass the folder that the file's paths start from as data root"
            )

    def caption_range(self, image: int) -> tuple[int, int]:
        """Captions start .. stop - 1 are those of image number `image`."""
        start, stop = np.searchsorted(self.caption_image, (image, image + 1))
        return int(start), int(stop)


def load_annotations(
    files: str | Path | Sequence[str | Path],
    root: str | Path,
    split: str | None,
    check_images: bool = False,
    cache: str | Path | None = None,
) -> CaptionDataset:
    """Read one split of an annotation file, or all (None); `check_images` also looks whether every image file exists.

    Several files are read as one: an image that two of them list has the captions of both. With `cache`, a folder, the
    columns are written there once and memory-mapped from then on. For a BLIP/ALBEF list, which is one split, `split`
    chooses nothing. Reading 5M pairs peaks at 1.5 GB, once; training from them
    then takes 1.5 GB in all, 4 workers and 0.9 GB of libraries included (benchmarks/lists_cpu.json).

    Raises UserError naming the file and the first row that is wrong: missing file, no JSON, no such split (with those
    there are), no images, an image without captions or twice in a split, a blank caption or one that is no text,
    missing image files."""
    files = [Path(file) for file in ((files,) if isinstance(files, str | Path) else files)]
    twice = [str(file) for file, count in Counter(files).items() if count > 1]
    if twice:
        raise UserError(f"{twice[0]}: named twice; name each annotation file once")
    if cache is None:
        dataset = _dataset(_read_columns(files, split), Path(root))
    else:
        name = f"captions-{split or 'all'}"
        folder, columns = cached_columns(Path(cache), name, files, lambda: _read_columns(files, split))
        dataset = _dataset(columns, Path(root), folder)
    if check_images:
        dataset.check_images(", ".join(map(str, files)))
    return dataset


def _dataset(columns: Columns, root: Path, folder: Path | None = None) -> CaptionDataset:
    image_ids = columns["image_ids"]
    subsets = columns.get("subsets")
    return CaptionDataset(
        root,
        image_ids,
        columns["captions"],
        columns["caption_image"],
        [None] * len(image_ids) if subsets is None else [subset or None for subset in subsets],
        folder,
    )


def _open(folder: Path, root: Path) -> CaptionDataset:
    return _dataset(open_columns(folder), root, folder)


def read_field(file: str | Path, dataset: CaptionDataset, field: str) -> list[Any]:
    """A further field of each image of a Karpathy file, e.g. `style`, in the data set's order: None where it has none.

    A list has no such fields. Raises UserError naming the file if it cannot be read."""
    file = Path(file)
    document = read_json(file)
    images = (document.get("images") if isinstance(document, dict) else None) or []
    records = [i for i in images if isinstance(i, dict) and isinstance(i.get("filename"), str)]
    values = {_image_id(record): record.get(field) for record in records}
    return [values.get(image) for image in dataset.image_ids]


def _image_id(image: dict[str, Any]) -> str:
    """Path of a Karpathy record's file, relative to the root."""
    return (Path(image.get("filepath") or "") / image["filename"]).as_posix()


def _read_columns(files: Sequence[Path], split: str | None) -> Columns:
    """The columns of a CaptionDataset, as dataset fields are named, from the rows of all files."""
    ids, captions, labels = TextBuilder(), TextBuilder(), TextBuilder()
    digests, captions_of_row, is_list_row, first_rows = bytearray(), array("q"), bytearray(), [0]
    for file in files:
        for image_id, caption, label in _rows(file, split):
            texts = _checked(caption if isinstance(caption, list) else [caption], image_id, file)
            for text in texts:
                captions.append(text)
            ids.append(image_id)
            labels.append("" if label is None else str(label))
            digests += hashlib.blake2b(image_id.encode(errors="surrogatepass"), digest_size=16).digest()
            captions_of_row.append(len(texts))
            is_list_row.append(isinstance(caption, list))
        first_rows.append(len(captions_of_row))
        if first_rows[-1] == first_rows[-2]:
            raise UserError(f"{file}: it lists no images; pass an annotation file of a data set")
    image_of_row = _number_by_first(np.frombuffer(digests, np.uint64).reshape(-1, 2))
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
    if len(labels.column().blob):
        columns["subsets"] = labels.column().take(rows[~again])
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
            f"{files[file_of_row[first]]}: image '{ids[rows[first]]}' is listed twice; put its captions in one entry"
        )


def _rows(file: Path, split: str | None) -> Iterator[Row]:
    if is_list(file):
        return _list_rows(list_elements(file), file)
    document = read_json(file)
    if isinstance(document, dict) and isinstance(document.get("images"), list):
        return _karpathy_rows(document["images"], split, file)
    raise UserError(f'{file}: expected {{"images": [...]}} (Karpathy) or a list of images with captions')


def _karpathy_rows(images: list[Any], split: str | None, file: Path) -> Iterator[Row]:
    names = ("train", "restval") if split == "train" else (split,)
    found: Counter[str] = Counter()
    for number, image in enumerate(images):
        if not isinstance(image, dict) or not isinstance(image.get("filename"), str):
            raise UserError(f'{file}: images[{number}] has no "filename"; expected Karpathy\'s layout')
        found[str(image.get("split"))] += 1
        if split is not None and image.get("split") not in names:
            continue
        image_id = _image_id(image)
        sentences = image.get("sentences") or []
        if not isinstance(sentences, list):
            raise UserError(f"{file}: sentences of image '{image_id}' are {sentences!r}; expected a list")
        captions = [s.get("raw") if isinstance(s, dict) else s for s in sentences]
        yield image_id, captions, image.get("subset")
    if split is not None and found and not any(found[name] for name in names):
        there = ", ".join(f"{name} ({count} images)" for name, count in sorted(found.items()))
        raise UserError(f"{file}: no split {split!r}; there are {there}")


def _list_rows(rows: Iterable[Any], file: Path) -> Iterator[Row]:
    for number, row in enumerate(rows):
        if not isinstance(row, dict) or not isinstance(row.get("image"), str) or "caption" not in row:
            raise UserError(f'{file}: row {number} lacks "image" or "caption"; expected the layout of BLIP or ALBEF')
        yield row["image"], row["caption"], row.get("subset")


def _checked(captions: list[Any], image_id: str, file: Path) -> list[str]:
    if not captions:
        raise UserError(f"{file}: image '{image_id}' has no captions; give it one or remove it")
    for caption in captions:
        if not isinstance(caption, str):
            raise UserError(f"{file}: image '{image_id}' has the caption {caption!r}; expected text")
        if not caption.strip():
            raise UserError(f"{file}: image '{image_id}' has an empty caption; remove it")
    return captions
