"""EDJE as a reranker of LanceDB: the rows of a search, reranked by the images that they name.

    plug = EDJEReranker(reranker, column="file", store=store)
    table.search(vector).limit(100).rerank(plug, query_string="a red ball").to_list()
    table.search("a red ball", query_type="fts").limit(100).rerank(plug).to_list()

The table keeps its own schema: one column says which image a row is about. All rows of the search are reranked, so
its limit() is the size of the candidate pool.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import pyarrow as pa
from lancedb.query import MatchQuery, MultiMatchQuery, PhraseQuery
from lancedb.rerankers import Reranker as LanceDBReranker

from ..errors import UserError
from ..reranker import Reranker, Score
from ..stores.token_store import TokenStore
from ..vision.images import ImageSource

DistanceType = Literal["cosine", "l2", "dot"]


class EDJEReranker(LanceDBReranker):
    """Scores the rows of vector, full-text and hybrid searches, and returns them best first with `_relevance_score`."""

    def __init__(
        self,
        reranker: Reranker,
        column: str = "id",
        *,
        store: TokenStore | None = None,
        root: str | Path | None = None,
        score: Score | None = None,
        distance_type: DistanceType | None = None,
        batch_size: int | None = None,
        return_score: str = "relevance",
    ):
        """column: names a row's image: an id of `store` (by default the last one indexed; whole numbers are its text
        ids "17"), else a path, relative to the folder `root`, or an encoded image as bytes.
        score, batch_size: as for Reranker.rank().
        distance_type: declares that vectors are this backbone's embeddings, searched by this distance; cosines are then
        taken from `_distance`, and the text tower does not run. Leave it out where an index makes distances
        approximate. Hybrid searches hand over rescaled distances, so cosines are computed there.
        return_score: `relevance`, or `all` to keep `_distance` and `_score`, LanceDB's own.
        Raises UserError for an unknown distance or return_score, or what is no Reranker or TokenStore."""
        if distance_type is not None and distance_type not in get_args(DistanceType):
            expected = ", ".join(map(repr, get_args(DistanceType)))
            raise UserError(f"distance_type is {distance_type!r}; expected one of {expected}")
        if return_score not in ("relevance", "all"):
            raise UserError(f"return_score is {return_score!r}; expected 'relevance' or 'all'")
        if not isinstance(reranker, Reranker):
            raise UserError(f"reranker is a {type(reranker).__name__}; expected a loaded Reranker")
        if not isinstance(store, TokenStore | None):
            raise UserError(f"store is a {type(store).__name__}; expected a loaded TokenStore")
        super().__init__(return_score)
        self.reranker, self.column, self.store = reranker, column, store
        self.root = Path() if root is None else Path(root)
        self.ranking_score, self.distance_type, self.batch_size = score, distance_type, batch_size

    def rerank_vector(self, query: str, vector_results: pa.Table) -> pa.Table:
        """Raises UserError where the search has no text (pass query_string to rerank()), the image column is absent or
        empty in a row, an id or path is unknown, or `_distance` is no distance of the declared type."""
        cosines = None if self.distance_type is None else _cosines(vector_results, self.distance_type)
        return self._rerank(query, vector_results, cosines)

    def rerank_fts(self, query: str, fts_results: pa.Table) -> pa.Table:
        """Raises UserError as rerank_vector() does."""
        return self._rerank(query, fts_results)

    def rerank_hybrid(self, query: str, vector_results: pa.Table, fts_results: pa.Table) -> pa.Table:
        """A row that both searches found is scored once. Raises UserError as rerank_vector() does."""
        return self._rerank(query, self.merge_results(vector_results, fts_results))

    def _rerank(self, query: str, results: pa.Table, cosines: np.ndarray | None = None) -> pa.Table:
        hits = self.reranker.rank(
            _text(query),
            self._images(results),
            score=self.ranking_score,
            store=self.store,
            similarities=cosines,
            batch_size=self.batch_size,
        )
        ranked = results.take(pa.array([hit["corpus_id"] for hit in hits], pa.int64()))
        scores = pa.array([hit["score"] for hit in hits], pa.float32())
        return self._keep_relevance_score(ranked.append_column("_relevance_score", scores))

    def _images(self, results: pa.Table) -> list[ImageSource]:
        if self.column not in results.column_names:
            raise UserError(
                f"the search returned no column {self.column!r}, only {', '.join(results.column_names)}; "
                "add it to select(), or name the column of image ids or paths with column="
            )
        return [self._image(value, row) for row, value in enumerate(results[self.column].to_pylist())]

    def _image(self, value: Any, row: int) -> ImageSource:
        if isinstance(value, bytes):
            return value
        if not isinstance(value, str | int):
            found = "empty" if value is None else f"a {type(value).__name__}"
            raise UserError(
                f"column {self.column!r} is {found} in row {row} of the search; expected an id, path or bytes"
            )
        store, text = self.store or self.reranker.store, str(value)
        return text if store is not None and text in store else str(self.root / text)


def _text(query: object) -> str:
    """The words of a search. Raises UserError where there are none."""
    if isinstance(query, MatchQuery | MultiMatchQuery | PhraseQuery):
        query = query.query
    if not isinstance(query, str):
        found = "without text" if query is None else f"a {type(query).__name__}"
        raise UserError(f"the search to rerank is {found}; pass its words, e.g. rerank(..., query_string='a red ball')")
    return query


def _cosines(results: pa.Table, distance_type: DistanceType) -> np.ndarray:
    """Cosines [n] float32 of L2-normalised vectors from LanceDB's distances; its `l2` is the square."""
    if "_distance" not in results.column_names:
        raise UserError("the search returned no column '_distance'; add it to select(), or leave out distance_type")
    distances = results["_distance"].to_numpy()
    return 1 - (distances / 2 if distance_type == "l2" else distances)
