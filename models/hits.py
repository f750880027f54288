"""The hits of a query as an application gets them: plain dictionaries, best first.

Letters: n pairs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NotRequired, TypedDict

from torch import Tensor

from .errors import UserError
from .scores import softmax_within
from .vision.images import ImageSource

Activation = Callable[[Tensor], Tensor]


class Ranked(TypedDict):
    """A candidate: its place in the list that was given, its score, and what else was asked for or is known."""

    corpus_id: int
    score: float
    probability: NotRequired[float]
    """That the image shows what the query says, where the checkpoint was calibrated for this score."""
    text: NotRequired[ImageSource]
    """With return_documents: the candidate as it was given, under the name that sentence-transformers gives it."""


class Found(TypedDict):
    """An image of a store that a search found."""

    id: str
    score: float
    first_stage_rank: int
    """Its place in the embedding's own order, from 1."""
    probability: NotRequired[float]


@dataclass(frozen=True)
class Shown:
    """What becomes of the scores before they are sorted and shown."""

    activation: Activation | None = None
    softmax: bool = False

    def __call__(self, scores: Tensor, group: Tensor) -> Tensor:
        """scores [n] float32 -> [n]; group [n] int64: the softmax is within each."""
        shown = scores if self.activation is None else self._activated(scores, self.activation)
        return softmax_within(shown, group) if self.softmax else shown

    @staticmethod
    def _activated(scores: Tensor, activation: Activation) -> Tensor:
        if not callable(activation):
            raise UserError(f"activation_fn is a {type(activation).__name__}; expected a function, e.g. torch.sigmoid")
        shown = activation(scores)
        if not isinstance(shown, Tensor) or shown.shape != scores.shape:
            given = list(shown.shape) if isinstance(shown, Tensor) else f"a {type(shown).__name__}"
            raise UserError(f"activation_fn gave {given} of scores {list(scores.shape)}; expected a tensor of these")
        return shown


def make_hits(
    scores: Tensor, probabilities: Tensor | None = None, documents: Sequence[ImageSource] | None = None
) -> list[Ranked]:
    """A hit for each candidate of one query, in the order given; scores and probabilities: [n]."""
    hits: list[Ranked] = [{"corpus_id": number, "score": score} for number, score in enumerate(scores.tolist())]
    if probabilities is not None:
        for hit, value in zip(hits, probabilities.tolist(), strict=True):
            hit["probability"] = value
    if documents is not None:
        for hit, document in zip(hits, documents, strict=True):
            hit["text"] = document
    return hits


def best(hits: list[Ranked], top_k: int | None, min_probability: float | None) -> list[Ranked]:
    """The first `top_k` by falling score, without those that are less probable; equal scores keep their order."""
    ranked = sorted(hits, key=lambda hit: -hit["score"])
    if min_probability is not None:
        ranked = [hit for hit in ranked if hit["probability"] >= min_probability]
    return ranked[:top_k]


def as_found(hit: Ranked, ids: Sequence[str]) -> Found:
    """The hit of a candidate among `ids`, which are in first-stage order."""
    number = hit["corpus_id"]
    found: Found = {"id": ids[number], "score": hit["score"], "first_stage_rank": number + 1}
    if "probability" in hit:
        found["probability"] = hit["probability"]
    return found
