"""Print a Markdown table from results.json files of evaluations, with mean and spread where there are several seeds.

python scripts/results_table.py benchmarks/demo/seed*.json
python scripts/results_table.py --subsets benchmarks/emoji_frozen/seed*.json
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from models.errors import UserError, run_entry_point

DEPTHS = ("R@1", "R@5", "R@10")
COLUMNS = (("embedding", "embedding alone"), ("reranked", "EDJE"), ("fused", "EDJE, fused"))
DIRECTIONS = (("t2i", "text to image"), ("i2t", "image to text"))


def read_results(path: Path) -> dict[str, Any]:
    """One results.json. Raises UserError naming the file if it is none."""
    try:
        found = json.loads(path.read_text())
        _ = found["t2i"]["embedding"]["R@1"], found["i2t"]["reranked"]["R@1"]
        return found
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path}: not a results.json of evaluation/evaluate_retrieval.py ({error!r})") from None


def cell(values: list[float]) -> str:
    """Mean, and with several seeds the sample standard deviation, in percent."""
    mean = f"{statistics.mean(values):.1f}"
    return mean if len(values) == 1 else f"{mean} ± {statistics.stdev(values):.1f}"


def rows(results: list[dict[str, Any]], title: str) -> list[str]:
    """A row for each direction and column that all results have, and one for the gain in R@1."""
    lines = []
    for direction, name in DIRECTIONS:
        present = [(key, label) for key, label in COLUMNS if all(key in r[direction] for r in results)]
        for key, label in present:
            cells = (cell([r[direction][key][depth] for r in results]) for depth in DEPTHS)
            lines.append(f"| {title}{name} | {label} | {' | '.join(cells)} | {gain(results, direction, key)} |")
    return lines


def gain(results: list[dict[str, Any]], direction: str, key: str) -> str:
    """Points of R@1 over the embedding, with the 95% interval over queries, averaged over the seeds."""
    if key == "embedding":
        return ""
    points = [r[direction][key]["R@1"] - r[direction]["embedding"]["R@1"] for r in results]
    interval = "gain_R@1_ci95" if key == "reranked" else "fused_gain_R@1_ci95"
    low, high = (statistics.mean(r[direction][interval][i] for r in results) for i in (0, 1))
    return f"{statistics.mean(points):+.1f} [{low:+.1f}, {high:+.1f}]"


def table(results: list[dict[str, Any]], with_subsets: bool) -> str:
    """The whole table; seeds are averaged, so all results must be of one data set, split and k."""
    first = results[0]
    for other in results[1:]:
        for key in ("dataset", "split", "k", "images", "captions"):
            if other[key] != first[key]:
                raise UserError(
                    f"results differ in {key} ({first[key]} and {other[key]}); give seeds of one experiment"
                )
    lines = [
        f"{first['dataset']}, {first['split']} split: {first['images']} images, {first['captions']} captions, "
        f"pool of k = {first['k']}, {len(results)} seed{'s' * (len(results) > 1)}",
        "",
        "| | | R@1 | R@5 | R@10 | gain in R@1 [95%] |",
        "|---|---|---|---|---|---|",
        *rows(results, ""),
    ]
    for name in first.get("subsets", {}) if with_subsets else ():
        lines += rows([r["subsets"][name] for r in results], f"*{name}*, ")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", nargs="+", type=Path, help="results.json files, one a seed")
    parser.add_argument("--subsets", action="store_true", help="also a row for each subset of the split")
    arguments = parser.parse_args()
    print(table([read_results(path) for path in arguments.results], arguments.subsets))


if __name__ == "__main__":
    run_entry_point(main)
