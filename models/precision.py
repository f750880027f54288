"""Which dtype is fastest on a device: asked of the device itself, never assumed.

bfloat16 is four times float32's speed on CPUs with AMX and a quarter of it on others (measured, 2 cores), so the
choice is timed on linear maps of the joint encoder's shape.
"""

from __future__ import annotations

import time
from functools import lru_cache

import torch
from torch.nn import functional as F

_WIDTH, _INNER = 384, 1536
_FEW_ROWS, _ROWS = 128, 1024
"""1024 rows, about 12 pairs, through MiniLM's feed-forward part: 1.2 GFLOP, 3 ms at 400 GFLOP/s. A CPU without any
bfloat16 arithmetic was measured at 8 GFLOP/s: it fails on a few rows already, in a quarter of a second."""
_HOPELESS = 2
"""So many times as slow on a few rows, bfloat16 is not tried on many."""
_REPETITIONS = 5
_MARGIN = 1.25
"""Linear maps are half of the encoder's time in bfloat16; a smaller gain there could be a loss as a whole."""


def fastest_dtype(device: torch.device | str) -> torch.dtype:
    """bfloat16 where it is really faster than float32, else float32.

    CUDA: where the card supports it. CPU: by a probe of at most a quarter of a second, once a process and number of
    threads."""
    device = torch.device(device)
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float32
    if device.type != "cpu":
        return torch.float32
    return _probe_cpu(torch.get_num_threads())


def dtype_name(dtype: torch.dtype) -> str:
    """Such as `bfloat16`, as configs and records spell it."""
    return str(dtype).removeprefix("torch.")


@lru_cache
def _probe_cpu(num_threads: int) -> torch.dtype:
    few = _best_seconds(_FEW_ROWS)
    if few[torch.bfloat16] > _HOPELESS * few[torch.float32]:
        return torch.float32
    best = _best_seconds(_ROWS)
    return torch.bfloat16 if best[torch.bfloat16] * _MARGIN < best[torch.float32] else torch.float32


@torch.inference_mode()
def _best_seconds(rows: int) -> dict[torch.dtype, float]:
    """Alternates the two dtypes, so that other load on the machine hits both, and takes the best of each."""
    operands = {dtype: _operands(dtype, rows) for dtype in (torch.float32, torch.bfloat16)}
    rounds = [{dtype: _seconds(*operands[dtype]) for dtype in operands} for _ in range(_REPETITIONS + 1)]
    return {dtype: min(seconds[dtype] for seconds in rounds) for dtype in operands}  # the first round warms up


def _operands(dtype: torch.dtype, rows: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    shapes = ((rows, _WIDTH), (_INNER, _WIDTH), (_WIDTH, _INNER))
    return tuple(torch.full(shape, 0.01, dtype=dtype) for shape in shapes)


def _seconds(x: torch.Tensor, up: torch.Tensor, down: torch.Tensor) -> float:
    start = time.perf_counter()
    F.linear(F.linear(x, up), down)
    return time.perf_counter() - start
