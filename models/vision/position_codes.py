"""Codes of positions in an image: sines and cosines of row and column, for tokens that do not tell where they lie.

Source: DETR (arXiv 2005.12872), which adds such codes to a convolutional map.
"""

from __future__ import annotations

import torch
from torch import Tensor


def grid_centres(rows: int, columns: int) -> Tensor:
    """Centres of a grid's cells, row by row: [rows * columns, 2], row and column as shares of the image's sides."""
    return torch.cartesian_prod(*((torch.arange(n) + 0.5) / n for n in (rows, columns)))


def position_codes(positions: Tensor, frequencies: Tensor) -> Tensor:
    """Positions [N, 2] (row, column), frequencies [F] in radians per unit -> [N, 4F]: the row's 2F, then the column's.

    Every code has the norm sqrt(2F)."""
    angles = positions[:, :, None] * frequencies
    return torch.cat([angles.sin(), angles.cos()], dim=-1).flatten(1)
