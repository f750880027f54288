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
from .distributed import gather, gather_captions, global_sum
from .hard_negatives import HardNegatives, group_neighbours, mine_hard_negatives
from .losses import (
    PairLogits,
    altered_captions_loss,
    contrastive_loss,
    distillation_loss,
    group_distillation_loss,
    group_itm_loss,
    itm_loss,
    similarities,
    text_recovery_loss,
)

MASK, NEGATIVES, ALTERED = range(100, 103)
"""Purposes of random streams, apart from those of data.batches."""


@dataclass(frozen=True)
class StepInputs:
    """A rank's b rows of one micro-batch, features and captions; row i is caption i with its image i."""

    rows: Tensor
    """[b] int64, row numbers counted through the run: seeds of the rows' random choices."""
    patch_tokens: Tensor
    """[b, P, Dv]"""
    image_embeddings: Tensor
    """[b, De] float32, normalised; so are text_embeddings."""
    text_embeddings: Tensor
    captions: CaptionIds
    excluded: Tensor
    """[B, B] bool over the rows of all ranks: caption i describes image j, so the pair is no negative."""
    random_share: float
    """Share of random negatives at this step of the curriculum."""
    retriever_embeddings: tuple[Tensor, Tensor] | None = None
    """Image and text embeddings of another retriever that negatives are mined by, [b, its width] each; None: by those
    above."""
    aligning: bool = False
    """In the alignment stage, which leaves ITM, its negatives and distillation out."""


@dataclass(frozen=True)
class StepLosses:
    """What one micro-batch gave this rank."""

    losses: dict[str, Tensor]
    """Mean over this rank's rows, unweighted, by name of the objective."""
    total: Tensor
    """Their weighted sum, what is differentiated."""
    stats: dict[str, float] = field(default_factory=dict)
    """Numbers for the log."""


@dataclass(frozen=True)
class _Scope:
    """The rows that negatives are taken from: those of all ranks, or this rank's own where groups came ready-made."""

    tokens: Tensor
    captions: CaptionIds
    similarity: Tensor
    """First-stage cosines, which a match logit may contain."""
    mining: Tensor
    """Similarities that negatives are mined by: the same, or another retriever's."""
    excluded: Tensor
    own: Tensor


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
        self.config, self.negatives, self.seed, self.distributed, self.teacher = (
            config,
            negatives,
            seed,
            distributed,
            teacher,
        )
        self._alter: CaptionAlterer | None = None

    def __call__(self, model: EDJE, inputs: StepInputs) -> StepLosses:
        """Every loss whose weight is not 0; in the alignment stage without ITM and distillation."""
        tokens = model.compress(inputs.patch_tokens)
        losses, stats = {}, {}
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

    def _own_rows(self, inputs: StepInputs) -> Tensor:
        count = len(inputs.rows)
        return torch.arange(count, device=inputs.patch_tokens.device) + self.distributed.rank * count

    def _scope(self, inputs: StepInputs, tokens: Tensor) -> _Scope:
        own = self._own_rows(inputs)
        if self.negatives.pool == "dataset":
            similarity = similarities(inputs.text_embeddings, inputs.image_embeddings)
            local = torch.arange(len(own), device=own.device)
            return _Scope(tokens, inputs.captions, similarity, similarity, inputs.excluded[own][:, own], local)
        texts, images = (gather(x, self.distributed) for x in (inputs.text_embeddings, inputs.image_embeddings))
        similarity = mining = similarities(texts, images)
        if inputs.retriever_embeddings is not None:
            images, texts = (gather(x, self.distributed) for x in inputs.retriever_embeddings)
            mining = similarities(texts, images)
        captions = gather_captions(inputs.captions, self.distributed)
        return _Scope(gather(tokens, self.distributed), captions, similarity, mining, inputs.excluded, own)

    def _match_losses(
        self, model: EDJE, inputs: StepInputs, tokens: Tensor
    ) -> tuple[dict[str, Tensor], dict[str, float]]:
        scope = self._scope(inputs, tokens)
        teacher_tokens = None
        if self.teacher is not None:
            with torch.no_grad():
                teacher_tokens = self.teacher.compress(inputs.patch_tokens)
                if self.negatives.pool == "batch":
                    teacher_tokens = gather(teacher_tokens, self.distributed)
        if self.negatives.mode == "groups":
            return self._group_losses(model, inputs, scope, teacher_tokens)
        return self._pair_losses(model, inputs, scope, teacher_tokens)

    def _pair_losses(self, model: EDJE, inputs: StepInputs, scope: _Scope, teacher_tokens: Tensor | None):
        config = self.negatives
        draws = config.sampled or inputs.random_share > 0
        mined = mine_hard_negatives(
            scope.mining,
            scope.excluded,
            config.per_positive,
            rows=scope.own,
            random_share=inputs.random_share,
            temperature=config.temperature if config.sampled else None,
            streams=[random_stream(self.seed, NEGATIVES, int(row)) for row in inputs.rows] if draws else None,
        )
        logits = pair_logits(model, scope.captions, scope.tokens, scope.own, mined, scope.similarity)
        losses = {"itm": itm_loss(logits, mined.images_valid, mined.captions_valid)}
        if teacher_tokens is not None:
            with torch.no_grad():
                teacher = pair_logits(self.teacher, scope.captions, teacher_tokens, scope.own, mined, scope.similarity)
            losses["distillation"] = distillation_loss(logits, teacher, mined.images_valid, mined.captions_valid)
        return losses, _pair_stats(logits, mined, scope)

    def _group_losses(self, model: EDJE, inputs: StepInputs, scope: _Scope, teacher_tokens: Tensor | None):
        size = self.negatives.group_size
        if self.negatives.pool == "dataset":
            groups = scope.own.view(-1, size)  # the sampler laid the groups out in consecutive rows
        else:
            # Every rank forms the same groups of the global batch and takes its share of them.
            number = int(inputs.rows[0]) // len(scope.excluded)
            stream = random_stream(self.seed, NEGATIVES, number)
            groups = group_neighbours(scope.mining, size, inputs.random_share, stream).to(scope.own.device)
            share = len(groups) // self.distributed.size
            groups = groups[self.distributed.rank * share : (self.distributed.rank + 1) * share]
        excluded = scope.excluded[groups[:, :, None], groups[:, None, :]]
        logits = group_logits(model, scope.captions, scope.tokens, groups, scope.similarity)
        losses = {"itm": group_itm_loss(logits, excluded)}
        if teacher_tokens is not None:
            with torch.no_grad():
                teacher = group_logits(self.teacher, scope.captions, teacher_tokens, groups, scope.similarity)
            losses["distillation"] = group_distillation_loss(logits, teacher, excluded)
        return losses, _group_stats(logits, excluded, groups, scope)

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
            self._own_rows(inputs),
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


