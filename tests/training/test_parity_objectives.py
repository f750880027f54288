"""Mined negatives, losses and gradients agree with the public implementation's (tests/parity/README.md).

Its exclusion rule differs by direction (same image for images, same caption for captions); training here excludes both
in both, so the `strict_` values are what a step computes, and the others check the functions on the origin's pairs."""

import json
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from data.caption_datasets import CaptionDataset
from evaluation.gallery import Gallery
from evaluation.metrics import RECALL_DEPTHS, recall_at_k, right_answers
from evaluation.retrieval import first_stage, rerank_pools
from models.checkpoints.published import our_name
from models.distributed import DistributedContext
from tests.parity.published_case import CASES, PARITY, PublishedCase, assert_close
from training.config import NegativesConfig, ObjectivesConfig
from training.features import StepInputs
from training.hard_negatives import HardNegatives, mine_hard_negatives
from training.losses import PairLogits, distillation_loss, itm_loss, similarities, text_recovery_loss
from training.negatives import MinedPairs
from training.objectives import Objectives

LOSSES = ("itm", "mlm", "recovery", "distil")


@pytest.fixture(scope="module", params=CASES)
def case(request) -> PublishedCase:
    return PublishedCase(request.param)


class GivenMask(Objectives):
    """Objectives that mask the word pieces of a parity case instead of drawn ones."""

    def __init__(self, case: PublishedCase, config: ObjectivesConfig):
        super().__init__(config, NegativesConfig(), seed=0, distributed=DistributedContext())
        self.mask = case.masked_pieces()

    def _draw_mask(self, captions, rows, unk_id) -> Tensor:
        return self.mask


def similarity_of(case: PublishedCase) -> Tensor:
    return similarities(case.inputs["text_embeds"], case.inputs["image_embeds"])


def num_negatives(case: PublishedCase) -> int:
    return case.expected["negative_image_idx"].shape[1]


def origins_pairs(case: PublishedCase) -> HardNegatives:
    """The negatives that the origin chose; all count as valid."""
    images, captions = case.expected["negative_image_idx"], case.expected["negative_text_idx"]
    return HardNegatives(images, images >= 0, captions, captions >= 0)


def logits_of(case: PublishedCase, mined: HardNegatives) -> PairLogits:
    tokens = case.model.compress(case.inputs["patch_tokens"])
    captions, own = case.model.tokenizer(case.raw_captions), torch.arange(len(tokens))
    pairs = MinedPairs.of(mined, own)
    return pairs.split(case.model.match_logits(captions, tokens, pairs.caption_index, pairs.image_index))


def teacher_of(case: PublishedCase) -> PairLogits:
    names = ("teacher_positive_logits", "teacher_negative_image_logits", "teacher_negative_text_logits")
    return PairLogits(*(case.inputs[name] for name in names))


def step_inputs(case: PublishedCase) -> StepInputs:
    return StepInputs(
        rows=torch.arange(len(case.raw_captions)),
        patch_tokens=case.inputs["patch_tokens"],
        image_embeddings=case.inputs["image_embeds"],
        text_embeddings=case.inputs["text_embeds"],
        captions=case.model.tokenizer(case.raw_captions),
        excluded=case.same_image() | case.same_caption(),
        random_share=0.0,
    )


def origins_losses(case: PublishedCase) -> dict[str, Tensor]:
    """The four losses on the origin's pairs and mask, with gradients."""
    mined = origins_pairs(case)
    logits, valid = logits_of(case, mined), (mined.images_valid, mined.captions_valid)
    recovered = case.model.recover_text_embedding(case.model.text_cls(case.model.tokenizer(case.raw_captions)))
    return {
        "itm": itm_loss(logits, *valid),
        "mlm": GivenMask(case, ObjectivesConfig(itm=0, text_recovery=0))(case.model, step_inputs(case)).losses["mlm"],
        "recovery": text_recovery_loss(recovered, case.inputs["text_features"]),
        "distil": distillation_loss(logits, teacher_of(case), *valid),
    }


