"""What an application calls: load a checkpoint, index images once, search them or rank candidates for a query.

    reranker = Reranker.from_pretrained("runs/demo")
    store = reranker.index("photos", "photos.store")                     # once: one backbone pass per image
    reranker.search("a red ball", store, top_k=10)                       # embedding search, then reranking
    reranker.rank("a red ball", store.ids, top_k=10)                     # your own first stage's candidates
    reranker.rank("a red ball", ["photos/a.jpg", Image.open("b.png")])   # images that are not indexed
    reranker.predict([("a red ball", "photos/a.jpg")])                   # float32 array [1]

The score is match logit + lambda * cosine (`fused`) where the checkpoint has a lambda, chosen on validation images, and
the match logit alone (`match`) elsewhere or by request. It is unbounded and meant for comparing the candidates of one
query. Where the checkpoint was calibrated, each hit has a probability too.

Letters: n pairs, N images, C captions, Q queries, m vision tokens, H joint encoder width, De embedding width.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from numbers import Integral, Real
from pathlib import Path
from typing import Any, Literal, TypedDict, Unpack, overload

import torch
from torch import Tensor

from .candidates import (
    Numbers,
    Pair,
    as_captions,
    as_images,
    as_pairs,
    as_paths,
    as_queries,
    as_text_embeddings,
    cosines_of_queries,
    distinct,
    documents_of_queries,
)
from .config import BackboneConfig, check_backbone
from .distributed import pick_device
from .edje import EDJE
from .errors import UserError
from .first_stage import nearest
from .hits import Activation, Found, Ranked, Shown, as_found, best, make_hits
from .pair_scorer import IMAGES_PER_BATCH, PairScorer, Scoring
from .precision import resolve_precision
from .scores import probability
from .stores.indexing import find_images, precompute
from .stores.token_store import TokenStore
from .vision.backbones import Backbone
from .vision.images import ImageError, ImageSource, may_be_image

Score = Literal["fused", "match"]


class SearchOptions(TypedDict, total=False):
    """Options of search(), described there."""

    score: Score | None
    text_embedding: Numbers | None
    min_probability: float | None
    batch_size: int | None
    show_progress_bar: bool


class RankOptions(SearchOptions, total=False):
    """Options of rank(), described there."""

    return_documents: bool
    store: TokenStore | None
    similarities: Any
    activation_fn: Activation | None
    apply_softmax: bool


@dataclass
class EvaluatorMetrics:
    """Where sentence-transformers' evaluators leave their figures; the latest of each name are kept."""

    metrics: dict[str, float] = field(default_factory=dict)

    def set_evaluation_metrics(self, evaluator: object, metrics: Mapping[str, float], epoch: int, step: int) -> None:
        self.metrics.update(metrics)


