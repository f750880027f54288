"""The emoji data set as files: `dataset_emoji.json` and the images, and how far two copies of it differ.

build_dataset("emoji")                               # downloads 12 MB, draws 9,529 images
compare_datasets(Path("emoji"), Path("other"))       # annotations equal? pixels how far apart?
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from models.errors import UserError
from models.files import make_directory, write_atomically
from models.vision.images import may_be_image, open_image

from ..json_documents import read_json
from .concepts import Concept, read_concepts
from .drawings import read_drawings, render_jpeg
from .packages import EMOJIBASE, FLUENT_FLAT, NOTO, TWEMOJI, Package, fetch, find

ANNOTATIONS = "dataset_emoji.json"
STYLES = {"twemoji": TWEMOJI, "noto": NOTO, "fluent-flat": FLUENT_FLAT}
"""Artists, in the order in which images are numbered."""
HELD_OUT_STYLE = "noto"
"""The one artist of validation and test images."""


def build_dataset(
    root: str | Path,
    packages: str | Path | None = None,
    emojibase: Package = EMOJIBASE,
    styles: Mapping[str, Package] = STYLES,
) -> Path:
    """Make the data set in `root`; returns its annotation file, which is written last. What is there is kept.

    packages: folder of the archives, as `npm pack` names them; None downloads them to `root`/packages.
    Raises UserError: a package that cannot be had or has another content than the pinned one, resvg-py not installed,
    `root` not writable or with annotations of another data set."""
    root = make_directory(root)
    try:
        folder = make_directory(root / "packages") if packages is None else Path(packages)
        get = fetch if packages is None else find
        concepts = read_concepts(get(emojibase, folder))
        drawings = {style: read_drawings(get(package, folder)) for style, package in styles.items()}
        document: dict[str, Any] = {"dataset": "emoji", "images": list(_records(concepts, drawings))}
        annotations = root / ANNOTATIONS
        if annotations.exists() and read_json(annotations) != document:
            raise UserError(f"{annotations}: annotations of another data set; move them away, or pass another --root")
        _draw_missing(root, document["images"], drawings)
        if not annotations.exists():
            write_atomically(annotations, json.dumps(document))
    except OSError as error:
        raise UserError(
            f"{root}: cannot be written to ({error.strerror}); free space or choose another --root, and run again"
        ) from None
    return annotations


def _records(concepts: list[Concept], drawings: Mapping[str, dict[str, str]]) -> Iterator[dict[str, Any]]:
    """Images of Karpathy's layout, numbered from 0; captions are numbered from 1."""
    image_number, sentence_number = 0, 1
    for style, drawn in drawings.items():
        for concept in concepts:
            split = _split(concept, style)
            if concept.key not in drawn or split is None:
                continue
            numbers = range(sentence_number, sentence_number + len(concept.captions))
            yield {
                "imgid": image_number,
                "filename": f"{concept.key}.jpg",
                "filepath": f"images/{style}",
                "split": split,
                "subset": concept.subset,
                "style": style,
                "sentids": list(numbers),
                "sentences": [{"raw": c, "sentid": i} for c, i in zip(concept.captions, numbers, strict=True)],
            }
            image_number, sentence_number = image_number + 1, numbers.stop


def _split(concept: Concept, style: str) -> str | None:
    """Where one artist's drawing of a concept goes; None leaves it out.

    Held-out concepts of `composition` are in training in no style, those of `style` in the other artists'."""
    if style == HELD_OUT_STYLE or concept.split == "train":
        return concept.split
    return None if concept.subset == "composition" else "train"


def image_path(root: Path, image: Mapping[str, Any]) -> Path:
    return root / image["filepath"] / image["filename"]


def _draw_missing(root: Path, images: list[dict[str, Any]], drawings: Mapping[str, dict[str, str]]) -> None:
    """Draw the images that are not in `root` yet, each file whole or not at all."""
    for style in drawings:
        make_directory(root / "images" / style)
    missing = [image for image in images if not may_be_image(image_path(root, image))]
    for image in tqdm(missing, desc="draw", unit="image", delay=1):
        svg = drawings[image["style"]][image["filename"].removesuffix(".jpg")]
        write_atomically(image_path(root, image), render_jpeg(svg))


@dataclass(frozen=True)
class Comparison:
    """How far the images of two data sets of equal annotations differ."""

    images: int
    identical_files: int
    max_difference: int
    """Of any value of any pixel, from 0 to 255."""
    mean_difference: float
    """Over all values of all pixels."""


def compare_datasets(root: Path, other: Path) -> Comparison:
    """Compare the images of two copies of the data set.

    Raises UserError: annotations that differ, or an image that is missing, damaged or of another size."""
    document, expected = read_json(root / ANNOTATIONS), read_json(other / ANNOTATIONS)
    if document != expected:
        raise UserError(f"{other / ANNOTATIONS}: differs from {root / ANNOTATIONS}; compare copies of one data set")
    identical, largest, total, values = 0, 0, 0, 0
    for image in tqdm(document["images"], desc="compare", unit="image", delay=1):
        ours, theirs = image_path(root, image), image_path(other, image)
        differences = _pixel_differences(ours, theirs)
        identical += ours.read_bytes() == theirs.read_bytes()
        largest = max(largest, int(differences.max()))
        total, values = total + int(differences.sum()), values + differences.size
    return Comparison(len(document["images"]), identical, largest, total / values)


def _pixel_differences(ours: Path, theirs: Path) -> np.ndarray:
    """int16 [height, width, 3], none negative. Raises UserError if a file is no image, or they differ in size."""
    first, second = open_image(ours), open_image(theirs)
    if first.size != second.size:
        raise UserError(f"{theirs}: {second.size} pixels, {first.size} in {ours}; remove the wrong one")
    return np.abs(np.asarray(first, dtype=np.int16) - np.asarray(second, dtype=np.int16))
