"""The training objectives: ITM with hard negatives, MLM, text-embedding recovery, distillation, image-text contrast.

Source: EDJE (arXiv 2510.06820), training objectives; the losses themselves are in training/losses.py. A rank's value is
the mean over its own rows, on tensors gathered with gradients; the mean over ranks, of values and of gradients, is that
of one process on the whole batch.

Letters: B rows of the global batch, b rows of this rank, Q pairs, H joint encoder width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from data.batches import random_stream
from models.distributed import DistributedContext, send
from models.edje import EDJE
from models.encoder.mixture import Sequences
from models.language.captions import CaptionIds, CaptionTokenizer

from .altered_captions import CaptionAlterer, whole_words
from .config import NegativesConfig, ObjectivesConfig
from .distributed import gather, global_count
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
    """Numbers for the log: scalars, on the device or the CPU."""


States = Mapping[str, Tensor]
"""Wanted states [R, H] by kind of sequences."""


@dataclass(frozen=True)
class Term:
    """One objective's part in a step: what it wants of the joint encoder, and what it makes of it."""

    kinds: Mapping[str, Sequences]
    """By name; kinds of equal name are encoded once."""
    losses: Callable[[States], dict[str, Tensor]]
    """Mean over this rank's rows, by name of the objective."""
    stats: dict[str, Tensor] = field(default_factory=dict)
    """Numbers for the log, complete once `losses` was called."""


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
        """Every loss whose weight is not 0; in the alignment stage without ITM and distillation.

        First all random choices are made, on the CPU. One pass through the joint encoder then serves all terms."""
        matching = bool(self.config.itm or self.config.distillation) and not inputs.aligning
        tokens = model.compress(inputs.patch_tokens)
        if matching:
            tokens = self.negatives.shared(tokens)
        terms = list(self._terms(model, inputs, matching))
        kinds = {name: sequences for term in terms for name, sequences in term.kinds.items()}
        states = model.encoder.encode_mixture(tokens, list(kinds.values())) if kinds else []
        of_kinds = dict(zip(kinds, states, strict=True))
        losses: dict[str, Tensor] = {}
        stats: dict[str, Tensor] = {}
        for term in terms:
            losses |= term.losses(of_kinds)
            stats |= term.stats
        total = sum(getattr(self.config, name) * loss for name, loss in losses.items())
        return StepLosses(losses, total, stats)

    def _terms(self, model: EDJE, inputs: StepInputs, matching: bool) -> Iterator[Term]:
        own = torch.arange(len(inputs.rows))
        if matching:
            scope = self.negatives.scope(inputs)
            own = scope.own
            yield self._match(model, inputs, scope)
        if self.config.mlm:
            yield self._mlm(model, inputs, own)
        if self.config.altered_captions:
            yield self._altered_captions(model, inputs, own)
        if self.config.text_recovery:
            yield self._text_recovery(model, inputs)
        if self.config.itc:
            yield self._itc(model, inputs, own)

    def _match(self, model: EDJE, inputs: StepInputs, scope: Scope) -> Term:
        pairs = self.negatives.choose(inputs, scope)
        stats: dict[str, Tensor] = {}

        def losses(states: States) -> dict[str, Tensor]:
            logits = _logits(model, states["pairs"], scope, pairs)
            found = {"itm": pairs.itm_loss(logits)}
            if self.teacher is not None:
                found["distillation"] = pairs.distillation_loss(logits, self._teach(self.teacher, inputs, scope, pairs))
            stats.update(pairs.stats(logits, scope))
            return found

        return Term({"pairs": _sequences(model, scope, pairs)}, losses, stats)

    @torch.no_grad()
    def _teach(self, teacher: EDJE, inputs: StepInputs, scope: Scope, pairs: ChosenPairs) -> Tensor:
        """[Q] the teacher's logits of the chosen pairs."""
        tokens = self.negatives.shared(teacher.compress(inputs.patch_tokens))
        (states,) = teacher.encoder.encode_mixture(tokens, [_sequences(teacher, scope, pairs)])
        return _logits(teacher, states, scope, pairs)

    def _mlm(self, model: EDJE, inputs: StepInputs, own: Tensor) -> Term:
        captions = inputs.captions.truncate(model.max_joint_pieces)
        masked = self._draw_mask(captions, inputs.rows, model.tokenizer)
        ids = captions.ids.masked_fill(masked, model.tokenizer.mask_id)
        labels = captions.ids[masked]
        # Counts differ by rank: local sum * ranks / global count averages to the mean over all masked tokens.
        count = global_count(len(labels), self.distributed)

        def losses(states: States) -> dict[str, Tensor]:
            logits = model.encoder.mlm_logits(states["masked"]).float()
            total = F.cross_entropy(logits, send(labels, logits.device), reduction="sum")
            return {"mlm": total * self.distributed.size / count}

        kind = Sequences(CaptionIds(ids, captions.lengths), image_index=own, wanted_pieces=masked)
        return Term({"masked": kind}, losses)

    def _draw_mask(self, captions: CaptionIds, rows: Tensor, tokenizer: CaptionTokenizer) -> Tensor:
        """[T] bool: pieces to be masked, each with the configured probability; never an unknown word."""
        streams = [random_stream(self.seed, MASK, row) for row in rows.tolist()]
        draws = np.concatenate([s.random(n) for s, n in zip(streams, captions.lengths.tolist(), strict=True)])
        drawn = torch.from_numpy(draws < self.config.mlm_probability)
        if not self.config.mlm_words:
            return drawn & (captions.ids != tokenizer.unk_id)
        preferences = np.stack([s.random(len(self.config.mlm_words)) for s in streams])
        return drawn & _words_of_one_group(captions, self.config.mlm_words, tokenizer, torch.from_numpy(preferences))

    def _altered_captions(self, model: EDJE, inputs: StepInputs, own: Tensor) -> Term:
        if self._alter is None:
            self._alter = CaptionAlterer(self.config.altered_words, model.tokenizer, "objectives.altered_words")
        captions = inputs.captions.truncate(model.max_joint_pieces)
        altered, changed = self._alter(
            captions, [random_stream(self.seed, ALTERED, row) for row in inputs.rows.tolist()]
        )
        rows = changed.nonzero().flatten()
        count = global_count(len(rows), self.distributed)
        # The first stage's cosine, which a logit may contain, is the caption's own for both: the two cancel.
        cosines = (inputs.text_embeddings * inputs.image_embeddings).sum(1)[rows].repeat(2)

        def losses(states: States) -> dict[str, Tensor]:
            if not len(rows):
                return {"altered_captions": model.match_head.out.bias.sum() * 0.0}
            logits = model.logits_of(states["altered"], send(cosines, model.device))
            total = altered_captions_loss(*logits.chunk(2))
            return {"altered_captions": total * self.distributed.size / count}

        both, indices = CaptionIds.cat([captions, altered]), torch.cat([rows, rows + len(captions)])
        kind = Sequences(both, indices, image_index=own[rows].repeat(2))
        return Term({"altered": kind} if len(rows) else {}, losses)

    def _text_recovery(self, model: EDJE, inputs: StepInputs) -> Term:
        def losses(states: States) -> dict[str, Tensor]:
            recovered = model.recover_text_embedding(states["texts"])
            return {"text_recovery": text_recovery_loss(recovered, send(inputs.text_embeddings, recovered.device))}

        return Term({"texts": _texts(model, inputs)}, losses)

    def _itc(self, model: EDJE, inputs: StepInputs, own: Tensor) -> Term:
        def losses(states: States) -> dict[str, Tensor]:
            texts, images = states["texts"], states["images"]
            loss = contrastive_loss(
                images,
                texts,
                gather(images, self.distributed),
                gather(texts, self.distributed),
                send(self.negatives.own_rows(inputs), images.device),
                send(inputs.excluded, images.device),
                model.itc_logit_scale.exp().clamp(max=100),
            )
            return {"itc": loss}

        return Term({"texts": _texts(model, inputs), "images": Sequences(image_index=own)}, losses)


