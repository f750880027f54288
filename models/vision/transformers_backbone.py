"""Backbones of `transformers`: CLIP, and SigLIP with fixed resolution, whose SigLIP 2 weights are the same class.

A model is named as on the Hugging Face Hub (google/siglip2-large-patch16-384) or by a directory in that layout, and is
used as it was published, with its own image processor, tokenizer and activation:

pixels        `AutoImageProcessor`'s of today, which resizes with torchvision. Pillow's resize, the default of
              transformers 4, rounds differently: by one of 255 steps, here and there two.
patch tokens  SiglipModel: last_hidden_state, what its pooling head reads. CLIPModel: last_hidden_state after
              post_layernorm, which `transformers` applies to the class token alone, and without that token.
embeddings    `get_image_features` and `get_text_features`, L2-normalised. Captions are cut at the text tower's
              context length; SigLIP's are padded to it and padding is not masked, as in its training.

Shapes: B images, S image side, P patch tokens, Dv patch width, De embedding width, C captions.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Self

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from transformers import AutoImageProcessor, AutoTokenizer, CLIPModel, PreTrainedConfig, SiglipModel
from transformers.utils import logging

from ..config import BackboneConfig, BackboneDims
from ..errors import UserError, one_line
from .backbones import ImageFeatures, TorchBackbone, hub_repository, is_transformers_directory
from .towers import LOAD_ERRORS, short_hash, weights_hash

MODELS: dict[str, Any] = {"clip": CLIPModel, "siglip": SiglipModel}
"""Classes by the model_type of config.json. Any: their annotations leave out the parts of a configuration."""
NAFLEX = "siglip2"
# What changes pixels or outputs beside the weights. Listed one by one: other settings come and go with versions of
# transformers, and stores of the one before must stay valid.
TOWER_SETTINGS = ("hidden_act", "layer_norm_eps", "num_attention_heads", "image_size", "patch_size", "eos_token_id")
PIXEL_SETTINGS = (
    "do_resize", "size", "resample", "do_center_crop", "crop_size", "do_rescale", "rescale_factor", "do_normalize",
    "image_mean", "image_std",
)  # fmt: skip
# Wider than high too: a processor that keeps an image's shape would give each its own number of patches.
PROBE_SIZES = ((64, 64), (96, 48))


@dataclass(frozen=True)
class ProcessorPixels:
    """PIL image -> pixels [3, S, S] float32 by a model's own image processor. It can be pickled."""

    processor: Any

    def __call__(self, image: Image.Image) -> Tensor:
        # Some processors leave the conversion to their caller (do_convert_rgb of SigLIP is null on the Hub).
        pixels: Tensor = self.processor(images=image.convert("RGB"), return_tensors="pt")["pixel_values"][0]
        return pixels


class TransformersBackbone(TorchBackbone):
    """A CLIPModel or SiglipModel. Pixels are [3, S, S]."""

    def __init__(
        self,
        config: BackboneConfig,
        model: Any,
        processor: Any,
        autocast_dtype: torch.dtype,
        weights: str,
    ):
        super().__init__()
        self.config = config
        self.model: Any = model
        self.eval().requires_grad_(False)
        self.autocast_dtype = autocast_dtype
        self.preprocess = ProcessorPixels(processor)
        self._check_pixels()
        self.dims = _dims(model)
        self.fingerprint = _fingerprint(model, processor, weights)

    @classmethod
    def build(cls, config: BackboneConfig, device: torch.device, dtype: torch.dtype) -> Self:
        if config.token_pretrained or config.token_stages:
            raise UserError(
                "backbone.token_pretrained and backbone.token_stages go with open_clip's models; "
                f"{config.name or config.pretrained} is one of transformers, so leave them empty"
            )
        source, random = _source(config), config.pretrained == "random"
        model = _random_model(source) if random else _load_model(source)
        processor = _load(AutoImageProcessor, source, "image processor")
        weights = f"random-{weights_hash(model)}" if random else weights_hash(model)
        backbone = cls(config, model.to(device), processor, dtype, weights)
        if not random:
            _ = backbone.tokenizer  # a tokenizer that is missing shows now, not after the images were encoded
        return backbone

    @property
    def device(self) -> torch.device:
        device: torch.device = self.model.logit_scale.device
        return device

    @cached_property
    def tokenizer(self) -> Any:
        """The model's own, as AutoTokenizer gives it. Raises UserError where its files are missing or damaged."""
        source, rows = _source(self.config), self.model.config.text_config.vocab_size
        tokenizer = _load(AutoTokenizer, source, "tokenizer")
        if len(tokenizer) < rows / 2:  # without its files, transformers makes one of a few special tokens
            raise UserError(
                f"backbone {source}: its tokenizer has {len(tokenizer)} tokens where its text tower has {rows}; "
                "restore the model's tokenizer files, such as tokenizer.json"
            )
        return tokenizer

    # no_grad rather than inference_mode: the adapter keeps these tokens for its own backward pass.
    @torch.no_grad()
    def encode_images(self, pixels: Tensor) -> ImageFeatures:
        """What `preprocess` gave of B images, stacked -> patch tokens [B, P, Dv] and embedding [B, De]; one forward."""
        with self._autocast():
            output = self.model.get_image_features(pixel_values=pixels.to(self.device))
            tokens, embedding = output.last_hidden_state, output.pooler_output
            if isinstance(self.model, CLIPModel):
                tokens = self.model.vision_model.post_layernorm(tokens)[:, 1:]
        return ImageFeatures(tokens.float(), F.normalize(embedding.float(), dim=-1))

    def _tokenize(self, captions: list[str]) -> Any:
        # Some classes ignore this setting of SigLIP 2's tokenizer file; it was trained on lower case.
        if self.tokenizer.init_kwargs.get("do_lower_case"):
            captions = [caption.lower() for caption in captions]
        is_clip = isinstance(self.model, CLIPModel)
        return self.tokenizer(
            captions,
            padding="longest" if is_clip else "max_length",
            return_attention_mask=is_clip,
            max_length=self.model.config.text_config.max_position_embeddings,
            truncation=True,
            return_tensors="pt",
        )

    def _embed_tokens(self, tokens: Any) -> Tensor:
        embedding: Tensor = self.model.get_text_features(**tokens).pooler_output
        return embedding

    def _check_pixels(self) -> None:
        """Raises UserError unless the image processor brings every image to the tower's one size."""
        side = self.model.config.vision_config.image_size
        for width, height in PROBE_SIZES:
            pixels = self.preprocess(Image.new("RGB", (width, height)))
            if pixels.shape != (3, side, side):
                raise UserError(
                    f"backbone {self.config.name or self.config.pretrained}: its image processor makes pixels "
                    f"{list(pixels.shape)} of an image of {width}x{height}, its tower takes {[3, side, side]}; restore "
                    "the preprocessor_config.json of this model"
                )


