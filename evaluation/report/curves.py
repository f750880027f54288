"""The curves of report.html: recall against pool size and depth, reliability, and what a training run logged."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from ..calibration import NONE_FITTED, Reliability
from ..results import DirectionResults, Results
from ..tables import COLUMN_TITLES, DIRECTION_TITLES
from .charts import Line, LineChart

COLORS = {"embedding": "muted", "reranked": "accent", "fused": "second"}
LOSSES = {
    "itm": "matching",
    "altered_captions": "altered captions",
    "mlm": "masked words",
    "text_recovery": "text recovery",
    "itc": "contrast",
    "distillation": "distillation",
}
"""Names in metrics.jsonl, and on the page."""
SERIES_COLORS = ("accent", "second", "third", "fourth", "fifth", "muted")
LogRow = dict[str, float]
"""A line of metrics.jsonl."""


def recall_charts(results: Results) -> list[LineChart]:
    """For each direction R@1 by pool size, and recall by depth."""
    charts = []
    for title, part in zip(DIRECTION_TITLES.values(), (results.t2i, results.i2t), strict=True):
        title = title.capitalize()
        charts.append(LineChart(f"{title}: R@1 by pool size", "k, candidates reranked", "%", _pool_lines(part)))
        charts.append(LineChart(f"{title}: recall by depth", "K, first K of the ranking", "%", _depth_lines(part)))
    return charts


def _pool_lines(part: DirectionResults) -> list[Line]:
    sizes = list(range(1, part.k + 1))
    embedding = part.hits("embedding")
    lines = [Line("pool ceiling", sizes, [part.recall(embedding, size) for size in sizes], "third", dashed=True)]
    for column in part.columns:
        recalls = [part.recall(part.hits(column, pool=size), 1) for size in sizes]
        lines.append(Line(COLUMN_TITLES[column], sizes, recalls, COLORS[column]))
    return lines


def _depth_lines(part: DirectionResults) -> list[Line]:
    lines = []
    for column in part.columns:
        hits = part.hits(column)
        depths = list(range(1, hits.shape[1] + 1))
        lines.append(Line(COLUMN_TITLES[column], depths, [part.recall(hits, k) for k in depths], COLORS[column]))
    return lines


def reliability_charts(results: Results) -> list[LineChart]:
    """For each direction the share of right candidates by probability, before and after the fit; none where the
    checkpoint was not calibrated."""
    return [
        LineChart(f"{title.capitalize()}: reliability", "probability", "share right", _reliability_lines(part))
        for title, part in zip(DIRECTION_TITLES.values(), (results.t2i, results.i2t), strict=True)
        if part.calibration is not None
    ]


def _reliability_lines(part: DirectionResults) -> list[Line]:
    assert part.calibration is not None, "only calibrated results have these lines"
    scores, right = part.scored_pool()
    lines = [Line("as likely as it says", [0, 1], [0, 1], "muted", dashed=True)]
    for name, calibration, color in (("before", NONE_FITTED, "second"), ("after", part.calibration, "accent")):
        bins = Reliability.of(calibration.probabilities(scores), right)
        title = f"{name}, ECE {bins.calibration_error:.3f}"
        lines.append(Line(title, bins.predicted.tolist(), bins.observed.tolist(), color))
    return lines


def read_log(path: Path) -> list[LogRow]:
    """Lines of metrics.jsonl; the last one may have been cut short by a kill."""
    rows = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            rows.append(json.loads(line))
        except ValueError:
            continue
    return rows


def training_charts(rows: Sequence[LogRow]) -> list[LineChart]:
    """Losses, accuracy and validation recalls; charts that would be empty are left out."""
    names = [name for name in LOSSES if any(name in row for row in rows)]
    losses = [_series(rows, name, LOSSES[name], SERIES_COLORS[i]) for i, name in enumerate(names)]
    accuracy = [_series(rows, "itm_accuracy", "right candidate first", "accent", factor=100.0)]
    charts = [LineChart("Losses", "step", "", losses), LineChart("Training groups solved", "step", "%", accuracy)]
    for direction, title in DIRECTION_TITLES.items():
        lines = [_series(rows, f"val/{direction}/{c}/R@1", COLUMN_TITLES[c], COLORS[c]) for c in COLUMN_TITLES]
        charts.append(LineChart(f"Validation, {title}: R@1", "step", "%", lines))
    return [chart for chart in charts if chart.lines]


def _series(rows: Sequence[LogRow], key: str, name: str, color: str, factor: float = 1.0) -> Line:
    found = [row for row in rows if key in row]
    return Line(name, [row["step"] for row in found], [factor * row[key] for row in found], color)
