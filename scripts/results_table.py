"""Print Markdown tables from results.json files of evaluations.

Mean and spread over the seeds of one experiment:
    python scripts/results_table.py benchmarks/demo/seed*.json
    python scripts/results_table.py --subsets benchmarks/emoji_frozen/seed*.json
The paper's tables (benchmarks/paper.json), with ours from every results.json below a folder:
    python scripts/results_table.py --paper runs
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from evaluation.model_record import benchmark_name
from evaluation.output import aligned, markdown_table, protocol
from models.errors import UserError, run_entry_point

PAPER = Path(__file__).resolve().parents[1] / "benchmarks" / "paper.json"
"""The paper's figures, as printed, and what a results.json must say to stand in a row beside them."""


def read_results(path: Path) -> dict[str, Any]:
    """One results.json. Raises UserError naming the file if it is none."""
    try:
        found = json.loads(path.read_text())
        _ = found["t2i"]["embedding"]["R@1"], found["i2t"]["reranked"]["R@1"]
        return found
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path}: not a results.json of evaluation/evaluate_retrieval.py ({error!r})") from None


def table(results: list[dict[str, Any]], with_subsets: bool) -> str:
    """The whole table; seeds are averaged, so all results must be of one data set, split, k and folds."""
    first, *others = ({"folds": 1} | result for result in results)  # files of before folds are of whole splits
    for other in others:
        for key in ("dataset", "split", "k", "folds", "images", "captions"):
            if other.get(key) != first.get(key):
                raise UserError(
                    f"results differ in {key} ({first.get(key)} and {other.get(key)}); give seeds of one experiment"
                )
    return f"{protocol(results)}\n\n{markdown_table(results, with_subsets)}"


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
            figure = figure[key]
        texts.append(f"{figure * column.get('scale', 1):.{column.get('digits', 1)}f}")
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", nargs="*", type=Path, help="results.json files, one a seed")
    parser.add_argument("--subsets", action="store_true", help="also a row for each subset of the split")
    parser.add_argument("--paper", type=Path, metavar="DIR", help="the paper's tables and every results.json below DIR")
    arguments = parser.parse_args()
    if bool(arguments.results) == bool(arguments.paper):
        raise UserError("give results.json files of one experiment, or --paper DIR for the paper's tables")
    if arguments.paper:
        print(paper_tables(arguments.paper))
    else:
        print(table([read_results(path) for path in arguments.results], arguments.subsets))


if __name__ == "__main__":
    run_entry_point(main)
