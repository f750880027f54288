"""The scores that rank candidates, and the probability that a candidate is right.

The match logit is the model's own score. The fused score adds the first stage's cosine; it is the default wherever a
checkpoint has a lambda. Evaluation and Reranker compute both by the functions of this module, so that a ranking is the
same wherever it is made. All are float32, as NumPy arrays or as tensors on any device.

    similarities = paired_cosines(text_embeddings, image_embeddings)     # [Q], [Q, De] each
    scores = fuse(logits, similarities, config.fusion_lambda)            # [Q]
    probability(scores, config.probability_scale, config.probability_offset)
"""

from __future__ import annotations

from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

Scores = TypeVar("Scores", np.ndarray, Tensor)


def paired_cosines(queries: Tensor, items: Tensor) -> Tensor:
    """Cosines of rows that belong together: [..., De] and [..., De], both normalised -> [...] float32.

    Summed in float64, as the evaluation's first stage does: once rounded, the sum does not depend on its order."""
    return (queries.double() * items.double()).sum(-1).float()


def fuse(logits: Scores, similarities: Scores, fusion_lambda: float) -> Scores:
    """logit + fusion_lambda * cosine, elementwise, float32 of the inputs' shape.

    Lambda, product and sum round to float32 one after the other, so that NumPy, CPU and GPU agree to the bit."""
    return logits + similarities * float(np.float32(fusion_lambda))


def probability(scores: Scores, scale: float, offset: float) -> Scores:
    """Probability that a candidate is right, from 0 to 1: sigmoid(scale * score + offset), shape and dtype of `scores`.

    scores: the checkpoint's default ones, fused where it has a lambda and match logits elsewhere; scale and offset were
    fitted on these (evaluation/calibration.py), so other scores give wrong numbers."""
    log_odds = scores * scale + offset
    if isinstance(log_odds, Tensor):
        return log_odds.sigmoid()
    return np.exp(-np.logaddexp(0, -log_odds))  # no overflow, however far the score is from 0


def softmax_within(scores: Tensor, group: Tensor) -> Tensor:
    """Softmax of scores [n] within each group; group: [n] int64, numbers from 0."""
    groups = int(group.max()) + 1 if len(group) else 0
    highest = scores.new_full((groups,), -torch.inf).scatter_reduce(0, group, scores, "amax")
    weights = (scores - highest[group]).exp()
    return weights / weights.new_zeros(groups).index_add(0, group, weights)[group]