def check_words(config: ObjectivesConfig, tokenizer: CaptionTokenizer) -> None:
    """Raises UserError, naming key and words, where the configured words cannot be used with this tokenizer: before a
    run begins, since the losses themselves would find it at the first step."""
    for group in config.mlm_words:
        whole_words(group, tokenizer, "objectives.mlm_words")
    CaptionAlterer(config.altered_words, tokenizer, "objectives.altered_words")


def _words_of_one_group(
    captions: CaptionIds, groups: Sequence[Sequence[str]], tokenizer: CaptionTokenizer, preferences: Tensor
) -> Tensor:
    """[T] bool: the words of one group per caption, of those that occur in it the one with the highest of
    `preferences` [C, groups], all above 0."""
    members = torch.stack([torch.isin(captions.ids, whole_words(g, tokenizer, "objectives.mlm_words")) for g in groups])
    caption_of = torch.repeat_interleave(captions.lengths)
    counts = torch.zeros(len(groups), len(captions)).index_add_(1, caption_of, members.float())
    chosen = (preferences * (counts.T > 0)).argmax(1)
    return members[chosen[caption_of], torch.arange(len(captions.ids))]


def _texts(model: EDJE, inputs: StepInputs) -> Sequences:
    return Sequences(inputs.captions.truncate(model.max_text_pieces))


def _sequences(model: EDJE, scope: Scope, pairs: ChosenPairs) -> Sequences:
    """The chosen pairs as the model reads them."""
    captions = scope.captions.truncate(model.max_joint_pieces)
    return Sequences(captions, pairs.caption_index, pairs.image_index)


def _logits(model: EDJE, states: Tensor, scope: Scope, pairs: ChosenPairs) -> Tensor:
    """[CLS] states [Q, H] of the chosen pairs -> the model's logits [Q] float32."""
    cosines = scope.similarity[pairs.caption_index, pairs.image_index]
    return model.logits_of(states, send(cosines, states.device))
