"""The fused form computes what the plain one does, and is chosen by the instruction set alone."""

import pytest
import torch

from models.encoder import linear
from models.encoder.linear import FusedLinear, Linear, fuse

needs_operators = pytest.mark.skipif(
    not hasattr(torch.ops.mkldnn, "_reorder_linear_weight"), reason="this build has no oneDNN operators"
)


@pytest.fixture
def plain() -> Linear:
    return Linear(torch.randn(48, 32), torch.randn(48))


@needs_operators
@torch.no_grad()
@pytest.mark.parametrize("activation", sorted(linear.ACTIVATIONS))
def test_the_fused_form_computes_what_the_plain_one_does(plain, activation):
    fused = FusedLinear(torch.ops.mkldnn._reorder_linear_weight(plain.weight), plain.bias)
    x, residual = torch.randn(7, 32), torch.randn(7, 48)
    torch.testing.assert_close(fused(x), plain(x), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(fused.activated(x, activation), plain.activated(x, activation), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(fused.added_to(residual, x, 0.0), plain.added_to(residual, x, 0.0), atol=1e-5, rtol=1e-5)


@needs_operators
@torch.no_grad()
@pytest.mark.parametrize("capability, expected", [("AVX512", FusedLinear), ("AVX2", Linear), ("DEFAULT", Linear)])
def test_the_instruction_set_decides_on_the_form(plain, capability, expected, monkeypatch):
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    assert type(fuse(plain)) is expected


def test_a_fused_map_has_no_dropout(plain):
    with pytest.raises(ValueError, match="no dropout"):
        FusedLinear(plain.weight, plain.bias).added_to(torch.randn(7, 48), torch.randn(7, 32), 0.1)
