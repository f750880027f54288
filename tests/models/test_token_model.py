"""A timm model for the patch tokens beside an open_clip model for embeddings and text; what is downstream takes it."""

import json
import pickle
import shutil
from pathlib import Path

import pytest
import timm
import torch
import torch.nn.functional as F
import yaml
from safetensors.torch import load_file, save_file

from data.caption_datasets import load_annotations
from models.config import BackboneConfig
from models.errors import UserError
from models.reranker import Reranker
from models.stores.token_store import TokenStore
from models.vision.backbones import Backbone
from models.vision.images import open_image
from models.vision.towers import TIMM_WEIGHTS_FILE
from tests.processes import run_script

NARROW = {"img_size": 56, "embed_dim": 40, "depth": 2, "num_heads": 2}
LOOK = {
    "input_size": [3, 56, 56],
    "mean": [0.485, 0.456, 0.406],
    "std": [0.229, 0.224, 0.225],
    "crop_pct": 0.875,
    "interpolation": "bicubic",
    "classifier": "head",
}
"""Another side, crop and normalisation than the open_clip model's 32 px squashed."""


def write_token_model(
    directory: Path, seed: int = 0, architecture: str = "vit_small_patch14_dinov2", **options
) -> Path:
    """A timm model directory as the Hub has them: DINOv2's own entry, narrow: 16 patch tokens of width 40."""
    directory.mkdir()
    torch.manual_seed(seed)
    options = options or NARROW
    trunk = timm.create_model(architecture, num_classes=7, **options)
    config = {"architecture": architecture, "num_classes": 7, "model_args": options, "pretrained_cfg": LOOK}
    (directory / "config.json").write_text(json.dumps(config))
    save_file(trunk.state_dict(), directory / TIMM_WEIGHTS_FILE)
    return directory


@pytest.fixture(scope="module")
def token_model(tmp_path_factory) -> Path:
    return write_token_model(tmp_path_factory.mktemp("timm") / "dinov2")


def load(clip: Path, tokens: Path | str, **options) -> Backbone:
    config = BackboneConfig(pretrained=str(clip), token_pretrained=str(tokens), **options)
    return Backbone.load(config, precision="float32")


@pytest.fixture(scope="module")
def both(backbone_dir, token_model) -> Backbone:
    return load(backbone_dir, token_model)


@pytest.fixture(scope="module")
def pictures(scenes, annotations) -> list:
    dataset = load_annotations(annotations, scenes, "val")
    # Not square, so that a crop and a squash show different parts.
    return [open_image(dataset.path(i)).resize((90, 60)) for i in range(3)]


def trunk_of(directory: Path) -> torch.nn.Module:
    trunk = timm.create_model("vit_small_patch14_dinov2", num_classes=7, **NARROW)
    trunk.load_state_dict(load_file(directory / TIMM_WEIGHTS_FILE))
    return trunk.eval()


@torch.no_grad()
def test_tokens_are_the_timm_models_and_embeddings_the_open_clip_models_each_with_its_own_look(
    both, backbone, token_model, pictures
):
    features = both.encode_images(torch.stack([both.preprocess(picture) for picture in pictures]))
    look = timm.data.create_transform(
        **{key: LOOK[key] for key in ("input_size", "mean", "std", "crop_pct", "interpolation")}
    )
    tokens = trunk_of(token_model).forward_features(torch.stack([look(picture) for picture in pictures]))
    torch.testing.assert_close(features.patch_tokens, tokens[:, 1:])
    alone = backbone.encode_images(torch.stack([backbone.preprocess(picture) for picture in pictures]))
    torch.testing.assert_close(features.embedding, alone.embedding)
    assert features.patch_tokens.shape == (3, both.dims.num_patches, both.dims.patch_width) == (3, 16, 40)
    assert both.dims.embedding_width == backbone.dims.embedding_width
    torch.testing.assert_close(both.encode_texts(["a red ball"]), backbone.encode_texts(["a red ball"]))


