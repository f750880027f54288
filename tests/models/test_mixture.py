"""Sequences of all kinds in one input, against the inputs that packing.py makes of each kind alone."""

import pytest
import torch

from models.encoder.mixture import Sequences, pack_mixture
from models.encoder.packing import SpecialTokens, pack_captions, pack_images, pack_pairs
from models.language.captions import CaptionIds

SPECIAL = SpecialTokens(cls_id=1, sep_id=2)
WORDS = torch.randn(30, 4, generator=torch.Generator().manual_seed(0))


def make_captions(generator: torch.Generator, count: int) -> CaptionIds:
    lengths = torch.randint(0, 6, (count,), generator=generator)
    return CaptionIds(torch.randint(3, 30, (int(lengths.sum()),), generator=generator), lengths)


def rows_of(packed, cls_row: int, length: int) -> list[torch.Tensor]:
    rows = slice(cls_row, cls_row + length)
    return [packed.embeddings[rows], packed.positions[rows], packed.segments[rows]]


@pytest.mark.parametrize("seed", range(5))
def test_each_sequence_is_laid_out_as_in_an_input_of_its_kind_alone(seed):
    generator = torch.Generator().manual_seed(seed)
    captions, others = make_captions(generator, 5), make_captions(generator, 3)
    tokens = torch.randn(3, 2, 4, generator=generator)
    caption_index, image_index = torch.randint(0, 3, (2, 8), generator=generator)
    three = torch.arange(3)
    mixture = pack_mixture(
        WORDS,
        SPECIAL,
        tokens,
        [
            Sequences(captions, caption_index, image_index),
            Sequences(others, image_index=three, wanted_pieces=others.ids % 2 == 0),
            Sequences(captions),
            Sequences(image_index=three),
        ],
    )
    alone = [
        pack_pairs(WORDS, SPECIAL, captions, tokens, caption_index, image_index),
        pack_pairs(WORDS, SPECIAL, others, tokens, three, three),
        pack_captions(WORDS, SPECIAL, captions),
        pack_images(WORDS, SPECIAL, tokens),
    ]
    assert len(mixture.packed.positions) == sum(len(packed.positions) for packed in alone)
    starts = mixture.packed.cls_rows.tolist()
    for packed in alone:
        lengths = {row: g.length for g in packed.groups for row in range(g.start, g.rows.stop, g.length)}
        for cls_row in packed.cls_rows.tolist():
            found = rows_of(mixture.packed, starts.pop(0), lengths[cls_row])
            assert all(map(torch.equal, found, rows_of(packed, cls_row, lengths[cls_row])))
    pairs, pieces, texts, images = mixture.asking[mixture.wanted].split(mixture.counts)
    assert torch.equal(mixture.packed.embeddings[pieces], WORDS[others.ids[others.ids % 2 == 0]])
    cls_of_others = mixture.packed.cls_rows[8:11]
    assert torch.equal(torch.cat([pairs, cls_of_others, texts, images]), mixture.packed.cls_rows)
    # Only the masked captions' sequences ask whole: they lie behind the others.
    num_rows = sum(group.sequences * group.length for group in mixture.cls_groups)
    assert mixture.packed.cls_rows.sort().values[-3] == num_rows == cls_of_others.min()
    assert torch.equal(mixture.asking[16:], torch.arange(num_rows, len(mixture.packed.positions)))


def test_groups_are_runs_of_equal_length_shortest_first():
    captions = CaptionIds(torch.arange(3, 9), torch.tensor([2, 0, 4]))
    tokens = torch.randn(2, 2, 4)
    kinds = [
        Sequences(captions, image_index=torch.tensor([0, 1, 1])),
        Sequences(captions),
        Sequences(image_index=torch.arange(2)),
    ]
    packed = pack_mixture(WORDS, SPECIAL, tokens, kinds).packed
    # joint 7, 5, 9 rows; text only 4, 2, 6; vision only 4, 4
    assert [(g.start, g.sequences, g.length) for g in packed.groups] == [
        (0, 1, 2), (2, 3, 4), (14, 1, 5), (19, 1, 6), (25, 1, 7), (32, 1, 9)
    ]  # fmt: skip
    assert packed.cls_rows.tolist() == [25, 14, 32, 2, 0, 19, 6, 10]


def test_tokens_of_a_store_are_taken_in_the_dtype_of_the_words_and_gradients_reach_both():
    words, tokens = WORDS.clone().requires_grad_(), torch.randn(2, 2, 4).half().requires_grad_()
    kinds = [Sequences(CaptionIds(torch.tensor([5, 6]), torch.tensor([2])), image_index=torch.tensor([1]))]
    packed = pack_mixture(words, SPECIAL, tokens, kinds).packed
    assert packed.embeddings.dtype == torch.float32
    packed.embeddings.sum().backward()
    assert words.grad[:, 0].tolist() == [0, 1, 2, 0, 0, 1, 1] + [0] * 23
    assert tokens.grad[:, :, 0].tolist() == [[0, 0], [1, 1]]
