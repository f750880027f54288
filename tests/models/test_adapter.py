"""How the compression adapter starts; what it computes is checked in test_parity.py."""

import pytest
import torch

from models.adapter import TokenCompressionAdapter
from models.config import AdapterConfig


@pytest.mark.parametrize("configured, deviation", [(None, 64**-0.5), (4.0, 4.0)])
def test_queries_start_with_the_configured_deviation(configured, deviation):
    torch.manual_seed(0)
    config = AdapterConfig(num_tokens=32, mlp_width=8, num_heads=4, query_std=configured)
    query = TokenCompressionAdapter(config, patch_width=64, hidden_size=16).query
    assert query.std().item() == pytest.approx(deviation, rel=0.1)
