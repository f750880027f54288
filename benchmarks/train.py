"""Benchmark section `train`: optimizer steps a second from stored patch tokens against from images.

Both run the product's own step (read, features, losses, backward, update) on the same rows and model, alternating.
From images a step decodes its files and runs the frozen backbone once; from stores it reads what that pass gave. The
backbone is a ViT-B/16 at 224 px with random weights (speed does not depend on them); the trained model is the demo's
(configs/demo.yaml: 16 vision tokens, 4 layers of width 128), which leaves the backbone the larger share, as
it is where training time is worth saving.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from data.caption_datasets import load_annotations
from data.neighbours import CaptionKeys
from data.scenes.dataset import write_scenes
from models.config import BackboneConfig
from models.distributed import DistributedContext
from models.precision import resolve_precision
from models.stores.indexing import precompute, precompute_captions
from models.vision.backbones import Backbone
from training.config import RunConfig, load_config
from training.features import open_features
from training.loop import Run, build_optimizer, optimizer_step
from training.objectives import Objectives
from training.setup import build_batches, build_model, load_training_split
from training.step_reader import StepReader

from .timing import ROOT, alternate, ratio, spread

BACKBONE = BackboneConfig(name="ViT-B-16", pretrained="random")
NUM_IMAGES = 96
IMAGE_SIZE = 256


def benchmark_train(device: torch.device, rounds: int, batch_size: int) -> dict[str, Any]:
    """Steps a second of both ways, and their ratio round by round."""
    distributed = DistributedContext(device=device)
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        write_scenes(root, num_train=NUM_IMAGES, num_val=12, num_test=12, seed=0, image_size=IMAGE_SIZE)
        torch.manual_seed(0)
        backbone = Backbone.load(BACKBONE, device)
        _write_stores(root, backbone, distributed)
        contestants = {
            "from images": _stepper(_config(root, batch_size, from_store=False), distributed),
            "from the token store": _stepper(_config(root, batch_size, from_store=True), distributed),
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


def _write_stores(root: Path, backbone: Backbone, distributed: DistributedContext) -> None:
    dataset = load_annotations(root / "dataset_scenes.json", root, "train")
    paths = [dataset.path(i) for i in range(len(dataset))]
    precompute(root / "tokens", paths, dataset.image_ids, backbone, distributed=distributed)
    precompute_captions(root / "captions", dataset.captions, backbone, distributed=distributed)


def _stepper(config: RunConfig, distributed: DistributedContext) -> Callable[[], object]:
    """A call that trains one step; every contestant has a run of its own."""
    dataset = load_training_split(config, distributed)
    torch.manual_seed(0)  # a backbone of random weights is the same each time
    dtype = resolve_precision(config.training.precision, distributed.device)
    features = open_features(config, distributed, dtype)
    model = build_model(config, features, dataset, distributed).to(distributed.device)
    keys = CaptionKeys(dataset)
    run = Run(config, model, build_optimizer(model, config.training), distributed, dtype)
    batches = build_batches(config, features, None, dataset, keys, distributed)
    reader = StepReader(config, model.tokenizer, batches, features, None, keys, distributed)
    objectives = Objectives(config.objectives, config.negatives, config.seed, distributed)
    return lambda: optimizer_step(run, reader, objectives, len(dataset) / config.training.batch_size)
