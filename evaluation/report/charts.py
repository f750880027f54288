"""Charts by matplotlib: curves as SVG inside a page, scatter plots as SVG files.

chart = LineChart("R@1 by pool size", "k", "%", [Line("EDJE", [1, 2, 5], [50.0, 60.0, 61.0], "accent")])
chart.svg()                                                     # takes its colours from the page's CSS variables
scatter_charts([Panel("bytes per image", [Point("m16", 4096, 82.5, 0.5)])], "R@1, %", ("embedding alone", 71.6))

The same data gives the same bytes: ids come from a fixed salt, nothing is dated, text stays text.
"""

from __future__ import annotations

import io
import math
import re
import xml.etree.ElementTree as ET
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from markupsafe import Markup
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator, NullLocator
from matplotlib.transforms import Bbox

if TYPE_CHECKING:
    from matplotlib.typing import RcKeyType

WIDTH, HEIGHT = 520, 300
"""Of a chart, in points; pages scale it."""
MOST_POINTS = 400
"""Points a line keeps: more than there are pixels would only make the page heavy."""
MARKED_POINTS = 20
"""Points of a line up to which each is marked."""
PAGE_COLORS = {
    name: f"#0000{number:02x}"
    for number, name in enumerate(("muted", "accent", "second", "third", "fourth", "fifth", "rule"), 1)
}
"""Colours that stand for CSS variables of the page while matplotlib draws."""
LINE_MARK, POINT_MARK = 5, 7
"""Diameters of marks: of the points of a line, of points that stand alone."""
SVG = "http://www.w3.org/2000/svg"
GREY, BLUE = "#808894", "#3b76f0"
"""A file of its own has no page that could give it colours: these suit light and dark ones."""
STYLE: dict[RcKeyType, object] = {
    "svg.fonttype": "none",
    "svg.hashsalt": "edje",
    "font.family": "DejaVu Sans",  # matplotlib brings it: widths are the same everywhere
    "font.size": 12,
    "axes.autolimit_mode": "round_numbers",
    "axes.xmargin": 0,
    "axes.ymargin": 0,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.spines.left": False,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.spines.bottom": False,
    "xtick.major.size": 0,
    "xtick.minor.size": 0,
    "ytick.major.size": 0,
    "xtick.major.pad": 8,
    "ytick.major.pad": 8,
    "lines.solid_joinstyle": "round",
    "grid.linewidth": 1,
}


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
class Panel:
    """Points over one x axis."""

    x_label: str
    points: Sequence[Point]


@dataclass(frozen=True)
class LineChart:
    """Curves over one axis; title, unit and legend are the page's to write."""

    title: str
    x_label: str
    unit: str
    """Of the y axis."""
    series: Sequence[Line]

    @property
    def lines(self) -> list[Line]:
        """What is drawn: without points that are not finite, and without lines that have no others."""
        return [line for line in map(_cleaned, self.series) if line.xs]

    def svg(self) -> Markup:
        """The drawing, to stand inside a page."""
        with rc_context({**STYLE, **_colors(PAGE_COLORS["muted"], PAGE_COLORS["rule"])}):
            figure = Figure(figsize=(WIDTH / 72, HEIGHT / 72))
            axes = figure.add_axes((48 / WIDTH, 38 / HEIGHT, (WIDTH - 64) / WIDTH, (HEIGHT - 52) / HEIGHT))
            for line in self.lines:
                _draw(line, axes)
            axes.set_xlabel(self.x_label, labelpad=2)
            _set_ticks(axes)
            root = _drawn(figure, LINE_MARK)
        root.attrib = {"viewBox": root.attrib["viewBox"], "role": "img", "aria-label": self.title}
        drawing = ET.tostring(root, encoding="unicode")
        for name, color in PAGE_COLORS.items():
            drawing = drawing.replace(color, f"var(--{name})")
        return Markup(drawing)


def _cleaned(line: Line) -> Line:
    points = [(x, y) for x, y in zip(line.xs, line.ys, strict=True) if math.isfinite(x) and math.isfinite(y)]
    stride = max(1, math.ceil(len(points) / MOST_POINTS))
    kept = points[::stride] if stride == 1 or points[-1] == points[::stride][-1] else [*points[::stride], points[-1]]
    return Line(line.name, [x for x, _ in kept], [y for _, y in kept], line.color, line.dashed)


def _colors(text: str, grid: str) -> dict[RcKeyType, object]:
    keys: tuple[RcKeyType, ...] = ("text.color", "axes.labelcolor", "xtick.color", "ytick.color", "axes.edgecolor")
    return {**dict.fromkeys(keys, text), "grid.color": grid}


def _draw(line: Line, axes: Axes) -> None:
    axes.plot(
        line.xs,
        line.ys,
        color=PAGE_COLORS[line.color],
        linestyle=(0, (2.5, 2)) if line.dashed else "-",
        linewidth=2,
        marker="o" if len(line.xs) <= MARKED_POINTS else "",
        markersize=LINE_MARK,
        markeredgewidth=0,
    )


def _set_ticks(axes: Axes) -> None:
    """Round numbers that span the values; x starts and ends with the data, and says where if there is room for it."""
    axes.yaxis.set_major_locator(MaxNLocator(6, steps=[1, 2, 5, 10]))
    axes.autoscale_view(scalex=False)
    low, high = axes.dataLim.intervalx
    axes.set_xlim(low, max(high, low + 1e-9))
    later = [tick for tick in MaxNLocator(6, steps=[1, 2, 5, 10]).tick_values(low, high) if low < tick <= high]
    room = len(later) > 1 and later[0] - low > 0.45 * (later[1] - later[0])
    axes.set_xticks([low, *later] if room or len(later) < 2 else later)
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(FuncFormatter(lambda value, _: _number(value)))


