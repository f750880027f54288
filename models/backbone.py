"""The frozen CLIP-style model: one pass of the image tower gives patch tokens and embedding; a text pass an embedding.

Any open_clip model serves: ViTs (openai, dfn2b, metaclip: QuickGELU architectures by name), timm towers (SigLIP 2),
and convolutional timm towers, whose stage maps become tokens (BackboneConfig.token_stages, token_grid). Weights come
from an open_clip tag, a file, a directory (open_clip_config.json, open_clip_model.safetensors, tokenizer files), or are
random.

Shapes: B images, S image side, P patch tokens, Dv patch width, De embedding width, C captions.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import pickle
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from copy import deepcopy
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from threading import Lock
from typing import Any

import open_clip
import torch
import torch.nn.functional as F
from open_clip.pretrained import get_pretrained_cfg, list_pretrained_tags_by_model
from open_clip.timm_model import TimmModel
from open_clip.transform import PreprocessCfg, image_transform_v2
from safetensors import SafetensorError
from torch import Tensor, nn

from .config import BackboneConfig, BackboneDims
from .errors import UserError
from .places import grid_places, place_codes

CONFIG_FILE = "open_clip_config.json"
WEIGHTS_FILE = "open_clip_model.safetensors"
TEXT_BATCH = 256
# Hugging Face's fast tokenizers refuse to be used by two threads at once ("Already borrowed").
_TOKENIZER_LOCK = Lock()
# What loading a file can raise: absent or damaged files, tensors of another architecture.
LOAD_ERRORS = (OSError, RuntimeError, ValueError, KeyError, SafetensorError, pickle.UnpicklingError, EOFError)


@dataclass(frozen=True)
class ImageFeatures:
    """What one pass of the image tower gives."""

    patch_tokens: Tensor
    """[B, P, Dv] float32, e.g. [32, 576, 1024]: after the tower's final norm, class token left out."""
    embedding: Tensor
    """[B, De] float32, L2-normalised."""


