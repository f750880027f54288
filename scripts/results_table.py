"""Print Markdown tables from results.json files of evaluations.

Mean and spread over the seeds of one experiment:
    python scripts/results_table.py benchmarks/results/demo/seed*.json
    python scripts/results_table.py --subsets benchmarks/results/emoji_frozen/seed*.json
R@1 of several experiments, a row per folder of seeds and direction:
    python scripts/results_table.py --compare benchmarks/results/demo benchmarks/results/emoji_frozen
The paper's tables (benchmarks/results/paper.json), with ours from every results.json below a folder:
    python scripts/results_table.py --paper runs
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from evaluation.metrics import RECALL_DEPTHS
from evaluation.model_record import benchmark_name
from evaluation.output import (
    COLUMN_TITLES,
    DIRECTION_TITLES,
    aligned,
    columns_of,
    gain_text,
    markdown_table,
    mean_text,
    protocol,
)
from models.errors import UserError, run_entry_point

PAPER = Path(__file__).resolve().parents[1] / "benchmarks" / "results" / "paper.json"
"""The paper's figures, as printed, and what a results.json must say to stand in a row beside them."""


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


KINDS: dict[str, Callable[[Any], bool]] = {
    "text": lambda value: isinstance(value, str),
    "a whole number": lambda value: _is_number(value) and isinstance(value, int),
    "a number": _is_number,
    "two numbers": lambda value: isinstance(value, list) and len(value) == 2 and all(map(_is_number, value)),
    "an object": lambda value: isinstance(value, dict),
}
"""What a field of results.json may have to be."""
MODEL_KINDS = dict.fromkeys(("backbone", "pretrained", "adapter", "setting"), "text") | dict.fromkeys(
    ("vision_tokens", "bytes_per_image", "joint_layers", "joint_width", "joint_parameters"), "a whole number"
)


