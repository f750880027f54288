"""Neighbours against brute force: nearest in both directions, never one that bears the same caption."""

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from data.caption_datasets import CaptionDataset
from data.neighbours import CaptionKeys, nearest_images

WORDS = ["cat", "dog", "ball", "cube", "tree", "car", "Cat!", "red dog", "a ball", "house"]


def random_dataset(seed: int, num_images: int = 14) -> CaptionDataset:
    """One to four captions an image, with repeats among images and within one."""
    rng = np.random.default_rng(seed)
    counts = rng.integers(1, 5, num_images)
    captions = [WORDS[i] for i in rng.integers(len(WORDS), size=counts.sum())]
    owner = np.repeat(np.arange(num_images), counts)
    return CaptionDataset(".", [f"{i}.png" for i in range(num_images)], captions, owner, [None] * num_images)


def captions_of(dataset, image):
    return {dataset.captions[c].lower().strip("!") for c in np.flatnonzero(dataset.caption_image == image)}


@pytest.mark.parametrize("seed", range(5))
def test_true_pairs_are_those_whose_image_bears_the_caption(seed):
    dataset = random_dataset(seed)
    true = CaptionKeys(dataset).true_pairs(torch.arange(len(dataset.captions)), torch.arange(len(dataset)))
    for c, caption in enumerate(dataset.captions):
        for i in range(len(dataset)):
            assert true[c, i] == (caption.lower().strip("!") in captions_of(dataset, i))


@pytest.mark.parametrize("labelled", [False, True])
@pytest.mark.parametrize("seed", range(5))
def test_neighbours_are_the_nearest_valid_images(seed, labelled):
    dataset = random_dataset(seed)
    generator = torch.Generator().manual_seed(seed)
    images = F.normalize(torch.randn(14, 6, generator=generator), dim=-1)
    texts = F.normalize(torch.randn(len(dataset.captions), 6, generator=generator), dim=-1)
    labels = [str(i % 2) for i in range(14)] if labelled else None
    found = nearest_images(CaptionKeys(dataset), dataset, images, texts, 5, labels)
    means = [F.normalize(texts[dataset.caption_image == i].sum(0), dim=0) for i in range(14)]
    for i in range(14):
        valid = [
            j
            for j in range(14)
            if not captions_of(dataset, i) & captions_of(dataset, j) and (labels is None or labels[i] == labels[j])
        ]
        nearness = {j: float(means[i] @ images[j] + means[j] @ images[i]) for j in valid}
        expected = sorted(valid, key=nearness.get, reverse=True)[:5]
        if expected:
            assert found[i, : len(expected)].tolist() == expected
            assert set(found[i].tolist()) == set(expected)
        else:
            assert set(found[i].tolist()) == {i}
