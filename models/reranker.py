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

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NotRequired, TypedDict, Unpack, overload

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from .candidates import (
    Numbers,
    Pair,
    as_captions,
    as_cosines,
    as_images,
    as_pairs,
    as_queries,
    as_text_embeddings,
    distinct,
    documents_of_queries,
    identity,
)
from .config import BackboneConfig, check_backbone
from .distributed import pick_device
from .edje import EDJE
from .encoder.optimized_encoder import pairs_at_once
from .errors import UserError
from .first_stage import nearest
from .precision import resolve_precision
from .recent_texts import RecentTexts
from .scores import fuse, paired_cosines, probability, softmax_within
from .stores.indexing import find_images, precompute, read_images
from .stores.token_store import TokenStore
from .vision.backbones import Backbone
from .vision.images import ImageError, ImageSource, may_be_image

IMAGES_PER_BATCH = 32

Score = Literal["fused", "match"]
Activation = Callable[[Tensor], Tensor]


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


@dataclass
class EvaluatorMetrics:
    """Where sentence-transformers' evaluators leave their figures; the latest of each name are kept."""

    metrics: dict[str, float] = field(default_factory=dict)

    def set_evaluation_metrics(self, evaluator: object, metrics: Mapping[str, float], epoch: int, step: int) -> None:
        self.metrics.update(metrics)


@dataclass(frozen=True)
class _Scoring:
    """How the pairs of one call are scored."""

    fusion_lambda: float | None
    store: TokenStore | None
    similarities: Numbers | None
    texts: Mapping[str, Tensor]
    batch_size: int | None
    progress: bool


