"""The two numbers behind a probability: the best there are, finite for any scores, and what their errors measure."""

from __future__ import annotations

import math

import numpy as np
import pytest

from evaluation.calibration import NONE_FITTED, Calibration, Reliability, brier_score, fit_calibration


def drawn(scale: float, offset: float, count: int = 20_000, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Scores far from 0, and candidates that are right with the probability that scale and offset give."""
    rng = np.random.default_rng(seed)
    scores = rng.normal(30.0, 5.0, size=count).astype(np.float32)
    return scores, rng.random(count) < 1 / (1 + np.exp(-(scale * scores + offset)))


def test_the_fit_finds_the_numbers_that_outcomes_were_drawn_with():
    scores, right = drawn(scale=0.6, offset=-21.0)
    found = fit_calibration(scores, right, "val")
    assert found.scale == pytest.approx(0.6, rel=0.05) and found.offset == pytest.approx(-21.0, rel=0.05)
    assert found.split == "val"


def test_no_other_numbers_explain_the_outcomes_better():
    scores, right = drawn(scale=0.3, offset=-8.0, count=500)
    found = fit_calibration(scores, right)
    targets = np.where(right, (right.sum() + 1) / (right.sum() + 2), 1 / ((~right).sum() + 2))

    def cross_entropy(scale: float, offset: float) -> float:
        log_odds = scale * scores.astype(float) + offset
        return float(np.sum(np.logaddexp(0, log_odds) - targets * log_odds))

    best = cross_entropy(found.scale, found.offset)
    for scale in (-1e-4, 0, 1e-4):
        for offset in (-1e-3, 0, 1e-3):
            assert cross_entropy(found.scale + scale, found.offset + offset) >= best


def test_a_fit_on_one_half_mends_the_error_on_the_other():
    scores, right = drawn(scale=0.6, offset=-21.0)
    found = fit_calibration(scores[::2], right[::2])
    before, after = (Reliability.of(c.probabilities(scores[1::2]), right[1::2]) for c in (NONE_FITTED, found))
    assert before.calibration_error > 0.5 and after.calibration_error < 0.02
    assert brier_score(found.probabilities(scores), right) < brier_score(NONE_FITTED.probabilities(scores), right)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("size", [1e-6, 1.0, 1e6])
def test_scores_that_separate_right_from_wrong_give_finite_numbers(size):
    scores = np.linspace(-size, size, 200, dtype=np.float32)
    found = fit_calibration(scores, scores > 0)
    probabilities = found.probabilities(scores)
    assert 0 < found.scale < math.inf and math.isfinite(found.offset)
    assert probabilities[0] < 0.05 and probabilities[-1] > 0.95 and 0.01 < probabilities[99] < 0.99


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("far", [-1e3, 1e3])
def test_one_score_far_from_all_others_does_not_spoil_the_fit(far):
    scores, right = drawn(scale=0.6, offset=-21.0, count=2_000)
    scores[0], right[0] = far, far > 0
    found = fit_calibration(scores, right)
    assert Reliability.of(found.probabilities(scores[1:]), right[1:]).calibration_error < 0.03


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("scores", [np.zeros(40, np.float32), -np.linspace(0, 1, 40, dtype=np.float32)])
def test_scores_that_say_nothing_or_the_opposite_leave_the_share_of_right_ones(scores):
    right = np.arange(40) >= 30
    found = fit_calibration(scores, right)
    assert found.scale == 0
    np.testing.assert_allclose(found.probabilities(scores), 0.25, atol=0.03)  # smoothed: 11/12 and 1/32 stand for 1, 0


@pytest.mark.parametrize("right", [np.zeros(40, bool), np.ones(40, bool)])
def test_pools_that_are_all_right_or_all_wrong_give_a_probability_short_of_certain(right):
    scores = np.linspace(0, 1, 40, dtype=np.float32)
    found = fit_calibration(scores, right).probabilities(scores)
    assert (np.abs(found - right) < 0.05).all() and (0 < found).all() and (found < 1).all()


def test_the_calibration_error_is_the_mean_gap_of_the_bins_weighted_by_their_candidates():
    probabilities = np.array([0.01, 0.03, 0.03, 0.99, 1.0], np.float32)
    right = np.array([False, True, False, True, True])
    bins = Reliability.of(probabilities, right)
    assert bins.counts.tolist() == [3, 2]
    np.testing.assert_allclose(bins.predicted, [0.07 / 3, 0.995], rtol=1e-6)
    np.testing.assert_allclose(bins.observed, [1 / 3, 1.0])
    assert bins.calibration_error == pytest.approx((3 * (1 / 3 - 0.07 / 3) + 2 * 0.005) / 5)
    assert brier_score(probabilities, right) == pytest.approx((0.01**2 + 0.97**2 + 0.03**2 + 0.01**2) / 5)


def test_a_constant_probability_that_is_the_share_of_right_ones_has_no_calibration_error():
    right = np.arange(400) % 4 == 0
    assert Reliability.of(np.full(400, 0.25), right).calibration_error == 0
    assert Reliability.of(np.full(400, 0.75), right).calibration_error == 0.5


def test_probabilities_order_candidates_as_scores_do():
    scores = np.sort(np.random.default_rng(1).normal(size=100)).astype(np.float32)
    assert (np.diff(Calibration(2.0, -1.0).probabilities(scores)) >= 0).all()
