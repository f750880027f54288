"""From scores to probabilities: two numbers fitted on a validation split, and how well they hold on another.

A probability says how likely a candidate of a pool is right. It is sigmoid(scale * score + offset) (Platt, 1999), of
the score that ranks by default: fused where there is a lambda, else the match logit.

    calibration = fit_calibration(scores, right, split="val")            # both [n]: the candidates of all pools
    Reliability.of(calibration.probabilities(test_scores), test_right).calibration_error

Letters: n candidates, B bins.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from models.config import EDJEConfig
from models.scores import probability

BINS = 15
"""Of equal width, as in Guo et al., On Calibration of Modern Neural Networks (2017)."""
MOST_STEPS = 100
"""Newton's method needs about ten."""


@dataclass(frozen=True)
class Calibration:
    """What turns the default score into a probability."""

    scale: float
    """At least 0, so that probabilities order candidates as scores do."""
    offset: float
    split: str = ""
    """The split that both were fitted on; empty: not known."""

    @classmethod
    def of(cls, config: EDJEConfig) -> Calibration | None:
        """A checkpoint's; None where it has none."""
        if config.probability_scale is None or config.probability_offset is None:
            return None
        return cls(config.probability_scale, config.probability_offset, config.fusion_split)

    def probabilities(self, scores: np.ndarray) -> np.ndarray:
        """Scores of any shape, float32 -> probabilities of this shape, float32."""
        return probability(scores, self.scale, self.offset)


NONE_FITTED = Calibration(1.0, 0.0)
"""The sigmoid of the score itself: what a reader gets who takes it for a probability."""


def fit_calibration(scores: np.ndarray, right: np.ndarray, split: str = "") -> Calibration:
    """Logistic regression of `right` [n] bool on `scores` [n] by maximum likelihood, in float64.

    Platt's targets, (N+ + 1) / (N+ + 2) for right candidates and 1 / (N- + 2) for wrong ones, keep both numbers finite
    where a score separates right from wrong. Where higher scores are right less often, scale is 0, the best that is
    not negative, and every candidate has the same probability."""
    count = len(right)
    num_right = int(right.sum())
    targets = np.where(right, (num_right + 1) / (num_right + 2), 1 / (count - num_right + 2))
    mean, deviation = scores.mean(dtype=np.float64), scores.std(dtype=np.float64)
    constant = np.log(targets.mean() / (1 - targets.mean()))  # the best offset where scale is 0
    if deviation == 0:
        return Calibration(0.0, float(constant), split)
    scale, offset = _newton((scores - mean) / deviation, targets, np.array([0.0, constant]))
    if scale <= 0:
        return Calibration(0.0, float(constant), split)
    return Calibration(float(scale / deviation), float(offset - scale * mean / deviation), split)


def _newton(scores: np.ndarray, targets: np.ndarray, start: np.ndarray) -> np.ndarray:
    """Scale and offset [2] of least cross-entropy with targets [n] in (0, 1): Newton's method with halved steps.

    The cross-entropy is strictly convex where scores [n] differ, so there is one minimum, whatever the start."""
    inputs = np.stack([scores, np.ones_like(scores)])  # [2, n]

    def cross_entropy(weights: np.ndarray) -> float:
        log_odds = weights @ inputs
        return float(np.mean(np.logaddexp(0, log_odds) - targets * log_odds))

    weights = start
    for _ in range(MOST_STEPS):
        found = np.exp(-np.logaddexp(0, -(weights @ inputs)))  # the sigmoid, without overflow
        gradient = inputs @ (found - targets) / len(targets)
        if np.abs(gradient).max() < 1e-12:
            break
        hessian = (inputs * (found * (1 - found))) @ inputs.T / len(targets)
        # The ridge: where nearly all candidates are certain, rounding may leave nothing to divide by.
        step = np.linalg.solve(hessian + 1e-12 * np.eye(2), gradient)
        before = cross_entropy(weights)
        while cross_entropy(weights - step) > before:
            step = step / 2
            if np.abs(step).max() < 1e-10:  # nothing is lower but by rounding
                return weights
        weights = weights - step
    return weights


@dataclass(frozen=True)
class Reliability:
    """What probabilities say and what is so, in bins of equal width from 0 to 1; bins without candidates left out."""

    counts: np.ndarray
    """[B] int64: candidates of a bin."""
    predicted: np.ndarray
    """[B] float64: mean probability of a bin's candidates."""
    observed: np.ndarray
    """[B] float64: share of them that is right."""

    @classmethod
    def of(cls, probabilities: np.ndarray, right: np.ndarray, bins: int = BINS) -> Reliability:
        """probabilities: [n] from 0 to 1; right: [n] bool."""
        number = np.minimum((probabilities * bins).astype(np.int64), bins - 1)
        counts = np.bincount(number, minlength=bins)
        sums = [np.bincount(number, weights=values, minlength=bins) for values in (probabilities, right)]
        held = counts > 0
        return cls(counts[held], *(values[held] / counts[held] for values in sums))

    @property
    def calibration_error(self) -> float:
        """Expected calibration error, from 0 to 1: |predicted - observed| of a bin, averaged over candidates."""
        return float(np.average(np.abs(self.predicted - self.observed), weights=self.counts))


def brier_score(probabilities: np.ndarray, right: np.ndarray) -> float:
    """Mean squared difference of probability and outcome: [n] from 0 to 1 and [n] bool -> 0 to 1. It has no bins."""
    return float(np.mean((probabilities.astype(np.float64) - right) ** 2))
