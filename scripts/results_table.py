"""Print Markdown tables from results.json files of evaluations.

Mean and spread over the seeds of one experiment:
    python scripts/results_table.py benchmarks/results/demo/seed*.json
    python scripts/results_table.py --subsets benchmarks/results/emoji_frozen/seed*.json
R@1 of several experiments, runs or folders of seeds:
    python scripts/results_table.py --compare benchmarks/results/demo benchmarks/results/emoji_frozen
The paper's tables (benchmarks/results/paper.json), with ours from every results.json below a folder:
    python scripts/results_table.py --paper runs
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from evaluation.figures import EvaluationRecord, read_results
from evaluation.model_record import benchmark_name
from evaluation.tables import (
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


def table(records: Sequence[EvaluationRecord], with_subsets: bool, with_protocol: bool = True) -> str:
    """The whole table; seeds are averaged, so all records must be of one data set, split, k and folds."""
    check_one_experiment(records, with_subsets)
    rows = markdown_table(records, with_subsets)
    return f"{protocol(records)}\n\n{rows}" if with_protocol else rows


def check_one_experiment(records: Sequence[EvaluationRecord], with_subsets: bool) -> None:
    """Raises UserError naming what records differ in that must be the same for seeds of one experiment."""
    first, *others = records
    for other in others:
        for name in ("dataset", "split", "k", "folds", "images", "captions"):
            mine, theirs = getattr(first, name), getattr(other, name)
            if mine != theirs:
                raise UserError(f"results differ in {name} ({mine} and {theirs}); give seeds of one experiment")
        if with_subsets and set(other.subsets) != set(first.subsets):
            raise UserError("results differ in subsets; give seeds of one experiment, or leave --subsets out")


def comparison(folders: Sequence[Path]) -> str:
    """R@1 of experiments side by side: each is a folder, of one run or of seeds, and named by the folder."""
    rows = [["", "", "images", "seeds", *COLUMN_TITLES.values(), "gain of the last [95%]"]]
    for folder in folders:
        seeds = [read_results(path) for path in results_in(folder)]
        check_one_experiment(seeds, with_subsets=False)
        columns = columns_of(*(seed.figures for seed in seeds))
        for direction, title in DIRECTION_TITLES.items():
            parts = [seed.figures.directions()[direction] for seed in seeds]
            recalls = {c: mean_text([part.columns[c].metrics["R@1"] for part in parts]) for c in columns}
            cells = [recalls.get(column, "–") for column in COLUMN_TITLES]
            counts = [f"{seeds[0].images:,}", str(len(seeds))]
            rows.append([folder.name, title, *counts, *cells, gain_text(parts, columns[-1])])
    return aligned(rows)


def results_in(folder: Path) -> list[Path]:
    """The results of an experiment: seed*.json, as records are kept; seed*/results.json, as scripts/ablate.py leaves
    them; or a run's own results.json. Raises UserError where there are none."""
    found = sorted(folder.glob("seed*.json")) or sorted(folder.glob("seed*/results.json"))
    found = found or [path for path in [folder / "results.json"] if path.is_file()]
    if not found:
        raise UserError(f"{folder}: no results.json, seed*/results.json or seed*.json in it; give the folder of a run")
    return found


def paper_tables(folder: Path) -> str:
    """Every table of the paper, under each of its rows ours, one per results.json: runs that look alike may be seeds or
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
            for path, record in own.items():
                title = f"ours: {path.parent.relative_to(folder)}: {model_title(record)}"
                rows.append(["", title, *(our_cell(record, column) for column in section["columns"])])
            if not own:
                rows.append(["", "ours", *("–" for _ in section["columns"])])
            left = {path: record for path, record in left.items() if path not in own}
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


_PRESETS = {
    name: {"backbone": preset, "pretrained": tag}
    for name, preset, tag in (
        ("openai/clip-vit-base-patch16", "ViT-B-16-quickgelu", "openai"),
        ("openai/clip-vit-large-patch14", "ViT-L-14-quickgelu", "openai"),
        ("openai/clip-vit-large-patch14-336", "ViT-L-14-336-quickgelu", "openai"),
        ("google/siglip2-base-patch16-384", "ViT-B-16-SigLIP2-384", "webli"),
        ("google/siglip2-large-patch16-384", "ViT-L-16-SigLIP2-384", "webli"),
    )
}
"""The paper's backbones by their names in transformers: open_clip's preset of the same weights."""


def belongs(record: EvaluationRecord, wanted: dict[str, object]) -> bool:
    """Whether a record says all that is wanted. One that does not know its setting belongs to either; one whose match
    logit contains the first stage's cosine to none, as the paper's do not."""
    wanted = {"residual_similarity": 0} | wanted
    facts: dict[str, object] = {"residual_similarity": 0} | record.to_json()
    facts |= record.model.to_json() if record.model else {}
    facts |= _PRESETS.get(str(facts.get("backbone")), {})
    facts["dataset"] = benchmark_name(record.dataset)
    if facts.get("setting") == "unknown":
        facts["setting"] = wanted.get("setting")
    return all(facts.get(key) == value for key, value in wanted.items())


def our_cell(record: EvaluationRecord, column: dict[str, Any]) -> str:
    """The figures that the column names by their paths in results.json, joined as the paper prints them."""
    texts = []
    for path in column["ours"]:
        figure: object = record.to_json()
        for key in path.split("."):
            figure = figure.get(key) if isinstance(figure, dict) else None  # older files lack some
        known = isinstance(figure, int | float)
        texts.append(f"{figure * column.get('scale', 1):.{column.get('digits', 1)}f}" if known else "–")
    return "/".join(texts) or "–"


def model_title(record: EvaluationRecord) -> str:
    """`ViT-L-16-SigLIP2-384 webli, 64 tokens, 12 layers of 384, k = 10`."""
    model = record.model
    if model is None:
        return f"a model that it does not name, k = {record.k}"
    backbone = " ".join(filter(None, (model.backbone, model.pretrained)))
    kind = "local, " if model.adapter == "local" else ""
    title = f"{backbone}, {kind}{model.vision_tokens} tokens, {model.joint_layers} layers of {model.joint_width}"
    title += f", k = {record.k}" + (", first stage's cosine in the match logit" if model.residual_similarity else "")
    return title + (", training data unknown" if model.setting == "unknown" else "")


def about(record: EvaluationRecord) -> str:
    """Why a file is in no row: what it says instead."""
    if record.model is None:
        return "names no model, as files of older versions; evaluate again"
    counts = f"{record.images:,} images, {record.captions:,} captions, {record.folds} folds"
    return f"{record.dataset}, {record.split}: {counts}; {model_title(record)}, {record.model.setting}"


def parse_arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", nargs="*", type=Path, help="results.json files, one per seed")
    parser.add_argument("--subsets", action="store_true", help="also a row for each subset of the split")
    parser.add_argument("--table-only", action="store_true", help="without the sentence on the protocol")
    parser.add_argument("--compare", type=Path, nargs="+", metavar="DIR", help="R@1 of folders of seeds, side by side")
    parser.add_argument("--paper", type=Path, metavar="DIR", help="the paper's tables and every results.json below DIR")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    arguments = parse_arguments(argv)
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
        records = [read_results(path) for path in arguments.results]
        print(table(records, arguments.subsets, with_protocol=not arguments.table_only))


if __name__ == "__main__":
    run_entry_point(main)
