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


class _Layout(NamedTuple):
    """Where sequences of given lengths go: starts [Q] (caller's order), per row its sequence and position [T]."""

    starts: Tensor
    sequences: Tensor
    positions: Tensor
    groups: tuple[Group, ...]


def _lay_out(lengths: Tensor) -> _Layout:
    """Shortest first, ties in the caller's order. The one place where a GPU waits: groups are Python numbers."""
    ordered, order = lengths.sort(stable=True)
    ends = ordered.cumsum(0)
    starts = torch.empty_like(lengths).index_copy_(0, order, ends - ordered)
    values, counts = torch.stack(torch.unique_consecutive(ordered, return_counts=True)).tolist()
    groups, start = [], 0
    for length, count in zip(values, counts, strict=True):
        groups.append(Group(start, count, length))
        start += count * length
    sequences = order.repeat_interleave(ordered, output_size=start)
    positions = torch.arange(start, device=lengths.device) - starts[sequences]
    return _Layout(starts, sequences, positions, tuple(groups))


def _place(layout: _Layout, word_table: Tensor, words: Tensor, word_rows: Tensor) -> Tensor:
    """Word embeddings [T, H] with `words` at `word_rows`, the other rows not set."""
    embedded = F.embedding(words, word_table)
    return embedded.new_empty(len(layout.positions), embedded.shape[1]).index_copy_(0, word_rows, embedded)


def _caption_rows(starts: Tensor, captions: CaptionIds) -> Tensor:
    """Row of every piece, behind its sequence's [CLS]: [sum of lengths], in the order of captions.ids."""
    first_piece = captions.lengths.cumsum(0) - captions.lengths
    shift = (starts + 1 - first_piece).repeat_interleave(captions.lengths, output_size=len(captions.ids))
    return torch.arange(len(captions.ids), device=starts.device) + shift


def pack_pairs(
    word_table: Tensor,
    special: SpecialTokens,
    captions: CaptionIds,
    tokens: Tensor,
    caption_index: Tensor,
    image_index: Tensor,
) -> PackedInput:
    """Q pairs of C captions and N images: word_table [V, H], tokens [N, m, H], indices [Q] int64."""
    captions = captions.select(caption_index)
    num_tokens = tokens.shape[1]
    layout = _lay_out(captions.lengths + num_tokens + 3)
    starts, first_sep = layout.starts, layout.starts + captions.lengths + 1
    caption_rows = _caption_rows(starts, captions)
    words = torch.cat(
        [starts.new_full(starts.shape, special.cls_id), starts.new_full((2 * len(starts),), special.sep_id)]
    )
    word_rows = torch.cat([starts, first_sep, first_sep + num_tokens + 1, caption_rows])
    embeddings = _place(layout, word_table, torch.cat([words, captions.ids]), word_rows)
    token_rows = first_sep.unsqueeze(1) + 1 + torch.arange(num_tokens, device=starts.device)
    vision = tokens[image_index].flatten(0, 1).to(embeddings.dtype)
    return PackedInput(
        embeddings=embeddings.index_copy_(0, token_rows.flatten(), vision),
        positions=layout.positions,
        segments=(layout.positions >= (captions.lengths + 2)[layout.sequences]).long(),
        groups=layout.groups,
        cls_rows=starts,
        caption_rows=caption_rows,
    )


def pack_captions(word_table: Tensor, special: SpecialTokens, captions: CaptionIds) -> PackedInput:
    """C captions without an image, one sequence each."""
    layout = _lay_out(captions.lengths + 2)
    starts = layout.starts
    caption_rows = _caption_rows(starts, captions)
    words = torch.cat([starts.new_full(starts.shape, i) for i in (special.cls_id, special.sep_id)] + [captions.ids])
    word_rows = torch.cat([starts, starts + captions.lengths + 1, caption_rows])
    return PackedInput(
        embeddings=_place(layout, word_table, words, word_rows),
        positions=layout.positions,
        segments=torch.zeros_like(layout.positions),
        groups=layout.groups,
        cls_rows=starts,
        caption_rows=caption_rows,
    )


def pack_images(word_table: Tensor, special: SpecialTokens, tokens: Tensor) -> PackedInput:
    """N images without a caption, one sequence each: tokens [N, m, H]."""
    count, num_tokens, _ = tokens.shape
    frame = F.embedding(torch.tensor([special.cls_id, special.sep_id], device=tokens.device), word_table)
    cls, sep = frame[:, None, None].expand(2, count, 1, -1)
    length = num_tokens + 2
    positions = torch.arange(length, device=tokens.device).repeat(count)
    return PackedInput(
        embeddings=torch.cat([cls, tokens.to(cls.dtype), sep], dim=1).flatten(0, 1),
        positions=positions,
        segments=(positions > 0).long(),
        groups=(Group(0, count, length),),
        cls_rows=torch.arange(0, count * length, length, device=tokens.device),
        caption_rows=positions.new_empty(0),
    )
