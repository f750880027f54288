"""Backbones of open_clip: CLIP, DFN, MetaCLIP, SigLIP 2, and directories in its layout.

Any open_clip model serves. Weights come from an open_clip tag, a file, a directory (open_clip_config.json,
open_clip_model.safetensors, tokenizer files), a repository of the Hugging Face Hub in the same layout
(hf-hub:OWNER/NAME), or are random. What its patch tokens are:

CLIP, DFN, MetaCLIP   last block's patches after `ln_post`, class token left out, before the projection `proj`. In terms
                      of `transformers`: CLIPVisionModel's post_layernorm(last_hidden_state)[:, 1:]. These weights want
                      the QuickGELU architectures (ViT-L-14-quickgelu); a tag on another activation is refused.
SigLIP 2              last block's patches after the final norm, what the attention-pooling head reads; there is no
                      class token. SiglipVisionModel's last_hidden_state, but that timm computes the exact GELU in the
                      base and large towers where `transformers` has its tanh approximation (off by 5e-4 at most).
other timm towers     the trunk's features after its final norm, class and register tokens left out.
convolutional towers  maps of chosen stages on one grid (BackboneConfig.token_stages, token_grid).
`token_model`         tokens of a second, timm model (DINOv2, ...) with its own preprocessing; embeddings and text
                      stay the open_clip model's. One image pass of each.

Shapes: B images, S image side, T side of the token model's image, P patch tokens, Dv patch width, De embedding width,
C captions.
"""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Self, TypeAlias

import open_clip
import torch
import torch.nn.functional as F
from open_clip import CLIP, CustomTextCLIP
from open_clip.pretrained import get_pretrained_cfg, list_pretrained_tags_by_model
from open_clip.timm_model import TimmModel
from open_clip.transform import PreprocessCfg, image_transform_v2
from PIL import Image
from torch import Tensor

from ..config import BackboneConfig, BackboneDims
from ..errors import UserError, one_line
from .backbones import OPEN_CLIP_CONFIG, OPEN_CLIP_HUB, TRANSFORMERS_CONFIG, ImageFeatures, TorchBackbone
from .towers import LOAD_ERRORS, TokenTower, maps_to_tokens, short_hash, stage_maps, weights_hash

OpenClipModel: TypeAlias = CLIP | CustomTextCLIP
CONFIG_FILE = OPEN_CLIP_CONFIG
WEIGHTS_FILE = "open_clip_model.safetensors"


@dataclass(frozen=True)
class BothPixels:
    """PIL image -> what the open_clip model and the token model want to see of it, as one row: [3*S*S + 3*T*T].

    Sides, crops and normalisation differ; a row stacks, moves and pickles like any other pixels."""

    clip: Callable[[Image.Image], Tensor]
    tokens: Callable[[Image.Image], Tensor]

    def __call__(self, image: Image.Image) -> Tensor:
        return torch.cat([self.clip(image).flatten(), self.tokens(image).flatten()])


