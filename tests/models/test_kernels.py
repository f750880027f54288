"""Triton's kernels compute what plain torch does; on a CPU, in Triton's interpreter, which is chosen on import."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")
ROOT = Path(__file__).parents[2]
CHECKS = """
import torch
from torch.nn import functional as F
from models.encoder import kernels
from models.encoder.linear import ACTIVATIONS

torch.manual_seed(0)
device = "cuda" if torch.cuda.is_available() else "cpu"
dtype = torch.bfloat16 if device == "cuda" else torch.float32  # the interpreter multiplies bfloat16 wrongly
torch.set_default_device(device)


def check(actual, expected, what):
    assert actual.dtype == dtype, what
    bound = 0.04 if dtype == torch.bfloat16 else 1e-4
    torch.testing.assert_close(actual.float(), expected, rtol=0, atol=bound, msg=lambda m: f"{what}: {m}")


rows, width, inner, heads = 150, 128, 256, 4
x, other = (torch.randn(rows, width).to(dtype) for _ in range(2))
w, b = (0.2 * torch.randn(inner, width)).to(dtype), torch.randn(inner).to(dtype)
for name, activation in ACTIVATIONS.items():
    check(kernels.linear_activated(x, w, b, name), activation(F.linear(x.float(), w.float(), b.float())), name)

spread = torch.linspace(-12, 12, rows * width).view(rows, width).to(dtype)
unit = torch.eye(width).to(dtype)
check(kernels.linear_activated(spread, unit, b[:width] * 0, "gelu"), F.gelu(spread.float()), "gelu from -12 to 12")

for width in (96, 128):
    x, other = (torch.randn(rows, width).to(dtype) for _ in range(2))
    norm = torch.rand(width), torch.randn(width)
    expected = F.layer_norm(x.float() + other.float(), (width,), *norm, 1e-12)
    check(kernels.add_norm(x, other, *norm, 1e-12), expected, "add_norm")
    tables = torch.randn(20, width), torch.randn(2, width)
    at = torch.randint(20, (rows,)), torch.randint(2, (rows,))
    expected = F.layer_norm(other.float() + tables[0][at[0]] + tables[1][at[1]], (width,), *norm, 1e-12)
    check(kernels.embed(other.float(), *at, *tables, *norm, 1e-12, dtype), expected, "embed")

lengths = [1, 5, 32, 0, 33, 70, 150, 0]  # less than a block, whole blocks, several, none
starts = torch.tensor([0, *lengths]).cumsum(0)
joined = torch.randn(sum(lengths), 3 * 64).to(dtype)
views = joined[:, :64], joined[:, 64:]
for query, keys_values in (views, [view.contiguous() for view in views]):
    actual = kernels.attention(query, keys_values, starts.int(), max(lengths), heads)
    q, k, v = (part.float().unflatten(1, (heads, -1)).transpose(0, 1) for part in joined.split(64, dim=1))
    for first, end in zip(starts.tolist(), starts.tolist()[1:]):
        if first < end:
            one = F.scaled_dot_product_attention(q[:, first:end], k[:, first:end], v[:, first:end])
            check(actual[first:end], one.transpose(0, 1).flatten(1), f"attention over {end - first}")
"""


def run_checks(**environment: str) -> None:
    done = subprocess.run([sys.executable, "-c", CHECKS], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_kernels_compute_what_torch_does_in_the_interpreter():
    run_checks(**{**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""})


@pytest.mark.gpu
def test_kernels_compute_what_torch_does_on_a_gpu():
    run_checks(**os.environ)
