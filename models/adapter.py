"""From a frozen tower's patch tokens to vision tokens of the joint encoder's width.

Letters: B images, P patches, D patch width, M vision tokens, H joint encoder width, F hidden width of the MLP.
Source: EDJE (arXiv 2510.06820), adapter: A = MHA(Q, X Wk, X Wv), Y = (A + MLP(LN(A))) Wproj. Parameter names
are those of the published checkpoint.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .config import AdapterConfig, BackboneDims
from .errors import UserError
from .linear import ACTIVATIONS
from .places import grid_places, place_codes

QUERY_GAIN = 6.0
"""With places: how much longer than a patch's code the queries start. On patch tokens of deviation 1 some 40% of a
query's attention then lie on its own cell of 4 patches; with 1 it hardly prefers it, far above it cannot leave it."""


class _MLP(nn.Module):
    """fc2(act(fc1(x))), the two-layer perceptron of both adapters."""

    def __init__(self, width_in: int, hidden: int, width_out: int, activation: str):
        super().__init__()
        if activation not in ACTIVATIONS:
            raise UserError(f"adapter.activation is {activation!r}; expected one of {sorted(ACTIVATIONS)}")
        self.fc1 = nn.Linear(width_in, hidden)
        self.fc2 = nn.Linear(hidden, width_out)
        self.activation = ACTIVATIONS[activation]

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.activation(self.fc1(x)))


class TokenCompressionAdapter(nn.Module):
    """Compress the P patch tokens of an image to M tokens of the joint encoder's width.

    M learned queries, shared by all images, attend over the patches. The result depends on the image alone, so it
    is computed once and stored; a query never runs this module. Keys and values pass two linear maps (`key`/`value`
    and the attention's own projections), there is no residual around the attention and no norm after the MLP: so
    it is in the published checkpoint. SigLIP 2 L/16-384: [B, 576, 1024] -> [B, 64, 384], 49,152 bytes an image in
    float16.

    With `config.places` patches carry their place, and query j starts as the code of the j-th cell of a grid over the
    image, with key maps that keep codes: so each vision token starts with one part of the image.
    """

    def __init__(self, config: AdapterConfig, dims: BackboneDims, hidden_size: int):
        super().__init__()
        patch_width = dims.patch_width
        if patch_width % config.num_heads:
            raise UserError(
                f"adapter.num_heads is {config.num_heads}; it must divide the backbone's patch width ({patch_width})"
            )
        self.query = nn.Parameter(torch.empty(1, config.num_tokens, patch_width))
        self.key = nn.Linear(patch_width, patch_width)
        self.value = nn.Linear(patch_width, patch_width)
        self.attention = nn.MultiheadAttention(patch_width, config.num_heads, batch_first=True)
        self.layernorm = nn.LayerNorm(patch_width, eps=config.layer_norm_eps)
        self.mlp = _MLP(patch_width, config.mlp_width, patch_width, config.activation)
        self.projection = nn.Linear(patch_width, hidden_size)
        self.places = _places(config, dims)
        if self.places is None:
            nn.init.normal_(self.query, std=patch_width**-0.5 if config.query_std is None else config.query_std)
        else:
            self._start_queries_at_places(config, dims)

    def forward(self, patches_BPD: Tensor) -> Tensor:
        """Patch tokens after the tower's last norm, class token left out -> vision tokens [B, M, H]."""
        if self.places is not None:
            patches_BPD = patches_BPD + self.places
        heads = self.attention.num_heads
        query, keys, values = self._attention_inputs(patches_BPD)
        query, keys, values = (x.unflatten(-1, (heads, -1)).transpose(-3, -2) for x in (query, keys, values))
        attended = F.scaled_dot_product_attention(query.expand(len(patches_BPD), -1, -1, -1), keys, values)
        attended_BMD = self.attention.out_proj(attended.transpose(1, 2).flatten(2))
        return self.projection(attended_BMD + self.mlp(self.layernorm(attended_BMD)))

    @torch.no_grad()
    def _start_queries_at_places(self, config: AdapterConfig, dims: BackboneDims) -> None:
        rows = next(r for r in range(math.isqrt(config.num_tokens), 0, -1) if config.num_tokens % r == 0)
        codes = config.places * _codes_of_grid(rows, config.num_tokens // rows, dims)
        nn.init.orthogonal_(self.key.weight)
        weight_q, weight_k, _ = self.attention.in_proj_weight.chunk(3)
        nn.init.orthogonal_(weight_k)
        weight_q.copy_(weight_k @ self.key.weight)
        self.query.copy_(QUERY_GAIN * (codes - codes.mean(0)))

    def _attention_inputs(self, patches_BPD: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Query [1, M, D], shared by all images, keys and values [B, P, D].

        Each patch passes one linear map, not two: the product of the weights of `key` (`value`) and of the attention's
        own projection is taken first, which costs as much as D patches do."""
        weight_q, weight_k, weight_v = self.attention.in_proj_weight.chunk(3)
        bias_q, bias_k, bias_v = self.attention.in_proj_bias.chunk(3)
        with torch.autocast(patches_BPD.device.type, enabled=False):  # products of weights in full
            weight = torch.cat([weight_k @ self.key.weight, weight_v @ self.value.weight])
            bias = torch.cat([weight_k @ self.key.bias + bias_k, weight_v @ self.value.bias + bias_v])
        return F.linear(self.query, weight_q, bias_q), *F.linear(patches_BPD, weight, bias).chunk(2, dim=-1)


class LocalProjection(_MLP):
    """The uncompressed ("local") variant: each patch token by itself through a two-layer MLP, [B, P, D] -> [B, P, H].

    Source: EDJE (arXiv 2510.06820), the local model, teacher of the compressed one.
    """

    def __init__(self, config: AdapterConfig, dims: BackboneDims, hidden_size: int):
        super().__init__(dims.patch_width, config.mlp_width, hidden_size, config.activation)
        self.places = _places(config, dims)

    def forward(self, patches_BPD: Tensor) -> Tensor:
        return super().forward(patches_BPD if self.places is None else patches_BPD + self.places)


def build_adapter(config: AdapterConfig, dims: BackboneDims, hidden_size: int) -> nn.Module:
    """The adapter that `config.kind` names."""
    kinds = {"compression": TokenCompressionAdapter, "local": LocalProjection}
    return kinds[config.kind](config, dims, hidden_size)


def _places(config: AdapterConfig, dims: BackboneDims) -> nn.Parameter | None:
    """The learned table [P, D] that is added to patch tokens, or None where the configuration wants none."""
    if not config.places:
        return None
    side = math.isqrt(dims.num_patches)
    if side * side != dims.num_patches or dims.patch_width % 4:
        raise UserError(
            f"adapter.places needs a square grid of patches and a patch width that 4 divides; this backbone gives "
            f"{dims.num_patches} patches of {dims.patch_width}; set adapter.places to 0"
        )
    return nn.Parameter(config.places * _codes_of_grid(side, side, dims))


def _codes_of_grid(rows: int, columns: int, dims: BackboneDims) -> Tensor:
    """Codes of the cells that divide an image in rows and columns: [rows * columns, D].

    Wavelengths from 6 patches to 600, so that neighbours of a grid of 8 to 24 patches a side differ clearly."""
    quarter = dims.patch_width // 4
    frequencies = math.isqrt(dims.num_patches) * 100.0 ** (-torch.arange(quarter) / quarter)
    return place_codes(grid_places(rows, columns), frequencies)
