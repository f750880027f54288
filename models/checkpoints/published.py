"""Import of checkpoints in the layout of the public EDJE implementation (github.com/shahafwa/EDJE).

    config, state, tokenizer, unused = read_published("edje.pth", config_json="config.json")

Its state dict holds the adapter as `vision_projection`, a BertForMaskedLM as `language_model`, the heads, tied
copies, and both frozen towers, which are left out. Sizes are read off the tensors. Head counts, epsilons and the
activation cannot be: they come from a JSON file, by default the config.json beside the weights (tests/parity/README.md
has the format), or from the models that this file or the weights' own config names, where those are known here. A
vocab.txt beside the weights is the tokenizer's. Sizes that are stated must be those of the tensors: a file that lacks a
layer would pass for a smaller model.
"""

from __future__ import annotations

import json
import math
import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..config import ADAPTER_CONFIGS, BackboneConfig, BackboneDims, EDJEConfig, EncoderConfig
from ..config_io import from_dict
from ..encoder.joint_encoder import JointEncoder, with_rows
from ..errors import UserError, one_line
from ..language.captions import VOCABULARY_FILE, CaptionTokenizer
from ..state_dicts import check_state, check_weights, shortened
from ..vision.adapters import build_adapter
from .weight_files import find_weight_file, read_weights

WORDS = "language_model.bert.embeddings.word_embeddings.weight"
MLM_BIAS = "language_model.cls.predictions.bias"
TIED = {
    "text_embeddings.weight": WORDS,
    "language_model.cls.predictions.decoder.weight": WORDS,
    "language_model.cls.predictions.decoder.bias": MLM_BIAS,
}
"""Names that the published layout stores beside another name of the same parameter."""
FROZEN_TOWERS = ("vision_encoder.", "clip.")
RENAMED = (
    ("vision_projection.0.", "adapter.fc1."),
    ("vision_projection.2.", "adapter.fc2."),
    ("vision_projection.", "adapter."),
    ("language_model.", "encoder."),
    ("classification_head.0.dense.", "match_head.dense."),
    ("classification_head.1.", "match_head.out."),
    ("text_projection.", "text_projection."),
)
"""Published prefix -> ours; the first that fits, in either direction."""
HEADS = ("classification_head.0.dense", "classification_head.1", "text_projection")
LOCAL_ADAPTER = ("vision_projection.0.", "vision_projection.2.")
LAYER = "language_model.bert.encoder.layer."
POSITIONS = "language_model.bert.embeddings.position_embeddings.weight"
TYPES = "language_model.bert.embeddings.token_type_embeddings.weight"
OURS_ALONE = {"itc_logit_scale": math.log(1 / 0.07), "similarity_log_weight": 0.0}
"""Parameters that the published model lacks, as ours starts with them; no published objective or logit uses them."""
CONFIG_JSON = "config.json"
CAPTION_TOKENS = 64
"""[CLS], word pieces and [SEP]s of a joint input: the published code lengthens its table of positions to 64 + m."""


class Published(NamedTuple):
    """What an imported checkpoint consists of, under our names, float32."""

    config: EDJEConfig
    state: dict[str, Tensor]
    tokenizer: CaptionTokenizer
    unused: list[str]
    """Names in the file that no part of the model takes, the frozen towers left out."""


@dataclass(frozen=True, kw_only=True)
class _Settings:
    """What the tensors cannot tell, and sizes that they can, to notice a cut file or settings of another model."""

    source: str
    """Where these come from, for messages."""
    backbone: BackboneConfig
    num_patches: int
    patch_width: int
    adapter_heads: int
    adapter_eps: float
    hidden_size: int
    encoder_heads: int
    encoder_eps: float
    activation: str
    tokenizer: str
    # Sizes from here on; None where the source does not state them.
    adapter_kind: str | None = None
    num_tokens: int | None = None
    mlp_width: int | None = None
    embedding_width: int | None = None
    num_layers: int | None = None
    intermediate_size: int | None = None
    vocab_size: int | None = None
    type_vocab_size: int | None = None
    max_positions: int | None = None
    base_max_positions: int | None = None
    """Rows before the published code lengthened the table."""

    def __post_init__(self) -> None:
        for name in ("num_patches", "patch_width", "adapter_heads", "hidden_size", "encoder_heads"):
            if getattr(self, name) < 1:
                raise UserError(f"'{name}' is {getattr(self, name)}; it must be at least 1")
        for name in ("adapter_eps", "encoder_eps"):
            if not 0 < getattr(self, name) < math.inf:
                raise UserError(f"'{name}' is {getattr(self, name)}; it must be above 0 and finite")


