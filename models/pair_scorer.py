"""The scores of any (caption, image) pairs: from a token store or the backbone, through the joint encoder.

    PairScorer(model, backbone).scores(pairs, Scoring(fusion_lambda=20.0, store=store))      # [n] float32

Letters: n pairs, N images, m vision tokens, H joint encoder width, De embedding width.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from .candidates import Numbers, Pair, as_cosines, distinct, identity
from .encoder.optimized_encoder import pairs_at_once
from .matching import OptimizedEDJE
from .recent_texts import RecentTexts
from .scores import fuse, paired_cosines
from .stores.indexing import read_images
from .stores.token_store import TokenStore
from .vision.backbones import Backbone
from .vision.images import ImageError, ImageSource, is_url, may_be_image

IMAGES_PER_BATCH = 32


@dataclass(frozen=True)
class Scoring:
    """How the pairs of one call are scored."""

    fusion_lambda: float | None
    """What the cosine weighs; None: the match logit alone."""
    store: TokenStore | None = None
    """Where images are that are given by id."""
    similarities: Numbers | None = None
    """First-stage cosines of the pairs [n], where the caller has them."""
    texts: Mapping[str, Tensor] = field(default_factory=dict)
    """Captions whose embedding [De] the caller has."""
    batch_size: int | None = None
    """Pairs a pass of the joint encoder; None: what suits the device."""
    progress: bool = False


class PairScorer:
    """A model and its backbone, ready to score. May be used from several threads, after a fork (on the CPU), and be
    pickled."""

    def __init__(self, model: OptimizedEDJE, backbone: Backbone):
        self.model, self.backbone = model, backbone
        self._adapter = model.adapter_fingerprint
        self._encode_texts = RecentTexts(backbone)
        self._embeddings: tuple[TokenStore, Tensor] | None = None
        self._process = os.getpid()

    def texts(self, captions: Sequence[str], given: Mapping[str, Tensor] | None = None) -> Tensor:
        """Embeddings [C, De] float32 of distinct captions on the model's device: given, remembered, or encoded now."""
        given = given or {}
        others = [caption for caption in captions if caption not in given]
        known = dict(zip(others, self._encode_texts(others), strict=True)) if others else {}
        known |= given
        return torch.stack([known[caption].to(self.model.device) for caption in captions])

    def embeddings(self, store: TokenStore) -> Tensor:
        """All embeddings of a store, [N, De] float32 on the model's device; those of the latest store are kept.

        Raises UserError if another model made the store."""
        if self._embeddings is None or self._embeddings[0] is not store:
            store.check(backbone=self.backbone.fingerprint, adapter=self._adapter)
            embeddings = store.gather_embedding_rows(np.arange(len(store)))
            self._embeddings = store, embeddings.to(self.model.device)
        return self._embeddings[1]

    @torch.inference_mode()
    def scores(self, pairs: list[Pair], scoring: Scoring) -> Tensor:
        """[n] float32 on the CPU. Equal pairs have equal scores.

        Raises UserError for an image that cannot be read, or is of another model's store."""
        given = None if scoring.similarities is None else as_cosines(scoring.similarities, len(pairs))
        if not pairs:
            return torch.empty(0)
        self.after_fork()
        # Each distinct pair once: in another row of a batch the same pair may round otherwise, and equals must tie.
        numbered = list(enumerate(pairs))
        cosine_of = (lambda number: None) if given is None else given.tolist().__getitem__
        unique, pair_index = distinct(numbered, lambda item: (item[1][0], identity(item[1][1]), cosine_of(item[0])))
        captions, caption_index = distinct([pair[0] for _, pair in unique], lambda caption: caption)
        images, image_index = distinct([pair[1] for _, pair in unique], identity)
        tokens, embeddings = self._vision(images, scoring)
        similarities = None
        if given is not None:
            similarities = given[[number for number, _ in unique]].to(self.model.device)
        elif scoring.fusion_lambda is not None or self.model.config.residual_similarity:
            texts = self.texts(captions, scoring.texts)
            similarities = paired_cosines(texts[caption_index], embeddings[image_index])
        scores = self._match_logits(captions, tokens, caption_index, image_index, similarities, scoring)
        if scoring.fusion_lambda is not None:
            assert similarities is not None
            scores = fuse(scores, similarities, scoring.fusion_lambda)
        return scores.cpu()[pair_index]

    def _match_logits(
        self,
        captions: list[str],
        tokens: Tensor,
        caption_index: Tensor,
        image_index: Tensor,
        similarities: Tensor | None,
        scoring: Scoring,
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

    def _vision(self, images: list[ImageSource], scoring: Scoring) -> tuple[Tensor, Tensor]:
        """Vision tokens [N, m, H] and embeddings [N, De] float32, of each image from the store or from the backbone."""
        store, ids = scoring.store, self._stored_ids(images, scoring.store)
        config, device = self.model.config, self.model.device
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
                    raise ImageError(unreadable[0])
                features = self.backbone.encode_images(pixels)
                tokens[batch] = self.model.compress(features.patch_tokens).float()
                embeddings[batch] = features.embedding
                bar.update(len(batch))
        return tokens, embeddings

    def _stored_ids(self, images: list[ImageSource], store: TokenStore | None) -> dict[int, str]:
        """Position -> id, of the images that are given by an id of the store.

        Raises UserError where another model made the store, or naming a text that is neither an id nor a path."""
        if store is None:
            return {}
        store.check(backbone=self.backbone.fingerprint, adapter=self._adapter)
        ids = {}
        for position, text in enumerate(images):
            if not isinstance(text, str):
                continue
            if text in store:
                ids[position] = text
            elif not (may_be_image(text) or is_url(text) or os.path.isdir(text)):
                raise ImageError(f"{text}: neither an id of {store.path} nor an image file; check the id, or the path")
        return ids

    def after_fork(self) -> None:
        """In a forked process one thread: the parent's team of threads is not there, and OpenMP waits for it."""
        if os.getpid() != self._process:
            torch.set_num_threads(1)
            self._process = os.getpid()

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__ |= state | {"_process": os.getpid()}

    def __getstate__(self) -> dict[str, Any]:
        # Embeddings of a store are read again where they are needed.
        return self.__dict__ | {"_embeddings": None}
