"""The joint encoder: a BERT over packed captions and vision tokens, with Hugging Face's parameter names.

What EDJE pays per candidate, so it is built for throughput: no padding (models/packing.py), queries, keys and values
in one matrix product, and in the last layer only the rows that are wanted. One function holds the mathematics;
training runs it on the parameters themselves (plain autograd, autocast), inference on weights prepared once
(`optimized`). Parameters are named as in transformers' BertForMaskedLM, so the weights of any BERT go in and out.
Letters: T packed rows, H width, R wanted rows, V vocabulary. Source: BERT (arXiv 1810.04805), EDJE (arXiv 2510.06820).

    packed = encoder.pack_pairs(captions, tokens, caption_index, image_index)
    cls = encoder.encode(packed, packed.cls_rows)                  # [Q, H]
    fast = encoder.optimized(torch.bfloat16)                       # the same two calls, weights frozen
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields, replace
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .captions import CaptionIds
from .config import EncoderConfig
from .errors import UserError
from .packing import Group, PackedInput, SpecialTokens, pack_captions, pack_images, pack_pairs
from .precision import fastest_dtype
from .pretrained import read_bert, read_bert_config

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "gelu_new": lambda x: F.gelu(x, approximate="tanh"),
    "relu": F.relu,
}


class Affine(NamedTuple):
    """Weight and bias of a linear map or of a norm."""

    weight: Tensor
    bias: Tensor


class LayerWeights(NamedTuple):
    """What one layer computes with: parameters in training, prepared copies in inference."""

    qkv: Affine
    attention_output: Affine
    attention_norm: Affine
    intermediate: Affine
    output: Affine
    output_norm: Affine


class EncoderWeights(NamedTuple):
    """Tables [rows, H], the norm behind them, and the layers."""

    words: Tensor
    positions: Tensor
    segments: Tensor
    norm: Affine
    layers: tuple[LayerWeights, ...]


def _linear(x: Tensor, affine: Affine) -> Tensor:
    return F.linear(x, affine.weight, affine.bias)


def _attend(q: Tensor, k: Tensor, v: Tensor, dropout: float) -> Tensor:
    """q [n, heads, queries, d], k and v [n, heads, L, d] -> [n * queries, heads * d]."""
    if q.requires_grad and q.device.type == "cpu":
        # At these lengths (below 150) the backward pass of plain products is faster than the fused kernel's.
        probabilities = torch.softmax(q @ (k * q.shape[-1] ** -0.5).transpose(-1, -2), dim=-1)
        context = F.dropout(probabilities, dropout, dropout > 0) @ v
    else:
        context = F.scaled_dot_product_attention(q, k, v, dropout_p=dropout)
    return context.transpose(1, 2).flatten(2).flatten(0, 1)


class EncoderPass:
    """The mathematics, shared by the training form and the inference form; subclasses say with which weights."""

    config: EncoderConfig
    special: SpecialTokens
    training: bool

    def weights(self) -> EncoderWeights:
        raise NotImplementedError

    @property
    def word_table(self) -> Tensor:
        raise NotImplementedError

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

    def encode(self, packed: PackedInput, rows: Tensor | None = None) -> Tensor:
        """Last hidden state of all rows [T, H], or of `rows` [R] int64 in any order -> [R, H].

        After its attention the last layer runs on the wanted rows alone; where `rows` is `packed.cls_rows` itself,
        its queries too. Raises UserError if a sequence is longer than the position table."""
        weights = self.weights()
        x = self._embed(packed, weights)
        for layer in weights.layers[:-1]:
            x = self._finish_layer(x, self._context(x, packed.groups, layer), layer)
        last = weights.layers[-1]
        if rows is packed.cls_rows:
            return self._cls_of_last_layer(x, packed, last)
        context = self._context(x, packed.groups, last)
        if rows is not None:
            x, context = x[rows], context[rows]
        return self._finish_layer(x, context, last)

    def _embed(self, packed: PackedInput, weights: EncoderWeights) -> Tensor:
        longest = packed.groups[-1].length
        if longest > len(weights.positions):
            raise UserError(
                f"a sequence of {longest} tokens does not fit the joint encoder's {len(weights.positions)} "
                "positions; cut the caption or raise encoder.max_positions"
            )
        x = packed.embeddings + F.embedding(packed.positions, weights.positions)
        x = self._norm(x + F.embedding(packed.segments, weights.segments), weights.norm)
        return self._dropout(x).to(weights.layers[0].qkv.weight.dtype)

    def _context(self, x: Tensor, groups: tuple[Group, ...], layer: LayerWeights) -> Tensor:
        """Attention of every row over its own sequence: [T, H] -> [T, H], before the output projection."""
        qkv = _linear(x, layer.qkv).unflatten(1, (3, self.config.num_heads, -1))
        contexts = []
        for group in groups:
            q, k, v = qkv[group.rows].unflatten(0, (group.count, group.length)).permute(2, 0, 3, 1, 4)
            contexts.append(_attend(q, k, v, self._attention_dropout))
        return contexts[0] if len(contexts) == 1 else torch.cat(contexts)

    def _cls_of_last_layer(self, x: Tensor, packed: PackedInput, layer: LayerWeights) -> Tensor:
        """The last layer with one query a sequence: [T, H] -> [Q, H] in the caller's order."""
        heads, width = self.config.num_heads, x.shape[1]
        cls_rows, order = packed.cls_rows.sort()
        cls = x[cls_rows]
        q = F.linear(cls, layer.qkv.weight[:width], layer.qkv.bias[:width]).unflatten(1, (heads, 1, -1))
        kv = F.linear(x, layer.qkv.weight[width:], layer.qkv.bias[width:]).unflatten(1, (2, heads, -1))
        queries = q.split([group.count for group in packed.groups])
        contexts = []
        for group, query in zip(packed.groups, queries, strict=True):
            k, v = kv[group.rows].unflatten(0, (group.count, group.length)).permute(2, 0, 3, 1, 4)
            contexts.append(_attend(query, k, v, self._attention_dropout))
        return self._finish_layer(cls, torch.cat(contexts), layer)[order.argsort()]

    def _finish_layer(self, x: Tensor, context: Tensor, layer: LayerWeights) -> Tensor:
        """Everything of a layer that is not attention, row by row: x, context [R, H] -> [R, H]."""
        x = self._norm(x + self._dropout(_linear(context, layer.attention_output)), layer.attention_norm)
        inner = ACTIVATIONS[self.config.activation](_linear(x, layer.intermediate))
        return self._norm(x + self._dropout(_linear(inner, layer.output)), layer.output_norm)

    def _norm(self, x: Tensor, affine: Affine) -> Tensor:
        return F.layer_norm(x, x.shape[-1:], affine.weight, affine.bias, self.config.layer_norm_eps)

    def _dropout(self, x: Tensor) -> Tensor:
        return F.dropout(x, self.config.hidden_dropout, self.training)

    @property
    def _attention_dropout(self) -> float:
        return self.config.attention_dropout if self.training else 0.0


