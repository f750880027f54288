"""Line charts as inline SVG: no plotting library, no script; colours come from the page's CSS variables.

svg = line_chart([Line("EDJE", [1, 2, 5], [50.0, 60.0, 61.0], "accent")], "R@1 by pool size", "k", "%")
file = scatter_charts([("bytes an image", [Point("m = 16", 4096, 82.5, 0.5)])], "R@1, %", ("embedding alone", 71.6))
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

WIDTH, HEIGHT = 520, 300
LEFT, RIGHT, TOP, BOTTOM = 48, 16, 14, 38
MOST_POINTS = 400
"""Points a line keeps: more than there are pixels would only make the page heavy."""
SCATTER_STYLE = (
    ".grid{stroke:#8088943f}.mid{text-anchor:middle}.end{text-anchor:end}.point{fill:#3b76f0}"
    ".spread{stroke:#3b76f0;stroke-width:1.5}.level{stroke:#808894;stroke-dasharray:5 4}"
)
"""A file of its own has no page that could give it colours."""


@dataclass(frozen=True)
class Line:
    """One series."""

    name: str
    xs: Sequence[float]
    ys: Sequence[float]
    color: str
    """Name of a CSS variable of the page, without dashes: muted, accent, second, third, fourth, fifth."""
    dashed: bool = False


@dataclass(frozen=True)
class Point:
    """One measurement, with the deviation of y."""

    name: str
    x: float
    y: float
    deviation: float


@dataclass(frozen=True)
class _Scale:
    """Data to pixels along one axis."""

    low: float
    high: float
    start: float
    end: float

    def __call__(self, value: float) -> float:
        return self.start + (value - self.low) / (self.high - self.low) * (self.end - self.start)


def line_chart(lines: Sequence[Line], title: str, x_label: str, y_label: str) -> str:
    """A figure with title, legend, axes and grid. Points that are not finite are left out."""
    lines = [_cleaned(line) for line in lines]
    lines = [line for line in lines if line.xs]
    if not lines:
        return ""
    x_values, y_values = [x for line in lines for x in line.xs], [y for line in lines for y in line.ys]
    x_ticks, y_ticks = ticks(min(x_values), max(x_values)), ticks(min(y_values), max(y_values))
    x_scale = _Scale(min(x_values), max(max(x_values), min(x_values) + 1e-9), LEFT, WIDTH - RIGHT)
    y_scale = _Scale(min(y_ticks[0], *y_values), max(y_ticks[-1], *y_values, y_ticks[0] + 1e-9), HEIGHT - BOTTOM, TOP)
    parts = [*_grid(x_ticks, y_ticks, x_scale, y_scale), *(_path(line, x_scale, y_scale) for line in lines)]
    parts.append(f'<text x="{(LEFT + WIDTH - RIGHT) / 2}" y="{HEIGHT - 6}" class="axis mid">{escape(x_label)}</text>')
    return (
        f'<figure><figcaption>{escape(title)}<span class="unit">{escape(y_label)}</span></figcaption>{_legend(lines)}'
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(title)}">{"".join(parts)}</svg></figure>'
    )


def scatter_charts(panels: Sequence[tuple[str, Sequence[Point]]], y_label: str, level: tuple[str, float]) -> str:
    """An SVG file of its own, panels side by side: (label of the x axis, points), x in powers of two, y shared.

    `level` is drawn as a horizontal line. The colours suit light and dark pages."""
    ys = [y for _, points in panels for p in points for y in (p.y - p.deviation, p.y + p.deviation)] + [level[1]]
    y_ticks = ticks(min(ys), max(ys))
    y_scale = _Scale(y_ticks[0], max(y_ticks[-1], y_ticks[0] + 1e-9), HEIGHT - BOTTOM, TOP)
    drawn = [
        f'<g transform="translate({number * WIDTH} 20)">{_panel(label, points, y_ticks, y_scale, level)}</g>'
        for number, (label, points) in enumerate(panels)
    ]
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {len(panels) * WIDTH} {HEIGHT + 20}" '
        f'font-family="system-ui, sans-serif" font-size="12" fill="#808894"><style>{SCATTER_STYLE}</style>'
        f'<text x="{LEFT - 30}" y="16">{escape(y_label)}</text>{"".join(drawn)}</svg>\n'
    )


def _panel(label: str, points: Sequence[Point], y_ticks: list[float], y_scale: _Scale, level: tuple[str, float]) -> str:
    exponents = [math.log2(point.x) for point in points]
    first = math.floor(min(exponents))
    x_ticks = [float(e) for e in range(first, max(math.ceil(max(exponents)), first + 1) + 1)]
    x_scale = _Scale(x_ticks[0], x_ticks[-1], LEFT, WIDTH - RIGHT)
    parts = _grid([], y_ticks, x_scale, y_scale)
    for e in x_ticks:
        parts.append(f'<text x="{x_scale(e):.1f}" y="{HEIGHT - BOTTOM + 18}" class="axis mid">{_number(2**e)}</text>')
    parts.append(f'<text x="{(LEFT + WIDTH - RIGHT) / 2}" y="{HEIGHT - 6}" class="axis mid">{escape(label)}</text>')
    y = y_scale(level[1])
    parts.append(f'<line x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}" class="level"/>')
    parts.append(f'<text x="{LEFT + 4}" y="{y - 5:.1f}">{escape(level[0])}</text>')
    taken = [(LEFT + 4, LEFT + 4 + _width(level[0]), y - 5)]
    for point in sorted(points, key=lambda point: -point.y):
        x, y = x_scale(math.log2(point.x)), y_scale(point.y)
        low, high = y_scale(point.y - point.deviation), y_scale(point.y + point.deviation)
        parts.append(f'<line x1="{x:.1f}" x2="{x:.1f}" y1="{low:.1f}" y2="{high:.1f}" class="spread"/>')
        parts.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3.5" class="point"/>')
        parts.append(_name(point.name, x, y, taken))
    return "".join(parts)


def _name(name: str, x: float, y: float, taken: list[tuple[float, float, float]]) -> str:
    """A point's name beside it, inside the panel, lower where another name stands already: taken has left end, right
    end and baseline of each."""
    width = _width(name)
    left = x + 8 if x + 8 + width < WIDTH else x - 8 - width
    while any(left < end and begin < left + width and abs(y + 4 - line) < 13 for begin, end, line in taken):
        y += 2
    taken.append((left, left + width, y + 4))
    return f'<text x="{left:.1f}" y="{y + 4:.1f}">{escape(name)}</text>'


def _width(text: str) -> float:
    """Pixels of a text, about."""
    return 6.5 * len(text)


def ticks(low: float, high: float, most: int = 6) -> list[float]:
    """Round numbers (1, 2 or 5 times a power of ten apart) that span low .. high."""
    if high <= low:
        high = low + max(abs(low) * 0.1, 1e-3)
    raw = (high - low) / most
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= raw * 0.999)
    first, last = math.floor(low / step + 1e-6), math.ceil(high / step - 1e-6)
    return [round(number * step, 10) for number in range(first, last + 1)]


def _cleaned(line: Line) -> Line:
    points = [(x, y) for x, y in zip(line.xs, line.ys, strict=True) if math.isfinite(x) and math.isfinite(y)]
    stride = max(1, math.ceil(len(points) / MOST_POINTS))
    kept = points[::stride] if stride == 1 or points[-1] == points[::stride][-1] else [*points[::stride], points[-1]]
    return Line(line.name, [x for x, _ in kept], [y for _, y in kept], line.color, line.dashed)


def _grid(x_ticks: list[float], y_ticks: list[float], x_scale: _Scale, y_scale: _Scale) -> list[str]:
    parts = []
    for value in y_ticks:
        y = y_scale(value)
        parts.append(f'<line x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}" class="grid"/>')
        parts.append(f'<text x="{LEFT - 8}" y="{y + 4:.1f}" class="axis end">{_number(value)}</text>')
    for value in _with_start(x_ticks, x_scale.low):
        if x_scale.low <= value <= x_scale.high:
            x = x_scale(value)
            parts.append(f'<text x="{x:.1f}" y="{HEIGHT - BOTTOM + 18}" class="axis mid">{_number(value)}</text>')
    return parts


def _with_start(values: list[float], low: float) -> list[float]:
    """The ticks, and where the axis starts, if the next tick leaves room for it: 1 before 5, 10, 15."""
    later = [value for value in values if value > low]
    return [low, *later] if later and later[0] - low > 0.45 * (values[1] - values[0]) else later


def _path(line: Line, x_scale: _Scale, y_scale: _Scale) -> str:
    points = [(x_scale(x), y_scale(y)) for x, y in zip(line.xs, line.ys, strict=True)]
    marks = ""
    if len(points) <= 20:
        marks = "".join(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="2.6"/>' for x, y in points)
        marks = f'<g style="fill:var(--{line.color})">{marks}</g>'
    path = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
    return f'<polyline points="{path}" class="line" {_stroke(line)}/>{marks}'


def _legend(lines: list[Line]) -> str:
    items = "".join(
        f'<li><svg width="22" height="8"><line x1="0" x2="22" y1="4" y2="4" class="line" {_stroke(line)}/></svg>'
        f"{escape(line.name)}</li>"
        for line in lines
    )
    return f'<ul class="legend">{items}</ul>'


def _stroke(line: Line) -> str:
    return f'style="stroke:var(--{line.color})"' + (' stroke-dasharray="5 4"' if line.dashed else "")


def _number(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:g}"
