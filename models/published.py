"""Import of checkpoints in the layout of the public EDJE implementation (github.com/shahafwa/EDJE).

    config, state, tokenizer, unused = read_published("edje.pth", config_json="config.json")

Its state dict holds the adapter as `vision_projection`, a BertForMaskedLM as `language_model`, the heads, tied
copies, and both frozen towers, which are left out. Sizes are read off the tensors. Head counts, epsilons and the
activation cannot be: they come from the models that the checkpoint's own config names, where those are known here,
or from a JSON file (tests/parity/README.md has the format) with a vocab.txt beside it.
"""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .captions import VOCABULARY_FILE, CaptionTokenizer
from .checkpoint import read_safetensors
from .config import AdapterConfig, BackboneConfig, BackboneDims, EDJEConfig, EncoderConfig
from .config_io import from_dict
from .errors import UserError

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
"""Published prefix -> ours; the first that fits."""
WEIGHT_SUFFIXES = (".safetensors", ".pth", ".pt", ".bin")


class Published(NamedTuple):
    """What an imported checkpoint consists of, under our names, float32."""

    config: EDJEConfig
    state: dict[str, Tensor]
    tokenizer: CaptionTokenizer
    unused: list[str]
    """Names in the file that no part of the model takes, the frozen towers left out."""


@dataclass(frozen=True, kw_only=True)
class _Settings:
    """What the tensors cannot tell, and two widths that they can, to notice settings of another model."""

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

    def __post_init__(self):
        for name in ("num_patches", "patch_width", "adapter_heads", "hidden_size", "encoder_heads"):
            if getattr(self, name) < 1:
                raise UserError(f"'{name}' is {getattr(self, name)}; it must be at least 1")


@dataclass(frozen=True)
class _Tower:
    open_clip_name: str
    num_patches: int
    width: int
    num_heads: int


@dataclass(frozen=True)
class _LanguageModel:
    width: int
    num_heads: int


KNOWN_TOWERS = {
    "siglip2-large-patch16-384": _Tower("ViT-L-16-SigLIP2-384", num_patches=576, width=1024, num_heads=16),
    "siglip2-base-patch16-384": _Tower("ViT-B-16-SigLIP2-384", num_patches=576, width=768, num_heads=12),
}
"""Vision towers by the last part of the name in `siglip_path`; weights `webli`, epsilon 1e-6."""
KNOWN_LANGUAGE_MODELS = {
    "minilm-l12-h384-uncased": _LanguageModel(width=384, num_heads=12),
    "minilm-l6-h384-uncased": _LanguageModel(width=384, num_heads=12),
    "bert-base-uncased": _LanguageModel(width=768, num_heads=12),
}
"""Joint encoders by the last part of the name in `language_model_path`; gelu, epsilon 1e-12."""


def read_published(path: str | Path, config_json: str | Path | None = None) -> Published:
    """Read a weight file (.pth, .safetensors) or a directory with one.

    Raises UserError naming the file: nothing to read, damaged, more than tensors in it (a pickle could run code),
    a key missing, tied copies that differ, a tower that is not known and no `config_json`, a vocabulary of the
    wrong size. Whether every shape fits is checked by loading the result (`load_state`)."""
    file = _weight_file(Path(path))
    tensors, named = _read_weights(file)
    trained = {name: tensor for name, tensor in tensors.items() if not name.startswith(FROZEN_TOWERS)}
    published = _untied(trained, file)
    settings = _from_json(Path(config_json)) if config_json else _from_names(named, file)
    config = _infer_config(published, settings, file)
    tokenizer = CaptionTokenizer.from_pretrained(settings.tokenizer)
    _check_vocabulary(config, tokenizer, settings, file)
    # The published training ran in bfloat16; ours keeps float32 master weights.
    renamed = {name: (our_name(name), tensor.float()) for name, tensor in published.items()}
    return Published(
        config=config,
        state={ours: tensor for ours, tensor in renamed.values() if ours is not None},
        tokenizer=tokenizer,
        unused=[name for name, (ours, _) in renamed.items() if ours is None],
    )


def _check_vocabulary(config: EDJEConfig, tokenizer: CaptionTokenizer, settings: _Settings, file: Path) -> None:
    if tokenizer.vocab_size + 1 != config.encoder.vocab_size:
        raise UserError(
            f"{file}: {config.encoder.vocab_size} word embeddings; the vocabulary {settings.tokenizer} with <image> "
            f"has {tokenizer.vocab_size + 1}; put the checkpoint's own vocab.txt beside the --config file"
        )


def _weight_file(path: Path) -> Path:
    if path.is_file():
        return path
    if not path.is_dir():
        raise UserError(f"{path}: no such file or directory; expected a checkpoint (.pth or .safetensors)")
    files = sorted(f for f in path.iterdir() if f.suffix in WEIGHT_SUFFIXES)
    if len(files) != 1:
        found = ", ".join(f.name for f in files) or "none"
        raise UserError(
            f"{path}: expected one weight file ({', '.join(WEIGHT_SUFFIXES)}), found {found}; pass the file"
        )
    return files[0]


