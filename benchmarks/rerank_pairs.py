"""The pairs that are scored in the benchmark of reranking, and our way of scoring them.

Letters: Q pairs, m vision tokens, H width.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from models.encoder.encoder_pass import EncoderPass
from models.encoder.optimized_encoder import pairs_at_once
from models.language.captions import CaptionIds
from models.matching import MatchHead

NUM_VISION_TOKENS = 64


@dataclass(frozen=True)
class Pairs:
    """Q captions and the vision tokens [Q, m, H] of their images."""

    captions: CaptionIds
    tokens: Tensor

    def select(self, index: Tensor) -> Pairs:
        return Pairs(self.captions.select(index), self.tokens[index])


def our_logits(encoder: EncoderPass, head: MatchHead, pairs: Pairs) -> Tensor:
    """Logits [Q] by the product's own code, in batches of its own size."""
    index = torch.arange(len(pairs.captions), device=pairs.tokens.device)
    logits = []
    for part in index.split(pairs_at_once(pairs.tokens.device, pairs.tokens.shape[1])):
        packed = encoder.pack_pairs(pairs.captions, pairs.tokens, part, part)
        logits.append(head(encoder.encode_cls(packed)))
    return torch.cat(logits)


def make_pairs(
    num_pairs: int,
    shortest: int,
    longest: int,
    width: int,
    device: torch.device,
    num_tokens: int = NUM_VISION_TOKENS,
) -> Pairs:
    """Random captions of `shortest` to `longest` pieces and random vision tokens."""
    lengths = torch.randint(shortest, longest + 1, (num_pairs,))
    ids = torch.randint(1000, 30000, (int(lengths.sum()),))
    return Pairs(CaptionIds(ids, lengths).to(device), torch.randn(num_pairs, num_tokens, width).to(device))
