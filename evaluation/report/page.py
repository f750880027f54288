"""report.html: one self-contained page (no network, no script) with tables, curves and a before/after gallery.

The page is in templates/; what it shows of an evaluation is in curves.py and gallery.py.
"""

from __future__ import annotations

import io
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from data.caption_datasets import CaptionDataset
from models.errors import UserError
from models.files import write_atomically

from ..figures import DirectionFigures, EvaluationRecord
from ..metrics import METRICS
from ..results import Results
from ..tables import (
    COLUMN_TITLES,
    DIRECTION_TITLES,
    calibration_note,
    calibration_rows,
    columns_of,
    cost_text,
    extended_rows,
    gain_text,
    protocol,
)
from .curves import read_log, recall_charts, reliability_charts, training_charts
from .examples import draw_teaser, pick_examples, thumbnail_uri
from .gallery import make_gallery


def write_report(
    out: str | Path,
    record: EvaluationRecord,
    results: Results,
    dataset: CaptionDataset,
    metrics_file: str | Path | None = None,
) -> Path:
    """Write OUT/report.html and return its path.

    metrics_file: the run's metrics.jsonl; left out where it does not exist."""
    log = read_log(Path(metrics_file)) if metrics_file and Path(metrics_file).is_file() else []
    best = best_column(record)
    page = (
        _environment(dataset)
        .get_template("report.html.j2")
        .render(
            record=record,
            name=Path(record.dataset).stem.removeprefix("dataset_"),
            protocol=protocol([record]),
            cost=cost_text(record),
            best=best,
            shown=columns_of(record.figures),
            parts={"Whole split": record.figures} | record.subsets,
            extended=extended_rows([record]),
            recall_charts=recall_charts(results),
            calibration=calibration_rows(record),
            calibration_note=calibration_note,
            reliability_charts=reliability_charts(results),
            training_charts=training_charts(log),
            gallery=make_gallery(results, dataset, best),
            dataset=dataset,
        )
    )
    path = Path(out) / "report.html"
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, page)
    return path


def best_column(record: EvaluationRecord) -> str:
    """`reranked` or `fused`: the one with the higher T2I R@1; the headline and the gallery are about it."""
    columns = record.figures.t2i.columns
    return max((name for name in columns if name != "embedding"), key=lambda name: columns[name].metrics["R@1"])


def _environment(dataset: CaptionDataset) -> Environment:
    """Templates that escape every value, with the names and filters of the page."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).with_name("templates")),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.globals.update(
        columns=COLUMN_TITLES,
        directions=DIRECTION_TITLES,
        metrics=METRICS,
        thumbnail=lambda image: thumbnail_uri(dataset, image),
    )
    environment.filters.update(figure=figure, gain=lambda part, column: gain_text([part], column), highest=highest)
    return environment


def figure(value: float | None, form: str = ".1f") -> str:
    """A figure as text; a dash where a file of an older version lacks it."""
    return "–" if value is None else f"{value:{form}}"


def highest(part: DirectionFigures, metric: str) -> float | None:
    """The highest value that a column has of a metric; None where none has it."""
    values = [column.metrics[metric] for column in part.columns.values() if metric in column.metrics]
    return max(values, default=None)


def write_teaser(path: str | Path, record: EvaluationRecord, results: Results, dataset: CaptionDataset) -> None:
    """The text-to-image query that reranking helped most, as a PNG for a README."""
    examples = pick_examples(results.t2i, best_column(record), helped=True, count=1)
    if not examples:
        raise UserError("no text-to-image query was helped, so there is nothing to show; evaluate another checkpoint")
    buffer = io.BytesIO()
    draw_teaser(dataset, examples[0]).save(buffer, "png", optimize=True)
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, buffer.getvalue())
