"""Attention inside each sequence of a packed input, one batched call for each length that occurs.

Letters: T packed rows, H width, L length of a sequence, n sequences of that length, heads of width d = H / heads.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from .packing import Group

_KEY_MULTIPLE = 16
"""The CPU kernel handles keys beyond the last multiple of 16 one by one: 95 keys take 2.2 times as long as 96 in
bfloat16, 1.7 times in float32 (measured, AVX-512). So keys and values are filled up to it, behind a mask."""


class SequenceAttention:
    """Made once for an input and called by every layer: `attention(queries, keys_values)`."""

    def __init__(self, groups: tuple[Group, ...], num_heads: int, dropout: float, device: torch.device):
        self.groups = groups
        self.num_heads = num_heads
        self.dropout = dropout
        fill_keys = device.type == "cpu" and not torch.is_grad_enabled()
        self._filled = [_filled_keys(group) if fill_keys else None for group in groups]

    def __call__(self, queries: Tensor, keys_values: Tensor, one_query: bool = False) -> Tensor:
        """queries [T, H], keys_values [T, 2H] -> [T, H], before the output projection.

        With `one_query`, queries and result are [Q, H], one row a sequence in the order of the groups."""
        sizes = [group.count * (1 if one_query else group.length) for group in self.groups]
        # split, not slices: the gradient of a slice is a whole tensor of zeros for each group.
        queries = queries.unflatten(1, (self.num_heads, -1)).split(sizes)
        keys_values = keys_values.split([group.count * group.length for group in self.groups])
        contexts = []
        for group, query, rows, filled in zip(self.groups, queries, keys_values, self._filled, strict=True):
            query, mask = query.unflatten(0, (group.count, -1)).transpose(1, 2), None
            if filled is not None:
                index, mask = filled
                rows = rows.index_select(0, index)
            key, value = rows.view(group.count, -1, 2, self.num_heads, query.shape[-1]).permute(2, 0, 3, 1, 4)
            context = _attention(query, key, value, mask, self.dropout)
            contexts.append(context.transpose(1, 2).flatten(2).flatten(0, 1))
        return contexts[0] if len(contexts) == 1 else torch.cat(contexts)


def _attention(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, dropout: float) -> Tensor:
    """query [n, heads, queries, d], key and value [n, heads, keys, d] -> [n, heads, queries, d]."""
    if query.requires_grad and query.device.type == "cpu":
        # On CPUs the backward pass of plain products is as fast as the fused kernel's in float32 and 4 times as
        # fast in bfloat16 (16 sequences of 83: 10 ms against 46, forward and backward, one thread).
        probabilities = torch.softmax(query @ (key * query.shape[-1] ** -0.5).transpose(-1, -2), dim=-1)
        return F.dropout(probabilities, dropout) @ value
    return F.scaled_dot_product_attention(query, key, value, attn_mask=mask, dropout_p=dropout)


def _filled_keys(group: Group) -> tuple[Tensor, Tensor] | None:
    """For the rows of a group: index [n * keys] that fills each sequence up with its own last row, and the mask
    [1, 1, 1, keys] that hides the fill; None where the length needs none."""
    keys = -(-group.length // _KEY_MULTIPLE) * _KEY_MULTIPLE
    if keys == group.length:
        return None
    position = torch.arange(keys)
    starts = torch.arange(0, group.count * group.length, group.length)
    index = starts.unsqueeze(1) + position.clamp(max=group.length - 1)
    return index.flatten(), (position < group.length)[None, None, None]