class OpenClipBackbone(TorchBackbone):
    """An open_clip model, and the token model where there is one. Pixels are [3, S, S], or BothPixels' row."""

    def __init__(
        self,
        config: BackboneConfig,
        clip: OpenClipModel,
        autocast_dtype: torch.dtype,
        weights: str,
        token_tower: TokenTower | None = None,
    ):
        super().__init__()
        self.config = config
        self.clip: OpenClipModel = clip
        self.token_tower = token_tower
        self.eval().requires_grad_(False)
        self.autocast_dtype = autocast_dtype
        self.preprocess = image_transform_v2(PreprocessCfg(**clip.visual.preprocess_cfg), is_train=False)
        if token_tower is not None:
            self.preprocess = BothPixels(self.preprocess, token_tower.preprocess)
        self.dims = self._measure()
        self.fingerprint = _fingerprint(config, clip, weights, token_tower)

    @classmethod
    def build(cls, config: BackboneConfig, device: torch.device, dtype: torch.dtype) -> Self:
        token_tower = TokenTower.load(config).to(device) if config.token_pretrained else None
        clip, weights = _load_clip(config)
        backbone = cls(config, clip.to(device), dtype, weights, token_tower)
        if config.pretrained != "random":
            _ = backbone.tokenizer  # a tokenizer that is missing shows now, not after the images were encoded
        return backbone

    @property
    def device(self) -> torch.device:
        return self.clip.logit_scale.device

    # no_grad rather than inference_mode: the adapter keeps these tokens for its own backward pass.
    @torch.no_grad()
    def encode_images(self, pixels: Tensor) -> ImageFeatures:
        """What `preprocess` gave of B images, stacked -> patch tokens [B, P, Dv] and embedding [B, De].

        One forward of the image tower gives both; with a token model, one of each tower."""
        pixels = pixels.to(self.device)
        with self._autocast():
            if self.token_tower is not None:
                shapes = (3, *open_clip.utils.to_2tuple(self.clip.visual.image_size)), self.token_tower.pixel_shape
                own, theirs = pixels.split([math.prod(shape) for shape in shapes], dim=1)
                tokens = self.token_tower(theirs.unflatten(1, shapes[1]))
                embedding = self.clip.encode_image(own.unflatten(1, shapes[0]))
            elif self.config.token_stages:
                visual = self.clip.visual
                last, maps = stage_maps(visual.trunk, pixels, self.config.token_stages)
                tokens = maps_to_tokens(maps, self.config.token_grid)
                embedding = visual.head(visual.trunk.forward_head(last))
            else:
                output = self.clip.visual.forward_intermediates(
                    pixels, indices=1, normalize_intermediates=True, output_fmt="NLC"
                )
                tokens, embedding = output["image_intermediates"][-1], output["image_features"]
        return ImageFeatures(tokens.float(), F.normalize(embedding.float(), dim=-1))

    def _tokenize(self, captions: list[str]) -> Tensor:
        ids: Tensor = self.tokenizer(captions)
        return ids

    def _embed_tokens(self, tokens: Tensor) -> Tensor:
        embedding: Tensor = self.clip.encode_text(tokens)
        return embedding

    @cached_property
    def tokenizer(self) -> Any:
        """open_clip's tokenizer: list of captions -> ids [C, context length]."""
        name = self.config.name or f"local-dir:{self.config.pretrained}"
        try:
            return open_clip.get_tokenizer(name)
        except LOAD_ERRORS as error:
            raise UserError(
                f"backbone {name}: its tokenizer cannot be loaded ({one_line(error)}); "
                "put the tokenizer files beside the weights, or run once where the model hub can be reached"
            ) from None

    def _measure(self) -> BackboneDims:
        """Sizes from a pass over one blank image, after the checks that such a pass needs."""
        visual, stages, alone = self.clip.visual, self.config.token_stages, self.token_tower is None
        if alone and stages and not isinstance(visual, TimmModel):
            raise UserError(
                f"backbone.token_stages is {list(stages)}, but the image tower is not a timm model; leave it empty"
            )
        if alone and not hasattr(visual, "forward_intermediates"):
            raise UserError(f"backbone {self.config.name}: image tower {type(visual).__name__} gives no patch tokens")
        blank = self.preprocess(Image.new("RGB", (64, 64)))[None]
        try:
            features = self.encode_images(blank)
        except (AssertionError, IndexError) as error:
            names = (self.config.name, self.config.pretrained)
            names = names if alone else (self.config.token_model, self.config.token_pretrained)
            raise UserError(
                f"backbone {names[0] or names[1]}: no patch tokens with token_stages "
                f"{list(stages)} ({one_line(error)}); a convolutional tower needs token_stages and token_grid, "
                "e.g. [2, 3, 4] and 10, a ViT needs neither"
            ) from None
        _, patches, width = features.patch_tokens.shape
        return BackboneDims(num_patches=patches, patch_width=width, embedding_width=features.embedding.shape[1])


def load_directory(directory: Path, load_weights: bool = True) -> OpenClipModel:
    """The open_clip model of a directory. A relative `hf_model_name` in its config is a folder of that directory.

    Raises UserError where config or weights are missing, damaged, or do not belong together."""
    config_file = directory / CONFIG_FILE
    if not config_file.is_file():
        raise UserError(
            f"{directory}: {CONFIG_FILE} is missing; expected the directory of an open_clip model, or of a "
            f"transformers model with its {TRANSFORMERS_CONFIG}"
        )
    if load_weights and not (directory / WEIGHTS_FILE).is_file():
        raise UserError(
            f"{directory}: {WEIGHTS_FILE} is missing; copy it there, or train it (scripts/train_embedder.py)"
        )
    try:
        text_config = json.loads(config_file.read_text(encoding="utf-8"))["model_cfg"]["text_cfg"]
        text_model = text_config.get("hf_model_name")
        if text_model and (directory / text_model).is_dir():
            text_config |= {"hf_model_name": str(directory / text_model), "hf_model_pretrained": False}
        return _create(f"local-dir:{directory}", text_cfg=text_config, load_weights=load_weights)
    except (*LOAD_ERRORS, TypeError) as error:
        raise UserError(f"{directory}: cannot be loaded as an open_clip model ({one_line(error)})") from None


