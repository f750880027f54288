"""The training objectives: ITM with hard negatives, MLM, text-embedding recovery, distillation, image-text contrast.

Source: EDJE (arXiv 2510.06820), training objectives; the losses themselves are in training/losses.py. A rank's value is
the mean over its own rows, on tensors gathered with gradients; the mean over ranks, of values and of gradients, is that
of one process on the whole batch.

Letters: B rows of the global batch, b rows of this rank, h negatives a positive, G groups of g rows, V vocabulary,
De embedding width, m vision tokens, H joint encoder width, L layers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from data.batches import random_stream
from models.distributed import DistributedContext
from models.edje import EDJE
from models.language.captions import CaptionIds, CaptionTokenizer

from .altered_captions import CaptionAlterer, whole_words
from .config import NegativesConfig, ObjectivesConfig
from .distributed import gather, global_sum
from .features import StepInputs
from .losses import altered_captions_loss, contrastive_loss, text_recovery_loss
from .negatives import ChosenPairs, Scope, negatives_strategy

MASK, ALTERED = 100, 102
"""Purposes of random streams, apart from those of data.batches."""


@dataclass(frozen=True)
class StepLosses:
    """What one micro-batch gave this rank."""

    losses: dict[str, Tensor]
    """Mean over this rank's rows, unweighted, by name of the objective."""
    total: Tensor
    """Their weighted sum, what is differentiated."""
    stats: dict[str, Tensor] = field(default_factory=dict)
    """Numbers for the log: scalars on the device."""