def test_hardest_negatives_are_the_origins_under_its_own_rule(case):
    similarity, h = similarity_of(case), num_negatives(case)
    by_image = mine_hard_negatives(similarity, case.same_image(), h)
    by_caption = mine_hard_negatives(similarity, case.same_caption(), h)
    assert torch.equal(by_image.images, case.expected["negative_image_idx"])
    assert torch.equal(by_caption.captions, case.expected["negative_text_idx"])


def test_hardest_negatives_are_the_strict_ones_when_both_rules_hold_in_both_directions(case):
    mined = mine_hard_negatives(similarity_of(case), case.same_image() | case.same_caption(), num_negatives(case))
    assert torch.equal(mined.images, case.expected["strict_negative_image_idx"])
    assert torch.equal(mined.captions, case.expected["strict_negative_text_idx"])
    assert mined.images_valid.all() and mined.captions_valid.all()


@torch.no_grad()
def test_logits_of_mined_pairs_are_the_same(case):
    logits = logits_of(case, origins_pairs(case))
    assert_close(logits.positive, case.expected["positive_logits"])
    assert_close(logits.negative_images, case.expected["negative_image_logits"])
    assert_close(logits.negative_captions, case.expected["negative_text_logits"])


@torch.no_grad()
@pytest.mark.parametrize(
    ("ours", "theirs"),
    [("itm", "itm_loss"), ("mlm", "mlm_loss"), ("recovery", "recovery_loss"), ("distil", "distillation_loss")],
)
def test_losses_on_the_origins_pairs_are_the_same(case, ours, theirs):
    assert_close(origins_losses(case)[ours], case.expected[theirs])


@torch.no_grad()
def test_each_direction_of_itm_is_the_same(case):
    mined, expected = origins_pairs(case), case.expected
    logits = logits_of(case, mined)
    images_twice = replace(logits, negative_captions=logits.negative_images)
    captions_twice = replace(logits, negative_images=logits.negative_captions)
    assert_close(itm_loss(images_twice, mined.images_valid, mined.images_valid), expected["itm_loss_images"])
    assert_close(itm_loss(captions_twice, mined.captions_valid, mined.captions_valid), expected["itm_loss_texts"])


@torch.no_grad()
def test_a_training_step_computes_the_strict_losses(case):
    config = ObjectivesConfig(mlm=0.0)
    negatives = NegativesConfig(per_positive=num_negatives(case), random_start=0.0, random_end=0.0)
    losses = Objectives(config, negatives, seed=0, distributed=DistributedContext())(
        case.model, step_inputs(case)
    ).losses
    assert_close(losses["itm"], case.expected["strict_itm_loss"])
    assert_close(losses["text_recovery"], case.expected["recovery_loss"])


def parameters_by_our_name(case: PublishedCase, prefix: str) -> dict[str, Tensor]:
    """Expected tensors `PREFIX.PARAMETER` under our parameter names."""
    return {
        our_name(name.removeprefix(prefix)): value
        for name, value in case.expected.items()
        if name.startswith(prefix) and our_name(name.removeprefix(prefix)) is not None
    }


