"""The gallery takes features of the checkpoint's own backbone only, as far as the checkpoint records it."""

from dataclasses import replace

import pytest
import torch

from data.caption_datasets import load_annotations
from evaluation.gallery import build_gallery
from models.distributed import DistributedContext
from models.errors import UserError
from models.stores.token_store import TokenStore
from tests.tiny_model import make_model


@pytest.fixture
def parts(tmp_path, backbone, scenes, annotations, stores):
    """(model, data set, token store, caption store), all of one backbone."""
    model = make_model(backbone, tmp_path / "vocab.txt")
    return model, load_annotations(annotations, scenes, "test"), *(TokenStore.open(path) for path in stores)


@torch.inference_mode()
def test_an_imported_checkpoint_takes_the_features_that_it_is_given(parts, backbone):
    model, dataset, tokens, captions = parts
    trained_here = build_gallery(model, backbone, dataset, DistributedContext(), tokens, captions)
    model.config = replace(model.config, backbone_fingerprint="")
    for given in (backbone, None):
        imported = build_gallery(model, given, dataset, DistributedContext(), tokens, captions)
        assert torch.equal(imported.image_embeddings, trained_here.image_embeddings)


@pytest.mark.parametrize("with_backbone", [True, False])
def test_features_of_another_backbone_are_refused(parts, backbone, with_backbone):
    model, dataset, tokens, captions = parts
    model.config = replace(model.config, backbone_fingerprint="ViT-B-16/openai")
    with pytest.raises(UserError, match="ViT-B-16/openai"):
        build_gallery(model, backbone if with_backbone else None, dataset, DistributedContext(), tokens, captions)


def test_without_backbone_both_stores_are_needed(parts):
    model, dataset, tokens, _ = parts
    with pytest.raises(UserError, match="needs a token store and a caption store"):
        build_gallery(model, None, dataset, DistributedContext(), tokens)
