"""COCO's extended ground truth, ECCV Caption (arXiv 2204.03359): mAP@R and R-Precision of the 5k test split.

COCO calls one image right for a caption, though many others fit it too. ECCV Caption names, for 1,332 captions and
1,261 images of the test split, everything that people found right. The figures are those of its own package, `pip
install eccv-caption`, on our rankings. It knows images and captions by COCO's numbers, so the annotation file must have
them: `cocoid` and each sentence's `sentid` in Karpathy's dataset_coco.json. BLIP's and ALBEF's lists have none.

Karpathy's test split has 25,010 captions, the package's 25,000, five per image: the other ten are left out of the
rankings, as ECCV Caption's own rankings do not have them, and as queries.
"""

from __future__ import annotations

import contextlib
import io
import warnings
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from data.caption_datasets import CaptionDataset, read_field
from models.errors import UserError

from .figures import EvaluationRecord
from .metrics import EXTENDED_METRICS, recall_at_k, right_answers
from .results import Results

NUM_IMAGES, NUM_CAPTIONS = 5000, (25000, 25010)
MOST_RIGHT = 48
"""Right answers of a query by the extended ground truth, at most: as deep as the package looks."""
DEPTH = MOST_RIGHT + NUM_CAPTIONS[1] - NUM_CAPTIONS[0]
"""Candidates needed per query, ten of which may be left out."""


@dataclass(frozen=True)
class CocoIds:
    """COCO's numbers of a data set's images and captions."""

    images: np.ndarray
    """[N] int64 `cocoid`."""
    captions: np.ndarray
    """[C] int64 `sentid`."""


def may_be_coco_test(dataset: CaptionDataset) -> bool:
    """Whether the counts are those of the 5k test split."""
    return len(dataset) == NUM_IMAGES and NUM_CAPTIONS[0] <= len(dataset.captions) <= NUM_CAPTIONS[1]


def read_coco_ids(annotations: str | Path, dataset: CaptionDataset) -> CocoIds:
    """COCO's numbers, from the file that the data set was read from.

    Raises UserError if the package is not installed, the file has no such numbers, or they are not those of the 5k
    test split with the same caption at the same image."""
    known = _package().coco_gts["t2i"]
    images = read_field(annotations, dataset, "cocoid")
    sentences = [sentence for of_image in read_field(annotations, dataset, "sentences") for sentence in of_image or ()]
    captions = [sentence.get("sentid") if isinstance(sentence, dict) else None for sentence in sentences]
    if len(captions) != len(dataset.captions) or not all(isinstance(number, int) for number in (*images, *captions)):
        raise UserError(
            f"{annotations}: names no COCO image and caption numbers (`cocoid` of an image, `sentid` of a sentence), "
            "by which ECCV Caption finds its ground truth; pass Karpathy's dataset_coco.json"
        )
    right = {caption: images[image] for caption, image in zip(captions, dataset.caption_image, strict=True)}
    if len(set(images)) != NUM_IMAGES or any(right.get(caption) != image for caption, (image,) in known.items()):
        raise UserError(
            f"{annotations}: these {len(images):,} images and their captions are not COCO's 5k test split (by `cocoid` "
            "and `sentid`), the only one that ECCV Caption is about; evaluate --split test of dataset_coco.json"
        )
    return CocoIds(np.array(images), np.array(captions))


def with_extended_figures(record: EvaluationRecord, results: Results, ids: CocoIds) -> EvaluationRecord:
    """The record with EXTENDED_METRICS of every column, in percent.

    The first three are by the extended ground truth; the last, the package's own R@1 by COCO's ground truth, checks the
    numbers: it must be ours of the same queries. results: with DEPTH candidates per query, one fold."""
    extended = {column: _extended(results, column, ids) for column in results.t2i.columns}
    t2i, i2t = (
        replace(
            part,
            columns={
                name: replace(column, extended=extended[name][direction]) for name, column in part.columns.items()
            },
        )
        for direction, part in record.figures.directions().items()
    )
    return replace(record, figures=replace(record.figures, t2i=t2i, i2t=i2t))


def _extended(results: Results, column: str, ids: CocoIds) -> dict[str, dict[str, float]]:
    """EXTENDED_METRICS of one column, by direction."""
    package = _package()
    known = {"images": np.ones(len(ids.images), bool), "captions": np.isin(ids.captions, list(package.coco_gts["t2i"]))}
    numbers = {"images": ids.images, "captions": ids.captions}
    rankings, recall = {}, {}
    for direction, queries, items in (("t2i", "captions", "images"), ("i2t", "images", "captions")):
        part = results.t2i if direction == "t2i" else results.i2t
        ranked = _first_known(part.rankings(column)[known[queries]], known[items])
        recall[direction] = recall_at_k(right_answers(ranked, part.query_image[known[queries]], part.item_image), 1)
        asked = numbers[queries][known[queries]].tolist()
        rankings[direction] = dict(zip(asked, numbers[items][ranked].tolist(), strict=True))
    with contextlib.redirect_stderr(io.StringIO()):  # its progress bars cannot be turned off
        extended = package.eccv_metrics(rankings, "all")
        original = package.coco_5k_recalls(rankings, "all", K=1)
    for direction in rankings:
        assert abs(100.0 * original[direction] - recall[direction]) < 1e-9, "COCO's numbers are of other queries"
    by_name = dict(
        zip(
            EXTENDED_METRICS,
            (extended["eccv_map_at_r"], extended["eccv_rprecision"], extended["eccv_r1"], original),
            strict=True,
        )
    )
    return {way: {name: 100.0 * float(values[way]) for name, values in by_name.items()} for way in rankings}


def _first_known(rankings: np.ndarray, known: np.ndarray) -> np.ndarray:
    """[Q, D] candidates, best first -> [Q, MOST_RIGHT]: the first of those that are known, in the same order."""
    order = np.argsort(~known[rankings], axis=1, kind="stable")[:, :MOST_RIGHT]
    return np.take_along_axis(rankings, order, axis=1)


@cache
def _package() -> Any:
    """The package's ground truths. Raises UserError naming the pip command if it is not installed."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # it recommends ujson
            from eccv_caption import Metrics
    except ImportError:
        raise UserError(
            "mAP@R and R-Precision on COCO's extended ground truth need the package eccv-caption; "
            "pip install eccv-caption"
        ) from None
    return Metrics()
