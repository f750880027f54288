"""From a frozen tower's patch tokens to vision tokens of the joint encoder's width.

Letters: B images, P patches, D patch width, M vision tokens, H joint encoder width, F hidden width of the MLP.
Source: EDJE (arXiv 2510.06820), adapter: A = MHA(Q, X Wk, X Wv), Y = (A + MLP(LN(A))) Wproj. Parameter names
are those of the published checkpoint.
"""

from __future__ import annotations

import math
from functools import singledispatch

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..config import AdapterConfig, BackboneDims, CompressionConfig, KMeansConfig, LocalConfig, PoolingConfig
from ..encoder.linear import ACTIVATIONS
from ..errors import UserError
from .position_codes import grid_centres, position_codes

QUERY_GAIN = 6.0
"""With position codes: how much longer than a patch's code the queries start. On patch tokens of deviation 1, some 40%
of a query's attention then lie on its own cell of 4 patches; with 1 it hardly prefers it, far above it cannot leave it.
"""
KMEANS_ROUNDS = 10


class _MLP(nn.Module):
    """fc2(act(fc1(x))), the two-layer perceptron of the adapters."""

    def __init__(self, width_in: int, hidden: int, width_out: int, activation: str):
        super().__init__()
        if activation not in ACTIVATIONS:
            raise UserError(f"adapter.activation is {activation!r}; expected one of {sorted(ACTIVATIONS)}")
        self.fc1 = nn.Linear(width_in, hidden)
        self.fc2 = nn.Linear(hidden, width_out)
        self.activation = ACTIVATIONS[activation]

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.activation(self.fc1(x)))


