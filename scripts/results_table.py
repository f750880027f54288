"""Print a Markdown table from results.json files of evaluations, with mean and spread where there are several seeds.

python scripts/results_table.py benchmarks/demo/seed*.json
python scripts/results_table.py --subsets benchmarks/emoji_frozen/seed*.json
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from evaluation.output import markdown_table, protocol
from models.errors import UserError, run_entry_point


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
    first = results[0]
    for other in results[1:]:
        for key in ("dataset", "split", "k", "folds", "images", "captions"):
            if other.get(key) != first.get(key):
                raise UserError(
                    f"results differ in {key} ({first.get(key)} and {other.get(key)}); give seeds of one experiment"
                )
    return f"{protocol(results)}\n\n{markdown_table(results, with_subsets)}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", nargs="+", type=Path, help="results.json files, one a seed")
    parser.add_argument("--subsets", action="store_true", help="also a row for each subset of the split")
    arguments = parser.parse_args()
    print(table([read_results(path) for path in arguments.results], arguments.subsets))


if __name__ == "__main__":
    run_entry_point(main)
