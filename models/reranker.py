"""What an application calls: load a checkpoint, index images once, rank candidates for a query.

    reranker = Reranker.from_pretrained("runs/demo")
    store = reranker.index("photos", "photos.store")                     # once: one backbone pass per image
    reranker.rank("a red ball", store.ids, top_k=10)                     # no backbone pass at all
    reranker.rank("a red ball", ["photos/a.jpg", Image.open("b.png")])   # images that are not indexed
    reranker.predict([("a red ball", "photos/a.jpg")])                   # float32 array [1]

Scores are match logits, not probabilities: unbounded, and meant for comparing the candidates of one query.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from pathlib import Path
from typing import TypedDict, TypeVar

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from .config import BackboneConfig, check_backbone
from .distributed import pick_device
from .edje import EDJE
from .encoder.optimized_encoder import pairs_at_once
from .errors import UserError
from .precision import resolve_precision
from .stores.indexing import ImageSource, find_images, precompute, read_images
from .stores.token_store import TokenStore
from .vision.backbones import Backbone
from .vision.images import ImageError

IMAGES_PER_BATCH = 32


Item = TypeVar("Item")


class Ranked(TypedDict):
    """A candidate's place in the list that was given, and its match logit."""

    corpus_id: int
    score: float


class Reranker:
    """A trained EDJE with its backbone. Images given several times in a call are encoded once."""

    def __init__(self, model: EDJE, backbone: Backbone, dtype: torch.dtype | None = None):
        """dtype: of the joint encoder's matrix products, by default the fastest that the device has.

        Raises UserError naming both if the model was trained with another backbone."""
        check_backbone(model.config, backbone)
        self.model, self.backbone = model.optimized(dtype), backbone
        self.store: TokenStore | None = None
        self._adapter = self.model.adapter_fingerprint

    @classmethod
    def from_pretrained(
        cls,
        checkpoint_dir: str | Path,
        device: str = "auto",
        dtype: str = "auto",
        backbone: Backbone | BackboneConfig | None = None,
        revision: str | None = None,
    ) -> Reranker:
        """Load a checkpoint and the backbone that it names: a directory, a run's latest, or OWNER/NAME on the Hub.

        device: auto (cuda where there is one), cpu, cuda, cuda:1. dtype: auto (the fastest), float32, bfloat16.
        backbone: a loaded one to share, or a config where its weights lie elsewhere than the checkpoint says.
        revision: branch, tag or commit on the Hub.
        Raises UserError for a missing or damaged file, or another backbone than the checkpoint's."""
        where = pick_device(device)
        precision = resolve_precision(dtype, where, key="dtype")
        model = EDJE.from_pretrained(checkpoint_dir, device=where, revision=revision)
        if not isinstance(backbone, Backbone):
            backbone = Backbone.load(backbone or model.config.backbone, device=where, precision=dtype)
        return cls(model, backbone, precision)

    def index(
        self,
        folder_or_paths: str | Path | Sequence[str | Path],
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
            paths, ids = list(folder_or_paths), [str(path) for path in folder_or_paths]
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

    def rank(
        self,
        query: str,
        candidates: Sequence[ImageSource],
        top_k: int | None = None,
        store: TokenStore | None = None,
    ) -> list[Ranked]:
        """The `top_k` best candidates (all by default), best first; equal scores keep the order given.

        candidates: paths, PIL images of any size and mode, and ids of `store` (by default the last one indexed), in
        any mixture; give them in first-stage order. A text is an id if the store has it, else a path."""
        if top_k is not None and top_k < 1:
            raise UserError(f"top_k is {top_k}; it must be at least 1")
        scores = self.predict([(query, candidate) for candidate in candidates], store)
        best_first = np.argsort(-scores, kind="stable")[:top_k]
        return [{"corpus_id": int(i), "score": float(scores[i])} for i in best_first]

    @torch.inference_mode()
    def predict(self, pairs: Sequence[tuple[str, ImageSource]], store: TokenStore | None = None) -> np.ndarray:
        """Match logits of (caption, image) pairs, [n] float32; images as rank() takes them.

        Raises UserError for a blank caption, an image that cannot be read, a store of another model."""
        if not pairs:
            return np.zeros(0, np.float32)
        # Each distinct pair once: in another row of a batch the same pair may round otherwise, and equals must tie.
        distinct, pair_index = _distinct(pairs, lambda pair: (pair[0], _identity(pair[1])))
        captions, caption_index = _distinct([caption for caption, _ in distinct], lambda caption: caption)
        images, image_index = _distinct([image for _, image in distinct], _identity)
        if any(not isinstance(caption, str) or not caption.strip() for caption in captions):
            raise UserError("a caption is empty or no text; give each image a caption to be scored with")
        tokens, embeddings = self._vision(images, store or self.store)
        similarities = None
        if self.model.config.residual_similarity:
            texts = self.backbone.encode_texts(captions).to(self.model.device)
            similarities = (texts[caption_index] * embeddings[image_index]).sum(-1)
        return self._match_logits(captions, tokens, caption_index, image_index, similarities).cpu()[pair_index].numpy()

    def _match_logits(
        self,
        captions: list[str],
        tokens: Tensor,
        caption_index: Tensor,
        image_index: Tensor,
        similarities: Tensor | None,
    ) -> Tensor:
        """[Q] float32. Pairs of like length share a micro-batch: the encoder runs equal lengths together."""
        device = self.model.device
        ids = self.model.tokenizer(captions, self.model.max_joint_pieces)
        order = ids.lengths[caption_index].argsort(stable=True).to(device)
        ids, caption_index, image_index = ids.to(device), caption_index.to(device), image_index.to(device)
        logits = torch.empty(len(order), device=device)
        for part in order.split(pairs_at_once(device, tokens.shape[1])):
            cosines = None if similarities is None else similarities[part]
            logits[part] = self.model.match_logits(ids, tokens, caption_index[part], image_index[part], cosines)
        return logits

    def _vision(self, images: list[ImageSource], store: TokenStore | None) -> tuple[Tensor, Tensor]:
        """Vision tokens [N, m, H] and embeddings [N, De] float32, of each image from the store or from the backbone."""
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
        for batch, (pixels, unreadable) in zip(
            batches, read_images(images, self.backbone.preprocess, batches, num_workers=0), strict=True
        ):
            if unreadable:
                raise ImageError(unreadable[0] if store is None else f"{unreadable[0]} (nor an id of {store.path})")
            features = self.backbone.encode_images(pixels)
            tokens[batch] = self.model.compress(features.patch_tokens).float()
            embeddings[batch] = features.embedding
        return tokens, embeddings


def _identity(image: ImageSource) -> Hashable:
    """Equal for images that are the same: the path, or the very PIL object (PIL's == compares pixels)."""
    return id(image) if isinstance(image, Image.Image) else image


def _distinct(items: Sequence[Item], key: Callable[[Item], Hashable]) -> tuple[list[Item], Tensor]:
    """Each item once, and for every given one its number among them, [n] int64."""
    numbers: dict[Hashable, int] = {}
    index = [numbers.setdefault(key(item), len(numbers)) for item in items]
    distinct = dict(zip(index, items, strict=True))
    return [distinct[number] for number in range(len(numbers))], torch.tensor(index)
