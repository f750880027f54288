"""A miniature embedder training: it learns, resumes to the same weights, and leaves a directory the backbone loads."""

import json
import sys

import numpy as np
import pytest
import timm
import torch
import transformers
import yaml
from PIL import Image, ImageDraw

from data.caption_datasets import load_annotations
from models.config import BackboneConfig
from models.errors import UserError
from models.vision.backbones import Backbone
from models.vision.open_clip_backbone import WEIGHTS_FILE
from scripts import train_embedder
from training.embedder.samples import Samples, cached_side, draw_batch, random_crops
from training.embedder.training import EmbedderConfig, EmbedderTraining, Progress

COLOURS = ["red", "green", "blue", "yellow", "black"]
CONFIG = {
    "model": {
        "embed_dim": 32,
        "vision_cfg": {"image_size": 32, "patch_size": 8, "width": 32, "layers": 2, "head_width": 16},
        "text_cfg": {"context_length": 10, "width": 32, "heads": 2, "layers": 2},
    },
    "preprocess": {"mean": [0.5] * 3, "std": [0.5] * 3, "interpolation": "bicubic", "resize_mode": "squash"},
    "batch_size": 16,
    "learning_rate": 3e-3,
    "warmup_steps": 10,
    "max_steps": 30,
    "evaluate_every": 10,
    "cooldown_steps": 10,
    "min_crop": 0.9,
}


@pytest.fixture(scope="module")
def scenes(tmp_path_factory):
    """40 images of a ball and a box side by side, 20 colour pairs in two shades; val shows the second shade."""
    root = tmp_path_factory.mktemp("scenes")
    images = []
    for split, grey in (("train", 200), ("val", 230)):
        for left in COLOURS:
            for right in COLOURS:
                if left == right:
                    continue
                image = Image.new("RGB", (40, 40), (grey,) * 3)
                draw = ImageDraw.Draw(image)
                draw.ellipse((3, 12, 17, 26), fill=left)
                draw.rectangle((22, 12, 36, 26), fill=right)
                name = f"{split}-{left}-{right}.png"
                image.save(root / name)
                captions = [f"a {left} ball left of a {right} box", f"{right} box right of a {left} ball"]
                images.append({"filename": name, "split": split, "sentences": [{"raw": c} for c in captions]})
    (root / "scenes.json").write_text(json.dumps({"images": images}))
    return root


def train(scenes, out, monkeypatch, *options, **changes):
    config = out.parent / f"{out.name}.yaml"
    config.write_text(yaml.safe_dump(CONFIG | changes))
    arguments = ["--config", config, "--annotations", scenes / "scenes.json", "--root", scenes, "--out", out]
    monkeypatch.setattr(sys, "argv", ["train_embedder.py", *map(str, arguments), *options])
    train_embedder.main()
    return json.loads((out / "TRAINING.json").read_text())


def test_it_learns_and_the_backbone_loads_the_result(scenes, tmp_path, monkeypatch):
    record = train(scenes, tmp_path / "model", monkeypatch, max_steps=150, evaluate_every=50, cooldown_steps=50)
    assert record["validation_R@1_mean"] > 30  # 5 is chance
    assert record["steps"] == 150 and len(record["history"]) == 3
    backbone = Backbone.load(BackboneConfig(pretrained=str(tmp_path / "model")), precision="float32")
    right, wrong = backbone.encode_texts(["a red ball left of a blue box", "a green ball left of a yellow box"])
    image = backbone.preprocess(Image.open(scenes / "val-red-blue.png"))
    embedding = backbone.encode_images(image[None]).embedding[0]
    assert embedding @ right > embedding @ wrong


def test_the_record_repeats_the_run_and_names_no_machine(scenes, tmp_path, monkeypatch):
    record = train(scenes, tmp_path / "model", monkeypatch, "--seed", "3")
    assert record["seed"] == 3 and "--seed 3" in record["provenance"]["command"]
    assert str(tmp_path) not in json.dumps(record) and str(scenes) not in json.dumps(record)
    files = {file.name for file in (tmp_path / "model").iterdir()}
    config_files = {"open_clip_config.json", "tokenizer.json", "tokenizer_config.json"}
    assert files == {WEIGHTS_FILE, "TRAINING.json", *config_files}


