"""How the benchmark times: contestants alternate in one process.

Other load on a machine hits all contestants alike when they alternate, so ratios are taken within a round and their
median is reported; the absolute rates still depend on the load, which the record's provenance gives.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from tqdm import tqdm

ROOT = Path(__file__).resolve().parents[1]


def synchronise(device: torch.device) -> None:
    """Wait for the GPU; nothing to do on a CPU."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def seconds_of(run: Callable[[], object], device: torch.device) -> float:
    """Wall-clock seconds of one call, the GPU's work included."""
    synchronise(device)
    start = time.perf_counter()
    run()
    synchronise(device)
    return time.perf_counter() - start


def alternate(
    contestants: Mapping[str, Callable[[], object]], rounds: int, warm_up: int, device: torch.device
) -> dict[str, list[float]]:
    """Seconds of each contestant in each of `rounds` rounds; a round runs every contestant once."""
    seconds: dict[str, list[float]] = {name: [] for name in contestants}
    for number in tqdm(range(warm_up + rounds), desc="rounds"):
        for name, run in contestants.items():
            elapsed = seconds_of(run, device)
            if number >= warm_up:
                seconds[name].append(elapsed)
    return seconds


def spread(values: list[float]) -> dict[str, float]:
    """Median, 10th and 90th percentile; at least two values."""
    deciles = statistics.quantiles(values, n=10, method="inclusive")
    return {"median": statistics.median(values), "p10": deciles[0], "p90": deciles[-1]}


def ratio(slower: list[float], faster: list[float]) -> dict[str, float]:
    """How many times as fast the second is, round by round."""
    return spread([a / b for a, b in zip(slower, faster, strict=True)])


def matmul_peak(dtype: torch.dtype, device: torch.device) -> float:
    """Floating point operations a second of a square matrix product that fills the device, the best of 12."""
    size = 2048 if device.type == "cpu" else 8192
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    fastest = min(seconds_of(lambda: a @ b, device) for _ in range(12))
    return 2 * size**3 / fastest
