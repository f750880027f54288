"""Where each token of a packed input lies, against the plainest loop that could be right."""

import pytest
import torch

from models.encoder.packing import PackedInput, SpecialTokens, pack_captions, pack_images, pack_pairs
from models.language.captions import CaptionIds

SPECIAL = SpecialTokens(cls_id=1, sep_id=2)
WORDS = torch.randn(30, 4, generator=torch.Generator().manual_seed(0))


def make_inputs(seed: int):
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(0, 6, (5,), generator=generator)
    captions = CaptionIds(torch.randint(3, 30, (int(lengths.sum()),), generator=generator), lengths)
    tokens = torch.randn(3, 2, 4, generator=generator)
    index = torch.randint(0, 3, (2, 8), generator=generator)
    return captions, tokens, index[0], index[1]


def caption(captions: CaptionIds, index: int) -> list[int]:
    return captions.ids[captions.offsets[index] : captions.offsets[index + 1]].tolist()


def check_sequences(packed: PackedInput, expected: list[torch.Tensor], segments: list[list[int]]):
    """Each sequence lies whole behind its [CLS] row, sequences fill the rows, groups tell their lengths."""
    assert packed.embeddings.shape == (sum(map(len, expected)), 4)
    assert sorted(packed.cls_rows.tolist()) == [
        row for group in packed.groups for row in range(group.start, group.rows.stop, group.length)
    ]
    lengths = [group.length for group in packed.groups]
    assert lengths == sorted(set(lengths)) and packed.groups[-1].rows.stop == len(packed.embeddings)
    for start, sequence, segment in zip(packed.cls_rows.tolist(), expected, segments, strict=True):
        rows = slice(start, start + len(sequence))
        assert torch.equal(packed.embeddings[rows], sequence)
        assert packed.positions[rows].tolist() == list(range(len(sequence)))
        assert packed.segments[rows].tolist() == segment


@pytest.mark.parametrize("seed", range(5))
def test_pairs_are_cls_caption_sep_vision_sep(seed):
    captions, tokens, caption_index, image_index = make_inputs(seed)
    packed = pack_pairs(WORDS, SPECIAL, captions, tokens, caption_index, image_index)
    expected, segments, pieces = [], [], []
    for c, i in zip(caption_index.tolist(), image_index.tolist(), strict=True):
        text = caption(captions, c)
        expected.append(torch.cat([WORDS[[1, *text, 2]], tokens[i], WORDS[[2]]]))
        segments.append([0] * (len(text) + 2) + [1] * 3)
        pieces += text
    check_sequences(packed, expected, segments)
    assert torch.equal(packed.embeddings[packed.caption_rows], WORDS[pieces])


@pytest.mark.parametrize("seed", range(3))
def test_captions_are_cls_caption_sep(seed):
    captions = make_inputs(seed)[0]
    packed = pack_captions(WORDS, SPECIAL, captions)
    texts = [[1, *caption(captions, c), 2] for c in range(len(captions))]
    check_sequences(packed, [WORDS[text] for text in texts], [[0] * len(text) for text in texts])
    assert torch.equal(packed.embeddings[packed.caption_rows], WORDS[captions.ids])


def test_images_are_cls_vision_sep():
    tokens = make_inputs(0)[1]
    packed = pack_images(WORDS, SPECIAL, tokens)
    check_sequences(packed, [torch.cat([WORDS[[1]], image, WORDS[[2]]]) for image in tokens], [[0, 1, 1, 1]] * 3)


def test_tokens_of_a_store_are_taken_in_the_dtype_of_the_words():
    captions, tokens, caption_index, image_index = make_inputs(0)
    packed = pack_pairs(WORDS, SPECIAL, captions, tokens.half(), caption_index, image_index)
    assert packed.embeddings.dtype == torch.float32


@pytest.mark.parametrize("max_rows", [1, 9, 20, 1000])
def test_parts_are_the_rows_in_order_and_cut_no_sequence(max_rows):
    packed = pack_pairs(WORDS, SPECIAL, *make_inputs(1))
    parts = packed.parts(max_rows)
    assert torch.equal(torch.cat([part.embeddings for part in parts]), packed.embeddings)
    assert torch.equal(torch.cat([part.positions for part in parts]), packed.positions)
    assert torch.equal(torch.cat([part.segments for part in parts]), packed.segments)
    for part in parts:
        assert len(part.embeddings) <= max_rows or len(part.cls_rows) == 1
        assert torch.equal(part.cls_rows, (part.positions == 0).nonzero().squeeze(1))
        assert sum(group.sequences * group.length for group in part.groups) == len(part.embeddings)
