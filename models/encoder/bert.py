"""Parameters of a BERT under Hugging Face's names, and nothing else: joint_encoder.py computes with them.

Layout of transformers' BertForMaskedLM without pooler: `bert.embeddings.*`, `bert.encoder.layer.N.*`,
`cls.predictions.*`. Source: BERT (arXiv 1810.04805).
"""

from __future__ import annotations

from typing import TypeVar

import torch
from torch import Tensor, nn

from ..config import EncoderConfig
from .linear import ACTIVATIONS

M = TypeVar("M", bound=nn.Module)


def submodule(module: nn.Module, path: str, kind: type[M]) -> M:
    """The module at `path`, e.g. `embeddings.LayerNorm`, with its type, which nn.ModuleDict forgets.

    Called a hundred times a step; torch's own get_submodule is several times slower."""
    found: nn.Module | None = module
    for name in path.split("."):
        assert found is not None
        found = found._modules[name]
    assert isinstance(found, kind), f"{path} is {type(found).__name__}, not {kind.__name__}"
    return found


def bert_parameters(config: EncoderConfig) -> nn.ModuleDict:
    """`embeddings` and `encoder.layer` of a BertModel."""
    embeddings = nn.ModuleDict(
        {
            "word_embeddings": nn.Embedding(config.vocab_size, config.hidden_size),
            "position_embeddings": nn.Embedding(config.max_positions, config.hidden_size),
            "token_type_embeddings": nn.Embedding(config.type_vocab_size, config.hidden_size),
            "LayerNorm": _layer_norm(config),
        }
    )
    layers = nn.ModuleList(_layer(config) for _ in range(config.num_layers))
    return nn.ModuleDict({"embeddings": embeddings, "encoder": nn.ModuleDict({"layer": layers})})


def _layer(config: EncoderConfig) -> nn.ModuleDict:
    width = config.hidden_size
    attention = nn.ModuleDict({name: nn.Linear(width, width) for name in ("query", "key", "value")})
    return nn.ModuleDict(
        {
            "attention": nn.ModuleDict({"self": attention, "output": _dense_and_norm(width, config)}),
            "intermediate": nn.ModuleDict({"dense": nn.Linear(width, config.intermediate_size)}),
            "output": _dense_and_norm(config.intermediate_size, config),
        }
    )


def _dense_and_norm(width_in: int, config: EncoderConfig) -> nn.ModuleDict:
    return nn.ModuleDict({"dense": nn.Linear(width_in, config.hidden_size), "LayerNorm": _layer_norm(config)})


def _layer_norm(config: EncoderConfig) -> nn.LayerNorm:
    return nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)


class MaskedLanguageHead(nn.Module):
    """`cls.predictions`: dense, activation, norm, decoder; its weight is the word embeddings', its bias `bias`."""

    def __init__(self, config: EncoderConfig, word_embeddings: nn.Embedding):
        super().__init__()
        self.transform = _dense_and_norm(config.hidden_size, config)
        self.decoder = nn.Linear(config.hidden_size, config.vocab_size)
        self.decoder.weight = word_embeddings.weight
        self.bias = self.decoder.bias = nn.Parameter(torch.zeros(config.vocab_size))
        self.activation = ACTIVATIONS[config.activation]

    def forward(self, hidden: Tensor) -> Tensor:
        """Hidden states [R, H] -> logits [R, V]."""
        return self.decoder(self.transform["LayerNorm"](self.activation(self.transform["dense"](hidden))))


def initialise(module: nn.Module, std: float) -> None:
    """BERT's initial weights, for `nn.Module.apply`: normal with deviation `std`; norms keep 1 and 0."""
    if isinstance(module, nn.Linear | nn.Embedding):
        nn.init.normal_(module.weight, std=std)
    if isinstance(module, nn.Linear):
        nn.init.zeros_(module.bias)
