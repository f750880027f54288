"""Image-caption annotations: which captions belong to which image file.

Two layouts, told apart by their content:
- Karpathy (Flickr30k, COCO, and what data/scenes.py writes): {"images": [{"filepath" (optional), "filename", "split",
  "subset" (optional), "sentences": [{"raw": ...}, ...]}, ...]}; split `restval` counts as `train`.
- BLIP and ALBEF: [{"image": ..., "caption": one or a list}, ...]; such a file is one split. Training lists have a
  row a caption; rows of one image are put together.

Held as columns (lists of strings, index arrays), not as an object an image, so that millions of captions fit.

    dataset = load_annotations("dataset_flickr30k.json", root="flickr30k-images", split="test")
    len(dataset), len(dataset.captions)               # 1000, 5000
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from models.errors import UserError

Row = tuple[str, list[str], str | None]
"""Image id, its captions, its subset."""


@dataclass(frozen=True)
class CaptionDataset:
    """The images of one split and their captions, one image's captions behind the other's."""

    root: Path
    """Folder that image ids are relative to."""
    image_ids: list[str]
    """N unique paths relative to `root`, in the file's order."""
    captions: list[str]
    """C raw captions, none blank, sorted by image."""
    caption_image: np.ndarray
    """[C] int64, ascending: index into image_ids of each caption's image. Every image occurs."""
    subsets: list[str | None]
    """[N] label of a part of the split that is reported by itself, None where the file has none."""

    def __len__(self) -> int:
        """Number of images."""
        return len(self.image_ids)

    def path(self, image: int) -> Path:
        """The file of image number `image`."""
        return self.root / self.image_ids[image]

    def check_images(self, file: Path) -> None:
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
    file: str | Path, root: str | Path, split: str | None, check_images: bool = False
) -> CaptionDataset:
    """Read one split of an annotation file, or all (None); `check_images` also looks whether every image file exists.

    For a BLIP/ALBEF list, which is one split, `split` chooses nothing. Raises UserError naming the file and the
    first row that is wrong: missing file, no JSON, no such split (with those there are), no images, an image
    without captions or twice in a split, a blank caption or one that is no text, missing image files."""
    file = Path(file)
    document = _read_json(file)
    if isinstance(document, dict) and isinstance(document.get("images"), list):
        rows = _karpathy_rows(document["images"], split, file)
    elif isinstance(document, list):
        rows = _list_rows(document, file)
    else:
        raise UserError(f'{file}: expected {{"images": [...]}} (Karpathy) or a list of images with captions')
    dataset = _columns(rows, Path(root), file)
    if not len(dataset):
        raise UserError(f"{file}: it lists no images; pass an annotation file of a data set")
    if check_images:
        dataset.check_images(file)
    return dataset


def read_field(file: str | Path, dataset: CaptionDataset, field: str) -> list[Any]:
    """A further field of each image of a Karpathy file, e.g. `style`, in the data set's order: None where it has none.

    A list has no such fields. Raises UserError naming the file if it cannot be read."""
    file = Path(file)
    document = _read_json(file)
    images = (document.get("images") if isinstance(document, dict) else None) or []
    records = [i for i in images if isinstance(i, dict) and isinstance(i.get("filename"), str)]
    values = {_image_id(record): record.get(field) for record in records}
    return [values.get(image) for image in dataset.image_ids]


def _image_id(image: dict[str, Any]) -> str:
    """Path of a Karpathy record's file, relative to the root."""
    return (Path(image.get("filepath") or "") / image["filename"]).as_posix()


def _read_json(file: Path) -> Any:
    try:
        with file.open(encoding="utf-8") as stream:
            return json.load(stream)
    except FileNotFoundError:
        raise UserError(f"{file}: no such file; pass the annotation file of the data set") from None
    except OSError as error:
        raise UserError(f"{file}: cannot be read ({error.strerror}); pass an annotation file") from error
    except ValueError as error:  # JSONDecodeError or UnicodeDecodeError
        raise UserError(f"{file}: not valid JSON ({error}); truncated or not an annotation file") from error


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
        yield image_id, _checked(captions, image_id, file), image.get("subset")
    if split is not None and found and not any(found[name] for name in names):
        there = ", ".join(f"{name} ({count} images)" for name, count in sorted(found.items()))
        raise UserError(f"{file}: no split {split!r}; there are {there}")


def _list_rows(rows: list[Any], file: Path) -> Iterator[Row]:
    captions: dict[str, list[str]] = {}
    subsets: dict[str, str | None] = {}
    for number, row in enumerate(rows):
        if not isinstance(row, dict) or not isinstance(row.get("image"), str) or "caption" not in row:
            raise UserError(f'{file}: row {number} lacks "image" or "caption"; expected the layout of BLIP or ALBEF')
        image_id, caption = row["image"], row["caption"]
        if image_id in captions and isinstance(caption, list):
            raise UserError(f"{file}: image '{image_id}' has two lists of captions; merge them")
        checked = _checked(caption if isinstance(caption, list) else [caption], image_id, file)
        captions.setdefault(image_id, []).extend(checked)
        subsets.setdefault(image_id, row.get("subset"))
    for image_id in captions:
        yield image_id, captions[image_id], subsets[image_id]


def _checked(captions: list[Any], image_id: str, file: Path) -> list[str]:
    if not captions:
        raise UserError(f"{file}: image '{image_id}' has no captions; give it one or remove it")
    for caption in captions:
        if not isinstance(caption, str):
            raise UserError(f"{file}: image '{image_id}' has the caption {caption!r}; expected text")
        if not caption.strip():
            raise UserError(f"{file}: image '{image_id}' has an empty caption; remove it")
    return captions


def _columns(rows: Iterable[Row], root: Path, file: Path) -> CaptionDataset:
    image_ids: dict[str, None] = {}
    captions: list[str] = []
    counts: list[int] = []
    subsets: list[str | None] = []
    for image_id, texts, subset in rows:
        if image_id in image_ids:
            raise UserError(f"{file}: image '{image_id}' is listed twice; put its captions in one entry")
        image_ids[image_id] = None
        captions += texts
        counts.append(len(texts))
        subsets.append(subset)
    caption_image = np.repeat(np.arange(len(counts), dtype=np.int64), counts)
    return CaptionDataset(root, list(image_ids), captions, caption_image, subsets)