class Objectives:
    """Computes the losses of a step for one run's configuration."""

    def __init__(
        self,
        config: ObjectivesConfig,
        negatives: NegativesConfig,
        seed: int,
        distributed: DistributedContext,
        teacher: EDJE | None = None,
    ):
        self.config, self.seed, self.distributed, self.teacher = config, seed, distributed, teacher
        self.negatives = negatives_strategy(negatives, seed, distributed)
        self._alter: CaptionAlterer | None = None

    def __call__(self, model: EDJE, inputs: StepInputs) -> StepLosses:
        """Every loss whose weight is not 0; in the alignment stage without ITM and distillation."""
        tokens = model.compress(inputs.patch_tokens)
        losses: dict[str, Tensor] = {}
        stats: dict[str, Tensor] = {}
        if (self.config.itm or self.config.distillation) and not inputs.aligning:
            losses, stats = self._match_losses(model, inputs, tokens)
        if self.config.mlm:
            losses["mlm"] = self._mlm(model, inputs, tokens)
        if self.config.altered_captions:
            losses["altered_captions"] = self._altered_captions(model, inputs, tokens)
        if self.config.text_recovery or self.config.itc:
            text_cls = model.text_cls(inputs.captions)
            if self.config.text_recovery:
                losses["text_recovery"] = text_recovery_loss(
                    model.recover_text_embedding(text_cls), inputs.text_embeddings
                )
            if self.config.itc:
                losses["itc"] = self._itc(model, inputs, text_cls, model.image_cls(tokens))
        total = sum(getattr(self.config, name) * loss for name, loss in losses.items())
        return StepLosses(losses, total, stats)

    def _match_losses(
        self, model: EDJE, inputs: StepInputs, tokens: Tensor
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        scope = self.negatives.scope(inputs, tokens)
        pairs = self.negatives.choose(inputs, scope)
        logits = _logits(model, scope, pairs, scope.tokens)
        losses = {"itm": pairs.itm_loss(logits)}
        if self.teacher is not None:
            with torch.no_grad():
                teacher_tokens = self.negatives.shared(self.teacher.compress(inputs.patch_tokens))
                teacher_logits = _logits(self.teacher, scope, pairs, teacher_tokens)
            losses["distillation"] = pairs.distillation_loss(logits, teacher_logits)
        return losses, pairs.stats(logits, scope)

    def _mlm(self, model: EDJE, inputs: StepInputs, tokens: Tensor) -> Tensor:
        captions = inputs.captions.truncate(model.max_joint_pieces)
        masked = self._draw_mask(captions, inputs.rows, model.tokenizer)
        ids = captions.ids.masked_fill(masked, model.tokenizer.mask_id)
        index = torch.arange(len(captions), device=ids.device)
        packed = model.encoder.pack_pairs(CaptionIds(ids, captions.lengths), tokens, index, index)
        hidden = model.encoder.encode(packed, packed.caption_rows[masked])
        total = F.cross_entropy(model.encoder.mlm_logits(hidden).float(), captions.ids[masked], reduction="sum")
        # Counts differ by rank: local sum * ranks / global count averages to the mean over all masked tokens.
        return total * self.distributed.size / global_sum(masked.sum(), self.distributed).clamp(min=1)

    def _draw_mask(self, captions: CaptionIds, rows: Tensor, tokenizer: CaptionTokenizer) -> Tensor:
        """[T] bool: pieces to be masked, each with the configured probability; never an unknown word."""
        streams = [random_stream(self.seed, MASK, int(row)) for row in rows]
        draws = np.concatenate([s.random(n) for s, n in zip(streams, captions.lengths.tolist(), strict=True)])
        drawn = torch.from_numpy(draws < self.config.mlm_probability).to(captions.ids.device)
        if not self.config.mlm_words:
            return drawn & (captions.ids != tokenizer.unk_id)
        preferences = np.stack([s.random(len(self.config.mlm_words)) for s in streams])
        return drawn & _words_of_one_group(captions, self.config.mlm_words, tokenizer, torch.from_numpy(preferences))

    def _altered_captions(self, model: EDJE, inputs: StepInputs, tokens: Tensor) -> Tensor:
        if self._alter is None:
            self._alter = CaptionAlterer(self.config.altered_words, model.tokenizer, "objectives.altered_words")
        captions = inputs.captions.truncate(model.max_joint_pieces)
        altered, changed = self._alter(captions, [random_stream(self.seed, ALTERED, int(row)) for row in inputs.rows])
        own, count = torch.nonzero(changed).flatten(), global_sum(changed.sum(), self.distributed)
        if not len(own):
            return tokens.sum() * 0.0
        # The first stage's cosine, which a logit may contain, is the caption's own for both: the two cancel.
        cosine = (inputs.text_embeddings * inputs.image_embeddings).sum(1)[own].repeat(2)
        both = CaptionIds.cat([captions, altered])
        logits = model.match_logits(both, tokens, torch.cat([own, own + len(captions)]), own.repeat(2), cosine)
        return altered_captions_loss(*logits.chunk(2)) * self.distributed.size / count

    def _itc(self, model: EDJE, inputs: StepInputs, text_cls: Tensor, image_cls: Tensor) -> Tensor:
        return contrastive_loss(
            image_cls,
            text_cls,
            gather(image_cls, self.distributed),
            gather(text_cls, self.distributed),
            self.negatives.own_rows(inputs),
            inputs.excluded,
            model.itc_logit_scale.exp().clamp(max=100),
        )


def check_words(config: ObjectivesConfig, tokenizer: CaptionTokenizer) -> None:
    """Raises UserError, naming key and words, where the configured words cannot be used with this tokenizer: before a
    run begins, since the losses themselves would find it at the first step."""
    for group in config.mlm_words:
        whole_words(group, tokenizer, "objectives.mlm_words")
    CaptionAlterer(config.altered_words, tokenizer, "objectives.altered_words")


def _words_of_one_group(
    captions: CaptionIds, groups: Sequence[Sequence[str]], tokenizer: CaptionTokenizer, preferences: Tensor
) -> Tensor:
    """[T] bool: the words of one group a caption, of those that occur in it the one with the highest of
    `preferences` [C, groups], all above 0."""
    device = captions.ids.device
    members = torch.stack(
        [torch.isin(captions.ids, whole_words(g, tokenizer, "objectives.mlm_words").to(device)) for g in groups]
    )
    caption_of = torch.repeat_interleave(captions.lengths)
    counts = torch.zeros(len(groups), len(captions), device=device).index_add_(1, caption_of, members.float())
    chosen = (preferences.to(device) * (counts.T > 0)).argmax(1)
    return members[chosen[caption_of], torch.arange(len(captions.ids), device=device)]


def _logits(model: EDJE, scope: Scope, pairs: ChosenPairs, tokens: Tensor) -> Tensor:
    """[Q] float32: the model's logits of the chosen pairs, on its own vision tokens of the scope's rows."""
    captions, images = pairs.caption_index, pairs.image_index
    return model.match_logits(scope.captions, tokens, captions, images, scope.similarity[captions, images])
