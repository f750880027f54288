"""Evaluation records as Markdown: one, or several seeds of one experiment as mean ± deviation.

print(protocol([record]))
print(markdown_table([record]))
"""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence

from .calibration import BINS
from .figures import COLUMNS, DIRECTIONS, ColumnFigures, DirectionFigures, EvaluationRecord, PartFigures
from .metrics import EXTENDED_METRICS, METRICS

COLUMN_TITLES = {
    "embedding": "embedding alone",
    "reranked": "EDJE, match logit alone",
    "fused": "EDJE, logit + λ × cosine",
}
DIRECTION_TITLES = {"t2i": "text to image", "i2t": "image to text"}


def protocol(records: Sequence[EvaluationRecord]) -> str:
    """What a table's figures are of, in one sentence: data set, split, counts, k, folds, the scores, seeds."""
    first = records[0]
    parts = [
        f"{first.dataset}, {first.split} split: {first.images:,} images, {first.captions:,} captions",
        f"the embedding's first k = {first.k} candidates of each query reranked",
    ]
    if first.folds > 1:
        of_fold = f"{first.folds} folds of {first.images // first.folds:,} images"
        parts.append(f"{of_fold}, each its own gallery, figures averaged")
    weights = dict.fromkeys(f"{r.model.residual_similarity if r.model else 0:.3g}" for r in records)
    score = "EDJE by the match logit alone"
    if set(weights) != {"0"}:
        score += f", which contains the first stage's cosine, learned weight {', '.join(weights)}"
    if "fused" in columns_of(*(record.figures for record in records)):
        chosen = dict.fromkeys(f"{record.figures.t2i.columns['fused'].fusion_lambda:g}" for record in records)
        splits = dict.fromkeys(record.lambda_split for record in records)
        origin = " and ".join(f"split {split}" if split else "validation" for split in splits)
        score += f", or fused: match logit + λ × cosine, λ = {', '.join(chosen)} from {origin}"
    parts.append(score)
    return "; ".join(parts) + (f"; {len(records)} seeds" if len(records) > 1 else "") + "."


def markdown_table(records: Sequence[EvaluationRecord], with_subsets: bool = True) -> str:
    """A row for each direction and column, and below them the subsets: METRICS, rSum, gain in R@1.

    records: one, or several seeds of one experiment: then mean ± sample deviation. A figure that an older file lacks is
    a dash. A second table follows where all have figures by COCO's extended ground truth."""
    rows = [["", "", *(metric.title for metric in METRICS), "rSum", "gain in R@1 [95%]"]]
    rows += _direction_rows([record.figures for record in records], "")
    for name in records[0].subsets if with_subsets else ():
        rows += _direction_rows([record.subsets[name] for record in records], f"*{name}*, ")
    return "\n\n".join(aligned(part) for part in (rows, extended_rows(records)) if part)


def _direction_rows(parts: Sequence[PartFigures], prefix: str) -> list[list[str]]:
    """The rows of one split or subset, for the columns that all of `parts` have."""
    rows = []
    for direction in DIRECTIONS:
        of_direction = [part.directions()[direction] for part in parts]
        for column in columns_of(*parts):
            figures = [part.columns[column] for part in of_direction]
            cells = [mean_text([figure.metrics.get(metric.name) for figure in figures]) for metric in METRICS]
            cells.append(mean_text([part.rsum.get(column) for part in parts]))
            cells.append("" if column == "embedding" else gain_text(of_direction, column))
            rows.append([prefix + DIRECTION_TITLES[direction], COLUMN_TITLES[column], *cells])
    return rows


def extended_rows(records: Sequence[EvaluationRecord]) -> list[list[str]]:
    """Header and rows of COCO's extended ground truth (eccv.py), records as above; nothing where one has none."""
    rows = [["ECCV Caption", "", *EXTENDED_METRICS]]
    for direction, title in DIRECTION_TITLES.items():
        for column in columns_of(*(record.figures for record in records)):
            columns = [record.figures.directions()[direction].columns[column] for record in records]
            figures = [column.extended for column in columns if column.extended]
            if len(figures) < len(records):
                return []
            cells = [mean_text(figure[name] for figure in figures) for name in EXTENDED_METRICS]
            rows.append([title, COLUMN_TITLES[column], *cells])
    return rows


