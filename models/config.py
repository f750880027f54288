"""What a model is: plain dataclasses for backbone, adapter and joint encoder, as saved in a checkpoint's config.yaml.

Shapes throughout: B images, P patch tokens, Dv patch width, De embedding width, m vision tokens, H joint encoder width.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, Protocol

from .errors import UserError


def _check_at_least(config: object, section: str, least: int, *keys: str) -> None:
    for key in keys:
        if getattr(config, key) < least:
            raise UserError(f"{section}{key} is {getattr(config, key)}; it must be at least {least}")


def _check_epsilon(config: AdapterConfig | EncoderConfig, section: str) -> None:
    if not 0 < config.layer_norm_eps < math.inf:
        raise UserError(f"{section}layer_norm_eps is {config.layer_norm_eps}; it must be above 0 and finite")


@dataclass(frozen=True, kw_only=True)
class BackboneConfig:
    """The frozen CLIP-style model that turns an image into patch tokens and one embedding."""

    name: str = ""
    """open_clip model name, e.g. ViT-L-16-SigLIP2-384; `hf-hub:OWNER/NAME`, an open_clip model on the Hugging Face Hub;
    or a CLIP or SigLIP of transformers: OWNER/NAME on the Hub, e.g. google/siglip2-large-patch16-384, or a directory
    with config.json. Empty where `pretrained` is a directory with its own config."""
    pretrained: str = ""
    """Of an open_clip name: tag (openai, webli, ...), weight file, or `random`. Empty for a model on the Hub or of
    transformers, which brings its own weights; or `random` for the latter. With an empty name: a directory of open_clip
    (open_clip_config.json and weights) or of transformers (config.json and weights)."""
    token_model: str = ""
    """timm model that gives the patch tokens instead of the image tower, e.g. vit_small_patch14_dinov2; embeddings and
    text tower stay those of `name`. Empty: none, or `token_pretrained` is a directory with its own config."""
    token_pretrained: str = ""
    """The token model's timm tag (lvd142m, ...), .safetensors file, directory (config.json and model.safetensors in
    timm's layout), or `random`. Empty: one tower gives tokens and embedding."""
    token_stages: tuple[int, ...] = ()
    """Convolutional towers: stages of the tower whose feature maps become tokens, e.g. [2, 3, 4]. Empty for ViTs."""
    token_grid: int = 0
    """Convolutional towers: side of the grid that each stage's map is resampled to; P = token_grid squared."""

    def __post_init__(self) -> None:
        if self.token_model and not self.token_pretrained:
            raise UserError(
                f"backbone.token_model is {self.token_model}, but backbone.token_pretrained is empty; set it to a tag "
                "of this timm model, a .safetensors file, or 'random'"
            )
        if bool(self.token_stages) != bool(self.token_grid):
            raise UserError(
                f"backbone.token_stages is {list(self.token_stages)} and backbone.token_grid {self.token_grid}; "
                "set both (convolutional towers) or neither (ViTs)"
            )


@dataclass(frozen=True, kw_only=True)
class BackboneDims:
    """Sizes that the adapter and the text-recovery head are built for."""

    num_patches: int
    """P, patch tokens per image."""
    patch_width: int
    """Dv, width of a patch token."""
    embedding_width: int
    """De, width of the image and text embedding."""

    def __post_init__(self) -> None:
        _check_at_least(self, "dims.", 1, "num_patches", "patch_width", "embedding_width")


