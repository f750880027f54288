"""Train and evaluate a list of configs with several seeds: one table, and one plot of recall against what it costs.

python scripts/ablate.py configs/demo_ablations/*.yaml --seeds 0 1 2 --out runs/ablations
python scripts/ablate.py configs/demo_ablations/*.yaml --out runs/ablations training.steps=100      overrides, for all
python scripts/ablate.py configs/demo_ablations/*.yaml --seeds 0 1 2 --time-again    after runs side by side
python scripts/ablate.py --table benchmarks/results/demo_ablations/ablations.json    a record's table again
python scripts/ablate.py --table benchmarks/results/demo_ablations/ablations.json --against local m16 m8    differences

Runs lie in OUT/CONFIG/seedN: what is done is skipped, what was killed continues. The first config is the one that the
others are compared with. Written: OUT/ablations.json, ablations.md, ablations.svg.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from evaluation.figures import EvaluationRecord, read_results
from evaluation.report.charts import Panel, Point, scatter_charts
from evaluation.tables import DIRECTION_TITLES, aligned, columns_of, mean_text
from models.edje import EDJE
from models.errors import UserError, one_line, run_entry_point
from models.files import write_atomically

ROOT = Path(__file__).resolve().parents[1]
RESULTS = "results.json"


def run(config: Path, seed: int, folder: Path, overrides: Sequence[str]) -> EvaluationRecord:
    """Train and evaluate one config with one seed, unless its results are there."""
    if not (folder / RESULTS).is_file():
        call(config, "train.py", "--config", config, f"output={folder}", f"seed={seed}", *overrides)
    return evaluate(config, folder, folder)


def evaluate(config: Path, run: Path, out: Path) -> EvaluationRecord:
    """Evaluate a run, unless its results are in `out`."""
    if not (out / RESULTS).is_file():
        call(config, "evaluation/evaluate_retrieval.py", "--checkpoint", run, "--out", out)
    return read_results(out / RESULTS)


def call(config: Path, script: str, *arguments: str | Path) -> None:
    """Run a script of this repository. Raises UserError that names the config if it fails."""
    print("$", script, *arguments, flush=True)
    status = subprocess.run([sys.executable, ROOT / script, *arguments]).returncode
    if status:
        raise UserError(f"{config}: {script} ended with exit status {status}; what it said stands above")


def describe(
    config: Path, folder: Path, seeds: Sequence[int], runs: list[EvaluationRecord], timed: list[EvaluationRecord]
) -> dict[str, Any]:
    """A config's entry in ablations.json: what it stores and costs, and R@1 of every seed."""
    model, k = runs[0].model, runs[0].k
    columns = columns_of(*(run.figures for run in runs))
    recalls = {
        direction: {c: [run.figures.directions()[direction].columns[c].metrics["R@1"] for run in runs] for c in columns}
        for direction in DIRECTION_TITLES
    }
    return {
        "name": config.stem,
        "vision_tokens": model.vision_tokens,
        "bytes_per_image": model.bytes_per_image,
        "trained_parameters": sum(p.numel() for p in EDJE.from_pretrained(folder).parameters()),
        "milliseconds_per_query": 1000 * k / statistics.median(record.pairs_per_second for record in timed),
        "seeds": list(seeds),
        "R@1": recalls,
    }


def read_entries(path: Path) -> list[dict[str, Any]]:
    """An ablations.json. Raises UserError naming the file."""
    try:
        entries = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: not an ablations.json ({one_line(error)}); scripts/ablate.py writes one") from None
    if not isinstance(entries, list) or not entries or not all("R@1" in entry for entry in entries):
        raise UserError(
            f"{path}: not an ablations.json: expected a list of entries with R@1; scripts/ablate.py writes one"
        )
    return entries


def difference(values: list[float], base: list[float]) -> str:
    """Difference of two means over seeds, with twice its standard error where both have several seeds."""
    points = statistics.mean(values) - statistics.mean(base)
    if min(len(values), len(base)) < 2:
        return f"{points:+.1f}"
    error = 2 * math.sqrt(statistics.variance(values) / len(values) + statistics.variance(base) / len(base))
    return f"{points:+.1f} ± {error:.1f}" + (" (noise)" if abs(points) <= error else "")


def table(entries: list[dict[str, Any]]) -> str:
    """Markdown, a row a config. R@1 in percent, by the match logit alone and fused: mean ± deviation over seeds."""
    first = entries[0]
    names = {"reranked": "logit", "fused": "fused"}
    columns = [c for c in names if all(c in entry["R@1"]["t2i"] for entry in entries)]
    header = ["config", "m", "bytes an image", "ms a query", "seeds"]
    header += [f"{d.upper()} {names[c]}" for d in DIRECTION_TITLES for c in columns] + [
        f"against {first['name']}, T2I logit"
    ]
    rows = [header]
    for entry in entries:
        cells = [entry["name"], str(entry["vision_tokens"]), f"{entry['bytes_per_image']:,}"]
        cells += [f"{entry['milliseconds_per_query']:.1f}", str(len(entry["seeds"]))]
        cells += [mean_text(entry["R@1"][d][c]) for d in DIRECTION_TITLES for c in columns]
        values, base = entry["R@1"]["t2i"]["reranked"], first["R@1"]["t2i"]["reranked"]
        cells.append("" if entry is first else difference(values, base))
        rows.append(cells)
    return aligned(rows)