class Backbone(nn.Module):
    """A frozen open_clip model in eval mode. `preprocess` is the deterministic PIL image -> [3, S, S] transform; it can
    be pickled, so data-loader workers may hold it without the model."""

    def __init__(self, config: BackboneConfig, clip: nn.Module, autocast_dtype: torch.dtype, weights: str):
        super().__init__()
        self.config = config
        self.clip = clip.eval().requires_grad_(False)
        self.autocast_dtype = autocast_dtype
        self.preprocess = image_transform_v2(PreprocessCfg(**clip.visual.preprocess_cfg), is_train=False)
        self.dims = self._measure()
        self.fingerprint = _fingerprint(config, clip, weights)

    @classmethod
    def load(cls, config: BackboneConfig, device: str | torch.device = "cpu", precision: str = "auto") -> Backbone:
        """Build the model that `config` names, once, on `device`.

        precision: `float32`, `bfloat16`, or `auto` (bfloat16 where it is measured to be faster). Raises UserError for
        an unknown name, weights that are missing, damaged or made for another activation, stages the tower lacks.
        """
        if precision not in ("auto", "float32", "bfloat16"):
            raise UserError(f"precision is {precision!r}; expected auto, float32 or bfloat16")
        if precision == "auto":
            from .precision import fastest_dtype

            dtype = fastest_dtype(torch.device(device))
        else:
            dtype = getattr(torch, precision)
        clip, weights = _load_clip(config)
        backbone = cls(config, clip.to(device), dtype, weights)
        if config.pretrained != "random":
            _ = backbone.tokenizer  # a tokenizer that is missing shows now, not after the images were encoded
        return backbone

    @property
    def device(self) -> torch.device:
        return self.clip.logit_scale.device

    def train(self, mode: bool = True) -> Backbone:
        """Stays in eval mode whatever the module around it does."""
        return super().train(False)

    # no_grad rather than inference_mode: the adapter keeps these tokens for its own backward pass.
    @torch.no_grad()
    def encode_images(self, pixels: Tensor) -> ImageFeatures:
        """Preprocessed images [B, 3, S, S] -> patch tokens [B, P, Dv] and embedding [B, De], from one forward."""
        pixels = pixels.to(self.device)
        with self._autocast():
            if self.config.token_stages:
                maps, embedding = self._stage_maps(pixels)
                tokens = _maps_to_tokens(maps, self.config.token_grid)
            else:
                output = self.clip.visual.forward_intermediates(
                    pixels, indices=1, normalize_intermediates=True, output_fmt="NLC"
                )
                tokens, embedding = output["image_intermediates"][-1], output["image_features"]
        return ImageFeatures(tokens.float(), F.normalize(embedding.float(), dim=-1))

    @torch.no_grad()
    def encode_texts(self, captions: Sequence[str]) -> Tensor:
        """C raw captions -> [C, De] float32, L2-normalised."""
        embeddings = [torch.empty(0, self.dims.embedding_width, device=self.device)]
        for start in range(0, len(captions), TEXT_BATCH):
            with _TOKENIZER_LOCK:
                ids = self.tokenizer(list(captions[start : start + TEXT_BATCH])).to(self.device)
            with self._autocast():
                embedding = self.clip.encode_text(ids)
            embeddings.append(F.normalize(embedding.float(), dim=-1))
        return torch.cat(embeddings)

    @cached_property
    def tokenizer(self) -> Any:
        """open_clip's tokenizer: list of captions -> ids [C, context length]."""
        source = Path(self.config.pretrained)
        name = f"local-dir:{source}" if source.is_dir() else self.config.name
        try:
            return open_clip.get_tokenizer(name)
        except LOAD_ERRORS as error:
            raise UserError(
                f"backbone {name}: its tokenizer cannot be loaded ({_first_line(error)}); "
                "put the tokenizer files beside the weights, or run once where the model hub can be reached"
            ) from None

    def _autocast(self) -> AbstractContextManager:
        # Weights stay in float32; matrix products run in bfloat16. Float32 holds inside a caller's autocast too.
        device = self.device.type
        if not torch.amp.is_autocast_available(device):  # the meta device, which only has shapes
            return nullcontext()
        return torch.autocast(device, dtype=torch.bfloat16, enabled=self.autocast_dtype != torch.float32)

    def _stage_maps(self, pixels: Tensor) -> tuple[list[Tensor], Tensor]:
        """Feature maps [B, channels, height, width] of the chosen stages, and the embedding [B, De] before its norm."""
        visual = self.clip.visual
        pixels = pixels.contiguous(memory_format=torch.channels_last)  # convolutions run 1.8 times as fast on a CPU
        last, maps = visual.trunk.forward_intermediates(pixels, indices=list(self.config.token_stages))
        return maps, visual.head(visual.trunk.forward_head(last))

    def _measure(self) -> BackboneDims:
        """Sizes from a pass over one blank image, after the checks that such a pass needs."""
        visual, stages = self.clip.visual, self.config.token_stages
        if stages and not isinstance(visual, TimmModel):
            raise UserError(
                f"backbone.token_stages is {list(stages)}, but the image tower is not a timm model; leave it empty"
            )
        if not hasattr(visual, "forward_intermediates"):
            raise UserError(f"backbone {self.config.name}: image tower {type(visual).__name__} gives no patch tokens")
        blank = torch.zeros(1, 3, *open_clip.utils.to_2tuple(visual.image_size))
        try:
            features = self.encode_images(blank)
        except (AssertionError, IndexError) as error:
            raise UserError(
                f"backbone {self.config.name or self.config.pretrained}: no patch tokens with token_stages "
                f"{list(stages)} ({_first_line(error)}); a convolutional tower needs token_stages and token_grid, "
                "e.g. [2, 3, 4] and 10, a ViT needs neither"
            ) from None
        _, patches, width = features.patch_tokens.shape
        return BackboneDims(num_patches=patches, patch_width=width, embedding_width=features.embedding.shape[1])


def _maps_to_tokens(maps: list[Tensor], grid: int) -> Tensor:
    """Stage maps -> [B, grid*grid, sum of channels + 16]: resampled to one grid, each stage normalised by itself.

    The norm stands in for the final norm of a ViT: stages differ in scale by an order of magnitude. The last channels
    say where on the grid a token stands, as a ViT's position embeddings do and a convolution's map does not."""
    tokens = []
    for stage in maps:
        stage = F.interpolate(stage.float(), size=(grid, grid), mode="bilinear", antialias=True, align_corners=False)
        rows = stage.flatten(2).transpose(1, 2)  # [B, grid*grid, channels]
        tokens.append(F.layer_norm(rows, rows.shape[-1:]))
    tokens.append(_grid_positions(grid, maps[0].device).expand(len(maps[0]), -1, -1))
    return torch.cat(tokens, dim=-1)


def _grid_positions(grid: int, device: torch.device) -> Tensor:
    """[grid*grid, 16]: codes of the grid's places at four frequencies, of unit variance."""
    frequencies = math.pi * torch.tensor([0.5, 1, 2, 4])
    return math.sqrt(2) * place_codes(grid_places(grid, grid), frequencies).to(device)