def read_results(path: Path) -> dict[str, Any]:
    """One results.json. Raises UserError naming the file, and the field that is missing or of another kind."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path}: not a results.json of evaluation/evaluate_retrieval.py ({error})") from None
    where = f"{path}: "
    document = _field({"the document": found}, "the document", "an object", where)
    for name in ("checkpoint", "dataset", "split"):
        _field(document, name, "text", where)
    for name in ("k", "images", "captions"):
        _field(document, name, "a whole number", where)
    _field(document, "folds", "a whole number", where, optional=True)
    _field(document, "lambda_split", "text", where, optional=True)
    model = _field(document, "model", "an object", where, optional=True)
    if model is not None:
        for name, kind in MODEL_KINDS.items():
            _field(model, name, kind, f"{where}model.")
        _field(model, "residual_similarity", "a number", f"{where}model.", optional=True)
    _check_figures(document, where)
    subsets = _field(document, "subsets", "an object", where, optional=True) or {}
    for name in subsets:
        _check_figures(_field(subsets, name, "an object", f"{where}subsets."), f"{where}subsets.{name}.")
    return document


def _field(record: dict[str, Any], name: str, kind: str, where: str, optional: bool = False) -> Any:
    """A field of the kind, one of KINDS; None if it is not there, though `optional`. where: file and path to it."""
    if name not in record and optional:
        return None
    if name in record and KINDS[kind](record[name]):
        return record[name]
    found = f"is {record[name]!r:.60}" if name in record else "is missing"
    file, _, above = where.rpartition(": ")
    raise UserError(
        f"{file}: not a results.json of evaluation/evaluate_retrieval.py: {above}{name} {found}; expected {kind}; "
        "evaluate again"
    )


def _check_figures(part: dict[str, Any], where: str) -> None:
    """The figures of both directions, of a whole split or a subset; older files lack some."""
    directions = {name: _field(part, name, "an object", where) for name in DIRECTION_TITLES}
    has_fused = any("fused" in figures for figures in directions.values())
    for direction, of_direction in directions.items():
        for column in ("embedding", "reranked", *(["fused"] if has_fused else [])):
            inside = f"{where}{direction}.{column}."
            figures = _field(of_direction, column, "an object", f"{where}{direction}.")
            for depth in RECALL_DEPTHS:
                _field(figures, f"R@{depth}", "a number", inside, optional=depth > 1)
            _field(figures, "median_rank", "a number", inside, optional=True)
            if column == "fused":
                _field(figures, "lambda", "a number", inside)
            if column != "embedding":
                interval = "gain_R@1_ci95" if column == "reranked" else f"{column}_gain_R@1_ci95"
                _field(of_direction, interval, "two numbers", f"{where}{direction}.")
            extended = _field(figures, "eccv", "an object", inside, optional=True)
            if extended is not None:
                for name in ("mAP@R", "R-Precision", "R@1", "COCO R@1"):
                    _field(extended, name, "a number", f"{inside}eccv.")
    sums = _field(part, "rsum", "an object", where, optional=True) or {}
    for column in sums:
        _field(sums, column, "a number", f"{where}rsum.")


def table(results: list[dict[str, Any]], with_subsets: bool, with_protocol: bool = True) -> str:
    """The whole table; seeds are averaged, so all results must be of one data set, split, k and folds."""
    check_one_experiment(results, with_subsets)
    rows = markdown_table(results, with_subsets)
    return f"{protocol(results)}\n\n{rows}" if with_protocol else rows


def check_one_experiment(results: list[dict[str, Any]], with_subsets: bool) -> None:
    """Raises UserError naming what results differ in that must be the same for seeds of one experiment."""
    first, *others = ({"folds": 1} | result for result in results)  # files of before folds are of whole splits
    for other in others:
        for key in ("dataset", "split", "k", "folds", "images", "captions"):
            if other.get(key) != first.get(key):
                raise UserError(
                    f"results differ in {key} ({first.get(key)} and {other.get(key)}); give seeds of one experiment"
                )
        if with_subsets and set(other.get("subsets", {})) != set(first.get("subsets", {})):
            raise UserError("results differ in subsets; give seeds of one experiment, or leave --subsets out")


def comparison(folders: Sequence[Path]) -> str:
    """R@1 of experiments side by side: each is a folder of seeds, seed*.json, and named by the folder."""
    rows = [["", "", "images", "seeds", *COLUMN_TITLES.values(), "gain of the last [95%]"]]
    for folder in folders:
        seeds = [read_results(path) for path in sorted(folder.glob("seed*.json"))]
        if not seeds:
            raise UserError(f"{folder}: no seed*.json in it; give folders of results.json files, one per seed")
        check_one_experiment(seeds, with_subsets=False)
        for direction, title in DIRECTION_TITLES.items():
            parts, columns = [seed[direction] for seed in seeds], columns_of(*seeds)
            recalls = {column: mean_text([part[column]["R@1"] for part in parts]) for column in columns}
            counts = [f"{seeds[0]['images']:,}", str(len(seeds))]
            cells = [recalls.get(column, "–") for column in COLUMN_TITLES]
            rows.append([folder.name, title, *counts, *cells, gain_text(parts, columns[-1])])
    return aligned(rows)


def paper_tables(folder: Path) -> str:
    """Every table of the paper, under each of its rows ours, one a results.json: runs that look alike may be seeds or
    ablations, so nothing is averaged. Then the results that belong to no row."""
    found = {path: read_results(path) for path in sorted(folder.rglob("results.json"))}
    if not found:
        raise UserError(f"{folder}: no results.json in it or below; evaluation/evaluate_retrieval.py writes them")
    paper = json.loads(PAPER.read_text(encoding="utf-8"))
    left, parts = dict(found), [f"Paper: {paper['source']}."]
    for section in paper["tables"]:
        rows = [["", "", *(column["title"] for column in section["columns"])]]
        for row in section["rows"]:
            rows.append([row["name"], "paper", *(cell or "–" for cell in row["paper"])])
            if row["ours"] is None:  # a model of others, cited
                continue
            own = {path: r for path, r in found.items() if belongs(r, section["where"] | row["ours"])}
            for path, result in own.items():
                title = f"ours: {path.parent.relative_to(folder)}: {model_title(result)}"
                rows.append(["", title, *(our_cell(result, column) for column in section["columns"])])
            if not own:
                rows.append(["", "ours", *("–" for _ in section["columns"])])
            left = {path: result for path, result in left.items() if path not in own}
        notes = " ".join(filter(None, (section.get("note"), required(section["where"]))))
        parts += filter(None, (f"### {section['title']}", notes, aligned(rows)))
    if left:
        parts += ["Results that belong to no row:", "\n".join(f"- {path}: {about(r)}" for path, r in left.items())]
    return "\n\n".join(parts)


def required(where: dict[str, Any]) -> str:
    """What figures of ours stand in a table, in a sentence; nothing where none can."""
    if not where:
        return ""
    return (
        f"Ours: {where['dataset']}, {where['split']} split, {where['images']:,} images, {where['captions']:,} captions"
        f"{', k = {}'.format(where['k']) if 'k' in where else ''}; {where.get('setting', 'any training')}; "
        "reranked by the match logit alone."
    )


def belongs(result: dict[str, Any], wanted: dict[str, Any]) -> bool:
    """Whether a results.json says all that is wanted. One that does not know its setting belongs to either; one whose
    match logit contains the first stage's cosine to none, as the paper's do not."""
    wanted = {"residual_similarity": 0} | wanted
    facts = {"folds": 1, "residual_similarity": 0} | result | result.get("model", {})
    facts["dataset"] = benchmark_name(result["dataset"])
    if facts.get("setting") == "unknown":
        facts["setting"] = wanted.get("setting")
    return all(facts.get(key) == value for key, value in wanted.items())


def our_cell(result: dict[str, Any], column: dict[str, Any]) -> str:
    """The figures that the column names by their paths in results.json, joined as the paper prints them."""
    texts = []
    for path in column["ours"]:
        figure = result
        for key in path.split("."):
            figure = figure.get(key) if figure else None  # older files lack some
        texts.append("–" if figure is None else f"{figure * column.get('scale', 1):.{column.get('digits', 1)}f}")
    return "/".join(texts) or "–"


def model_title(result: dict[str, Any]) -> str:
    """`ViT-L-16-SigLIP2-384 webli, 64 tokens, 12 layers of 384, k = 10`."""
    model = result["model"]
    backbone = " ".join(filter(None, (model["backbone"], model["pretrained"])))
    kind = "local, " if model["adapter"] == "local" else ""
    title = (
        f"{backbone}, {kind}{model['vision_tokens']} tokens, {model['joint_layers']} layers of "
        f"{model['joint_width']}, k = {result['k']}"
    )
    if model.get("residual_similarity"):
        title += ", first stage's cosine in the match logit"
    return title + (", training data unknown" if model["setting"] == "unknown" else "")


def about(result: dict[str, Any]) -> str:
    """Why a file is in no row: what it says instead."""
    if "model" not in result:
        return "names no model, as evaluations did before; evaluate again"
    counts = f"{result['images']:,} images, {result['captions']:,} captions, {result.get('folds', 1)} folds"
    return f"{result['dataset']}, {result['split']}: {counts}; {model_title(result)}, {result['model']['setting']}"


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", nargs="*", type=Path, help="results.json files, one a seed")
    parser.add_argument("--subsets", action="store_true", help="also a row for each subset of the split")
    parser.add_argument("--table-only", action="store_true", help="without the sentence on the protocol")
    parser.add_argument("--compare", type=Path, nargs="+", metavar="DIR", help="R@1 of folders of seeds, side by side")
    parser.add_argument("--paper", type=Path, metavar="DIR", help="the paper's tables and every results.json below DIR")
    arguments = parser.parse_args(argv)
    if sum(map(bool, (arguments.results, arguments.compare, arguments.paper))) != 1:
        raise UserError("give results.json files of one experiment, --compare DIR ..., or --paper DIR")
    if arguments.paper:
        print(paper_tables(arguments.paper))
    elif arguments.compare:
        print(comparison(arguments.compare))
    else:
        files = [path.resolve() for path in arguments.results]
        twice = [str(path) for path, file in zip(arguments.results, files, strict=True) if files.count(file) > 1]
        if twice:
            raise UserError(f"{' and '.join(twice)}: one file, which would count as several seeds; name it once")
        results = [read_results(path) for path in arguments.results]
        print(table(results, arguments.subsets, with_protocol=not arguments.table_only))


if __name__ == "__main__":
    run_entry_point(main)
