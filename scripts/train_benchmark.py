"""Benchmark section `train`: optimizer steps a second from stored patch tokens against from images.

Both run the product's own step (read, features, losses, backward, update) on the same rows and model, alternating.
From images a step decodes its files and runs the frozen backbone once; from stores it reads what that pass gave. The
backbone is a ViT-B/16 at 224 px with random weights (speed does not depend on them); the trained model is the demo's
(configs/demo.yaml: 16 vision tokens, 4 layers of width 128), which leaves the backbone the larger share, as
it is where training time is worth saving.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import torch

from data.caption_datasets import load_annotations
from data.neighbours import CaptionKeys
from data.scenes import write_scenes
from models.backbone import Backbone
from models.config import BackboneConfig
from models.indexing import precompute, precompute_captions
from models.ranks import Ranks
from training.config import RunConfig, load_config
from training.loop import Run, build_optimizer, optimizer_step
from training.objectives import Objectives
from training.setup import build_batches, build_model, load_training_split, open_features
from training.step_reader import StepReader

from .benchmark_timing import ROOT, alternate, ratio, spread

BACKBONE = BackboneConfig(name="ViT-B-16", pretrained="random")
NUM_IMAGES = 96
IMAGE_SIZE = 256


def benchmark_train(device: torch.device, rounds: int, batch_size: int) -> dict[str, Any]:
    """Steps a second of both ways, and their ratio round by round."""
    ranks = Ranks(device=device)
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        write_scenes(root, num_train=NUM_IMAGES, num_val=12, num_test=12, seed=0, image_size=IMAGE_SIZE)
        torch.manual_seed(0)
        backbone = Backbone.load(BACKBONE, device)
        _write_stores(root, backbone, ranks)
        contestants = {
            "from images": _stepper(_config(root, batch_size, from_store=False), ranks),
            "from the token store": _stepper(_config(root, batch_size, from_store=True), ranks),
        }
        seconds = alternate(contestants, rounds, warm_up=1, device=device)
    images, store = seconds["from images"], seconds["from the token store"]
    return {
        "backbone": "ViT-B-16, 224 px, random weights",
        "batch_size": batch_size,
        "rounds": rounds,
        "includes": "reading and decoding, features, losses, backward, optimizer",
        "steps_per_second": {name: spread([1 / s for s in values]) for name, values in seconds.items()},
        "ratio": ratio(images, store),
    }


def _config(root: Path, batch_size: int, from_store: bool) -> RunConfig:
    stores = [f"data.store={root / 'tokens'}", f"data.caption_store={root / 'captions'}"]
    return load_config(
        ROOT / "configs" / "demo.yaml",
        [
            *(stores if from_store else ["data.store=", "data.caption_store="]),
            f"backbone={{name: {BACKBONE.name}, pretrained: {BACKBONE.pretrained}}}",
            f"data.root={root}",
            f"output={root / 'run'}",
            "negatives.pool=batch",
            "model.init_from=",
            f"training.batch_size={batch_size}",
            "training.steps=100000",
        ],
    )


def _write_stores(root: Path, backbone: Backbone, ranks: Ranks) -> None:
    dataset = load_annotations(root / "dataset_scenes.json", root, "train")
    paths = [dataset.path(i) for i in range(len(dataset))]
    precompute(root / "tokens", paths, dataset.image_ids, backbone, ranks=ranks)
    precompute_captions(root / "captions", dataset.captions, backbone, ranks=ranks)


def _stepper(config: RunConfig, ranks: Ranks):
    """A call that trains one step; every contestant has a run of its own."""
    dataset = load_training_split(config, ranks)
    torch.manual_seed(0)  # a backbone of random weights is the same each time
    features = open_features(config, ranks)
    model = build_model(config, features, dataset, ranks).to(ranks.device)
    keys = CaptionKeys(dataset)
    run = Run(config, model, build_optimizer(model, config.training), ranks)
    batches = build_batches(config, features, dataset, keys, ranks)
    reader = StepReader(config, model.tokenizer, batches, features, keys, ranks)
    objectives = Objectives(config.objectives, config.negatives, config.seed, ranks)
    return lambda: optimizer_step(run, reader, objectives, len(dataset) / config.training.batch_size)
