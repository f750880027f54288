"""The joint encoder's input: all sequences of a batch in one [T, H] tensor, without any padding.

Sequences lie ordered by length, equal lengths together, so that attention is one batched call per length on a CPU, one
in all on a GPU (attention.py), and everything else in the encoder runs on T rows at once. Packing is index arithmetic
on whole tensors: no Python loop over pairs. Letters: C captions, N images, Q sequences (pairs), m vision tokens, H
width, T rows in all, L length of a sequence.

    joint       [CLS] caption [SEP] v1 .. vm [SEP]     segments 0 .. 0 1 .. 1, positions 0 .. L-1 counted through
    text only   [CLS] caption [SEP]                    segments 0
    vision only [CLS] v1 .. vm [SEP]                   segments 0 1 .. 1
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from ..language.captions import CaptionIds


class Group(NamedTuple):
    """`sequences` sequences of `length` rows each, one behind the other from row `start`."""

    start: int
    sequences: int
    length: int

    @property
    def rows(self) -> slice:
        return slice(self.start, self.start + self.sequences * self.length)


@dataclass(frozen=True)
class PackedInput:
    """Q sequences in T rows. 64 pairs of 10 pieces and 64 vision tokens: T = 64 * 77 = 4,928.

    `cls_rows` and `caption_rows` are in the caller's order, whatever the order of the rows."""

    embeddings: Tensor
    """[T, H] word embeddings, vision tokens put in; positions, segments and norm are the encoder's part."""
    positions: Tensor
    """[T] int64, 0 at each [CLS]."""
    segments: Tensor
    """[T] int64, 0 or 1."""
    groups: tuple[Group, ...]
    """Runs of sequences of equal length, shortest first; together they are all T rows."""
    cls_rows: Tensor
    """[Q] int64: row of each sequence's [CLS]."""
    caption_rows: Tensor
    """[sum of caption lengths] int64: rows of the captions' pieces, sequence by sequence."""

    def parts(self, max_rows: int) -> list[PackedInput]:
        """The same sequences in runs of at most `max_rows` rows (but at least one sequence), in the order of the
        rows; each part counts its rows from 0, its `cls_rows` rise, and it has no `caption_rows`."""
        runs: list[list[Group]] = []
        filled = max_rows  # the first sequence opens the first run
        for start, count, length in self.groups:
            while count:
                if filled + length > max_rows:
                    runs.append([])
                    filled = 0
                taken = min(count, max(1, (max_rows - filled) // length))
                runs[-1].append(Group(start, taken, length))
                start, count, filled = start + taken * length, count - taken, filled + taken * length
        return [self._part(run) for run in runs]

    def _part(self, groups: list[Group]) -> PackedInput:
        first = groups[0].start
        rows = slice(first, groups[-1].rows.stop)
        cls_rows = [torch.arange(g.start - first, g.rows.stop - first, g.length) for g in groups]
        return PackedInput(
            embeddings=self.embeddings[rows],
            positions=self.positions[rows],
            segments=self.segments[rows],
            groups=tuple(group._replace(start=group.start - first) for group in groups),
            cls_rows=torch.cat(cls_rows).to(self.positions.device),
            caption_rows=self.caption_rows[:0],
        )


@dataclass(frozen=True)
class SpecialTokens:
    """Word ids that frame a sequence."""

    cls_id: int
    sep_id: int


class Spans(NamedTuple):
    """What each of Q sequences holds, [Q] each, on one device."""

    lengths: Tensor
    """int64: word pieces of its caption."""
    first_pieces: Tensor
    """int64: where these begin among all captions' pieces."""
    has_caption: Tensor
    """bool: whether it has a caption, which may be empty."""
    images: Tensor
    """int64: its image, -1 where it has none."""

    def first_tokens(self) -> Tensor:
        """[Q] position of the first vision token, behind [CLS] and, where there is a caption, its pieces and [SEP]."""
        return 1 + torch.where(self.has_caption, self.lengths + 1, 0)

    def rows(self, num_tokens: int) -> Tensor:
        """[Q] rows of each sequence: where there is an image, its tokens and a [SEP] end it."""
        return self.first_tokens() + torch.where(self.images >= 0, num_tokens + 1, 0)


@dataclass(frozen=True)
class Layout:
    """Where the rows of Q sequences lie, and what each of the T rows holds: all that knows the forms above."""

    spans: Spans
    num_tokens: int
    starts: Tensor
    """[Q] int64 row of each sequence's [CLS], in the caller's order."""
    sequences: Tensor
    """[T] int64 sequence of each row."""
    positions: Tensor
    """[T] int64 position within it."""
    groups: tuple[Group, ...]

    @classmethod
    def of(cls, spans: Spans, num_tokens: int, last: Tensor | None = None) -> Layout:
        """Shortest first, ties in the caller's order; sequences that `last` [Q] bool names come behind all others.

        The one place where a GPU waits: groups are Python numbers."""
        lengths = spans.rows(num_tokens)
        bound = 1 if last is None else max(lengths.tolist()) + 1
        keys, order = (lengths if last is None else lengths + bound * last).sort(stable=True)
        ordered = lengths[order]
        starts = torch.empty_like(lengths).index_copy_(0, order, ordered.cumsum(0) - ordered)
        runs, counts = torch.stack(torch.unique_consecutive(keys, return_counts=True)).tolist()
        groups, start = [], 0
        for run, count in zip(runs, counts, strict=True):
            groups.append(Group(start, count, run if last is None else run % bound))
            start = groups[-1].rows.stop
        sequences = order.repeat_interleave(ordered, output_size=start)
        positions = torch.arange(start, device=lengths.device) - starts[sequences]
        return cls(spans, num_tokens, starts, sequences, positions, tuple(groups))

    def segments(self) -> Tensor:
        """[T] int64: 1 from the first vision token on."""
        return (self.positions >= self.spans.first_tokens()[self.sequences]).long()

    def sources(self, num_words: int) -> Tensor:
        """[T] int64: what each row holds, by its place in a table of `num_words` words and the images' tokens behind
        them. Words are [CLS], [SEP], then the captions' pieces."""
        first_pieces, images = self.spans.first_pieces[self.sequences], self.spans.images[self.sequences]
        token = self.positions - self.spans.first_tokens()[self.sequences]
        is_piece = (self.positions > 0) & (self.positions <= self.spans.lengths[self.sequences])
        is_token = (images >= 0) & (token >= 0) & (token < self.num_tokens)
        # A row that is neither [CLS], a piece nor a token is a [SEP].
        words = torch.where(is_piece, 1 + self.positions + first_pieces, (self.positions > 0).long())
        return torch.where(is_token, num_words + images * self.num_tokens + token, words)

    def caption_rows(self, count: int, chosen: slice = slice(None)) -> Tensor:
        """Rows of the captions' pieces, sequence by sequence, of the chosen sequences: [count], the sum of lengths."""
        lengths, starts = self.spans.lengths[chosen], self.starts[chosen]
        within = torch.arange(count, device=lengths.device)
        shift = starts + 1 - (lengths.cumsum(0) - lengths)
        return within + shift.repeat_interleave(lengths, output_size=count)


def fill(word_table: Tensor, ids: Tensor, tokens: Tensor, sources: Tensor) -> Tensor:
    """The rows that `sources` [T] name: ids [W] words, tokens [N, m, H] of any dtype -> [T, H]. Carries gradients."""
    words, vision = F.embedding(ids, word_table), tokens.flatten(0, 1)
    if torch.promote_types(words.dtype, vision.dtype) != words.dtype:  # else cat converts without a copy in between
        vision = vision.to(words.dtype)
    return torch.cat([words, vision]).index_select(0, sources)


def with_frame(special: SpecialTokens, captions: CaptionIds | None, device: torch.device) -> Tensor:
    """Words as Layout.sources counts them: [CLS], [SEP], the captions' pieces."""
    frame = torch.tensor([special.cls_id, special.sep_id], device=device)
    return frame if captions is None else torch.cat([frame, captions.ids])


def pack_pairs(
    word_table: Tensor,
    special: SpecialTokens,
    captions: CaptionIds,
    tokens: Tensor,
    caption_index: Tensor,
    image_index: Tensor,
) -> PackedInput:
    """Q pairs of C captions and N images: word_table [V, H], tokens [N, m, H], indices [Q] int64."""
    lengths, first_pieces = captions.lengths[caption_index], captions.offsets[caption_index]
    spans = Spans(lengths, first_pieces, torch.ones_like(lengths, dtype=torch.bool), image_index)
    return _packed(word_table, special, captions, tokens, spans)


def pack_captions(word_table: Tensor, special: SpecialTokens, captions: CaptionIds) -> PackedInput:
    """C captions without an image, one sequence each."""
    lengths = captions.lengths
    ones = torch.ones_like(lengths, dtype=torch.bool)
    spans = Spans(lengths, captions.offsets[:-1], ones, torch.full_like(lengths, -1))
    return _packed(word_table, special, captions, word_table.new_empty(0, 0, word_table.shape[1]), spans)


def pack_images(word_table: Tensor, special: SpecialTokens, tokens: Tensor) -> PackedInput:
    """N images without a caption, one sequence each: tokens [N, m, H]."""
    images = torch.arange(len(tokens), device=tokens.device)
    nothing = torch.zeros_like(images)
    return _packed(word_table, special, None, tokens, Spans(nothing, nothing, nothing.bool(), images))


def _packed(
    word_table: Tensor, special: SpecialTokens, captions: CaptionIds | None, tokens: Tensor, spans: Spans
) -> PackedInput:
    layout = Layout.of(spans, tokens.shape[1])
    ids = with_frame(special, captions, word_table.device)
    return PackedInput(
        embeddings=fill(word_table, ids, tokens, layout.sources(len(ids))),
        positions=layout.positions,
        segments=layout.segments(),
        groups=layout.groups,
        cls_rows=layout.starts,
        caption_rows=layout.caption_rows(int(spans.lengths.sum())),
    )
