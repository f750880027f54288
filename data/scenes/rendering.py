"""Pictures of scenes with Pillow: drawn at four times the size, then averaged down, so that edges are smooth."""

from __future__ import annotations

import math
import random
from functools import cache
from itertools import product

from PIL import Image, ImageChops, ImageDraw, ImageFilter, ImageOps

from data.scenes.world import Scene, SceneObject

OVERSAMPLING = 4
RIM = 3
RGB = {
    "red": (214, 32, 38),
    "orange": (255, 136, 0),
    "yellow": (250, 222, 40),
    "green": (26, 148, 56),
    "cyan": (60, 205, 225),
    "blue": (28, 62, 205),
    "pink": (250, 125, 190),
    "black": (30, 30, 34),
}
DIAMETER = {"large": 0.4, "small": 0.24}
"""Shares of the image: 26 and 15 of 64 pixels. Two large ones side by side at the largest scale still do not touch."""
SCALES = (0.94, 1.0, 1.06)
MARK_PERIOD = 0.08
"""Distance of stripes and of dots, the same on large and small objects: 5.1 of 64 pixels."""


def render_scene(scene: Scene, image_size: int, seed: str) -> Image.Image:
    """An RGB image of image_size x image_size pixels; equal arguments give equal pixels.

    The seed draws what no caption tells: the tone of the background, small changes of colour and scale."""
    rng = random.Random(f"appearance {seed}")
    side = image_size * OVERSAMPLING
    tone = rng.randint(205, 245)
    canvas = Image.new("RGB", (side, side), tuple(tone + rng.randint(-8, 8) for _ in range(3)))
    for thing in scene.objects:
        _draw_object(canvas, thing, rng)
    return canvas.reduce(OVERSAMPLING)


def _draw_object(canvas: Image.Image, thing: SceneObject, rng: random.Random) -> None:
    side = canvas.width
    diameter = round(side * DIAMETER[thing.size] * rng.choice(SCALES))
    colour = tuple(min(255, max(0, channel + rng.randint(-10, 10))) for channel in RGB[thing.colour])
    outline = _silhouette(thing.shape, diameter)
    corner = (round(thing.x * side - diameter / 2), round(thing.y * side - diameter / 2))
    canvas.paste(colour, corner, outline)
    if thing.texture != "plain":
        marks = ImageChops.multiply(
            _inside(thing.shape, diameter), _marks(thing.texture, diameter, round(side * MARK_PERIOD))
        )
        canvas.paste(_mark_colour(colour), corner, marks)


def _mark_colour(colour: tuple[int, ...]) -> tuple[int, int, int]:
    """White on dark colours, dark on light ones: marks must be seen on yellow and on black."""
    luminance = 0.299 * colour[0] + 0.587 * colour[1] + 0.114 * colour[2]
    return (255, 255, 255) if luminance < 140 else (60, 50, 60)


@cache
def _marks(texture: str, diameter: int, period: int) -> Image.Image:
    """Where the texture is, as a mask [diameter, diameter]; stripes are level, dots stand on a square grid."""
    mask = Image.new("L", (diameter, diameter), 0)
    draw = ImageDraw.Draw(mask)
    middle, reach = diameter / 2, math.ceil(diameter / 2 / period)
    if texture == "striped":
        for y in [middle + step * period for step in range(-reach, reach + 1)]:
            draw.rectangle((0, y - 0.22 * period, diameter, y + 0.22 * period), fill=255)
        return mask
    # Half a period off the centre: a small diamond shows four dots there; one alone would look like a stripe.
    radius = 0.28 * period
    for x, y in product([middle + (step + 0.5) * period for step in range(-reach, reach)], repeat=2):
        draw.ellipse((x - radius, y - radius, x + radius, y + radius), fill=255)
    return mask


@cache
def _silhouette(shape: str, diameter: int) -> Image.Image:
    """The shape as a mask [diameter, diameter] that it fills."""
    mask = Image.new("L", (diameter, diameter), 0)
    draw = ImageDraw.Draw(mask)
    if shape in ("circle", "moon"):
        draw.ellipse((0, 0, diameter - 1, diameter - 1), fill=255)
        if shape == "moon":
            draw.ellipse((0.4 * diameter, -0.02 * diameter, 1.24 * diameter, 0.82 * diameter), fill=0)
        return mask
    draw.polygon([(x * (diameter - 1), y * (diameter - 1)) for x, y in _corners(shape)], fill=255)
    return mask


@cache
def _inside(shape: str, diameter: int) -> Image.Image:
    """The silhouette less a rim of three quarters of a final pixel: marks must not eat the outline."""
    # Pillow's filters take pixels beyond the edge for copies of the edge, so the shape gets a margin first.
    framed = ImageOps.expand(_silhouette(shape, diameter), border=RIM)
    return ImageOps.crop(framed.filter(ImageFilter.MinFilter(2 * RIM + 1)), border=RIM)


def _corners(shape: str) -> list[tuple[float, float]]:
    """Corners of a polygon in the unit square, y downwards."""
    if shape == "square":
        return [(0.07, 0.07), (0.93, 0.07), (0.93, 0.93), (0.07, 0.93)]
    if shape == "triangle":
        return [(0.5, 0.02), (1.0, 0.95), (0.0, 0.95)]
    if shape == "diamond":
        return [(0.5, 0.0), (0.94, 0.5), (0.5, 1.0), (0.06, 0.5)]
    if shape == "cross":
        near, far = 0.33, 0.67
        top = [(near, 0), (far, 0), (far, near), (1, near), (1, far), (far, far)]
        return [*top, (far, 1), (near, 1), (near, far), (0, far), (0, near), (near, near)]
    if shape == "star":
        turns = [math.pi * step / 5 for step in range(10)]
        radii = [0.53 if step % 2 == 0 else 0.23 for step in range(10)]
        return [(0.5 + r * math.sin(t), 0.53 - r * math.cos(t)) for r, t in zip(radii, turns, strict=True)]
    return [_heart_point(2 * math.pi * step / 60) for step in range(60)]


def _heart_point(turn: float) -> tuple[float, float]:
    x = 16 * math.sin(turn) ** 3
    y = 13 * math.cos(turn) - 5 * math.cos(2 * turn) - 2 * math.cos(3 * turn) - math.cos(4 * turn)
    return 0.5 + x / 33, 0.46 - y / 31
