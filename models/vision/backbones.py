"""What EDJE needs of a frozen image-text model, and the families of models that give it.

A backbone turns an image into patch tokens and one embedding, in one pass, and a caption into an embedding. A new
family is one class over `Backbone` in a module of its own, and a line in FAMILIES. Families are imported when one is
loaded: each brings libraries that take seconds to import.

Shapes: B images, S image side, P patch tokens, Dv patch width, De embedding width, C captions.
"""

from __future__ import annotations

import importlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Self

import torch
from PIL import Image
from torch import Tensor, nn

from ..config import BackboneConfig, BackboneDims
from ..precision import resolve_precision


@dataclass(frozen=True)
class ImageFeatures:
    """What one pass of the image tower gives."""

    patch_tokens: Tensor
    """[B, P, Dv] float32, e.g. [32, 576, 1024]: after the tower's final norm, class token left out."""
    embedding: Tensor
    """[B, De] float32, L2-normalised."""


class Backbone(nn.Module, ABC):
    """A frozen image-text model in eval mode."""

    config: BackboneConfig
    dims: BackboneDims
    fingerprint: str
    """Short text that differs wherever tokens or embeddings would: models, weights, preprocessing, token options."""
    preprocess: Callable[[Image.Image], Tensor]
    """PIL image -> pixels, deterministic. It can be pickled, so data-loader workers may hold it without the model."""

    @staticmethod
    def load(config: BackboneConfig, device: str | torch.device = "cpu", precision: str = "auto") -> Backbone:
        """Build the model that `config` names, once, on `device`.

        precision: `float32`, `bfloat16`, or `auto` (the fastest that the device has). Raises UserError for an unknown
        name, weights that are missing, damaged or made for another activation, stages the tower lacks."""
        family = next(family for family in FAMILIES if family.serves(config))
        return family.backbone().build(config, torch.device(device), resolve_precision(precision, device))

    @classmethod
    @abstractmethod
    def build(cls, config: BackboneConfig, device: torch.device, dtype: torch.dtype) -> Self:
        """The model of this family; dtype: of its matrix products."""

    @property
    @abstractmethod
    def device(self) -> torch.device:
        """Where it runs, and where its outputs are."""

    @abstractmethod
    def encode_images(self, pixels: Tensor) -> ImageFeatures:
        """What `preprocess` gave of B images, stacked -> patch tokens and embedding; one forward of the image tower."""

    @abstractmethod
    def encode_texts(self, captions: Sequence[str]) -> Tensor:
        """C raw captions -> [C, De] float32, L2-normalised."""

    def train(self, mode: bool = True) -> Self:
        """Stays in eval mode whatever the module around it does."""
        return super().train(False)


@dataclass(frozen=True)
class Family:
    """A kind of backbone: where its class is, and which configurations it serves."""

    module: str
    name: str
    serves: Callable[[BackboneConfig], bool]

    def backbone(self) -> type[Backbone]:
        family: type[Backbone] = getattr(importlib.import_module(f".{self.module}", __package__), self.name)
        return family


FAMILIES = (Family("open_clip_backbone", "OpenClipBackbone", serves=lambda config: True),)
"""The first that serves a configuration builds it: a new family stands before open_clip's, which serves all."""
