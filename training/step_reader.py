"""Turns what the data loader read into the inputs of a step: features, caption ids, pairs excluded from negatives."""

from __future__ import annotations

import time
from collections.abc import Iterator

from torch import Tensor

from data.batches import Batch, TrainingBatches
from data.neighbours import CaptionKeys
from models.distributed import DistributedContext
from models.errors import UserError
from models.language.captions import CaptionTokenizer

from .config import RunConfig
from .distributed import gather_on_host
from .features import Embeddings, Features, StepInputs
from .negatives import negatives_strategy


class StepReader:
    """The inputs of each micro-batch from `first_step` on, in order."""

    def __init__(
        self,
        config: RunConfig,
        tokenizer: CaptionTokenizer,
        batches: TrainingBatches,
        features: Features,
        retriever: Embeddings | None,
        keys: CaptionKeys,
        distributed: DistributedContext,
        first_step: int = 0,
    ):
        self.config, self.tokenizer, self.distributed = config, tokenizer, distributed
        self.batches, self.features, self.keys = batches, features, keys
        strategy = negatives_strategy(config.negatives, config.seed, distributed)
        self.retriever = retriever if strategy.mines_in_the_batch else None
        self.accumulation = config.training.accumulation
        first, last = first_step * self.accumulation, config.training.steps * self.accumulation
        self.stream: Iterator[Batch] = batches.read(
            first, last, config.data.num_workers, pin_memory=distributed.device.type == "cuda"
        )
        self.unreadable: dict[str, None] = {}
        """Images of this rank that could not be read, one line each."""
        self.images_read, self.images_failed = 0, 0
        self.seconds_waited = 0.0

    def next(self) -> StepInputs:
        """Waits for the next micro-batch. Raises UserError if too many images were unreadable so far."""
        start = time.perf_counter()
        batch = next(self.stream)
        self.seconds_waited += time.perf_counter() - start
        self._count_unreadable(batch)
        device, distributed = self.distributed.device, self.distributed
        raw = [self.batches.plan.dataset.captions[c] for c in batch.captions]
        encoded = self.features.encode(batch, raw)
        captions, image_numbers = (gather_on_host(numbers, distributed) for numbers in (batch.captions, batch.images))
        step = batch.number // self.accumulation
        return StepInputs(
            rows=batch.rows,
            patch_tokens=encoded.patch_tokens.to(device, non_blocking=True),
            image_embeddings=encoded.image_embeddings.cpu(),
            text_embeddings=encoded.text_embeddings.cpu(),
            retriever_embeddings=self._retriever_embeddings(batch),
            captions=self.tokenizer(raw),
            excluded=self.keys.true_pairs(captions, image_numbers),
            random_share=self.config.negatives.random_share(step),
            aligning=step < self.config.objectives.align_steps,
        )

    def _retriever_embeddings(self, batch: Batch) -> tuple[Tensor, Tensor] | None:
        if self.retriever is None:
            return None
        dataset = self.batches.plan.dataset
        images = self.retriever.of_images([dataset.image_ids[i] for i in batch.images.tolist()])
        captions = self.retriever.of_captions([dataset.captions[c] for c in batch.captions.tolist()])
        return images, captions

    def _count_unreadable(self, batch: Batch) -> None:
        self.images_read += len(batch.rows)
        self.images_failed += len(batch.unreadable)
        self.unreadable.update(dict.fromkeys(batch.unreadable))
        limit = self.config.data.max_unreadable
        # One failure is always tolerated: a share of the first few rows says nothing.
        if self.images_failed > max(1, limit * self.images_read):
            raise UserError(
                f"{self.images_failed} of {self.images_read} images could not be read, more than data.max_unreadable "
                f"({limit:.0%}); the first: {next(iter(self.unreadable))}"
            )
