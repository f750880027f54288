"""Which dtype is fastest on a device: asked of the device itself, never assumed.

bfloat16 is four times float32's speed on CPUs with AMX and a quarter of it on others (measured, 2 cores), so the
choice is timed on linear maps of the joint encoder's shape.
"""

from __future__ import annotations

import time
from functools import lru_cache

import torch
from torch.nn import functional as F

_ROWS, _WIDTH, _INNER = 1024, 384, 1536
"""Rows of about 12 pairs through MiniLM's feed-forward part: 1.2 GFLOP, 3 ms at 400 GFLOP/s."""
_REPETITIONS = 5
_MARGIN = 1.25
"""Linear maps are half of the encoder's time in bfloat16; a smaller gain there could be a loss as a whole."""


def fastest_dtype(device: torch.device | str) -> torch.dtype:
    """bfloat16 where it is really faster than float32, else float32.

    CUDA: where the card supports it. CPU: by a probe of about 50 ms, once a process and number of threads."""
    device = torch.device(device)
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float32
    if device.type != "cpu":
        return torch.float32
    return _probe_cpu(torch.get_num_threads())


@lru_cache
def _probe_cpu(num_threads: int) -> torch.dtype:
    """Alternates the two, so that other load on the machine hits both; compares the best of each."""
    best = {torch.float32: float("inf"), torch.bfloat16: float("inf")}
    with torch.inference_mode():
        operands = {dtype: _operands(dtype) for dtype in best}
        for _ in range(_REPETITIONS + 1):  # the first round warms up: it is never the best
            for dtype in best:
                best[dtype] = min(best[dtype], _seconds(*operands[dtype]))
    return torch.bfloat16 if best[torch.bfloat16] * _MARGIN < best[torch.float32] else torch.float32


def _operands(dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    shapes = ((_ROWS, _WIDTH), (_INNER, _WIDTH), (_WIDTH, _INNER))
    return tuple(torch.full(shape, 0.01, dtype=dtype) for shape in shapes)


def _seconds(x: torch.Tensor, up: torch.Tensor, down: torch.Tensor) -> float:
    start = time.perf_counter()
    F.linear(F.linear(x, up), down)
    return time.perf_counter() - start
