"""The world of the embedded data set: what objects and scenes there are, and how families of look-alikes are drawn.

A scene has two or three objects, each with a size, a texture, a colour and a shape, at the positions of a layout.
Scenes come in families: siblings share the layout and all attribute values, but bind them to other objects or positions
("a red circle left of a blue square", "a blue circle left of a red square"). A model that only counts words cannot tell
siblings apart; one that binds attributes to objects and positions can. The same difficulty, for photographs: Winoground
(arXiv 2204.03162), ARO (arXiv 2210.01936); for rendered shapes: CLEVR (arXiv 1612.06890).
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import combinations, permutations, product

from models.errors import UserError

KINDS = ("size", "texture", "colour", "shape")
"""Kinds of attribute, in the order in which a caption names them: "a large striped red circle"."""

VALUES = {
    "size": ("large", "small"),
    "texture": ("plain", "striped", "dotted"),
    "colour": ("red", "orange", "yellow", "green", "cyan", "blue", "pink", "black"),
    "shape": ("circle", "square", "triangle", "star", "cross", "heart", "diamond", "moon"),
}

LAYOUTS = {
    "row": ((0.25, 0.5), (0.75, 0.5)),
    "column": ((0.5, 0.25), (0.5, 0.75)),
    "top left": ((0.25, 0.25), (0.75, 0.25), (0.25, 0.75)),
    "top right": ((0.75, 0.25), (0.25, 0.25), (0.75, 0.75)),
    "bottom left": ((0.25, 0.75), (0.75, 0.75), (0.25, 0.25)),
    "bottom right": ((0.75, 0.75), (0.25, 0.75), (0.75, 0.25)),
}
"""Centres (x, y) of the positions, as shares of the image. With three objects the first one stands in the named corner,
the second beside it in the same row, the third in the same column."""

RELATION_MARGIN = 0.2
"""A stands left of B if it is at least this share of the image further left. Positions are 0.5 apart, moved by at most
JITTER each, so that no relation depends on the jitter."""

JITTER = 0.03
FAMILY_SIZES = (4, 5, 6)
FAMILY_ATTEMPTS = 2000
"""Draws in a row that may collide with earlier scenes before the world counts as full."""


@dataclass(frozen=True)
class SceneObject:
    size: str
    texture: str
    colour: str
    shape: str
    x: float
    y: float

    @property
    def attributes(self) -> tuple[str, ...]:
        """Values in the order of KINDS, such as ("large", "striped", "red", "circle")."""
        return self.size, self.texture, self.colour, self.shape

    @property
    def name(self) -> tuple[str, str]:
        """Colour and shape. No two objects of a scene share either, so this names one of them."""
        return self.colour, self.shape


@dataclass(frozen=True)
class Scene:
    """Objects in the order of the layout's positions. `family` numbers the siblings' group over all splits."""

    family: int
    layout: str
    objects: tuple[SceneObject, ...]

    @property
    def key(self) -> tuple:
        """What the scene shows, without jitter: equal keys are the same scene."""
        return self.layout, tuple(thing.attributes for thing in self.objects)

    @property
    def family_key(self) -> tuple:
        """What siblings share: the layout and the sorted values of each kind."""
        columns = zip(*(thing.attributes for thing in self.objects), strict=True)
        return self.layout, tuple(tuple(sorted(column)) for column in columns)

    def facts(self) -> set[tuple]:
        """Every fully described pair of objects with its relations, each once ("left" and "above" only)."""
        pairs = [*combinations(self.objects, 2), *combinations(self.objects[::-1], 2)]
        return {
            (a.attributes, relation, b.attributes)
            for a, b in pairs
            for relation in ("left", "above")
            if holds(a, relation, b)
        }


def holds(a: SceneObject, relation: str, b: SceneObject) -> bool:
    """Whether a stands left of / right of / above / below b. On a diagonal two relations hold."""
    ahead = {"left": b.x - a.x, "right": a.x - b.x, "above": b.y - a.y, "below": a.y - b.y}
    return ahead[relation] > RELATION_MARGIN


def relation_of(a: SceneObject, b: SceneObject) -> str:
    """The relation of a to b along the axis on which they are further apart."""
    if abs(a.x - b.x) > abs(a.y - b.y):
        return "left" if a.x < b.x else "right"
    return "above" if a.y < b.y else "below"


def draw_splits(sizes: dict[str, int], seed: int) -> dict[str, list[Scene]]:
    """Scenes of each split, siblings next to each other, every family whole within one split.

    No fully described pair of objects stands in the same relation in two scenes, whatever their splits. So no scene
    occurs twice, and a caption that names everything fits one image of the whole data set.

    Raises UserError if the world has too few scenes."""
    rng = random.Random(f"scenes {seed}")
    families: set[tuple] = set()
    facts: set[tuple] = set()
    splits: dict[str, list[Scene]] = {split: [] for split in sizes}
    for split, total in sizes.items():
        for size in _family_sizes(total, rng):
            splits[split] += _new_family(size, len(families), families, facts, rng)
    return splits


def _family_sizes(total: int, rng: random.Random) -> Iterator[int]:
    """Sizes from FAMILY_SIZES with the given sum; a sum that they cannot make (1, 2, 3, 7) is one family."""
    while total:
        fitting = [size for size in FAMILY_SIZES if total - size in (0, 4, 5, 6) or total - size >= 8]
        size = rng.choice(fitting) if fitting else total
        yield size
        total -= size


def _new_family(size: int, number: int, families: set, facts: set, rng: random.Random) -> list[Scene]:
    """Draw families until one collides with nothing; `families` and `facts` then count it in."""
    # Chosen once, not for each attempt: else large splits, where two objects collide more often, would hold fewer.
    num_objects = rng.choice((2, 3))
    for _ in range(FAMILY_ATTEMPTS):
        siblings = _draw_family(size, number, num_objects, rng)
        stated = [fact for scene in siblings for fact in scene.facts()]
        if len(siblings) < size or len({*stated}) < len(stated):
            continue
        if siblings[0].family_key in families or not facts.isdisjoint(stated):
            continue
        families.add(siblings[0].family_key)
        facts.update(stated)
        return siblings
    raise UserError(
        f"scenes: no new family of scenes in {FAMILY_ATTEMPTS} draws after {number} families; "
        "the world is nearly full, ask for fewer images"
    )


def _draw_family(size: int, number: int, num_objects: int, rng: random.Random) -> list[Scene]:
    """`size` different scenes that share layout and attribute values; fewer if there are not so many."""
    layout = rng.choice([name for name, centres in LAYOUTS.items() if len(centres) == num_objects])
    columns = {kind: rng.sample(VALUES[kind], num_objects) for kind in ("colour", "shape")}
    columns |= {kind: rng.choices(VALUES[kind], k=num_objects) for kind in ("size", "texture")}
    # Three fully described objects make too long a caption: there, size or texture stays with its place.
    moving = KINDS if num_objects == 2 else ("colour", "shape", rng.choice(("size", "texture")))
    orders = [sorted(set(permutations(columns[kind]))) if kind in moving else [columns[kind]] for kind in KINDS]
    bindings = list(product(*orders))
    return [
        Scene(number, layout, tuple(_place_objects(binding, layout, rng)))
        for binding in rng.sample(bindings, min(size, len(bindings)))
    ]


def _place_objects(binding: tuple, layout: str, rng: random.Random) -> Iterator[SceneObject]:
    """`binding`: for each of KINDS, the values at the positions of the layout."""
    for attributes, (x, y) in zip(zip(*binding, strict=True), LAYOUTS[layout], strict=True):
        size, texture, colour, shape = attributes
        yield SceneObject(size, texture, colour, shape, _near(x, rng), _near(y, rng))


def _near(centre: float, rng: random.Random) -> float:
    return round(centre + rng.uniform(-JITTER, JITTER), 4)
