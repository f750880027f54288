"""How the benchmark times: contestants alternate in one process, and its record says on what they ran.

Other load on a machine hits all contestants alike when they alternate, so ratios are taken within a round and their
median is reported; the absolute rates still depend on the load, which the record gives.
"""

from __future__ import annotations

import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from tqdm import tqdm

ROOT = Path(__file__).resolve().parents[1]


def synchronise(device: torch.device) -> None:
    """Wait for the GPU; nothing to do on a CPU."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def seconds_of(run: Callable[[], Any], device: torch.device) -> float:
    """Wall-clock seconds of one call, the GPU's work included."""
    synchronise(device)
    start = time.perf_counter()
    run()
    synchronise(device)
    return time.perf_counter() - start


def alternate(
    contestants: dict[str, Callable[[], Any]], rounds: int, warm_up: int, device: torch.device
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


def environment(device: torch.device) -> dict[str, Any]:
    """Machine, versions and commit of a run."""
    return {
        "commit": _git("rev-parse", "HEAD") + ("+changes" if _git("status", "--porcelain", "-uno") else ""),
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else _cpu_name(),
        "threads": torch.get_num_threads(),
        "load_average": os.getloadavg()[0],
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
    }


def _git(*arguments: str) -> str:
    done = subprocess.run(["git", "-C", str(ROOT), *arguments], capture_output=True, text=True)
    return done.stdout.strip() if done.returncode == 0 else ""


def _cpu_name() -> str:
    """Model name and the instruction sets that decide the speed of bfloat16."""
    information = Path("/proc/cpuinfo")
    lines = information.read_text().splitlines() if information.exists() else []
    fields = dict(line.split("\t: ", 1) if "\t: " in line else (line, "") for line in reversed(lines))
    fields = {name.strip(): value for name, value in fields.items()}
    flags = [flag for flag in ("avx2", "avx512f", "avx512_bf16", "amx_bf16") if flag in fields.get("flags", "").split()]
    return f"{fields.get('model name', platform.processor())} ({', '.join(flags)})"
