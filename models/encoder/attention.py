"""Attention inside each sequence of a packed input: `sequence_attention(...)` is made once for an input and called by
every layer.

A CPU gets one batched call for each length that occurs. A GPU, where every call is a launch, gets one call in all:
the variable-length flash kernel in bfloat16, else a padded batch behind a mask.
Letters: T packed rows, H width, Q sequences, L length of a sequence, n sequences of that length, heads of width
d = H / heads.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property

import torch
from torch import Tensor
from torch.nn import functional as F

from ..distributed import send
from .linear import has_triton
from .packing import Group

_KEY_MULTIPLE = 16
"""The CPU kernel handles keys beyond the last multiple of 16 one by one: 95 keys take 2.2 times as long as 96 in
bfloat16, 1.7 times in float32 (measured, AVX-512). So keys and values are filled up to it, behind a mask."""


def sequence_attention(
    groups: tuple[Group, ...], num_heads: int, dropout: float, device: torch.device
) -> Callable[..., Tensor]:
    """The form of attention that suits the device, for sequences that lie as `groups` say.

    It is called with queries [T, H] and keys_values [T, 2H] and gives [T, H], before the output projection; with
    `one_query=True`, queries and result are [Q, H], one row per sequence in the order of the groups."""
    if device.type == "cpu":
        return AttentionByLength(groups, num_heads, dropout)
    return AttentionAtOnce(groups, num_heads, dropout, device)


class AttentionByLength:
    """One call of the batched kernel for each length: nothing is padded but keys to a multiple of 16."""

    def __init__(self, groups: tuple[Group, ...], num_heads: int, dropout: float):
        self.groups = groups
        self.num_heads = num_heads
        self.dropout = dropout
        fill_keys = not torch.is_grad_enabled()
        self._filled = [_filled_keys(group) if fill_keys else None for group in groups]

    def __call__(self, queries: Tensor, keys_values: Tensor, one_query: bool = False) -> Tensor:
        sizes = [group.sequences * (1 if one_query else group.length) for group in self.groups]
        # split, not slices: the gradient of a slice is a whole tensor of zeros for each group.
        queries = queries.unflatten(1, (self.num_heads, -1)).split(sizes)
        keys_values = keys_values.split([group.sequences * group.length for group in self.groups])
        contexts = []
        for group, query, rows, filled in zip(self.groups, queries, keys_values, self._filled, strict=True):
            query, mask = query.unflatten(0, (group.sequences, -1)).transpose(1, 2), None
            if filled is not None:
                index, mask = filled
                rows = rows.index_select(0, index)
            key, value = rows.view(group.sequences, -1, 2, self.num_heads, query.shape[-1]).permute(2, 0, 3, 1, 4)
            context = _attention(query, key, value, mask, self.dropout)
            contexts.append(context.transpose(1, 2).flatten(2).flatten(0, 1))
        return contexts[0] if len(contexts) == 1 else torch.cat(contexts)


class VariableLengthKernel:
    """A kernel for sequences of any lengths, torch's or Triton's, on a GPU in bfloat16: nothing is padded."""

    def __init__(self, starts: Tensor, longest: int, num_heads: int, dropout: float = 0.0):
        """starts: [Q + 1] int32, where sequences begin, and T."""
        self.longest = longest
        self.num_heads = num_heads
        self.dropout = dropout
        self._starts = starts
        self._counted = torch.arange(len(starts), dtype=torch.int32, device=starts.device)

    def __call__(self, queries: Tensor, keys_values: Tensor, one_query: bool = False) -> Tensor:
        if not one_query and self._triton_suits(queries, keys_values):
            from . import kernels

            return kernels.attention(queries, keys_values, self._starts, self.longest, self.num_heads)
        key, value = keys_values.unflatten(1, (2, self.num_heads, -1)).unbind(1)
        starts, longest = (self._counted, 1) if one_query else (self._starts, self.longest)
        query = queries.unflatten(1, (self.num_heads, -1))
        if not self.dropout:
            # Here, not above: it brings torch's compiler with it, 1.6 of the 3.7 seconds that a start takes on a CPU.
            from torch.nn.attention.varlen import varlen_attn

            context = varlen_attn(query, key, value, starts, self._starts, longest, self.longest)
            assert isinstance(context, Tensor)
            return context.flatten(1)
        # The operator behind varlen_attn, which fixes its dropout at 0. Nested tensors reach it by a public name, at
        # several times the work for Python in each call.
        context, *_ = torch.ops.aten._flash_attention_forward(
            query, key, value, starts, self._starts, longest, self.longest, self.dropout, False, False
        )
        return context.flatten(1)

    def _triton_suits(self, queries: Tensor, keys_values: Tensor) -> bool:
        """On an H100 Triton's kernel takes half as long as flash's for sequences of 71 to 107 rows, and is ahead at 600
        too. It has neither dropout nor gradient."""
        differentiated = torch.is_grad_enabled() and (queries.requires_grad or keys_values.requires_grad)
        if self.dropout or differentiated or not has_triton(queries.device):
            return False
        from . import kernels

        return kernels.suits_attention(queries.shape[1] // self.num_heads)


def has_kernel(device: torch.device) -> bool:
    """Whether VariableLengthKernel runs there."""
    return device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)


class AttentionAtOnce:
    """One call for all sequences, whatever their lengths."""

    def __init__(self, groups: tuple[Group, ...], num_heads: int, dropout: float, device: torch.device):
        self.num_heads = num_heads
        self.dropout = dropout
        self.longest = max(group.length for group in groups)
        # Made on the CPU and sent: what a GPU counted, the CPU would have to wait for.
        lengths, counts = torch.tensor([(group.length, group.sequences) for group in groups]).unbind(1)
        self._lengths = lengths.repeat_interleave(counts)
        self._device = device
        self._has_kernel = has_kernel(device)

    def __call__(self, queries: Tensor, keys_values: Tensor, one_query: bool = False) -> Tensor:
        if self._has_kernel and queries.dtype == torch.bfloat16:
            return self._kernel(queries, keys_values, one_query)
        return self._padded(queries, keys_values, one_query)

    @cached_property
    def _kernel(self) -> VariableLengthKernel:
        starts = send(F.pad(self._lengths.cumsum(0), (1, 0)).int(), self._device)
        return VariableLengthKernel(starts, self.longest, self.num_heads, self.dropout)

    def _padded(self, queries: Tensor, keys_values: Tensor, one_query: bool) -> Tensor:
        slots, mask = self._slots
        shape = (len(self._lengths), -1, self.num_heads, queries.shape[1] // self.num_heads)
        query = (queries if one_query else self._spread(queries, slots)).view(shape).transpose(1, 2)
        keys, values = self._spread(keys_values, slots).chunk(2, dim=1)
        key, value = (rows.view(shape).transpose(1, 2) for rows in (keys, values))
        context = F.scaled_dot_product_attention(query, key, value, attn_mask=mask, dropout_p=self.dropout)
        context = context.transpose(1, 2).flatten(2).flatten(0, 1)
        return context if one_query else context.index_select(0, slots)

    def _spread(self, rows: Tensor, slots: Tensor) -> Tensor:
        """[T, X] -> [Q * longest, X], zeros behind each sequence's end."""
        return rows.new_zeros(len(self._lengths) * self.longest, rows.shape[1]).index_copy(0, slots, rows)

    @cached_property
    def _slots(self) -> tuple[Tensor, Tensor]:
        """Place [T] of each row in the padded batch, and the mask [Q, 1, 1, longest] that is True for rows."""
        is_row = torch.arange(self.longest) < self._lengths[:, None]
        return send(is_row.flatten().nonzero()[:, 0], self._device), send(is_row[:, None, None], self._device)


def _attention(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, dropout: float) -> Tensor:
    """query [n, heads, queries, d], key and value [n, heads, keys, d] -> [n, heads, queries, d]."""
    if query.requires_grad and torch.is_grad_enabled():
        # The backward pass of plain products is as fast as the fused kernel's in float32 and 4 times as fast
        # in bfloat16 (16 sequences of 83: 10 ms against 46, forward and backward, one thread).
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
    starts = torch.arange(0, group.sequences * group.length, group.length)
    index = starts.unsqueeze(1) + position.clamp(max=group.length - 1)
    return index.flatten(), (position < group.length)[None, None, None]
