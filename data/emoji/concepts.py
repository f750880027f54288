"""What emoji mean: their captions, and the split that a concept belongs to, whoever drew it."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .packages import read_documents

_SHORT_CODES = ("iamcal", "joypixels", "github")
"""Vendors, in the order in which their names are taken."""
_MOST_CAPTIONS, _MOST_TAGS, _MOST_CODES = 5, 4, 2
_TEST_PERCENT, _VAL_PERCENT = 25, 5


@dataclass(frozen=True)
class Concept:
    """An emoji, or one of its skin-tone variants."""

    key: str
    """Its code points in lower-case hexadecimal with hyphens between, without the variation selector fe0f."""
    subset: str
    """`composition` if it has variants or is one, else `style`."""
    captions: tuple[str, ...]
    """One to five, different in more than case and punctuation."""

    @property
    def split(self) -> str:
        """`train`, `val` or `test`, by a hash of the key: it never moves."""
        percent = int(hashlib.sha1(self.key.encode()).hexdigest()[:8], 16) % 100
        if percent < _TEST_PERCENT:
            return "test"
        return "val" if percent < _TEST_PERCENT + _VAL_PERCENT else "train"


def concept_key(hexcode: str) -> str:
    """`1F3F4-200D-2620-FE0F` -> `1f3f4-200d-2620`: packages differ in case and in the variation selector."""
    return "-".join(point for point in hexcode.lower().split("-") if point != "fe0f")


def read_concepts(emojibase: Path) -> list[Concept]:
    """All concepts of the archive `emojibase-data`, in its order, variants behind their emoji.

    Entries of no group are parts of emoji (regional indicators) and left out. Raises UserError if the archive is
    damaged."""
    english, british, *codes = read_documents(
        emojibase, "en/data.json", "en-gb/data.json", *(f"en/shortcodes/{vendor}.json" for vendor in _SHORT_CODES)
    )
    british_labels = {entry["hexcode"]: entry["label"] for entry, _ in _with_variants(british)}
    return [
        Concept(
            concept_key(entry["hexcode"]),
            subset,
            _captions(entry, british_labels.get(entry["hexcode"]), _names(entry["hexcode"], codes)),
        )
        for entry, subset in _with_variants(english)
        if "group" in entry
    ]


def _with_variants(entries: list[dict[str, Any]]) -> Iterator[tuple[dict[str, Any], str]]:
    """Each emoji and its skin-tone variants with their subset; a variant has its emoji's tags."""
    for entry in entries:
        variants = entry.get("skins", [])
        yield entry, "composition" if variants else "style"
        for variant in variants:
            yield {"tags": entry.get("tags", []), **variant}, "composition"


def _names(hexcode: str, codes: list[dict[str, str | list[str]]]) -> list[str]:
    """The first short codes of all vendors' lists, as words."""
    found = [vendor[hexcode] for vendor in codes if hexcode in vendor]
    names = [name for entry in found for name in ([entry] if isinstance(entry, str) else entry)]
    return [re.sub("[_-]", " ", name) for name in names[:_MOST_CODES]]


def _captions(entry: dict[str, Any], british_label: str | None, names: list[str]) -> tuple[str, ...]:
    label, tags = entry["label"], entry.get("tags", [])
    candidates = [label]
    if whole_and_part := re.fullmatch("([^:]*): (.*)", label):
        whole, part = whole_and_part.groups()
        candidates.append(f"{part}, {whole}")
    if tags:
        candidates.append(", ".join([label, *tags[:_MOST_TAGS]]))
    if british_label:
        candidates.append(british_label)
    different: dict[str, str] = {}
    for caption in (*candidates, *names):
        different.setdefault(re.sub("[^a-z0-9 ]", "", caption.lower()), caption)
    return tuple(different.values())[:_MOST_CAPTIONS]
