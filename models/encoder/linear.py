"""Linear maps of the joint encoder, alone or fused with what follows them: activation, or the residual sum.

`Linear` is plain torch: any device, autograd, autocast. `FusedLinear` is oneDNN's on CPUs with AVX-512: the weight
lies in oneDNN's blocked layout, and bias, activation and residual are added while the product is still in cache. On
a CPU with AMX these passes over memory cost more in bfloat16 than the bias-free product itself (measured, MiniLM's
feed-forward part, one thread: 29 -> 19 ms). The operators are those that torch.compile emits for CPUs; they have
no public name, so where a build lacks them `fuse` keeps the plain form. `TritonLinear` is the form for NVIDIA's Hopper
and later (kernels.py).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "gelu_new": lambda x: F.gelu(x, approximate="tanh"),
    "relu": F.relu,
}
_FUSED_ACTIVATIONS = {"gelu": ("gelu", "none"), "gelu_new": ("gelu", "tanh"), "relu": ("relu", "")}


class Norm(NamedTuple):
    """Weight and bias of a LayerNorm, both [H]."""

    weight: Tensor
    bias: Tensor


def layer_norm(x: Tensor, norm: Norm, eps: float) -> Tensor:
    """LayerNorm of rows x [R, H], in their dtype."""
    # Autocast would return float32, which every map behind it reads as a copy; the kernel sums in float32 anyway.
    with torch.autocast(x.device.type, enabled=False):
        return F.layer_norm(x, x.shape[-1:], norm.weight.to(x.dtype), norm.bias.to(x.dtype), eps)


@dataclass(frozen=True)
class Linear:
    """x [T, in] -> [T, out], with weight [out, in] and bias [out]."""

    weight: Tensor
    bias: Tensor

    def __call__(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias)

    def activated(self, x: Tensor, activation: str) -> Tensor:
        """activation(self(x))"""
        return ACTIVATIONS[activation](self(x))

    def added_to(self, residual: Tensor, x: Tensor, dropout: float) -> Tensor:
        """residual + dropout(self(x))"""
        mapped = self(x)
        return residual + (F.dropout(mapped, dropout) if dropout else mapped)

    def added_and_normed(self, residual: Tensor, x: Tensor, dropout: float, norm: Norm, eps: float) -> Tensor:
        """LayerNorm of added_to(...)"""
        return layer_norm(self.added_to(residual, x, dropout), norm, eps)


@dataclass(frozen=True)
class FusedLinear(Linear):
    """The same for inference on a CPU. `weight` is opaque: only oneDNN's operators read it."""

    def __reduce__(self) -> tuple[Callable[[Linear], Linear], tuple[Linear]]:
        # An opaque weight cannot be pickled, and the machine that reads it may have no such form.
        return fuse, (Linear(self.weight.to_dense(), self.bias),)

    def __call__(self, x: Tensor) -> Tensor:
        return torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, "none", [], "")

    def activated(self, x: Tensor, activation: str) -> Tensor:
        name, algorithm = _FUSED_ACTIVATIONS[activation]
        return torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, name, [], algorithm)

    def added_to(self, residual: Tensor, x: Tensor, dropout: float) -> Tensor:
        if dropout:
            raise ValueError("a fused linear map is for inference; it has no dropout")
        return torch.ops.mkldnn._linear_pointwise.binary(x, residual, self.weight, self.bias, "add")


@dataclass(frozen=True)
class TritonLinear(Linear):
    """The same for inference on a GPU: cuBLAS's product where only a bias follows or a norm, Triton's with an
    activation."""

    def activated(self, x: Tensor, activation: str) -> Tensor:
        from . import kernels

        if not kernels.suits_linear(*self.weight.shape[::-1]):
            return super().activated(x, activation)
        return kernels.linear_activated(x, self.weight, self.bias, activation)

    def added_and_normed(self, residual: Tensor, x: Tensor, dropout: float, norm: Norm, eps: float) -> Tensor:
        from . import kernels

        if dropout or not kernels.suits_norm(len(self.weight)):
            return super().added_and_normed(residual, x, dropout, norm, eps)
        return kernels.add_norm(self(x), residual, norm.weight, norm.bias, eps)


@cache
def has_triton(device: torch.device) -> bool:
    """Whether kernels.py runs there: it needs Triton, which comes with torch for CUDA, and a Hopper GPU or later."""
    if device.type != "cuda" or find_spec("triton") is None:
        return False
    return torch.cuda.get_device_capability(device) >= (9, 0)


def fuse(linear: Linear) -> Linear:
    """The fastest inference form of `linear` for its device and dtype; `linear` itself where there is no other."""
    if linear.weight.dtype == torch.bfloat16 and has_triton(linear.weight.device):
        return TritonLinear(linear.weight, linear.bias)
    if not _has_fused_form(linear.weight.device, linear.weight.dtype):
        return linear
    return FusedLinear(torch.ops.mkldnn._reorder_linear_weight(linear.weight), linear.bias)


def _has_fused_form(device: torch.device, dtype: torch.dtype) -> bool:
    operators = torch.ops.mkldnn
    if device.type != "cpu" or not torch.backends.mkldnn.is_available():
        return False
    if torch.backends.cpu.get_cpu_capability() != "AVX512":
        # By instruction set, not by a probe: every process must choose alike, or rankings would differ by rounding.
        # With AVX2 alone (an AMD EPYC, two cores) a layer's five maps took 61 ms fused and 52 ms plain.
        return False
    if not (hasattr(operators, "_linear_pointwise") and hasattr(operators, "_reorder_linear_weight")):
        return False
    return dtype == torch.float32 or (dtype == torch.bfloat16 and operators._is_mkldnn_bf16_supported())
