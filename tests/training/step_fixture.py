"""One training step of a committed configuration, with small widths and made-up features."""

from __future__ import annotations

import torch
from torch.nn import functional as F

from models.config import BackboneConfig, BackboneDims, CompressionConfig, EDJEConfig, EncoderConfig
from models.distributed import DistributedContext
from models.edje import EDJE
from models.language.captions import CaptionTokenizer
from tests.processes import ROOT
from training.config import RunConfig, load_config
from training.features import StepInputs
from training.loop import Run, build_optimizer
from training.objectives import Objectives

DIMS = BackboneDims(num_patches=9, patch_width=12, embedding_width=10)


def emoji_run(
    output: str, distributed: DistributedContext, dtype: torch.dtype = torch.float32
) -> tuple[Run, Objectives]:
    """configs/emoji.yaml's objectives, negatives and schedule; MiniLM-L6's layers and dropout, but narrow ones."""
    config = load_config(ROOT / "configs" / "emoji.yaml", [f"output={output}"])
    tokenizer = CaptionTokenizer.from_pretrained(ROOT / "configs" / "pretrained" / "scenes")
    encoder = EncoderConfig(
        vocab_size=tokenizer.vocab_size,
        hidden_size=48,
        num_layers=6,
        num_heads=3,
        intermediate_size=96,
        max_positions=80,
    )
    adapter = CompressionConfig(num_tokens=8, mlp_width=64, num_heads=4)
    torch.manual_seed(0)
    model = EDJE(EDJEConfig(backbone=BackboneConfig(), dims=DIMS, adapter=adapter, encoder=encoder), tokenizer)
    model = model.to(distributed.device)
    run = Run(config, model, build_optimizer(model, config.training), distributed, dtype)
    return run, Objectives(config.objectives, config.negatives, config.seed, distributed)


def step_inputs(config: RunConfig, tokenizer: CaptionTokenizer, device: torch.device, seed: int = 0) -> StepInputs:
    """A batch of the configured size; captions have 1 to 12 words."""
    generator = torch.Generator().manual_seed(seed)
    count, words = config.training.batch_size, [word for word in tokenizer.vocab if word.isalpha()]
    captions = []
    for row in range(count):
        drawn = torch.randint(len(words), (1 + row % 12,), generator=generator)
        captions.append(" ".join(words[i] for i in drawn.tolist()))
    shapes = (count, 9, 12), (count, 10), (count, 10)
    patches, images, texts = (torch.randn(*shape, generator=generator) for shape in shapes)
    return StepInputs(
        rows=torch.arange(count),
        patch_tokens=patches.to(device),
        image_embeddings=F.normalize(images, dim=-1),
        text_embeddings=F.normalize(texts, dim=-1),
        captions=tokenizer(captions),
        excluded=torch.eye(count, dtype=torch.bool),
        random_share=0.15,
    )