@pytest.mark.parametrize("loss", [*LOSSES, "total"])
def test_gradients_are_the_same(case, loss):
    losses = origins_losses(case)
    case.model.zero_grad(set_to_none=True)
    (sum(losses.values()) if loss == "total" else losses[loss]).backward()
    # keep_vars: tied parameters have one gradient under all their names.
    parameters = case.model.state_dict(keep_vars=True)
    norms = parameters_by_our_name(case, f"grad_norm.{loss}.")
    assert norms
    for name, expected in norms.items():
        gradient = parameters[name].grad
        norm = torch.zeros(()) if gradient is None else gradient.norm()
        torch.testing.assert_close(norm, expected, rtol=1e-5, atol=1e-5, msg=lambda m, name=name: f"{name}: {m}")
    if loss == "total":
        for name, expected in parameters_by_our_name(case, "grad.").items():
            torch.testing.assert_close(parameters[name].grad, expected, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_the_local_case_is_the_teacher_of_tiny_m4():
    student, teacher = PublishedCase("tiny_m4"), PublishedCase("tiny_local")
    mined = origins_pairs(student)
    tokens = teacher.model.compress(student.inputs["patch_tokens"])
    captions, own = teacher.model.tokenizer(student.raw_captions), torch.arange(len(tokens))
    pairs = MinedPairs.of(mined, own)
    logits = pairs.split(teacher.model.match_logits(captions, tokens, pairs.caption_index, pairs.image_index))
    for ours, theirs in zip(vars(logits).values(), vars(teacher_of(student)).values(), strict=True):
        assert_close(ours, theirs)


@pytest.fixture(scope="module")
def retrieval():
    """Gallery of tiny_m4, its model, and what the origin found."""
    case = PublishedCase("tiny_m4")
    tensors = load_file(PARITY / "tiny_m4" / "retrieval.safetensors")
    facts = json.loads((PARITY / "tiny_m4" / "retrieval.json").read_text())
    num_images = len(tensors["image_embeds"])
    caption_image = torch.tensor(facts["caption_image"]).numpy()
    names = [f"{i}.jpg" for i in range(num_images)]
    dataset = CaptionDataset(PARITY, names, facts["captions"], caption_image, [None] * num_images)
    with torch.no_grad():
        tokens = case.model.compress(tensors["patch_tokens"])
    gallery = Gallery(dataset, tensors["image_embeds"], tensors["text_embeds"], lambda images: tokens[images])
    return case.model, gallery, tensors, facts


@torch.no_grad()
@pytest.mark.parametrize(("direction", "name"), [("t2i", "text_to_image"), ("i2t", "image_to_text")])
def test_retrieval_finds_the_same_pools_logits_and_recalls(retrieval, direction, name):
    model, gallery, tensors, facts = retrieval
    images = torch.arange(len(gallery.dataset)).numpy()
    sides = (gallery.text_embeddings, gallery.image_embeddings), (gallery.dataset.caption_image, images)
    (queries, items), (query_image, item_image) = sides if direction == "t2i" else (side[::-1] for side in sides)
    pools = first_stage(queries, items, query_image, item_image, depth=facts["k"])
    assert torch.equal(pools.ids, tensors[f"{direction}_top_k"])
    logits = rerank_pools(model, gallery, pools, direction, facts["k"], DistributedContext(), pairs_per_batch=7)
    assert_close(logits, tensors[f"{direction}_logits"])
    reranked = pools.ids.gather(1, logits.argsort(dim=1, descending=True, stable=True))
    for ranking, column in ((pools.ids, "embedding"), (reranked, "reranked")):
        hits = right_answers(ranking.numpy(), query_image, item_image)
        found = {f"R@{k}": recall_at_k(hits, k) for k in RECALL_DEPTHS}
        expected = {depth: 100 * share for depth, share in facts["recall"][name][column].items()}
        # Beyond the pool of 8 the origin adds nothing, and neither does a ranking that ends there.
        assert found == pytest.approx(expected)


def test_a_forgotten_exclusion_would_be_noticed(case):
    """The vectors can tell: without exclusions some row of every case chooses otherwise."""
    nothing_but_itself = torch.zeros(len(case.raw_captions), len(case.raw_captions), dtype=torch.bool)
    mined = mine_hard_negatives(similarity_of(case), nothing_but_itself, num_negatives(case))
    assert not torch.equal(mined.images, case.expected["strict_negative_image_idx"])


@torch.no_grad()
@pytest.mark.parametrize("group", ["positives", "negative_images", "negative_texts"])
def test_each_group_of_distillation_is_the_same(case, group):
    index = ("positives", "negative_images", "negative_texts").index(group)
    student, teacher = (
        list(vars(logits).values())[index].view(len(case.raw_captions), -1)
        for logits in (logits_of(case, origins_pairs(case)), teacher_of(case))
    )
    # The same pairs in all three places: the mean of three equal means.
    thrice = (PairLogits(x.flatten(), x, x) for x in (student, teacher))
    all_valid = torch.ones_like(student, dtype=torch.bool)
    assert_close(distillation_loss(*thrice, all_valid, all_valid), case.expected[f"distillation_loss_{group}"])
