"""What a run reads of images and captions: stored features, or a backbone that runs on images as they come.

`StoredFeatures` and `BackboneFeatures` are alike to the rest of training: what a step gets, what a validation reads,
what the log says. Letters: b rows of this rank, B of all ranks, P patch tokens, Dv patch width, De embedding width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from data.batches import Batch, EncodedRows, ImageRows, RowReader, StoredRows
from data.caption_datasets import CaptionDataset
from evaluation.results import Results
from evaluation.retrieval import evaluate
from models.config import BackboneDims
from models.distributed import DistributedContext
from models.edje import EDJE
from models.errors import UserError
from models.language.captions import CaptionIds
from models.precision import dtype_name
from models.stores.token_store import TokenStore
from models.vision.backbones import Backbone

from .config import RunConfig


@dataclass(frozen=True)
class StepInputs:
    """A rank's b rows of one micro-batch, features and captions; row i is caption i with its image i.

    Pairs are chosen and laid out on the CPU, so all but the patch tokens lies there."""

    rows: Tensor
    """[b] int64, row numbers counted through the run: seeds of the rows' random choices."""
    patch_tokens: Tensor
    """[b, P, Dv] on the run's device."""
    image_embeddings: Tensor
    """[b, De] float32, normalised; so are text_embeddings."""
    text_embeddings: Tensor
    captions: CaptionIds
    excluded: Tensor
    """[B, B] bool over the rows of all ranks: caption i describes image j, so the pair is excluded from negatives."""
    random_share: float
    """Share of random negatives at this step of the curriculum."""
    retriever_embeddings: tuple[Tensor, Tensor] | None = None
    """Image and text embeddings of another retriever that negatives are mined by, [b, its width] each; None: by those
    above."""
    aligning: bool = False
    """In the alignment stage, which leaves ITM, its negatives and distillation out."""


@dataclass(frozen=True)
class Embeddings:
    """Stored embeddings of a data set's images and captions, by which negatives are mined."""

    images: TokenStore
    captions: TokenStore

    @classmethod
    def open(cls, images: str, captions: str) -> Embeddings:
        """Raises UserError if one is no store, or they belong to two models."""
        stores = cls(TokenStore.open(images), TokenStore.open(captions))
        stores.captions.check(backbone=stores.images.manifest.backbone)
        return stores

    def of_images(self, image_ids: Sequence[str]) -> Tensor:
        """[n, De] float32"""
        return self.images.gather_embeddings(image_ids)

    def of_captions(self, captions: Sequence[str]) -> Tensor:
        """[n, De] float32"""
        return self.captions.gather_embeddings(captions)


class Features(Protocol):
    """A run's source of patch tokens and embeddings."""

    @property
    def dims(self) -> BackboneDims:
        """Sizes of what it gives."""

    @property
    def fingerprint(self) -> str:
        """Of the backbone that made it."""

    @property
    def embeddings(self) -> Embeddings | None:
        """Stored embeddings of the whole data set, where there are any."""

    def rows(self, dataset: CaptionDataset) -> RowReader:
        """What a data loader reads of each row."""

    def encode(self, batch: Batch, captions: Sequence[str]) -> EncodedRows:
        """A batch's patch tokens and embeddings; captions: the raw text of its rows."""

    def evaluate(
        self, model: EDJE, dataset: CaptionDataset, distributed: DistributedContext, k: int, dtype: torch.dtype
    ) -> Results:
        """Retrieval on a validation split; called by every rank."""

    def describe(self) -> str:
        """For the first lines of a run's log."""


@dataclass(frozen=True)
class StoredFeatures:
    """Patch tokens and embeddings computed beforehand: no image is decoded, and no backbone is loaded."""

    embeddings: Embeddings
    """The stores: that of the images holds patch tokens too."""

    @classmethod
    def open(cls, images: str, captions: str) -> StoredFeatures:
        """Raises UserError if one is no store, they belong to two models, or `images` holds compressed tokens."""
        stores = Embeddings.open(images, captions)
        if stores.images.manifest.adapter:
            raise UserError(f"{images}: holds compressed tokens; training reads patch tokens; precompute those")
        return cls(stores)

    @property
    def dims(self) -> BackboneDims:
        store = self.embeddings.images
        return BackboneDims(
            num_patches=store.tokens_per_item, patch_width=store.width, embedding_width=store.embedding_width
        )

    @property
    def fingerprint(self) -> str:
        return self.embeddings.images.manifest.backbone

    def rows(self, dataset: CaptionDataset) -> StoredRows:
        return StoredRows(dataset, self.embeddings.images, self.embeddings.captions)

    def encode(self, batch: Batch, captions: Sequence[str]) -> EncodedRows:
        assert isinstance(batch.content, EncodedRows), "a batch of images was read for stored features"
        return batch.content

    def evaluate(
        self, model: EDJE, dataset: CaptionDataset, distributed: DistributedContext, k: int, dtype: torch.dtype
    ) -> Results:
        images, captions = self.embeddings.images, self.embeddings.captions
        return evaluate(model, None, dataset, distributed, k=k, dtype=dtype, store=images, caption_store=captions)

    def describe(self) -> str:
        return f"patch tokens of {self.embeddings.images.path}"


@dataclass(frozen=True)
class BackboneFeatures:
    """One pass of the frozen backbone per image and step."""

    backbone: Backbone

    @property
    def dims(self) -> BackboneDims:
        return self.backbone.dims

    @property
    def fingerprint(self) -> str:
        return self.backbone.fingerprint

    @property
    def embeddings(self) -> None:
        return None

    def rows(self, dataset: CaptionDataset) -> ImageRows:
        return ImageRows(self.backbone.preprocess)

    def encode(self, batch: Batch, captions: Sequence[str]) -> EncodedRows:
        assert isinstance(batch.content, Tensor), "a batch of stored features was read for a backbone"
        images = self.backbone.encode_images(batch.content.to(self.backbone.device, non_blocking=True))
        return EncodedRows(images.patch_tokens, images.embedding, self.backbone.encode_texts(list(captions)))

    def evaluate(
        self, model: EDJE, dataset: CaptionDataset, distributed: DistributedContext, k: int, dtype: torch.dtype
    ) -> Results:
        return evaluate(model, self.backbone, dataset, distributed, k=k, dtype=dtype)

    def describe(self) -> str:
        frozen = sum(p.numel() for p in self.backbone.parameters())
        return f"images, backbone {self.fingerprint} ({frozen / 1e6:.1f}M frozen parameters)"


def open_features(config: RunConfig, distributed: DistributedContext, dtype: torch.dtype) -> Features:
    """The run's stores, or its backbone where there are none. dtype: of the backbone's matrix products."""
    if config.data.store:
        return StoredFeatures.open(config.data.store, config.data.caption_store)
    return BackboneFeatures(Backbone.load(config.backbone, distributed.device, dtype_name(dtype)))


def open_retriever(config: RunConfig) -> Embeddings | None:
    """Another retriever's embeddings, by which negatives are mined; None: by those that the run reads."""
    negatives = config.negatives
    return Embeddings.open(negatives.store, negatives.caption_store) if negatives.store else None
