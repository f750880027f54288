"""The inference form of EDJE: the same logits, a snapshot in both directions, and never a broken checkpoint."""

import copy
from pathlib import Path

import pytest
import torch
from torch import nn

from data.caption_datasets import CaptionDataset
from evaluation.retrieval import evaluate
from models.distributed import DistributedContext
from models.edje import EDJE
from models.matching import OptimizedEDJE
from models.reranker import Reranker
from models.vision.backbones import Backbone
from models.vision.images import open_image
from tests.tiny_model import CAPTIONS, make_model, write_backbone, write_images


@pytest.fixture(scope="module")
def tiny_backbone(tmp_path_factory) -> Backbone:
    return Backbone.load(write_backbone(tmp_path_factory.mktemp("matching") / "backbone"), precision="float32")


@pytest.fixture(params=[0.0, 3.0], ids=["plain", "residual"])
def model(request, tiny_backbone: Backbone, tmp_path: Path) -> EDJE:
    return make_model(tiny_backbone, tmp_path / "vocab.txt", residual_similarity=request.param)


def logits_of(model: EDJE | OptimizedEDJE) -> torch.Tensor:
    """Match logits of fixed patch tokens, through the adapter, the joint encoder and the head."""
    generator = torch.Generator().manual_seed(2)
    dims = model.config.dims
    patches = torch.randn(len(CAPTIONS), dims.num_patches, dims.patch_width, generator=generator)
    with torch.inference_mode():
        return model.score(CAPTIONS, model.compress(patches), torch.linspace(-1, 1, len(CAPTIONS)))


def scramble(module: nn.Module) -> None:
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.mul_(-0.5).add_(0.3)


def test_the_inference_form_gives_the_same_logits(model):
    torch.testing.assert_close(logits_of(model.optimized(torch.float32)), logits_of(model), rtol=1e-5, atol=1e-5)


def test_training_the_model_leaves_its_inference_form_alone(model):
    fast = model.optimized(torch.float32)
    before = logits_of(fast)
    scramble(model)
    model.double()
    assert torch.equal(logits_of(fast), before)


def test_the_inference_form_leaves_the_model_alone(model):
    before, training = logits_of(model), model.train().training
    fast = model.optimized(torch.float32)
    for part in (fast.adapter, fast.match_head):
        scramble(part)
        part.double()
    assert training and model.training and all(p.requires_grad for p in model.parameters())
    assert torch.equal(logits_of(model.eval()), before)


@pytest.mark.parametrize("name", ["save_pretrained", "push_to_hub", "state_dict", "parameters", "to", "train"])
def test_the_inference_form_cannot_be_saved_or_trained_by_mistake(model, name):
    fast = model.optimized(torch.float32)
    assert not hasattr(fast, name) and not isinstance(fast, nn.Module)
    with pytest.raises(AttributeError, match=f"has no {name}; .*EDJE.from_pretrained"):
        getattr(fast, name)


def test_a_rerankers_model_says_how_to_save_instead_of_writing_half_a_checkpoint(model, tiny_backbone, tmp_path):
    reranker = Reranker(model, tiny_backbone, torch.float32)
    with pytest.raises(AttributeError, match="load the model with EDJE.from_pretrained"):
        reranker.model.save_pretrained(tmp_path / "saved")
    assert not (tmp_path / "saved").exists()


def test_the_inference_form_can_be_copied(model):
    fast = model.optimized(torch.float32)
    assert torch.equal(logits_of(copy.copy(fast)), logits_of(fast))


def test_both_forms_name_the_same_adapter(model):
    assert model.optimized(torch.bfloat16).adapter_fingerprint == model.adapter_fingerprint


def test_a_long_caption_is_read_to_the_configured_length_by_library_reranker_and_evaluation(tiny_backbone, tmp_path):
    """80 words and a limit of 100 tokens: the last words count, and alike wherever the caption is scored."""
    model = make_model(tiny_backbone, tmp_path / "vocab.txt", max_caption_tokens=100)
    words = " ".join(CAPTIONS).split()
    captions = [" ".join([*(words * 10)[:79], end]) for end in ("ball", "cube", "sea")]
    names = write_images(tmp_path / "images", 3)
    images = [tmp_path / "images" / name for name in names]
    features = tiny_backbone.encode_images(torch.stack([tiny_backbone.preprocess(open_image(i)) for i in images]))
    tokens = model.compress(features.patch_tokens)
    direct = model.score(captions, tokens)
    assert model.score([captions[0]] * 3, tokens[[0]].repeat(3, 1, 1))[0] == pytest.approx(direct[0].item(), abs=1e-5)
    same_image = model.score(captions, tokens[[0]].repeat(3, 1, 1))
    assert same_image.unique().numel() == 3, "captions that differ in their last word alone have logits of their own"

    reranked = Reranker(model, tiny_backbone, torch.float32).predict(list(zip(captions, images, strict=True)))
    dataset = CaptionDataset(tmp_path / "images", names, captions, torch.arange(3).numpy(), [None] * 3)
    results = evaluate(model, tiny_backbone, dataset, DistributedContext(), k=3, dtype=torch.float32)
    own = results.t2i.candidates == torch.arange(3)[:, None].numpy()
    torch.testing.assert_close(torch.from_numpy(reranked), direct, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(torch.from_numpy(results.t2i.logits[own]), direct, rtol=1e-4, atol=1e-4)


def test_no_pairs_have_no_logits(model):
    tokens = torch.zeros(0, model.config.num_vision_tokens, model.config.encoder.hidden_size)
    assert model.score([], tokens, torch.zeros(0)).shape == model.optimized().score([], tokens).shape == (0,)
