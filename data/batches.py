"""Which samples make which global batch, and how a rank reads its share of it.

Every choice is a function of (seed, micro-batch number, global row): order of the images, caption of an image, members
of a group, the stand-in for an unreadable image. So nothing random needs saving, a run resumes at any step, and a
batch does not depend on the number of ranks.

Letters: B rows of the global micro-batch, b rows of this rank, P patch tokens, Dv patch width, De embedding width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from itertools import islice
from typing import Any, Protocol

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, default_collate

from models.errors import UserError
from models.stores.token_store import TokenStore
from models.vision.images import ImageError

from .caption_datasets import CaptionDataset

ORDER, CAPTION, GROUP, STAND_IN = range(4)
"""What a random number is for: keeps the streams of one (seed, row) apart."""


def random_stream(seed: int, purpose: int, *position: int) -> np.random.Generator:
    """The random numbers for one purpose at one position of a run."""
    return np.random.Generator(np.random.Philox(np.random.SeedSequence([seed, purpose, *position])))


@dataclass(frozen=True)
class EncodedRows:
    """What a backbone made of b rows."""

    patch_tokens: Tensor
    """[b, P, Dv]"""
    image_embeddings: Tensor
    """[b, De] float32, normalised; so are text_embeddings."""
    text_embeddings: Tensor

    def pinned(self) -> EncodedRows:
        """Embeddings stay as they are: the CPU mines by them."""
        return replace(self, patch_tokens=self.patch_tokens.pin_memory())


@dataclass
class Batch:
    """A rank's b rows of global micro-batch `number`; the rows of all ranks, in order of rank, make the batch."""

    number: int
    rows: Tensor
    """[b] int64: row numbers counted through the run, number * B + position; seeds of the rows' random choices."""
    images: Tensor
    """[b] int64: image numbers of the data set."""
    captions: Tensor
    """[b] int64: caption numbers of the data set."""
    content: Tensor | EncodedRows
    """Pixels [b, 3, S, S] when training reads images, else what is stored of them."""
    unreadable: list[str] = field(default_factory=list)
    """One line for each image that could not be read and was replaced."""

    @classmethod
    def of(
        cls,
        number: int,
        rows: np.ndarray,
        images: np.ndarray,
        captions: np.ndarray,
        content: Tensor | EncodedRows,
        unreadable: Sequence[str] = (),
    ) -> Batch:
        """From numbers as NumPy arrays, [b] int64 each."""
        tensors = torch.from_numpy(rows), torch.from_numpy(images), torch.from_numpy(captions)
        return cls(number, *tensors, content, list(unreadable))

    def pin_memory(self) -> Batch:
        """For a data loader that serves a GPU: what goes there lies in memory that can be copied without waiting."""
        content = self.content
        pinned = content.pin_memory() if isinstance(content, Tensor) else content.pinned()
        return replace(self, content=pinned)

    def __getstate__(self) -> dict[str, Any]:
        """From a worker, numbers travel inside the message: each tensor would open shared memory of its own, which
        costs the worker and the reader more than such few bytes are worth."""
        return self.__dict__ | {name: getattr(self, name).numpy() for name in _NUMBERS}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__ = state | {name: torch.from_numpy(state[name]) for name in _NUMBERS}


_NUMBERS = ("rows", "images", "captions")


@dataclass(frozen=True)
class BatchPlan:
    """Which image and which caption stand in each row of a global micro-batch: a function of its number alone.

    `neighbours` [N, K] (data/neighbours.py) makes groups: G consecutive rows are an anchor and G - 1 members, each
    random with probability random_share(number), else drawn from the anchor's neighbours."""

    dataset: CaptionDataset
    batch_size: int
    seed: int
    neighbours: Tensor | None = None
    group_size: int = 1
    random_share: Callable[[int], float] = lambda number: 0.0

    def images(self, number: int) -> np.ndarray:
        """[B] image numbers of micro-batch `number`."""
        if self.neighbours is None:
            return self._in_order(number * self.batch_size, self.batch_size)
        num_groups = self.batch_size // self.group_size
        anchors = self._in_order(number * num_groups, num_groups).tolist()
        groups = [self._group(number, g, anchor, self.neighbours[anchor]) for g, anchor in enumerate(anchors)]
        return np.concatenate(groups)

    def caption(self, image: int, row: int) -> int:
        """A caption of `image`, drawn for row `row` of the run."""
        start, stop = self.dataset.caption_range(image)
        if stop == start + 1:
            return start
        return int(random_stream(self.seed, CAPTION, row).integers(start, stop))

    def captions(self, images: np.ndarray, rows: np.ndarray) -> np.ndarray:
        """[b] images in rows [b] of the run -> a caption of each, [b] int64."""
        return np.array([self.caption(int(i), int(row)) for i, row in zip(images, rows, strict=True)], np.int64)

    def stand_ins(self, image: int, row: int) -> Iterator[int]:
        """`image`, then without end the images that are drawn for row `row` of the run where it cannot be read."""
        yield image
        stream = random_stream(self.seed, STAND_IN, row)
        while True:
            yield int(stream.integers(len(self.dataset)))

    def _in_order(self, first: int, count: int) -> np.ndarray:
        """Images at positions first .. first + count - 1 of the run: epoch after epoch, each in an order of its own."""
        positions = np.arange(first, first + count)
        epochs, offsets = np.divmod(positions, len(self.dataset))
        orders = {int(epoch): _epoch_order(self.dataset, self.seed, int(epoch)) for epoch in np.unique(epochs)}
        return np.array([orders[e][p] for e, p in zip(epochs.tolist(), offsets, strict=True)], np.int64)

    def _group(self, number: int, group: int, anchor: int, neighbours: Tensor) -> np.ndarray:
        """The anchor and its members, all different as far as the data set allows."""
        stream = random_stream(self.seed, GROUP, number, group)
        near = stream.permutation(neighbours.numpy())
        members = [anchor]
        while len(members) < self.group_size:
            left = np.setdiff1d(near, members, assume_unique=False)
            if len(left) and stream.random() >= self.random_share(number):
                members.append(int(stream.choice(left)))
            else:
                members.append(int(stream.integers(len(self.dataset))))
        return np.array(members)