@dataclass(frozen=True)
class _Tower:
    name: str
    """On the Hub, in transformers' layout: the published code ran these classes."""
    num_patches: int
    width: int
    num_heads: int


@dataclass(frozen=True)
class _LanguageModel:
    width: int
    num_heads: int
    num_layers: int
    intermediate_size: int


KNOWN_TOWERS = {
    "siglip2-large-patch16-384": _Tower("google/siglip2-large-patch16-384", num_patches=576, width=1024, num_heads=16),
    "siglip2-base-patch16-384": _Tower("google/siglip2-base-patch16-384", num_patches=576, width=768, num_heads=12),
}
"""Vision towers by the last part of the name in `siglip_path`; epsilon 1e-6."""
KNOWN_LANGUAGE_MODELS = {
    "minilm-l12-h384-uncased": _LanguageModel(width=384, num_heads=12, num_layers=12, intermediate_size=1536),
    "minilm-l6-h384-uncased": _LanguageModel(width=384, num_heads=12, num_layers=6, intermediate_size=1536),
    "bert-base-uncased": _LanguageModel(width=768, num_heads=12, num_layers=12, intermediate_size=3072),
}
"""Joint encoders by the last part of the name in `language_model_path`; gelu, epsilon 1e-12, 2 segments, 512 positions.
"""
PUBLISHED_REPOSITORIES = {
    "shahafw/edje-vl-image-retrieval-reranker": {
        "siglip_path": "google/siglip2-large-patch16-384",
        "language_model_path": "microsoft/MiniLM-L12-H384-uncased",
    }
}
"""What repositories of the Hub were made with, for files that do not name it themselves."""
NAMED = "the models that it names"
"""Source of settings that come from no --config, as messages call it."""


def read_published(
    path: str | Path, config_json: str | Path | None = None, named: dict[str, Any] | None = None
) -> Published:
    """Read a weight file, the index of its shards, or a directory (weight_files.find_weight_file says which file).

    named: `siglip_path` and `language_model_path`, where neither the weights nor a config.json name them.
    Raises UserError naming the file: nothing to read, damaged, more than tensors in it (a pickle could run code),
    keys missing, tied copies that differ, shapes or sizes that contradict `config_json` or the models that the file
    names, a tower that is not known and no `config_json`, a vocabulary of the wrong size."""
    file = find_weight_file(Path(path))
    tensors, in_weights = read_weights(file)
    trained = {name: tensor for name, tensor in tensors.items() if not name.startswith(FROZEN_TOWERS)}
    check_weights({name: tensor for name, tensor in trained.items() if our_name(name) or name in TIED}, file)
    published = _untied(trained, file)
    _check_is_edje(published, file)
    settings = _settings(file, Path(config_json) if config_json else None, named or {}, in_weights)
    _check_names(published, file)
    config = _infer_config(published, settings, file)
    published[POSITIONS] = with_rows(published[POSITIONS], config.encoder.max_positions)
    tokenizer = _load_tokenizer(settings, file)
    _check_vocabulary(config, tokenizer, settings, file)
    # The published training ran in bfloat16; ours keeps float32 master weights.
    renamed = {name: (our_name(name), tensor.float()) for name, tensor in published.items()}
    state = {ours: tensor for ours, tensor in renamed.values() if ours is not None}
    check_state(_shapes_of(config, tokenizer), state, file, published_name)
    ours_alone = {name: torch.tensor(value) for name, value in OURS_ALONE.items()}
    return Published(
        config, state | ours_alone, tokenizer, [name for name, (ours, _) in renamed.items() if ours is None]
    )