def test_an_image_passes_each_tower_once(both, pictures):
    pixels, passes = both.preprocess(pictures[0])[None], []
    hooks = [
        module.register_forward_hook(lambda module, *_: passes.append(type(module).__name__))
        for module in (both.clip.visual.transformer, both.token_tower.trunk.blocks)
    ]
    both.encode_images(pixels)
    for hook in hooks:
        hook.remove()
    assert sorted(passes) == ["Sequential", "Transformer"]


def test_both_towers_are_frozen_and_the_preprocessing_survives_pickling(both, pictures):
    both.train()
    assert not any(module.training for module in both.modules())
    assert not any(parameter.requires_grad for parameter in both.parameters())
    again = pickle.loads(pickle.dumps(both.preprocess))
    assert torch.equal(again(pictures[0]), both.preprocess(pictures[0]))


def test_the_fingerprint_covers_both_models_and_both_looks(both, backbone, backbone_dir, token_model, tmp_path):
    assert both.fingerprint.startswith(f"{backbone.fingerprint} tokens vit_small_patch14_dinov2/")
    shutil.copytree(token_model, tmp_path / "copy")
    assert load(backbone_dir, tmp_path / "copy").fingerprint == both.fingerprint
    other = write_token_model(tmp_path / "other", seed=1)
    shutil.copytree(token_model, tmp_path / "look")
    config = json.loads((token_model / "config.json").read_text())
    config["pretrained_cfg"]["crop_pct"] = 1.0
    (tmp_path / "look" / "config.json").write_text(json.dumps(config))
    marks = {load(backbone_dir, tokens).fingerprint for tokens in (other, tmp_path / "look")}
    assert len(marks | {both.fingerprint, backbone.fingerprint}) == 4


def test_a_weight_file_and_random_weights_load_under_the_models_name(both, backbone_dir, tmp_path):
    torch.manual_seed(0)
    saved = timm.create_model("test_vit", num_classes=7).state_dict()
    save_file(saved, tmp_path / "weights.safetensors")
    loaded = load(backbone_dir, tmp_path / "weights.safetensors", token_model="test_vit").token_tower.trunk.state_dict()
    assert loaded.keys() == {name for name in saved if not name.startswith("head.")}
    assert all(torch.equal(tensor, saved[name]) for name, tensor in loaded.items())
    drawn = load(backbone_dir, "random", token_model="test_vit")
    assert drawn.fingerprint.split(" tokens ")[1].startswith("test_vit/random-") and drawn.dims.num_patches == 100


def test_a_convolutional_token_model_gives_stage_maps(backbone_dir, pictures):
    cnn = load(backbone_dir, "random", token_model="test_efficientnet", token_stages=(2, 3), token_grid=6)
    features = cnn.encode_images(cnn.preprocess(pictures[0])[None])
    assert features.patch_tokens.shape == (1, 36, 96)
    assert cnn.fingerprint.endswith("stages [2, 3] grid 6 with positions")


@torch.no_grad()
def test_tokens_without_a_norm_of_their_own_get_one(backbone_dir, pictures):
    """BEiT and EVA normalise behind their pooling."""
    beit = load(backbone_dir, write_beit(backbone_dir.parent / "beit"))
    tokens = beit.encode_images(beit.preprocess(pictures[0])[None]).patch_tokens
    torch.testing.assert_close(tokens, F.layer_norm(tokens, (40,)), rtol=0, atol=1e-4)
    assert tokens.shape == (1, 9, 40)