@dataclass(frozen=True, kw_only=True)
class AdapterConfig:
    """From patch tokens [B, P, Dv] to vision tokens [B, m, H]: what the configurations of all kinds share.

    Each kind has a class of its own; `kind` in a file says which (ADAPTER_CONFIGS). Version 1 of config.yaml holds all
    of these settings for every kind, and the fingerprint of stored tokens covers them; a kind ignores those that it has
    no use for."""

    kind: str = ""
    """`compression`: num_tokens learned queries attend over the patches. `local`: an MLP per patch, no compression.
    Ablations of the attention: `pooling`: the MLP on num_tokens means over the cells of a grid; `kmeans`: on the
    num_tokens centres of the image's own patches."""
    num_tokens: int = 64
    """m. Published: 64. Ignored by `local`, where m = P."""
    mlp_width: int = 8192
    """Hidden width of the adapter's MLP. Published: 8192."""
    num_heads: int = 16
    """compression: attention heads over Dv. The published code takes the vision tower's number."""
    activation: str = "gelu"
    """gelu (exact, erf), gelu_new (tanh) or relu. The published code takes the language model's."""
    layer_norm_eps: float = 1e-6
    """compression: epsilon of the LayerNorm. The published code takes the vision tower's."""
    position_codes: float = 0.0
    """Above 0: a learned table of position codes is added to the patch tokens. It starts as sines and cosines of row
    and column with this amplitude (1 suits tokens of deviation 1); the queries start as position codes too. For
    backbones whose tokens hardly tell their position, so that "left of" cannot be learned. 0, the paper's: none.
    Formerly `places`, which files may still say."""

    def __post_init__(self) -> None:
        own = {kind: cls for kind, cls in ADAPTER_CONFIGS.items() if type(self) is cls}
        if self.kind not in own:
            raise UserError(f"adapter.kind is {self.kind!r}; {type(self).__name__} is for {', '.join(own) or 'none'}")
        _check_at_least(self, "adapter.", 1, "num_tokens", "mlp_width", "num_heads")
        _check_epsilon(self, "adapter.")
        if not 0 <= self.position_codes < math.inf:
            raise UserError(f"adapter.position_codes is {self.position_codes}; it must be at least 0 and finite")

    def num_vision_tokens(self, dims: BackboneDims) -> int:
        """m: vision tokens per image."""
        return self.num_tokens

    @classmethod
    def class_for(cls, data: dict[str, Any]) -> tuple[type[AdapterConfig], dict[str, Any]]:
        """The class that a file's section `adapter` means, and the section as that class reads it.

        Former names are replaced. Settings of another kind are dropped where they have their default, as in the files
        of version 1, and are an error elsewhere."""
        data = _with_current_names(data)
        kind = data.get("kind", CompressionConfig.kind)
        chosen = ADAPTER_CONFIGS.get(kind) if isinstance(kind, str) else None
        if chosen is None:
            raise UserError(f"adapter.kind is {kind!r}; expected one of {', '.join(ADAPTER_CONFIGS)}")
        foreign = _settings_of_other_kinds(chosen)
        for key in foreign.keys() & data.keys():
            owner, default = foreign[key]
            # Version 1 took a deviation of queries for kinds that have none, and ignored it.
            if data[key] != default and key != "query_std":
                raise UserError(f"adapter.{key} is for adapter.kind {owner!r}, not {kind!r}; drop it")
        return chosen, {key: value for key, value in data.items() if key not in foreign}


@dataclass(frozen=True, kw_only=True)
class CompressionConfig(AdapterConfig):
    """The paper's adapter: num_tokens learned queries attend over the patches."""

    kind: str = "compression"
    num_blocks: int = 1
    """compression: blocks of attention and MLP, one after the other, over the same patches. Published: 1."""
    learn_queries: bool = True
    """compression: false keeps the queries at their random initial values, an ablation."""
    query_std: float | None = None
    """compression: standard deviation of the queries' initial values; null: Dv ** -0.5. Narrow models from scratch may
    need wider queries, e.g. 4 where patch tokens have deviation 1."""

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_at_least(self, "adapter.", 1, "num_blocks")
        if self.query_std is not None and not 0 < self.query_std < math.inf:
            raise UserError(f"adapter.query_std is {self.query_std}; it must be above 0 and finite")
        if self.position_codes and self.query_std is not None:
            raise UserError("adapter.query_std has no effect with adapter.position_codes, which start the queries")


@dataclass(frozen=True, kw_only=True)
class LocalConfig(AdapterConfig):
    """The paper's local model: an MLP per patch token, no compression."""

    kind: str = "local"

    def num_vision_tokens(self, dims: BackboneDims) -> int:
        return dims.num_patches


