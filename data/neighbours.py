"""Which captions and images must not be each other's negatives, and which images are near neighbours of which.

Letters: N images, C captions, B rows of a batch, De embedding width, K neighbours.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from models.language.captions import canonical_caption

from .caption_datasets import CaptionDataset

_BLOCK = 1024
"""Images whose similarities to all others are held at once: 1024 x 100,000 float32 are 0.4 GB."""


class CaptionKeys:
    """Knows for any caption and image of a data set whether the image bears that very caption.

    Captions are compared in canonical form, by a 64-bit hash. Two images of the same thing (another artist's
    drawing, a near duplicate with the same caption) are then never taken for each other's negatives.

    A caption's key is computed when it is first asked for: all of millions would take minutes before the first step."""

    def __init__(self, dataset: CaptionDataset):
        self._captions = dataset.captions
        self._keys = torch.zeros(len(dataset.captions), dtype=torch.int64)
        self._known = torch.zeros(len(dataset.captions), dtype=torch.bool)
        counts = np.bincount(dataset.caption_image, minlength=len(dataset))
        self._starts = torch.from_numpy(np.concatenate([[0], np.cumsum(counts)]))
        self._most = int(counts.max())

    def of_captions(self, captions: Tensor) -> Tensor:
        """Captions, any shape -> their keys, the same shape."""
        unknown = captions[~self._known[captions]].unique()
        self._keys[unknown] = torch.tensor([_key(self._captions[c]) for c in unknown.tolist()], dtype=torch.int64)
        self._known[unknown] = True
        return self._keys[captions]

    def of_images(self, images: Tensor) -> Tensor:
        """[B] images -> [B, most captions of an image] keys; an image with fewer repeats its first."""
        starts, stops = self._starts[images, None], self._starts[images + 1, None]
        index = starts + torch.arange(self._most)
        return self.of_captions(torch.where(index < stops, index, starts))

    def true_pairs(self, captions: Tensor, images: Tensor) -> Tensor:
        """[B] captions, [N] images -> [B, N] bool: caption i is one of image j's captions, so (i, j) is no negative.

        Holds for the caption's own image and for every image with an equal caption; the same caption is thereby
        excluded in both directions."""
        return (self.of_captions(captions)[:, None, None] == self.of_images(images)[None]).any(-1)

    def images_by_key(self) -> tuple[Tensor, Tensor]:
        """Key and image of each caption, [C] each."""
        keys = self.of_captions(torch.arange(len(self._keys)))
        return keys, torch.repeat_interleave(torch.arange(len(self._starts) - 1), self._starts.diff())


def _key(caption: str) -> int:
    digest = hashlib.blake2b(canonical_caption(caption).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little", signed=True)


def nearest_images(
    keys: CaptionKeys,
    dataset: CaptionDataset,
    image_embeddings: Tensor,
    text_embeddings: Tensor,
    num_neighbours: int,
    labels: Sequence[str | None] | None = None,
) -> Tensor:
    """The images that the first stage confuses most with each image, nearest first: [N, K] int64.

    image_embeddings [N, De], text_embeddings [C, De], normalised. Nearness of two images is the mean of both
    cross-modal similarities (captions of one with the other), so it is mutual. Images that share a caption are never
    neighbours, nor are images of different `labels` (e.g. another artist's). K is num_neighbours or, in a smaller
    set, N - 1; where an image has fewer, its nearest ones repeat."""
    texts = _mean_caption_embeddings(dataset, text_embeddings)
    label_ids = torch.from_numpy(np.unique([str(x) for x in labels], return_inverse=True)[1]) if labels else None
    num_neighbours = min(num_neighbours, len(dataset) - 1)
    blocks = []
    for start in range(0, len(dataset), _BLOCK):
        rows = torch.arange(start, min(start + _BLOCK, len(dataset)))
        nearness = texts[rows] @ image_embeddings.T + image_embeddings[rows] @ texts.T
        nearness[_share_a_caption(keys, rows, len(dataset))] = -torch.inf
        if label_ids is not None:
            nearness[label_ids[rows, None] != label_ids[None]] = -torch.inf
        values, indices = nearness.topk(num_neighbours, dim=1)
        count = torch.isfinite(values).sum(1, keepdim=True)
        repeated = torch.arange(num_neighbours)[None] % count.clamp(min=1)
        # An image without any neighbour falls back on itself; the group then takes a random image.
        blocks.append(torch.where(count > 0, indices.gather(1, repeated), rows[:, None]))
    return torch.cat(blocks)


def _mean_caption_embeddings(dataset: CaptionDataset, text_embeddings: Tensor) -> Tensor:
    """[C, De] -> [N, De], normalised."""
    total = torch.zeros(len(dataset), text_embeddings.shape[1])
    total.index_add_(0, torch.from_numpy(dataset.caption_image), text_embeddings.float())
    return torch.nn.functional.normalize(total, dim=-1)


def _share_a_caption(keys: CaptionKeys, rows: Tensor, num_images: int) -> Tensor:
    """[R] images -> [R, N] bool: the images share a canonical caption (an image does so with itself)."""
    all_keys, all_images = keys.images_by_key()
    order = all_keys.argsort()
    sorted_keys, sorted_images = all_keys[order], all_images[order]
    wanted = keys.of_images(rows)
    first = torch.searchsorted(sorted_keys, wanted.contiguous())
    last = torch.searchsorted(sorted_keys, wanted.contiguous(), right=True)
    shared = torch.zeros(len(rows), num_images, dtype=torch.bool)
    counts = (last - first).flatten()
    owner = torch.arange(len(rows)).repeat_interleave(wanted.shape[1]).repeat_interleave(counts)
    within = torch.arange(int(counts.sum())) - (counts.cumsum(0) - counts).repeat_interleave(counts)
    shared[owner, sorted_images[first.flatten().repeat_interleave(counts) + within]] = True
    return shared
