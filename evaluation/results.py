"""What an evaluation found: candidates and scores of every query, and the rankings and figures that follow from them.

Three columns rank the same candidates, by one function: `embedding` (the first stage), `reranked` (the first k
reordered by the match logit alone, the paper's protocol) and `fused` (by logit + lambda * cosine, BLIP's protocol).
Letters: Q queries, N candidates in the gallery, D candidates kept per query, k of them reranked.

With folds (COCO's 5-fold 1k protocol) the images are cut into equal consecutive parts, each a gallery of its own with
its captions; a figure is the mean of the folds' figures, counts and intervals are over all queries.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

import numpy as np

from models.config import EDJEConfig
from models.scores import fuse

from .calibration import NONE_FITTED, Calibration, Reliability, brier_score, fit_calibration
from .figures import COLUMNS, CalibrationFigures, ColumnFigures, DirectionFigures, Gain, PartFigures
from .metrics import (
    METRICS,
    RECALL_DEPTHS,
    Metric,
    RankedQueries,
    first_right_rank,
    gain_interval,
    helped_and_hurt,
    recall_at_k,
    right_answers,
)

LAMBDA_GRID = (0.0, 0.5, 1.0, 2.0, 5.0, 10.0, 20.0, 50.0, 100.0, 200.0, 500.0, 1000.0)
"""Logits differ by units and cosines by hundredths, so the grid reaches from the logit alone to the embedding alone."""


@dataclass(frozen=True)
class DirectionResults:
    """One direction: text to image (queries are captions) or image to text (queries are images)."""

    query_image: np.ndarray
    """[Q] int64: image number of each query."""
    item_image: np.ndarray
    """[N] int64: image number of each candidate."""
    candidates: np.ndarray
    """[Q, D] int64: the embedding's first D candidates, best first."""
    similarities: np.ndarray
    """[Q, D] float32: their cosines."""
    logits: np.ndarray
    """[Q, k] float32: match logits of the first k."""
    first_right: np.ndarray
    """[Q] int64: the embedding's 0-based rank of the first right answer in the whole gallery, not only the D kept."""
    fusion_lambda: float | None = None
    calibration: Calibration | None = None
    """Of the default score."""
    folds: int = 1
    """Galleries that the images are cut into; numbers of images and candidates count through them."""

    @property
    def k(self) -> int:
        return self.logits.shape[1]

    @property
    def columns(self) -> tuple[str, ...]:
        """The columns that there are; `fused` needs a lambda."""
        return COLUMNS[:2] if self.fusion_lambda is None else COLUMNS

    def scores(self, column: str) -> np.ndarray:
        """[Q, k] float32: what `column` orders the pool by."""
        if column == "embedding":
            return self.similarities[:, : self.k]
        if column == "reranked":
            return self.logits
        assert self.fusion_lambda is not None, "there is no fused column without a lambda"
        return fuse(self.logits, self.similarities[:, : self.k], self.fusion_lambda)

    @property
    def default_column(self) -> str:
        """The column that Reranker ranks by unless told otherwise, and that probabilities are of."""
        return "reranked" if self.fusion_lambda is None else "fused"

    def scored_pool(self) -> tuple[np.ndarray, np.ndarray]:
        """Default scores [Q * k] float32 of all candidates that were reranked, and which of these are right, bool."""
        right = right_answers(self.candidates[:, : self.k], self.query_image, self.item_image)
        return self.scores(self.default_column).ravel(), right.ravel()

    def rankings(self, column: str, pool: int | None = None) -> np.ndarray:
        """[Q, D] candidates, best first. Of equal scores the first stage's first; below the pool its order stands.

        pool: rerank only the first `pool` candidates (at most k, the default)."""
        pool = self.k if pool is None else pool
        order = np.argsort(-self.scores(column)[:, :pool], axis=1, kind="stable")
        reordered = np.take_along_axis(self.candidates[:, :pool], order, axis=1)
        return np.concatenate([reordered, self.candidates[:, pool:]], axis=1)

    def hits(self, column: str, pool: int | None = None) -> np.ndarray:
        """[Q, D] bool: which candidates of `rankings(column, pool)` are right."""
        return right_answers(self.rankings(column, pool), self.query_image, self.item_image)

    def first_right_ranks(self, column: str) -> np.ndarray:
        """[Q] int64: 0-based rank of the first right answer in the whole gallery.

        Reranking moves it within the pool of k; a right answer below the pool stays where the embedding ranked it."""
        within = first_right_rank(self.hits(column)[:, : self.k])
        return np.where(within < self.k, within, self.first_right)

    def recall(self, hits: np.ndarray, k: int) -> float:
        """R@k in percent, hits [Q, D] bool: the mean over the folds."""
        return self._mean_over_folds(lambda queries: recall_at_k(hits[queries], k))

    def _mean_over_folds(self, metric: Callable[[np.ndarray], float]) -> float:
        """The metric of each fold's queries, given as [Q] bool, averaged over the folds that have any."""
        fold = self.query_image * self.folds // (self.item_image.max() + 1)
        return float(np.mean([metric(fold == number) for number in np.unique(fold)]))

    def of_queries(self, chosen: np.ndarray) -> DirectionResults:
        """These queries alone (mask or numbers [q]); the gallery stays whole."""
        return replace(
            self,
            query_image=self.query_image[chosen],
            candidates=self.candidates[chosen],
            similarities=self.similarities[chosen],
            logits=self.logits[chosen],
            first_right=self.first_right[chosen],
        )

    def figures(self) -> DirectionFigures:
        """Every metric of every column, the gains over the embedding, and the pool's ceiling."""
        before = self.hits("embedding")
        columns = {column: self._column_figures(column, before) for column in self.columns}
        return DirectionFigures(columns, self.recall(before, self.k), self._calibration_figures())

    def _calibration_figures(self) -> CalibrationFigures | None:
        if self.calibration is None:
            return None
        scores, right = self.scored_pool()
        before, after = NONE_FITTED.probabilities(scores), self.calibration.probabilities(scores)
        return CalibrationFigures(
            ece_before=Reliability.of(before, right).calibration_error,
            ece_after=Reliability.of(after, right).calibration_error,
            brier_before=brier_score(before, right),
            brier_after=brier_score(after, right),
            split=self.calibration.split,
        )

    def _column_figures(self, column: str, before: np.ndarray) -> ColumnFigures:
        """before: the embedding's hits [Q, D] bool."""
        queries = RankedQueries(self.hits(column), self.first_right_ranks(column))
        metrics = {metric.name: self._mean_over_folds(partial(_of_fold, metric, queries)) for metric in METRICS}
        gain = None if column == "embedding" else _gain(before, queries.hits)
        return ColumnFigures(metrics, self.fusion_lambda if column == "fused" else None, gain=gain)


