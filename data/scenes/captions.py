"""Captions of scenes: a small grammar with varied wording, and the check that a caption fits one scene only.

A form is one way to word a caption: a sentence pattern, who is named first, which kinds of attribute are named, which
synonyms stand for them. All siblings of a family are worded by the same five forms, so their captions consist of the
same words: only the order, that is the binding, differs. Region captions, for pretraining, describe one object each.
"""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations

from data.scenes.world import KINDS, VALUES, Scene, SceneObject, holds, relation_of

CAPTIONS_PER_IMAGE = 5
MAX_WORDS = 16
FORM_ATTEMPTS = 5000

# c is the object that the others are related to, a and b are the others; b only with three objects.
# c_a: how c stands to a ("left of"); a_c: how a stands to c; a_at: where a is as seen from c ("to its right").
PATTERNS = {
    2: (
        "{c} {c_a} {a}",
        "{c} is {c_a} {a}",
        "there is {c} {c_a} {a}",
        "{c_a} {a} is {c}",
        "{c_a} {a} there is {c}",
        "{c} with {a} {a_at}",
        "{c} has {a} {a_at}",
        "{c} sits {c_a} {a}",
    ),
    3: (
        "{c} {c_a} {a} and {c_b} {b}",
        "{c} is {c_a} {a} and {c_b} {b}",
        "{c_a} {a} and {c_b} {b} is {c}",
        "{c} with {a} {a_at} and {b} {b_at}",
        "{c} has {a} {a_at} and {b} {b_at}",
        "{a} {a_c} {c} that is {c_b} {b}",
    ),
}
SYNONYMS = {
    "large": ("large", "big"),
    "small": ("small", "little"),
    "plain": ("plain", "solid"),
    "dotted": ("dotted", "spotted"),
    "circle": ("circle", "disc"),
    "square": ("square", "box"),
    "cross": ("cross", "plus"),
    "diamond": ("diamond", "rhombus"),
    "moon": ("moon", "crescent"),
    "left": ("left of", "to the left of"),
    "right": ("right of", "to the right of"),
    "above": ("above", "over"),
    "below": ("below", "under", "beneath"),
}
SEEN_FROM = {"left": "to its left", "right": "to its right", "above": "{} it", "below": "{} it"}
ARTICLES = ("a", "a", "the", "")
PLACE_MARGIN = 0.1
"""An object is left of the middle if it is at least this share of the image off it."""


@dataclass(frozen=True)
class Form:
    """One way to word a caption. `order`: which of the scene's objects are c, a (and b) of the pattern."""

    pattern: str
    order: tuple[int, ...]
    kinds: tuple[str, ...]
    words: dict[str, str]
    article: str

    def caption(self, scene: Scene) -> str:
        """Such as "a large red circle to the left of a small blue square"."""
        anchor, *others = (scene.objects[index] for index in self.order)
        parts = {"c": self._noun_phrase(anchor)}
        for letter, other in zip("ab", others, strict=False):
            ours, theirs = relation_of(anchor, other), relation_of(other, anchor)
            parts |= {
                letter: self._noun_phrase(other),
                f"c_{letter}": self.words[ours],
                f"{letter}_c": self.words[theirs],
                f"{letter}_at": SEEN_FROM[theirs].format(self.words[theirs]),
            }
        return self.pattern.format(**parts)

    def fits(self, scene: Scene, other: Scene) -> bool:
        """Whether the caption that this form gives `scene` is true of `other` too."""
        named = []
        for thing in scene.objects:
            found = next((x for x in other.objects if x.name == thing.name), None)
            if found is None or any(getattr(found, kind) != getattr(thing, kind) for kind in self.kinds):
                return False
            named.append(found)
        first = self.order[0]
        return all(
            holds(named[first], relation_of(scene.objects[first], scene.objects[index]), named[index])
            for index in self.order[1:]
        )

    def region_caption(self, thing: SceneObject) -> str:
        """One object and its place in the image, such as "a red circle above to the left"."""
        vertical = _off_middle(thing.y, "above", "below")
        horizontal = _off_middle(thing.x, "left", "right")
        sides = [self.words[side].removesuffix(" of") for side in (vertical, horizontal) if side]
        return " ".join([self._noun_phrase(thing), *sides])

    def _noun_phrase(self, thing: SceneObject) -> str:
        words = [self.words.get(getattr(thing, kind), getattr(thing, kind)) for kind in self.kinds]
        article = "an" if self.article == "a" and words[0][0] in "aeiou" else self.article
        return " ".join([article, *words]).strip()


