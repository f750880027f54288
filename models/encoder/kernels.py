"""Triton kernels for inference on a GPU: what stands between the joint encoder's matrix products, in one launch each.

Unfused, a layer of MiniLM moves 30 kB a row through the GPU's memory, and that, not arithmetic, takes most of its time.
Here the activation happens while the product is still in registers (`linear_activated`), and sums happen in the norm
that follows (`add_norm`, `embed`): 17 kB. `attention` knows that sequences are short. Sums, norms and activations are
in float32; products take, and results have, the tensors' dtype.

Measured on an H100 in ns a row and layer, and therefore not here: products with the norm fused into them (2.7 for the
wide one, cuBLAS and `add_norm` 2.5) and the whole feed-forward part as one kernel (11, spilling registers; 5.6).

Letters: T rows, H width of the encoder, K and N width of a product's input and output, D width of a head, BM, BN, BK a
block's rows, columns and inputs. Weights are torch.nn.Linear's, [N, K].
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

_LINEAR_BLOCK = (128, 128, 64)
"""BM, BN, BK. The fastest of nine on an H100, with 4 warps and 3 stages; two blocks fit a multiprocessor, so that one
computes activations while the other multiplies."""
_ATTENTION_BLOCK = (128, 32)
"""Queries and keys: the fastest of thirteen on an H100, with 4 warps and 3 stages."""
_MOST_WIDTH = 2048
"""Rows up to this width fit the registers of a block."""


def suits_linear(in_features: int, out_features: int) -> bool:
    """Whether `linear_activated` has no part of a block left over."""
    return in_features % _LINEAR_BLOCK[2] == 0 and out_features % _LINEAR_BLOCK[1] == 0


def suits_norm(width: int) -> bool:
    return width <= _MOST_WIDTH


def suits_attention(head_width: int) -> bool:
    return head_width in (16, 32, 64, 128)


def linear_activated(x: Tensor, weight: Tensor, bias: Tensor, activation: str) -> Tensor:
    """activation(x @ weight.T + bias): x [T, K] -> [T, N]. activation: gelu, gelu_new or relu."""
    (rows, inputs), outputs = x.shape, len(weight)
    result = x.new_empty(rows, outputs)
    bm, bn, bk = _LINEAR_BLOCK
    with torch.cuda.device_of(x):  # Triton launches on the current device
        _linear_kernel[(triton.cdiv(rows, bm) * (outputs // bn),)](
            TensorDescriptor.from_tensor(x, [bm, bk]),
            TensorDescriptor.from_tensor(weight, [bn, bk]),
            bias,
            TensorDescriptor.from_tensor(result, [bm, bn]),
            inputs,
            outputs,
            activation,
            bm,
            bn,
            bk,
            num_warps=4,
            num_stages=3,
        )
    return result


def add_norm(x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """LayerNorm of x + residual, [T, H]."""
    rows, width = x.shape
    result = torch.empty_like(x)
    with torch.cuda.device_of(x):
        _add_norm_kernel[(triton.cdiv(rows, 4),)](
            x, residual, weight, bias, result, rows, eps, width, triton.next_power_of_2(width), 4, num_warps=4
        )
    return result


def embed(
    embeddings: Tensor,
    positions: Tensor,
    segments: Tensor,
    position_table: Tensor,
    segment_table: Tensor,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    dtype: torch.dtype,
) -> Tensor:
    """LayerNorm of embeddings [T, H] + the tables' rows at positions and segments [T] int64, in `dtype`."""
    rows, width = embeddings.shape
    result = torch.empty(rows, width, dtype=dtype, device=embeddings.device)
    with torch.cuda.device_of(embeddings):
        _embed_kernel[(triton.cdiv(rows, 4),)](
            embeddings,
            positions,
            segments,
            position_table,
            segment_table,
            weight,
            bias,
            result,
            rows,
            eps,
            width,
            triton.next_power_of_2(width),
            4,
            num_warps=4,
        )
    return result


