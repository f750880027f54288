"""The dtype of matrix products: what a device computes fastest, and what a configuration asks for by name."""

from __future__ import annotations

import torch

from .errors import UserError

PRECISIONS = ("auto", "float32", "bfloat16")


def fastest_dtype(device: torch.device | str) -> torch.dtype:
    """bfloat16 where the device multiplies it in hardware, else float32.

    By instruction set, not by a stopwatch: every process of a run has to choose alike, however busy its machine is.
    CUDA: cards that support it. CPU: AVX512-BF16, which processors with AMX have too. MiniLM-L12 reranks 1.6 times as
    many pairs a second in bfloat16 on an EPYC with AVX512-BF16 and 4 times as many with AMX; without either, bfloat16
    is emulated at 0.25 to 0.72 of float32's rate."""
    device = torch.device(device)
    if device.type == "cuda":
        has_bfloat16 = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        has_bfloat16 = device.type == "cpu" and torch.cpu._is_avx512_bf16_supported()
    return torch.bfloat16 if has_bfloat16 else torch.float32


def resolve_precision(name: str, device: torch.device | str, key: str = "precision") -> torch.dtype:
    """The dtype that `auto` (the device's fastest), `float32` or `bfloat16` means.

    key: what the caller names it. Raises UserError for other names."""
    if name not in PRECISIONS:
        raise UserError(f"{key} is {name!r}; expected one of {', '.join(PRECISIONS)}")
    dtypes = {"auto": fastest_dtype(device), "float32": torch.float32, "bfloat16": torch.bfloat16}
    return dtypes[name]


def dtype_name(dtype: torch.dtype) -> str:
    """Such as `bfloat16`, as configs and records spell it."""
    return str(dtype).removeprefix("torch.")
