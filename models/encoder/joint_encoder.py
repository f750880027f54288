"""The joint encoder: a BERT over packed captions and vision tokens, with Hugging Face's parameter names.

What EDJE pays per candidate, so it is built for throughput: no padding (packing.py), and in the last layer only the
rows that are wanted. One class holds the mathematics; training runs it on the parameters themselves (plain autograd,
autocast), inference on weights prepared once (`optimized`). Letters: T packed rows, H width, R wanted rows,
Q sequences, V vocabulary. Source: BERT (arXiv 1810.04805), EDJE (arXiv 2510.06820).

    packed = encoder.pack_pairs(captions, tokens, caption_index, image_index)
    cls = encoder.encode_cls(packed)                               # [Q, H]
    fast = encoder.optimized(torch.bfloat16)                       # the same two calls, weights frozen
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import fields, replace
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..config import EncoderConfig
from ..errors import UserError
from ..language.captions import CaptionIds
from ..language.pretrained import read_bert, read_bert_config
from ..precision import fastest_dtype
from .attention import has_kernel, sequence_attention
from .bert import MaskedLanguageHead, bert_parameters, initialise, submodule
from .cuda_graphs import MOST_ROWS, RecordedPasses
from .linear import ACTIVATIONS, Linear, Norm, fuse, has_triton, layer_norm
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


class JointEncoder(EncoderPass, nn.Module):
    """The training form. State dict: transformers' BertForMaskedLM without pooler, tied tensors included.

    MiniLM-L12-H384-uncased: 33 million parameters, of which 21 million in the 12 layers."""

    def __init__(self, config: EncoderConfig, *, cls_id: int, sep_id: int):
        """Random weights as BERT's. Raises UserError for an activation that is not known."""
        super().__init__()
        if config.activation not in ACTIVATIONS:
            raise UserError(f"encoder.activation is {config.activation!r}; expected one of {sorted(ACTIVATIONS)}")
        self.config = config
        self.special = SpecialTokens(cls_id, sep_id)
        self.bert = bert_parameters(config)
        self.cls = nn.ModuleDict({"predictions": MaskedLanguageHead(config, self._table("word"))})
        self.apply(partial(initialise, std=config.initializer_range))

    @property
    def word_table(self) -> Tensor:
        return self._table("word").weight

    def _table(self, name: str) -> nn.Embedding:
        return submodule(self.bert, f"embeddings.{name}_embeddings", nn.Embedding)

    @property
    def dtype(self) -> torch.dtype:
        """Of rows between layers: autocast's where it is on, as in the inference form; parameters keep float32."""
        device = self.word_table.device.type
        return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else self.word_table.dtype

    def weights(self) -> EncoderWeights:
        """The parameters as the pass wants them; gradients flow through the concatenation of keys and values."""
        return EncoderWeights(
            words=self.word_table,
            positions=self._table("position").weight,
            segments=self._table("token_type").weight,
            norm=_norm(self.bert, "embeddings.LayerNorm"),
            layers=tuple(map(_layer_weights, submodule(self.bert, "encoder.layer", nn.ModuleList))),
        )

    def mlm_logits(self, hidden: Tensor) -> Tensor:
        """Hidden states [R, H] -> logits over the vocabulary [R, V], by the language model's own head."""
        return submodule(self.cls, "predictions", MaskedLanguageHead)(hidden)

    def extend_positions(self, rows: int) -> None:
        """Lengthen the position table to `rows` by repeating its last row; a longer table stays as it is."""
        embedding = self._table("position")
        if rows > embedding.num_embeddings:
            embedding.weight = nn.Parameter(with_rows(embedding.weight.detach(), rows))
            embedding.num_embeddings = rows
            self.config = replace(self.config, max_positions=rows)

    @classmethod
    def from_bert(cls, name: str, *, cls_id: int, sep_id: int, config: EncoderConfig | None = None) -> JointEncoder:
        """A joint encoder with the weights of a pretrained BERT; `config` may ask for more rows than it has."""
        encoder = cls(config or read_bert_config(name), cls_id=cls_id, sep_id=sep_id)
        encoder.load_bert(name)
        return encoder

    def load_bert(self, name: str) -> list[str]:
        """Take the weights of a pretrained BERT: a BertModel or BertForMaskedLM; directory, `package:` or hub name.

        Its position table is extended by repeating the last row, its vocabulary by rows as initialised (the published
        checkpoint has one more, `<image>`, which is never an input). Returns the parameters that the source lacks
        and that keep their initial values, e.g. a sentence encoder's MLM head. Raises UserError if it is of another
        size."""
        self._check_fits(name)
        state, missing = read_bert(name)
        own = self.state_dict()
        for key, value in state.items():
            if key.endswith("position_embeddings.weight"):
                state[key] = with_rows(value, len(own[key]))
            elif len(value) < len(own[key]):
                state[key] = torch.cat([value, own[key][len(value) :]])
        self.load_state_dict(state, strict=False)
        return missing

    def _check_fits(self, name: str) -> None:
        source, grows = read_bert_config(name), ("vocab_size", "max_positions")
        of_training = ("hidden_dropout", "attention_dropout", "initializer_range")
        for field in fields(EncoderConfig):
            theirs, ours = getattr(source, field.name), getattr(self.config, field.name)
            if field.name in of_training or theirs == ours or (field.name in grows and theirs < ours):
                continue
            least = "at least " if field.name in grows else ""
            raise UserError(f"{name}: its weights need encoder.{field.name} {least}{theirs}, configured is {ours}")

    def optimized(self, dtype: torch.dtype | None = None) -> OptimizedEncoder:
        """The inference form, a frozen copy in `dtype` (default: the fastest that this device has)."""
        return OptimizedEncoder(self, dtype or fastest_dtype(self.word_table.device))