def _load_clip(config: BackboneConfig) -> tuple[OpenClipModel, str]:
    """(model, what its weights are for the fingerprint: tag or hash)."""
    name, pretrained = config.name, config.pretrained
    if Path(pretrained).is_dir() and pretrained:
        if name:
            raise UserError(
                f"backbone.name is {name} and backbone.pretrained the directory {pretrained}, which brings its own "
                "architecture; leave backbone.name empty"
            )
        clip = load_directory(Path(pretrained))
        return clip, weights_hash(clip)
    if name.startswith(OPEN_CLIP_HUB):
        return _load_hub(name, pretrained)
    if open_clip.get_model_config(name) is None:
        raise UserError(
            f"backbone.name {name!r} is not an open_clip architecture and backbone.pretrained {pretrained!r} is not a "
            "directory; see open_clip.list_models(), give an existing model directory, or set backbone.name to a "
            f"model of the Hub: OWNER/NAME (transformers) or {OPEN_CLIP_HUB}OWNER/NAME (open_clip)"
        )
    if pretrained == "random":
        clip = _create(name)
        return clip, f"random-{weights_hash(clip)}"
    if get_pretrained_cfg(name, pretrained):
        return _load_tag(name, pretrained), pretrained
    return _load_file(name, Path(pretrained))


def _load_hub(name: str, pretrained: str) -> tuple[OpenClipModel, str]:
    """A repository of the Hub in open_clip's layout, from the cache or the network. Its directory has the same hash."""
    if pretrained:
        raise UserError(
            f"backbone.name is {name} and backbone.pretrained {pretrained!r}, but the repository brings its own "
            "weights; leave backbone.pretrained empty"
        )
    try:
        clip = _create(name, require_pretrained=True)
    except (*LOAD_ERRORS, TypeError) as error:
        raise UserError(
            f"backbone.name {name}: cannot be loaded as an open_clip model of the Hub ({one_line(error)}); check the "
            "name, run once where the model hub can be reached, or download the repository elsewhere and set "
            "backbone.pretrained to its directory"
        ) from None
    return clip, weights_hash(clip)


def _load_tag(name: str, tag: str) -> OpenClipModel:
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
            f"backbone {name}: weights {tag!r} cannot be loaded ({one_line(error)}); run once where the model hub "
            "can be reached, or download the file elsewhere and set backbone.pretrained to its path"
        ) from None


def _load_file(name: str, file: Path) -> tuple[OpenClipModel, str]:
    if not file.is_file():
        raise UserError(
            f"backbone {name}: backbone.pretrained is {str(file)!r}, which is neither a file, a directory nor a tag "
            f"of this architecture; its tags: {', '.join(list_pretrained_tags_by_model(name)) or 'none'}; or 'random'"
        )
    try:
        clip = _create(name, pretrained=str(file))
    except LOAD_ERRORS as error:
        raise UserError(f"{file}: cannot be loaded as weights of {name} ({one_line(error)})") from None
    return clip, weights_hash(clip)


def _create(name: str, **options: Any) -> OpenClipModel:
    """open_clip's own factory, quiet: what matters of its log is an error of ours."""
    logger, level = logging.getLogger(), logging.getLogger().level
    logger.setLevel(logging.CRITICAL)
    try:
        return open_clip.create_model(name, pretrained_text=False, **options)
    finally:
        logger.setLevel(level)


def _fingerprint(config: BackboneConfig, clip: OpenClipModel, weights: str, token_tower: TokenTower | None) -> str:
    preprocessing = deepcopy(clip.visual.preprocess_cfg)
    preprocessing["size"] = list(open_clip.utils.to_2tuple(preprocessing["size"]))
    # A repository's files are the same model wherever they lie.
    name = "open_clip" if config.name.startswith(OPEN_CLIP_HUB) else config.name or "open_clip"
    text = f"{name}/{weights} {preprocessing['size'][0]}px-{short_hash(preprocessing)}"
    if token_tower is not None:
        text += f" tokens {token_tower.fingerprint}"
    if config.token_stages:
        text += f" stages {list(config.token_stages)} grid {config.token_grid} with positions"
    return text
