"""What image towers have in common: a timm model that gives patch tokens alone, stage maps as tokens, weights by hash.

Shapes: B images, T image side, P patch tokens, Dv patch width.
"""

from __future__ import annotations

import hashlib
import json
import math
import pickle
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import timm
import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from timm.data import create_transform, resolve_model_data_config
from torch import Tensor, nn

from ..config import BackboneConfig
from ..errors import UserError, one_line
from ..state_dicts import load_state, read_safetensors
from .position_codes import grid_centres, position_codes

TIMM_WEIGHTS_FILE = "model.safetensors"
# What loading a file can raise: absent or damaged files, tensors of another architecture.
LOAD_ERRORS = (OSError, RuntimeError, ValueError, KeyError, SafetensorError, pickle.UnpicklingError, EOFError)


class TokenTower(nn.Module):
    """A frozen timm model that gives patch tokens and no embedding, with its own preprocessing.

    Of a ViT the tokens are the last block's after the final norm, class and register tokens left out; where timm has
    that norm only behind its pooling (BEiT, EVA), a LayerNorm without weights stands in for it. Of other towers they
    are made of stage maps (BackboneConfig.token_stages)."""

    def __init__(self, config: BackboneConfig, trunk: nn.Module, weights: str):
        super().__init__()
        self.trunk, self.stages, self.grid = trunk, config.token_stages, config.token_grid
        preprocessing = resolve_model_data_config(trunk)
        self.pixel_shape: tuple[int, int, int] = preprocessing["input_size"]
        self.preprocess = create_transform(**preprocessing, is_training=False)
        side, digest = self.pixel_shape[1], short_hash(preprocessing)
        self.fingerprint = f"{_timm_config(trunk)['architecture']}/{weights} {side}px-{digest}"

    @classmethod
    def load(cls, config: BackboneConfig) -> TokenTower:
        """Build the tower that `token_model` and `token_pretrained` name.

        Raises UserError for an unknown name, weights that are missing, damaged or of another architecture."""
        return cls(config, *_load_trunk(config.token_model, config.token_pretrained))

    def forward(self, pixels: Tensor) -> Tensor:
        """Preprocessed images [B, 3, T, T] -> [B, P, Dv], e.g. DINOv2 S/14 at 518 px: [B, 1369, 384]."""
        if self.stages:
            return maps_to_tokens(stage_maps(self.trunk, pixels, self.stages)[1], self.grid)
        if not hasattr(self.trunk, "num_prefix_tokens"):
            raise AssertionError(f"{type(self.trunk).__name__} does not say which of its tokens are patches")
        tokens = self.trunk.forward_features(pixels)  # type: ignore[operator]  # timm's models are plain modules to mypy
        if not isinstance(tokens, Tensor) or tokens.ndim != 3:
            raise AssertionError("the tower gives no sequence of tokens")
        tokens = tokens[:, self.trunk.num_prefix_tokens :]
        return F.layer_norm(tokens, tokens.shape[-1:]) if isinstance(self.trunk.norm, nn.Identity) else tokens


def _load_trunk(name: str, pretrained: str) -> tuple[nn.Module, str]:
    """(model without classifier, what its weights are for the fingerprint: tag or hash)."""
    if Path(pretrained).is_dir():
        if name:
            raise UserError(
                f"backbone.token_model is {name} and backbone.token_pretrained the directory {pretrained}, which "
                "brings its own architecture; leave backbone.token_model empty"
            )
        trunk = _create(f"local-dir:{pretrained}", where=pretrained)
        return _with_weights(trunk, Path(pretrained) / TIMM_WEIGHTS_FILE)
    if not timm.is_model(name):
        raise UserError(
            f"backbone.token_model {name!r} is not a timm model and backbone.token_pretrained {pretrained!r} is not a "
            "directory; see timm.list_models()"
        )
    if pretrained == "random":
        trunk = _create(name, where=name)
        return trunk, f"random-{weights_hash(trunk)}"
    tags = [known.partition(".")[2] for known in timm.list_models(f"{name}.*", pretrained=True)]
    if pretrained in tags:
        return _create(f"{name}.{pretrained}", where=f"weights {name}.{pretrained}", pretrained=True), pretrained
    if not Path(pretrained).is_file():
        raise UserError(
            f"backbone.token_model {name}: backbone.token_pretrained is {pretrained!r}, which is neither a file, a "
            f"directory nor a tag of this model; its tags: {', '.join(tags) or 'none'}; or 'random'"
        )
    return _with_weights(_create(name, where=name), Path(pretrained))


def _create(name: str, where: str, **options: Any) -> nn.Module:
    try:
        return timm.create_model(name, num_classes=0, **options)
    except (*LOAD_ERRORS, TypeError) as error:
        raise UserError(
            f"{where}: cannot be loaded as a timm model ({one_line(error)}); give a directory with config.json and "
            f"{TIMM_WEIGHTS_FILE}, or run once where the model hub can be reached"
        ) from None


def _with_weights(trunk: nn.Module, file: Path) -> tuple[nn.Module, str]:
    """The trunk with the weights of a .safetensors file in timm's naming, whose classifier is left out."""
    classifiers = _timm_config(trunk).get("classifier") or ()
    heads = tuple(f"{name}." for name in ([classifiers] if isinstance(classifiers, str) else classifiers))
    state = {name: tensor for name, tensor in read_safetensors(file).items() if not name.startswith(heads)}
    load_state(trunk, state, where=file)
    return trunk, weights_hash(trunk)


def _timm_config(trunk: nn.Module) -> dict[str, Any]:
    """What timm knows of the tower's weights: architecture, input size, names of the classifier's layers."""
    config = trunk.pretrained_cfg
    assert isinstance(config, dict)
    return config


def stage_maps(trunk: nn.Module, pixels: Tensor, stages: Sequence[int]) -> tuple[Tensor, list[Tensor]]:
    """A timm tower's last features, and the maps [B, channels, height, width] of the chosen stages."""
    pixels = pixels.contiguous(memory_format=torch.channels_last)  # convolutions run 1.8 times as fast on a CPU
    return trunk.forward_intermediates(pixels, indices=list(stages))  # type: ignore[operator]  # timm's own method


def maps_to_tokens(maps: list[Tensor], grid: int) -> Tensor:
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
    """[grid*grid, 16]: codes of the grid's cells at four frequencies, of unit variance."""
    frequencies = math.pi * torch.tensor([0.5, 1, 2, 4])
    return math.sqrt(2) * position_codes(grid_centres(grid, grid), frequencies).to(device)


def weights_hash(module: nn.Module) -> str:
    """Hash over names, shapes and values of all weights; the architecture is in it, the file's path is not."""
    digest = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        digest.update(f"{name}{tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()[:12]


def short_hash(settings: dict[str, Any]) -> str:
    """8 hex digits that change with any of the settings (YAML's own types)."""
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:8]
