"""Retrieval metrics: plain functions of rankings, shared by every column of a table, so all have one denominator.

The right answer is decided by image numbers: a candidate is right when its image is the query's. Text to image: a
caption's query_image is its image, candidates are the images 0 .. N-1. Image to text: candidates are captions, each
with its image, so any of an image's (five) captions is right: the protocol of Flickr30k and COCO.

Letters: Q queries, D depth of a ranking, N candidates in the gallery.

    hits = right_answers(rankings, query_image, item_image)       # [Q, D] bool
    recall_at_k(hits, 1)                                          # 84.3

METRICS is the one list of what is reported of every column: results.json, its reader, the tables in Markdown and the
report all follow it, so a new metric is one entry there.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

RECALL_DEPTHS = (1, 5, 10)
"""The depths that the field reports."""


def right_answers(rankings: np.ndarray, query_image: np.ndarray, item_image: np.ndarray) -> np.ndarray:
    """Which ranked candidates are right.

    rankings: [Q, D] int64 candidate numbers, best first; query_image: [Q] image of each query; item_image: [N] image
    of each candidate. Returns [Q, D] bool."""
    return item_image[rankings] == query_image[:, None]


def recall_at_k(hits: np.ndarray, k: int) -> float:
    """Percent of the Q queries with a right answer among the first k: hits [Q, D] bool.

    A query that has no right answer at all counts as a miss. Beyond D nothing more is found, so D must be at least
    min(k, N)."""
    return 100.0 * float(hits[:, :k].any(axis=1).mean())


def helped_and_hurt(before: np.ndarray, after: np.ndarray) -> tuple[int, int]:
    """Queries whose first candidate became right, and those whose first candidate became wrong; hits [Q, D] bool."""
    return int((after[:, 0] & ~before[:, 0]).sum()), int((before[:, 0] & ~after[:, 0]).sum())


def gain_interval(before: np.ndarray, after: np.ndarray, resamples: int = 10_000, seed: int = 0) -> tuple[float, float]:
    """95% interval of the gain in R@1, in percentage points: paired bootstrap over the Q queries; hits [Q, D] bool.

    A query's gain is -1, 0 or 1, so drawing Q queries with replacement is drawing the three counts from a
    multinomial: exact, and as fast for 25,010 queries as for 10. The same seed gives the same interval."""
    helped, hurt = helped_and_hurt(before, after)
    queries = len(before)
    shares = np.array([helped, hurt, queries - helped - hurt]) / queries
    drawn = np.random.default_rng(seed).multinomial(queries, shares, size=resamples)
    low, high = np.percentile(100.0 * (drawn[:, 0] - drawn[:, 1]) / queries, [2.5, 97.5])
    return float(low), float(high)


def median_rank(ranks: np.ndarray) -> float:
    """Median of the 0-based ranks [Q], counted from 1 and rounded down, as VSE++ and its successors report it."""
    return float(np.floor(np.median(ranks)) + 1)


def first_right_rank(hits: np.ndarray) -> np.ndarray:
    """[Q, D] bool -> [Q] int64: 0-based rank of the first right answer, D where there is none."""
    return np.where(hits.any(axis=1), hits.argmax(axis=1), hits.shape[1])


@dataclass(frozen=True)
class RankedQueries:
    """What a metric is computed from: queries ranked by one column."""

    hits: np.ndarray
    """[Q, D] bool: which of the ranked candidates are right."""
    first_right: np.ndarray
    """[Q] int64: 0-based rank of the first right answer in the whole gallery."""

    def of(self, chosen: np.ndarray) -> RankedQueries:
        """Some of the queries; chosen: [Q] bool or numbers of queries."""
        return RankedQueries(self.hits[chosen], self.first_right[chosen])


@dataclass(frozen=True, kw_only=True)
class Metric:
    """One figure of every column."""

    name: str
    """Its key in results.json."""
    title: str
    """Heading of its column in Markdown."""
    short: str
    """Heading in the report, where more columns stand side by side."""
    compute: Callable[[RankedQueries], float]
    """With folds, the figure is the mean of the folds' values."""
    form: str = ".1f"
    """Format of a single value in the report; means over seeds have one decimal."""
    highest_is_best: bool = True
    """The report prints the highest value of a row in bold."""
    required: bool = False
    """Whether a results.json without it is refused; else a dash stands in its place, as in files of older versions."""


def _recall(depth: int) -> Metric:
    name = f"R@{depth}"
    # The gain, and every comparison of experiments, is one of R@1.
    return Metric(
        name=name,
        title=name,
        short=name,
        compute=lambda queries: recall_at_k(queries.hits, depth),
        required=depth == 1,
    )


METRICS: list[Metric] = [
    *map(_recall, RECALL_DEPTHS),
    Metric(
        name="median_rank",
        title="median rank",
        short="MedR",
        compute=lambda queries: median_rank(queries.first_right),
        form="g",
        highest_is_best=False,
    ),
]
"""In the order of the tables."""
EXTENDED_METRICS = ("mAP@R", "R-Precision", "R@1", "COCO R@1")
"""Figures by COCO's extended ground truth, in percent (eccv.py): keys in results.json and headings."""
