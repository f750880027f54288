"""A backbone, a checkpoint and images, all tiny and random, as files: for tests that start from directories."""

import json
from pathlib import Path

import numpy as np
import open_clip
import torch
from PIL import Image
from safetensors.torch import save_file

from models.config import BackboneConfig, CompressionConfig, EDJEConfig, EncoderConfig
from models.edje import EDJE
from models.language.captions import CaptionTokenizer, build_vocabulary
from models.vision.backbones import Backbone

CAPTIONS = ["a red ball", "two dogs by the sea", "a green cube on a table"]
CLIP = {
    "model_cfg": {
        "embed_dim": 12,
        "vision_cfg": {"image_size": 32, "layers": 2, "width": 32, "head_width": 16, "patch_size": 8},
        "text_cfg": {"context_length": 16, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1},
    },
    "preprocess_cfg": {"mean": [0.5, 0.5, 0.5], "std": [0.5, 0.5, 0.5], "resize_mode": "squash"},
}


def write_backbone(directory: Path, seed: int = 0) -> BackboneConfig:
    """An open_clip ViT on 32 x 32 images: 16 patch tokens of width 32, embeddings of width 12."""
    torch.manual_seed(seed)
    directory.mkdir(parents=True)
    (directory / "open_clip_config.json").write_text(json.dumps(CLIP))
    clip = open_clip.create_model(f"local-dir:{directory}", load_weights=False)
    state = {name: value for name, value in clip.state_dict().items() if torch.is_tensor(value)}
    save_file(state, directory / "open_clip_model.safetensors")
    return BackboneConfig(pretrained=str(directory))


def make_model(backbone: Backbone, vocabulary: Path, **options) -> EDJE:
    """4 vision tokens of width 16, two layers; a match head that is wide enough apart to tell candidates."""
    build_vocabulary(CAPTIONS, vocabulary)
    tokenizer = CaptionTokenizer.from_pretrained(vocabulary)
    config = EDJEConfig(
        backbone=backbone.config,
        dims=backbone.dims,
        backbone_fingerprint=backbone.fingerprint,
        adapter=options.pop("adapter", CompressionConfig(num_tokens=4, mlp_width=16, num_heads=2)),
        encoder=EncoderConfig(
            vocab_size=tokenizer.vocab_size, hidden_size=16, num_layers=2, num_heads=2, intermediate_size=32
        ),
        **options,
    )
    torch.manual_seed(1)
    model = EDJE(config, tokenizer)
    for name, parameter in model.named_parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.3 if name.startswith(("adapter", "encoder")) else 1.0)
    return model.eval()


def write_images(folder: Path, count: int, seed: int = 0) -> list[str]:
    """Random images of different sizes in two sub-folders, .png; their paths relative to `folder`, sorted."""
    generator = np.random.default_rng(seed)
    names = sorted(f"{'ab'[i % 2]}/{i:03d}.png" for i in range(count))
    for name in names:
        height, width = generator.integers(20, 50, size=2)
        pixels = generator.integers(0, 256, size=(height // 8 + 1, width // 8 + 1, 3), dtype=np.uint8)
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).resize((width, height)).save(folder / name)
    return names
