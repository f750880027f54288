"""Losses against plain loops, what gradients reach, and what a loss must not depend on."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from data.batches import random_stream
from data.caption_datasets import CaptionDataset
from data.neighbours import CaptionKeys
from models.config import ADAPTER_CONFIGS, BackboneConfig, BackboneDims, EDJEConfig, EncoderConfig
from models.distributed import DistributedContext
from models.edje import EDJE
from models.errors import UserError
from models.language.captions import CaptionTokenizer, build_vocabulary
from training.altered_captions import CaptionAlterer
from training.config import NegativesConfig, ObjectivesConfig
from training.features import StepInputs
from training.losses import (
    PairLogits,
    contrastive_loss,
    distillation_loss,
    group_distillation_loss,
    group_itm_loss,
    itm_loss,
    text_recovery_loss,
)
from training.objectives import ALTERED as ALTERED_STREAM
from training.objectives import Objectives

CAPTIONS = ["a red ball", "two dogs on a couch", "a red ball left of a cube", "a cat", "a blue cube", "one dog"]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    path = tmp_path_factory.mktemp("vocabulary") / "vocab.txt"
    build_vocabulary(CAPTIONS, path)
    return CaptionTokenizer.from_pretrained(path)


def build(tokenizer, kind="compression", residual=0.0) -> EDJE:
    torch.manual_seed(0)
    encoder = EncoderConfig(
        vocab_size=tokenizer.vocab_size,
        hidden_size=16,
        num_layers=2,
        num_heads=2,
        intermediate_size=24,
        max_positions=40,
    )
    config = EDJEConfig(
        backbone=BackboneConfig(),
        dims=BackboneDims(num_patches=9, patch_width=12, embedding_width=10),
        adapter=ADAPTER_CONFIGS[kind](num_tokens=3, mlp_width=20, num_heads=2),
        encoder=encoder,
        residual_similarity=residual,
    )
    return EDJE(config, tokenizer).eval()


def make_inputs(tokenizer, seed=0) -> StepInputs:
    generator = torch.Generator().manual_seed(seed)
    count = len(CAPTIONS)
    return StepInputs(
        rows=torch.arange(count),
        patch_tokens=torch.randn(count, 9, 12, generator=generator),
        image_embeddings=F.normalize(torch.randn(count, 10, generator=generator), dim=-1),
        text_embeddings=F.normalize(torch.randn(count, 10, generator=generator), dim=-1),
        captions=tokenizer(CAPTIONS),
        excluded=torch.eye(count, dtype=torch.bool),
        random_share=0.0,
    )


ALL = ObjectivesConfig(itm=1.0, mlm=1.0, text_recovery=1.0, itc=1.0)


def test_itm_is_the_mean_cross_entropy_of_each_positive_against_its_own_negatives():
    torch.manual_seed(1)
    logits = PairLogits(torch.randn(4), torch.randn(4, 2), torch.randn(4, 2))
    valid_images = torch.tensor([[True, True], [True, False], [False, False], [True, True]])
    valid_captions = torch.ones(4, 2, dtype=torch.bool)
    expected = 0.0
    for negatives, valid in ((logits.negative_images, valid_images), (logits.negative_captions, valid_captions)):
        for i in range(4):
            entries = [logits.positive[i].item(), *negatives[i][valid[i]].tolist()]
            expected += (math.log(sum(map(math.exp, entries))) - entries[0]) / 8
    assert itm_loss(logits, valid_images, valid_captions).item() == pytest.approx(expected, abs=1e-6)


def test_group_itm_is_cross_entropy_over_rows_and_columns_without_excluded_pairs():
    torch.manual_seed(2)
    logits, excluded = torch.randn(3, 4, 4), torch.rand(3, 4, 4) < 0.3
    expected = 0.0
    for group in range(3):
        for i in range(4):
            row = [logits[group, i, j] for j in range(4) if j == i or not excluded[group, i, j]]
            column = [logits[group, j, i] for j in range(4) if j == i or not excluded[group, j, i]]
            for entries in (row, column):
                expected += (torch.stack(entries).logsumexp(0) - logits[group, i, i]).item() / 24
    assert group_itm_loss(logits, excluded).item() == pytest.approx(expected, abs=1e-6)


def test_distillation_is_zero_gradient_where_student_equals_teacher():
    teacher = PairLogits(torch.randn(3), torch.randn(3, 2), torch.randn(3, 2))
    student = PairLogits(*(x.clone().requires_grad_() for x in vars(teacher).values()))
    valid = torch.ones(3, 2, dtype=torch.bool)
    distillation_loss(student, teacher, valid, valid).backward()
    for logits in vars(student).values():
        torch.testing.assert_close(logits.grad, torch.zeros_like(logits), atol=1e-7, rtol=0)


def test_group_distillation_ignores_excluded_pairs():
    torch.manual_seed(3)
    student, teacher = torch.randn(2, 3, 3), torch.randn(2, 3, 3)
    excluded = torch.zeros(2, 3, 3, dtype=torch.bool)
    excluded[0, 0, 1] = True
    changed = teacher.clone()
    changed[0, 0, 1] = 50.0
    assert group_distillation_loss(student, teacher, excluded) == group_distillation_loss(student, changed, excluded)


def test_text_recovery_depends_on_directions_alone():
    recovered, target = torch.randn(4, 6), torch.randn(4, 6)
    loss = text_recovery_loss(recovered, target)
    torch.testing.assert_close(loss, text_recovery_loss(3 * recovered, 0.2 * target))
    torch.testing.assert_close(text_recovery_loss(target, target), torch.tensor(0.0), atol=1e-6, rtol=0)


def test_contrast_is_clip_loss_where_nothing_is_excluded():
    images, texts = torch.randn(5, 8), torch.randn(5, 8)
    own, scale = torch.arange(5), torch.tensor(7.0)
    logits = scale * F.normalize(texts, dim=-1) @ F.normalize(images, dim=-1).T
    expected = (F.cross_entropy(logits, own) + F.cross_entropy(logits.T, own)) / 2
    loss = contrastive_loss(images, texts, images, texts, own, torch.eye(5, dtype=torch.bool), scale)
    torch.testing.assert_close(loss, expected)


@pytest.mark.parametrize("kind", ["compression", "local"])
def test_gradients_reach_adapter_encoder_and_every_head(tokenizer, kind):
    model = build(tokenizer, kind)
    losses = Objectives(ALL, NegativesConfig(), 0, DistributedContext())(model, make_inputs(tokenizer))
    assert set(losses.losses) == {"itm", "mlm", "text_recovery", "itc"}
    losses.total.backward()
    # Biases of keys and of the logit cancel in a softmax; similarity_log_weight is for the residual form.
    unreached = ("similarity_log_weight", "key.bias", "match_head.out.bias")
    without = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    assert all(name.endswith(unreached) for name in without), without


@pytest.mark.parametrize("mode", ["pairs", "groups"])
def test_a_true_match_in_the_batch_changes_no_match_loss(tokenizer, mode):
    """The logit of an excluded pair must not enter: make it huge through the image, and compare."""
    negatives = NegativesConfig(mode=mode, per_positive=2, group_size=3)
    only_itm = ObjectivesConfig(itm=1, mlm=0, text_recovery=0)
    inputs = make_inputs(tokenizer)
    inputs.excluded[:] = True
    losses = Objectives(only_itm, negatives, 0, DistributedContext())(build(tokenizer), inputs)
    torch.testing.assert_close(losses.losses["itm"], torch.tensor(0.0), atol=1e-6, rtol=0)


@pytest.mark.parametrize("mode", ["pairs", "groups"])
def test_another_retrievers_embeddings_choose_the_negatives_and_nothing_else(tokenizer, mode):
    """As if they were the backbone's own without residual; with it, the logits keep the backbone's cosine."""
    objectives = Objectives(ObjectivesConfig(mlm=0), NegativesConfig(mode=mode, group_size=3), 0, DistributedContext())
    own, other = make_inputs(tokenizer, seed=0), make_inputs(tokenizer, seed=7)
    mixed = replace(own, retriever_embeddings=(other.image_embeddings, other.text_embeddings))
    swapped = replace(own, image_embeddings=other.image_embeddings, text_embeddings=other.text_embeddings)
    for residual, same in ((0.0, True), (2.0, False)):
        model = build(tokenizer, residual=residual)
        itm = [objectives(model, inputs).losses["itm"].item() for inputs in (mixed, swapped, own)]
        assert (itm[0] == itm[1]) == same and itm[0] != itm[2]
        recovery = [objectives(model, inputs).losses["text_recovery"].item() for inputs in (mixed, own)]
        assert recovery[0] == recovery[1]


def test_only_objectives_with_a_weight_are_computed(tokenizer):
    config = ObjectivesConfig(itm=0, mlm=0.5, text_recovery=0)
    losses = Objectives(config, NegativesConfig(), 0, DistributedContext())(build(tokenizer), make_inputs(tokenizer))
    assert set(losses.losses) == {"mlm"}
    torch.testing.assert_close(losses.total, 0.5 * losses.losses["mlm"])


def test_mlm_masks_about_half_of_the_words_and_never_an_unknown_one(tokenizer):
    objectives = Objectives(ALL, NegativesConfig(), 0, DistributedContext())
    captions = tokenizer(["red ball dog cat cube couch" for _ in range(200)] + ["§ § § §"] * 20)
    masked = objectives._draw_mask(captions, torch.arange(220), tokenizer)
    assert 0.45 < masked[:1200].float().mean() < 0.55
    assert (captions.ids[1200:] == tokenizer.unk_id).all() and not masked[1200:].any()


def test_mlm_of_groups_of_words_hides_all_words_of_one_group_that_the_caption_has(tokenizer):
    groups = (("red", "blue"), ("ball", "cube"), ("couch", "dogs", "dog"))
    config = ObjectivesConfig(mlm_words=groups, mlm_probability=1.0)
    captions = tokenizer(CAPTIONS * 20)
    masked = Objectives(config, NegativesConfig(), 0, DistributedContext())._draw_mask(
        captions, torch.arange(120), tokenizer
    )
    words = {number: word for word, number in tokenizer.vocab.items()}
    seen = set()
    for caption, start, stop in zip(CAPTIONS * 20, captions.offsets, captions.offsets[1:], strict=False):
        hidden = {words[int(i)] for i in captions.ids[start:stop][masked[start:stop]]}
        present = [set(group) & set(caption.split()) for group in groups]
        assert hidden in present if any(present) else not hidden
        assert hidden or not any(present)
        seen.add((caption, frozenset(hidden)))
    assert len(seen) == 2 + 1 + 2 + 1 + 2 + 1  # every group of every caption was drawn at some time


def test_mlm_words_that_the_vocabulary_splits_are_named(tokenizer):
    objectives = Objectives(
        ObjectivesConfig(mlm_words=(("ball", "beneath"),)), NegativesConfig(), 0, DistributedContext()
    )
    with pytest.raises(UserError, match=r"objectives\.mlm_words: beneath is no whole word"):
        objectives(build(tokenizer), make_inputs(tokenizer))


def test_a_batch_without_the_chosen_words_has_no_mlm_loss(tokenizer):
    config = ObjectivesConfig(itm=0.0, text_recovery=0.0, mlm_words=(("couch",),), mlm_probability=1e-9)
    losses = Objectives(config, NegativesConfig(), 0, DistributedContext())(build(tokenizer), make_inputs(tokenizer))
    assert losses.total.item() == 0.0
    losses.total.backward()


ALTERED = ObjectivesConfig(
    itm=0.0,
    mlm=0.0,
    text_recovery=0.0,
    altered_captions=1.0,
    altered_words=((("red",), ("blue",)), (("ball",), ("cube",)), (("dogs",), ("cat",))),
)


@pytest.mark.parametrize("residual", [0.0, 2.0])
def test_altered_captions_are_scored_with_the_images_of_the_originals(tokenizer, residual):
    model, inputs = build(tokenizer, residual=residual), make_inputs(tokenizer)
    loss = Objectives(ALTERED, NegativesConfig(), 0, DistributedContext())(model, inputs).losses["altered_captions"]
    alter = CaptionAlterer(ALTERED.altered_words, tokenizer, "key")
    streams = [random_stream(0, ALTERED_STREAM, row) for row in range(6)]
    altered, changed = alter(inputs.captions, streams)
    assert changed.tolist() == [True, True, True, True, True, False]
    index = torch.arange(5)
    tokens, cosine = model.compress(inputs.patch_tokens), torch.zeros(5)
    own, other = (model.match_logits(c, tokens, index, index, cosine) for c in (inputs.captions, altered))
    torch.testing.assert_close(loss, F.softplus(other - own).mean())


def test_a_batch_without_words_to_alter_has_no_such_loss(tokenizer):
    model, inputs = build(tokenizer), make_inputs(tokenizer)
    objectives = Objectives(
        replace(ALTERED, altered_words=((("cat",), ("§",)),)), NegativesConfig(), 0, DistributedContext()
    )
    with pytest.raises(UserError, match="§ is no whole word"):
        objectives(model, inputs)
    words = ((("left",), ("on",)),)
    objectives = Objectives(replace(ALTERED, altered_words=words), NegativesConfig(), 0, DistributedContext())
    only_cats = replace(inputs, captions=tokenizer(["a cat"] * 6))
    loss = objectives(model, only_cats).losses["altered_captions"]
    assert loss.item() == 0.0
    loss.backward()


@pytest.mark.parametrize("words", [(), (("a", "on"), ("left", "dogs"))])
def test_the_mask_of_a_row_does_not_depend_on_the_rest_of_the_batch(tokenizer, words):
    config = replace(ALL, mlm_words=words)
    objectives = Objectives(config, NegativesConfig(), 0, DistributedContext())
    captions, rows = tokenizer(CAPTIONS), torch.arange(100, 106)
    whole = objectives._draw_mask(captions, rows, tokenizer)
    part = objectives._draw_mask(captions.select(torch.tensor([2, 4])), rows[[2, 4]], tokenizer)
    offsets = captions.offsets
    assert torch.equal(part, torch.cat([whole[offsets[i] : offsets[i + 1]] for i in (2, 4)]))


def test_a_residual_model_starts_at_the_embeddings_ranking(tokenizer):
    model = build(tokenizer, residual=2.0)
    inputs = make_inputs(tokenizer)
    tokens = model.compress(inputs.patch_tokens)
    similarities = torch.randn(6)
    index = torch.arange(6)
    logits = model.match_logits(inputs.captions, tokens, index, index, similarities)
    torch.testing.assert_close(logits, 2 * similarities)


def test_a_teacher_that_is_the_student_gives_the_entropy_of_its_own_logits(tokenizer):
    model = build(tokenizer)
    config = ObjectivesConfig(itm=1, mlm=0, text_recovery=0, distillation=1, teacher="x")
    for mode in ("pairs", "groups"):
        negatives = NegativesConfig(mode=mode, group_size=3)
        model.zero_grad()
        losses = Objectives(config, negatives, 0, DistributedContext(), teacher=model)(
            model, make_inputs(tokenizer)
        ).losses
        losses["distillation"].backward()
        assert max(p.grad.abs().max() for p in model.parameters() if p.grad is not None) < 1e-5


def test_equal_captions_are_true_pairs_in_both_directions(tmp_path):
    dataset = CaptionDataset(
        tmp_path, ["a", "b", "c"], ["A cat!", "x", "a cat", "y", "z"], np.array([0, 0, 1, 1, 2]), [None] * 3
    )
    true = CaptionKeys(dataset).true_pairs(torch.tensor([0, 3, 4]), torch.tensor([0, 1, 2]))
    assert true.tolist() == [[True, True, False], [False, True, False], [False, False, True]]


def test_the_alignment_stage_leaves_itm_out(tokenizer):
    inputs = replace(make_inputs(tokenizer), aligning=True)
    config = replace(ALL, altered_captions=1.0, altered_words=ALTERED.altered_words)
    losses = Objectives(config, NegativesConfig(), 0, DistributedContext())(build(tokenizer), inputs)
    assert set(losses.losses) == {"mlm", "text_recovery", "itc", "altered_captions"}
