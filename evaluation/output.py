"""The files of an evaluation: results.json (for programs), results.md (for people), rankings.npz (every score), and
run.*.trec and qrels.*.trec (the rankings for other programs, see trec.py).

rankings.npz holds what the numbers follow from, so a report can be drawn again without a model:
    results, dataset = read_rankings("runs/demo/rankings.npz")
"""

from __future__ import annotations

import io
import json
import statistics
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from data.caption_datasets import CaptionDataset
from models.errors import UserError
from models.files import write_atomically

from .metrics import RECALL_DEPTHS
from .results import DirectionResults, Results
from .trec import trec_files

COLUMN_TITLES = {
    "embedding": "embedding alone",
    "reranked": "EDJE, match logit alone",
    "fused": "EDJE, logit + λ × cosine",
}
DIRECTION_TITLES = {"t2i": "text to image", "i2t": "image to text"}
DIRECTION_ARRAYS = ("query_image", "item_image", "candidates", "similarities", "logits", "first_right")


def results_json(
    results: Results,
    checkpoint: str,
    dataset: str,
    split: str,
    model: dict[str, Any] | None = None,
    lambda_split: str = "",
) -> dict[str, Any]:
    """The content of results.json: recalls in percent, intervals in percentage points. model: model_record(...);
    lambda_split: the split that lambda was chosen on, where it is known."""
    names = {"checkpoint": checkpoint, "dataset": dataset, "split": split}
    if lambda_split and results.t2i.fusion_lambda is not None:
        names["lambda_split"] = lambda_split
    return names | ({"model": model} if model else {}) | results.summary()


def protocol(summaries: Sequence[dict[str, Any]]) -> str:
    """What a table's figures are of, in one sentence: data set, split, counts, k, folds, the scores, seeds."""
    first = summaries[0]
    parts = [
        f"{first['dataset']}, {first['split']} split: {first['images']:,} images, {first['captions']:,} captions",
        f"the embedding's first k = {first['k']} candidates of each query reranked",
    ]
    folds = first.get("folds", 1)
    if folds > 1:
        parts.append(f"{folds} folds of {first['images'] // folds:,} images, each its own gallery, figures averaged")
    weights = dict.fromkeys(f"{summary.get('model', {}).get('residual_similarity', 0):.3g}" for summary in summaries)
    score = "EDJE by the match logit alone"
    if set(weights) != {"0"}:
        score += f", which contains the first stage's cosine, learned weight {', '.join(weights)}"
    if "fused" in columns_of(*summaries):
        chosen = dict.fromkeys(f"{summary['t2i']['fused']['lambda']:g}" for summary in summaries)
        splits = dict.fromkeys(summary.get("lambda_split", "") for summary in summaries)
        origin = " and ".join(f"split {split}" if split else "validation" for split in splits)
        score += f", or fused: match logit + λ × cosine, λ = {', '.join(chosen)} from {origin}"
    parts.append(score)
    return "; ".join(parts) + (f"; {len(summaries)} seeds" if len(summaries) > 1 else "") + "."


def markdown_table(summaries: Sequence[dict[str, Any]], with_subsets: bool = True) -> str:
    """A row for each direction and column, and below them the subsets: recalls, median rank, rSum, gain in R@1.

    summaries: contents of results.json, one, or several seeds of one experiment: then mean ± sample deviation. A
    figure that an older file lacks is a dash. A second table follows where all have figures by COCO's extended ground
    truth."""
    rows = [["", "", *(f"R@{k}" for k in RECALL_DEPTHS), "median rank", "rSum", "gain in R@1 [95%]"]]
    rows += _direction_rows(summaries, "")
    for name in summaries[0].get("subsets", {}) if with_subsets else ():
        rows += _direction_rows([summary["subsets"][name] for summary in summaries], f"*{name}*, ")
    return "\n\n".join(aligned(part) for part in (rows, extended_rows(summaries)) if part)


def _direction_rows(parts: Sequence[dict[str, Any]], prefix: str) -> list[list[str]]:
    """The rows of one split or subset, for the columns that all of `parts` have."""
    rows = []
    for direction, title in DIRECTION_TITLES.items():
        for column in columns_of(*parts):
            figures = [part[direction][column] for part in parts]
            cells = [mean_text([figure.get(f"R@{k}") for figure in figures]) for k in RECALL_DEPTHS]
            cells += [mean_text([figure.get("median_rank") for figure in figures])]
            cells += [mean_text([part.get("rsum", {}).get(column) for part in parts])]
            gain = "" if column == "embedding" else gain_text([part[direction] for part in parts], column)
            rows.append([prefix + title, COLUMN_TITLES[column], *cells, gain])
    return rows


def extended_rows(summaries: Sequence[dict[str, Any]]) -> list[list[str]]:
    """Header and rows of COCO's extended ground truth (eccv.py), summaries as above; nothing where one has none."""
    parts = [(direction, column) for direction in DIRECTION_TITLES for column in columns_of(*summaries)]
    if not all("eccv" in summary[direction][column] for summary in summaries for direction, column in parts):
        return []
    names = ("mAP@R", "R-Precision", "R@1", "COCO R@1")
    rows = [["ECCV Caption", "", *names]]
    for direction, column in parts:
        figures = [summary[direction][column]["eccv"] for summary in summaries]
        cells = [mean_text([figure[name] for figure in figures]) for name in names]
        rows.append([DIRECTION_TITLES[direction], COLUMN_TITLES[column], *cells])
    return rows


