"""WebDataset tar shards as img2dataset writes them: a sample is KEY.jpg, KEY.txt and KEY.json, a shard holds thousands.

    dataset = load_shards("cc12m/{00000..01242}.tar", root="/data", cache="/data/index")

Each shard is read once, for its captions and the positions of its images, and the columns are cached. A set of shards
is then a CaptionDataset whose images are byte ranges: any sample can be read at any time, so batches, ranks, workers
and resume work as for every other data set. Only the order differs: shards are shuffled, then the samples of a few
shards at a time, so that reads stay close together.
"""

from __future__ import annotations

import glob
import io
import json
import multiprocessing
import os
import re
import tarfile
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple, SupportsIndex

import numpy as np
from PIL import Image
from tqdm import tqdm

from models.errors import UserError
from models.files import PositionedReader
from models.vision.images import ImageError, open_image

from .caption_datasets import CaptionDataset, is_unicode
from .columns import Columns, TextBuilder, TextColumn, cached_columns, numbers, open_columns, texts

IMAGE_EXTENSIONS = ("jpg", "jpeg", "png", "webp", "bmp", "gif", "tif", "tiff", "avif")
SHARDS_AT_A_TIME = 4
"""Shards whose samples are mixed: 40,000 images at img2dataset's 10,000 a shard."""
_MEMBER = re.compile(r"((?:.*/)?[^./]+)\.([^/]+)")
"""Key and extension of a member's name: WebDataset's rule, up to the first dot of the file's name."""
_BRACES = re.compile(r"\{([^{}]*)\}")
_BLOCK = 512


@dataclass(frozen=True, eq=False, kw_only=True)
class ShardDataset(CaptionDataset):
    """The samples of S shards: one caption per image, and images as byte ranges of the shards.

    Image ids are shard and member, relative to the folder that all shards lie under."""

    shards: Sequence[str]
    """S paths."""
    image_shard: np.ndarray
    """[N] int32, ascending: each image's shard. Every shard has images."""
    image_start: np.ndarray
    """[N] int64: first byte of each image in its shard."""
    image_bytes: np.ndarray
    """[N] int64: size of each image."""

    def __reduce_ex__(self, protocol: SupportsIndex) -> str | tuple[Any, ...]:
        return _open, (self.folder, self.root)

    def path(self, image: int) -> Path:
        """The shard of image number `image`."""
        return Path(self.shards[self.image_shard[image]])

    def open_image(self, image: int) -> Image.Image:
        """Image number `image`, decoded. Raises ImageError naming shard and member if it cannot be."""
        path = self.shards[self.image_shard[image]]
        name = f"{path}: member {self.image_ids[image].rpartition('/')[2]}"
        try:
            shard = _shard_file(path)
            content = io.BytesIO(shard.read(int(self.image_start[image]), int(self.image_bytes[image])))
        except OSError as error:
            raise ImageError(f"{name} cannot be read ({error.strerror}); restore the shard") from None
        content.name = name
        return open_image(content)

    def epoch_order(self, stream: np.random.Generator) -> np.ndarray:
        """[N] int32: shards in random order, the images of SHARDS_AT_A_TIME of them mixed."""
        starts = np.searchsorted(self.image_shard, np.arange(len(self.shards) + 1))
        shards = stream.permutation(len(self.shards))
        mixed = []
        for first in range(0, len(shards), SHARDS_AT_A_TIME):
            together = shards[first : first + SHARDS_AT_A_TIME]
            images = [np.arange(starts[shard], starts[shard + 1], dtype=np.int32) for shard in together]
            mixed.append(stream.permutation(np.concatenate(images)))
        return np.concatenate(mixed)


@lru_cache(maxsize=4 * SHARDS_AT_A_TIME)
def _shard_file(path: str) -> PositionedReader:
    """An open shard; it is closed when it leaves the cache."""
    return PositionedReader(path)