def pair_logits(
    model: EDJE, captions: CaptionIds, tokens: Tensor, own: Tensor, mined: HardNegatives, similarity: Tensor
) -> PairLogits:
    """Logits of the positives of rows `own` [b] and of their mined negatives, as one batch of b * (1 + 2h) pairs."""
    b, h = mined.images.shape
    anchors = own[:, None].expand(b, h)
    caption_index = torch.cat([own, anchors.flatten(), mined.captions.flatten()])
    image_index = torch.cat([own, mined.images.flatten(), anchors.flatten()])
    logits = model.match_logits(captions, tokens, caption_index, image_index, similarity[caption_index, image_index])
    positive, negative_images, negative_captions = logits.split([b, b * h, b * h])
    return PairLogits(positive, negative_images.view(b, h), negative_captions.view(b, h))


def group_logits(model: EDJE, captions: CaptionIds, tokens: Tensor, groups: Tensor, similarity: Tensor) -> Tensor:
    """[G, g] rows -> [G, g, g] logits of every caption (row) with every image (column) of its group."""
    shape = (*groups.shape, groups.shape[1])
    caption_index = groups[:, :, None].expand(shape).flatten()
    image_index = groups[:, None, :].expand(shape).flatten()
    logits = model.match_logits(captions, tokens, caption_index, image_index, similarity[caption_index, image_index])
    return logits.view(shape)


@torch.no_grad()
def _pair_stats(logits: PairLogits, mined: HardNegatives, scope: _Scope) -> dict[str, float]:
    images = logits.negative_images.masked_fill(~mined.images_valid, -torch.inf).amax(1)
    captions = logits.negative_captions.masked_fill(~mined.captions_valid, -torch.inf).amax(1)
    right = torch.cat([logits.positive > images, logits.positive > captions])
    return {
        "itm_accuracy": right.float().mean().item(),
        "positive_similarity": scope.similarity[scope.own, scope.own].mean().item(),
        "negative_similarity": scope.similarity[scope.own[:, None], mined.images].mean().item(),
        "negatives_missing": float((~mined.images_valid).sum() + (~mined.captions_valid).sum()),
    }


@torch.no_grad()
def _group_stats(logits: Tensor, excluded: Tensor, groups: Tensor, scope: _Scope) -> dict[str, float]:
    positive = torch.eye(logits.shape[-1], dtype=torch.bool, device=logits.device)
    masked = logits.masked_fill(excluded & ~positive, -torch.inf)
    diagonal = torch.arange(logits.shape[-1], device=logits.device)
    right = torch.stack([masked.argmax(2) == diagonal, masked.argmax(1) == diagonal])
    similarity = scope.similarity[groups[:, :, None], groups[:, None, :]]
    return {
        "itm_accuracy": right.float().mean().item(),
        "positive_similarity": similarity[:, positive].mean().item(),
        "negative_similarity": similarity[~excluded & ~positive].mean().item(),
        "negatives_missing": float((excluded & ~positive).sum()),
    }
