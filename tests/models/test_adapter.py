"""How adapters start, and places; what the compression adapter computes is checked in test_parity.py."""

import pytest
import torch

from models.adapter import TokenCompressionAdapter, build_adapter
from models.config import AdapterConfig, BackboneDims
from models.errors import UserError
from models.places import place_codes


def dims(num_patches: int = 64, patch_width: int = 64) -> BackboneDims:
    return BackboneDims(num_patches=num_patches, patch_width=patch_width, embedding_width=8)


@pytest.mark.parametrize("configured, deviation", [(None, 64**-0.5), (4.0, 4.0)])
def test_queries_start_with_the_configured_deviation(configured, deviation):
    torch.manual_seed(0)
    config = AdapterConfig(num_tokens=32, mlp_width=8, num_heads=4, query_std=configured)
    query = TokenCompressionAdapter(config, dims(), hidden_size=16).query
    assert query.std().item() == pytest.approx(deviation, rel=0.1)


def attention_of_queries(adapter: TokenCompressionAdapter, patches: torch.Tensor) -> torch.Tensor:
    """[B, P, D] -> [M, P], mean over images and heads, by the plain definition."""
    heads, width = adapter.attention.num_heads, patches.shape[-1]
    weight_q, weight_k, _ = adapter.attention.in_proj_weight.chunk(3)
    query = (adapter.query[0] @ weight_q.T).unflatten(-1, (heads, -1))
    keys = (adapter.key(patches + adapter.places) @ weight_k.T).unflatten(-1, (heads, -1))
    logits = torch.einsum("mhd,bphd->bhmp", query, keys) / (width // heads) ** 0.5
    return logits.softmax(-1).mean((0, 1))


@pytest.mark.parametrize("num_tokens, rows, columns", [(16, 4, 4), (8, 2, 4), (4, 2, 2)])
def test_with_places_each_query_starts_at_its_own_cell(num_tokens, rows, columns):
    torch.manual_seed(0)
    config = AdapterConfig(num_tokens=num_tokens, mlp_width=8, num_heads=4, places=1.0)
    adapter = TokenCompressionAdapter(config, dims(patch_width=128), hidden_size=16)
    with torch.no_grad():
        attention = attention_of_queries(adapter, torch.randn(20, 64, 128)).unflatten(1, (8, 8))
    cells = attention.unflatten(1, (rows, -1)).unflatten(-1, (columns, -1)).sum((2, 4)).flatten(1)
    assert torch.equal(cells.argmax(1), torch.arange(num_tokens))
    assert cells.diagonal().mean() > 1.5 / num_tokens


def test_equal_patches_become_different_tokens_with_places_only():
    patches = torch.randn(1, 1, 64).expand(1, 64, 64)
    for kind in ("compression", "local"):
        for places in (0.0, 1.0):
            torch.manual_seed(0)
            config = AdapterConfig(kind=kind, num_tokens=4, mlp_width=8, num_heads=4, places=places)
            moved = build_adapter(config, dims(), 16)
            with torch.no_grad():
                tokens = moved(patches + (torch.arange(64)[None, :, None] == 3).float())
                elsewhere = moved(patches + (torch.arange(64)[None, :, None] == 60).float())
            summed = tokens.sum(1), elsewhere.sum(1)
            assert torch.allclose(*summed, atol=1e-5) == (places == 0), (kind, places)
            assert ("places" in moved.state_dict()) == (places > 0)


def test_place_codes_are_nearer_the_nearer_the_places():
    places = torch.tensor([[0.0, 0.0], [0.0, 1.0], [0.0, 3.0], [7.0, 7.0]])
    codes = place_codes(places, 100.0 ** (-torch.arange(16) / 16))
    distances = (codes - codes[0]).norm(dim=1)
    assert distances[0] == 0 and distances.diff().min() > 0


def test_places_need_a_square_grid_and_a_width_of_quarters():
    config = AdapterConfig(num_tokens=4, mlp_width=8, num_heads=2, places=1.0)
    with pytest.raises(UserError, match="square grid of patches"):
        build_adapter(config, dims(num_patches=50), 16)
    with pytest.raises(UserError, match="64 patches of 62"):
        build_adapter(config, dims(patch_width=62), 16)
    with pytest.raises(UserError, match="places is -1"):
        AdapterConfig(places=-1.0)
    with pytest.raises(UserError, match="no effect with adapter.places"):
        AdapterConfig(places=1.0, query_std=4.0)
