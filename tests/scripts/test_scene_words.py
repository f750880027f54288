"""Filling in hidden words, with the committed weights on scenes that they never saw."""

import re
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

from data.caption_datasets import load_annotations
from data.scenes.captions import word_kinds
from data.scenes.dataset import write_scenes
from evaluation.gallery import build_gallery
from models.distributed import DistributedContext
from models.edje import EDJE
from models.errors import UserError
from models.vision.backbones import Backbone
from scripts.scene_words import fill_in, main
from tests.tiny_model import make_model, write_backbone
from training.altered_captions import CaptionAlterer
from training.config import load_config

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def annotations(tmp_path_factory) -> Path:
    return write_scenes(tmp_path_factory.mktemp("scenes"), num_train=0, num_val=80, num_test=0, seed=5)


def test_the_committed_weights_know_relations_of_three_objects_best(annotations, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["x", str(ROOT / "configs/pretrained/scenes"), str(annotations)])
    monkeypatch.chdir(ROOT)
    main()
    shares = {
        kind: [int(share) for share in found]
        for kind, *found in re.findall(r"^\| (\w+) \| (\d+)% \| (\d+)% \|$", capsys.readouterr().out, re.M)
    }
    assert shares.keys() == word_kinds().keys()
    three = {kind: share for kind, (_, share) in shares.items()}
    assert max(three, key=three.get) == "relation" and three["relation"] > 75


def test_the_committed_weights_tell_altered_captions_from_true_ones(annotations, monkeypatch):
    monkeypatch.chdir(ROOT)
    model = EDJE.from_pretrained("configs/pretrained/scenes")
    dataset = load_annotations(annotations, annotations.parent, "val")
    backbone = Backbone.load(model.config.backbone, precision="float32")
    tokens = build_gallery(model, backbone, dataset, DistributedContext()).tokens(torch.arange(len(dataset)))
    captions = model.tokenizer(dataset.captions)
    words = load_config("configs/demo.yaml").objectives.altered_words
    streams = [np.random.default_rng(row) for row in range(len(captions))]
    altered, changed = CaptionAlterer(words, model.tokenizer, "objectives.altered_words")(captions, streams)
    index = torch.nonzero(changed).flatten()
    images = torch.from_numpy(dataset.caption_image)[index]
    with torch.inference_mode():
        true, false = (model.match_logits(each, tokens, index, images) for each in (captions, altered))
    assert (true > false).float().mean() > 0.93


def test_a_model_that_knows_none_of_the_words_is_an_error(annotations, tmp_path):
    model = make_model(Backbone.load(write_backbone(tmp_path / "backbone")), tmp_path / "vocab.txt")
    dataset = load_annotations(annotations, annotations.parent, "val")
    with pytest.raises(UserError, match="none of the words heart; it is of other captions"):
        fill_in(model, torch.zeros(len(dataset), 4, 16), dataset, {"heart": "heart"})


def test_the_stages_that_hide_all_kinds_name_all_their_words():
    kinds = [set(words) for words in word_kinds().values()]
    for stage in ("4_binding", "5_regions"):
        config = yaml.safe_load((ROOT / f"configs/demo_pretraining/{stage}.yaml").read_text())
        groups = [set(group) for group in config["objectives"]["mlm_words"]]
        assert all(kind in groups for kind in kinds) and all(group in kinds for group in groups)
