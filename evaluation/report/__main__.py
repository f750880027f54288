"""Draw report.html again from an evaluation's results.json and rankings.npz, without a model.

python -m evaluation.report --results runs/demo
python -m evaluation.report --results runs/demo --teaser docs/teaser.png     the picture of a README alone
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # for `python evaluation/report`

from evaluation.figures import read_results
from evaluation.output import read_rankings
from evaluation.report.page import write_report, write_teaser
from models.errors import run_entry_point


def parse_arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m evaluation.report",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--results", type=Path, required=True, help="directory with results.json and rankings.npz")
    parser.add_argument("--metrics", type=Path, help="metrics.jsonl of the run (default: the one beside results.json)")
    parser.add_argument("--teaser", type=Path, help="write only this PNG: a query before and after reranking")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    arguments = parse_arguments(argv)
    results, dataset = read_rankings(arguments.results / "rankings.npz")
    record = read_results(arguments.results / "results.json")
    if arguments.teaser:
        write_teaser(arguments.teaser, record, results, dataset)
        print(arguments.teaser)
    else:
        metrics = arguments.metrics or arguments.results / "metrics.jsonl"
        print(write_report(arguments.results, record, results, dataset, metrics))


if __name__ == "__main__":
    run_entry_point(main)
