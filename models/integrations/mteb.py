"""EDJE as a search model of MTEB: index() fills a token store, search() reranks what the embedding finds.

    model = EDJESearch.from_pretrained("runs/demo", stores="runs/mteb")
    mteb.evaluate(model, mteb.get_tasks(tasks=["Flickr30kT2IRetrieval", "Flickr30kI2TRetrieval"]))

Letters: N documents, D candidates of a query, De embedding width.
"""

from __future__ import annotations

from collections.abc import Container, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
from datasets import Dataset
from mteb.abstasks.task_metadata import TaskMetadata
from mteb.models.model_meta import ModelMeta
from mteb.types import EncodeKwargs, RetrievalOutputType, TopRankedDocumentsType
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from ..candidates import as_captions
from ..checkpoints.checkpoint import weights_fingerprint
from ..edje import EDJE
from ..errors import UserError
from ..first_stage import nearest
from ..reranker import Reranker, Score
from ..scores import paired_cosines
from ..stores.indexing import precompute
from ..stores.token_store import TokenStore
from ..vision.images import ImageError, open_image

MODALITIES = {"t": "text", "i": "image"}


@dataclass(frozen=True)
class _Side:
    """The queries or the documents of a task."""

    ids: list[str]
    """MTEB's."""
    items: list[str]
    """What the reranker is given for each: a text, or an id of `store`."""
    embeddings: Tensor
    """[N, De] float32 on the model's device."""
    store: TokenStore | None
    """Of images."""


class _Images:
    """Row -> image of a data set, decoded when it is asked for. Raises ImageError naming MTEB's id."""

    def __init__(self, dataset: Dataset, ids: Sequence[str]):
        encoded = datasets.Image(decode=False)  # open_image() tells what is wrong with a file
        self._dataset, self._ids = dataset.select_columns("image").cast_column("image", encoded), ids

    def __len__(self) -> int:
        return len(self._dataset)

    def __getitem__(self, row: int) -> Image.Image:
        image = self._dataset[row]["image"]
        if image is None:
            raise ImageError(f"image {self._ids[row]!r} of the task is absent")
        try:
            return open_image(image["bytes"] or image["path"])
        except ImageError as error:
            raise ImageError(f"image {self._ids[row]!r} of the task: {error}") from None


