"""CLIP and SigLIP models of `transformers`, tiny and random, as the directories that save_pretrained writes."""

from pathlib import Path

import torch
from torch import nn
from transformers import (
    CLIPConfig,
    CLIPImageProcessor,
    CLIPModel,
    CLIPTokenizer,
    GemmaTokenizer,
    PreTrainedTokenizerBase,
    SiglipConfig,
    SiglipImageProcessor,
    SiglipModel,
)

LETTERS = "abcdefghijklmnopqrstuvwxyz"
CONTEXT = 16
SIDE = 48
VISION = dict(
    hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2, image_size=SIDE, patch_size=8
)
TEXT = dict(
    hidden_size=24, intermediate_size=40, num_hidden_layers=2, num_attention_heads=2, max_position_embeddings=CONTEXT
)
PROJECTION = 20


def write_clip(directory: Path, seed: int = 0, **vision: object) -> Path:
    """A CLIPModel: 36 patch tokens of width 32, embeddings of width 20. Its tokens are letters."""
    pieces = ["<|startoftext|>", *LETTERS, *(f"{letter}</w>" for letter in LETTERS), "<|endoftext|>"]
    tokenizer = CLIPTokenizer(vocab={piece: i for i, piece in enumerate(pieces)}, merges=[])
    ends = dict(bos_token_id=0, eos_token_id=len(pieces) - 1, pad_token_id=len(pieces) - 1)
    config = CLIPConfig(
        vision_config=VISION | vision,
        text_config=TEXT | ends | {"vocab_size": len(pieces)},
        projection_dim=PROJECTION,
    )
    processor = CLIPImageProcessor(size={"shortest_edge": SIDE}, crop_size={"height": SIDE, "width": SIDE})
    return _save(directory, CLIPModel, config, seed, processor, tokenizer)


def write_siglip(directory: Path, seed: int = 0, text: dict[str, int] | None = None, **vision: object) -> Path:
    """A SiglipModel with SigLIP 2's tokenizer class and settings: 36 patch tokens and embeddings of width 32."""
    vision, text = VISION | vision, TEXT | (text or {})
    pieces = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>", "▁", *LETTERS, *LETTERS.upper()]
    tokenizer = GemmaTokenizer(
        vocab={piece: i for i, piece in enumerate(pieces)},
        merges=[],
        add_bos_token=False,
        add_eos_token=True,
        do_lower_case=True,
        padding_side="right",
        model_input_names=["input_ids"],
    )
    ends = dict(bos_token_id=2, eos_token_id=1, pad_token_id=0)
    config = SiglipConfig(
        vision_config=vision,
        text_config=text | ends | {"vocab_size": len(pieces), "projection_size": vision["hidden_size"]},
    )
    size = dict.fromkeys(("height", "width"), vision["image_size"])
    processor = SiglipImageProcessor(size=size, resample=2, do_convert_rgb=None)
    return _save(directory, SiglipModel, config, seed, processor, tokenizer)


def randomize(model: nn.Module, seed: int) -> None:
    """Weights wide enough apart that a norm, bias or activation left out shows."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=0.3, generator=generator)
            elif parameter.ndim == 1:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))


def _save(
    directory: Path,
    model_class: type,
    config: CLIPConfig | SiglipConfig,
    seed: int,
    processor: CLIPImageProcessor | SiglipImageProcessor,
    tokenizer: PreTrainedTokenizerBase,
) -> Path:
    model = model_class(config)
    randomize(model, seed)
    for part in (model, processor, tokenizer):
        part.save_pretrained(directory)
    return directory
