"""Measure speed and write a record: command, commit, machine, versions, and every number with its spread.

python scripts/benchmark.py --out benchmarks/results/rerank_cpu.json --only rerank       minutes on 2 cores
python scripts/benchmark.py --device cuda --out benchmarks/results/rerank_h200.json --only rerank --pairs 4096 \\
    --rounds 7
python scripts/benchmark.py --out benchmarks/results/store_cpu.json --only store --rounds 50     1 GB of disk
python scripts/benchmark.py --out benchmarks/results/lists_cpu.json --only lists         3 GB of memory and of disk
python scripts/benchmark.py --out benchmarks/results/shards_cpu.json --only shards --rounds 5
python scripts/benchmark.py --table benchmarks/results/rerank_cpu.json     the README's table from a record
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch  # noqa: E402

from benchmarks.data import benchmark_lists, benchmark_shards  # noqa: E402
from benchmarks.rerank import benchmark_rerank  # noqa: E402
from benchmarks.store import benchmark_store  # noqa: E402
from benchmarks.timing import environment  # noqa: E402
from benchmarks.train import benchmark_train  # noqa: E402
from models.distributed import pick_device  # noqa: E402
from models.errors import UserError, run_entry_point  # noqa: E402
from models.files import write_atomically  # noqa: E402

SECTIONS = ("rerank", "store", "train", "lists", "shards")


def main() -> None:
    arguments = parse_arguments()
    if arguments.table:
        print(markdown(read_record(arguments.table)))
        return
    if not arguments.out:
        raise UserError("--out is missing; name the record to write, e.g. --out benchmarks/results/rerank_cpu.json")
    device = pick_device(arguments.device)
    record: dict[str, Any] = {"command": shlex.join(["python", *sys.argv]), **environment(device)}
    for section in [arguments.only] if arguments.only else SECTIONS:
        record[section] = run_section(section, device, arguments)
    write_record(arguments.out, record)
    print(markdown(record))


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="record to write, JSON")
    parser.add_argument("--only", choices=SECTIONS, help="one section; default: all")
    parser.add_argument("--device", default="cpu", help="cpu (default) or cuda")
    parser.add_argument("--pairs", type=int, default=256, help="pairs a contestant scores in a round (default 256)")
    parser.add_argument("--rounds", type=int, default=9, help="rounds that count, after one of warm-up (default 9)")
    parser.add_argument(
        "--baseline-batch", type=int, help="padded batch of BertModel (default: 32 on a CPU, 1024 on a GPU)"
    )
    parser.add_argument(
        "--train-batch", type=int, default=48, help="pairs a training step, a multiple of 6 (default %(default)s)"
    )
    parser.add_argument(
        "--list-pairs", type=int, default=5_000_000, help="pairs of the list whose memory is measured (%(default)s)"
    )
    parser.add_argument("--table", type=Path, metavar="FILE.json", help="print a record as Markdown; measures nothing")
    arguments = parser.parse_args()
    if (
        arguments.rounds < 2
        or arguments.pairs < 1
        or (arguments.baseline_batch is not None and arguments.baseline_batch < 1)
    ):
        raise UserError("--rounds must be at least 2, --pairs and --baseline-batch at least 1")
    return arguments


def run_section(name: str, device: torch.device, arguments: argparse.Namespace) -> dict[str, Any]:
    """One section of the record."""
    if name == "store":
        return benchmark_store(arguments.rounds)
    if name == "train":
        return benchmark_train(device, arguments.rounds, arguments.train_batch)
    if name == "lists":
        return benchmark_lists(arguments.list_pairs)
    if name == "shards":
        return benchmark_shards(arguments.rounds)
    return benchmark_rerank(device, arguments.pairs, arguments.rounds, arguments.baseline_batch)


def write_record(path: Path, record: dict[str, Any]) -> None:
    """Whole or not at all: a temporary file, then a rename."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, json.dumps(record, indent=1) + "\n")


def read_record(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: not a benchmark record ({error}); write one with --out") from error


def markdown(record: dict[str, Any]) -> str:
    """A record as the README shows it."""
    versions = ", ".join(f"{name} {version}" for name, version in record["versions"].items())
    lines = [f"{record['device']}, {record['threads']} threads; {versions}; {record['date']}", ""]
    if "rerank" in record:
        lines += rerank_table(record["rerank"])
    if "store" in record:
        lines += ["", *store_table(record["store"])]
    if "train" in record:
        lines += ["", *train_table(record["train"])]
    if "lists" in record:
        lines += ["", *lists_table(record["lists"])]
    if "shards" in record:
        lines += ["", *shards_table(record["shards"])]
    return "\n".join(lines)


def rerank_table(section: dict[str, Any]) -> list[str]:
    lines = ["| contestant | pairs/s, median (10th to 90th percentile) | share of matmul peak |", "|---|---|---|"]
    for result in section["results"]:
        rate = result["pairs_per_second"]
        lines.append(
            f"| {result['name']} | {rate['median']:.0f} ({rate['p10']:.0f} to {rate['p90']:.0f}) "
            f"| {result['share_of_matmul_peak']:.0%} |"
        )
    lines += ["", "| comparison | times as fast | target |", "|---|---|---|"]
    for row in section["ratios"]:
        lines.append(f"| {row['name']} | {row['reached']['median']:.2f} | {row['target'] or '–'} |")
    if "calls" not in section:  # an older record
        return lines
    calls = section["calls"]
    return [*lines, "", *times_table(f"one call of {calls['pairs']} pairs, {calls['dtype']}", calls["milliseconds"])]


def store_table(section: dict[str, Any]) -> list[str]:
    what = f"{section['fetched']} of {section['items']:,} items, {section['tokens']} x {section['width']}"
    return times_table(f"fetch of {what}", section["milliseconds"])


def times_table(what: str, milliseconds: dict[str, dict[str, float]]) -> list[str]:
    lines = [f"| {what} | ms, median (10th to 90th percentile) |", "|---|---|"]
    for name, time in milliseconds.items():
        lines.append(f"| {name} | {time['median']:.2f} ({time['p10']:.2f} to {time['p90']:.2f}) |")
    return lines


def train_table(section: dict[str, Any]) -> list[str]:
    lines = [f"| training, {section['backbone']}, {section['batch_size']} pairs a step | steps/s |", "|---|---|"]
    lines += [f"| {name} | {rate['median']:.2f} |" for name, rate in section["steps_per_second"].items()]
    return [*lines, f"| times as fast | {section['ratio']['median']:.1f} |"]


def lists_table(section: dict[str, Any]) -> list[str]:
    lines = [f"| list, {section['workers']} workers | main process | workers | all |", "|---|---|---|---|"]
    for name, row in section["lists"].items():
        sizes = (row["pss_bytes_main"], row["pss_bytes_workers"], row["pss_bytes_main"] + row["pss_bytes_workers"])
        lines.append(f"| {name} | {' | '.join(f'{size / 1e9:.2f} GB' for size in sizes)} |")
    return lines


def shards_table(section: dict[str, Any]) -> list[str]:
    lines = [f"| images/s, {section['processes']} processes | from shards | PIL alone | ratio |", "|---|---|---|---|"]
    for name, row in section["comparisons"].items():
        rates = " | ".join(f"{rate['median']:.0f}" for rate in row["images_per_second"].values())
        lines.append(f"| {name} | {rates} | {row['ratio_of_medians']:.2f} |")
    return lines


if __name__ == "__main__":
    run_entry_point(main)
