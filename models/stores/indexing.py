"""Images and captions into a token store: one backbone pass per image, divided among the ranks, resumable.

    precompute("runs/demo/tokens", paths, ids, backbone, model)       # compressed tokens [m, H] of a trained model
    precompute("runs/demo/patches", paths, ids, backbone)             # patch tokens [P, Dv], to train from
    precompute_captions("runs/demo/captions", captions, backbone)     # text embeddings alone

A killed run continues at the first missing shard. Batches never cross a shard, so a resumed store has the same bytes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Protocol

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from ..config import check_backbone
from ..distributed import DistributedContext
from ..errors import UserError
from ..matching import MatchPass
from ..vision.backbones import Backbone
from ..vision.images import ImageError, ImageSource, open_image
from .codecs import Codec
from .token_store import TokenStore, TokenStoreWriter

IMAGE_SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff"}


class Images(Protocol):
    """N image sources by row: a list of them, or anything that reads one when asked for it."""

    def __len__(self) -> int: ...

    def __getitem__(self, row: int, /) -> ImageSource: ...


def find_images(folder: str | Path) -> list[str]:
    """Image files under a folder, by suffix: paths relative to it, sorted. Raises UserError if there are none."""
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder; pass a folder of images")
    found = sorted(
        file.relative_to(folder).as_posix()
        for file in folder.rglob("*")
        if file.suffix.lower() in IMAGE_SUFFIXES and file.is_file()
    )
    if not found:
        raise UserError(f"{folder}: it holds no images; expected files ending in {', '.join(sorted(IMAGE_SUFFIXES))}")
    return found


def precompute(
    path: str | Path,
    images: Images,
    ids: Sequence[str],
    backbone: Backbone,
    model: MatchPass | None = None,
    *,
    distributed: DistributedContext | None = None,
    dtype: str = "float16",
    batch_size: int = 32,
    num_workers: int = 0,
    progress: bool = True,
) -> TokenStore:
    """Store the tokens of N images under N ids: compressed by `model`, or the patch tokens if it is None.

    Called by every rank with the same arguments; each writes its own shards. If images are unreadable, raises UserError
    naming them once all other shards are written; with these images fixed, the same call completes the store."""
    distributed = distributed or DistributedContext()
    writer = image_store_writer(path, ids, backbone, model, dtype)
    compress = model.compress if model is not None else lambda patch_tokens: patch_tokens
    own = _own_shards(writer, distributed)
    batches = _batches(writer, own, batch_size)
    pixels = iter(read_images(images, backbone.preprocess, [rows for shard in batches for rows in shard], num_workers))
    unreadable: list[str] = []
    with _progress_bar(writer, own, distributed, "image", progress) as bar:
        for shard, shard_batches in zip(own, batches, strict=True):
            parts, bad = [], []
            for rows in shard_batches:
                batch, unread = next(pixels)
                bad += unread
                if not bad:
                    parts.append(_encode(backbone, compress, batch, writer.manifest.codec))
                bar.update(len(rows))
            if not bad:
                writer.write_shard(shard, *map(torch.cat, zip(*parts, strict=True)))
            unreadable += bad
    _refuse_unreadable([line for lines in distributed.gather_objects(unreadable) for line in lines])
    return _finish(writer, distributed)


def precompute_captions(
    path: str | Path,
    captions: Sequence[str],
    backbone: Backbone,
    *,
    distributed: DistributedContext | None = None,
    progress: bool = True,
) -> TokenStore:
    """Store the text embeddings of raw captions, each distinct one once; its id is its text. Called by every rank."""
    distributed, captions = distributed or DistributedContext(), list(dict.fromkeys(captions))
    writer = TokenStoreWriter(path, captions, 0, 0, backbone.dims.embedding_width, "float16", backbone.fingerprint)
    own = _own_shards(writer, distributed)
    with _progress_bar(writer, own, distributed, "caption", progress) as bar:
        for shard in own:
            texts = writer.shard_ids(shard)
            writer.write_shard(shard, torch.empty(len(texts), 0, 0), backbone.encode_texts(texts))
            bar.update(len(texts))
    distributed.gather_objects(None)
    return _finish(writer, distributed)


def image_store_writer(
    path: str | Path, ids: Sequence[str], backbone: Backbone, model: MatchPass | None, dtype: str
) -> TokenStoreWriter:
    """A writer for compressed tokens of `model`, or for patch tokens if it is None."""
    dims = backbone.dims
    tokens_per_item, width, adapter = dims.num_patches, dims.patch_width, ""
    if model is not None:
        check_backbone(model.config, backbone)
        tokens_per_item, width = model.config.num_vision_tokens, model.config.encoder.hidden_size
        adapter = model.adapter_fingerprint
    return TokenStoreWriter(
        path, ids, tokens_per_item, width, dims.embedding_width, dtype, backbone.fingerprint, adapter
    )


def unreadable_images(
    images: Images, distributed: DistributedContext, num_workers: int = 0, progress: bool = True
) -> dict[int, str]:
    """Decode all images without encoding them: row of each unreadable image -> why. Called by every rank."""
    own = [[i] for i in range(distributed.rank, len(images), distributed.size)]
    results = read_images(images, None, own, num_workers)
    shown = tqdm(results, desc="check", unit="image", total=len(own), disable=not (progress and distributed.is_main))
    bad = {rows[0]: why[0] for rows, (_, why) in zip(own, shown, strict=True) if why}
    return {i: why for share in distributed.gather_objects(bad) for i, why in sorted(share.items())}


class _ImageBatches(Dataset):
    """Rows of images -> preprocessed images [n, 3, S, S], and one line for each that could not be read."""

    def __init__(self, images: Images, preprocess: Callable[[Image.Image], Tensor] | None):
        self.images, self.preprocess = images, preprocess

    def __getitem__(self, rows: list[int]) -> tuple[Tensor | None, list[str]]:
        pixels: list[Tensor] = []
        unreadable = []
        for row in rows:
            try:
                image = open_image(self.images[row])
            except ImageError as error:
                unreadable.append(str(error))
            else:
                if self.preprocess:
                    pixels.append(self.preprocess(image))
        return (torch.stack(pixels) if pixels else None), unreadable


def read_images(
    images: Images,
    preprocess: Callable[[Image.Image], Tensor] | None,
    batches: list[list[int]],
    num_workers: int,
) -> DataLoader:
    """For each batch, in order: pixels [n, 3, S, S], and one line per unreadable image; `num_workers` read ahead.

    Without `preprocess` images are only decoded, and the pixels are None."""
    return DataLoader(
        _ImageBatches(images, preprocess),
        batch_size=None,
        sampler=batches,
        num_workers=num_workers if batches else 0,
        generator=torch.Generator(),  # of its own: a loader draws a seed for its workers, from the caller's state else
    )


def _encode(
    backbone: Backbone, compress: Callable[[Tensor], Tensor], pixels: Tensor, codec: Codec
) -> tuple[Tensor, Tensor]:
    """Tokens [n, m, H] and embeddings [n, De] of one batch, on the CPU; tokens in the store's dtype if torch has it."""
    with torch.inference_mode():
        features = backbone.encode_images(pixels)
        tokens = compress(features.patch_tokens)
        return tokens.to("cpu", codec.torch_dtype or tokens.dtype), features.embedding.cpu()


