"""The joint encoder's mathematics: a BERT over packed sequences, with whichever weights a form of it holds.

No padding (packing.py), and in the last layer only the rows that are wanted. Training runs it on parameters
(joint_encoder.py), inference on weights prepared once (optimized_encoder.py). Letters: T packed rows, H width, R wanted
rows, Q sequences. Source: BERT (arXiv 1810.04805), EDJE (arXiv 2510.06820).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from ..config import EncoderConfig
from ..errors import UserError
from ..language.captions import CaptionIds
from .attention import sequence_attention
from .linear import Linear, Norm, layer_norm
from .mixture import Mixture, Sequences, pack_mixture
from .packing import Group, PackedInput, SpecialTokens, pack_captions, pack_images, pack_pairs


class LayerWeights(NamedTuple):
    """What one layer computes with: parameters in training, prepared copies in inference.

    Queries are apart from keys and values because the last layer may want fewer of them."""

    query: Linear
    key_value: Linear
    attention_output: Linear
    attention_norm: Norm
    intermediate: Linear
    output: Linear
    output_norm: Norm


class EncoderWeights(NamedTuple):
    """Tables [rows, H], the norm behind them, and the layers."""

    words: Tensor
    positions: Tensor
    segments: Tensor
    norm: Norm
    layers: tuple[LayerWeights, ...]


class EncoderPass(ABC):
    """The mathematics of both forms; a subclass says with which weights, and whether there is dropout."""

    config: EncoderConfig
    special: SpecialTokens
    training: bool

    @abstractmethod
    def weights(self) -> EncoderWeights:
        """What a pass computes with."""

    @property
    @abstractmethod
    def word_table(self) -> Tensor:
        """[V, H]"""

    @property
    @abstractmethod
    def dtype(self) -> torch.dtype:
        """Of the layers' weights, and of what a pass returns."""

    def pack_pairs(
        self, captions: CaptionIds, tokens: Tensor, caption_index: Tensor, image_index: Tensor
    ) -> PackedInput:
        """`[CLS] caption [SEP] v1 .. vm [SEP]` for Q pairs: tokens [N, m, H], indices [Q] into captions and tokens."""
        return pack_pairs(self.word_table, self.special, captions, tokens, caption_index, image_index)

    def pack_captions(self, captions: CaptionIds) -> PackedInput:
        """`[CLS] caption [SEP]` for C captions."""
        return pack_captions(self.word_table, self.special, captions)

    def pack_images(self, tokens: Tensor) -> PackedInput:
        """`[CLS] v1 .. vm [SEP]` for N images: tokens [N, m, H]."""
        return pack_images(self.word_table, self.special, tokens)

    def encode_mixture(self, tokens: Tensor, kinds: Sequence[Sequences]) -> list[Tensor]:
        """Wanted last hidden states of each kind of sequences, [its number, H], by one pass over all: tokens [N, m, H].

        Raises UserError if a sequence is longer than the position table."""
        mixture, weights = pack_mixture(self.word_table, self.special, tokens, kinds), self.weights()
        self._check_fits_positions(mixture.packed, weights.positions)
        x = self._up_to_last_layer(mixture.packed, self._attention(mixture.packed.groups, tokens.device), weights)
        last, asking = weights.layers[-1], x.index_select(0, mixture.asking)
        context = self._last_attention(mixture, last.query(asking), last.key_value(x))
        asking, context = (rows.index_select(0, mixture.wanted) for rows in (asking, context))
        return list(self._finish_layer(asking, context, last).split(mixture.counts))

    def _last_attention(self, mixture: Mixture, queries: Tensor, keys_values: Tensor) -> Tensor:
        """queries [A, H] of the asking rows, keys_values [T, 2H] -> [A, H]."""
        parts = mixture.parts
        rows = [sum(group.sequences * group.length for group in groups) for groups, _ in parts]
        asks = [sum(g.sequences for g in groups) if cls else n for (groups, cls), n in zip(parts, rows, strict=True)]
        contexts = []
        for (groups, cls), q, kv in zip(parts, queries.split(asks), keys_values.split(rows), strict=True):
            contexts.append(self._attention(groups, q.device)(q, kv, one_query=cls))
        return torch.cat(contexts)

    def encode(self, packed: PackedInput, rows: Tensor | None = None) -> Tensor:
        """Last hidden state of all rows [T, H], or of `rows` [R] int64 in any order -> [R, H].

        After its attention the last layer runs on the wanted rows alone. Raises UserError if a sequence is longer than
        the position table."""
        weights = self.weights()
        self._check_fits_positions(packed, weights.positions)
        return self._encode(packed, rows, self._attention(packed.groups, packed.embeddings.device), weights)

    def encode_cls(self, packed: PackedInput) -> Tensor:
        """Last hidden state of each sequence's [CLS], [Q, H] in the caller's order: in the last layer they alone ask.

        Raises UserError if a sequence is longer than the position table."""
        weights = self.weights()
        self._check_fits_positions(packed, weights.positions)
        return self._encode_cls(packed, self._attention(packed.groups, packed.embeddings.device), weights)

    @staticmethod
    def _check_fits_positions(packed: PackedInput, positions: Tensor) -> None:
        longest = max(group.length for group in packed.groups)
        if longest > len(positions):
            raise UserError(
                f"a sequence of {longest} tokens does not fit the joint encoder's {len(positions)} positions; "
                "cut the caption or raise encoder.max_positions"
            )

    def _attention(self, groups: tuple[Group, ...], device: torch.device) -> Callable[..., Tensor]:
        return sequence_attention(groups, self.config.num_heads, self._attention_dropout, device)

    def _encode(
        self, packed: PackedInput, rows: Tensor | None, attention: Callable[..., Tensor], weights: EncoderWeights
    ) -> Tensor:
        x = self._up_to_last_layer(packed, attention, weights)
        last = weights.layers[-1]
        context = attention(last.query(x), last.key_value(x))
        if rows is not None:
            x, context = x.index_select(0, rows), context.index_select(0, rows)
        return self._finish_layer(x, context, last)

    def _encode_cls(self, packed: PackedInput, attention: Callable[..., Tensor], weights: EncoderWeights) -> Tensor:
        x = self._up_to_last_layer(packed, attention, weights)
        last = weights.layers[-1]
        rows, order = packed.cls_rows.sort()  # as the groups lie
        cls = x[rows]
        context = attention(last.query(cls), last.key_value(x), one_query=True)
        return self._finish_layer(cls, context, last)[order.argsort()]

    def _up_to_last_layer(
        self, packed: PackedInput, attention: Callable[..., Tensor], weights: EncoderWeights
    ) -> Tensor:
        """All rows before the last layer, [T, H]."""
        x = self._embed(packed, weights)
        for layer in weights.layers[:-1]:
            x = self._finish_layer(x, attention(layer.query(x), layer.key_value(x)), layer)
        return x

    def _embed(self, packed: PackedInput, weights: EncoderWeights) -> Tensor:
        x = packed.embeddings + F.embedding(packed.positions, weights.positions)
        x = x + F.embedding(packed.segments, weights.segments)
        x = layer_norm(x, weights.norm, self.config.layer_norm_eps)
        return F.dropout(x, self._hidden_dropout).to(self.dtype)

    def _finish_layer(self, x: Tensor, context: Tensor, layer: LayerWeights) -> Tensor:
        """Everything of a layer that is not attention, row by row: x, context [R, H] -> [R, H]."""
        dropout, eps = self._hidden_dropout, self.config.layer_norm_eps
        x = layer.attention_output.added_and_normed(x, context, dropout, layer.attention_norm, eps)
        inner = layer.intermediate.activated(x, self.config.activation)
        return layer.output.added_and_normed(x, inner, dropout, layer.output_norm, eps)

    @property
    def _hidden_dropout(self) -> float:
        return self.config.hidden_dropout if self.training else 0.0

    @property
    def _attention_dropout(self) -> float:
        return self.config.attention_dropout if self.training else 0.0
