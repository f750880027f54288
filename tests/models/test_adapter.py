"""Adapters' configurations and starts, position codes; test_parity.py checks what the compression adapter computes."""

from pathlib import Path

import pytest
import torch

from models.config import (
    ADAPTER_CONFIGS,
    AdapterConfig,
    BackboneDims,
    CompressionConfig,
    KMeansConfig,
    LocalConfig,
    PoolingConfig,
)
from models.config_io import from_dict, to_dict
from models.errors import UserError
from models.vision.adapters import TokenCompressionAdapter, build_adapter, nearest_centres
from models.vision.position_codes import position_codes
from training.config import RunConfig
from training.sweep import read_sweep


def dims(num_patches: int = 64, patch_width: int = 64) -> BackboneDims:
    return BackboneDims(num_patches=num_patches, patch_width=patch_width, embedding_width=8)


@pytest.mark.parametrize("configured, deviation", [(None, 64**-0.5), (4.0, 4.0)])
def test_queries_start_with_the_configured_deviation(configured, deviation):
    torch.manual_seed(0)
    config = CompressionConfig(num_tokens=32, mlp_width=8, num_heads=4, query_std=configured)
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
def test_with_position_codes_each_query_starts_at_its_own_cell(num_tokens, rows, columns):
    torch.manual_seed(0)
    config = CompressionConfig(num_tokens=num_tokens, mlp_width=8, num_heads=4, position_codes=1.0)
    adapter = TokenCompressionAdapter(config, dims(patch_width=128), hidden_size=16)
    with torch.no_grad():
        attention = attention_of_queries(adapter, torch.randn(20, 64, 128)).unflatten(1, (8, 8))
    cells = attention.unflatten(1, (rows, -1)).unflatten(-1, (columns, -1)).sum((2, 4)).flatten(1)
    assert torch.equal(cells.argmax(1), torch.arange(num_tokens))
    assert cells.diagonal().mean() > 1.5 / num_tokens


def test_equal_patches_become_different_tokens_with_position_codes_only():
    patches = torch.randn(1, 1, 64).expand(1, 64, 64)
    for kind in ("compression", "local"):
        for amplitude in (0.0, 1.0):
            torch.manual_seed(0)
            config = ADAPTER_CONFIGS[kind](num_tokens=4, mlp_width=8, num_heads=4, position_codes=amplitude)
            moved = build_adapter(config, dims(), 16)
            with torch.no_grad():
                tokens = moved(patches + (torch.arange(64)[None, :, None] == 3).float())
                elsewhere = moved(patches + (torch.arange(64)[None, :, None] == 60).float())
            summed = tokens.sum(1), elsewhere.sum(1)
            assert torch.allclose(*summed, atol=1e-5) == (amplitude == 0), (kind, amplitude)
            assert ("places" in moved.state_dict()) == (amplitude > 0)


def test_codes_are_nearer_the_nearer_the_positions():
    positions = torch.tensor([[0.0, 0.0], [0.0, 1.0], [0.0, 3.0], [7.0, 7.0]])
    codes = position_codes(positions, 100.0 ** (-torch.arange(16) / 16))
    distances = (codes - codes[0]).norm(dim=1)
    assert distances[0] == 0 and distances.diff().min() > 0


def test_position_codes_need_a_square_grid_and_a_width_of_quarters():
    config = CompressionConfig(num_tokens=4, mlp_width=8, num_heads=2, position_codes=1.0)
    with pytest.raises(UserError, match="square grid of patches"):
        build_adapter(config, dims(num_patches=50), 16)
    with pytest.raises(UserError, match="64 patches of 62"):
        build_adapter(config, dims(patch_width=62), 16)
    with pytest.raises(UserError, match="position_codes is -1"):
        CompressionConfig(position_codes=-1.0)
    with pytest.raises(UserError, match="no effect with adapter.position_codes"):
        CompressionConfig(position_codes=1.0, query_std=4.0)


def small(kind: str, **changes) -> torch.nn.Module:
    torch.manual_seed(0)
    return build_adapter(ADAPTER_CONFIGS[kind](mlp_width=8, num_heads=4, **changes), dims(), 16)


@pytest.mark.parametrize("num_tokens, rows, columns", [(1, 1, 1), (8, 2, 4), (16, 4, 4)])
def test_pooling_is_the_mlp_of_the_mean_of_each_cell(num_tokens, rows, columns):
    adapter, patches = small("pooling", num_tokens=num_tokens), torch.randn(2, 64, 64)
    high, wide = 8 // rows, 8 // columns
    square = patches.view(2, 8, 8, 64)
    cells = [
        square[:, r * high : (r + 1) * high, c * wide : (c + 1) * wide].mean((1, 2))
        for r in range(rows)
        for c in range(columns)
    ]
    expected = adapter.fc2(torch.nn.functional.gelu(adapter.fc1(torch.stack(cells, 1))))
    assert torch.allclose(adapter(patches), expected, atol=1e-5)