def _norm(module: nn.Module, path: str) -> Norm:
    norm = submodule(module, path, nn.LayerNorm)
    return Norm(norm.weight, norm.bias)


def _linear(module: nn.Module, *paths: str) -> Linear:
    """One linear map that gives the outputs of all maps at `paths`, one behind the other."""
    modules = [submodule(module, path, nn.Linear) for path in paths]
    if len(modules) == 1:
        return Linear(modules[0].weight, modules[0].bias)
    return Linear(torch.cat([module.weight for module in modules]), torch.cat([module.bias for module in modules]))


def _layer_weights(layer: nn.Module) -> LayerWeights:
    return LayerWeights(
        query=_linear(layer, "attention.self.query"),
        key_value=_linear(layer, "attention.self.key", "attention.self.value"),
        attention_output=_linear(layer, "attention.output.dense"),
        attention_norm=_norm(layer, "attention.output.LayerNorm"),
        intermediate=_linear(layer, "intermediate.dense"),
        output=_linear(layer, "output.dense"),
        output_norm=_norm(layer, "output.LayerNorm"),
    )


def _float32_copy(tensor: Tensor) -> Tensor:
    return tensor.detach().float().clone()


def with_rows(table: Tensor, rows: int) -> Tensor:
    """`table` with its last row repeated until it has `rows`; the parity origin extends positions so."""
    return torch.cat([table, table[-1:].expand(max(0, rows - len(table)), -1)])


GPU_ROWS = 400_000
"""On a GPU: rows a call; MiniLM's widest activations then have 1.2 GB in bfloat16. On an H200 calls of 256 pairs,
23,000 rows, reached two thirds of the pairs a second."""
_MEAN_CAPTION = 24
"""Rows of a pair that are not vision tokens, about."""