def load_shards(
    patterns: str | Sequence[str], root: str | Path, cache: str | Path, num_workers: int = 0
) -> ShardDataset:
    """The samples of all shards that the patterns name, relative to `root`: braces ({00000..00999}, {a,b}) and globs.

    Their index is built by `num_workers` processes where `cache` does not have it, and memory-mapped. Raises UserError
    naming the file and what is wrong with it: a shard missing, named twice, cut short or no tar; a sample without
    image, or with a member twice. Samples without a caption are left out, and listed in `left_out`."""
    files = find_shards([patterns] if isinstance(patterns, str) else patterns, Path(root))
    folder, _ = cached_columns(Path(cache), "shards", files, lambda: _index_shards(files, num_workers))
    return _open(folder, Path(root))


def _open(folder: Path, root: Path) -> ShardDataset:
    columns = open_columns(folder)
    image_ids = texts(columns, "image_ids")
    return ShardDataset(
        root,
        image_ids,
        texts(columns, "captions"),
        caption_image=np.arange(len(image_ids)),
        subsets=[None] * len(image_ids),
        folder=folder,
        shards=texts(columns, "shards"),
        image_shard=numbers(columns, "image_shard"),
        image_start=numbers(columns, "image_start"),
        image_bytes=numbers(columns, "image_bytes"),
        left_out=texts(columns, "left_out") if "left_out" in columns else (),
    )


def find_shards(patterns: Sequence[str], root: Path) -> list[Path]:
    """The files matching the patterns, in the patterns' order; the files of one glob sorted by name."""
    files: list[Path] = []
    for pattern in patterns:
        for name in _expand_braces(str(root / pattern)):
            found = sorted(glob.glob(name)) if glob.has_magic(name) else [name]
            if not found:
                raise UserError(f"{name}: no shard matches; correct the pattern")
            files += map(Path, found)
    missing = [file for file in files if not file.is_file()]
    if missing:
        raise UserError(
            f"{missing[0]}: no such shard; {len(missing)} of {len(files)} shards are missing; download them, or "
            "name only those that exist"
        )
    twice = [file for file, count in Counter(files).items() if count > 1]
    if twice:
        raise UserError(f"{twice[0]}: named twice; name each shard once")
    return files


def _expand_braces(pattern: str) -> list[str]:
    """ "{08..10}.tar" -> ["08.tar", "09.tar", "10.tar"]; "{a,b}" -> ["a", "b"]; several braces: all combinations."""
    braces = _BRACES.search(pattern)
    if braces is None:
        return [pattern]
    choices = braces[1].split(",")
    numbers = re.fullmatch(r"(\d+)\.\.(\d+)", braces[1])
    if numbers:
        first, last = map(int, numbers.groups())
        if last < first:
            raise UserError(f"{pattern}: {braces[0]} counts down; write the smaller number first")
        choices = [str(n).zfill(len(numbers[1])) for n in range(first, last + 1)]
    head, tail = pattern[: braces.start()], pattern[braces.end() :]
    return [name for choice in choices for name in _expand_braces(head + choice + tail)]


def _index_shards(files: list[Path], num_workers: int) -> Columns:
    # What is cached depends on the files alone: not on the root, nor on the folder that a run starts in.
    paths = [os.path.abspath(file) for file in files]
    above = os.path.commonpath([os.path.dirname(path) for path in paths])
    with _workers(num_workers) as map_shards:
        parts = list(tqdm(map_shards(_index_shard, files), total=len(files), desc="index shards", unit="shard"))
    ids = TextBuilder()
    for path, part in zip(paths, parts, strict=True):
        for member in part.members:
            ids.append(f"{Path(os.path.relpath(path, above)).as_posix()}/{member}")
    columns: Columns = {
        "image_ids": ids.column(),
        "captions": TextColumn.cat([part.captions for part in parts]),
        "shards": TextColumn.of(paths),
        "image_shard": np.repeat(np.arange(len(files), dtype=np.int32), [len(part.members) for part in parts]),
        "image_start": np.concatenate([part.starts for part in parts]),
        "image_bytes": np.concatenate([part.sizes for part in parts]),
    }
    left_out = [line for part in parts for line in part.left_out]
    return columns | ({"left_out": TextColumn.of(left_out)} if left_out else {})