def _linear_and_norm(width_in: int, config: EncoderConfig) -> nn.ModuleDict:
    """BERT's `output` block: the names `dense` and `LayerNorm`."""
    return nn.ModuleDict({"dense": nn.Linear(width_in, config.hidden_size), "LayerNorm": _layer_norm(config)})


def _layer_norm(config: EncoderConfig) -> nn.LayerNorm:
    return nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)


def _bert_layer(config: EncoderConfig) -> nn.ModuleDict:
    """Parameters of one layer under Hugging Face's names."""
    width = config.hidden_size
    attention = nn.ModuleDict({name: nn.Linear(width, width) for name in ("query", "key", "value")})
    return nn.ModuleDict(
        {
            "attention": nn.ModuleDict({"self": attention, "output": _linear_and_norm(width, config)}),
            "intermediate": nn.ModuleDict({"dense": nn.Linear(width, config.intermediate_size)}),
            "output": _linear_and_norm(config.intermediate_size, config),
        }
    )


def _bert(config: EncoderConfig) -> nn.ModuleDict:
    """Parameters of a BertModel without pooler."""
    embeddings = nn.ModuleDict(
        {
            "word_embeddings": nn.Embedding(config.vocab_size, config.hidden_size),
            "position_embeddings": nn.Embedding(config.max_positions, config.hidden_size),
            "token_type_embeddings": nn.Embedding(config.type_vocab_size, config.hidden_size),
            "LayerNorm": _layer_norm(config),
        }
    )
    layers = nn.ModuleList(_bert_layer(config) for _ in range(config.num_layers))
    return nn.ModuleDict({"embeddings": embeddings, "encoder": nn.ModuleDict({"layer": layers})})


class _MaskedLanguageHead(nn.Module):
    """BertForMaskedLM's `cls.predictions`: dense, activation, norm, decoder tied to the word embeddings."""

    def __init__(self, config: EncoderConfig, word_embeddings: nn.Embedding):
        super().__init__()
        self.transform = _linear_and_norm(config.hidden_size, config)
        self.decoder = nn.Linear(config.hidden_size, config.vocab_size)
        self.decoder.weight = word_embeddings.weight
        self.bias = self.decoder.bias = nn.Parameter(torch.zeros(config.vocab_size))
        self.activation = ACTIVATIONS[config.activation]

    def forward(self, hidden: Tensor) -> Tensor:
        return self.decoder(self.transform["LayerNorm"](self.activation(self.transform["dense"](hidden))))


def _affine(module: nn.Linear | nn.LayerNorm) -> Affine:
    return Affine(module.weight, module.bias)


