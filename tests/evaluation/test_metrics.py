"""Metrics against the plainest code that could be right, and against eccv-caption's functions."""

from __future__ import annotations

import numpy as np
import pytest
from eccv_caption._metrics import compute_r_at_k

from evaluation.metrics import (
    first_right_rank,
    gain_interval,
    helped_and_hurt,
    median_rank,
    recall_at_k,
    right_answers,
)


def random_captions(rng: np.random.Generator, num_images: int, captionless: int | None = None) -> np.ndarray:
    """[C] image of each caption, one to five an image; `captionless` gets none."""
    counts = rng.integers(1, 6, num_images)
    if captionless is not None:
        counts[captionless] = 0
    return np.repeat(np.arange(num_images), counts)


def random_rankings(rng: np.random.Generator, num_queries: int, num_items: int) -> np.ndarray:
    return np.argsort(rng.random((num_queries, num_items)), axis=1)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("k", [1, 3, 10])
def test_recall_equals_eccv_caption_in_both_directions(seed, k):
    rng = np.random.default_rng(seed)
    caption_image = random_captions(rng, 20)
    images = np.arange(20)
    for query_image, item_image in ((caption_image, images), (images, caption_image)):
        rankings = random_rankings(rng, len(query_image), len(item_image))
        truth = {query: np.flatnonzero(item_image == image).tolist() for query, image in enumerate(query_image)}
        theirs = compute_r_at_k({query: row.tolist() for query, row in enumerate(rankings)}, truth, K=k)
        hits = right_answers(rankings, query_image, item_image)
        assert recall_at_k(hits, k) == pytest.approx(100 * theirs, abs=1e-9)


def brute_force_recall(scores: np.ndarray, query_image: np.ndarray, item_image: np.ndarray, k: int) -> float:
    """Query by query, item by item; of equal scores the lower item number is first."""
    found = 0
    for query, image in enumerate(query_image):
        order = sorted(range(len(item_image)), key=lambda item, row=scores[query]: (-row[item], item))
        found += any(item_image[item] == image for item in order[:k])
    return 100.0 * found / len(query_image)


@pytest.mark.parametrize("seed", range(5))
def test_recall_matches_brute_force_with_ties_and_an_image_without_captions(seed):
    rng = np.random.default_rng(seed)
    caption_image = random_captions(rng, 15, captionless=4)
    images = np.arange(15)
    for query_image, item_image in ((caption_image, images), (images, caption_image)):
        scores = rng.integers(0, 4, (len(query_image), len(item_image))).astype(np.float32)  # many ties
        rankings = np.argsort(-scores, axis=1, kind="stable")
        hits = right_answers(rankings, query_image, item_image)
        for k in (1, 5, 10):
            assert recall_at_k(hits, k) == pytest.approx(brute_force_recall(scores, query_image, item_image, k))


def test_any_of_an_images_five_captions_is_right():
    caption_image = np.repeat([0, 1], 5)
    hits = right_answers(np.array([[7, 4], [2, 3]]), np.array([0, 1]), caption_image)
    np.testing.assert_array_equal(hits, [[False, True], [False, False]])
    assert [recall_at_k(hits, k) for k in (1, 5, 10)] == [0.0, 50.0, 50.0]


def test_helped_and_hurt_count_first_places_alone():
    before = np.array([[True, False], [False, True], [False, False], [True, False]])
    after = np.array([[False, True], [True, False], [False, True], [True, False]])
    assert helped_and_hurt(before, after) == (1, 1)


def test_first_right_rank_is_the_depth_where_nothing_is_right():
    np.testing.assert_array_equal(first_right_rank(np.array([[False, True, True], [False] * 3])), [1, 3])


def test_median_rank_counts_from_one_and_is_rounded_down():
    assert median_rank(np.array([0, 0, 7])) == 1.0
    assert median_rank(np.array([0, 3, 4, 90])) == 4.0  # between 4th and 5th place


def random_hits(seed: int, num_queries: int) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    return rng.random((num_queries, 3)) < 0.4, rng.random((num_queries, 3)) < 0.5


@pytest.mark.parametrize("seed", range(5))
def test_interval_contains_the_gain_and_is_the_same_each_time(seed):
    before, after = random_hits(seed, 300)
    gain = recall_at_k(after, 1) - recall_at_k(before, 1)
    low, high = gain_interval(before, after)
    assert low <= gain <= high and low < high
    assert gain_interval(before, after) == (low, high)


def test_interval_is_that_of_resampling_queries_one_by_one():
    before, after = random_hits(0, 200)
    gains = after[:, 0].astype(float) - before[:, 0]
    rng = np.random.default_rng(1)
    drawn = [100 * gains[rng.integers(0, len(gains), len(gains))].mean() for _ in range(4000)]
    # Both intervals are estimates; 4,000 draws fix their ends to about 0.25 points (standard error of the gain: 5).
    np.testing.assert_allclose(gain_interval(before, after), np.percentile(drawn, [2.5, 97.5]), atol=0.8)


def test_interval_of_no_change_is_zero():
    before, _ = random_hits(0, 50)
    assert gain_interval(before, before) == (0.0, 0.0)