def load_directory(directory: Path, load_weights: bool = True) -> nn.Module:
    """The open_clip model of a directory. A relative `hf_model_name` in its config is a folder of that directory.

    Raises UserError where config or weights are missing, damaged, or do not belong together."""
    config_file = directory / CONFIG_FILE
    if not config_file.is_file():
        raise UserError(f"{directory}: {CONFIG_FILE} is missing; expected an open_clip model directory")
    if load_weights and not (directory / WEIGHTS_FILE).is_file():
        raise UserError(
            f"{directory}: {WEIGHTS_FILE} is missing; copy it there, or train it (scripts/train_embedder.py)"
        )
    try:
        text_config = json.loads(config_file.read_text())["model_cfg"]["text_cfg"]
        text_model = text_config.get("hf_model_name")
        if text_model and (directory / text_model).is_dir():
            text_config |= {"hf_model_name": str(directory / text_model), "hf_model_pretrained": False}
        return _create(f"local-dir:{directory}", text_cfg=text_config, load_weights=load_weights)
    except (*LOAD_ERRORS, TypeError) as error:
        raise UserError(f"{directory}: cannot be loaded as an open_clip model ({_first_line(error)})") from None


def _load_clip(config: BackboneConfig) -> tuple[nn.Module, str]:
    """(model, what its weights are for the fingerprint: tag or hash)."""
    name, pretrained = config.name, config.pretrained
    if Path(pretrained).is_dir() and pretrained:
        if name:
            raise UserError(
                f"backbone.name is {name} and backbone.pretrained the directory {pretrained}, which brings its own "
                "architecture; leave backbone.name empty"
            )
        clip = load_directory(Path(pretrained))
        return clip, _weights_hash(clip)
    if open_clip.get_model_config(name) is None:
        raise UserError(
            f"backbone.name {name!r} is not an open_clip architecture and backbone.pretrained {pretrained!r} is not a "
            "directory; see open_clip.list_models(), or give an existing model directory"
        )
    if pretrained == "random":
        clip = _create(name)
        return clip, f"random-{_weights_hash(clip)}"
    if get_pretrained_cfg(name, pretrained):
        return _load_tag(name, pretrained), pretrained
    return _load_file(name, Path(pretrained))


def _load_tag(name: str, tag: str) -> nn.Module:
    needs_quick_gelu = bool(get_pretrained_cfg(name, tag).get("quick_gelu"))
    if needs_quick_gelu and not open_clip.get_model_config(name).get("quick_gelu"):
        raise UserError(
            f"backbone {name}: weights {tag!r} were trained with QuickGELU, which this architecture lacks; "
            f"set backbone.name to {name}-quickgelu"
        )
    try:
        return _create(name, pretrained=tag)
    except LOAD_ERRORS as error:
        raise UserError(
            f"backbone {name}: weights {tag!r} cannot be loaded ({_first_line(error)}); run once where the model hub "
            "can be reached, or download the file elsewhere and set backbone.pretrained to its path"
        ) from None


def _load_file(name: str, file: Path) -> tuple[nn.Module, str]:
    if not file.is_file():
        raise UserError(
            f"backbone {name}: backbone.pretrained is {str(file)!r}, which is no file, no directory and no tag of this "
            f"architecture; its tags: {', '.join(list_pretrained_tags_by_model(name)) or 'none'}; or 'random'"
        )
    try:
        clip = _create(name, pretrained=str(file))
    except LOAD_ERRORS as error:
        raise UserError(f"{file}: cannot be loaded as weights of {name} ({_first_line(error)})") from None
    return clip, _weights_hash(clip)


def _create(name: str, **options: Any) -> nn.Module:
    """open_clip's own factory, quiet: what matters of its log is an error of ours."""
    logger, level = logging.getLogger(), logging.getLogger().level
    logger.setLevel(logging.CRITICAL)
    try:
        return open_clip.create_model(name, pretrained_text=False, **options)
    finally:
        logger.setLevel(level)


def _fingerprint(config: BackboneConfig, clip: nn.Module, weights: str) -> str:
    """Short text that differs wherever tokens or embeddings would: model, weights, preprocessing, token options."""
    look = deepcopy(clip.visual.preprocess_cfg)
    look["size"] = list(open_clip.utils.to_2tuple(look["size"]))
    tokens = (
        f" stages {list(config.token_stages)} grid {config.token_grid} with positions" if config.token_stages else ""
    )
    preprocessing = hashlib.sha256(json.dumps(look, sort_keys=True).encode()).hexdigest()[:8]
    return f"{config.name or 'open_clip'}/{weights} {look['size'][0]}px-{preprocessing}{tokens}"


def _weights_hash(clip: nn.Module) -> str:
    """Hash over names, shapes and values of all weights; the architecture is in it, the file's place is not."""
    digest = hashlib.sha256()
    for name, tensor in sorted(clip.state_dict().items()):
        digest.update(f"{name}{tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()[:12]


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
