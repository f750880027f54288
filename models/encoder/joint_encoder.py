"""The joint encoder: a BERT over packed captions and vision tokens, with Hugging Face's parameter names.

What EDJE pays per candidate, so it is built for throughput. This is its form for training, on the parameters themselves
(plain autograd, autocast); the mathematics is in encoder_pass.py. Letters: T packed rows, H width, R wanted rows,
Q sequences, V vocabulary. Source: BERT (arXiv 1810.04805), EDJE (arXiv 2510.06820).

    packed = encoder.pack_pairs(captions, tokens, caption_index, image_index)
    cls = encoder.encode_cls(packed)                               # [Q, H]
    fast = encoder.optimized(torch.bfloat16)                       # the same two calls, weights frozen
"""

from __future__ import annotations

from dataclasses import fields, replace
from functools import partial

import torch
from torch import Tensor, nn

from ..config import EncoderConfig
from ..errors import UserError
from ..language.pretrained import read_bert, read_bert_config
from ..precision import fastest_dtype
from .bert import MaskedLanguageHead, bert_parameters, initialise, submodule
from .encoder_pass import EncoderPass, EncoderWeights, LayerWeights
from .linear import ACTIVATIONS, Linear, Norm
from .optimized_encoder import OptimizedEncoder
from .packing import SpecialTokens


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


def with_rows(table: Tensor, rows: int) -> Tensor:
    """`table` with its last row repeated until it has `rows`; the parity origin extends positions so."""
    return torch.cat([table, table[-1:].expand(max(0, rows - len(table)), -1)])