@dataclass(frozen=True, kw_only=True)
class PoolingConfig(AdapterConfig):
    """An ablation of the attention: the MLP on num_tokens means over the cells of a grid."""

    kind: str = "pooling"


@dataclass(frozen=True, kw_only=True)
class KMeansConfig(AdapterConfig):
    """An ablation of the attention: the MLP on the num_tokens centres of the image's own patches."""

    kind: str = "kmeans"


ADAPTER_CONFIGS: dict[str, type[AdapterConfig]] = {
    "compression": CompressionConfig,
    "local": LocalConfig,
    "pooling": PoolingConfig,
    "kmeans": KMeansConfig,
}
"""The configuration of each kind of adapter. A new kind: a class and a line here, a module and a line in
vision/adapters.py."""
FORMER_ADAPTER_KEYS = {"places": "position_codes"}
"""Keys of older files -> their names today."""


def _with_current_names(data: dict[str, Any]) -> dict[str, Any]:
    for former, name in FORMER_ADAPTER_KEYS.items():
        if former in data and name in data:
            raise UserError(f"adapter.{former} is the former name of adapter.{name}, and both are set; drop one")
    return {FORMER_ADAPTER_KEYS.get(key, key): value for key, value in data.items()}


def _settings_of_other_kinds(chosen: type[AdapterConfig]) -> dict[str, tuple[str, object]]:
    """Each setting that `chosen` lacks: the kind that has it, and its default there."""
    own = {field.name for field in fields(chosen)}
    return {
        field.name: (kind, field.default)
        for kind, cls in ADAPTER_CONFIGS.items()
        for field in fields(cls)
        if field.name not in own
    }


@dataclass(frozen=True, kw_only=True)
class EncoderConfig:
    """A BERT encoder. The defaults are MiniLM-L12-H384-uncased's."""

    vocab_size: int = 30522
    """Word pieces of the vocabulary; an encoder from scratch takes its vocabulary's size."""
    hidden_size: int = 384
    """H, width of the joint encoder."""
    num_layers: int = 12
    """Transformer layers."""
    num_heads: int = 12
    """Attention heads of each layer; they divide hidden_size."""
    intermediate_size: int = 1536
    """Hidden width of each layer's MLP."""
    activation: str = "gelu"
    """gelu (exact, erf), gelu_new (tanh) or relu."""
    layer_norm_eps: float = 1e-12
    """Epsilon of every LayerNorm."""
    max_positions: int = 512
    """Rows of the position table; extended by repeating its last row where captions and vision tokens outgrow it."""
    type_vocab_size: int = 2
    """Segments: 0 for the caption, 1 for the vision tokens."""
    initializer_range: float = 0.02
    """Standard deviation of random initial weights. BERT's 0.02 suits wide encoders; for narrow ones from scratch take
    about hidden_size ** -0.5, e.g. 0.08 at width 128."""
    hidden_dropout: float = 0.1
    """Dropout rate of embeddings and of each layer's outputs, in training."""
    attention_dropout: float = 0.1
    """Dropout rate of attention weights, in training."""

    def __post_init__(self) -> None:
        sizes = ("vocab_size", "hidden_size", "num_layers", "num_heads", "intermediate_size", "max_positions")
        _check_at_least(self, "encoder.", 1, *sizes)
        _check_at_least(self, "encoder.", 2, "type_vocab_size")  # segments: caption, vision tokens
        _check_epsilon(self, "encoder.")
        if self.hidden_size % self.num_heads:
            raise UserError(
                f"encoder.hidden_size is {self.hidden_size}; "
                f"it must be a multiple of encoder.num_heads ({self.num_heads})"
            )
        if not 0 < self.initializer_range < math.inf:
            raise UserError(f"encoder.initializer_range is {self.initializer_range}; it must be above 0 and finite")
        for key in ("hidden_dropout", "attention_dropout"):
            if not 0 <= getattr(self, key) < 1:
                raise UserError(f"encoder.{key} is {getattr(self, key)}; it must be at least 0 and below 1")


