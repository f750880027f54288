"""Measure speed and write a record: its provenance (command, commit, machine, versions), and numbers with their spread.

python scripts/benchmark.py --out benchmarks/results/rerank_cpu.json --only rerank       minutes on 2 cores
python scripts/benchmark.py --device cuda --out benchmarks/results/rerank_h200.json --only rerank --pairs 4096 \\
    --rounds 7
python scripts/benchmark.py --device cuda --out benchmarks/results/step_h100.json --only step --rounds 5
python scripts/benchmark.py --out benchmarks/results/query_cpu.json --only query         4 GB of memory
python scripts/benchmark.py --out benchmarks/results/store_cpu.json --only store --rounds 50     1 GB of disk
python scripts/benchmark.py --out benchmarks/results/lists_cpu.json --only lists         3 GB of memory and of disk
python scripts/benchmark.py --out benchmarks/results/shards_cpu.json --only shards --rounds 5
python scripts/benchmark.py --out benchmarks/results/onnx_cpu.json --only onnx --pairs 128 --rounds 7
python scripts/benchmark.py --table benchmarks/results/rerank_cpu.json     a record as Markdown
python scripts/benchmark.py --table benchmarks/results/rerank_cpu.json benchmarks/results/rerank_h200.json
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

from benchmarks.tables import read_record, side_by_side, whole
from evaluation.provenance import stamp
from models.distributed import pick_device
from models.errors import UserError, run_entry_point
from models.files import write_atomically

SECTIONS = ("rerank", "query", "store", "train", "step", "lists", "shards", "onnx")


def main(argv: Sequence[str] | None = None) -> None:
    arguments = parse_arguments(argv)
    if arguments.table:
        records = [read_record(path) for path in arguments.table]
        print(side_by_side(records) if len(records) > 1 else whole(records[0], arguments.only_tables))
        return
    if not arguments.out:
        raise UserError("--out is missing; name the record to write, e.g. --out benchmarks/results/rerank_cpu.json")
    device = pick_device(arguments.device)
    record: dict[str, Any] = {"provenance": stamp(device).to_json()}
    for section in [arguments.only] if arguments.only else SECTIONS:
        record[section] = run_section(section, device, arguments)
    write_record(arguments.out, record)
    print(whole(read_record(arguments.out)))


def parse_arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="record to write, JSON")
    parser.add_argument("--only", choices=SECTIONS, help="one section; default: all")
    parser.add_argument("--device", default="cpu", help="cpu (default) or cuda")
    parser.add_argument("--pairs", type=int, default=256, help="pairs that a contestant scores per round (default 256)")
    parser.add_argument("--rounds", type=int, default=9, help="rounds that count, after one of warm-up (default 9)")
    parser.add_argument(
        "--baseline-batch", type=int, help="padded batch of BertModel (default: 32 on a CPU, 1024 on a GPU)"
    )
    parser.add_argument(
        "--train-batch", type=int, default=48, help="pairs per training step, a multiple of 6 (default %(default)s)"
    )
    parser.add_argument(
        "--step-batch",
        type=int,
        default=256,
        help="positives per step of section step, a multiple of 8 (default %(default)s)",
    )
    parser.add_argument(
        "--round-steps", type=int, default=4, help="steps of a round of section step (default %(default)s)"
    )
    parser.add_argument(
        "--list-pairs", type=int, default=5_000_000, help="pairs of the list whose memory is measured (%(default)s)"
    )
    parser.add_argument(
        "--table",
        type=Path,
        nargs="+",
        metavar="FILE.json",
        help="measure nothing; print a record as Markdown, or the reranking speed of several side by side",
    )
    parser.add_argument("--only-tables", action="store_true", help="with --table: without machine, versions and date")
    arguments = parser.parse_args(argv)
    if (
        arguments.rounds < 2
        or arguments.pairs < 1
        or (arguments.baseline_batch is not None and arguments.baseline_batch < 1)
    ):
        raise UserError("--rounds must be at least 2, --pairs and --baseline-batch at least 1")
    return arguments


def run_section(name: str, device: torch.device, arguments: argparse.Namespace) -> dict[str, Any]:
    """One section of the record. Imported when it is run: a machine may lack what other sections need."""
    if name == "store":
        from benchmarks.store import benchmark_store

        return benchmark_store(arguments.rounds)
    if name == "query":
        from benchmarks.query import benchmark_query

        return benchmark_query(device, arguments.rounds)
    if name == "train":
        from benchmarks.train import benchmark_train

        return benchmark_train(device, arguments.rounds, arguments.train_batch)
    if name == "step":
        from benchmarks.train_step import benchmark_step

        return benchmark_step(device, arguments.rounds, arguments.step_batch, arguments.round_steps)
    if name in ("lists", "shards"):
        from benchmarks.data import benchmark_lists, benchmark_shards

        return benchmark_lists(arguments.list_pairs) if name == "lists" else benchmark_shards(arguments.rounds)
    if name == "onnx":
        from benchmarks.onnx import benchmark_onnx

        return benchmark_onnx(arguments.pairs, arguments.rounds)
    from benchmarks.rerank import benchmark_rerank

    return benchmark_rerank(device, arguments.pairs, arguments.rounds, arguments.baseline_batch)


def write_record(path: Path, record: dict[str, Any]) -> None:
    """Whole or not at all: a temporary file, then a rename."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    run_entry_point(main)