def attention(queries: Tensor, keys_values: Tensor, starts: Tensor, longest: int, heads: int) -> Tensor:
    """Each sequence's rows attend to each other: queries [T, H], keys_values [T, 2H], both with any row stride.

    starts: [Q + 1] int32, where sequences begin, and the end of the last; none is longer than `longest`. -> [T, H];
    rows of no sequence are not set."""
    width = queries.shape[1]
    result = torch.empty(queries.shape, dtype=queries.dtype, device=queries.device)
    bm, bn = _ATTENTION_BLOCK
    with torch.cuda.device_of(queries):
        _attention_kernel[(heads, len(starts) - 1, triton.cdiv(longest, bm))](
            queries,
            keys_values,
            starts,
            result,
            queries.stride(0),
            keys_values.stride(0),
            (width // heads) ** -0.5 * 1.4426950408889634,  # log2(e): the kernel computes powers of two
            width,
            width // heads,
            bm,
            bn,
            num_warps=4,
            num_stages=3,
        )
    return result


@triton.jit
def _activate(x, ACTIVATION: tl.constexpr):
    if ACTIVATION == "gelu":
        # x * normal CDF, the CDF's erf by a polynomial fitted to it on [-4.4, 4.4]: within 6e-5 of the exact gelu
        # everywhere that bfloat16 rounds to 4e-3 of its value, and in half the instructions of tl.erf.
        c = tl.minimum(tl.maximum(x, -4.4), 4.4)
        u = c * c
        p = 7.144421768399774e-11 * u - 7.51254265485285e-09
        p = p * u + 3.483161274684275e-07
        p = p * u - 9.45231776433851e-06
        p = p * u + 0.00016861213422360617
        p = p * u - 0.0021101369856022113
        p = p * u + 0.019286538199148953
        p = p * u - 0.13215358484876116
        p = p * u + 0.7975235800382799
        half = 0.5 * x
        x = half * (c * p) + half
    elif ACTIVATION == "gelu_new":
        x = x * tl.sigmoid(1.5957691216057308 * (x + 0.044715 * x * x * x))  # 0.5 * (1 + tanh(z)) = sigmoid(2 z)
    elif ACTIVATION == "relu":
        x = tl.maximum(x, 0.0)
    return x


@triton.jit
def _linear_kernel(
    x,
    weight,
    bias,
    result,
    K: tl.constexpr,
    N: tl.constexpr,
    ACTIVATION: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
):
    """One block [BM, BN] of the result; neighbours share their rows of x."""
    block = tl.program_id(0)
    row = (block // (N // BN)) * BM
    column = (block % (N // BN)) * BN
    sums = tl.zeros((BM, BN), tl.float32)
    for k in range(0, K, BK):
        sums = tl.dot(x.load([row, k]), weight.load([column, k]).T, sums)
    sums += tl.load(bias + column + tl.arange(0, BN))[None, :].to(tl.float32)
    result.store([row, column], _activate(sums, ACTIVATION).to(result.dtype))


@triton.jit
def _normalise(x, weight, bias, n, eps, H: tl.constexpr):
    """LayerNorm of rows x [BM, BH], of which the first H columns count."""
    mean = tl.sum(x, 1) / H
    x = tl.where(n[None, :] < H, x - mean[:, None], 0.0)
    scale = 1.0 / tl.sqrt(tl.sum(x * x, 1) / H + eps)
    w = tl.load(weight + n, mask=n < H, other=0.0).to(tl.float32)
    b = tl.load(bias + n, mask=n < H, other=0.0).to(tl.float32)
    return x * scale[:, None] * w[None, :] + b[None, :]


@triton.jit
def _add_norm_kernel(x, residual, weight, bias, result, rows, eps, H: tl.constexpr, BH: tl.constexpr, BM: tl.constexpr):
    row = tl.program_id(0).to(tl.int64) * BM + tl.arange(0, BM)
    n = tl.arange(0, BH)
    valid = (row[:, None] < rows) & (n[None, :] < H)
    at = row[:, None] * H + n[None, :]
    total = tl.load(x + at, mask=valid, other=0.0).to(tl.float32)
    total += tl.load(residual + at, mask=valid, other=0.0).to(tl.float32)
    normed = _normalise(total, weight, bias, n, eps, H)
    tl.store(result + at, normed.to(result.dtype.element_ty), mask=valid)


@triton.jit
def _embed_kernel(
    embeddings,
    positions,
    segments,
    position_table,
    segment_table,
    weight,
    bias,
    result,
    rows,
    eps,
    H: tl.constexpr,
    BH: tl.constexpr,
    BM: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * BM + tl.arange(0, BM)
    n = tl.arange(0, BH)
    valid = (row[:, None] < rows) & (n[None, :] < H)
    position = tl.load(positions + row, mask=row < rows, other=0)
    segment = tl.load(segments + row, mask=row < rows, other=0)
    at = row[:, None] * H + n[None, :]
    total = tl.load(embeddings + at, mask=valid, other=0.0).to(tl.float32)
    total += tl.load(position_table + position[:, None] * H + n[None, :], mask=valid, other=0.0)
    total += tl.load(segment_table + segment[:, None] * H + n[None, :], mask=valid, other=0.0)
    normed = _normalise(total, weight, bias, n, eps, H)
    tl.store(result + at, normed.to(result.dtype.element_ty), mask=valid)


@triton.jit
def _attention_kernel(
    queries,
    keys_values,
    starts,
    result,
    query_stride,
    key_stride,
    scale,
    H: tl.constexpr,
    D: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
):
    """BM queries of one head of one sequence against all its keys, BN at a time, by a running softmax."""
    head, sequence, block = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    first = tl.load(starts + sequence).to(tl.int64)
    length = (tl.load(starts + sequence + 1).to(tl.int64) - first).to(tl.int32)
    if block * BM < length:
        d = head * D + tl.arange(0, D)
        row = block * BM + tl.arange(0, BM)
        valid = row[:, None] < length
        query = tl.load(queries + (first + row)[:, None] * query_stride + d[None, :], mask=valid, other=0.0)
        base = keys_values + first * key_stride
        highest = tl.full((BM,), -1e30, tl.float32)
        total = tl.zeros((BM,), tl.float32)
        context = tl.zeros((BM, D), tl.float32)
        whole = (length // BN) * BN
        for start in range(0, whole, BN):
            highest, total, context = _attend(
                query, base, start, length, highest, total, context, key_stride, scale, d, H, BN, False
            )
        if whole < length:
            highest, total, context = _attend(
                query, base, whole, length, highest, total, context, key_stride, scale, d, H, BN, True
            )
        out = result + (first + row)[:, None] * H + d[None, :]
        tl.store(out, (context / total[:, None]).to(result.dtype.element_ty), mask=valid)


@triton.jit
def _attend(
    query,
    base,
    start,
    length,
    highest,
    total,
    context,
    key_stride,
    scale,
    d,
    H: tl.constexpr,
    BN: tl.constexpr,
    MASKED: tl.constexpr,
):
    """The running softmax after BN more keys; MASKED where fewer are left."""
    n = start + tl.arange(0, BN)
    key_at = base + n[None, :].to(tl.int64) * key_stride + d[:, None]
    value_at = base + n[:, None].to(tl.int64) * key_stride + (H + d)[None, :]
    if MASKED:
        key = tl.load(key_at, mask=n[None, :] < length, other=0.0)
        value = tl.load(value_at, mask=n[:, None] < length, other=0.0)
        scores = tl.where(n[None, :] < length, tl.dot(query, key), -1e30)
    else:
        key = tl.load(key_at)
        value = tl.load(value_at)
        scores = tl.dot(query, key)
    new_highest = tl.maximum(highest, tl.max(scores, 1) * scale)
    weights = tl.exp2(scores * scale - new_highest[:, None])
    shrink = tl.exp2(highest - new_highest)
    total = total * shrink + tl.sum(weights, 1)
    context = tl.dot(weights.to(value.dtype), value, context * shrink[:, None])
    return new_highest, total, context