def columns_of(*parts: dict[str, Any]) -> list[str]:
    """The columns that every one of these has, in the order of a table."""
    return [column for column in COLUMN_TITLES if all(column in part["t2i"] for part in parts)]


def mean_text(values: Sequence[float | None]) -> str:
    """Mean, and of several values the sample standard deviation too; a dash where one is missing."""
    if None in values:
        return "–"
    mean = f"{statistics.mean(values):.1f}"
    return mean if len(values) == 1 else f"{mean} ± {statistics.stdev(values):.1f}"


def gain_text(parts: Sequence[dict[str, Any]], column: str) -> str:
    """`+20.1 [+18.6, +21.7]`: R@1 of `column` above the embedding's, percentage points, and its 95% interval over
    queries, each averaged over `parts`: one direction of one results.json, or of several seeds."""
    interval = "gain_R@1_ci95" if column == "reranked" else f"{column}_gain_R@1_ci95"
    gain = statistics.mean(part[column]["R@1"] - part["embedding"]["R@1"] for part in parts)
    low, high = (statistics.mean(part[interval][end] for part in parts) for end in (0, 1))
    return f"{gain:+.1f} [{low:+.1f}, {high:+.1f}]"


def aligned(rows: list[list[str]]) -> str:
    """A Markdown table whose source reads as a table too."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = [
        "| " + " | ".join(f"{cell:{width}}" for cell, width in zip(row, widths, strict=True)) + " |" for row in rows
    ]
    return "\n".join([lines[0], "|" + "|".join("-" * (width + 2) for width in widths) + "|", *lines[1:]])


def markdown_report(summary: dict[str, Any]) -> str:
    """results.md: what was evaluated, the table, and what it cost."""
    lines = [
        f"# Retrieval on {summary['dataset']}, split {summary['split']}",
        "",
        f"{protocol([summary])} Checkpoint: {summary['checkpoint']}.",
        "",
        markdown_table([summary]),
        "",
    ]
    for direction, title in DIRECTION_TITLES.items():
        part = summary[direction]
        lines.append(
            f"- {title}: {part['pool_ceiling']:.1f}% of the queries have a right answer in their pool; "
            f"EDJE put {part['helped']} right answers first and lost {part['hurt']}."
        )
    seconds = ", ".join(f"{name} {value:.1f} s" for name, value in summary["seconds"].items())
    lines.append(f"- time: {seconds}; {summary['pairs_per_second']:,.0f} pairs/s in {summary['precision']}.")
    return "\n".join(lines) + "\n"


def write_results(out: str | Path, results: Results, dataset: CaptionDataset, summary: dict[str, Any]) -> None:
    """Write results.json, results.md, rankings.npz and the TREC files into `out`, each in one step."""
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    for name, text in trec_files(results, dataset):
        if text is None:  # an older evaluation's, which had a lambda
            (out / name).unlink(missing_ok=True)
        else:
            write_atomically(out / name, text.encode())
    write_atomically(out / "rankings.npz", _rankings_bytes(results, dataset))
    write_atomically(out / "results.md", markdown_report(summary).encode())
    write_atomically(out / "results.json", (json.dumps(summary, indent=1) + "\n").encode())


def _rankings_bytes(results: Results, dataset: CaptionDataset) -> bytes:
    arrays: dict[str, Any] = {
        f"{direction}_{name}": getattr(getattr(results, direction), name)
        for direction in DIRECTION_TITLES
        for name in DIRECTION_ARRAYS
    }
    fusion_lambda = results.t2i.fusion_lambda
    arrays |= {
        "root": str(dataset.root.resolve()),
        "image_ids": np.array(dataset.image_ids),
        "captions": np.array(dataset.captions),
        "caption_image": dataset.caption_image,
        "subsets": np.array([subset or "" for subset in dataset.subsets]),
        "folds": results.t2i.folds,
        "fusion_lambda": np.nan if fusion_lambda is None else fusion_lambda,
        "seconds": json.dumps(results.seconds),
        "precision": results.precision,
    }
    buffer = io.BytesIO()
    np.savez_compressed(buffer, **arrays)
    return buffer.getvalue()


def read_rankings(path: str | Path) -> tuple[Results, CaptionDataset]:
    """What write_results() wrote. Raises UserError naming the file if it is missing or damaged."""
    try:
        with np.load(path) as file:
            arrays = {name: file[name] for name in file.files}
        directions = {
            direction: DirectionResults(
                **{name: arrays[f"{direction}_{name}"] for name in DIRECTION_ARRAYS},
                folds=int(arrays["folds"]),
                fusion_lambda=None if np.isnan(arrays["fusion_lambda"]) else float(arrays["fusion_lambda"]),
            )
            for direction in DIRECTION_TITLES
        }
        subsets = [str(name) or None for name in arrays["subsets"]]
        dataset = CaptionDataset(
            Path(str(arrays["root"])),
            arrays["image_ids"].tolist(),
            arrays["captions"].tolist(),
            arrays["caption_image"],
            subsets,
        )
        seconds, precision = json.loads(str(arrays["seconds"])), str(arrays["precision"])
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        raise UserError(
            f"{path}: missing or not readable as rankings ({error}); write it again with evaluate_retrieval.py"
        ) from None
    return Results(**directions, image_subsets=subsets, seconds=seconds, precision=precision), dataset