class Reranker:
    """A trained EDJE with its backbone. Images given several times in a call are encoded once.

    It may be used from several threads, after a fork (on the CPU), and be pickled to be sent to another process."""

    def __init__(self, model: EDJE, backbone: Backbone, dtype: torch.dtype | None = None):
        """dtype: of the joint encoder's matrix products, by default the fastest that the device has.

        Raises UserError naming both if the model was trained with another backbone."""
        check_backbone(model.config, backbone)
        self.model, self.backbone = model.optimized(dtype), backbone
        self.store: TokenStore | None = None
        self.model_card_data = EvaluatorMetrics()
        self._scorer = PairScorer(self.model, backbone)

    @classmethod
    def from_pretrained(
        cls,
        checkpoint_dir: str | Path,
        device: str = "auto",
        dtype: str = "auto",
        backbone: Backbone | BackboneConfig | None = None,
        revision: str | None = None,
    ) -> Reranker:
        """Load a checkpoint and the backbone that it names: a directory, a run's latest, or OWNER/NAME on the Hub; ours
        or in the layout of the published weights.

        device: auto (cuda where there is one), cpu, cuda, cuda:1. dtype: auto (the fastest), float32, bfloat16.
        backbone: a loaded one to share, or a config where its weights lie elsewhere than the checkpoint says.
        revision: branch, tag or commit on the Hub.
        Raises UserError for a missing or damaged file, or another backbone than the checkpoint's."""
        if not isinstance(backbone, Backbone | BackboneConfig | None):
            raise UserError(
                f"backbone is a {type(backbone).__name__}; expected BackboneConfig(name=...), or a loaded Backbone"
            )
        where = pick_device(device)
        precision = resolve_precision(dtype, where, key="dtype")
        model = EDJE.from_pretrained(checkpoint_dir, device=where, revision=revision)
        if not isinstance(backbone, Backbone):
            backbone = Backbone.load(_named(backbone or model.config.backbone, checkpoint_dir), where, precision=dtype)
        return cls(model, backbone, precision)

    def index(
        self,
        folder_or_paths: str | Path | Iterable[str | Path],
        store_path: str | Path,
        dtype: str = "float16",
        num_workers: int = 0,
        progress: bool = True,
    ) -> TokenStore:
        """Compress images into a store, which rank() and predict() use from then on. A killed call goes on.

        A folder is searched for images, whose ids are their paths relative to it; ids of a list are the paths as
        given. A finished store of the same ids and model is opened as it is: images changed since are not read again.
        Raises UserError naming unreadable images, or a directory that holds something else."""
        if isinstance(folder_or_paths, str | Path):
            ids = find_images(folder_or_paths)
            paths: list[str | Path] = [Path(folder_or_paths, item_id) for item_id in ids]
        else:
            paths = as_paths(folder_or_paths)
            ids = [path.as_posix() if isinstance(path, Path) else path for path in paths]
        if not isinstance(store_path, str | Path):
            raise UserError(f"store_path is a {type(store_path).__name__}; expected the directory to write")
        _check_at_least(0, num_workers=num_workers)
        self._scorer.after_fork()
        self.store = precompute(
            store_path,
            paths,
            ids,
            self.backbone,
            self.model,
            dtype=dtype,
            batch_size=IMAGES_PER_BATCH,
            num_workers=num_workers,
            progress=progress,
        )
        return self.store

    @overload
    def rank(
        self, query: str, documents: Iterable[ImageSource], top_k: int | None = ..., **options: Unpack[RankOptions]
    ) -> list[Ranked]: ...

    @overload
    def rank(
        self,
        query: list[str] | tuple[str, ...],
        documents: Iterable[Any],
        top_k: int | None = ...,
        **options: Unpack[RankOptions],
    ) -> list[list[Ranked]]: ...

    def rank(
        self,
        query: str | Sequence[str],
        documents: Iterable[Any],
        top_k: int | None = None,
        return_documents: bool = False,
        *,
        score: Score | None = None,
        store: TokenStore | None = None,
        similarities: Any = None,
        text_embedding: Numbers | None = None,
        min_probability: float | None = None,
        batch_size: int | None = None,
        show_progress_bar: bool = False,
        activation_fn: Activation | None = None,
        apply_softmax: bool = False,
    ) -> list[Ranked] | list[list[Ranked]]:
        """The `top_k` best candidates (all by default), best first; equal scores keep the order given.

        query: a text, or Q texts, which give a list of Q such lists. documents: images as open_image() takes them and
        ids of `store` (by default the last one indexed), in any mixture and in first-stage order; a text is an id if
        the store has it, else a path. For Q queries one list for all, or Q lists.
        score: `fused` or `match`; by default `fused` where the checkpoint has a lambda.
        similarities: first-stage cosines of this very backbone, one a document; text_embedding: the query's, [De], or
        [Q, De]. With either the text tower does not run; it runs once for a query that is not among the latest.
        min_probability: leave out less probable candidates; the checkpoint must be calibrated for this score.
        return_documents: with the candidate as it was given. The other options: as for predict().
        Raises UserError for what predict() refuses, or where lambda or calibration is asked for and missing."""
        queries, single = as_queries(query)
        of_queries = [as_images(documents)] if single else documents_of_queries(queries, documents)
        if not (single or similarities is None):
            similarities = cosines_of_queries(similarities, [len(images) for images in of_queries])
        lists = self._rank(
            [[(text, image) for image in images] for text, images in zip(queries, of_queries, strict=True)],
            of_queries if return_documents else None,
            top_k,
            min_probability,
            self._scoring(
                score,
                store,
                similarities,
                batch_size,
                show_progress_bar,
                self._given_texts(queries, text_embedding),
            ),
            Shown(activation_fn, apply_softmax),
        )
        return lists[0] if single else lists

    def rank_captions(
        self,
        image: ImageSource,
        captions: Iterable[str],
        top_k: int | None = None,
        return_documents: bool = False,
        *,
        score: Score | None = None,
        store: TokenStore | None = None,
        similarities: Numbers | None = None,
        min_probability: float | None = None,
        batch_size: int | None = None,
        show_progress_bar: bool = False,
        activation_fn: Activation | None = None,
        apply_softmax: bool = False,
    ) -> list[Ranked]:
        """The other direction: which of these captions say what the image shows, best first; options as for rank()."""
        captions = as_captions(captions)
        pairs = [(caption, image) for caption in captions]
        scoring = self._scoring(score, store, similarities, batch_size, show_progress_bar)
        documents = [captions] if return_documents else None
        shown = Shown(activation_fn, apply_softmax)
        return self._rank([pairs], documents, top_k, min_probability, scoring, shown)[0]

    @overload
    def search(
        self,
        query: str,
        store: TokenStore | None = ...,
        top_k: int = ...,
        pool: int = ...,
        **options: Unpack[SearchOptions],
    ) -> list[Found]: ...

    @overload
    def search(
        self,
        query: list[str] | tuple[str, ...],
        store: TokenStore | None = ...,
        top_k: int = ...,
        pool: int = ...,
        **options: Unpack[SearchOptions],
    ) -> list[list[Found]]: ...

    def search(
        self,
        query: str | Sequence[str],
        store: TokenStore | None = None,
        top_k: int = 10,
        pool: int = 100,
        *,
        score: Score | None = None,
        text_embedding: Numbers | None = None,
        min_probability: float | None = None,
        batch_size: int | None = None,
        show_progress_bar: bool = False,
    ) -> list[Found] | list[list[Found]]:
        """The `top_k` best images of a store: its `pool` nearest by embedding, exactly, then reranked as by rank().

        store: by default the last one indexed. Its embeddings [N, De] float32 are read at the first search and kept in
        memory on the model's device. Raises UserError as rank() does, or where there is no store."""
        store = store or self.store
        _check_store(store)
        if store is None:
            raise UserError("search() needs a token store, and none was indexed; pass TokenStore.open(path)")
        _check_at_least(1, pool=pool, top_k=top_k)
        if top_k > pool:
            raise UserError(f"top_k is {top_k} and pool {pool}; no more than the pool is reranked: raise pool")
        queries, single = as_queries(query)
        if not queries:
            return []
        self._scorer.after_fork()
        images = self._scorer.embeddings(store)
        distinct_queries = list(dict.fromkeys(queries))
        texts = self._scorer.texts(distinct_queries, self._given_texts(queries, text_embedding))
        text_of = dict(zip(distinct_queries, texts, strict=True))
        found = [nearest(text_of[text], images, pool) for text in queries]
        ids = [[store.ids[row] for row in rows.tolist()] for rows, _ in found]
        cosines = torch.cat([torch.empty(0), *(cosines.cpu() for _, cosines in found)])
        scoring = self._scoring(score, store, cosines, batch_size, show_progress_bar)
        pairs = [[(text, item) for item in items] for text, items in zip(queries, ids, strict=True)]
        lists = [
            [as_found(hit, items) for hit in hits]
            for hits, items in zip(self._rank(pairs, None, top_k, min_probability, scoring, Shown()), ids, strict=True)
        ]
        return lists[0] if single else lists

    def predict(
        self,
        pairs: Iterable[Pair],
        *,
        score: Score | None = None,
        store: TokenStore | None = None,
        similarities: Numbers | None = None,
        batch_size: int | None = None,
        show_progress_bar: bool = False,
        activation_fn: Activation | None = None,
        apply_softmax: bool = False,
        convert_to_numpy: bool = True,
        convert_to_tensor: bool = False,
        prompt_name: None = None,
    ) -> Any:
        """Scores of (caption, image) pairs, [n] float32; of one pair given without a list, one number.

        Images, score, store, similarities (of each pair): as for rank(). batch_size: pairs a pass of the joint encoder,
        by default what suits the device; it changes no score. activation_fn: applied to the scores [n], e.g.
        torch.sigmoid. apply_softmax: over the pairs of each caption. Returns a NumPy array, or a tensor on the CPU, or
        a list of tensors where both are declined. prompt_name: only sentence-transformers' evaluators pass it, as None.
        Raises UserError for what is no pair, a caption without text, an image that cannot be read, a store of another
        model, `fused` where the checkpoint has no lambda."""
        if prompt_name is not None:
            raise UserError(f"prompt_name is {prompt_name!r}; this model has no prompts")
        checked, single = as_pairs(pairs)
        scoring = self._scoring(score, store, similarities, batch_size, show_progress_bar)
        _, caption_of = distinct([caption for caption, _ in checked], lambda caption: caption)
        try:
            raw = self._scorer.scores(checked, scoring)
        except ImageError as error:
            known = store or self.store or ()
            swapped = next((caption for caption, _ in checked if may_be_image(caption) or caption in known), None)
            if swapped is None:
                raise
            raise UserError(f"{error}; and the caption {swapped!r} is an image: the caption goes first") from None
        scores = Shown(activation_fn, apply_softmax)(raw, caption_of)
        if single:
            scores = scores[0]
        if convert_to_tensor:
            return scores
        return scores.numpy()[()] if convert_to_numpy else (scores if single else list(scores))

    def _rank(
        self,
        pairs_of_lists: list[list[Pair]],
        documents: Sequence[Sequence[ImageSource]] | None,
        top_k: int | None,
        min_probability: float | None,
        scoring: Scoring,
        shown: Shown,
    ) -> list[list[Ranked]]:
        """The hits of each list of pairs, best first; all pairs are scored together."""
        if top_k is not None:
            _check_at_least(1, top_k=top_k)
        calibration = self._calibration(scoring.fusion_lambda)
        if min_probability is not None and not (isinstance(min_probability, Real) and 0 <= min_probability <= 1):
            raise UserError(f"min_probability is {min_probability!r}; expected a number from 0 to 1")
        if min_probability is not None and calibration is None:
            raise UserError(
                "min_probability needs a checkpoint that is calibrated for this score; evaluate it with "
                "--lambda-split, or drop min_probability or score"
            )
        sizes = [len(pairs) for pairs in pairs_of_lists]
        scores = self._scorer.scores([pair for pairs in pairs_of_lists for pair in pairs], scoring)
        list_of = torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes, dtype=torch.int64))
        values = shown(scores, list_of).split(sizes)
        probabilities = None if calibration is None else probability(scores, *calibration).split(sizes)
        lists = []
        for number, part in enumerate(values):
            hits = make_hits(
                part,
                None if probabilities is None else probabilities[number],
                None if documents is None else documents[number],
            )
            lists.append(best(hits, top_k, min_probability))
        return lists

    def _scoring(
        self,
        score: Score | None,
        store: TokenStore | None,
        similarities: Numbers | None,
        batch_size: int | None,
        progress: bool,
        texts: Mapping[str, Tensor] | None = None,
    ) -> Scoring:
        if batch_size is not None:
            _check_at_least(1, batch_size=batch_size)
        _check_store(store)
        return Scoring(self._lambda(score), store or self.store, similarities, texts or {}, batch_size, progress)

    def _lambda(self, score: str | None) -> float | None:
        """What the cosine weighs in the score asked for; None: the match logit alone."""
        if score not in (None, "fused", "match"):
            raise UserError(f"score is {score!r}; expected 'fused' or 'match'")
        fusion_lambda = self.model.config.fusion_lambda
        if score == "fused" and fusion_lambda is None:
            raise UserError(
                "score is 'fused', but this checkpoint has no lambda; choose one with "
                "evaluation/evaluate_retrieval.py --lambda-split val, or rank by score='match'"
            )
        return None if score == "match" else fusion_lambda

    def _calibration(self, fusion_lambda: float | None) -> tuple[float, float] | None:
        """Scale and offset of the probability, where the checkpoint has them: they were fitted on the default score."""
        scale, offset = self.model.config.probability_scale, self.model.config.probability_offset
        if scale is None or offset is None or fusion_lambda != self.model.config.fusion_lambda:
            return None
        return scale, offset

    def _given_texts(self, queries: list[str], embeddings: Numbers | None) -> dict[str, Tensor]:
        """Text -> its embedding [De], of those that the caller gave."""
        if embeddings is None:
            return {}
        width = self.model.config.dims.embedding_width
        return dict(zip(queries, as_text_embeddings(embeddings, len(queries), width), strict=True))


def _named(config: BackboneConfig, checkpoint: str | Path) -> BackboneConfig:
    """The configuration, unless it names no backbone: published weights may come without."""
    if not (config.name or config.pretrained):
        raise UserError(
            f"{checkpoint}: names no backbone; pass the one that it was trained with, e.g. "
            "backbone=BackboneConfig(name='google/siglip2-large-patch16-384')"
        )
    return config


def _check_store(store: object) -> None:
    if not isinstance(store, TokenStore | None):
        raise UserError(f"store is a {type(store).__name__}; expected a token store: pass TokenStore.open(path)")


def _check_at_least(least: int, **value: int) -> None:
    for name, number in value.items():
        if not isinstance(number, Integral):
            raise UserError(f"{name} is {number!r}; expected a whole number")
        if number < least:
            raise UserError(f"{name} is {number}; it must be at least {least}")
