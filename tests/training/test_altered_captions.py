"""Altered captions: one attribute or relation changed, never to a word of the same meaning; and their loss."""

import math

import numpy as np
import pytest
import torch

from models.errors import UserError
from models.language.captions import CaptionTokenizer, build_vocabulary
from training.altered_captions import CaptionAlterer
from training.losses import altered_captions_loss

WORDS = ((("large", "big"), ("small", "little")), (("left",), ("right",)), (("above", "over"), ("below", "under")))
CAPTIONS = [
    "a large ball left of a small cube",
    "big ball over a large cube",
    "a small cube under a big star left of a little ball",
    "a ball",
    "a cube left of a ball",
]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory) -> CaptionTokenizer:
    path = tmp_path_factory.mktemp("vocabulary") / "vocab.txt"
    build_vocabulary([*CAPTIONS, "big small little left right above over below under beside"], path)
    return CaptionTokenizer.from_pretrained(path)


def alter(tokenizer, captions, seed=0):
    streams = [np.random.default_rng([seed, row]) for row in range(len(captions))]
    altered, changed = CaptionAlterer(WORDS, tokenizer, "key")(tokenizer(captions), streams)
    words = {number: word for word, number in tokenizer.vocab.items()}
    parts = altered.ids.split(altered.lengths.tolist())
    return [" ".join(words[int(i)] for i in part) for part in parts], changed.tolist()


def meaning(word: str):
    found = [(g, m) for g, group in enumerate(WORDS) for m, words in enumerate(group) if word in words]
    return found[0] if found else word


def test_words_of_one_group_come_to_mean_something_else_and_all_else_stays(tokenizer):
    seen = set()
    for seed in range(40):
        for caption, altered, changed in zip(CAPTIONS, *alter(tokenizer, CAPTIONS, seed), strict=True):
            assert changed == (caption != "a ball") == (altered != caption)
            pairs = list(zip(caption.split(), altered.split(), strict=True))
            different = [(meaning(a), meaning(b)) for a, b in pairs if a != b]
            assert all(old != new and old[0] == new[0] for old, new in different)
            assert len({old[0] for old, _ in different}) == changed
            if len(different) == 2:  # two words changed places
                assert sorted(caption.split()) == sorted(altered.split())
            seen |= {(caption, old[0]) for old, _ in different}
    # Every group of every caption was drawn at some time.
    groups = {(c, meaning(w)[0]) for c in CAPTIONS for w in c.split() if isinstance(meaning(w), tuple)}
    assert seen == groups


def test_different_meanings_change_places_and_equal_ones_are_replaced(tokenizer):
    found = {alter(tokenizer, CAPTIONS[:2], seed)[0][0] for seed in range(20)}
    assert found == {"a small ball left of a large cube", "a large ball right of a small cube"}
    found = {alter(tokenizer, ["a big ball beside a large cube"], seed)[0][0] for seed in range(60)}
    small = ("small", "little")
    assert found == {f"a {w} ball beside a large cube" for w in small} | {
        f"a big ball beside a {w} cube" for w in small
    }


def test_a_caption_is_altered_by_its_own_stream_alone(tokenizer):
    captions, streams = tokenizer(CAPTIONS), [np.random.default_rng(row) for row in range(5)]
    whole, _ = CaptionAlterer(WORDS, tokenizer, "key")(captions, streams)
    part, changed = CaptionAlterer(WORDS, tokenizer, "key")(
        captions.select(torch.tensor([3, 1])), [np.random.default_rng(row) for row in (3, 1)]
    )
    assert torch.equal(part.ids, whole.select(torch.tensor([3, 1])).ids) and changed.tolist() == [False, True]
    assert torch.equal(captions.ids, tokenizer(CAPTIONS).ids)  # the original is left alone


@pytest.mark.parametrize(
    "words, message",
    [
        ([[["left"]]], "has no other meaning to change to"),
        ([[["left"], ["left", "right"]]], "left occurs twice"),
        ([[["left"], ["rightmost"]]], "rightmost is no whole word"),
    ],
)
def test_word_groups_that_cannot_be_used_are_refused_by_name(tokenizer, words, message):
    with pytest.raises(UserError, match=f"^objectives.altered_words: .*{message}"):
        CaptionAlterer(words, tokenizer, "objectives.altered_words")


def test_the_loss_is_the_cross_entropy_of_each_pair():
    positive, altered = torch.tensor([2.0, -1.0]), torch.tensor([0.5, 3.0])
    expected = sum(-math.log(math.exp(p) / (math.exp(p) + math.exp(a))) for p, a in [(2, 0.5), (-1, 3)])
    assert altered_captions_loss(positive, altered).item() == pytest.approx(expected, rel=1e-6)