def _settings(file: Path, config_json: Path | None, default: dict[str, Any], in_weights: dict[str, Any]) -> _Settings:
    """From --config, from the config.json beside the weights, or from the models that these, the weights or, where
    neither does, `default` name."""
    named = default | in_weights
    beside = file.parent / CONFIG_JSON
    if config_json is None and beside.is_file():
        content = _read_json(beside)
        if "vision" in content and "joint_encoder" in content:
            config_json = beside
        else:
            named = default | content | in_weights
    settings = _from_json(config_json, named) if config_json else _from_names(named, file)
    vocabulary = file.parent / VOCABULARY_FILE
    return replace(settings, tokenizer=str(vocabulary)) if not config_json and vocabulary.is_file() else settings


def _shapes_of(config: EDJEConfig, tokenizer: CaptionTokenizer) -> nn.Module:
    """The trained parts of a model of this configuration, shapes alone."""
    width = config.encoder.hidden_size
    with torch.device("meta"):
        parts = {
            "adapter": build_adapter(config.adapter, config.dims, width),
            "encoder": JointEncoder(config.encoder, cls_id=tokenizer.cls_id, sep_id=tokenizer.sep_id),
            "match_head": nn.ModuleDict({"dense": nn.Linear(width, width), "out": nn.Linear(width, 1)}),
            "text_projection": nn.Linear(width, config.dims.embedding_width),
        }
        return nn.ModuleDict(parts)


def _load_tokenizer(settings: _Settings, file: Path) -> CaptionTokenizer:
    try:
        return CaptionTokenizer.from_pretrained(settings.tokenizer)
    except UserError as error:
        if settings.source != NAMED:
            raise
        reason = str(error).rpartition("; ")[0]  # its advice is for callers who can name a tokenizer
        raise UserError(
            f"{file}: the tokenizer of the language model that it names is not at hand ({reason}); put its "
            f"{VOCABULARY_FILE} beside the weights"
        ) from error


def _check_vocabulary(config: EDJEConfig, tokenizer: CaptionTokenizer, settings: _Settings, file: Path) -> None:
    if tokenizer.vocab_size + 1 != config.encoder.vocab_size:
        raise UserError(
            f"{file}: {config.encoder.vocab_size} word embeddings; the vocabulary {settings.tokenizer} with <image> "
            f"has {tokenizer.vocab_size + 1}; put the checkpoint's own vocab.txt beside the --config file"
        )


def _untied(tensors: dict[str, Tensor], file: Path) -> dict[str, Tensor]:
    """Each tied parameter under one name. A file may hold one or several of its names; the copies must agree."""
    result = dict(tensors)
    for copy, name in TIED.items():
        if copy not in result:
            continue
        tensor = result.pop(copy)
        if not torch.equal(tensor, result.setdefault(name, tensor)):
            raise UserError(f"{file}: {copy} and {name} differ; this model ties them, so the file is of another one")
    return result


def _tower_name(named: dict[str, Any]) -> str:
    return str(named.get("siglip_path", "")).rstrip("/")