class _CompressionBlock(nn.Module):
    """Queries attend over the patches, then a residual MLP behind a LayerNorm."""

    def __init__(self, config: CompressionConfig, patch_width: int):
        super().__init__()
        if patch_width % config.num_heads:
            raise UserError(
                f"adapter.num_heads is {config.num_heads}; it must divide the backbone's patch width ({patch_width})"
            )
        self.key = nn.Linear(patch_width, patch_width)
        self.value = nn.Linear(patch_width, patch_width)
        self.attention = nn.MultiheadAttention(patch_width, config.num_heads, batch_first=True)
        self.layernorm = nn.LayerNorm(patch_width, eps=config.layer_norm_eps)
        self.mlp = _MLP(patch_width, config.mlp_width, patch_width, config.activation)

    def compress(self, query_BMD: Tensor, patches_BPD: Tensor) -> Tensor:
        """[B, M, D]; queries that all images share come as [1, M, D]."""
        heads = self.attention.num_heads
        inputs = self._attention_inputs(query_BMD, patches_BPD)
        query, keys, values = (x.unflatten(-1, (heads, -1)).transpose(-3, -2) for x in inputs)
        attended = F.scaled_dot_product_attention(query.expand(len(patches_BPD), -1, -1, -1), keys, values)
        attended_BMD = self.attention.out_proj(attended.transpose(1, 2).flatten(2))
        return attended_BMD + self.mlp(self.layernorm(attended_BMD))

    def _attention_inputs(self, query_BMD: Tensor, patches_BPD: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Projected queries [.., M, D], keys and values [B, P, D].

        Each patch passes one linear map, not two: the product of the weights of `key` (`value`) and of the attention's
        own projection is taken first, which costs as much as D patches do."""
        weight_q, weight_k, weight_v = self.attention.in_proj_weight.chunk(3)
        bias_q, bias_k, bias_v = self.attention.in_proj_bias.chunk(3)
        with torch.autocast(patches_BPD.device.type, enabled=False):  # products of weights in full
            weight = torch.cat([weight_k @ self.key.weight, weight_v @ self.value.weight])
            bias = torch.cat([weight_k @ self.key.bias + bias_k, weight_v @ self.value.bias + bias_v])
        keys_BPD, values_BPD = F.linear(patches_BPD, weight, bias).chunk(2, dim=-1)
        return F.linear(query_BMD, weight_q, bias_q), keys_BPD, values_BPD


class _FurtherBlock(_CompressionBlock):
    """A block whose queries are the tokens of the block before: [B, M, D] -> [B, M, D], residual, normalised before."""

    def __init__(self, config: CompressionConfig, patch_width: int):
        super().__init__(config, patch_width)
        self.query_norm = nn.LayerNorm(patch_width, eps=config.layer_norm_eps)

    def forward(self, tokens_BMD: Tensor, patches_BPD: Tensor) -> Tensor:
        return tokens_BMD + self.compress(self.query_norm(tokens_BMD), patches_BPD)


class TokenCompressionAdapter(_CompressionBlock):
    """Compress the P patch tokens of an image to M tokens of the joint encoder's width.

    M learned queries, shared by all images, attend over the patches. The result depends on the image alone, so it
    is computed once and stored; a query never runs this module. Keys and values pass two linear maps (`key`/`value`
    and the attention's own projections), there is no residual around the attention and no norm after the MLP: so
    it is in the published checkpoint. SigLIP 2 L/16-384: [B, 576, 1024] -> [B, 64, 384], 49,152 bytes per image in
    float16.

    With `config.position_codes` patches carry their position, and query j starts as the code of the j-th cell of a grid
    over the image, with key maps that keep codes: so each vision token starts with one part of the image.
    """

    def __init__(self, config: CompressionConfig, dims: BackboneDims, hidden_size: int):
        patch_width = dims.patch_width
        super().__init__(config, patch_width)
        self.projection = nn.Linear(patch_width, hidden_size)
        self.query = nn.Parameter(torch.empty(1, config.num_tokens, patch_width), requires_grad=config.learn_queries)
        self.places = _position_table(config, dims)  # its name in the files of checkpoints
        if self.places is None:
            nn.init.normal_(self.query, std=patch_width**-0.5 if config.query_std is None else config.query_std)
        else:
            self._start_queries_at_positions(config, dims)
        self.further = nn.ModuleList(_FurtherBlock(config, patch_width) for _ in range(config.num_blocks - 1))

    def forward(self, patches_BPD: Tensor) -> Tensor:
        """Patch tokens after the tower's last norm, class token left out -> vision tokens [B, M, H]."""
        patches_BPD = _with_positions(patches_BPD, self.places)
        tokens_BMD = self.compress(self.query, patches_BPD)
        for block in self.further:
            tokens_BMD = block(tokens_BMD, patches_BPD)
        return self.projection(tokens_BMD)

    @torch.no_grad()
    def _start_queries_at_positions(self, config: CompressionConfig, dims: BackboneDims) -> None:
        codes = config.position_codes * _codes_of_grid(*_grid_of(config.num_tokens), dims)
        nn.init.orthogonal_(self.key.weight)
        weight_q, weight_k, _ = self.attention.in_proj_weight.chunk(3)
        nn.init.orthogonal_(weight_k)
        weight_q.copy_(weight_k @ self.key.weight)
        self.query.copy_(QUERY_GAIN * (codes - codes.mean(0)))


class LocalProjection(_MLP):
    """The uncompressed ("local") variant: each patch token by itself through a two-layer MLP, [B, P, D] -> [B, P, H].

    Source: EDJE (arXiv 2510.06820), the local model, teacher of the compressed one.
    """

    def __init__(self, config: AdapterConfig, dims: BackboneDims, hidden_size: int):
        super().__init__(dims.patch_width, config.mlp_width, hidden_size, config.activation)
        self.places = _position_table(config, dims)  # its name in the files of checkpoints

    def forward(self, patches_BPD: Tensor) -> Tensor:
        return super().forward(_with_positions(patches_BPD, self.places))


class PooledProjection(LocalProjection):
    """Compression without attention, for ablations: M means of patch tokens through the local model's MLP, [B, M, H].

    Means over the cells of a grid of M cells."""

    def __init__(self, config: AdapterConfig, dims: BackboneDims, hidden_size: int):
        super().__init__(config, dims, hidden_size)
        self.side, self.grid = math.isqrt(dims.num_patches), _grid_of(config.num_tokens)
        if self.side**2 != dims.num_patches or max(self.grid) > self.side:
            raise UserError(
                f"adapter.kind {config.kind!r} needs a square grid of patches and at most as many cells a side; this "
                f"backbone gives {dims.num_patches} patches, and {config.num_tokens} tokens are "
                f"{self.grid[0]} x {self.grid[1]} cells; choose another adapter.num_tokens"
            )

    def forward(self, patches_BPD: Tensor) -> Tensor:
        return _MLP.forward(self, self.means(_with_positions(patches_BPD, self.places)))

    def means(self, patches_BPD: Tensor) -> Tensor:
        """[B, M, D]"""
        square = patches_BPD.transpose(1, 2).unflatten(2, (self.side, self.side))
        return F.adaptive_avg_pool2d(square, self.grid).flatten(2).transpose(1, 2)


class ClusteredProjection(PooledProjection):
    """The same on the centres of the image's own patches: KMEANS_ROUNDS rounds of Lloyd's algorithm from those means.

    Nothing in it is random: an image alone decides its tokens."""

    def means(self, patches_BPD: Tensor) -> Tensor:
        starts_BMD = super().means(patches_BPD)
        return cluster_means(patches_BPD, nearest_centres(patches_BPD.detach(), starts_BMD.detach()), starts_BMD)


@torch.no_grad()
def nearest_centres(patches_BPD: Tensor, starts_BMD: Tensor) -> Tensor:
    """Lloyd's algorithm, each image by itself: [B, P] int64, the cluster of each patch after KMEANS_ROUNDS rounds."""
    centres_BMD = starts_BMD
    for _ in range(KMEANS_ROUNDS):
        nearest_BP = torch.cdist(patches_BPD, centres_BMD).argmin(-1)
        centres_BMD = cluster_means(patches_BPD, nearest_BP, centres_BMD)
    return nearest_BP


def cluster_means(patches_BPD: Tensor, cluster_BP: Tensor, empty_BMD: Tensor) -> Tensor:
    """Mean of the patches of each cluster, [B, M, D]; of a cluster without patches the entry of `empty_BMD`."""
    member_BMP = F.one_hot(cluster_BP, empty_BMD.shape[1]).transpose(1, 2).to(patches_BPD.dtype)
    count_BM1 = member_BMP.sum(-1, keepdim=True)
    return torch.where(count_BM1 > 0, member_BMP @ patches_BPD / count_BM1.clamp(min=1), empty_BMD)


@singledispatch
def build_adapter(config: AdapterConfig, dims: BackboneDims, hidden_size: int) -> nn.Module:
    """The adapter of a configuration, by the configuration's class."""
    raise NotImplementedError(f"no adapter is registered for {type(config).__name__}")


build_adapter.register(CompressionConfig, TokenCompressionAdapter)
build_adapter.register(LocalConfig, LocalProjection)
build_adapter.register(PoolingConfig, PooledProjection)
build_adapter.register(KMeansConfig, ClusteredProjection)


def _grid_of(num_tokens: int) -> tuple[int, int]:
    """Rows and columns, as square as whole numbers allow: 8 -> (2, 4)."""
    rows = next(r for r in range(math.isqrt(num_tokens), 0, -1) if num_tokens % r == 0)
    return rows, num_tokens // rows


def _with_positions(patches_BPD: Tensor, table: nn.Parameter | None) -> Tensor:
    return patches_BPD if table is None else patches_BPD + table


def _position_table(config: AdapterConfig, dims: BackboneDims) -> nn.Parameter | None:
    """The learned table [P, D] that is added to patch tokens, or None where the configuration wants none."""
    if not config.position_codes:
        return None
    side = math.isqrt(dims.num_patches)
    if side * side != dims.num_patches or dims.patch_width % 4:
        raise UserError(
            "adapter.position_codes needs a square grid of patches and a patch width that 4 divides; this backbone "
            f"gives {dims.num_patches} patches of {dims.patch_width}; set adapter.position_codes to 0"
        )
    return nn.Parameter(config.position_codes * _codes_of_grid(side, side, dims))


def _codes_of_grid(rows: int, columns: int, dims: BackboneDims) -> Tensor:
    """Codes of the cells that divide an image in rows and columns: [rows * columns, D].

    Wavelengths from 6 patches to 600, so that neighbours of a grid of 8 to 24 patches a side differ clearly."""
    quarter = dims.patch_width // 4
    frequencies = math.isqrt(dims.num_patches) * 100.0 ** (-torch.arange(quarter) / quarter)
    return position_codes(grid_centres(rows, columns), frequencies)