@lru_cache(maxsize=2)  # a batch may lie across two epochs
def _epoch_order(dataset: CaptionDataset, seed: int, epoch: int) -> np.ndarray:
    return dataset.epoch_order(random_stream(seed, ORDER, epoch))


class RowReader(Protocol):
    """Reads rows of a micro-batch, in a data loader's worker."""

    def read(self, plan: BatchPlan, number: int, rows: np.ndarray, images: np.ndarray) -> Batch:
        """Micro-batch `number`, of which `rows` [b] are wanted, row numbers of the run; images: [b] image numbers."""


class StoredRows:
    """Rows of a patch-token store and of a store of caption embeddings: nothing is decoded, no backbone runs."""

    def __init__(self, dataset: CaptionDataset, images: TokenStore, captions: TokenStore):
        """Raises UserError if a store lacks an image or a caption of the data set."""
        self._images, self._captions = images, captions
        self._image_rows, self._caption_rows = images.rows(dataset.image_ids), captions.rows(dataset.captions)

    def read(self, plan: BatchPlan, number: int, rows: np.ndarray, images: np.ndarray) -> Batch:
        captions, stored = plan.captions(images, rows), self._image_rows[images]
        content = EncodedRows(
            self._images.gather_rows(stored),
            self._images.gather_embedding_rows(stored),
            self._captions.gather_embedding_rows(self._caption_rows[captions]),
        )
        return Batch.of(number, rows, images, captions, content)


class ImageRows:
    """Decoded and preprocessed images. An unreadable one is replaced by a random other one and named."""

    def __init__(self, preprocess: Callable[[Image.Image], Tensor]):
        self._preprocess = preprocess

    def read(self, plan: BatchPlan, number: int, rows: np.ndarray, images: np.ndarray) -> Batch:
        unreadable: list[str] = []
        read = [self._first_readable(plan, int(i), int(r), unreadable) for i, r in zip(images, rows, strict=True)]
        images = np.array([image for image, _ in read], np.int64)
        # In a worker, default_collate stacks in memory that the other processes see; torch.stack would be copied there.
        pixels: Tensor = default_collate([pixels for _, pixels in read])
        return Batch.of(number, rows, images, plan.captions(images, rows), pixels, unreadable)

    def _first_readable(self, plan: BatchPlan, image: int, row: int, unreadable: list[str]) -> tuple[int, Tensor]:
        """(image number, pixels): `image` itself, or the first readable one of those drawn for its row."""
        for candidate in islice(plan.stand_ins(image, row), 100):
            try:
                return candidate, self._preprocess(plan.dataset.open_image(candidate))
            except ImageError as error:
                unreadable.append(str(error))
        raise UserError(f"{unreadable[0]}; nor could 99 other images of {plan.dataset.root} be read")


class TrainingBatches(Dataset[Batch]):
    """Reads this rank's rows of any micro-batch: item n is the Batch of micro-batch n."""

    def __init__(self, plan: BatchPlan, reader: RowReader, rank: int = 0, num_ranks: int = 1):
        if plan.batch_size % num_ranks:
            raise UserError(f"a micro-batch has {plan.batch_size} rows, which {num_ranks} ranks cannot share evenly")
        self.plan, self.reader = plan, reader
        self.share = range(rank * plan.batch_size // num_ranks, (rank + 1) * plan.batch_size // num_ranks)

    def __getitem__(self, number: int) -> Batch:
        images = self.plan.images(number)[self.share.start : self.share.stop]
        rows = number * self.plan.batch_size + np.arange(self.share.start, self.share.stop)
        return self.reader.read(self.plan, number, rows, images)

    def read(self, start: int, stop: int, num_workers: int, pin_memory: bool = False) -> Iterator[Batch]:
        """Micro-batches start .. stop - 1, read ahead by `num_workers` processes; pin_memory: for a GPU."""
        order = range(start, stop)
        loader = DataLoader(self, batch_size=None, sampler=order, num_workers=num_workers, pin_memory=pin_memory)
        return iter(loader)
