"""Sequences of any kinds in one packed input: pairs, captions alone and images alone pass through the encoder together.

A training step has four kinds of sequences. Packed into one input they cost one pass instead of four, and a GPU gets a
few large calls. All index arithmetic is done on the CPU, which knows the captions' lengths, and goes to the device in
one copy: a GPU waits for nothing. Letters: C captions, N images, Q sequences, m vision tokens, H width, V vocabulary,
T rows in all, R wanted rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ..distributed import send
from ..language.captions import CaptionIds
from .packing import Group, Layout, PackedInput, Spans, SpecialTokens, fill, with_frame


@dataclass(frozen=True)
class Sequences:
    """Q sequences of one kind, all tensors on the CPU: joint, text only or vision only."""

    captions: CaptionIds | None = None
    """C captions, cut to what fits. None: vision only."""
    caption_index: Tensor | None = None
    """[Q] int64 into `captions`. None: each caption once, in order."""
    image_index: Tensor | None = None
    """[Q] int64 into the images. None: text only."""
    wanted_pieces: Tensor | None = None
    """[sum of lengths] bool over the word pieces of captions that occur once each: the states of these are wanted.
    None: those of each sequence's [CLS]."""


@dataclass(frozen=True)
class Mixture:
    """A packed input and the rows whose last states are wanted.

    Sequences of which the [CLS] alone is wanted lie first: in the last layer it alone asks, and no other row."""

    packed: PackedInput
    cls_groups: tuple[Group, ...]
    """Of the packed input's groups, those whose [CLS] alone asks; the others follow them."""
    asking: Tensor
    """[A] int64: rows that ask in the last layer, the [CLS] of the first sequences and all rows of the others."""
    wanted: Tensor
    """[R] int64 into the asking rows, kind by kind, in the order of the sequences."""
    counts: tuple[int, ...]
    """Wanted rows of each kind; they sum to R."""

    @property
    def parts(self) -> list[tuple[tuple[Group, ...], bool]]:
        """Runs of groups, and whether the [CLS] alone asks; none is empty."""
        others = self.packed.groups[len(self.cls_groups) :]
        return [part for part in ((self.cls_groups, True), (others, False)) if part[0]]


def pack_mixture(word_table: Tensor, special: SpecialTokens, tokens: Tensor, kinds: Sequence[Sequences]) -> Mixture:
    """All sequences of `kinds` as one input: word_table [V, H], tokens [N, m, H].

    Each sequence is laid out as packing.py says for its kind. Those of which pieces are wanted come last; otherwise
    shortest first, ties in the order given."""
    captions = [kind.captions for kind in kinds if kind.captions is not None]
    ids = with_frame(special, CaptionIds.cat(captions) if captions else None, torch.device("cpu"))
    spans, slices = _spans(kinds)
    asks_whole = torch.zeros(len(spans.lengths), dtype=torch.bool)
    for kind, part in zip(kinds, slices, strict=True):
        asks_whole[part] = kind.wanted_pieces is not None
    layout = Layout.of(spans, tokens.shape[1], last=asks_whole)
    num_cls = sum(part.stop - part.start for k, part in zip(kinds, slices, strict=True) if k.wanted_pieces is None)
    cls_groups = layout.groups[: _runs_until(layout.groups, num_cls)]
    asking = _asking(layout, cls_groups)
    wanted = [_wanted(layout, kind, part) for kind, part in zip(kinds, slices, strict=True)]
    indices = (
        layout.sources(len(ids)),
        layout.positions,
        layout.segments(),
        layout.starts,
        ids,
        asking,
        torch.searchsorted(asking, torch.cat(wanted)),
    )
    sent = send(torch.cat(indices), tokens.device).split([len(index) for index in indices])
    sources, positions, segments, starts, ids_there, asking_there, wanted_there = sent
    packed = PackedInput(
        embeddings=fill(word_table, ids_there, tokens, sources),
        positions=positions,
        segments=segments,
        groups=layout.groups,
        cls_rows=starts,
        caption_rows=starts[:0],
    )
    return Mixture(packed, cls_groups, asking_there, wanted_there, tuple(len(rows) for rows in wanted))


def _spans(kinds: Sequence[Sequences]) -> tuple[Spans, list[slice]]:
    """What the sequences of all kinds hold, and which of them each kind has."""
    parts: list[Spans] = []
    pieces_before = 0
    for kind in kinds:
        parts.append(_spans_of(kind, pieces_before))
        pieces_before += 0 if kind.captions is None else len(kind.captions.ids)
    ends = np.cumsum([len(part.lengths) for part in parts]).tolist()
    slices = [slice(end - len(part.lengths), end) for end, part in zip(ends, parts, strict=True)]
    return Spans(*(torch.cat(column) for column in zip(*parts, strict=True))), slices


def _spans_of(kind: Sequences, pieces_before: int) -> Spans:
    if kind.captions is None:
        assert kind.image_index is not None, "a sequence needs a caption or an image"
        nothing = torch.zeros_like(kind.image_index)
        return Spans(nothing, nothing, nothing.bool(), kind.image_index)
    lengths, first = kind.captions.lengths, pieces_before + kind.captions.offsets[:-1]
    if kind.caption_index is not None:
        lengths, first = lengths[kind.caption_index], first[kind.caption_index]
    images = torch.full_like(lengths, -1) if kind.image_index is None else kind.image_index
    return Spans(lengths, first, torch.ones_like(lengths, dtype=torch.bool), images)


def _runs_until(groups: Sequence[Group], sequences: int) -> int:
    """How many of the first groups hold the first `sequences`."""
    held = np.cumsum([0, *(group.sequences for group in groups)])
    return int(np.searchsorted(held, sequences))


def _asking(layout: Layout, cls_groups: Sequence[Group]) -> Tensor:
    """[A] rows that ask in the last layer, rising: each [CLS] of the first groups, then all rows of the others."""
    num_rows = cls_groups[-1].rows.stop if cls_groups else 0
    starts = layout.starts[layout.starts < num_rows].sort().values
    return torch.cat([starts, torch.arange(num_rows, len(layout.positions))])


def _wanted(layout: Layout, kind: Sequences, part: slice) -> Tensor:
    """Rows of a kind's wanted states; part: its sequences."""
    if kind.wanted_pieces is None:
        return layout.starts[part]
    return layout.caption_rows(len(kind.wanted_pieces), part)[kind.wanted_pieces]
