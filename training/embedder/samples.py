"""The data of contrastive training: one split's images and captions in memory, and how batches are drawn from them.

Letters: N images, C captions, S image side in pixels, L context length in tokens, B pairs of a batch.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
import torch.nn.functional as F
from open_clip.transform import PreprocessCfg, image_transform_v2
from torch import Tensor
from tqdm import tqdm

from data.caption_datasets import CaptionDataset
from models.language.captions import canonical_caption

DECODERS = 4


@dataclass
class Samples:
    """One split in memory: pixels and token ids, or, under frozen towers, the features that the heads read."""

    images: Tensor
    """[N, 3, S, S] uint8, or [N, F] float32 features."""
    texts: Tensor
    """[C, L] int64 token ids, or [C, F] float32 features."""
    caption_starts: Tensor
    """[N + 1]: captions of image i are caption_starts[i] : caption_starts[i + 1]."""
    identities: list[frozenset]
    """For each image its canonical captions and the hash of its pixels: images that share one are never negatives."""

    @property
    def caption_image(self) -> Tensor:
        """[C]: the image of each caption."""
        return torch.arange(len(self.images)).repeat_interleave(self.caption_starts.diff())


def load_samples(
    dataset: CaptionDataset, preprocess: dict, side: int, tokenize: Callable[[list[str]], Tensor]
) -> Samples:
    """Decode every image of `dataset` to [3, side, side] and tokenise every caption.

    `preprocess` is open_clip's preprocess_cfg; mean and std are left to `normalise`. Raises ImageError with the file.
    """
    preprocessing = PreprocessCfg(**preprocess | {"size": side, "mean": (0.0,) * 3, "std": (1.0,) * 3})
    transform = image_transform_v2(preprocessing, is_train=False)

    def decode(index: int) -> Tensor:
        return (transform(dataset.open_image(index)) * 255).round().to(torch.uint8)

    indices = range(len(dataset))
    with ThreadPoolExecutor(DECODERS) as pool:
        images = torch.stack(list(tqdm(pool.map(decode, indices), total=len(dataset), desc="images", unit="image")))
    starts = [dataset.caption_range(index)[0] for index in indices] + [len(dataset.captions)]
    keys = [canonical_caption(caption) for caption in dataset.captions]
    identities = [
        frozenset(keys[start:stop]) | {hash(images[index].numpy().tobytes())}
        for index, (start, stop) in enumerate(pairwise(starts))
    ]
    return Samples(images, tokenize(list(dataset.captions)), torch.tensor(starts), identities)


def draw_batch(samples: Samples, size: int, seed: int, step: int) -> tuple[Tensor, Tensor]:
    """Image and caption indices [B], [B] of one step: a function of (seed, step), nothing else.

    No two images of a batch share a caption or their pixels: such a pair would be pushed apart as mutual negatives.
    B is less than `size` only if the split has too few such images."""
    random = np.random.default_rng((seed, step))
    taken: set = set()
    images = []
    for image in random.permutation(len(samples.images)).tolist():
        if taken.isdisjoint(samples.identities[image]):
            taken |= samples.identities[image]
            images.append(image)
            if len(images) == size:
                break
    chosen = torch.tensor(images)
    starts, stops = samples.caption_starts[chosen], samples.caption_starts[chosen + 1]
    captions = starts + (torch.from_numpy(random.random(len(images))) * (stops - starts)).long()
    return chosen, captions


def normalise(pixels: Tensor, preprocess: dict) -> Tensor:
    """[B, 3, S, S] uint8 -> float32 with open_clip's mean and std."""
    mean, std = (pixels.new_tensor(preprocess[key], dtype=torch.float32).view(1, 3, 1, 1) for key in ("mean", "std"))
    return (pixels.float() / 255 - mean) / std


def cached_side(image_side: int, min_crop: float) -> int:
    """Side to decode images to, so that the smallest crop still has `image_side` pixels."""
    return math.ceil(image_side / math.sqrt(min_crop))


def random_crops(images: Tensor, side: int, min_crop: float, seed: int, step: int) -> Tensor:
    """[B, 3, H, H] float -> [B, 3, side, side]: square crops of min_crop to 1 of the area. Never mirrored: captions
    tell left from right."""
    generator = torch.Generator().manual_seed(seed * 1_000_003 + step)
    draws = torch.rand(len(images), 3, generator=generator).to(images.device)
    scale = (min_crop + (1 - min_crop) * draws[:, 0]).sqrt()
    shift = (1 - scale)[:, None] * (2 * draws[:, 1:] - 1)
    theta = torch.zeros(len(images), 2, 3, device=images.device)
    theta[:, 0, 0], theta[:, 1, 1], theta[:, :, 2] = scale, scale, shift
    grid = F.affine_grid(theta, [len(images), 3, side, side], align_corners=False)
    return F.grid_sample(images, grid, mode="bilinear", padding_mode="border", align_corners=False)
