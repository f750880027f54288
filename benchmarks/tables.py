"""Benchmark records as Markdown: one record whole, or the reranking speed of several side by side.

print(whole(read_record(Path("benchmarks/results/store_cpu.json"))))
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from evaluation.json_fields import read_json_object
from evaluation.provenance import Provenance
from models.errors import UserError

SPREAD = "median (10th to 90th percentile)"
DTYPES = ("float32", "bfloat16")


def read_record(path: Path) -> dict[str, Any]:
    """A record of scripts/benchmark.py: `provenance` as a Provenance, and its sections. Raises UserError naming the
    file."""
    fields = read_json_object(path, "benchmark record of scripts/benchmark.py")
    if not SECTION_TABLES.keys() & fields.content.keys():
        raise UserError(f"{fields.where}it has none of {', '.join(SECTION_TABLES)}; write one with --out")
    return fields.content | {"provenance": Provenance.from_json(fields.inside("provenance"))}


def whole(record: dict[str, Any], only_tables: bool = False) -> str:
    """What was measured on, unless `only_tables`, and a table or more for each section."""
    tables = [table for name, make in SECTION_TABLES.items() if name in record for table in make(record[name])]
    return "\n\n".join(tables if only_tables else [record["provenance"].title(), *tables])


def markdown(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table, its first column aligned to the left and the others to the right."""
    lines = ["| " + " | ".join(cells) + " |" for cells in (header, *rows)]
    return "\n".join([lines[0], "|---|" + "---:|" * (len(header) - 1), *lines[1:]])


def rerank_tables(section: dict[str, Any]) -> list[str]:
    """Rates, ratios, and the time of one call where the record has it."""
    rates = []
    for result in section["results"]:
        share = f"{result['share_of_matmul_peak']:.0%}"
        rates.append((result["name"], spread_text(result["pairs_per_second"], ".0f"), share))
    ratios = [(row["name"], f"{row['reached']['median']:.2f}", str(row["target"] or "–")) for row in section["ratios"]]
    tables = [
        markdown(("contestant", f"pairs/s, {SPREAD}", "share of matmul peak"), rates),
        markdown(("comparison", "times as fast", "target"), ratios),
    ]
    if "calls" in section:
        calls = section["calls"]
        tables.append(times_table(f"one call of {calls['pairs']} pairs, {calls['dtype']}", calls["milliseconds"]))
    return tables + (gpu_tables(section["gpu"], section["calls"]["dtype"]) if "gpu" in section else [])


def gpu_tables(section: dict[str, Any], dtype: str) -> list[str]:
    """Few tokens, a query from a store, and the share of each kernel in a layer's time."""
    few, query, kernels = section["few_tokens"], section["query_from_store"], section["kernels"]
    rate = spread_text(few["pairs_per_second"], ",.0f")
    name = f"1 query, {query['candidates']} candidates from a store on disk, {dtype}"
    shares = [
        (
            row["name"][:60].replace("|", "/"),
            f"{row['launches']}",
            f"{row['microseconds'] / kernels['microseconds']:.1%}",
        )
        for row in kernels["by_kernel"]
        if row["microseconds"] >= 0.01 * kernels["microseconds"]
    ]
    return [
        markdown(
            (f"{few['vision_tokens']} vision tokens, {few['caption_pieces']} word pieces", f"pairs/s, {SPREAD}"),
            [(f"ours {dtype}", rate)],
        ),
        times_table("from store to logits", {name: query["milliseconds"]}),
        markdown(("kernel", "launches", "share of the GPU's time"), shares),
    ]


def query_tables(section: dict[str, Any]) -> list[str]:
    what = f"1 query, {section['candidates']} candidates of {section['tokens']} tokens, {section['dtype']}"
    return [times_table(f"{what}, text tower of {section['backbone']}", section["milliseconds"])]


def store_tables(section: dict[str, Any]) -> list[str]:
    what = f"{section['fetched']} of {section['items']:,} items, {section['tokens']} x {section['width']}"
    return [times_table(f"fetch of {what}", section["milliseconds"])]


def times_table(what: str, milliseconds: dict[str, dict[str, float]]) -> str:
    return markdown((what, f"ms, {SPREAD}"), ((name, spread_text(time, ".2f")) for name, time in milliseconds.items()))