def _own_shards(writer: TokenStoreWriter, distributed: DistributedContext) -> list[int]:
    """This rank's share of the missing shards; no rank writes before all have listed them."""
    missing = writer.missing_shards()
    distributed.barrier()
    return missing[distributed.rank :: distributed.size]


def _batches(writer: TokenStoreWriter, shards: list[int], batch_size: int) -> list[list[list[int]]]:
    """For each shard, its items' rows in batches."""
    manifest = writer.manifest
    starts = [(shard * manifest.items_per_shard, manifest.shard_items(shard)) for shard in shards]
    return [
        [list(range(i, min(i + batch_size, start + items))) for i in range(start, start + items, batch_size)]
        for start, items in starts
    ]


def _progress_bar(
    writer: TokenStoreWriter, own: list[int], distributed: DistributedContext, unit: str, shown: bool
) -> tqdm:
    """This rank's items, with rate and time left."""
    total = sum(writer.manifest.shard_items(shard) for shard in own)
    name = writer.path.name if distributed.size == 1 else f"{writer.path.name} (1 of {distributed.size} ranks)"
    return tqdm(total=total, desc=name, unit=unit, disable=not (shown and distributed.is_main), dynamic_ncols=True)


def _refuse_unreadable(lines: list[str]) -> None:
    if lines:
        others = f" ({len(lines)} images are unreadable; the others: {'; '.join(lines[1:])})" if lines[1:] else ""
        raise UserError(f"{lines[0]}{others}; fix or remove these images, then rerun")


def _finish(writer: TokenStoreWriter, distributed: DistributedContext) -> TokenStore:
    if distributed.is_main:
        writer.finish()
    distributed.barrier()
    return TokenStore.open(writer.path)
