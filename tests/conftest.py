"""A small real world that many tests share: rendered scenes on disk, a tiny backbone directory, stores, a run config.

Weights are random: what is tested is that parts agree, not how well they score."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml

from data.caption_datasets import load_annotations
from data.scenes.dataset import write_scenes
from models.config import BackboneConfig
from models.stores.token_store import TokenStoreWriter
from models.vision.backbones import Backbone
from models.vision.images import open_image
from models.vision.open_clip_backbone import WEIGHTS_FILE
from scripts.train_embedder import build_model, write_weights
from training.embedder.training import EmbedderConfig

ROOT = Path(__file__).parents[1]
EMBEDDER = {
    "model": {
        "embed_dim": 24,
        "vision_cfg": {"image_size": 32, "patch_size": 8, "width": 32, "layers": 2, "head_width": 16},
        "text_cfg": {"context_length": 20, "width": 32, "heads": 2, "layers": 1},
    },
    "preprocess": {"mean": [0.5] * 3, "std": [0.5] * 3, "interpolation": "bicubic", "resize_mode": "squash"},
}


def pytest_configure(config: pytest.Config) -> None:
    """Hide GPUs unless they are asked for (`-m gpu`): the suite means the same on every machine, its processes too."""
    if config.option.markexpr != "gpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""


LONG_FILES = ("test_demo", "test_ablate", "test_loop", "test_precompute_tokens", "test_evaluate_retrieval", "test_onnx")
"""Files of half a minute and more: first, so that no process is left with one of them when the others are done."""


@pytest.hookimpl(trylast=True)  # after the order was drawn
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: item.path.stem not in LONG_FILES)


@pytest.fixture(scope="session")
def wheel(tmp_path_factory) -> Path:
    """The package as pip builds it, without network, from a copy: setuptools leaves a build folder where it builds."""
    copy = tmp_path_factory.mktemp("package")
    shutil.copytree(ROOT / "models", copy / "models", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, copy)
    options = ["--quiet", "--no-deps", "--no-build-isolation", "--no-index", "--wheel-dir", str(copy / "dist")]
    subprocess.run([sys.executable, "-m", "pip", "wheel", *options, str(copy)], check=True, capture_output=True)
    return next((copy / "dist").glob("*.whl"))


@pytest.fixture(scope="session")
def scenes(tmp_path_factory) -> Path:
    """48 training, 12 validation and 12 test scenes with five captions each."""
    root = tmp_path_factory.mktemp("scenes")
    write_scenes(root, num_train=48, num_val=12, num_test=12, seed=3)
    return root


@pytest.fixture(scope="session")
def annotations(scenes: Path) -> Path:
    return scenes / "dataset_scenes.json"


@pytest.fixture(scope="session")
def backbone_dir(tmp_path_factory, scenes: Path, annotations: Path) -> Path:
    """An open_clip directory of a tiny ViT (16 patch tokens of width 32, embedding of width 24), random weights."""
    out = tmp_path_factory.mktemp("backbone")
    captions = load_annotations(annotations, scenes, "train").captions
    config = EmbedderConfig(
        model={k: v if isinstance(v, int) else dict(v) for k, v in EMBEDDER["model"].items()},
        preprocess=dict(EMBEDDER["preprocess"]),
    )
    clip = build_model(config, captions, out, seed=1)
    write_weights(clip, out / WEIGHTS_FILE, half=False)
    return out


@pytest.fixture(scope="session")
def backbone(backbone_dir: Path) -> Backbone:
    return Backbone.load(BackboneConfig(pretrained=str(backbone_dir)), precision="float32")


@pytest.fixture(scope="session")
def stores(tmp_path_factory, scenes: Path, annotations: Path, backbone: Backbone) -> tuple[Path, Path]:
    """(patch-token store, caption store) of all splits."""
    root = tmp_path_factory.mktemp("stores")
    splits = [load_annotations(annotations, scenes, split) for split in ("train", "val", "test")]
    ids = [image for split in splits for image in split.image_ids]
    captions = list(dict.fromkeys(caption for split in splits for caption in split.captions))
    pixels = torch.stack([backbone.preprocess(open_image(scenes / image)) for image in ids])
    images, dims, mark = backbone.encode_images(pixels), backbone.dims, backbone.fingerprint
    sizes = (dims.num_patches, dims.patch_width)
    for name, keys, shape, tokens, embeddings in (
        ("tokens", ids, sizes, images.patch_tokens, images.embedding),
        ("captions", captions, (0, 0), torch.empty(len(captions), 0, 0), backbone.encode_texts(captions)),
    ):
        writer = TokenStoreWriter(root / name, keys, *shape, dims.embedding_width, "float16", mark)
        for shard in writer.missing_shards():
            first = shard * writer.manifest.items_per_shard
            part = slice(first, first + len(writer.shard_ids(shard)))
            writer.write_shard(shard, tokens[part], embeddings[part])
        writer.finish()
    return root / "tokens", root / "captions"


@pytest.fixture
def run_config(tmp_path: Path, scenes: Path, backbone_dir: Path) -> Path:
    """A YAML file of a tiny run that reads images; tests override the rest on the command line."""
    config = {
        "output": str(tmp_path / "run"),
        "seed": 5,
        "backbone": {"pretrained": str(backbone_dir)},
        "model": {
            "adapter": {"num_tokens": 4, "mlp_width": 32, "num_heads": 4},
            "encoder": {"hidden_size": 32, "num_layers": 2, "num_heads": 2, "intermediate_size": 48,
                        "max_positions": 64, "hidden_dropout": 0.1, "attention_dropout": 0.1},
        },
        "data": {"root": str(scenes), "annotations": "dataset_scenes.json", "val_split": ""},
        "objectives": {"itc": 0.5},
        "training": {"steps": 6, "batch_size": 8, "warmup_steps": 2, "log_every": 1, "checkpoint_every": 100,
                     "precision": "float32"},
    }  # fmt: skip
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(config))
    return path