@pytest.mark.parametrize("killed_at", [10, 17, 29])
def test_a_killed_training_resumes_to_the_same_weights(scenes, tmp_path, monkeypatch, killed_at):
    straight = train(scenes, tmp_path / "straight", monkeypatch)
    step = EmbedderTraining._step

    def step_until_killed(self):
        if self.progress.step == killed_at:
            raise KeyboardInterrupt
        return step(self)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(EmbedderTraining, "_step", step_until_killed)
        train(scenes, tmp_path / "killed", monkeypatch)
    assert not (tmp_path / "killed" / WEIGHTS_FILE).exists()
    resumed = train(scenes, tmp_path / "killed", monkeypatch)
    assert resumed["weights_sha256"] == straight["weights_sha256"]
    assert [e["t2i"] for e in resumed["history"]] == [e["t2i"] for e in straight["history"]]


def test_a_finished_training_is_left_alone(scenes, tmp_path, monkeypatch, capsys):
    record = train(scenes, tmp_path / "model", monkeypatch)
    assert train(scenes, tmp_path / "model", monkeypatch) == record
    assert "already holds a trained embedder" in capsys.readouterr().out


def test_resuming_with_another_seed_is_refused(scenes, tmp_path, monkeypatch):
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(train_embedder, "write_weights", interrupt)
        train(scenes, tmp_path / "model", monkeypatch)
    with pytest.raises(UserError, match="belongs to seed 0, not 1"):
        train(scenes, tmp_path / "model", monkeypatch, "--seed", "1")


def interrupt(*_):
    raise KeyboardInterrupt


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"min_crop": 0.0}, "min_crop is 0.0"),
        ({"max_steps": 5}, "must exceed cooldown_steps"),
        ({"batch_sise": 3}, "did you mean 'batch_size'"),
    ],
)
def test_a_wrong_config_is_one_clear_error(scenes, tmp_path, monkeypatch, changes, message):
    with pytest.raises(UserError, match=message):
        train(scenes, tmp_path / "model", monkeypatch, **changes)
    assert not (tmp_path / "model").exists()


def test_a_missing_image_is_named(scenes, tmp_path, monkeypatch):
    with pytest.raises(UserError, match="train-red-green.png: no such image file"):
        train(scenes, tmp_path / "model", monkeypatch, "--root", str(tmp_path))


def write_towers(folder):
    """A convolutional tower as another code base names its tensors, and a text model, both with random weights."""
    (folder / "image").mkdir(parents=True)
    torch.manual_seed(0)
    trunk = timm.create_model("test_efficientnet").state_dict()
    torch.save({f"_{name}": tensor for name, tensor in trunk.items()}, folder / "image" / "tower.pth")
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "ball", "left", "right", "of", "box", *COLOURS]
    tokenizer = transformers.BertTokenizerFast(vocab={word: number for number, word in enumerate(words)})
    size = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    model = transformers.BertModel(transformers.BertConfig(vocab_size=len(words), **size))
    for part in (tokenizer, model):
        part.save_pretrained(folder / "text")
    return {"image": str(folder / "image"), "text": str(folder / "text")}


def test_frozen_towers_stay_as_they_were_and_only_heads_learn(scenes, tmp_path, monkeypatch):
    towers = write_towers(tmp_path / "towers")
    vision = {"timm_model_name": "test_efficientnet", "timm_pool": "avg", "timm_proj": "mlp", "image_size": 32}
    text = {"hf_proj_type": "mlp", "hf_pooler_type": "mean_pooler", "context_length": 10}
    model = {"embed_dim": 32, "vision_cfg": vision, "text_cfg": text}
    changes = {"model": model, "towers": towers, "half": False, "max_steps": 60, "evaluate_every": 60}
    record = train(scenes, tmp_path / "model", monkeypatch, **changes)
    backbone = Backbone.load(
        BackboneConfig(pretrained=str(tmp_path / "model"), token_stages=(2, 3), token_grid=4), precision="float32"
    )
    saved = torch.load(tmp_path / "towers" / "image" / "tower.pth", weights_only=True)
    assert all(
        torch.equal(ours, theirs)
        for ours, theirs in zip(backbone.clip.visual.trunk.state_dict().values(), saved.values(), strict=False)
    )
    assert backbone.dims.num_patches == 16
    assert recall_of(backbone, scenes) == pytest.approx(record["history"][-1]["t2i"], abs=5)  # bfloat16 features
    assert record["validation_R@1_mean"] > 15  # 5 is chance


