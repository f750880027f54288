"""Which pairs of a step are scored, and what ITM and distillation make of their logits.

A strategy chooses pairs (`choose`), the model scores them, and the chosen pairs turn logits into losses. Strategies
differ in where negatives come from and in which pairs are scored: `PairNegatives` is the paper's way, `BatchGroups` and
`DatasetGroups` score all pairs within groups of neighbours. A new way is one class, named in `negatives_strategy`.

Letters: B rows of the global batch, b rows of this rank, h negatives per positive, G groups of g rows, Q pairs,
m vision tokens, H joint encoder width.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from data.batches import random_stream
from data.caption_datasets import CaptionDataset
from data.neighbours import CaptionKeys, nearest_images
from models.distributed import DistributedContext, send
from models.language.captions import CaptionIds

from .config import NegativesConfig
from .distributed import gather, gather_captions, gather_on_host
from .features import Embeddings, StepInputs
from .hard_negatives import HardNegatives, group_neighbours, mine_hard_negatives
from .losses import (
    PairLogits,
    distillation_loss,
    group_distillation_loss,
    group_itm_loss,
    itm_loss,
    similarities,
)

Labels = Callable[[str], Sequence[str | None]]
"""An annotation field -> its value for each image."""
NEGATIVES_STREAM = 101
"""Purpose of the random streams, apart from those of data.batches."""


@dataclass(frozen=True)
class Scope:
    """The rows that pairs are formed of, those of all ranks or this rank's own: what is known of them on the CPU."""

    captions: CaptionIds
    similarity: Tensor
    """[n, n] first-stage cosines, which a match logit may contain; row: caption, column: image."""
    mining: Tensor
    """[n, n] similarities that negatives are mined by: the same, or another retriever's."""
    excluded: Tensor
    """[n, n] bool: caption i describes image j, so the pair is excluded from negatives."""
    own: Tensor
    """[b] int64: this rank's rows."""


class ChosenPairs(ABC):
    """Q pairs that are scored together, chosen on the CPU, and the losses of their logits [Q]."""

    caption_index: Tensor
    """[Q] int64, rows of the scope."""
    image_index: Tensor

    @abstractmethod
    def itm_loss(self, logits: Tensor) -> Tensor:
        """Cross-entropy of positives against their negatives, mean over this rank's rows."""

    @abstractmethod
    def distillation_loss(self, student: Tensor, teacher: Tensor) -> Tensor:
        """Binary cross-entropy of the student's logits with the teacher's probabilities."""

    @abstractmethod
    def stats(self, logits: Tensor, scope: Scope) -> dict[str, Tensor]:
        """Numbers for the log, by name: scalars, of logits on the device, of the rest on the CPU."""


class Negatives(ABC):
    """A strategy. Every rank calls it with its own rows of the same micro-batch."""

    def __init__(self, config: NegativesConfig, seed: int, distributed: DistributedContext):
        self.config, self.seed, self.distributed = config, seed, distributed

    @abstractmethod
    def choose(self, inputs: StepInputs, scope: Scope) -> ChosenPairs:
        """The pairs of this rank."""

    @abstractmethod
    def describe(self) -> str:
        """For the first lines of a run's log."""

    def shared(self, tokens: Tensor) -> Tensor:
        """Vision tokens [b, m, H] of this rank's rows -> of all rows that pairs are formed of. Carries gradients."""
        return gather(tokens, self.distributed)

    def scope(self, inputs: StepInputs) -> Scope:
        """What pairs are formed of."""

        def gathered(x: Tensor) -> Tensor:
            return gather_on_host(x, self.distributed)

        similarity = mining = similarities(gathered(inputs.text_embeddings), gathered(inputs.image_embeddings))
        if inputs.retriever_embeddings is not None:
            images, texts = map(gathered, inputs.retriever_embeddings)
            mining = similarities(texts, images)
        captions = gather_captions(inputs.captions, self.distributed)
        return Scope(captions, similarity, mining, inputs.excluded, self.own_rows(inputs))

    def own_rows(self, inputs: StepInputs) -> Tensor:
        """[b] int64: this rank's rows of the global micro-batch."""
        count = len(inputs.rows)
        return torch.arange(count) + self.distributed.rank * count

    @property
    def rows_together(self) -> int:
        """A rank's rows of a micro-batch must be a multiple of this."""
        return 1

    def neighbours(
        self, keys: CaptionKeys, dataset: CaptionDataset, embeddings: Embeddings, labels: Labels
    ) -> Tensor | None:
        """[N, K] neighbours of each image, of which the sampler is to lay out groups; None: it reads in any order."""
        return None

    @property
    def laid_out_group_size(self) -> int:
        """Rows that the sampler lays out together."""
        return 1

    @property
    def mines_in_the_batch(self) -> bool:
        """Whether a step needs similarities of its rows to mine by."""
        return True