class CaptionWriter:
    """Words the families of a data set; every caption fits one of all its scenes only."""

    def __init__(self, scenes: Sequence[Scene], seed: int):
        self._rng = random.Random(f"captions {seed}")
        self._by_names: dict[frozenset, list[Scene]] = defaultdict(list)
        for scene in scenes:
            for pair in combinations(scene.objects, 2):
                self._by_names[_names(*pair)].append(scene)

    def write_family(self, siblings: Sequence[Scene]) -> list[list[str]]:
        """Five different captions for each of the siblings; caption i of each consists of the same words."""
        captions: list[list[str]] = [[] for _ in siblings]
        for _ in range(FORM_ATTEMPTS):
            form = draw_form(len(siblings[0].objects), self._rng)
            worded = [form.caption(scene) for scene in siblings]
            if worded[0] in captions[0] or len(worded[0].split()) > MAX_WORDS:
                continue
            if any(self._fitting(form, scene) > 1 for scene in siblings):
                continue
            for own, caption in zip(captions, worded, strict=True):
                own.append(caption)
            if len(captions[0]) == CAPTIONS_PER_IMAGE:
                return captions
        raise RuntimeError(f"no {CAPTIONS_PER_IMAGE} captions that fit one scene only for {siblings[0].key}")

    def _fitting(self, form: Form, scene: Scene) -> int:
        candidates = self._by_names[_names(*scene.objects[:2])]
        return sum(form.fits(scene, other) for other in candidates)


def region_captions(scene: Scene, rng: random.Random) -> list[str]:
    """A caption for each object of the scene, which it may share with other scenes.

    As in X-VLM (arXiv 2111.08276), which pretrains on descriptions of regions beside captions of whole images."""
    return [draw_form(len(scene.objects), rng).region_caption(thing) for thing in scene.objects]


def draw_form(num_objects: int, rng: random.Random) -> Form:
    """Colour and shape are always named, size and texture each in about half of the captions."""
    order = rng.sample((0, 1), 2) if num_objects == 2 else [0, *rng.sample((1, 2), 2)]
    kinds = tuple(kind for kind in KINDS if kind in ("colour", "shape") or rng.random() < 0.5)
    words = {value: rng.choice(choices) for value, choices in SYNONYMS.items()}
    return Form(rng.choice(PATTERNS[num_objects]), tuple(order), kinds, words, rng.choice(ARTICLES))


def word_kinds() -> dict[str, dict[str, str]]:
    """For each kind of word that tells scenes apart (KINDS and `relation`), its words and the value that each means."""
    kinds = {kind: {word: value for value in VALUES[kind] for word in _words(value)} for kind in KINDS}
    return kinds | {"relation": {word: side for side in ("left", "right", "above", "below") for word in _words(side)}}


def _words(value: str) -> Sequence[str]:
    """ "left" has phrases, "to the left of", which differ from those of "right" in one word."""
    return (value,) if value in ("left", "right") else SYNONYMS.get(value, (value,))


def _off_middle(position: float, before: str, behind: str) -> str | None:
    if abs(position - 0.5) < PLACE_MARGIN:
        return None
    return before if position < 0.5 else behind


def _names(a: SceneObject, b: SceneObject) -> frozenset:
    return frozenset((a.name, b.name))
