"""Rankings as TREC run files and the right answers as qrels, for ranx, ir-measures, pytrec_eval and trec_eval.

    qrels.t2i.trec              QUERY 0 CANDIDATE 1
    run.t2i.reranked.trec       QUERY Q0 CANDIDATE RANK SCORE reranked

and the same for i2t and for each column. Ids are free of white space: an image is its path, percent-encoded where
needed (urllib.parse.unquote gives the path back), a caption is IMAGE#NUMBER, its image's id and its number among that
image's captions from 0 on, as in Flickr30k's own files.

Readers sort by score and break ties as they like, and the match logits of the pool do not compare with the cosines
below it. So SCORE counts the candidates from this one to the list's end: whole numbers that fall by one from rank to
rank, so that every reader finds our order, ties included. The scores themselves are in rankings.npz.

    import ir_measures
    from ir_measures import RR, Success
    files = [ir_measures.read_trec_qrels("qrels.t2i.trec"), ir_measures.read_trec_run("run.t2i.reranked.trec")]
    ir_measures.calc_aggregate([Success @ 1, RR @ 10], *files)
"""

from __future__ import annotations

from collections.abc import Iterator
from urllib.parse import quote

import numpy as np

from data.caption_datasets import CaptionDataset

from .figures import COLUMNS
from .metrics import RECALL_DEPTHS
from .results import Results


def trec_files(results: Results, dataset: CaptionDataset) -> Iterator[tuple[str, str | None]]:
    """Name and text of every file; no text for a column that these results lack, whose file must not be there.

    A run lists max(k, 10) candidates per query, what pool and recalls need: for COCO's 25,010 captions, k = 10, some
    25 MB per column."""
    images = [quote(image, safe="/") for image in dataset.image_ids]
    captions = _caption_ids(images, dataset.caption_image)
    for direction, queries, items in (("t2i", captions, images), ("i2t", images, captions)):
        part = results.t2i if direction == "t2i" else results.i2t
        right = _right_pairs(images, captions, dataset.caption_image, direction)
        yield f"qrels.{direction}.trec", "".join(f"{query} 0 {item} 1\n" for query, item in right)
        depth = max(part.k, *RECALL_DEPTHS)
        for column in COLUMNS:
            present = column in part.columns
            text = _run(part.rankings(column)[:, :depth], queries, items, column) if present else None
            yield f"run.{direction}.{column}.trec", text


def _caption_ids(images: list[str], caption_image: np.ndarray) -> list[str]:
    first = np.searchsorted(caption_image, caption_image)
    return [f"{images[image]}#{i - start}" for i, (image, start) in enumerate(zip(caption_image, first, strict=True))]


def _right_pairs(
    images: list[str], captions: list[str], caption_image: np.ndarray, direction: str
) -> Iterator[tuple[str, str]]:
    for caption, image in zip(captions, caption_image, strict=True):
        yield (caption, images[image]) if direction == "t2i" else (images[image], caption)


def _run(rankings: np.ndarray, queries: list[str], items: list[str], column: str) -> str:
    """Lines of rankings [Q, d], best first."""
    depth = rankings.shape[1]
    return "".join(
        f"{query} Q0 {items[item]} {rank + 1} {depth - rank} {column}\n"
        for query, ranking in zip(queries, rankings.tolist(), strict=True)
        for rank, item in enumerate(ranking)
    )