def _backbone(named: dict[str, Any]) -> BackboneConfig:
    """The tower where it lies on this machine, as the checkpoint names it, else by its name on the Hub.

    A directory of another machine is known by its last part; without one of KNOWN_TOWERS, nothing is named."""
    path, tower = _tower_name(named), _known_tower(named)
    if path and Path(path).is_dir():
        return BackboneConfig(name=str(Path(path).resolve()))
    if tower is not None:
        return BackboneConfig(name=tower.name)
    return BackboneConfig(name=path if re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", path) else "")


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read as JSON ({one_line(error)}); restore it or remove it") from error
    return content if isinstance(content, dict) else {}


def _known_tower(named: dict[str, Any]) -> _Tower | None:
    return KNOWN_TOWERS.get(_tower_name(named).split("/")[-1].lower())


def _from_json(path: Path, named: dict[str, Any]) -> _Settings:
    """named: the config in the weight file; the JSON names no backbone."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        vision, encoder, adapter = data["vision"], data["joint_encoder"], data.get("adapter", {})
        values = {
            "source": str(path),
            "backbone": {},
            "num_patches": vision["patch_tokens"],
            "patch_width": vision["width"],
            "adapter_heads": vision["heads"],
            "adapter_eps": vision["layer_norm_eps"],
            "hidden_size": encoder["hidden_size"],
            "encoder_heads": encoder["num_attention_heads"],
            "encoder_eps": encoder["layer_norm_eps"],
            "activation": encoder["hidden_act"],
            "tokenizer": str(path.parent / VOCABULARY_FILE),
            "adapter_kind": adapter.get("kind"),
            "num_tokens": adapter.get("num_compressed_tokens"),
            "mlp_width": adapter.get("mlp_width"),
            "embedding_width": vision.get("embedding_dim"),
            "num_layers": encoder.get("num_hidden_layers"),
            "intermediate_size": encoder.get("intermediate_size"),
            "vocab_size": encoder.get("vocab_size"),
            "type_vocab_size": encoder.get("type_vocab_size"),
            "max_positions": encoder.get("max_position_embeddings"),
            "base_max_positions": encoder.get("base_max_position_embeddings"),
        }
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); pass the checkpoint's config.json") from error
    except (KeyError, ValueError, TypeError, AttributeError) as error:
        raise UserError(f"{path}: not in the expected format ({error!r}); tests/parity has examples of it") from error
    return replace(from_dict(_Settings, values, where=str(path)), backbone=_backbone(named))


def _from_names(named: dict[str, Any], file: Path) -> _Settings:
    tower, name = _known_tower(named), str(named.get("language_model_path", "")).rstrip("/")
    language_model = KNOWN_LANGUAGE_MODELS.get(name.split("/")[-1].lower())
    if tower is None or language_model is None:
        raise UserError(
            f"{file}: names the vision tower {_tower_name(named)!r} and the language model {name!r}; head counts, "
            f"activation and epsilons are known for {', '.join(KNOWN_TOWERS)} with "
            f"{', '.join(KNOWN_LANGUAGE_MODELS)} only; pass --config FILE.json"
        )
    return _Settings(
        source=NAMED,
        backbone=_backbone(named),
        num_patches=tower.num_patches,
        patch_width=tower.width,
        adapter_heads=tower.num_heads,
        adapter_eps=1e-6,
        hidden_size=language_model.width,
        encoder_heads=language_model.num_heads,
        encoder_eps=1e-12,
        activation="gelu",
        tokenizer=name,
        embedding_width=tower.width,
        num_layers=language_model.num_layers,
        intermediate_size=language_model.intermediate_size,
        type_vocab_size=2,
        max_positions=512,
        **_stated_adapter(named),
    )


def _stated_adapter(named: dict[str, Any]) -> dict[str, Any]:
    """Kind and m of the adapter by the config that was saved with the weights; its m is None for a local model."""
    if "num_compressed_tokens" not in named:
        return {}
    num_tokens = named["num_compressed_tokens"]
    return {"adapter_kind": "local" if num_tokens is None else "compression", "num_tokens": num_tokens}


def _check_is_edje(tensors: dict[str, Tensor], file: Path) -> None:
    if not any(name.startswith("vision_projection.") for name in tensors):
        raise UserError(f"{file}: no tensor vision_projection.* of the published layout in it; not an EDJE checkpoint?")


def _check_names(tensors: dict[str, Tensor], file: Path) -> None:
    """Raise UserError with all names that the published layout has for an adapter and an encoder of this kind."""
    # Names do not depend on sizes: those of the smallest model of the same kind and depth.
    adapter = ADAPTER_CONFIGS[_adapter_kind(tensors)](num_tokens=1, mlp_width=1, num_heads=1)
    encoder = EncoderConfig(
        vocab_size=1, hidden_size=1, num_heads=1, num_layers=max(1, _num_layers(tensors)), intermediate_size=1
    )
    smallest = {
        "adapter": build_adapter(adapter, BackboneDims(num_patches=1, patch_width=1, embedding_width=1), 1),
        "encoder": JointEncoder(encoder, cls_id=0, sep_id=0),
    }
    ours = [f"{part}.{name}" for part, module in smallest.items() for name in module.state_dict()]
    heads = [f"{head}.{kind}" for head in HEADS for kind in ("weight", "bias")]
    expected = [*map(published_name, ours), *heads]
    missing = [name for name in expected if name not in tensors and name not in TIED]
    if missing:
        raise UserError(
            f"{file}: missing tensors of the published layout ({len(missing)}): {shortened(missing, most=20)}; "
            "fetch the file again, or save the whole state dict"
        )


def _adapter_kind(tensors: dict[str, Tensor]) -> str:
    return "local" if any(name.startswith(LOCAL_ADAPTER) for name in tensors) else "compression"


def _num_layers(tensors: dict[str, Tensor]) -> int:
    return len({name.removeprefix(LAYER).split(".")[0] for name in tensors if name.startswith(LAYER)})


def _infer_config(tensors: dict[str, Tensor], settings: _Settings, file: Path) -> EDJEConfig:
    def size(name: str, dimension: int, of: int = 2) -> int:
        if tensors[name].dim() != of:
            raise UserError(f"{file}: {name} is {list(tensors[name].shape)}; expected {of} dimensions")
        return tensors[name].shape[dimension]

    kind = _adapter_kind(tensors)
    fc1 = f"vision_projection.{'0' if kind == 'local' else 'mlp.fc1'}.weight"
    num_tokens = size("vision_projection.query", 1, of=3) if kind == "compression" else None
    found = {
        "mlp_width": size(fc1, 0),
        "patch_width": size(fc1, 1),
        "embedding_width": size("text_projection.weight", 0),
        "hidden_size": size(WORDS, 1),
        "num_layers": _num_layers(tensors),
        "intermediate_size": size(f"{LAYER}0.intermediate.dense.weight", 0),
        "vocab_size": size(WORDS, 0),
        "type_vocab_size": size(TYPES, 0),
        "max_positions": size(POSITIONS, 0),
    }
    _check_sizes({"adapter_kind": kind, "num_tokens": num_tokens, **found}, settings, file)
    try:
        adapter = ADAPTER_CONFIGS[kind](
            mlp_width=found["mlp_width"],
            num_heads=settings.adapter_heads,
            activation=settings.activation,
            layer_norm_eps=settings.adapter_eps,
        )
        if num_tokens is not None:
            adapter = replace(adapter, num_tokens=num_tokens)
        dims = BackboneDims(
            num_patches=settings.num_patches,
            patch_width=found["patch_width"],
            embedding_width=found["embedding_width"],
        )
        longest = CAPTION_TOKENS + (num_tokens or settings.num_patches)
        encoder = _encoder_config(found, settings, longest)
        return EDJEConfig(backbone=settings.backbone, dims=dims, adapter=adapter, encoder=encoder)
    except UserError as error:
        raise UserError(f"{file}: {error}") from error


def _check_sizes(found: dict[str, Any], settings: _Settings, file: Path) -> None:
    """Raise UserError with every size that is another by the tensors than by the settings.

    Positions: no fewer than stated, or the rows before the published code lengthened the table."""
    stated = {key: getattr(settings, key) for key in found}
    if found["max_positions"] == settings.base_max_positions or found["max_positions"] > (stated["max_positions"] or 0):
        stated["max_positions"] = None
    wrong = [
        f"{key} is {found[key]} by its tensors, {value} by {settings.source}"
        for key, value in stated.items()
        if value is not None and value != found[key]
    ]
    if found["max_positions"] < 1:
        wrong.append(f"{POSITIONS} has no rows")
    if wrong:
        raise UserError(
            f"{file}: {'; '.join(wrong)}; fetch the file again if it is cut, or pass the --config that belongs to it"
        )


def _encoder_config(found: dict[str, int], settings: _Settings, longest: int) -> EncoderConfig:
    """longest: tokens of the longest joint input. The published code lengthens a table that is shorter."""
    return EncoderConfig(
        vocab_size=found["vocab_size"],
        hidden_size=found["hidden_size"],
        num_layers=found["num_layers"],
        num_heads=settings.encoder_heads,
        intermediate_size=found["intermediate_size"],
        activation=settings.activation,
        layer_norm_eps=settings.encoder_eps,
        max_positions=max(found["max_positions"], longest),
        type_vocab_size=found["type_vocab_size"],
    )


def our_name(name: str) -> str | None:
    """Our name of a published parameter; None where it is no part of the model."""
    if name.endswith(".position_ids"):  # a constant buffer that older transformers saved
        return None
    for published, ours in RENAMED:
        if name.startswith(published):
            return ours + name.removeprefix(published)
    return None


def published_name(name: str) -> str:
    """The published name of one of our parameters; one that the published model lacks keeps its own."""
    for published, ours in RENAMED:
        if name.startswith(ours):
            return published + name.removeprefix(ours)
    return name
