"""report.html: one self-contained page (no network, no script) with tables, curves and a before/after gallery.

evaluate_retrieval.py writes it. Drawn again without a model, or as the picture of a README, from its rankings.npz:
    python evaluation/report.py --results runs/demo
    python evaluation/report.py --results runs/demo --teaser docs/teaser.png
"""

from __future__ import annotations

import argparse
import io
import json
import sys
from html import escape
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from data.caption_datasets import CaptionDataset
from evaluation.metrics import RECALL_DEPTHS
from evaluation.output import (
    COLUMN_TITLES,
    DIRECTION_TITLES,
    columns_of,
    extended_rows,
    gain_text,
    protocol,
    read_rankings,
)
from evaluation.report.before_after import before_after_gallery
from evaluation.report.charts import Line, line_chart
from evaluation.report.examples import draw_teaser, pick_examples
from evaluation.results import DirectionResults, Results
from models.errors import UserError, run_entry_point
from models.files import write_atomically

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


def write_report(
    out: str | Path,
    summary: dict[str, Any],
    results: Results,
    dataset: CaptionDataset,
    metrics_file: str | Path | None = None,
) -> Path:
    """Write OUT/report.html and return its path.

    summary: the content of results.json. metrics_file: the run's metrics.jsonl; left out where it does not exist."""
    metrics = _read_metrics(Path(metrics_file)) if metrics_file and Path(metrics_file).is_file() else []
    column = best_column(summary)
    sections = [
        _header(summary),
        _headline(summary, column),
        _table(summary, column),
        _extended_table(summary),
        _recall_charts(results),
        _training_charts(metrics),
        before_after_gallery(results, dataset, column),
        _reading_guide(summary),
    ]
    style = Path(__file__).with_name("report.css").read_text(encoding="utf-8")
    page = (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>EDJE on {escape(summary['dataset'])}</title><style>\n{style}</style></head>\n<body>\n"
        + "\n".join(section for section in sections if section)
        + "\n</body></html>\n"
    )
    path = Path(out) / "report.html"
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, page.encode())
    return path


def best_column(summary: dict[str, Any]) -> str:
    """`reranked` or `fused`: the one with the higher T2I R@1; the headline and the gallery are about it."""
    return max((c for c in ("reranked", "fused") if c in summary["t2i"]), key=lambda c: summary["t2i"][c]["R@1"])


def _header(summary: dict[str, Any]) -> str:
    return (
        f"<h1>EDJE on {escape(Path(summary['dataset']).stem.removeprefix('dataset_'))}</h1>"
        f'<p class="lead">{escape(protocol([summary]))}</p>'
    )


def _headline(summary: dict[str, Any], column: str) -> str:
    cards = (_card(title, summary[direction], column) for direction, title in DIRECTION_TITLES.items())
    return f'<div class="headline">{"".join(cards)}</div>'


def _card(title: str, part: dict[str, Any], column: str) -> str:
    """R@1 before and after, the gain with its interval, and how it came about."""
    before, after = part["embedding"]["R@1"], part[column]["R@1"]
    prefix = "" if column == "reranked" else f"{column}_"
    low, high = part[f"{prefix}gain_R@1_ci95"]
    helped, hurt = part[f"{prefix}helped"], part[f"{prefix}hurt"]
    sign = "up" if low > 0 else "down" if high < 0 else ""
    return (
        f"<section><h3>{title.capitalize()}, R@1 in percent</h3>"
        f'<div class="figures"><span class="from">{before:.1f} →</span> {after:.1f}</div>'
        f'<div class="gain"><b class="{sign}">{after - before:+.1f} points</b> '
        f'(95% interval {low:+.1f} to {high:+.1f})</div><div class="note">{COLUMN_TITLES[column]}: {helped:,} queries '
        f"gained their right answer in first place, {hurt:,} lost it. At best {part['pool_ceiling']:.1f}: the share "
        "with a right answer in the pool.</div></section>"
    )


def _table(summary: dict[str, Any], best: str) -> str:
    """All columns, both directions, the whole split and its subsets; the gain is that of column `best`."""
    columns = columns_of(summary)
    top = "".join(f'<th colspan="4" class="group">{COLUMN_TITLES[column]}</th>' for column in columns)
    depths = '<th class="group">R@1</th><th>R@5</th><th>R@10</th><th>MedR</th>' * len(columns)
    parts = {"Whole split": summary} | summary.get("subsets", {})
    rows = []
    for name, part in parts.items():
        rows.append(f'<tr class="part"><th colspan="{4 * len(columns) + 3}">{escape(name)}</th></tr>')
        rows += [_table_row(title, part[d], columns, best) for d, title in DIRECTION_TITLES.items()]
        sums = "".join(f'<td colspan="4" class="group">{part["rsum"][column]:.1f}</td>' for column in columns)
        rows.append(f'<tr><td>rSum</td>{sums}<td class="group" colspan="2"></td></tr>')
    return (
        "<h2>Recall</h2>"
        f'<div class="scroll"><table><thead><tr><th></th>{top}<th class="group">gain, R@1</th>'
        f'<th class="group">pool</th></tr><tr><th></th>{depths}<th class="group">[95%]</th>'
        f'<th class="group">ceiling</th></tr></thead><tbody>{"".join(rows)}</tbody></table></div>'
    )


