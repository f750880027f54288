"""The queries that report.html shows: where reranking helped most and where it hurt most, before and after."""

from __future__ import annotations

from dataclasses import dataclass

from data.caption_datasets import CaptionDataset

from ..results import Results
from .examples import Example, pick_examples

EXAMPLES = {("t2i", True): 8, ("t2i", False): 4, ("i2t", True): 3, ("i2t", False): 2}
"""Queries shown: direction, helped or hurt."""


@dataclass(frozen=True)
class Group:
    """Examples under one heading."""

    direction: str
    helped: bool
    examples: list[Example]

    def images(self) -> set[int]:
        """Numbers of the images that these examples show."""
        if self.direction == "i2t":
            return {example.query for example in self.examples}
        return {image for example in self.examples for image in (*example.before, *example.after)}


@dataclass(frozen=True)
class Gallery:
    """What the section shows; `groups` without examples are left out."""

    groups: list[Group]
    images_here: bool
    """Whether every image to show is on this machine."""


def make_gallery(results: Results, dataset: CaptionDataset, column: str) -> Gallery | None:
    """The queries that `column` helped most and hurt most; None where it changed no first place."""
    groups = []
    for (direction, helped), count in EXAMPLES.items():
        part = results.t2i if direction == "t2i" else results.i2t
        groups.append(Group(direction, helped, pick_examples(part, column, helped=helped, count=count)))
    groups = [group for group in groups if group.examples]
    images = {image for group in groups for image in group.images()}
    return Gallery(groups, all(dataset.has_image(image) for image in images)) if groups else None
