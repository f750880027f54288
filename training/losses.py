"""The losses as functions of logits and embeddings; training/objectives.py says which pairs they are computed on.

Source: EDJE (arXiv 2510.06820), training objectives. Letters: b rows of this rank, B of all ranks, h negatives a
positive, G groups of g rows, De embedding width, H joint encoder width.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F


@dataclass(frozen=True)
class PairLogits:
    """Logits of positives [b], of the h negative images of each caption and the h negative captions of each image."""

    positive: Tensor
    negative_images: Tensor
    negative_captions: Tensor


def itm_loss(logits: PairLogits, images_valid: Tensor, captions_valid: Tensor) -> Tensor:
    """Cross-entropy of each positive against its own negatives, mean over rows, mean of the two directions.

    The masks are [b, h] bool; a row without valid negatives adds zero."""

    def direction(negatives: Tensor, valid: Tensor) -> Tensor:
        row = torch.cat([logits.positive[:, None], negatives.masked_fill(~valid, -torch.inf)], dim=1)
        return -row.log_softmax(dim=1)[:, 0].mean()

    by_image = direction(logits.negative_images, images_valid)
    by_caption = direction(logits.negative_captions, captions_valid)
    return (by_image + by_caption) / 2


def group_itm_loss(logits: Tensor, excluded: Tensor) -> Tensor:
    """Cross-entropy over rows (images for a caption) and columns (captions for an image) of each group.

    logits: [G, g, g], row: caption, column: image, positives on the diagonal; excluded: [G, g, g] bool, pairs that are
    excluded from negatives (the diagonal is kept)."""
    positive = torch.eye(logits.shape[-1], dtype=torch.bool, device=logits.device)
    masked = logits.masked_fill(excluded & ~positive, -torch.inf)
    by_image = -masked.log_softmax(dim=2).diagonal(dim1=1, dim2=2).mean()
    by_caption = -masked.log_softmax(dim=1).diagonal(dim1=1, dim2=2).mean()
    return (by_image + by_caption) / 2


def altered_captions_loss(positive: Tensor, altered: Tensor) -> Tensor:
    """Cross-entropy of each image's own caption against the same caption altered, [n] logits each; sum over rows."""
    return F.softplus(altered - positive).sum()


def distillation_loss(student: PairLogits, teacher: PairLogits, images_valid: Tensor, captions_valid: Tensor) -> Tensor:
    """Binary cross-entropy of student logits with the sigmoid of the teacher's, for the same pairs.

    Positives, negative images and negative captions are averaged apart, then equally, as in the published code."""
    positive = _binary_cross_entropy(student.positive, teacher.positive).mean()
    images = _binary_cross_entropy(student.negative_images, teacher.negative_images)
    captions = _binary_cross_entropy(student.negative_captions, teacher.negative_captions)
    return (positive + _masked_mean(images, images_valid) + _masked_mean(captions, captions_valid)) / 3


def group_distillation_loss(student: Tensor, teacher: Tensor, excluded: Tensor) -> Tensor:
    """The same for groups, [G, g, g] each: a third for positives, two thirds for negatives (both directions in one)."""
    positive = torch.eye(student.shape[-1], dtype=torch.bool, device=student.device)
    losses = _binary_cross_entropy(student, teacher)
    # The diagonal, not a mask as index: a GPU would have to count it first.
    return (losses.diagonal(dim1=1, dim2=2).mean() + 2 * _masked_mean(losses, ~excluded & ~positive)) / 3


def _binary_cross_entropy(student: Tensor, teacher: Tensor) -> Tensor:
    return F.binary_cross_entropy_with_logits(student, teacher.detach().float().sigmoid(), reduction="none")


def _masked_mean(values: Tensor, mask: Tensor) -> Tensor:
    return (values * mask).sum() / mask.sum().clamp(min=1)


def text_recovery_loss(recovered: Tensor, text_embeddings: Tensor) -> Tensor:
    """1 - cosine between [b, De] recovered and the backbone's text embeddings, mean over rows; norms don't matter."""
    return (1 - F.cosine_similarity(recovered.float(), text_embeddings.float(), dim=-1)).mean()


def contrastive_loss(
    images: Tensor, texts: Tensor, all_images: Tensor, all_texts: Tensor, own: Tensor, excluded: Tensor, scale: Tensor
) -> Tensor:
    """InfoNCE of a rank's [b, H] rows against the global [B, H] ones, mean of both directions; rows normalised here.

    own: [b] global rows of the rank; excluded: [B, B] bool, (caption, image) pairs left out of the softmax; scale: the
    inverse temperature."""
    images, texts, all_images, all_texts = (
        F.normalize(x.float(), dim=-1) for x in (images, texts, all_images, all_texts)
    )
    negatives = excluded.clone().fill_diagonal_(False)
    by_image = (scale * similarities(texts, all_images)).masked_fill(negatives[own], -torch.inf)
    by_caption = (scale * similarities(images, all_texts)).masked_fill(negatives.T[own], -torch.inf)
    return (F.cross_entropy(by_image, own) + F.cross_entropy(by_caption, own)) / 2


def similarities(a: Tensor, b: Tensor) -> Tensor:
    """[n, w] and [k, w], normalised -> [n, k] cosines. Float32: under autocast near neighbours would tie."""
    with torch.autocast(a.device.type, enabled=False):
        return a.float() @ b.float().T