def _source(config: BackboneConfig) -> str:
    """The directory or Hub name that `transformers` reads from."""
    name, pretrained = config.name, config.pretrained
    if name and pretrained not in ("", "random"):
        raise UserError(
            f"backbone.name is {name} and backbone.pretrained {pretrained!r}, but a model of transformers brings its "
            "own weights; leave backbone.pretrained empty, or give a directory there and leave backbone.name empty"
        )
    source = name or pretrained
    if not is_transformers_directory(source) and not hub_repository(config):
        raise UserError(
            f"backbone.name {source!r} is neither a directory with transformers' config.json nor OWNER/NAME on the "
            "Hub; give one of these, or an open_clip model (open_clip.list_models())"
        )
    return source


def _model_class(source: str) -> Any:
    """Raises UserError, naming it, for a model of a type that is not served."""
    with _reading(source, "config.json"):
        settings, _ = PreTrainedConfig.get_config_dict(source)
    kind = settings.get("model_type")
    if kind == NAFLEX:
        raise UserError(
            f"backbone {source}: a NaFlex SigLIP 2, whose number of patches varies with the image; EDJE needs a fixed "
            "one, as in google/siglip2-large-patch16-384"
        )
    if kind not in MODELS:
        raise UserError(
            f"backbone {source}: its config.json says model_type {kind!r}; served are {' and '.join(MODELS)}, with "
            "image and text tower in one model"
        )
    if kind == "siglip" and not settings.get("vision_config", {}).get("vision_use_head", True):
        raise UserError(f"backbone {source}: its image tower has no pooling head, so it gives no image embedding")
    return MODELS[kind]


def _load_model(source: str) -> Any:
    """The model with all its weights, in float32. Raises UserError naming the first that the files lack."""
    model_class = _model_class(source)
    with _reading(source, "weights"):
        model, report = model_class.from_pretrained(source, dtype=torch.float32, output_loading_info=True)
    if report["missing_keys"]:  # transformers would leave these at random
        missing = sorted(report["missing_keys"])
        raise UserError(
            f"backbone {source}: its files lack {len(missing)} weights of {model_class.__name__}, such as {missing[0]}"
            "; download the whole model"
        )
    return model


def _random_model(source: str) -> Any:
    model_class = _model_class(source)
    with _reading(source, "config.json"):
        return model_class(model_class.config_class.from_pretrained(source))


def _load(loader: Any, source: str, what: str) -> Any:
    with _reading(source, what):
        return loader.from_pretrained(source)


@contextmanager
def _reading(source: str, what: str) -> Iterator[None]:
    """Turns what reading a model's files can raise into one line that says which model, and what to do.

    Notes of transformers are not shown: what matters of them is an error of ours."""
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    except ImportError as error:  # SigLIP's first tokenizer needs sentencepiece
        raise UserError(
            f"backbone {source}: {what} cannot be loaded ({one_line(error)}); install the package that it needs"
        ) from None
    except (*LOAD_ERRORS, TypeError, AttributeError) as error:
        advice = (
            "restore the directory's files"
            if is_transformers_directory(source)
            else "check the name, run once where the model hub can be reached, or download the model elsewhere and set "
            "backbone.pretrained to its directory"
        )
        raise UserError(f"backbone {source}: {what} cannot be loaded ({one_line(error)}); {advice}") from None
    finally:
        logging.set_verbosity(verbosity)


def _dims(model: Any) -> BackboneDims:
    """From the configuration: both classes are known, and a pass over a blank image takes seconds on a CPU."""
    config: Any = model.config
    vision = config.vision_config
    return BackboneDims(
        num_patches=(vision.image_size // vision.patch_size) ** 2,
        patch_width=vision.hidden_size,
        embedding_width=config.projection_dim if isinstance(model, CLIPModel) else vision.hidden_size,
    )


def _fingerprint(model: Any, processor: Any, weights: str) -> str:
    """Of the files' content: a directory and the Hub's repository that it is a copy of have the same."""
    config, pixels = model.config, processor.to_dict()
    settings = {
        "vision": {name: getattr(config.vision_config, name, None) for name in TOWER_SETTINGS},
        "text": {name: getattr(config.text_config, name, None) for name in TOWER_SETTINGS},
        "pixels": {name: pixels.get(name) for name in PIXEL_SETTINGS},
    }
    side = config.vision_config.image_size
    return f"transformers-{config.model_type}/{weights} {side}px-{short_hash(settings)}"
