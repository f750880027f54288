"""The gallery of an evaluation: embeddings of images and captions, and each image's vision tokens, computed once.

Images and captions are processed in fixed blocks (blocks.py), so no score depends on the number of ranks.
Letters: N images, C captions, m vision tokens, H joint encoder width, De embedding width, P patch tokens, Dv patch
width.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from threading import Lock

import numpy as np
import torch
from torch import Tensor

from data.caption_datasets import CaptionDataset
from models.config import check_backbone
from models.distributed import DistributedContext
from models.edje import EDJE
from models.errors import UserError
from models.stores.token_store import TokenStore
from models.vision.backbones import Backbone

from .blocks import Stopwatch, blocks, own_blocks, progress_bar, run_blocks, share_blocks

IMAGES_PER_BLOCK = 32
CAPTIONS_PER_BLOCK = 256
READER_THREADS = 4
"""Pillow decodes and resizes outside Python's lock; more threads than this only queue behind the backbone."""


@dataclass(frozen=True)
class Gallery:
    """What both directions rank and rerank."""

    dataset: CaptionDataset
    image_embeddings: Tensor
    """[N, De] float32, normalised."""
    text_embeddings: Tensor
    """[C, De] float32, normalised."""
    tokens: Callable[[Tensor], Tensor]
    """Image numbers [n] int64 (CPU) -> their vision tokens [n, m, H] on the model's device."""


def build_gallery(
    model: EDJE,
    backbone: Backbone | None,
    dataset: CaptionDataset,
    distributed: DistributedContext,
    store: TokenStore | None = None,
    caption_store: TokenStore | None = None,
    watch: Stopwatch | None = None,
    progress: bool = False,
) -> Gallery:
    """Encode a data set, or read it from stores: `store` of patch tokens or of this model's compressed tokens,
    `caption_store` of text embeddings. `backbone` may be None where both stores are given.

    Raises UserError if backbone or store belong to another model, or an image cannot be read."""
    watch = watch or Stopwatch(distributed.device)
    _check_backbone(model, backbone, store, caption_store)
    if caption_store is not None:
        text_embeddings = caption_store.gather_embeddings(dataset.captions).to(distributed.device)
    else:
        with watch.part("backbone"):
            assert backbone is not None  # _check_backbone has refused it
            text_embeddings = _encode_captions(backbone, dataset.captions, distributed, progress)
    if store is None:
        assert backbone is not None
        image_embeddings, tokens = _encode_images(model, backbone, dataset, distributed, watch, progress)
    elif store.manifest.adapter:
        rows = store.rows(dataset.image_ids)
        image_embeddings = store.gather_embedding_rows(rows).to(distributed.device)
        return Gallery(dataset, image_embeddings, text_embeddings, _StoredTokens(store, rows, distributed.device))
    else:
        image_embeddings, tokens = _compress_stored(model, dataset, store, distributed, watch, progress)
    return Gallery(dataset, image_embeddings, text_embeddings, lambda images: tokens[images.to(tokens.device)])


@dataclass(frozen=True)
class _StoredTokens:
    """Compressed tokens that are read as they are needed: a large gallery does not fit into memory."""

    store: TokenStore
    rows: np.ndarray
    device: torch.device
    lock: Lock = field(default_factory=Lock)
    """Blocks run side by side; the store opens its files at their first use."""

    def __call__(self, images: Tensor) -> Tensor:
        with self.lock:
            tokens = self.store.gather_rows(self.rows[images.numpy()])
        return tokens.to(self.device).float()


def _check_backbone(
    model: EDJE, backbone: Backbone | None, store: TokenStore | None, caption_store: TokenStore | None
) -> None:
    if backbone is not None:
        found = backbone.fingerprint
    elif store is not None and caption_store is not None:
        found = store.manifest.backbone
    else:
        raise UserError("an evaluation without backbone needs a token store and a caption store; give both")
    # An imported checkpoint records no fingerprint; backbone and stores must then at least agree.
    expected = model.config.backbone_fingerprint or found
    if backbone is not None:
        check_backbone(model.config, backbone)
    if store is not None:
        compressed = bool(store.manifest.adapter)
        store.check(backbone=expected, adapter=model.adapter_fingerprint if compressed else None)
    if caption_store is not None:
        caption_store.check(backbone=expected, adapter=None)