def _of_fold(metric: Metric, queries: RankedQueries, chosen: np.ndarray) -> float:
    return metric.compute(queries.of(chosen))


def _gain(before: np.ndarray, after: np.ndarray) -> Gain:
    helped, hurt = helped_and_hurt(before, after)
    return Gain(gain_interval(before, after), helped, hurt)


@dataclass(frozen=True)
class Results:
    """Both directions of one evaluation."""

    t2i: DirectionResults
    i2t: DirectionResults
    image_subsets: Sequence[str | None]
    """[N images] part of the split that an image belongs to; None: none."""
    seconds: dict[str, float]
    """backbone, compress, rerank: wall-clock seconds of rank 0."""
    precision: str
    """Arithmetic of the joint encoder: float32 or bfloat16."""

    @property
    def num_images(self) -> int:
        return len(self.t2i.item_image)

    @property
    def num_captions(self) -> int:
        return len(self.i2t.item_image)

    @property
    def pairs_per_second(self) -> float:
        """Reranked pairs of both directions, over all ranks."""
        return (self.t2i.logits.size + self.i2t.logits.size) / max(self.seconds["rerank"], 1e-9)

    def with_lambda(self, fusion_lambda: float | None, calibration: Calibration | None = None) -> Results:
        """The same logits, fused with another lambda; None: without `fused`. A calibration is of one lambda alone."""
        t2i, i2t = (
            replace(direction, fusion_lambda=fusion_lambda, calibration=calibration)
            for direction in (self.t2i, self.i2t)
        )
        return replace(self, t2i=t2i, i2t=i2t)

    def subset(self, name: str) -> Results:
        """The queries whose image is of this subset, among all candidates."""
        chosen = np.array([subset == name for subset in self.image_subsets])
        t2i, i2t = (direction.of_queries(chosen[direction.query_image]) for direction in (self.t2i, self.i2t))
        return replace(self, t2i=t2i, i2t=i2t)

    def subset_names(self) -> list[str]:
        return sorted({name for name in self.image_subsets if name is not None})

    def figures(self) -> PartFigures:
        """Of both directions, and their rSum."""
        t2i, i2t = self.t2i.figures(), self.i2t.figures()
        sums = {
            column: sum(direction.columns[column].metrics[f"R@{k}"] for direction in (t2i, i2t) for k in RECALL_DEPTHS)
            for column in self.t2i.columns
        }
        return PartFigures(t2i, i2t, sums)


def choose_lambda(validation: Results, grid: Sequence[float] = LAMBDA_GRID) -> float:
    """The lambda of `grid` with the highest mean of T2I and I2T R@1 on validation queries.

    Of equal ones the smallest, which changes the match logit's own ranking least."""

    def mean_recall(fusion_lambda: float) -> float:
        fused = validation.with_lambda(fusion_lambda)
        return (recall_at_k(fused.t2i.hits("fused"), 1) + recall_at_k(fused.i2t.hits("fused"), 1)) / 2

    return max(sorted(grid), key=mean_recall)


def with_fitted_scores(config: EDJEConfig, validation: Results, split: str) -> EDJEConfig:
    """The model's configuration with the lambda and the calibration that suit a validation split, `split` by name.

    The calibration is fitted on the text-to-image pools alone, which are what Reranker.rank() and search() see. A pool
    of captions holds up to five right ones instead of one, so the same score means another probability there: fitted on
    both directions, the numbers would suit neither."""
    chosen = choose_lambda(validation)
    calibration = fit_calibration(*validation.with_lambda(chosen).t2i.scored_pool(), split)
    return replace(
        config,
        fusion_lambda=chosen,
        fusion_split=split,
        probability_scale=calibration.scale,
        probability_offset=calibration.offset,
    )