@dataclass(frozen=True, kw_only=True)
class EDJEConfig:
    """Everything that rebuilds a model from its weights; saved as config.yaml beside them."""

    backbone: BackboneConfig
    dims: BackboneDims
    backbone_fingerprint: str = ""
    """Backbone.fingerprint of training time; a store or backbone that differs is an error."""
    adapter: AdapterConfig
    encoder: EncoderConfig
    max_caption_tokens: int = 64
    """[CLS], word pieces and [SEP]s: a joint input holds at most this many tokens beside the vision tokens, so 61
    word pieces; a text-only input 62. Captions are cut, never vision tokens. Published: 64."""
    residual_similarity: float = 0.0
    """match logit = weight * first-stage cosine + head, the head starting at zero and the weight, learned too, at this
    value: the embedder's logit scale, e.g. 100 for CLIP. 0: the head alone, as in the paper."""
    fusion_lambda: float | None = None
    """fused score = match logit + fusion_lambda * cosine; chosen on a validation split, None until then."""
    fusion_split: str = ""
    """The split that fusion_lambda was chosen on; empty: not known."""
    probability_scale: float | None = None
    """probability = sigmoid(probability_scale * score + probability_offset), where score is the fused one, or the match
    logit where there is no fusion_lambda. Fitted on the same split; None until then. At least 0: probabilities order
    candidates as scores do."""
    probability_offset: float | None = None
    """See probability_scale; both are set, or neither."""

    def __post_init__(self) -> None:
        _check_at_least(self, "", 4, "max_caption_tokens")  # [CLS], one word piece, two [SEP]
        if not 0 <= self.residual_similarity < math.inf:
            raise UserError(f"residual_similarity is {self.residual_similarity}; it must be at least 0 and finite")
        if self.fusion_lambda is not None and not math.isfinite(self.fusion_lambda):
            raise UserError(f"fusion_lambda is {self.fusion_lambda}; it must be finite, or null")
        self._check_probability()

    def _check_probability(self) -> None:
        scale, offset = self.probability_scale, self.probability_offset
        if (scale is None) != (offset is None):
            raise UserError(f"probability_scale is {scale} and probability_offset {offset}; set both, or neither")
        if scale is not None and not 0 <= scale < math.inf:
            raise UserError(f"probability_scale is {scale}; it must be at least 0 and finite, or null")
        if offset is not None and not math.isfinite(offset):
            raise UserError(f"probability_offset is {offset}; it must be finite, or null")

    @property
    def num_vision_tokens(self) -> int:
        """m: vision tokens per image in the joint input."""
        return self.adapter.num_vision_tokens(self.dims)

    def with_fitted_scores_of(self, other: EDJEConfig) -> EDJEConfig:
        """This configuration with what was fitted on a validation split for another: lambda and calibration."""
        return replace(
            self,
            fusion_lambda=other.fusion_lambda,
            fusion_split=other.fusion_split,
            probability_scale=other.probability_scale,
            probability_offset=other.probability_offset,
        )


class FeatureSource(Protocol):
    """What gives patch tokens and embeddings: a backbone, or stores that it made."""

    @property
    def dims(self) -> BackboneDims: ...

    @property
    def fingerprint(self) -> str: ...


def check_backbone(config: EDJEConfig, source: FeatureSource, where: str | Path = "the checkpoint") -> None:
    """Raise UserError, naming both, if the model of `config` was trained on another backbone than the source's.

    where: what the message calls the model. An imported checkpoint records no fingerprint; its sizes must agree."""
    expected = config.backbone_fingerprint
    if expected and source.fingerprint != expected:
        raise UserError(
            f"{where} was trained with backbone {expected}, this one is {source.fingerprint}; "
            "use the backbone that the checkpoint names"
        )
    if source.dims != config.dims:
        raise UserError(
            f"{where} was trained on features of {config.dims}, these are {source.dims}; "
            "use the backbone that the checkpoint names"
        )