class EDJESearch:
    """MTEB's SearchProtocol for tasks of type t2i (images for a text) and i2t (texts for an image).

    The `pool` nearest documents by embedding are reranked; the others follow in the order of the embedding. A reranking
    task's own candidates are all reranked. Equal scores keep the order of the first stage, as everywhere in EDJE."""

    def __init__(
        self,
        reranker: Reranker,
        stores: str | Path,
        name: str,
        revision: str,
        *,
        pool: int = 100,
        score: Score | None = None,
    ):
        """stores: folder that keeps a token store for each data set, so that its images are encoded once.
        name, revision: OWNER/NAME of the model and what tells its weights apart: MTEB keeps results under them.
        score: `fused` or `match`, as for Reranker.rank(). Raises UserError for a pool below 1, a name
        without its two parts, or a score that this checkpoint does not have."""
        if pool < 1:
            raise UserError(f"pool is {pool}; it must be at least 1")
        if name.count("/") != 1:
            raise UserError(f"name is {name!r}; MTEB keeps results under OWNER/NAME, so pass e.g. 'edje/my-model'")
        reranker.predict([], score=score)  # refuses the score now, not after hours of encoding
        self.reranker, self.stores, self.pool, self.score = reranker, Path(stores), pool, score
        self.name, self.revision = name, revision
        self._documents: _Side | None = None

    @classmethod
    def from_pretrained(
        cls,
        checkpoint: str | Path,
        stores: str | Path,
        *,
        name: str | None = None,
        revision: str | None = None,
        pool: int = 100,
        score: Score | None = None,
        device: str = "auto",
        dtype: str = "auto",
    ) -> EDJESearch:
        """Load a checkpoint as Reranker.from_pretrained() does; results are kept under a fingerprint of its weights.

        name: by default OWNER/NAME of the Hub, or `edje/` and the folder's name. revision: of the Hub.
        Raises UserError as that does."""
        reranker = Reranker.from_pretrained(checkpoint, device=device, dtype=dtype, revision=revision)
        # The reranker's own weights lie in a form for speed, which depends on the device.
        weights = weights_fingerprint(EDJE.from_pretrained(checkpoint, revision=revision).state_dict())
        here = Path(checkpoint)
        name = name or (f"edje/{here.resolve().name}" if here.exists() else str(checkpoint))
        return cls(reranker, stores, name, weights, pool=pool, score=score)

    @property
    def mteb_model_meta(self) -> ModelMeta:
        """Who ran, as MTEB writes it beside results; runs of another pool, score or lambda are kept apart."""
        config = self.reranker.model.config
        fused = self.score != "match" and config.fusion_lambda is not None
        return ModelMeta.create_empty(
            {
                "name": self.name,
                "revision": self.revision,
                "framework": ["PyTorch"],
                "model_type": ["cross-encoder"],
                "modalities": ["image", "text"],
                "max_tokens": config.max_caption_tokens,
                "use_instructions": False,
                "reference": "https://arxiv.org/abs/2510.06820",
                "experiment_kwargs": {"pool": self.pool, "lambda": config.fusion_lambda if fused else 0.0},
            }
        )

    def index(
        self,
        corpus: Dataset,
        *,
        task_metadata: TaskMetadata,
        hf_split: str,
        hf_subset: str,
        encode_kwargs: EncodeKwargs,
        num_proc: int | None = None,
        **kwargs: Any,
    ) -> None:
        """Encode the documents: images into a token store, texts in memory. A killed call goes on.

        Raises UserError for a task that is neither t2i nor i2t, for unreadable images, or empty texts."""
        where = self._folder(task_metadata, hf_subset, hf_split) / "documents"
        self._documents = self._side(corpus, _modalities(task_metadata)[1], where, encode_kwargs, num_proc)

    def search(
        self,
        queries: Dataset,
        *,
        task_metadata: TaskMetadata,
        hf_split: str,
        hf_subset: str,
        top_k: int,
        encode_kwargs: EncodeKwargs,
        top_ranked: TopRankedDocumentsType | None = None,
        num_proc: int | None = None,
        **kwargs: Any,
    ) -> RetrievalOutputType:
        """For each query id the `top_k` best documents, id -> score. Raises UserError as index() does, or before it."""
        documents = self._documents
        if documents is None:
            raise UserError("search() before index(): index the task's documents first")
        where = self._folder(task_metadata, hf_subset, hf_split) / "queries"
        asked = self._side(queries, _modalities(task_metadata)[0], where, encode_kwargs, num_proc)
        row_of = {item_id: row for row, item_id in enumerate(documents.ids)}
        found: RetrievalOutputType = {}
        progress = encode_kwargs.get("show_progress_bar", True)
        if top_ranked is not None:
            _check_candidates(top_ranked, asked.ids, row_of)
        for number, query_id in enumerate(tqdm(asked.ids, desc="search", unit="query", disable=not progress)):
            embedding = asked.embeddings[number]
            if top_ranked is None:
                rows, cosines = nearest(embedding, documents.embeddings, max(self.pool, top_k))
                pool = self.pool
            else:
                rows = torch.tensor([row_of[item_id] for item_id in top_ranked[query_id]], device=embedding.device)
                cosines = paired_cosines(embedding.expand(len(rows), -1), documents.embeddings[rows])
                pool = len(rows)
            best = self._reranked(asked, number, documents, rows.tolist(), cosines.cpu(), pool)
            found[query_id] = {documents.ids[row]: score for row, score in best[:top_k]}
        return found

    def _reranked(
        self, queries: _Side, number: int, documents: _Side, rows: list[int], cosines: Tensor, pool: int
    ) -> list[tuple[int, float]]:
        """Rows of documents with falling scores: the first `pool` reranked, the others after them in their order."""
        query, candidates = queries.items[number], [documents.items[row] for row in rows[:pool]]
        options: dict[str, Any] = {"score": self.score, "similarities": cosines[:pool]}
        if queries.store is None:
            hits = self.reranker.rank(query, candidates, store=documents.store, **options)
        else:
            hits = self.reranker.rank_captions(query, candidates, store=queries.store, **options)
        order = [rows[hit["corpus_id"]] for hit in hits] + rows[pool:]
        return list(zip(order, _falling([hit["score"] for hit in hits], len(rows)), strict=True))

    def _folder(self, task: TaskMetadata, subset: str, split: str) -> Path:
        """Stores of other data or of another adapter lie elsewhere."""
        return self.stores / task.name / str(task.revision) / subset / split / self.reranker.model.adapter_fingerprint

    def _side(
        self, dataset: Dataset, modality: str, store: Path, encode_kwargs: EncodeKwargs, num_proc: int | None
    ) -> _Side:
        model, backbone, ids = self.reranker.model, self.reranker.backbone, list(dataset["id"])
        if modality not in dataset.column_names:
            raise UserError(
                f"the task's {store.name} have no column {modality!r}, only {', '.join(dataset.column_names)}"
            )
        if modality == "text":
            texts = as_captions(dataset["text"], f"the task's {store.name}")
            return _Side(ids, texts, backbone.encode_texts(texts).to(model.device), None)
        images = precompute(
            store,
            _Images(dataset, ids),
            ids,
            backbone,
            model,
            batch_size=encode_kwargs.get("batch_size", 32),
            num_workers=num_proc or 0,
            progress=encode_kwargs.get("show_progress_bar", True),
        )
        return _Side(ids, ids, images.gather_embeddings(ids).to(model.device), images)


def _check_candidates(top_ranked: TopRankedDocumentsType, queries: Sequence[str], documents: Container[str]) -> None:
    """Raises UserError unless each query of a reranking task has candidates, all of them among its documents."""
    for query_id in queries:
        if not top_ranked.get(query_id):
            raise UserError(f"query {query_id!r} of the task has no candidates in top_ranked")
        for item_id in top_ranked[query_id]:
            if item_id not in documents:
                raise UserError(f"candidate {item_id!r} of query {query_id!r} is no document of the task")


def _modalities(task: TaskMetadata) -> tuple[str, str]:
    """Of queries and of documents. Raises UserError for a task that EDJE has no model for."""
    if task.category not in ("t2i", "i2t"):
        raise UserError(
            f"{task.name} is a task of category {task.category}; EDJE ranks images for a text (t2i) and texts for an "
            "image (i2t)"
        )
    query, document = task.category.split("2")
    return MODALITIES[query], MODALITIES[document]


def _falling(scores: Sequence[float], length: int) -> list[float]:
    """Scores of the first few of `length` documents -> scores of all, each below the one before as a float32.

    MTEB orders equal scores by id, and its metrics compare in float32."""
    after = [min(scores, default=0.0) - 1 - i for i in range(length - len(scores))]
    falling = np.array([*scores, *after], np.float32)
    for i in range(1, length):
        falling[i] = min(falling[i], np.nextafter(falling[i - 1], np.float32(-np.inf)))
    return [float(score) for score in falling]