def calibration_rows(record: EvaluationRecord) -> list[list[str]]:
    """Header and a row for each direction: how far probabilities are off, before and after the fit; nothing where the
    checkpoint was not calibrated."""
    errors = {direction: part.calibration for direction, part in record.figures.directions().items()}
    rows = [
        [
            DIRECTION_TITLES[direction],
            *(f"{value:.3f}" for value in (found.ece_before, found.ece_after, found.brier_before, found.brier_after)),
        ]
        for direction, found in errors.items()
        if found is not None
    ]
    return [["calibration", "ECE before", "ECE after", "Brier before", "Brier after"], *rows] if rows else []


def calibration_note(record: EvaluationRecord) -> str:
    """What the figures of calibration_rows() are of."""
    found = record.figures.t2i.calibration
    assert found is not None, "there are rows to explain"
    column = COLUMN_TITLES["fused" if "fused" in record.figures.columns else "reranked"]
    origin = f"split {found.split}" if found.split else "a split that is not recorded"
    return (
        f"Before: the sigmoid of the score ({column}). After: the checkpoint's probability, fitted on the "
        f"text-to-image pools of {origin}. Over all candidates of the pools, from 0 to 1; ECE: expected calibration "
        f"error, {BINS} bins of equal width."
    )


def columns_of(*parts: PartFigures) -> list[str]:
    """The columns that every one of these has, in the order of a table."""
    return [column for column in COLUMNS if all(column in part.columns for part in parts)]


def mean_text(values: Iterable[float | None]) -> str:
    """Mean, and of several values the sample standard deviation too; a dash where one is missing."""
    known = []
    for value in values:
        if value is None:
            return "–"
        known.append(value)
    mean = f"{statistics.mean(known):.1f}"
    return mean if len(known) == 1 else f"{mean} ± {statistics.stdev(known):.1f}"


def gain_of(part: DirectionFigures, column: str) -> float:
    """Percentage points by which R@1 of `column` exceeds the embedding's."""
    return part.columns[column].metrics["R@1"] - part.columns["embedding"].metrics["R@1"]


def gain_text(parts: Sequence[DirectionFigures], column: str) -> str:
    """`+20.1 [+18.6, +21.7]`: the gain in R@1 and its 95% interval over queries, percentage points, each averaged over
    `parts`: one direction of one record, or of several seeds."""
    intervals = [_interval(part.columns[column]) for part in parts]
    low, high = (statistics.mean(interval[end] for interval in intervals) for end in (0, 1))
    return f"{statistics.mean(gain_of(part, column) for part in parts):+.1f} [{low:+.1f}, {high:+.1f}]"


def _interval(figures: ColumnFigures) -> tuple[float, float]:
    assert figures.gain is not None, "the embedding has no gain over itself"
    return figures.gain.interval


def aligned(rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table whose source reads as a table too."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = [
        "| " + " | ".join(f"{cell:{width}}" for cell, width in zip(row, widths, strict=True)) + " |" for row in rows
    ]
    return "\n".join([lines[0], "|" + "|".join("-" * (width + 2) for width in widths) + "|", *lines[1:]])


def cost_text(record: EvaluationRecord) -> str:
    """`backbone 1.0 s, compress 0.5 s, rerank 2.0 s; 1,234 pairs/s in float32`."""
    seconds = ", ".join(f"{name} {value:.1f} s" for name, value in record.seconds.items())
    rate = "" if record.pairs_per_second is None else f"; {record.pairs_per_second:,.0f} pairs/s in {record.precision}"
    return seconds + rate


def markdown_report(record: EvaluationRecord) -> str:
    """results.md: what was evaluated, the table, what it cost, and how far probabilities are off."""
    lines = [
        f"# Retrieval on {record.dataset}, split {record.split}",
        "",
        f"{protocol([record])} Checkpoint: {record.checkpoint}.",
        "",
        markdown_table([record]),
        "",
    ]
    for direction, part in record.figures.directions().items():
        gain = part.columns["reranked"].gain
        assert gain is not None and part.pool_ceiling is not None, "only files of older versions lack these"
        lines.append(
            f"- {DIRECTION_TITLES[direction]}: {part.pool_ceiling:.1f}% of the queries have a right answer in their "
            f"pool; EDJE put {gain.helped} right answers first and lost {gain.hurt}."
        )
    lines.append(f"- time: {cost_text(record)}.")
    if calibration := calibration_rows(record):
        lines += ["", aligned(calibration), "", calibration_note(record)]
    return "\n".join(lines) + "\n"