def test_kmeans_finds_the_objects_of_an_image_wherever_they_lie():
    adapter = small("kmeans", num_tokens=4)
    objects = 10 * torch.randn(4, 64)
    belongs = torch.arange(64).view(8, 8) // 4 % 2 + 2 * (torch.arange(64).view(8, 8) // 32)
    belongs[0, :3] = 3  # what a mean over a cell of the grid mixes
    patches = objects[belongs.flatten()][None]
    expected = adapter.fc2(torch.nn.functional.gelu(adapter.fc1(objects)))
    assert torch.allclose(adapter(patches)[0], expected, atol=1e-4)


def test_kmeans_clusters_each_image_by_itself_and_survives_empty_clusters():
    patches = torch.randn(3, 64, 16)
    patches[1] = patches[1, :1]  # one patch everywhere: all but one cluster empty
    cluster = nearest_centres(patches, patches[:, :6])
    for image in range(3):
        alone = nearest_centres(patches[image : image + 1], patches[image : image + 1, :6])
        assert torch.equal(alone[0], cluster[image])
    assert small("kmeans", num_tokens=6)(torch.zeros(1, 64, 64)).isfinite().all()


def test_fixed_queries_get_no_gradient_and_the_rest_of_the_adapter_does():
    adapter = small("compression", num_tokens=4, learn_queries=False)
    adapter(torch.randn(2, 64, 64)).square().sum().backward()
    without = {name for name, parameter in adapter.named_parameters() if parameter.grad is None}
    assert without == {"query"}
    assert torch.equal(adapter.query, small("compression", num_tokens=4).query)


def test_further_blocks_refine_the_tokens_and_all_of_them_learn():
    adapter, patches = small("compression", num_tokens=4, num_blocks=3), torch.randn(2, 64, 64)
    tokens = adapter(patches)
    assert tokens.shape == (2, 4, 16)
    tokens.square().sum().backward()
    assert all(parameter.grad.abs().sum() > 0 for parameter in adapter.parameters() if parameter.ndim > 1)
    first = small("compression", num_tokens=4)
    assert {name for name, _ in first.named_parameters()} == {
        name for name, _ in adapter.named_parameters() if not name.startswith("further.")
    }


@pytest.mark.parametrize(
    "options, message",
    [
        ({"kind": "mean"}, "expected one of compression, local, pooling, kmeans"),
        ({"kind": "pooling", "num_blocks": 2}, "for adapter.kind 'compression', not 'pooling'"),
        ({"kind": "local", "learn_queries": False}, "for adapter.kind 'compression', not 'local'"),
        ({"num_blocks": 0}, "num_blocks is 0"),
    ],
)
def test_impossible_adapters_are_refused(options, message):
    with pytest.raises(UserError, match=message):
        from_dict(AdapterConfig, options, where="config.yaml")


def test_pooling_needs_a_square_grid_of_no_fewer_cells():
    with pytest.raises(UserError, match="50 patches"):
        build_adapter(PoolingConfig(num_tokens=4), dims(num_patches=50), 16)
    with pytest.raises(UserError, match="1 x 11 cells"):
        build_adapter(KMeansConfig(num_tokens=11), dims(), 16)


ABLATIONS = read_sweep(Path(__file__).parents[2] / "configs" / "ablations.yaml").variants


@pytest.mark.parametrize("variant", [name for name in ABLATIONS if name != "local"])
def test_every_ablation_compresses_the_patches_of_its_backbone(variant):
    config = from_dict(RunConfig, ABLATIONS[variant].config(Path("runs")), where=variant).model.adapter
    siglip2_l16 = BackboneDims(num_patches=576, patch_width=1024, embedding_width=1024)
    adapter = build_adapter(config, siglip2_l16, hidden_size=384)
    assert adapter(torch.randn(1, 576, 1024)).shape == (1, config.num_tokens, 384)


def read(section: dict[str, object]) -> AdapterConfig:
    return from_dict(AdapterConfig, section, where="config.yaml")


def test_a_section_becomes_the_configuration_of_its_kind_and_comes_back():
    for kind, cls in ADAPTER_CONFIGS.items():
        config = read({"kind": kind, "num_tokens": 4})
        assert type(config) is cls and read(to_dict(config)) == config
    assert read({}) == CompressionConfig()
    assert "num_blocks" not in to_dict(LocalConfig())


def test_a_file_of_version_1_has_every_setting_for_every_kind():
    settings = {"num_tokens": 16, "num_blocks": 1, "learn_queries": True, "mlp_width": 8, "num_heads": 4}
    settings |= {"activation": "gelu", "layer_norm_eps": 1e-6, "query_std": 4.0, "places": 0.0}
    assert read({"kind": "local", **settings}) == LocalConfig(num_tokens=16, mlp_width=8, num_heads=4)
    assert read({"kind": "compression", **settings}).query_std == 4.0


def test_position_codes_are_read_under_their_former_name_and_saved_under_todays():
    config = read({"places": 0.5})
    assert config == CompressionConfig(position_codes=0.5)
    assert to_dict(config)["position_codes"] == 0.5 and "places" not in to_dict(config)
    with pytest.raises(UserError, match="places is the former name of adapter.position_codes, and both are set"):
        read({"places": 0.5, "position_codes": 1.0})