def _number(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:g}"


def scatter_charts(panels: Sequence[Panel], y_label: str, level: tuple[str, float]) -> str:
    """An SVG file of its own, panels side by side: x in powers of two, y shared, `level` a dashed horizontal line.

    The colours suit light and dark pages."""
    with rc_context({**STYLE, **_colors(GREY, GREY), "grid.alpha": 0.25}):
        figure = Figure(figsize=(len(panels) * WIDTH / 72, (HEIGHT + 20) / 72), dpi=72)
        shared: Axes | None = None
        for number, panel in enumerate(panels):
            left, width = (number * WIDTH + 48) / (len(panels) * WIDTH), (WIDTH - 64) / (len(panels) * WIDTH)
            axes = figure.add_axes((left, 38 / (HEIGHT + 20), width, (HEIGHT - 52) / (HEIGHT + 20)), sharey=shared)
            shared = shared or axes
            _draw_panel(panel, axes, level)
        figure.text(18 / (len(panels) * WIDTH), 1 - 16 / (HEIGHT + 20), y_label)
        for axes, panel in zip(figure.axes, panels, strict=True):  # once the shared scale is known
            _name_points(panel, axes, level)
        root = _drawn(figure, POINT_MARK)
        root.attrib = {"xmlns": SVG, "viewBox": root.attrib["viewBox"], "font-family": "system-ui, sans-serif"}
        return ET.tostring(root, encoding="unicode") + "\n"


def _draw_panel(panel: Panel, axes: Axes, level: tuple[str, float]) -> None:
    axes.set_xscale("log", base=2)
    axes.axhline(level[1], color=GREY, linestyle=(0, (5, 4)), linewidth=1)
    for point in panel.points:
        spread = (point.y - point.deviation, point.y + point.deviation)
        axes.plot((point.x, point.x), spread, color=BLUE, linewidth=1.5)
        axes.plot(point.x, point.y, color=BLUE, marker="o", markersize=POINT_MARK, markeredgewidth=0)
    exponents = [math.log2(point.x) for point in panel.points]
    first = math.floor(min(exponents))
    last = max(math.ceil(max(exponents)), first + 1)
    axes.set_xlim(2.0**first, 2.0**last)
    axes.set_xticks([2.0**exponent for exponent in range(first, last + 1)])
    axes.yaxis.set_major_locator(MaxNLocator(6, steps=[1, 2, 5, 10]))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.autoscale_view(scalex=False)
    axes.set_xlabel(panel.x_label, labelpad=2)
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(FuncFormatter(lambda value, _: _number(value)))


def _name_points(panel: Panel, axes: Axes, level: tuple[str, float]) -> None:
    """Each point's name beside it, inside the panel, and lower where another name stands already."""
    assert isinstance(axes.figure, Figure)  # not a part of a figure
    renderer = FigureCanvasAgg(axes.figure).get_renderer()
    taken = [axes.text(axes.get_xlim()[0], level[1], f" {level[0]}", va="bottom").get_window_extent(renderer)]
    end = axes.get_window_extent(renderer).x1 + 16
    for point in sorted(panel.points, key=lambda point: -point.y):
        name = axes.annotate(
            point.name, (point.x, point.y), xytext=(8, 0), textcoords="offset points", va="center", ha="left"
        )
        if name.get_window_extent(renderer).x1 > end:
            name.set(ha="right", position=(-8, 0))
        while any(_overlap(name.get_window_extent(renderer), other) for other in taken):
            name.set_position((name.get_position()[0], name.get_position()[1] - 2))
        taken.append(name.get_window_extent(renderer))


def _overlap(one: Bbox, other: Bbox) -> bool:
    return one.x0 < other.x1 and other.x0 < one.x1 and one.y0 < other.y1 and other.y0 < one.y1


def _drawn(figure: Figure, mark: float) -> ET.Element:
    """The figure as SVG, reduced to what is seen. mark: diameter of its marks."""
    stream = io.StringIO()
    figure.savefig(stream, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    root = _plain(ET.fromstring(stream.getvalue()), mark)
    assert root is not None, "an svg element is kept"
    return root


def _plain(element: ET.Element, mark: float) -> ET.Element | None:
    """An element without ids, which charts of one page would share, without namespaces, clipping and fonts, and with
    circles for references to a marker; None where nothing of it is seen."""
    tag = element.tag.rpartition("}")[2]
    if tag == "use":
        place = {"cx": element.attrib["x"], "cy": element.attrib["y"], "r": f"{mark / 2:g}"}
        return ET.Element("circle", place | {"style": element.attrib["style"]})
    kept = {name: value for name, value in element.items() if name in ("d", "x", "y", "viewBox")}
    if style := _without_font(element.get("style", "")):
        kept["style"] = style
    plain = ET.Element(tag, kept)
    plain.extend(part for child in element if (part := _plain(child, mark)) is not None)
    if tag == "text":
        plain.text = element.text
    seen = tag in ("svg", "path", "text") or len(plain)
    return plain if seen and tag not in ("metadata", "defs") and style != "fill: none" else None


def _without_font(style: str) -> str:
    """A style without matplotlib's own font, so that a page's is taken; the size stays."""
    style = re.sub(r"font: (\S+) [^;]*", r"font-size: \1", style)  # one property in matplotlib below 3.10
    return re.sub(r"font-family: [^;]*;? ?", "", style)