def train_tables(section: dict[str, Any]) -> list[str]:
    rows = [(name, f"{rate['median']:.2f}") for name, rate in section["steps_per_second"].items()]
    rows.append(("times as fast", f"{section['ratio']['median']:.1f}"))
    return [markdown((f"training, {section['backbone']}, {section['batch_size']} pairs per step", "steps/s"), rows)]


def step_tables(section: dict[str, Any]) -> list[str]:
    ways = list(dict.fromkeys(way for row in section["results"].values() for way in row["pairs_per_second"]))
    rows = []
    for name, row in section["results"].items():
        rates = row["pairs_per_second"]
        ratio = f"{row['ratio']['median']:.1f}" if "ratio" in row else "–"
        rows.append((name, *(f"{rates[way]['median']:,.0f}" if way in rates else "–" for way in ways), ratio))
    header = (
        f"pairs trained/s, {section['batch_size']} positives per step, {section['dtype']}",
        *ways,
        "times as fast",
    )
    return [markdown(header, rows)]


def lists_tables(section: dict[str, Any]) -> list[str]:
    rows = []
    for name, row in section["lists"].items():
        main, workers = row["pss_bytes_main"], row["pss_bytes_workers"]
        sizes = (row["peak_bytes_to_read"], main, workers, main + workers)
        rows.append((name, f"{row['seconds_to_read']:.1f} s", *(f"{size / 1e9:.2f} GB" for size in sizes)))
    header = (f"list, {section['workers']} workers", "read once in", "at a peak of", "main process", "workers", "all")
    return [markdown(header, rows)]


def shards_tables(section: dict[str, Any]) -> list[str]:
    rows = []
    for name, row in section["comparisons"].items():
        rates = (f"{rate['median']:,.0f}" for rate in row["images_per_second"].values())
        rows.append((name, *rates, f"{row['ratio_of_medians']:.2f}"))
    return [markdown((f"images/s, {section['processes']} processes", "from shards", "PIL alone", "ratio"), rows)]


def onnx_tables(section: dict[str, Any]) -> list[str]:
    rows = []
    for name, rate in section["pairs_per_second"].items():
        ratio = section["torch_times_as_fast"].get(name)
        rows.append((name, spread_text(rate, ".1f"), f"{ratio['median']:.2f}" if ratio else "–"))
    return [markdown((f"float32, threads: {section['threads']}", f"pairs/s, {SPREAD}", "torch is times as fast"), rows)]


SECTION_TABLES = {
    "rerank": rerank_tables,
    "query": query_tables,
    "store": store_tables,
    "train": train_tables,
    "step": step_tables,
    "lists": lists_tables,
    "shards": shards_tables,
    "onnx": onnx_tables,
}
"""Sections of a record, in the order of their tables."""


def spread_text(figures: dict[str, float], form: str) -> str:
    return f"{figures['median']:{form}} ({figures['p10']:{form}} to {figures['p90']:{form}})"


def side_by_side(records: Sequence[dict[str, Any]]) -> str:
    """Median pairs/s of reranking: a row per contestant, a column per record and dtype; then ms per call."""
    columns = [(record, dtype) for record in records for dtype in DTYPES]
    cells: dict[str, dict[int, str]] = {}
    for number, (record, dtype) in enumerate(columns):
        if "rerank" not in record:
            raise UserError("side by side stand records with a section `rerank` alone; leave the others out")
        for result in record["rerank"]["results"]:
            name, of_dtype, rest = result["name"].partition(f" {dtype}, ")
            if of_dtype:
                cells.setdefault(f"{name}, {rest}", {})[number] = f"{result['pairs_per_second']['median']:,.0f}"
        calls = record["rerank"].get("calls", {})
        for name, time in calls.get("milliseconds", {}).items() if calls.get("dtype") == dtype else ():
            row = f"ours, one call of {calls['pairs']} pairs, {name}"
            cells.setdefault(row, {})[number] = f"{time['median']:,.{0 if time['median'] >= 100 else 1}f} ms"
    machines = [record["provenance"].machine for record, _ in columns]
    header = ["pairs/s", *(f"{m.gpu or m.cpu} {dtype}" for m, (_, dtype) in zip(machines, columns, strict=True))]
    rows = [[name, *(row.get(number, "–") for number in range(len(columns)))] for name, row in cells.items()]
    calls_last = sorted(rows, key=lambda row: ", one call of " in row[0])
    return markdown(header, calls_last)
