"""ablations.json: variants of one config, each trained with several seeds, and their table and plot.

entries = read_entries(Path("benchmarks/results/demo_ablations/ablations.json"))
print(table(entries))
"""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from models.errors import UserError, one_line

from .figures import COLUMNS, DIRECTIONS
from .json_fields import Fields
from .provenance import Provenance
from .report.charts import Panel, Point, scatter_charts
from .tables import aligned, mean_text


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One variant: what it stores and costs, and R@1 of every seed."""

    name: str
    vision_tokens: int
    bytes_per_image: int
    trained_parameters: int
    milliseconds_per_query: float
    """Of reranking a pool of k."""
    seeds: list[int]
    recall_at_1: dict[str, dict[str, list[float]]]
    """By direction and column, in percent: one per seed."""
    provenance: Provenance

    def to_json(self) -> dict[str, object]:
        return {
            "name": self.name,
            "vision_tokens": self.vision_tokens,
            "bytes_per_image": self.bytes_per_image,
            "trained_parameters": self.trained_parameters,
            "milliseconds_per_query": self.milliseconds_per_query,
            "seeds": self.seeds,
            "R@1": self.recall_at_1,
            "provenance": self.provenance.to_json(),
        }

    @classmethod
    def from_json(cls, fields: Fields) -> Entry:
        """Raises UserError naming the field that is missing or of another kind."""
        recalls = {}
        for direction in DIRECTIONS:
            of_direction = fields.inside("R@1").inside(direction)
            recalls[direction] = {name: of_direction.list_of_numbers(name) for name in COLUMNS if name in of_direction}
        return cls(
            name=fields.text("name"),
            vision_tokens=fields.whole("vision_tokens"),
            bytes_per_image=fields.whole("bytes_per_image"),
            trained_parameters=fields.whole("trained_parameters"),
            milliseconds_per_query=fields.number("milliseconds_per_query"),
            seeds=[int(seed) for seed in fields.list_of_numbers("seeds")],
            recall_at_1=recalls,
            provenance=Provenance.from_json(fields.inside("provenance")),
        )


def read_entries(path: Path) -> list[Entry]:
    """An ablations.json. Raises UserError naming the file and the field."""
    what = "not an ablations.json of scripts/ablate.py"
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: {what} ({one_line(error)})") from None
    if not isinstance(content, list) or not content or not all(isinstance(entry, dict) for entry in content):
        raise UserError(f"{path}: {what}: expected a list of objects, one per variant")
    return [Entry.from_json(Fields(entry, f"{path}: {what}: ", f"{i}.")) for i, entry in enumerate(content)]


def table(entries: Sequence[Entry]) -> str:
    """Markdown, a row per variant. R@1 in percent, by the match logit alone and fused: mean ± deviation over seeds."""
    first = entries[0]
    names = {"reranked": "logit", "fused": "fused"}
    columns = [c for c in names if all(c in entry.recall_at_1["t2i"] for entry in entries)]
    header = ["config", "m", "bytes per image", "ms per query", "seeds"]
    header += [f"{direction.upper()} {names[column]}" for direction in DIRECTIONS for column in columns]
    rows = [[*header, f"against {first.name}, T2I logit"]]
    for entry in entries:
        cells = [entry.name, str(entry.vision_tokens), f"{entry.bytes_per_image:,}"]
        cells += [f"{entry.milliseconds_per_query:.1f}", str(len(entry.seeds))]
        cells += [mean_text(entry.recall_at_1[direction][column]) for direction in DIRECTIONS for column in columns]
        cells.append("" if entry is first else difference(_match_logit(entry), _match_logit(first)))
        rows.append(cells)
    return aligned(rows)


def _match_logit(entry: Entry) -> list[float]:
    """T2I R@1 of the match logit alone, one per seed."""
    return entry.recall_at_1["t2i"]["reranked"]


def difference(values: Sequence[float], base: Sequence[float]) -> str:
    """Difference of two means over seeds, with twice its standard error where both have several seeds."""
    points = statistics.mean(values) - statistics.mean(base)
    if min(len(values), len(base)) < 2:
        return f"{points:+.1f}"
    error = 2 * math.sqrt(statistics.variance(values) / len(values) + statistics.variance(base) / len(base))
    return f"{points:+.1f} ± {error:.1f}" + (" (noise)" if abs(points) <= error else "")


def differences(entries: Sequence[Entry], names: Sequence[str]) -> str:
    """Markdown: R@1 of the entries `names[1:]`, or of all others, minus that of the entry `names[0]`.

    Raises UserError for a name that no entry has."""
    by_name = {entry.name: entry.recall_at_1 for entry in entries}
    if unknown := sorted(set(names) - by_name.keys()):
        raise UserError(f"--against names {', '.join(unknown)}; the record has {', '.join(by_name)}")
    base, *others = names
    scores = {"reranked": "match logit", "fused": "fused"}
    columns = [(d, c) for d in DIRECTIONS for c in scores if all(c in recalls[d] for recalls in by_name.values())]
    header = [f"against {base}", *(f"{d.upper()}, {scores[c]}" for d, c in columns)]
    rows = (
        [name, *(difference(by_name[name][d][c], by_name[base][d][c]) for d, c in columns)]
        for name in others or [name for name in by_name if name != base]
    )
    return aligned([header, *rows])


def plot(entries: Sequence[Entry]) -> str:
    """An SVG file: T2I R@1 of the match logit against bytes per image, and against milliseconds per query."""
    panels = []
    for cost, label in (("bytes_per_image", "bytes per image"), ("milliseconds_per_query", "ms per query")):
        points = []
        for entry in entries:
            recalls = _match_logit(entry)
            spread = statistics.stdev(recalls) if len(recalls) > 1 else 0.0
            points.append(Point(entry.name, getattr(entry, cost), statistics.mean(recalls), spread))
        panels.append(Panel(label, points))
    level = statistics.mean(entries[0].recall_at_1["t2i"]["embedding"])
    return scatter_charts(panels, "text to image R@1 of the match logit, %", ("embedding alone", level))