def _encode_captions(
    backbone: Backbone, captions: Sequence[str], distributed: DistributedContext, progress: bool
) -> Tensor:
    """[C, De] float32."""
    embeddings = torch.empty(len(captions), backbone.dims.embedding_width, device=distributed.device)
    parts = blocks(len(captions), CAPTIONS_PER_BLOCK)
    own = own_blocks(parts, distributed)
    encoded = run_blocks(lambda part: backbone.encode_texts(captions[part]), own, distributed.device)
    for part, result in zip(own, progress_bar(encoded, len(own), "captions", progress), strict=True):
        embeddings[part] = result
    share_blocks(embeddings, parts, distributed)
    return embeddings


def _encode_images(
    model: EDJE,
    backbone: Backbone,
    dataset: CaptionDataset,
    distributed: DistributedContext,
    watch: Stopwatch,
    progress: bool,
) -> tuple[Tensor, Tensor]:
    """One backbone pass per image: embeddings [N, De] and compressed tokens [N, m, H]. Reading counts as backbone."""
    embeddings = torch.empty(len(dataset), backbone.dims.embedding_width, device=distributed.device)
    tokens = _empty_tokens(model, len(dataset), distributed)
    parts = blocks(len(dataset), IMAGES_PER_BLOCK)
    own = own_blocks(parts, distributed)
    seconds: list[dict[str, float]] = []

    def encode(pixels: Tensor) -> tuple[Tensor, Tensor, dict[str, float]]:
        of_block = Stopwatch(distributed.device)
        with of_block.part("backbone"):
            features = backbone.encode_images(pixels)
        with of_block.part("compress"):
            compressed = model.compress(features.patch_tokens)
        return features.embedding, compressed, of_block.seconds

    encoded = run_blocks(encode, _read_ahead(backbone, dataset, own), distributed.device)
    with watch.divided(seconds):
        for part, result in zip(own, progress_bar(encoded, len(own), "images", progress), strict=True):
            embeddings[part], tokens[part] = result[:2]
            seconds.append(result[2])
    share_blocks(embeddings, parts, distributed)
    share_blocks(tokens, parts, distributed)
    return embeddings, tokens


def _compress_stored(
    model: EDJE,
    dataset: CaptionDataset,
    store: TokenStore,
    distributed: DistributedContext,
    watch: Stopwatch,
    progress: bool,
) -> tuple[Tensor, Tensor]:
    """Stored patch tokens, compressed by the model's adapter: embeddings [N, De] and tokens [N, m, H]."""
    rows = store.rows(dataset.image_ids)
    tokens = _empty_tokens(model, len(dataset), distributed)
    parts = blocks(len(dataset), IMAGES_PER_BLOCK)
    own = own_blocks(parts, distributed)
    stored = (store.gather_rows(rows[part]).to(distributed.device) for part in own)
    compressed = run_blocks(model.compress, stored, distributed.device)
    with watch.part("compress"):
        for part, result in zip(own, progress_bar(compressed, len(own), "stored tokens", progress), strict=True):
            tokens[part] = result
    share_blocks(tokens, parts, distributed)
    return store.gather_embedding_rows(rows).to(distributed.device), tokens


def _empty_tokens(model: EDJE, num_images: int, distributed: DistributedContext) -> Tensor:
    config = model.config
    return torch.empty(num_images, config.num_vision_tokens, config.encoder.hidden_size, device=distributed.device)


def _read_ahead(backbone: Backbone, dataset: CaptionDataset, parts: list[slice]) -> Iterator[Tensor]:
    """Preprocessed images [n, 3, S, S] of each block; the next block is read while this one is computed."""

    def read(image: int) -> Tensor:
        return backbone.preprocess(dataset.open_image(image))

    with ThreadPoolExecutor(READER_THREADS) as readers:
        pending: deque[list[Future[Tensor]]] = deque()
        for part in [*parts, None]:
            if part is not None:
                pending.append([readers.submit(read, image) for image in range(part.start, part.stop)])
            if len(pending) > (part is not None):
                yield torch.stack([future.result() for future in pending.popleft()])
