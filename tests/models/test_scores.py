"""Scores that rank candidates: the same bits from NumPy and torch, and probabilities that follow the scores."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from models.config import BackboneConfig, BackboneDims, CompressionConfig, EDJEConfig, EncoderConfig
from models.errors import UserError
from models.scores import fuse, paired_cosines, probability

CONFIG = EDJEConfig(
    backbone=BackboneConfig(name="ViT-B-16", pretrained="random"),
    dims=BackboneDims(num_patches=9, patch_width=8, embedding_width=6),
    adapter=CompressionConfig(),
    encoder=EncoderConfig(),
)


def random_scores(seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    logits, similarities = rng.normal(size=(2, 37, 11)).astype(np.float32)
    return 10 * logits, similarities


@pytest.mark.parametrize("fusion_lambda", [0.0, 0.1, 20.0, 1 / 3])
def test_fused_scores_are_the_same_bits_from_numpy_and_from_torch(fusion_lambda):
    logits, similarities = random_scores()
    fused = fuse(logits, similarities, fusion_lambda)
    assert fused.dtype == np.float32
    by_torch = fuse(torch.from_numpy(logits), torch.from_numpy(similarities), fusion_lambda)
    np.testing.assert_array_equal(by_torch.numpy(), fused)
    # One by one, as a reader of the formula would do it: each operation rounds to float32.
    weight = np.float32(fusion_lambda)
    expected = [logit + weight * cosine for logit, cosine in zip(logits.flat, similarities.flat, strict=True)]
    np.testing.assert_array_equal(fused.ravel(), np.array(expected))


def test_paired_cosines_are_those_of_the_full_product_whatever_the_order_of_the_sum():
    generator = torch.Generator().manual_seed(0)
    queries, items = torch.nn.functional.normalize(torch.randn(2, 50, 768, generator=generator), dim=-1)
    expected = (queries.double() @ items.double().T).diagonal().float()
    assert torch.equal(paired_cosines(queries, items), expected)
    order = torch.randperm(768, generator=generator)
    assert torch.equal(paired_cosines(queries[:, order], items[:, order]), expected)


def test_a_probability_is_the_sigmoid_of_the_scaled_score_in_numpy_and_torch():
    scores = random_scores()[0]
    found = probability(scores, scale=0.7, offset=-2.0)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, 1 / (1 + np.exp(2.0 - 0.7 * scores.astype(float))), rtol=1e-5)
    np.testing.assert_allclose(probability(torch.from_numpy(scores), 0.7, -2.0).numpy(), found, rtol=1e-5)


@pytest.mark.filterwarnings("error")
def test_probabilities_of_far_scores_are_0_and_1_without_a_warning():
    far = np.array([-1e30, -1e4, 0.0, 1e4, 1e30], np.float32)
    np.testing.assert_array_equal(probability(far, 1.0, 0.0), np.array([0, 0, 0.5, 1, 1], np.float32))


@pytest.mark.parametrize(
    ("scale", "offset", "message"),
    [
        (1.0, None, "set both, or neither"),
        (None, 1.0, "set both, or neither"),
        (-1.0, 0.0, "probability_scale is -1.0; it must be at least 0"),
        (float("nan"), 0.0, "probability_scale is nan"),
        (1.0, float("inf"), "probability_offset is inf; it must be finite"),
    ],
)
def test_a_calibration_that_is_half_there_or_no_number_is_an_error(scale, offset, message):
    with pytest.raises(UserError, match=message):
        replace(CONFIG, probability_scale=scale, probability_offset=offset)
