"""Which samples make which global batch, and how a rank reads its share of it.

Every choice is a function of (seed, micro-batch number, global row): order of the images, caption of an image, members
of a group, the stand-in for an unreadable image. So nothing random needs saving, a run resumes at any step, and a
batch does not depend on the number of ranks.

Letters: B rows of the global micro-batch, b rows of this rank, P patch tokens, Dv patch width, De embedding width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import numpy as np
import torch
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
    pixels: Tensor | None = None
    """[b, 3, S, S], when training reads images."""
    patch_tokens: Tensor | None = None
    """[b, P, Dv], when training reads a patch-token store; so are the two embeddings, [b, De] float32."""
    image_embeddings: Tensor | None = None
    text_embeddings: Tensor | None = None
    unreadable: list[str] = field(default_factory=list)
    """One line for each image that could not be read and was replaced."""

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
        anchors = self._in_order(number * num_groups, num_groups)
        return np.concatenate([self._group(number, g, anchor) for g, anchor in enumerate(anchors)])

    def caption(self, image: int, row: int) -> int:
        """A caption of `image`, drawn for row `row` of the run."""
        start, stop = self.dataset.caption_range(image)
        if stop == start + 1:
            return start
        return int(random_stream(self.seed, CAPTION, row).integers(start, stop))

    def _in_order(self, first: int, count: int) -> np.ndarray:
        """Images at positions first .. first + count - 1 of the run: epoch after epoch, each in an order of its own."""
        positions = np.arange(first, first + count)
        epochs, places = np.divmod(positions, len(self.dataset))
        orders = {int(epoch): _epoch_order(self.dataset, self.seed, int(epoch)) for epoch in np.unique(epochs)}
        return np.array([orders[e][p] for e, p in zip(epochs.tolist(), places, strict=True)], np.int64)

    def _group(self, number: int, group: int, anchor: int) -> np.ndarray:
        """The anchor and its members, all different as far as the data set allows."""
        stream = random_stream(self.seed, GROUP, number, group)
        near = stream.permutation(self.neighbours[anchor].numpy())
        members = [int(anchor)]
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


class TrainingBatches(Dataset):
    """Reads this rank's rows of any micro-batch: item n is the Batch of micro-batch n.

    With `store` (patch tokens) and `caption_store` nothing is decoded and no backbone runs; without, images are decoded
    and `preprocess`ed. An unreadable image is replaced by a random other one and named in Batch.unreadable."""

    def __init__(
        self,
        plan: BatchPlan,
        rank: int = 0,
        num_ranks: int = 1,
        preprocess: Callable | None = None,
        store: TokenStore | None = None,
        caption_store: TokenStore | None = None,
    ):
        if plan.batch_size % num_ranks:
            raise UserError(f"a micro-batch has {plan.batch_size} rows, which {num_ranks} ranks cannot share evenly")
        self.plan, self.preprocess = plan, preprocess
        self.share = range(rank * plan.batch_size // num_ranks, (rank + 1) * plan.batch_size // num_ranks)
        self.store, self.caption_store = store, caption_store
        if store is not None:
            self.image_rows = store.rows(plan.dataset.image_ids)
            self.caption_rows = caption_store.rows(plan.dataset.captions)

    def __getitem__(self, number: int) -> Batch:
        images = self.plan.images(number)[self.share.start : self.share.stop]
        rows = number * self.plan.batch_size + np.arange(self.share.start, self.share.stop)
        if self.store is not None:
            return self._from_store(number, rows, images)
        return self._from_images(number, rows, images)

    def _batch(self, number: int, rows: np.ndarray, images: np.ndarray) -> Batch:
        captions = [self.plan.caption(int(i), int(row)) for i, row in zip(images, rows, strict=True)]
        return Batch(number, torch.from_numpy(rows), torch.from_numpy(images), torch.tensor(captions))

    def _from_store(self, number: int, rows: np.ndarray, images: np.ndarray) -> Batch:
        batch = self._batch(number, rows, images)
        stored = self.image_rows[images]
        batch.patch_tokens = self.store.gather_rows(stored)
        batch.image_embeddings = self.store.gather_embedding_rows(stored)
        batch.text_embeddings = self.caption_store.gather_embedding_rows(self.caption_rows[batch.captions.numpy()])
        return batch

    def _from_images(self, number: int, rows: np.ndarray, images: np.ndarray) -> Batch:
        unreadable: list[str] = []
        images, pixels = images.copy(), []
        for position, row in enumerate(rows):
            stand_ins = None
            for _ in range(100):
                try:
                    pixels.append(self.preprocess(self.plan.dataset.open_image(int(images[position]))))
                    break
                except ImageError as error:
                    unreadable.append(str(error))
                    stand_ins = stand_ins or random_stream(self.plan.seed, STAND_IN, int(row))
                    images[position] = stand_ins.integers(len(self.plan.dataset))
            else:
                raise UserError(f"{unreadable[0]}; nor could 99 other images of {self.plan.dataset.root} be read")
        batch = self._batch(number, rows, images)
        # In a worker, default_collate stacks in memory that the other processes see; torch.stack would be copied there.
        batch.pixels, batch.unreadable = default_collate(pixels), unreadable
        return batch

    def read(self, start: int, stop: int, num_workers: int) -> Iterator[Batch]:
        """Micro-batches start .. stop - 1, read ahead by `num_workers` processes."""
        return iter(DataLoader(self, batch_size=None, sampler=range(start, stop), num_workers=num_workers))