@dataclass(frozen=True)
class MinedPairs(ChosenPairs):
    """b positives, then the h negative images of each caption, then the h negative captions of each image."""

    mined: HardNegatives
    own: Tensor
    caption_index: Tensor
    image_index: Tensor

    @classmethod
    def of(cls, mined: HardNegatives, own: Tensor) -> MinedPairs:
        anchors = own[:, None].expand(mined.images.shape)
        caption_index = torch.cat([own, anchors.flatten(), mined.captions.flatten()])
        image_index = torch.cat([own, mined.images.flatten(), anchors.flatten()])
        return cls(mined, own, caption_index, image_index)

    def split(self, logits: Tensor) -> PairLogits:
        """[Q] as positives [b] and negatives [b, h] in each direction."""
        b, h = self.mined.images.shape
        positive, negative_images, negative_captions = logits.split([b, b * h, b * h])
        return PairLogits(positive, negative_images.view(b, h), negative_captions.view(b, h))

    def itm_loss(self, logits: Tensor) -> Tensor:
        return itm_loss(self.split(logits), *self._valid(logits.device))

    def distillation_loss(self, student: Tensor, teacher: Tensor) -> Tensor:
        return distillation_loss(self.split(student), self.split(teacher), *self._valid(student.device))

    def _valid(self, device: torch.device) -> tuple[Tensor, Tensor]:
        return send(self.mined.images_valid, device), send(self.mined.captions_valid, device)

    @torch.no_grad()
    def stats(self, logits: Tensor, scope: Scope) -> dict[str, Tensor]:
        of, mined = self.split(logits), self.mined
        images_valid, captions_valid = self._valid(logits.device)
        images = of.negative_images.masked_fill(~images_valid, -torch.inf).amax(1)
        captions = of.negative_captions.masked_fill(~captions_valid, -torch.inf).amax(1)
        right = torch.cat([of.positive > images, of.positive > captions])
        return {
            "itm_accuracy": right.float().mean(),
            "positive_similarity": scope.similarity[self.own, self.own].mean(),
            "negative_similarity": scope.similarity[self.own[:, None], mined.images].mean(),
            "negatives_missing": ((~mined.images_valid).sum() + (~mined.captions_valid).sum()).float(),
        }


class PairNegatives(Negatives):
    """The paper's: h hard negative images and captions per positive, mined over the global batch."""

    def choose(self, inputs: StepInputs, scope: Scope) -> MinedPairs:
        config = self.config
        draws = config.sampled or inputs.random_share > 0
        mined = mine_hard_negatives(
            scope.mining,
            scope.excluded,
            config.per_positive,
            rows=scope.own,
            random_share=inputs.random_share,
            temperature=config.temperature if config.sampled else None,
            streams=[random_stream(self.seed, NEGATIVES_STREAM, int(row)) for row in inputs.rows] if draws else None,
        )
        return MinedPairs.of(mined, scope.own)

    def describe(self) -> str:
        return f"{self.config.per_positive} per positive, from the batch"


