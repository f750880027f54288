"""Sequences of any kinds in one packed input: pairs, captions alone and images alone pass through the encoder together.

A training step has four kinds of sequences. Packed into one input they cost one pass instead of four, and a GPU gets a
few large calls. All index arithmetic is done on the CPU, which knows the captions' lengths, and goes to the device in
one copy: a GPU waits for nothing. Letters: C captions, N images, Q sequences, m vision tokens, H width, V vocabulary,
T rows in all, R wanted rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from ..distributed import send
from ..language.captions import CaptionIds
from .packing import Group, PackedInput, SpecialTokens


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


class _Spans(NamedTuple):
    """What each sequence holds, [Q] each: how many word pieces, where they begin among those of all captions, whether
    it has a caption (which may be empty), and its image, -1 where it has none."""

    lengths: np.ndarray
    first_pieces: np.ndarray
    has_caption: np.ndarray
    images: np.ndarray


def pack_mixture(word_table: Tensor, special: SpecialTokens, tokens: Tensor, kinds: Sequence[Sequences]) -> Mixture:
    """All sequences of `kinds` as one input: word_table [V, H], tokens [N, m, H].

    Each sequence is laid out as packing.py says for its kind. Those of which pieces are wanted come last; otherwise
    shortest first, ties in the order given."""
    captions = [kind.captions for kind in kinds if kind.captions is not None]
    ids = torch.cat([torch.tensor([special.cls_id, special.sep_id]), *(c.ids for c in captions)])
    slices = _slices(kinds)
    asks_whole = np.zeros(slices[-1].stop, bool)
    for kind, part in zip(kinds, slices, strict=True):
        asks_whole[part] = kind.wanted_pieces is not None
    layout = _Layout.of(_spans(kinds), tokens.shape[1], asks_whole)
    wanted = [layout.wanted(kind, part) for kind, part in zip(kinds, slices, strict=True)]
    places = layout.places(np.concatenate(wanted))
    of_rows = layout.sources(len(ids)), layout.positions, layout.segments, layout.starts
    indices = (*of_rows, ids.numpy(), layout.asking, places)
    sent = send(torch.from_numpy(np.concatenate(indices)), tokens.device).split([len(index) for index in indices])
    sources, positions, segments, starts, ids_there, asking, places_there = sent
    words = F.embedding(ids_there, word_table)
    packed = PackedInput(
        embeddings=torch.cat([words, tokens.flatten(0, 1).to(words.dtype)]).index_select(0, sources),
        positions=positions,
        segments=segments,
        groups=layout.groups,
        cls_rows=starts,
        caption_rows=starts[:0],
    )
    cls_groups = layout.groups[: layout.num_cls_groups]
    return Mixture(packed, cls_groups, asking, places_there, tuple(len(rows) for rows in wanted))


def _spans(kinds: Sequence[Sequences]) -> _Spans:
    columns, pieces_before = [], 0
    for kind in kinds:
        columns.append(_spans_of(kind, pieces_before))
        pieces_before += 0 if kind.captions is None else len(kind.captions.ids)
    return _Spans(*(np.concatenate(column) for column in zip(*columns, strict=True)))


def _spans_of(kind: Sequences, pieces_before: int) -> _Spans:
    if kind.captions is None:
        assert kind.image_index is not None, "a sequence needs a caption or an image"
        nothing = np.zeros(len(kind.image_index), np.int64)
        return _Spans(nothing, nothing, nothing.astype(bool), kind.image_index.numpy())
    lengths = kind.captions.lengths.numpy()
    first = pieces_before + lengths.cumsum() - lengths
    if kind.caption_index is not None:
        lengths, first = lengths[kind.caption_index.numpy()], first[kind.caption_index.numpy()]
    images = np.full(len(lengths), -1) if kind.image_index is None else kind.image_index.numpy()
    return _Spans(lengths, first, np.ones(len(lengths), bool), images)


def _slices(kinds: Sequence[Sequences]) -> list[slice]:
    """Which sequences each kind has."""
    counts = [len(_spans_of(kind, 0).lengths) for kind in kinds]
    ends = np.cumsum(counts).tolist()
    return [slice(end - count, end) for end, count in zip(ends, counts, strict=True)]


@dataclass(frozen=True)
class _Layout:
    """Where the rows of all sequences lie."""

    spans: _Spans
    num_tokens: int
    starts: np.ndarray
    """[Q] row of each sequence's [CLS]."""
    sequences: np.ndarray
    """[T] sequence of each row."""
    positions: np.ndarray
    """[T] position within it."""
    groups: tuple[Group, ...]
    num_cls_groups: int
    """Groups, the first ones, of which the [CLS] alone asks in the last layer."""

    @classmethod
    def of(cls, spans: _Spans, num_tokens: int, asks_whole: np.ndarray) -> _Layout:
        lengths = 1 + np.where(spans.has_caption, spans.lengths + 1, 0) + np.where(spans.images >= 0, num_tokens + 1, 0)
        order = np.lexsort((lengths, asks_whole))
        ordered, whole = lengths[order], asks_whole[order]
        starts = np.empty_like(lengths)
        starts[order] = ordered.cumsum() - ordered
        firsts = np.flatnonzero(np.diff(ordered, prepend=-1) | np.diff(whole, prepend=False))
        counts = np.diff(firsts, append=len(order))
        runs = zip(starts[order][firsts].tolist(), counts.tolist(), ordered[firsts].tolist(), strict=True)
        sequences = np.repeat(order, ordered)
        positions = np.arange(len(sequences)) - starts[sequences]
        num_cls_groups = int((~whole[firsts]).sum())
        groups = tuple(Group(*run) for run in runs)
        return cls(spans, num_tokens, starts, sequences, positions, groups, num_cls_groups)

    @property
    def _num_cls(self) -> tuple[int, int]:
        """Sequences and rows of the first groups."""
        first = self.groups[: self.num_cls_groups]
        return sum(group.sequences for group in first), sum(group.sequences * group.length for group in first)

    @property
    def asking(self) -> np.ndarray:
        """[A] rows that ask in the last layer."""
        num_cls, num_rows = self._num_cls
        return np.concatenate([np.sort(self.starts)[:num_cls], np.arange(num_rows, len(self.positions))])

    def places(self, rows: np.ndarray) -> np.ndarray:
        """Where `rows`, all of them asking, stand among the asking rows."""
        num_cls, num_rows = self._num_cls
        cls_place = np.searchsorted(self.asking[:num_cls], rows)
        return np.where(rows < num_rows, cls_place, rows - num_rows + num_cls)

    @property
    def first_tokens(self) -> np.ndarray:
        """[Q] position of the first vision token, where a sequence has any."""
        return 1 + np.where(self.spans.has_caption, self.spans.lengths + 1, 0)

    @property
    def segments(self) -> np.ndarray:
        """[T] 1 from the first vision token on."""
        return (self.positions >= self.first_tokens[self.sequences]).astype(np.int64)

    def sources(self, num_words: int) -> np.ndarray:
        """[T] what each row holds: 0 [CLS], 1 [SEP], from 2 on the captions' word pieces, from num_words on the images'
        tokens."""
        first_pieces, images = self.spans.first_pieces[self.sequences], self.spans.images[self.sequences]
        token = self.positions - self.first_tokens[self.sequences]
        is_piece = (self.positions > 0) & (self.positions <= self.spans.lengths[self.sequences])
        is_token = (images >= 0) & (token >= 0) & (token < self.num_tokens)
        words = np.where(self.positions == 0, 0, np.where(is_piece, 1 + self.positions + first_pieces, 1))
        return np.where(is_token, num_words + images * self.num_tokens + token, words)

    def wanted(self, kind: Sequences, part: slice) -> np.ndarray:
        """Rows of a kind's wanted states; part: its sequences."""
        starts = self.starts[part]
        if kind.wanted_pieces is None:
            return starts
        lengths = self.spans.lengths[part]
        within = np.arange(lengths.sum()) - np.repeat(lengths.cumsum() - lengths, lengths)
        return (np.repeat(starts + 1, lengths) + within)[kind.wanted_pieces.numpy()]
