"""Mining: the hardest valid ones, never a true match, whatever the number of ranks."""

import numpy as np
import pytest
import torch

from data.batches import random_stream
from models.errors import UserError
from training.hard_negatives import group_neighbours, mine_hard_negatives


def random_batch(seed: int, size: int = 12):
    """Similarities, and exclusions as they are in practice: shared images and equal captions."""
    generator = torch.Generator().manual_seed(seed)
    similarity = torch.randn(size, size, generator=generator)
    images = torch.randint(size // 2, (size,), generator=generator)
    captions = torch.randint(size, (size,), generator=generator)
    excluded = (images[:, None] == images) | (captions[:, None] == captions)
    return similarity, excluded


def streams(rows, seed=0):
    return [random_stream(seed, 0, int(row)) for row in rows]


@pytest.mark.parametrize("seed", range(5))
def test_the_hardest_are_found_as_by_a_plain_loop(seed):
    similarity, excluded = random_batch(seed)
    mined = mine_hard_negatives(similarity, excluded, num_negatives=3)
    for i in range(len(similarity)):
        images = sorted((j for j in range(12) if not excluded[i, j]), key=lambda j: -similarity[i, j])[:3]
        captions = sorted((j for j in range(12) if not excluded[j, i]), key=lambda j: -similarity[j, i])[:3]
        assert mined.images[i, mined.images_valid[i]].tolist() == images
        assert mined.captions[i, mined.captions_valid[i]].tolist() == captions


@pytest.mark.parametrize("temperature, random_share", [(None, 0.0), (None, 1.0), (0.05, 0.0), (0.05, 0.5)])
@pytest.mark.parametrize("seed", range(4))
def test_a_true_match_is_never_a_negative(seed, temperature, random_share):
    similarity, excluded = random_batch(seed)
    rows = torch.arange(12)
    mined = mine_hard_negatives(similarity, excluded, 4, rows, random_share, temperature, streams(rows, seed))
    assert not excluded[rows[:, None], mined.images][mined.images_valid].any()
    assert not excluded.T[rows[:, None], mined.captions][mined.captions_valid].any()
    assert mined.images_valid.any() and mined.captions_valid.any()


def test_a_row_with_too_few_valid_negatives_uses_those_it_has():
    similarity, excluded = torch.randn(4, 4), torch.ones(4, 4, dtype=torch.bool)
    excluded[0, 2] = False
    mined = mine_hard_negatives(similarity, excluded, num_negatives=2)
    assert mined.images[0, 0] == 2
    assert mined.images_valid.tolist() == [[True, False]] + 3 * [[False, False]]
    assert mined.captions_valid.sum() == 1 and mined.captions[2, 0] == 0


def test_mining_some_rows_is_mining_all_and_taking_those():
    similarity, excluded = random_batch(1)
    rows = torch.tensor([7, 2, 9])
    whole = mine_hard_negatives(similarity, excluded, 3, None, 0.5, 0.1, streams(range(12)))
    part = mine_hard_negatives(similarity, excluded, 3, rows, 0.5, 0.1, streams(rows))
    assert torch.equal(part.images, whole.images[rows]) and torch.equal(part.captions, whole.captions[rows])


@pytest.mark.parametrize("scale", [1e4, 0.0, -1e4])
def test_sampling_survives_any_magnitude_of_similarity(scale):
    excluded = torch.eye(6, dtype=torch.bool)
    mined = mine_hard_negatives(torch.full((6, 6), scale), excluded, 2, None, 0.3, 1e-3, streams(range(6)))
    assert mined.images_valid.all() and mined.captions_valid.all()


def test_sampling_prefers_the_harder_in_proportion():
    similarity = torch.zeros(3, 3)
    similarity[0, 1] = 0.1 * np.log(3)  # three times as likely as column 2 at temperature 0.1
    excluded = torch.eye(3, dtype=torch.bool)
    rows = torch.tensor([0])
    chosen = [
        mine_hard_negatives(similarity, excluded, 1, rows, 0.0, 0.1, streams(rows, seed)).images.item()
        for seed in range(600)
    ]
    assert 0.68 < np.mean(np.array(chosen) == 1) < 0.82  # 0.75, four standard deviations


def test_nan_similarities_are_refused():
    with pytest.raises(UserError, match="NaN"):
        mine_hard_negatives(torch.full((2, 2), float("nan")), torch.eye(2, dtype=torch.bool), 1)


@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_groups_partition_the_batch(share):
    groups = group_neighbours(torch.randn(24, 24), 6, share, random_stream(0, 0, 1))
    assert groups.shape == (4, 6) and sorted(groups.flatten().tolist()) == list(range(24))


def test_groups_without_random_members_are_the_clusters():
    cluster = torch.arange(12) % 3
    similarity = (cluster[:, None] == cluster).float() + 0.01 * torch.randn(12, 12)
    groups = group_neighbours(similarity, 4, 0.0, random_stream(0, 0, 2))
    assert all(len(set(cluster[group].tolist())) == 1 for group in groups)
