"""The embedding search: the images of highest cosine with a query, exactly, equal ones in the store's order.

Letters: N images, De embedding width, D images found.
"""

from __future__ import annotations

import torch
from torch import Tensor


def nearest(query: Tensor, images: Tensor, depth: int) -> tuple[Tensor, Tensor]:
    """The `depth` rows of `images` [N, De] of highest cosine with `query` [De]; both float32, normalised.

    Returns rows [D] int64, best first, and their cosines [D] float32, D = min(depth, N). Equal cosines are in the order
    of the rows. Cosines are sums in float64, rounded to float32: images with the same embedding tie exactly, wherever
    they lie in the product."""
    depth = min(depth, len(images))
    rough = images @ query
    # A float32 sum of De products of unit vectors is off by De roundings at most: no image of the result lies lower.
    error = 2 * images.shape[1] * torch.finfo(torch.float32).eps
    rows = (rough >= rough.topk(depth).values[-1] - error).nonzero().squeeze(1)
    cosines = (images[rows].double() @ query.double()).float()
    best = cosines.argsort(descending=True, stable=True)[:depth]
    return rows[best], cosines[best]