def _read_weights(file: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The flat state dict and the config that was saved with it (empty where there was none)."""
    if file.suffix == ".safetensors":
        return read_safetensors(file), {}
    try:
        content = torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise UserError(
            f"{file}: holds more than tensors and plain values, and loading it could run code; "
            "save its state dict alone, best as .safetensors"
        ) from error
    except Exception as error:  # a damaged archive fails in many ways
        raise UserError(f"{file}: truncated or damaged ({' '.join(str(error).split())}); fetch it again") from error
    state = content.get("model", content) if isinstance(content, dict) else content
    if not isinstance(state, dict) or not all(isinstance(t, Tensor) for t in state.values()):
        raise UserError(f"{file}: no state dict in it; expected names with tensors, or these under 'model'")
    named = content.get("config")
    return state, named if isinstance(named, dict) else {}


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


def _from_json(path: Path) -> _Settings:
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        vision, encoder = data["vision"], data["joint_encoder"]
        values = {
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
        }
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); pass the checkpoint's config.json") from error
    except (KeyError, ValueError, TypeError) as error:
        raise UserError(f"{path}: not in the expected format ({error!r}); tests/parity has examples of it") from error
    return from_dict(_Settings, values, where=str(path))


def _from_names(named: dict[str, Any], file: Path) -> _Settings:
    names = [str(named.get(key, "")).rstrip("/") for key in ("siglip_path", "language_model_path")]
    tower = KNOWN_TOWERS.get(names[0].split("/")[-1].lower())
    language_model = KNOWN_LANGUAGE_MODELS.get(names[1].split("/")[-1].lower())
    if tower is None or language_model is None:
        raise UserError(
            f"{file}: names the vision tower {names[0]!r} and the language model {names[1]!r}; head counts, "
            f"activation and epsilons are known for {', '.join(KNOWN_TOWERS)} with "
            f"{', '.join(KNOWN_LANGUAGE_MODELS)} only; pass --config FILE.json"
        )
    return _Settings(
        backbone=BackboneConfig(name=tower.open_clip_name, pretrained="webli"),
        num_patches=tower.num_patches,
        patch_width=tower.width,
        adapter_heads=tower.num_heads,
        adapter_eps=1e-6,
        hidden_size=language_model.width,
        encoder_heads=language_model.num_heads,
        encoder_eps=1e-12,
        activation="gelu",
        tokenizer=names[1],
    )


def _infer_config(tensors: dict[str, Tensor], settings: _Settings, file: Path) -> EDJEConfig:
    def size(name: str, dimension: int) -> int:
        if name not in tensors or tensors[name].dim() <= dimension:
            raise UserError(f"{file}: no tensor {name} of the published layout in it; not an EDJE checkpoint?")
        return tensors[name].shape[dimension]

    compressed = "vision_projection.query" in tensors
    fc1 = f"vision_projection.{'mlp.fc1' if compressed else '0'}.weight"
    widths, expected = (size(fc1, 1), size(WORDS, 1)), (settings.patch_width, settings.hidden_size)
    if widths != expected:
        raise UserError(
            f"{file}: patch and hidden width are {widths} by its tensors, but {expected} by --config or the models "
            "that it names; pass the --config that belongs to it"
        )
    adapter = AdapterConfig(
        kind="compression" if compressed else "local",
        mlp_width=size(fc1, 0),
        num_heads=settings.adapter_heads,
        activation=settings.activation,
        layer_norm_eps=settings.adapter_eps,
        **({"num_tokens": size("vision_projection.query", 1)} if compressed else {}),
    )
    dims = BackboneDims(
        num_patches=settings.num_patches,
        patch_width=widths[0],
        embedding_width=size("text_projection.weight", 0),
    )
    encoder = _infer_encoder(tensors, settings, size)
    return EDJEConfig(backbone=settings.backbone, dims=dims, adapter=adapter, encoder=encoder)


def _infer_encoder(tensors: dict[str, Tensor], settings: _Settings, size: Callable[[str, int], int]) -> EncoderConfig:
    layer = "language_model.bert.encoder.layer."
    embeddings = "language_model.bert.embeddings."
    return EncoderConfig(
        vocab_size=size(WORDS, 0),
        hidden_size=size(WORDS, 1),
        num_layers=len({name.removeprefix(layer).split(".")[0] for name in tensors if name.startswith(layer)}),
        num_heads=settings.encoder_heads,
        intermediate_size=size(f"{layer}0.intermediate.dense.weight", 0),
        activation=settings.activation,
        layer_norm_eps=settings.encoder_eps,
        max_positions=size(f"{embeddings}position_embeddings.weight", 0),
        type_vocab_size=size(f"{embeddings}token_type_embeddings.weight", 0),
    )


def our_name(name: str) -> str | None:
    """Our name of a published parameter; None where it is no part of the model."""
    if name.endswith(".position_ids"):  # a constant buffer that older transformers saved
        return None
    for published, ours in RENAMED:
        if name.startswith(published):
            return ours + name.removeprefix(published)
    return None