def _table_row(title: str, part: dict[str, Any], columns: list[str], best: str) -> str:
    cells = [f"<td>{title}</td>"]
    for column in columns:
        for k in RECALL_DEPTHS:
            value = part[column][f"R@{k}"]
            highest = value == max(part[other][f"R@{k}"] for other in columns)
            classes = " ".join(name for name, on in (("group", k == 1), ("best", highest)) if on)
            cells.append(f'<td class="{classes}">{value:.1f}</td>')
        cells.append(f"<td>{part[column]['median_rank']:g}</td>")
    cells.append(f'<td class="group">{gain_text([part], best)}</td><td class="group">{part["pool_ceiling"]:.1f}</td>')
    return f"<tr>{''.join(cells)}</tr>"


def _extended_table(summary: dict[str, Any]) -> str:
    rows = extended_rows([summary])
    if not rows:
        return ""
    body = "".join("<tr>" + "".join(f"<td>{cell}</td>" for cell in row) + "</tr>" for row in rows[1:])
    head = "".join(f"<th>{cell}</th>" for cell in rows[0])
    return (
        "<h2>COCO's extended ground truth</h2>"
        f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'
        '<p class="note">By the package eccv-caption on these rankings, in percent: mAP@R, R-Precision and R@1 where '
        "everything that people found right counts; COCO R@1 by COCO's own ground truth, five captions an image.</p>"
    )


def _recall_charts(results: Results) -> str:
    charts = []
    for direction, title in DIRECTION_TITLES.items():
        part = getattr(results, direction)
        charts.append(
            line_chart(_pool_lines(part), f"{title.capitalize()}: R@1 by pool size", "k, candidates reranked", "%")
        )
        charts.append(
            line_chart(_depth_lines(part), f"{title.capitalize()}: recall by depth", "K, first K of the ranking", "%")
        )
    return (
        f'<h2>Recall against k</h2><div class="charts">{"".join(charts)}</div>'
        '<p class="note">Left: how many candidates are worth reranking. Right: a pool of k cannot change '
        "recall at k.</p>"
    )


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


def _read_metrics(path: Path) -> list[dict[str, Any]]:
    """Lines of metrics.jsonl; the last one may have been cut short by a kill."""
    metrics = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            metrics.append(json.loads(line))
        except ValueError:
            continue
    return metrics


def _training_charts(metrics: list[dict[str, Any]]) -> str:
    names = [name for name in LOSSES if any(name in row for row in metrics)]
    losses = [_series(metrics, name, LOSSES[name], SERIES_COLORS[i]) for i, name in enumerate(names)]
    accuracy = [_series(metrics, "itm_accuracy", "right candidate first", "accent", factor=100.0)]
    charts = [
        line_chart(losses, "Losses", "step", ""),
        line_chart(accuracy, "Training groups solved", "step", "%"),
    ]
    for direction, title in DIRECTION_TITLES.items():
        lines = [_series(metrics, f"val/{direction}/{c}/R@1", COLUMN_TITLES[c], COLORS[c]) for c in COLUMN_TITLES]
        charts.append(line_chart(lines, f"Validation, {title}: R@1", "step", "%"))
    drawn = "".join(charts)
    return f'<h2>Training</h2><div class="charts">{drawn}</div>' if drawn else ""


def _series(metrics: list[dict[str, Any]], key: str, name: str, color: str, factor: float = 1.0) -> Line:
    rows = [row for row in metrics if key in row]
    return Line(name, [row["step"] for row in rows], [factor * row[key] for row in rows], color)


def _reading_guide(summary: dict[str, Any]) -> str:
    seconds = ", ".join(f"{name} {value:.1f} s" for name, value in summary["seconds"].items())
    return (
        "<h2>How to read this</h2>"
        "<p>R@K is the percentage of queries with a right answer among the first K; for an image, any of its own "
        "captions is right. MedR is the median rank of the first right answer in the whole gallery, from 1 on; below "
        "the reranked pool that is the embedding's. rSum is the sum of both directions' R@1, R@5 and R@10. Every "
        "column ranks the same candidates. Intervals: paired bootstrap over queries.</p>"
        f'<p class="note">Time: {seconds}; {summary["pairs_per_second"]:,.0f} pairs/s in {summary["precision"]}.<br>'
        f"Checkpoint <code>{escape(summary['checkpoint'])}</code>, data <code>{escape(summary['dataset'])}</code>.</p>"
    )


def write_teaser(path: str | Path, summary: dict[str, Any], results: Results, dataset: CaptionDataset) -> None:
    """The text-to-image query that reranking helped most, as a PNG for a README."""
    examples = pick_examples(results.t2i, best_column(summary), helped=True, count=1)
    if not examples:
        raise UserError("no text-to-image query was helped, so there is nothing to show; evaluate another checkpoint")
    buffer = io.BytesIO()
    draw_teaser(dataset, examples[0]).save(buffer, "png", optimize=True)
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, buffer.getvalue())


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", required=True, help="directory with results.json and rankings.npz")
    parser.add_argument("--metrics", help="metrics.jsonl of the run (default: the one beside results.json)")
    parser.add_argument("--teaser", help="write only this PNG: a query before and after reranking")
    arguments = parser.parse_args(argv)
    directory = Path(arguments.results)
    results, dataset = read_rankings(directory / "rankings.npz")
    try:
        summary = json.loads((directory / "results.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{directory / 'results.json'}: not readable ({error}); run evaluate_retrieval.py") from None
    if arguments.teaser:
        write_teaser(arguments.teaser, summary, results, dataset)
        print(arguments.teaser)
    else:
        print(write_report(directory, summary, results, dataset, arguments.metrics or directory / "metrics.jsonl"))


if __name__ == "__main__":
    run_entry_point(main)
