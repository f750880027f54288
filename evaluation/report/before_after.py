"""The gallery of report.html: what the embedding ranked first and what EDJE ranks first, right answers framed."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from html import escape

from data.caption_datasets import CaptionDataset
from models.vision.images import may_be_image

from ..output import COLUMN_TITLES, DIRECTION_TITLES
from ..results import Results
from .examples import Example, pick_examples, thumbnail_uri

EXAMPLES = {("t2i", True): 8, ("t2i", False): 4, ("i2t", True): 3, ("i2t", False): 2}
"""Queries shown: direction, helped or hurt."""


def before_after_gallery(results: Results, dataset: CaptionDataset, column: str) -> str:
    """Before and after, for the queries where `column` helped most and hurt most."""
    examples = {
        key: pick_examples(getattr(results, key[0]), column, helped=key[1], count=count)
        for key, count in EXAMPLES.items()
    }
    if not any(examples.values()):
        return ""
    if not all(may_be_image(dataset.path(image)) for image in _images_shown(results, examples)):
        return '<h2>Before and after</h2><p class="note">The images are not on this machine.</p>'
    parts = [
        "<h2>Before and after</h2>",
        f'<p class="note">Left the embedding\'s first five, right those of {COLUMN_TITLES[column]}; right answers '
        "are framed.</p>",
    ]
    for (direction, helped), chosen in examples.items():
        if chosen:
            parts.append(f"<h3>{DIRECTION_TITLES[direction].capitalize()}: {'helped' if helped else 'hurt'} most</h3>")
            show = _image_example if direction == "t2i" else _caption_example
            parts += [show(example, dataset, column) for example in chosen]
    return "\n".join(parts)


def _images_shown(results: Results, examples: dict[tuple[str, bool], list[Example]]) -> Iterable[int]:
    for (direction, _), chosen in examples.items():
        for example in chosen:
            yield from (*example.before, *example.after) if direction == "t2i" else (example.query,)


def _image_example(example: Example, dataset: CaptionDataset, column: str) -> str:
    def strip(images: list[int]) -> str:
        shots = (
            f'<div><div class="shot {"right" if image in example.right else ""}">{_thumbnail(dataset, image)}</div>'
            f'<div class="rank">{place}</div></div>'
            for place, image in enumerate(images, 1)
        )
        return f'<div class="strip">{"".join(shots)}</div>'

    query = f"“{escape(dataset.captions[example.query])}”"
    return _example(example, query, strip, column)


def _caption_example(example: Example, dataset: CaptionDataset, column: str) -> str:
    def listing(captions: list[int]) -> str:
        items = (
            f'<li class="{"right" if caption in example.right else ""}">{escape(dataset.captions[caption])}</li>'
            for caption in captions
        )
        return f'<ol class="captions">{"".join(items)}</ol>'

    query = f'<span class="queryimage">{_thumbnail(dataset, example.query)}</span>'
    return _example(example, query, listing, column)


def _thumbnail(dataset: CaptionDataset, image: int) -> str:
    return f'<img src="{thumbnail_uri(dataset.path(image))}" alt="{escape(dataset.image_ids[image])}">'


def _example(example: Example, query: str, show: Callable[[list[int]], str], column: str) -> str:
    moved = f"right answer: {example.rank_before + 1} → {example.rank_after + 1}"
    return (
        f'<div class="example"><p class="query">{query}<span class="moved">{moved}</span></p><div class="pair">'
        f'<div><div class="side">{COLUMN_TITLES["embedding"]}</div>{show(example.before)}</div>'
        f'<div><div class="side">{COLUMN_TITLES[column]}</div>{show(example.after)}</div></div></div>'
    )