def pairs_at_once(device: torch.device, num_tokens: int) -> int:
    """Pairs of `num_tokens` vision tokens that suit one call; on a CPU the encoder cuts a call smaller by itself."""
    return 128 if device.type == "cpu" else max(1, GPU_ROWS // (num_tokens + _MEAN_CAPTION))


ROWS_AT_ONCE = 2048
"""On a CPU: rows that pass through all layers together, about 24 pairs. With 64 pairs at once the activations outgrow
what the allocator keeps and are mapped afresh at every step."""
BFLOAT16_BOUND = 0.1
"""A logit in bfloat16 lies within this many standard deviations of a batch's logits from its float32 value. MiniLM-L6's
own weights: 0.01 in the mean, 0.04 at most."""


class OptimizedEncoder(EncoderPass):
    """The inference form: weights detached and in one dtype, linear maps fused with what follows, no dropout.

    Tables and the first norm stay float32: they cost little, and packing takes tokens of any dtype. A snapshot, on
    the device of the encoder it was made from: it does not see later changes."""

    training = False

    def __init__(self, encoder: JointEncoder, dtype: torch.dtype):
        self.config, self.special, self._dtype = encoder.config, encoder.special, dtype
        with torch.no_grad():
            weights = encoder.weights()
            self._weights = EncoderWeights(
                words=_float32_copy(weights.words),
                positions=_float32_copy(weights.positions),
                segments=_float32_copy(weights.segments),
                norm=Norm(_float32_copy(weights.norm.weight), _float32_copy(weights.norm.bias)),
                layers=tuple(self._prepare(layer) for layer in weights.layers),
            )
        recordable = dtype == torch.bfloat16 and has_kernel(self.word_table.device)
        self._recorded = RecordedPasses(self._record_cls, self.config.num_heads) if recordable else None

    def _prepare(self, layer: LayerWeights) -> LayerWeights:
        def linear(part: Linear) -> Linear:
            return fuse(Linear(copy(part.weight), copy(part.bias)))

        def norm(part: Norm) -> Norm:
            return Norm(copy(part.weight), copy(part.bias))

        def copy(tensor: Tensor) -> Tensor:
            return tensor.detach().to(self._dtype, copy=True)

        return LayerWeights(
            query=linear(layer.query),
            key_value=linear(layer.key_value),
            attention_output=linear(layer.attention_output),
            attention_norm=norm(layer.attention_norm),
            intermediate=linear(layer.intermediate),
            output=linear(layer.output),
            output_norm=norm(layer.output_norm),
        )

    def weights(self) -> EncoderWeights:
        return self._weights

    @property
    def word_table(self) -> Tensor:
        return self._weights.words

    @property
    def dtype(self) -> torch.dtype:
        return self._dtype

    def pack_pairs(
        self, captions: CaptionIds, tokens: Tensor, caption_index: Tensor, image_index: Tensor
    ) -> PackedInput:
        """As EncoderPass.pack_pairs, without caption_rows for few pairs on a GPU.

        These are laid out on the CPU and sent in one copy: on the GPU the layout is some 60 launches, which keep the
        host busy for nearly as long as the GPU is with 64 pairs."""
        few = len(caption_index) * (tokens.shape[1] + _MEAN_CAPTION) <= MOST_ROWS
        if tokens.device.type == "cpu" or not few:
            return super().pack_pairs(captions, tokens, caption_index, image_index)
        pairs = Sequences(captions.to("cpu"), caption_index.cpu(), image_index.cpu())
        return pack_mixture(self.word_table, self.special, tokens, [pairs]).packed

    @torch.no_grad()  # not inference_mode: a teacher's logits enter a loss
    def encode(self, packed: PackedInput, rows: Tensor | None = None) -> Tensor:
        """As EncoderPass.encode; on a CPU by parts of ROWS_AT_ONCE rows."""
        if packed.embeddings.device.type != "cpu" or len(packed.embeddings) <= ROWS_AT_ONCE:
            return super().encode(packed, rows)
        hidden = torch.cat([super(OptimizedEncoder, self).encode(part) for part in packed.parts(ROWS_AT_ONCE)])
        return hidden if rows is None else hidden[rows]

    @torch.no_grad()
    def encode_cls(self, packed: PackedInput) -> Tensor:
        """As EncoderPass.encode_cls; on a CPU by parts of ROWS_AT_ONCE rows, on a GPU small inputs by recorded
        launches."""
        if packed.embeddings.device.type != "cpu":
            if self._recorded is not None and self._recorded.suit(packed):
                self._check_fits_positions(packed, self._weights.positions)
                return self._recorded(packed)
            return super().encode_cls(packed)
        if len(packed.embeddings) <= ROWS_AT_ONCE:
            return super().encode_cls(packed)
        parts = packed.parts(ROWS_AT_ONCE)
        hidden = torch.cat([super(OptimizedEncoder, self).encode_cls(part) for part in parts])
        return hidden[packed.cls_rows.argsort().argsort()]

    def _embed(self, packed: PackedInput, weights: EncoderWeights) -> Tensor:
        if self._dtype != torch.bfloat16 or not has_triton(packed.embeddings.device):
            return super()._embed(packed, weights)
        from . import kernels

        return kernels.embed(
            packed.embeddings,
            packed.positions,
            packed.segments,
            weights.positions,
            weights.segments,
            *weights.norm,
            self.config.layer_norm_eps,
            self._dtype,
        )

    def _record_cls(self, packed: PackedInput, attention: Callable[..., Tensor]) -> Tensor:
        return self._encode_cls(packed, attention, self._weights)
