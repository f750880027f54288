"""Queries to look at: where reranking helped most and hurt most, with their first candidates before and after.

for example in pick_examples(results.t2i, "reranked", helped=True, count=6): ...
draw_teaser(results, dataset, "reranked", "docs/teaser.png")
"""

from __future__ import annotations

import base64
import io
import textwrap
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from data.caption_datasets import CaptionDataset

from ..metrics import first_right_rank
from ..results import DirectionResults

SHOWN = 5
THUMBNAIL_PIXELS = 176
"""Twice the size on the page, for dense screens."""


@dataclass(frozen=True)
class Example:
    """One query and its first candidates, by the embedding and by another column."""

    query: int
    """Number of the query: a caption (text to image) or an image (image to text)."""
    before: list[int]
    after: list[int]
    right: set[int]
    """Those of `before` and `after` that are right answers."""
    rank_before: int
    rank_after: int
    """0-based rank of the first right answer."""


def pick_examples(direction: DirectionResults, column: str, helped: bool, count: int) -> list[Example]:
    """The queries that `column` helped most (its first is right, and was ranked lowest before), or hurt most (its
    first was right, and is ranked lowest now). One query per image; fewer than `count` where there are no more."""
    before, after = (first_right_rank(direction.hits(name)) for name in ("embedding", column))
    best, other = (after, before) if helped else (before, after)
    candidates = np.flatnonzero((best == 0) & (other > 0) & (other < direction.k))
    candidates = candidates[np.argsort(-other[candidates], kind="stable")]
    _, first_of_image = np.unique(direction.query_image[candidates], return_index=True)
    chosen = candidates[np.sort(first_of_image)][:count]
    rankings = {name: direction.rankings(name) for name in ("embedding", column)}
    return [_example(direction, rankings["embedding"], rankings[column], before, after, query) for query in chosen]


def _example(
    direction: DirectionResults,
    embedding: np.ndarray,
    reranked: np.ndarray,
    rank_before: np.ndarray,
    rank_after: np.ndarray,
    query: int,
) -> Example:
    before, after = embedding[query, :SHOWN].tolist(), reranked[query, :SHOWN].tolist()
    image = direction.query_image[query]
    right = {item for item in (*before, *after) if direction.item_image[item] == image}
    return Example(int(query), before, after, right, int(rank_before[query]), int(rank_after[query]))


@lru_cache(maxsize=1024)
def thumbnail_uri(dataset: CaptionDataset, image: int) -> str:
    """An image, by number, as a small data URI; JPEG or PNG, whichever is shorter for drawings and photographs."""
    picture = dataset.open_image(image)
    picture.thumbnail((THUMBNAIL_PIXELS, THUMBNAIL_PIXELS))
    encoded = {}
    for form, options in (("jpeg", {"quality": 85}), ("png", {"optimize": True})):
        buffer = io.BytesIO()
        picture.save(buffer, form, **options)
        encoded[form] = buffer.getvalue()
    form = min(encoded, key=lambda name: len(encoded[name]))
    return f"data:image/{form};base64,{base64.b64encode(encoded[form]).decode()}"


def draw_teaser(dataset: CaptionDataset, example: Example) -> Image.Image:
    """A text-to-image query with its first five images before and after reranking, the right one framed: a picture
    of 1,200 x 640 pixels for a README."""
    sheet = Image.new("RGB", (1200, 640), "white")
    draw = ImageDraw.Draw(sheet)
    query = textwrap.wrap(f"\u201c{dataset.captions[example.query]}\u201d", width=64)[:2]
    draw.multiline_text((40, 28), "\n".join(query), fill="#14171f", font=_font(30), spacing=8)
    rows = (("embedding alone", example.before, 130), ("EDJE", example.after, 390))
    for title, images, top in rows:
        draw.text((40, top + 88), title.replace(" ", "\n"), fill="#14171f", font=_font(24), spacing=6)
        for place, image in enumerate(images):
            _paste(sheet, dataset.open_image(image), 220 + place * 192, top, framed=image in example.right)
            draw.text((220 + place * 192, top + 184), str(place + 1), fill="#6b7280", font=_font(18))
    return sheet


def _paste(sheet: Image.Image, image: Image.Image, left: int, top: int, framed: bool) -> None:
    size = 176
    scale = size / max(image.size)
    image = image.resize([max(1, round(side * scale)) for side in image.size], Image.Resampling.LANCZOS)
    draw = ImageDraw.Draw(sheet)
    box = (left - 6, top - 6, left + size + 5, top + size + 5)
    draw.rounded_rectangle(box, radius=8, outline="#16a34a" if framed else "#e5e7eb", width=6 if framed else 1)
    sheet.paste(image, (left + (size - image.width) // 2, top + (size - image.height) // 2))


def _font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size)