def recall_of(backbone, scenes):
    val = load_annotations(scenes / "scenes.json", scenes, "val")
    images = torch.stack([backbone.preprocess(Image.open(val.path(i))) for i in range(len(val))])
    best = (backbone.encode_texts(val.captions) @ backbone.encode_images(images).embedding.T).argmax(1)
    return 100 * float((best == torch.from_numpy(val.caption_image)).float().mean())


def samples(identities, captions_each=2):
    count = len(identities)
    starts = torch.arange(count + 1) * captions_each
    ids = torch.zeros(count * captions_each, 4, dtype=torch.int64)
    return Samples(torch.zeros(count, 3, 8, 8, dtype=torch.uint8), ids, starts, [frozenset(i) for i in identities])


@pytest.mark.parametrize("step", range(5))
def test_a_batch_never_holds_two_images_that_share_a_caption_or_their_pixels(step):
    random = np.random.default_rng(step)
    split = samples([set(random.integers(0, 60, 3).tolist()) for _ in range(50)])
    images, captions = draw_batch(split, 12, seed=0, step=step)
    members = [split.identities[i] for i in images.tolist()]
    assert sum(len(member) for member in members) == len(frozenset.union(*members))
    assert torch.equal(captions // 2, images)


def test_a_batch_is_a_function_of_seed_and_step():
    split = samples([{i} for i in range(40)])
    first = draw_batch(split, 8, seed=1, step=7)
    assert all(torch.equal(a, b) for a, b in zip(first, draw_batch(split, 8, seed=1, step=7), strict=True))
    assert not torch.equal(first[0], draw_batch(split, 8, seed=1, step=8)[0])
    assert not torch.equal(first[0], draw_batch(split, 8, seed=2, step=7)[0])


def test_crops_keep_left_and_right_and_the_whole_image_without_augmentation():
    image = torch.linspace(0, 1, 32).expand(6, 3, 32, 32)  # brighter to the right
    crops = random_crops(image, 24, min_crop=0.5, seed=0, step=3)
    assert crops.shape == (6, 3, 24, 24)
    assert (crops.diff(dim=-1) >= -1e-6).all()
    torch.testing.assert_close(random_crops(image, 32, min_crop=1.0, seed=0, step=3), image)
    assert cached_side(96, 0.8) == 108 and cached_side(64, 1.0) == 64


def test_learning_rate_warms_up_stays_and_falls_to_zero():
    config = EmbedderConfig(**CONFIG | {"warmup_steps": 4, "cooldown_steps": 10, "learning_rate": 1.0})
    assert [Progress(step=s).learning_rate(config) for s in (0, 3, 1000)] == [0.25, 1.0, 1.0]
    cooling = [Progress(step=s, cooldown_start=100).learning_rate(config) for s in (100, 105, 109)]
    assert cooling == pytest.approx([1.0, 0.5, 0.1])
    assert Progress(step=110, cooldown_start=100).is_done(config)


def test_tensors_go_in_order_and_a_shape_that_differs_is_named():
    target = {"a.weight": torch.zeros(2, 3), "a.bias": torch.zeros(2)}
    source = {"x.weight": torch.ones(2, 3), "x.bias": torch.ones(2), "classifier.weight": torch.ones(9, 2)}
    assert list(train_embedder.match_in_order(source, target, "file")) == ["a.weight", "a.bias"]
    with pytest.raises(UserError, match=r"file: x.bias \[5\] does not fit a.bias \[2\]"):
        train_embedder.match_in_order(source | {"x.bias": torch.ones(5)}, target, "file")
    with pytest.raises(UserError, match="1 tensors for the 2"):
        train_embedder.match_in_order({"x.weight": torch.ones(2, 3)}, target, "file")