def write_beit(directory: Path) -> Path:
    sizes = {"img_size": 56, "patch_size": 16, "embed_dim": 40, "depth": 1, "num_heads": 2}
    return write_token_model(directory, architecture="beit_base_patch16_224", **sizes)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"token_model": "vit_q"}, "backbone.token_pretrained is empty"),
        ({"token_model": "vit_q", "token_pretrained": "random"}, "'vit_q' is not a timm model"),
        ({"token_pretrained": "no/such/folder"}, "'no/such/folder' is not a directory"),
        ({"token_model": "test_vit", "token_pretrained": "laion"}, "neither a file, a directory nor a tag.*r160_in1k"),
        ({"token_model": "resnet18", "token_pretrained": "random"}, "backbone resnet18: .* needs token_stages"),
        ({"token_model": "pit_ti_224", "token_pretrained": "random"}, "pit_ti_224: .* does not say which"),
        ({"token_model": "test_vit", "token_pretrained": "random", "token_stages": (9,), "token_grid": 4},
         r"backbone test_vit: no patch tokens with token_stages \[9\]"),
    ],
)  # fmt: skip
def test_impossible_combinations_are_named(backbone_dir, options, message):
    with pytest.raises(UserError, match=message):
        Backbone.load(BackboneConfig(pretrained=str(backbone_dir), **options))


def test_a_token_model_alone_has_no_embedding_and_says_so(token_model):
    with pytest.raises(UserError, match="backbone.name '' is not an open_clip architecture"):
        Backbone.load(BackboneConfig(token_pretrained=str(token_model)))


def test_missing_truncated_and_foreign_weights_are_named(backbone_dir, token_model, tmp_path):
    shutil.copytree(token_model, tmp_path / "model")
    weights = tmp_path / "model" / TIMM_WEIGHTS_FILE
    content = weights.read_bytes()
    weights.write_bytes(content[: len(content) // 2])
    with pytest.raises(UserError, match="model.safetensors: missing, truncated or damaged"):
        load(backbone_dir, tmp_path / "model")
    state = load_file(token_model / TIMM_WEIGHTS_FILE)
    del state["norm.weight"]
    save_file(state, weights)
    with pytest.raises(UserError, match="model.safetensors: .*1 missing: norm.weight"):
        load(backbone_dir, tmp_path / "model")
    (tmp_path / "model" / "config.json").unlink()
    with pytest.raises(UserError, match="cannot be loaded as a timm model .*config.json"):
        load(backbone_dir, tmp_path / "model")
    with pytest.raises(UserError, match="leave backbone.token_model empty"):
        load(backbone_dir, token_model, token_model="test_vit")


def test_training_stores_evaluation_and_ranking_take_it(both, run_config, token_model, scenes, annotations, tmp_path):
    """The whole path by the commands: patch-token stores, a run from images, one from stores, evaluation, ranking."""
    config = yaml.safe_load(run_config.read_text())
    config["backbone"]["token_pretrained"] = str(token_model)
    run_config.write_text(yaml.safe_dump(config))
    clip, stores = config["backbone"]["pretrained"], (tmp_path / "patches", tmp_path / "captions")
    commands = [
        ("scripts/precompute_tokens.py", "--backbone-pretrained", clip, "--token-pretrained", token_model, "--images",
         annotations, "--out", stores[0], "--captions", stores[1], "--precision", "float32", "--dtype", "float16"),
        ("train.py", "--config", run_config, "training.steps=2", f"output={tmp_path / 'images'}"),
        ("train.py", "--config", run_config, "training.steps=2", f"output={tmp_path / 'stored'}",
         f"data.store={stores[0]}", f"data.caption_store={stores[1]}"),
        ("evaluation/evaluate_retrieval.py", "--checkpoint", tmp_path / "images", "--dataset", annotations,
         "--data-root", scenes, "--split", "test", "--k", "4", "--out", tmp_path / "results"),
    ]  # fmt: skip
    for command in commands:
        done = run_script(*command)
        assert done.returncode == 0, done.stderr[-3000:]
    assert TokenStore.open(stores[0]).manifest.backbone == both.fingerprint
    assert json.loads((tmp_path / "results" / "results.json").read_text())["images"] == 12
    reranker = Reranker.from_pretrained(tmp_path / "stored", dtype="float32")
    assert reranker.backbone.fingerprint == both.fingerprint == reranker.model.config.backbone_fingerprint
    image = load_annotations(annotations, scenes, "test").path(0)
    assert len(reranker.rank("a red ball", [image, image])) == 2