def differences(entries: list[dict[str, Any]], names: Sequence[str]) -> str:
    """Markdown: R@1 of the entries `names[1:]`, or of all others, minus that of the entry `names[0]`.

    Raises UserError for a name that no entry has."""
    by_name = {entry["name"]: entry for entry in entries}
    if unknown := sorted(set(names) - by_name.keys()):
        raise UserError(f"--against names {', '.join(unknown)}; the record has {', '.join(by_name)}")
    base, *others = names
    scores = {"reranked": "match logit", "fused": "fused"}
    columns = [(d, c) for d in DIRECTION_TITLES for c in scores if all(c in e["R@1"][d] for e in entries)]
    rows = [[f"against {base}", *(f"{d.upper()}, {scores[c]}" for d, c in columns)]]
    for name in others or [name for name in by_name if name != base]:
        recalls = [(by_name[name]["R@1"][d][c], by_name[base]["R@1"][d][c]) for d, c in columns]
        rows.append([name, *(difference(values, of_base) for values, of_base in recalls)])
    return aligned(rows)


def plot(entries: list[dict[str, Any]]) -> str:
    """Two panels: T2I R@1 of the match logit against bytes an image, and against milliseconds a query."""
    panels = []
    for key, label in (("bytes_per_image", "bytes an image"), ("milliseconds_per_query", "ms a query")):
        points = []
        for entry in entries:
            recalls = entry["R@1"]["t2i"]["reranked"]
            spread = statistics.stdev(recalls) if len(recalls) > 1 else 0.0
            points.append(Point(entry["name"], entry[key], statistics.mean(recalls), spread))
        panels.append(Panel(label, points))
    level = statistics.mean(entries[0]["R@1"]["t2i"]["embedding"])
    return scatter_charts(panels, "text to image R@1 of the match logit, %", ("embedding alone", level))


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("configs", nargs="*", help="YAML files, then key=value overrides for all of them")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0], help="default: 0")
    parser.add_argument("--out", type=Path, default=Path("runs/ablations"), help="default: runs/ablations")
    parser.add_argument("--plot", nargs="+", metavar="NAME", help="configs to draw, without .yaml (default: all)")
    parser.add_argument(
        "--time-again",
        action="store_true",
        help="ms a query from one more evaluation of each config's first seed, for runs that shared a machine",
    )
    parser.add_argument("--table", type=Path, metavar="FILE.json", help="run nothing; print an ablations.json")
    parser.add_argument(
        "--against",
        nargs="+",
        metavar="NAME",
        help="with --table: differences in R@1 from the first NAME, of the other names (default: of all)",
    )
    arguments = parser.parse_intermixed_args(argv)
    if arguments.table:
        entries = read_entries(arguments.table)
        print(differences(entries, arguments.against) if arguments.against else table(entries))
        return
    overrides = [text for text in arguments.configs if "=" in text]
    configs = [Path(text) for text in arguments.configs if "=" not in text]
    missing = [str(path) for path in configs if not path.is_file()]
    if missing or not configs:
        raise UserError(f"{', '.join(missing) or 'no config given'}: no such file; pass YAML files of runs")
    names = [path.stem for path in configs]
    if len(set(names)) < len(configs):
        raise UserError("two configs have one file name; runs are kept by it, so give them different names")
    drawn = arguments.plot or names
    if unknown := sorted(set(drawn) - set(names)):
        raise UserError(f"--plot names {', '.join(unknown)}; the configs are {', '.join(names)}")
    entries = []
    for config in configs:
        folders = {seed: arguments.out / config.stem / f"seed{seed}" for seed in arguments.seeds}
        runs = [run(config, seed, folder, overrides) for seed, folder in folders.items()]
        first = folders[arguments.seeds[0]]
        timed = [evaluate(config, first, first / "timed")] if arguments.time_again else runs
        entries.append(describe(config, first, arguments.seeds, runs, timed))
        write_atomically(arguments.out / "ablations.json", json.dumps(entries, indent=1) + "\n")
    write_atomically(arguments.out / "ablations.svg", plot([entry for entry in entries if entry["name"] in drawn]))
    write_atomically(arguments.out / "ablations.md", table(entries) + "\n")
    print(table(entries))
    print(f"Plot: {arguments.out / 'ablations.svg'}")


if __name__ == "__main__":
    run_entry_point(main)