class JointEncoder(EncoderPass, nn.Module):
    """The training form. State dict: transformers' BertForMaskedLM without pooler, tied tensors included.

    MiniLM-L12-H384-uncased: 33 million parameters, of which 21 million in the 12 layers."""

    def __init__(self, config: EncoderConfig, *, cls_id: int, sep_id: int):
        """Random weights as BERT's (normal, 0.02). Raises UserError for an activation that is not known."""
        super().__init__()
        if config.activation not in ACTIVATIONS:
            raise UserError(f"encoder.activation is {config.activation!r}; expected one of {sorted(ACTIVATIONS)}")
        self.config = config
        self.special = SpecialTokens(cls_id, sep_id)
        self.bert = _bert(config)
        self.cls = nn.ModuleDict(
            {"predictions": _MaskedLanguageHead(config, self.bert["embeddings"]["word_embeddings"])}
        )
        self.apply(_initialise)

    @property
    def word_table(self) -> Tensor:
        """[V, H], tied to the MLM decoder."""
        return self.bert["embeddings"]["word_embeddings"].weight

    def weights(self) -> EncoderWeights:
        """The parameters as the pass wants them; gradients flow through the concatenation of q, k and v."""
        embeddings = self.bert["embeddings"]
        return EncoderWeights(
            words=self.word_table,
            positions=embeddings["position_embeddings"].weight,
            segments=embeddings["token_type_embeddings"].weight,
            norm=_affine(embeddings["LayerNorm"]),
            layers=tuple(_layer_weights(layer) for layer in self.bert["encoder"]["layer"]),
        )

    def mlm_logits(self, hidden: Tensor) -> Tensor:
        """Hidden states [R, H] -> logits over the vocabulary [R, V], by the language model's own head."""
        return self.cls["predictions"](hidden)

    def extend_positions(self, rows: int) -> None:
        """Lengthen the position table to `rows` by repeating its last row; a longer table stays as it is."""
        embedding = self.bert["embeddings"]["position_embeddings"]
        if rows > embedding.num_embeddings:
            embedding.weight = nn.Parameter(_with_rows(embedding.weight.detach(), rows))
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
                state[key] = _with_rows(value, len(own[key]))
            elif len(value) < len(own[key]):
                state[key] = torch.cat([value, own[key][len(value) :]])
        self.load_state_dict(state, strict=False)
        return missing

    def _check_fits(self, name: str) -> None:
        source, grows = read_bert_config(name), ("vocab_size", "max_positions")
        for field in fields(EncoderConfig):
            theirs, ours = getattr(source, field.name), getattr(self.config, field.name)
            if field.name.endswith("_dropout") or theirs == ours or (field.name in grows and theirs < ours):
                continue
            least = "at least " if field.name in grows else ""
            raise UserError(f"{name}: its weights need encoder.{field.name} {least}{theirs}, configured is {ours}")

    def optimized(self, dtype: torch.dtype | None = None) -> OptimizedEncoder:
        """The inference form, a frozen copy in `dtype` (default: the fastest that this device has)."""
        return OptimizedEncoder(self, dtype or fastest_dtype(self.word_table.device))


class OptimizedEncoder(EncoderPass):
    """The inference form: weights detached, q, k and v joined, linear maps and norms in one dtype, no dropout.

    Tables stay float32, so that packing and the first norm are exact. A snapshot: it does not see later changes."""

    training = False

    def __init__(self, encoder: JointEncoder, dtype: torch.dtype):
        self.config = encoder.config
        self.special = encoder.special
        self.dtype = dtype
        with torch.no_grad():
            weights = encoder.weights()
            layers = tuple(_cast(layer, dtype) for layer in weights.layers)
            tables = [table.detach().clone() for table in (weights.words, weights.positions, weights.segments)]
            norm = Affine(*(part.detach().clone() for part in weights.norm))
        self._weights = EncoderWeights(*tables, norm, layers)

    def weights(self) -> EncoderWeights:
        return self._weights

    @property
    def word_table(self) -> Tensor:
        return self._weights.words


def _cast(layer: LayerWeights, dtype: torch.dtype) -> LayerWeights:
    """Copies in `dtype`; the copy is what makes the result a snapshot."""
    return LayerWeights(*(Affine(*(part.detach().to(dtype, copy=True) for part in affine)) for affine in layer))


def _with_rows(table: Tensor, rows: int) -> Tensor:
    """`table` with its last row repeated until it has `rows`; the parity origin extends positions so."""
    return torch.cat([table, table[-1:].expand(max(0, rows - len(table)), -1)])


def _initialise(module: nn.Module) -> None:
    """BERT's initial weights; norms keep 1 and 0."""
    if isinstance(module, nn.Linear | nn.Embedding):
        nn.init.normal_(module.weight, std=0.02)
    if isinstance(module, nn.Linear):
        nn.init.zeros_(module.bias)


def _layer_weights(layer: nn.ModuleDict) -> LayerWeights:
    attention = layer["attention"]
    parts = [attention["self"][name] for name in ("query", "key", "value")]
    return LayerWeights(
        qkv=Affine(torch.cat([part.weight for part in parts]), torch.cat([part.bias for part in parts])),
        attention_output=_affine(attention["output"]["dense"]),
        attention_norm=_affine(attention["output"]["LayerNorm"]),
        intermediate=_affine(layer["intermediate"]["dense"]),
        output=_affine(layer["output"]["dense"]),
        output_norm=_affine(layer["output"]["LayerNorm"]),
    )