@contextmanager
def _workers(count: int) -> Iterator:
    """An ordered map over `count` processes; the first error ends all of them."""
    if count < 2:
        yield map
        return
    with multiprocessing.Pool(count) as pool:
        yield pool.imap


class _ShardIndex(NamedTuple):
    """Of a shard's n images, in its order: member names, captions, first bytes and sizes [n]; and what has none."""

    members: TextColumn
    captions: TextColumn
    starts: np.ndarray
    sizes: np.ndarray
    left_out: list[str]
    """A line for each sample without a caption."""


def _index_shard(file: Path) -> _ShardIndex:
    samples = _samples(file)
    if not samples:
        raise UserError(f"{file}: holds no samples; remove this shard")
    names, captions, extents, left_out = TextBuilder(), TextBuilder(), [], []
    with file.open("rb") as content:
        for key, members in samples.items():
            images = [members[extension] for extension in IMAGE_EXTENSIONS if extension in members]
            if len(images) != 1:
                raise UserError(_not_one_image(file, key, members, len(images)))
            caption = _caption(content, members, file)
            if caption is None:
                left_out.append(f'{file}: sample {key!r} has no caption (.txt, or "caption" in .json)')
                continue
            if not is_unicode(caption):
                left_out.append(f"{file}: sample {key!r} has the caption {caption!r}, with half a surrogate pair")
                continue
            captions.append(caption)
            names.append(images[0].name)
            extents.append((images[0].offset_data, images[0].size))
    if not extents:
        raise UserError(f"{left_out[0]}, nor has any other of its {len(left_out)} samples; remove this shard")
    starts, sizes = np.array(extents, np.int64).T
    return _ShardIndex(names.column(), captions.column(), starts, sizes, left_out)


def _not_one_image(file: Path, key: str, members: dict[str, tarfile.TarInfo], found: int) -> str:
    there = ", ".join(f".{extension}" for extension in members)
    dots = "; a sample's name must hold no dots" if any("." in extension for extension in members) else ""
    return (
        f"{file}: sample {key!r} has {there}: {found} images ({', '.join(IMAGE_EXTENSIONS)}) instead of one{dots}; "
        "write the shard again, or remove the sample"
    )


def _samples(file: Path) -> dict[str, dict[str, tarfile.TarInfo]]:
    """Key -> extension -> member. Raises UserError if the file is not a whole tar archive."""
    samples: dict[str, dict[str, tarfile.TarInfo]] = {}
    try:
        with tarfile.open(file, "r:") as tar, file.open("rb") as content:
            for member in tar:
                name = _MEMBER.fullmatch(member.name) if member.isfile() else None
                if name is None:
                    continue
                members = samples.setdefault(name[1], {})
                if name[2].lower() in members:
                    raise UserError(f"{file}: member {member.name!r} occurs twice; give each sample its own key")
                members[name[2].lower()] = member
            # tarfile stops silently at a header that is damaged or cut off; a whole archive ends in blocks of zeros.
            content.seek(tar.offset)
            if content.read(_BLOCK) != bytes(_BLOCK):
                raise tarfile.ReadError(f"damaged or cut short at byte {tar.offset:,}")
    except (tarfile.TarError, OSError, EOFError) as error:
        raise UserError(f"{file}: not a whole uncompressed tar ({error}); download or write the shard again") from None
    return samples


def _caption(content: io.BufferedReader, members: dict[str, tarfile.TarInfo], file: Path) -> str | None:
    """The sample's .txt, else the "caption" of its .json; None where neither says anything."""
    for extension in ("txt", "json"):
        if extension not in members:
            continue
        member = members[extension]
        content.seek(member.offset_data)
        raw = content.read(member.size)
        try:
            # Without the byte order mark that some editors put before UTF-8; json.loads drops it itself.
            caption = raw.decode("utf-8-sig") if extension == "txt" else json.loads(raw).get("caption")
        except (ValueError, AttributeError, RecursionError) as error:
            raise UserError(f"{file}: member {member.name!r} cannot be read ({error}); write the shard again") from None
        if isinstance(caption, str) and caption.strip():
            return caption
    return None
