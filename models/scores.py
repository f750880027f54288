"""What a pair's score is made of: match logit, first-stage cosine, and the probability that a score stands for.

One place for the arithmetic, so that an application and an evaluation find the same numbers, bit for bit.
"""

from __future__ import annotations

import torch
from torch import Tensor


def fuse(logits: Tensor, similarities: Tensor, fusion_lambda: float) -> Tensor:
    """Fused scores: match logit + lambda * cosine, all float32 of one shape (BLIP's and BLIP-2's protocol)."""
    return logits + fusion_lambda * similarities


def probability(scores: Tensor, scale: float, offset: float) -> Tensor:
    """That a pair is right, by its score: sigmoid(scale * score + offset), of any shape (Platt's calibration)."""
    return torch.sigmoid(scale * scores + offset)


def softmax_within(scores: Tensor, group: Tensor) -> Tensor:
    """Softmax of scores [n] within each group; group: [n] int64, numbers from 0."""
    groups = int(group.max()) + 1 if len(group) else 0
    highest = scores.new_full((groups,), -torch.inf).scatter_reduce(0, group, scores, "amax")
    weights = (scores - highest[group]).exp()
    return weights / weights.new_zeros(groups).index_add(0, group, weights)[group]
