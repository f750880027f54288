"""An imported checkpoint reproduces what the public implementation computed for it (tests/parity/README.md)."""

import json

import pytest
import torch
from safetensors.torch import load_file

from models.edje import EDJE
from models.language.captions import CaptionIds, canonical_caption
from tests.parity.published_case import CASES, PARITY, PublishedCase, assert_close


@pytest.fixture(scope="module", params=CASES)
def case(request) -> PublishedCase:
    return PublishedCase(request.param)


@pytest.fixture(autouse=True)
def no_gradients():
    with torch.no_grad():
        yield


def test_captions_are_cleaned_alike(case):
    assert [canonical_caption(raw) for raw in case.raw_captions] == case.json["captions"]


@pytest.mark.parametrize(("kind", "max_pieces"), [("joint", 61), ("text", 62)])
def test_word_pieces_are_the_same(case, kind, max_pieces):
    ids = case.model.tokenizer(case.raw_captions, max_pieces)
    rows = case.inputs[f"{kind}_input_ids"]
    sep = case.model.tokenizer.sep_id
    theirs = [row[1 : row.tolist().index(sep)] for row in rows]
    assert ids.lengths.tolist() == [len(row) for row in theirs]
    assert torch.equal(ids.ids, torch.cat(theirs))


def test_vision_tokens_are_the_same(case):
    assert_close(case.model.compress(case.inputs["patch_tokens"]), case.expected["vision_tokens"])


def test_hidden_states_of_every_token_are_the_same(case):
    captions = case.joint_pieces()
    packed = case.pack_own_pairs(captions, case.model.compress(case.inputs["patch_tokens"]))
    hidden = case.model.encoder.encode(packed)
    lengths = case.inputs["joint_attention_mask"].sum(1)
    for row, length, expected in zip(packed.cls_rows, lengths, case.expected["joint_last_hidden"], strict=True):
        assert_close(hidden[row : row + length], expected[:length])


def test_pooled_states_are_the_same(case):
    captions = case.joint_pieces()
    packed = case.pack_own_pairs(captions, case.model.compress(case.inputs["patch_tokens"]))
    pooled = case.model.match_head.pool(case.model.encoder.encode_cls(packed))
    assert_close(pooled, case.expected["joint_pooled"])


def test_match_logits_of_own_pairs_are_the_same(case):
    tokens = case.model.compress(case.inputs["patch_tokens"])
    assert_close(case.model.score(case.raw_captions, tokens), case.expected["positive_logits"])


def test_match_logits_of_all_pairs_are_the_same(case):
    tokens = case.model.compress(case.inputs["patch_tokens"])
    size = len(tokens)
    captions, images = torch.arange(size).repeat_interleave(size), torch.arange(size).repeat(size)
    logits = case.model.match_logits(case.model.tokenizer(case.raw_captions), tokens, captions, images)
    assert_close(logits.view(size, size), case.expected["pair_logits"])


def test_mlm_logits_are_the_same(case):
    captions = case.joint_pieces()
    masked = case.masked_pieces()
    captions = CaptionIds(captions.ids.masked_fill(masked, case.model.tokenizer.mask_id), captions.lengths)
    packed = case.pack_own_pairs(captions, case.model.compress(case.inputs["patch_tokens"]))
    hidden = case.model.encoder.encode(packed, packed.caption_rows[masked])
    assert_close(case.model.encoder.mlm_logits(hidden), case.expected["mlm_logits"])


def test_recovered_text_embeddings_are_the_same(case):
    text_cls = case.model.text_cls(case.model.tokenizer(case.raw_captions))
    assert_close(text_cls, case.expected["text_last_hidden"][:, 0])
    assert_close(case.model.recover_text_embedding(text_cls), case.expected["text_projected"])


def test_logits_survive_saving_and_loading(case, tmp_path):
    case.model.save_pretrained(tmp_path / "imported")
    again = EDJE.from_pretrained(tmp_path / "imported")
    tokens = again.compress(case.inputs["patch_tokens"])
    assert_close(again.score(case.raw_captions, tokens), case.expected["positive_logits"])


def test_gallery_logits_are_the_same():
    case = PublishedCase("tiny_m4")
    gallery = load_file(PARITY / "tiny_m4" / "retrieval.safetensors")
    captions = json.loads((PARITY / "tiny_m4" / "retrieval.json").read_text())["captions"]
    ids, tokens = case.model.tokenizer(captions), case.model.compress(gallery["patch_tokens"])
    for direction in ("t2i", "i2t"):
        pool = gallery[f"{direction}_top_k"]
        queries = torch.arange(len(pool)).repeat_interleave(pool.shape[1])
        pair = (queries, pool.flatten()) if direction == "t2i" else (pool.flatten(), queries)
        logits = case.model.match_logits(ids, tokens, *pair)
        assert_close(logits.view(pool.shape), gallery[f"{direction}_logits"])
