"""Hard negatives, mined over the global batch by the frozen backbone's own similarity, on the CPU.

Letters: B rows of the global batch (row i: caption i and its image i), b rows of this rank, h negatives per positive,
G groups of g rows. Source: EDJE (arXiv 2510.06820), training: hard negatives by the embedding model's similarity. The
published code excludes only the same image for images and only the same caption for captions; here the caller excludes
both in both directions (data/neighbours.py), so that a true match is never trained as a negative.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from models.errors import UserError


@dataclass(frozen=True)
class HardNegatives:
    """Negatives of some rows: negative images of their captions and negative captions of their images.

    images, captions: [b, h] rows of the global batch, hardest first; images_valid, captions_valid: [b, h] bool, False
    where a row has fewer than h valid negatives (it then uses those it has)."""

    images: Tensor
    images_valid: Tensor
    captions: Tensor
    captions_valid: Tensor


def mine_hard_negatives(
    similarity: Tensor,
    excluded: Tensor,
    num_negatives: int,
    rows: Tensor | None = None,
    random_share: float = 0.0,
    temperature: float | None = None,
    streams: list[np.random.Generator] | None = None,
) -> HardNegatives:
    """The h hardest negatives of each row, in both directions.

    similarity: [B, B] float32, row: caption, column: image; excluded: [B, B] bool, likewise. rows: [b] rows to mine
    for (all by default). temperature: draw in proportion to exp(similarity / temperature) instead of taking the
    hardest (Gumbel top-h: in log space, so no weight can become a NaN). random_share: share of negatives replaced by
    uniformly drawn ones. Draws need `streams`, one a row, so that they don't depend on the number of ranks.

    Raises UserError if similarity holds NaN."""
    if np.isnan(similarity.numpy()).any():
        raise UserError("the backbone's similarities hold NaN; its weights or the images are damaged")
    rows = torch.arange(len(similarity)) if rows is None else rows
    directions = []
    for scores, left_out in ((similarity[rows], excluded[rows]), (similarity.T[rows], excluded.T[rows])):
        if streams is not None:
            scores = _with_draws(scores, num_negatives, random_share, temperature, streams)
        scores = scores.masked_fill(left_out, -torch.inf)
        values, index = scores.topk(min(num_negatives, scores.shape[1]), dim=1)
        directions += [index, torch.isfinite(values)]
    return HardNegatives(*directions)


def _with_draws(
    scores: Tensor,
    num_negatives: int,
    random_share: float,
    temperature: float | None,
    streams: list[np.random.Generator],
) -> Tensor:
    """Scores whose top-h is the wanted draw: Gumbel noise for sampling, then random columns lifted above the rest."""
    noise = torch.from_numpy(np.stack([s.gumbel(size=scores.shape[1]) for s in streams])).to(scores)
    if temperature is not None:
        scores = scores / temperature + noise
    num_random = np.array([s.binomial(num_negatives, random_share) for s in streams])
    # A second, independent permutation of the columns; its first num_random ones go to the front.
    ranks = torch.from_numpy(np.stack([s.permutation(scores.shape[1]) for s in streams]))
    lifted = ranks < torch.from_numpy(num_random)[:, None]
    return torch.where(lifted, scores.max() + 1 + ranks.to(scores), scores)


def group_neighbours(similarity: Tensor, group_size: int, random_share: float, stream: np.random.Generator) -> Tensor:
    """Partition the batch into groups of mutual neighbours: [B, B] similarity -> [B / g, g] rows.

    Takes rows in random order; each not yet placed opens a group and fills it with the nearest rows that are left, or,
    with probability random_share, with random ones. B must be a multiple of g."""
    nearness = (similarity + similarity.T).numpy()
    left = stream.permutation(len(nearness)).tolist()
    groups = []
    while left:
        group = [left.pop(0)]
        while len(group) < group_size:
            is_random = stream.random() < random_share
            chosen = int(stream.integers(len(left))) if is_random else int(np.argmax(nearness[group[0], left]))
            group.append(left.pop(chosen))
        groups.append(group)
    return torch.tensor(groups)