@dataclass(frozen=True)
class GroupPairs(ChosenPairs):
    """All pairs within groups: of G groups of g rows, caption by caption, [G * g * g]."""

    groups: Tensor
    """[G, g] int64, rows of the scope."""
    excluded: Tensor
    """[G, g, g] bool."""
    caption_index: Tensor
    image_index: Tensor

    @classmethod
    def of(cls, groups: Tensor, scope: Scope) -> GroupPairs:
        shape = (*groups.shape, groups.shape[1])
        captions, images = groups[:, :, None].expand(shape), groups[:, None, :].expand(shape)
        excluded = scope.excluded[groups[:, :, None], groups[:, None, :]]
        return cls(groups, excluded, captions.flatten(), images.flatten())

    def itm_loss(self, logits: Tensor) -> Tensor:
        return group_itm_loss(logits.view(self.excluded.shape), send(self.excluded, logits.device))

    def distillation_loss(self, student: Tensor, teacher: Tensor) -> Tensor:
        shape = self.excluded.shape
        excluded = send(self.excluded, student.device)
        return group_distillation_loss(student.view(shape), teacher.view(shape), excluded)

    @torch.no_grad()
    def stats(self, logits: Tensor, scope: Scope) -> dict[str, Tensor]:
        size = self.groups.shape[1]
        positive = torch.eye(size, dtype=torch.bool)
        left_out = self.excluded & ~positive
        masked = logits.view(self.excluded.shape).masked_fill(send(left_out, logits.device), -torch.inf)
        diagonal = torch.arange(size, device=logits.device)
        right = torch.stack([masked.argmax(2) == diagonal, masked.argmax(1) == diagonal])
        similarity = scope.similarity[self.groups[:, :, None], self.groups[:, None, :]]
        return {
            "itm_accuracy": right.float().mean(),
            "positive_similarity": similarity[:, positive].mean(),
            "negative_similarity": similarity[~self.excluded & ~positive].mean(),
            "negatives_missing": left_out.sum().float(),
        }


class _Groups(Negatives):
    """Groups of rows, each within the share of one rank."""

    @property
    def rows_together(self) -> int:
        return self.config.group_size


class BatchGroups(_Groups):
    """Groups of mutual neighbours within the global batch: every rank forms the same ones and takes its share."""

    def choose(self, inputs: StepInputs, scope: Scope) -> GroupPairs:
        number = int(inputs.rows[0]) // len(scope.excluded)
        stream = random_stream(self.seed, NEGATIVES_STREAM, number)
        groups = group_neighbours(scope.mining, self.config.group_size, inputs.random_share, stream)
        share = len(groups) // self.distributed.size
        groups = groups[self.distributed.rank * share : (self.distributed.rank + 1) * share]
        return GroupPairs.of(groups, scope)

    def describe(self) -> str:
        return f"groups of {self.config.group_size}, from the batch"


class DatasetGroups(_Groups):
    """Groups of neighbours in the whole data set, which the sampler laid out in consecutive rows of one rank."""

    def shared(self, tokens: Tensor) -> Tensor:
        return tokens

    def scope(self, inputs: StepInputs) -> Scope:
        own = self.own_rows(inputs)
        similarity = similarities(inputs.text_embeddings, inputs.image_embeddings)
        local = torch.arange(len(own))
        return Scope(inputs.captions, similarity, similarity, inputs.excluded[own][:, own], local)

    def choose(self, inputs: StepInputs, scope: Scope) -> GroupPairs:
        return GroupPairs.of(scope.own.view(-1, self.config.group_size), scope)

    def describe(self) -> str:
        return f"groups of {self.config.group_size}, from the dataset"

    def neighbours(self, keys: CaptionKeys, dataset: CaptionDataset, embeddings: Embeddings, labels: Labels) -> Tensor:
        images, captions = embeddings.of_images(dataset.image_ids), embeddings.of_captions(dataset.captions)
        shared = labels(self.config.within) if self.config.within else None
        return nearest_images(keys, dataset, images, captions, self.config.neighbours, shared)

    @property
    def laid_out_group_size(self) -> int:
        return self.config.group_size

    @property
    def mines_in_the_batch(self) -> bool:
        return False


def negatives_strategy(config: NegativesConfig, seed: int, distributed: DistributedContext) -> Negatives:
    """The strategy that negatives.mode and negatives.pool name."""
    strategies: dict[tuple[str, str], type[Negatives]] = {
        ("pairs", "batch"): PairNegatives,
        ("groups", "batch"): BatchGroups,
        ("groups", "dataset"): DatasetGroups,
    }
    return strategies[config.mode, config.pool](config, seed, distributed)
