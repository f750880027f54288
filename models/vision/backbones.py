"""What EDJE needs of a frozen image-text model, and the families of models that give it.

A backbone turns an image into patch tokens and one embedding, in one pass, and a caption into an embedding. A new
family is one class over `Backbone` in a module of its own, and a line in FAMILIES. Families are imported when one is
loaded: each brings libraries that take seconds to import.

Shapes: B images, S image side, P patch tokens, Dv patch width, De embedding width, C captions.
"""

from __future__ import annotations

import importlib
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from threading import Lock
from typing import Any, Self

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from ..config import BackboneConfig, BackboneDims
from ..precision import resolve_precision

OPEN_CLIP_CONFIG = "open_clip_config.json"
TRANSFORMERS_CONFIG = "config.json"
OPEN_CLIP_HUB = "hf-hub:"
_REPOSITORY = re.compile(r"\w[\w.-]*/\w[\w.-]*")
TEXT_BATCH = 256
# Hugging Face's fast tokenizers refuse to be used by two threads at once ("Already borrowed").
_TOKENIZER_LOCK = Lock()


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


class TorchBackbone(Backbone):
    """A backbone whose towers are PyTorch modules. Weights stay in float32; matrix products run in `autocast_dtype`."""

    autocast_dtype: torch.dtype

    @abstractmethod
    def _tokenize(self, captions: list[str]) -> Any:
        """Captions -> what the text tower reads, on the CPU; it has `to(device)`."""

    @abstractmethod
    def _embed_tokens(self, tokens: Any) -> Tensor:
        """What `_tokenize` gave, on the device -> embeddings [C, De], not normalised."""

    # no_grad rather than inference_mode: outputs may enter a backward pass of others.
    @torch.no_grad()
    def encode_texts(self, captions: Sequence[str]) -> Tensor:
        """C raw captions -> [C, De] float32, L2-normalised."""
        embeddings = [torch.empty(0, self.dims.embedding_width, device=self.device)]
        for start in range(0, len(captions), TEXT_BATCH):
            with _TOKENIZER_LOCK:
                tokens = self._tokenize(list(captions[start : start + TEXT_BATCH])).to(self.device)
            with self._autocast():
                embedding = self._embed_tokens(tokens)
            embeddings.append(F.normalize(embedding.float(), dim=-1))
        return torch.cat(embeddings)

    def _autocast(self) -> AbstractContextManager:
        # Float32 holds inside a caller's autocast too.
        device = self.device.type
        if not torch.amp.is_autocast_available(device):  # the meta device, which only has shapes
            return nullcontext()
        return torch.autocast(device, dtype=torch.bfloat16, enabled=self.autocast_dtype != torch.float32)


@dataclass(frozen=True)
class Family:
    """A kind of backbone: where its class is, and which configurations it serves."""

    module: str
    name: str
    serves: Callable[[BackboneConfig], bool]

    def backbone(self) -> type[Backbone]:
        family: type[Backbone] = getattr(importlib.import_module(f".{self.module}", __package__), self.name)
        return family


def is_transformers_directory(path: str) -> bool:
    """Whether a model of transformers lies there: its config.json does."""
    return bool(path) and Path(path, TRANSFORMERS_CONFIG).is_file()


def is_of_transformers(config: BackboneConfig) -> bool:
    """Whether a model of transformers is named: OWNER/NAME on the Hub, or its directory.

    A directory named as `pretrained` is open_clip's where it is both's: so it was before there was another family."""
    if config.name:
        named = "/" in config.name and not config.name.startswith(OPEN_CLIP_HUB)
        return named or is_transformers_directory(config.name)
    return is_transformers_directory(config.pretrained) and not Path(config.pretrained, OPEN_CLIP_CONFIG).is_file()


def hub_repository(config: BackboneConfig) -> str | None:
    """OWNER/NAME of the Hub where the configuration names one, else None. A folder of that name takes precedence."""
    name = config.name.removeprefix(OPEN_CLIP_HUB)
    return name if _REPOSITORY.fullmatch(name) and not Path(name).exists() else None


FAMILIES = (
    Family("transformers_backbone", "TransformersBackbone", serves=is_of_transformers),
    Family("open_clip_backbone", "OpenClipBackbone", serves=lambda config: True),
)
"""The first that serves a configuration builds it: a new family stands before open_clip's, which serves all."""