@dataclass(frozen=True)
class _Shown:
    """What becomes of the scores before they are sorted and shown."""

    activation: Activation | None = None
    softmax: bool = False

    def __call__(self, scores: Tensor, group: Tensor) -> Tensor:
        """scores [n] float32 -> [n]; group [n] int64: the softmax is within each."""
        shown = scores if self.activation is None else self.activation(scores)
        return softmax_within(shown, group) if self.softmax else shown


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
        self._adapter = self.model.adapter_fingerprint
        self._encode_texts = RecentTexts(backbone)
        self._first_stage: tuple[TokenStore, Tensor] | None = None
        self._process = os.getpid()

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
            paths = list(folder_or_paths)
            ids = [path.as_posix() if isinstance(path, Path) else path for path in paths]
        self._after_fork()
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
            similarities = np.concatenate([np.zeros(0), *(np.asarray(cosines) for cosines in similarities)])
        lists = self._rank(
            [[(text, image) for image in images] for text, images in zip(queries, of_queries, strict=True)],
            of_queries if return_documents else None,
            top_k,
            min_probability,
            _Scoring(
                self._lambda(score),
                store,
                similarities,
                self._given_texts(queries, text_embedding),
                batch_size,
                show_progress_bar,
            ),
            _Shown(activation_fn, apply_softmax),
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
        scoring = _Scoring(self._lambda(score), store, similarities, {}, batch_size, show_progress_bar)
        documents = [captions] if return_documents else None
        shown = _Shown(activation_fn, apply_softmax)
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
        if not isinstance(store, TokenStore):
            given = "none was indexed" if store is None else f"this is a {type(store).__name__}"
            raise UserError(f"search() needs a token store, and {given}; pass TokenStore.open(path)")
        _check_at_least(1, pool=pool)
        if top_k > pool:
            raise UserError(f"top_k is {top_k} and pool {pool}; no more than the pool is reranked: raise pool")
        queries, single = as_queries(query)
        self._after_fork()
        images = self._embeddings(store)
        texts = self._given_texts(queries, text_embedding) or self._texts(queries)
        found = [nearest(texts[text].to(images), images, pool) for text in queries]
        ids = [[store.ids[row] for row in rows.tolist()] for rows, _ in found]
        scoring = _Scoring(
            self._lambda(score),
            store,
            torch.cat([torch.empty(0), *(cosines.cpu() for _, cosines in found)]),
            {},
            batch_size,
            show_progress_bar,
        )
        pairs = [[(text, item) for item in items] for text, items in zip(queries, ids, strict=True)]
        lists = [
            [_found(hit, items) for hit in hits]
            for hits, items in zip(self._rank(pairs, None, top_k, min_probability, scoring), ids, strict=True)
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
        scoring = _Scoring(self._lambda(score), store, similarities, {}, batch_size, show_progress_bar)
        _, caption_of = distinct([caption for caption, _ in checked], lambda caption: caption)
        try:
            raw = self._scores(checked, scoring)
        except ImageError as error:
            known = store or self.store or ()
            swapped = next((caption for caption, _ in checked if may_be_image(caption) or caption in known), None)
            if swapped is None:
                raise
            raise UserError(f"{error}; and the caption {swapped!r} is an image: the caption goes first") from None
        scores = _Shown(activation_fn, apply_softmax)(raw, caption_of)
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
        scoring: _Scoring,
        shown: _Shown = _Shown(),
    ) -> list[list[Ranked]]:
        """The hits of each list of pairs, best first; all pairs are scored together."""
        if top_k is not None:
            _check_at_least(1, top_k=top_k)
        calibration = self._calibration(scoring.fusion_lambda)
        if min_probability is not None and calibration is None:
            raise UserError(
                "min_probability needs a checkpoint that is calibrated for this score; evaluate it with "
                "--lambda-split, or drop min_probability or score"
            )
        sizes = [len(pairs) for pairs in pairs_of_lists]
        scores = self._scores([pair for pairs in pairs_of_lists for pair in pairs], scoring)
        list_of = torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes, dtype=torch.int64))
        values = shown(scores, list_of).split(sizes)
        lists = [_hits(part) for part in values]
        if calibration is not None:
            for hits, part in zip(lists, probability(scores, *calibration).split(sizes), strict=True):
                for hit, value in zip(hits, part.tolist(), strict=True):
                    hit["probability"] = value
        if documents is not None:
            for hits, given in zip(lists, documents, strict=True):
                for hit, document in zip(hits, given, strict=True):
                    hit["text"] = document
        return [_best(hits, top_k, min_probability) for hits in lists]

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

    def _texts(self, captions: list[str], given: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
        """Text -> its embedding [De] float32 on the model's device."""
        texts = {caption: embedding.to(self.model.device) for caption, embedding in (given or {}).items()}
        others = [caption for caption in dict.fromkeys(captions) if caption not in texts]
        if others:
            texts |= zip(others, self._encode_texts(others).to(self.model.device), strict=True)
        return texts

    def _embeddings(self, store: TokenStore) -> Tensor:
        """All embeddings of a store, [N, De] float32 on the model's device; those of the latest store are kept."""
        if self._first_stage is None or self._first_stage[0] is not store:
            store.check(backbone=self.backbone.fingerprint, adapter=self._adapter)
            rows = np.arange(len(store))
            self._first_stage = store, store.gather_embedding_rows(rows).to(self.model.device)
        return self._first_stage[1]

    @torch.inference_mode()
    def _scores(self, pairs: list[Pair], scoring: _Scoring) -> Tensor:
        """[n] float32 on the CPU."""
        if scoring.batch_size is not None:
            _check_at_least(1, batch_size=scoring.batch_size)
        given = None if scoring.similarities is None else as_cosines(scoring.similarities, len(pairs))
        if not pairs:
            return torch.empty(0)
        self._after_fork()
        # Each distinct pair once: in another row of a batch the same pair may round otherwise, and equals must tie.
        numbered = list(enumerate(pairs))
        cosine_of = (lambda number: None) if given is None else given.tolist().__getitem__
        unique, pair_index = distinct(numbered, lambda item: (item[1][0], identity(item[1][1]), cosine_of(item[0])))
        captions, caption_index = distinct([pair[0] for _, pair in unique], lambda caption: caption)
        images, image_index = distinct([pair[1] for _, pair in unique], identity)
        needed = scoring.fusion_lambda is not None or bool(self.model.config.residual_similarity)
        tokens, embeddings = self._vision(images, scoring)
        similarities = None
        if needed and given is not None:
            similarities = given[[number for number, _ in unique]].to(self.model.device)
        elif needed:
            known = self._texts(captions, scoring.texts)
            texts = torch.stack([known[caption] for caption in captions])
            similarities = paired_cosines(texts[caption_index], embeddings[image_index])
        scores = self._match_logits(captions, tokens, caption_index, image_index, similarities, scoring)
        if scoring.fusion_lambda is not None and similarities is not None:
            scores = fuse(scores, similarities, scoring.fusion_lambda)
        return scores.cpu()[pair_index]

    def _match_logits(
        self,
        captions: list[str],
        tokens: Tensor,
        caption_index: Tensor,
        image_index: Tensor,
        similarities: Tensor | None,
        scoring: _Scoring,
    ) -> Tensor:
        """[n] float32. Pairs of like length share a micro-batch: the encoder runs equal lengths together."""
        device = self.model.device
        ids = self.model.tokenizer(captions, self.model.max_joint_pieces)
        order = ids.lengths[caption_index].argsort(stable=True).to(device)
        ids, caption_index, image_index = ids.to(device), caption_index.to(device), image_index.to(device)
        if not self.model.config.residual_similarity:
            similarities = None
        logits = torch.empty(len(order), device=device)
        size = scoring.batch_size or pairs_at_once(device, tokens.shape[1])
        with tqdm(total=len(order), desc="score", unit="pair", disable=not scoring.progress) as bar:
            for part in order.split(size):
                cosines = None if similarities is None else similarities[part]
                logits[part] = self.model.match_logits(ids, tokens, caption_index[part], image_index[part], cosines)
                bar.update(len(part))
        return logits

    def _vision(self, images: list[ImageSource], scoring: _Scoring) -> tuple[Tensor, Tensor]:
        """Vision tokens [N, m, H] and embeddings [N, De] float32, of each image from the store or from the backbone."""
        store = scoring.store or self.store
        config, device = self.model.config, self.model.device
        if store is not None:
            store.check(backbone=self.backbone.fingerprint, adapter=self._adapter)
        texts = {i: image for i, image in enumerate(images) if isinstance(image, str)}
        ids = {} if store is None else {i: text for i, text in texts.items() if text in store}
        others = [i for i in range(len(images)) if i not in ids]
        tokens = torch.empty(len(images), config.num_vision_tokens, config.encoder.hidden_size, device=device)
        embeddings = torch.empty(len(images), config.dims.embedding_width, device=device)
        if store is not None and ids:
            rows, stored = store.rows(list(ids.values())), list(ids)
            tokens[stored] = store.gather_rows(rows).to(device, torch.float32)
            embeddings[stored] = store.gather_embedding_rows(rows).to(device)
        batches = [others[i : i + IMAGES_PER_BATCH] for i in range(0, len(others), IMAGES_PER_BATCH)]
        read = read_images(images, self.backbone.preprocess, batches, num_workers=0)
        with tqdm(total=len(others), desc="encode", unit="image", disable=not (scoring.progress and others)) as bar:
            for batch, (pixels, unreadable) in zip(batches, read, strict=True):
                if unreadable:
                    raise ImageError(unreadable[0] if store is None else f"{unreadable[0]} (nor an id of {store.path})")
                features = self.backbone.encode_images(pixels)
                tokens[batch] = self.model.compress(features.patch_tokens).float()
                embeddings[batch] = features.embedding
                bar.update(len(batch))
        return tokens, embeddings

    def _after_fork(self) -> None:
        """In a forked process one thread: the parent's team of threads is not there, and OpenMP waits for it."""
        if os.getpid() != self._process:
            torch.set_num_threads(1)
            self._process = os.getpid()

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__ |= state | {"_process": os.getpid()}

    def __getstate__(self) -> dict[str, Any]:
        # Embeddings of a store are read again where they are needed.
        return self.__dict__ | {"_first_stage": None}


def _hits(scores: Tensor) -> list[Ranked]:
    return [{"corpus_id": number, "score": score} for number, score in enumerate(scores.tolist())]


def _best(hits: list[Ranked], top_k: int | None, min_probability: float | None) -> list[Ranked]:
    """The first `top_k` by falling score; sorted() keeps the order of equal ones."""
    ranked = sorted(hits, key=lambda hit: -hit["score"])
    if min_probability is not None:
        ranked = [hit for hit in ranked if hit["probability"] >= min_probability]
    return ranked[:top_k]


def _found(hit: Ranked, ids: Sequence[str]) -> Found:
    number = hit["corpus_id"]
    found: Found = {"id": ids[number], "score": hit["score"], "first_stage_rank": number + 1}
    if "probability" in hit:
        found["probability"] = hit["probability"]
    return found


def _named(config: BackboneConfig, checkpoint: str | Path) -> BackboneConfig:
    """The configuration, unless it names no backbone: published weights may come without."""
    if not (config.name or config.pretrained):
        raise UserError(
            f"{checkpoint}: names no backbone; pass the one that it was trained with, e.g. "
            "backbone=BackboneConfig(name='google/siglip2-large-patch16-384')"
        )
    return config


def _check_at_least(least: int, **value: int) -> None:
    for name, number in value.items():
        if number < least:
            raise UserError(f"{name} is {number}; it must be at least {least}")
