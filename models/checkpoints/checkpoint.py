"""Checkpoints: a directory with config.yaml, model.safetensors and tokenizer.json that loads without network.

A run keeps them as OUTPUT/checkpoints/step-00000500/ (with its training_state.pt beside), and OUTPUT/checkpoints/LATEST
names the newest complete one. Everything is written under a temporary name, flushed to disk and renamed, so a kill
at any line leaves whole directories only. Weights are safetensors: loading one runs no code.

    config, state, tokenizer = read_checkpoint(resolve_checkpoint("runs/demo"))
"""

from __future__ import annotations

import json
import os
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import yaml
from torch import Tensor

from ..config import AdapterConfig, EDJEConfig
from ..config_io import from_dict, to_dict
from ..errors import UserError, one_line
from ..files import atomic_directory, write_atomically
from ..language.captions import TOKENIZER_FILE, CaptionTokenizer
from ..state_dicts import check_weights, read_safetensors, tensors_hash, untied, without_wrappers, write_safetensors

CONFIG_FILE = "config.yaml"
WEIGHTS_FILE = "model.safetensors"
LATEST_FILE = "LATEST"
CARD_FILE = "README.md"
CHECKPOINT_FILES = (CONFIG_FILE, WEIGHTS_FILE, TOKENIZER_FILE)


def write_checkpoint(
    directory: str | Path, config: EDJEConfig, state: dict[str, Tensor], tokenizer: CaptionTokenizer, card: str
) -> None:
    """Write a checkpoint directory, or replace one. Tensors that share memory (tied weights) are stored once.

    card: text of its README.md (model_card.py); the step directories of a run, which are not shared, have none.
    Raises UserError if `directory` exists and is neither empty nor a checkpoint: nothing else is ever overwritten."""
    directory = Path(directory)
    if directory.exists():
        others = _foreign_files(directory)
        if others:
            raise UserError(f"{directory}: exists and is no plain checkpoint (holds {others[0]}); choose another path")
    with atomic_directory(directory) as temporary:
        write_checkpoint_files(temporary, config, state, tokenizer)
        (temporary / CARD_FILE).write_text(card, encoding="utf-8")


def _foreign_files(path: Path) -> list[str]:
    """Files that keep `path` from being replaced by a checkpoint, sorted: all that no checkpoint has.

    Without a config of ours that is every file: other projects too have a model.safetensors and a tokenizer.json."""
    if not path.is_dir():
        return ["a file"]
    files = os.listdir(path)
    try:
        read_config(path)
    except UserError:
        return sorted(files)
    return sorted({*files} - {*CHECKPOINT_FILES, CARD_FILE})


def write_checkpoint_files(
    directory: Path, config: EDJEConfig, state: dict[str, Tensor], tokenizer: CaptionTokenizer
) -> None:
    """The files of a checkpoint, into an existing directory; for a caller that adds files before it is renamed."""
    write_config(directory, config)
    write_safetensors(directory / WEIGHTS_FILE, untied(state))
    tokenizer.save(directory)


def write_config(directory: str | Path, config: EDJEConfig) -> None:
    """Write or replace a checkpoint's config.yaml in one step."""
    write_atomically(Path(directory) / CONFIG_FILE, yaml.safe_dump(to_dict(config), sort_keys=False))


def read_checkpoint(directory: str | Path) -> tuple[EDJEConfig, dict[str, Tensor], CaptionTokenizer]:
    """Config, weights (on the CPU, tied ones once) and tokenizer of a checkpoint directory.

    Paths of the backbone that are relative to the checkpoint are absolute in the config. Raises UserError naming the
    file that is missing, truncated or inconsistent, or the tensor that holds no weights."""
    directory = Path(directory)
    missing = [name for name in CHECKPOINT_FILES if not (directory / name).is_file()]
    if missing:
        raise UserError(f"{directory / missing[0]}: no such file; a checkpoint has {', '.join(CHECKPOINT_FILES)}")
    config = with_located_backbone(read_config(directory), directory)
    state = without_wrappers(read_safetensors(directory / WEIGHTS_FILE), directory / WEIGHTS_FILE)
    check_weights(state, directory / WEIGHTS_FILE)
    tokenizer = CaptionTokenizer.from_pretrained(directory / TOKENIZER_FILE)
    if tokenizer.vocab_size > config.encoder.vocab_size:
        raise UserError(
            f"{directory / TOKENIZER_FILE} has {tokenizer.vocab_size} word pieces, {CONFIG_FILE} says "
            f"encoder.vocab_size {config.encoder.vocab_size}; restore the tokenizer of this checkpoint"
        )
    return config, state, tokenizer


def read_config(directory: str | Path) -> EDJEConfig:
    """config.yaml of a checkpoint directory as it is. Raises UserError naming the file and every key that is wrong."""
    path = Path(directory) / CONFIG_FILE
    try:
        data = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise UserError(f"{path}: not readable as YAML ({one_line(error)}); restore the file") from error
    return from_dict(EDJEConfig, data, where=str(path))


def is_relative_to_checkpoint(pretrained: str) -> bool:
    """Whether a backbone's `pretrained` or `token_pretrained` is a path from the checkpoint's own directory.

    Such paths start with ./ or ../, so that a checkpoint and its backbone can be moved or shared together. Anything
    else is a tag, an absolute path, or a path from the working directory."""
    return pretrained.startswith(("./", "../"))


def located_from(directory: str | Path, pretrained: str) -> str:
    """A path relative to the checkpoint in `directory` as an absolute one; any other name as it is."""
    if not is_relative_to_checkpoint(pretrained):
        return pretrained
    located = Path(os.path.abspath(Path(directory, pretrained)))
    # Older checkpoints meant the working directory; where only that path exists, it is what they meant.
    return pretrained if Path(pretrained).exists() and not located.exists() else str(located)


def with_located_backbone(config: EDJEConfig, directory: str | Path) -> EDJEConfig:
    """The configuration with its backbone's paths as a process in any working directory needs them."""
    backbone = replace(
        config.backbone,
        name=located_from(directory, config.backbone.name),
        pretrained=located_from(directory, config.backbone.pretrained),
        token_pretrained=located_from(directory, config.backbone.token_pretrained),
    )
    return replace(config, backbone=backbone)


def write_fusion(directory: str | Path, fitted: EDJEConfig) -> None:
    """Record lambda and calibration that were fitted for a checkpoint; all else in its config.yaml stays."""
    write_config(directory, read_config(directory).with_fitted_scores_of(fitted))


def resolve_checkpoint(path: str | Path) -> Path:
    """The checkpoint directory that `path` means: itself, or the newest of a run or of its `checkpoints` folder."""
    path = Path(path)
    if (path / WEIGHTS_FILE).is_file():
        return path
    for root in (path, path / "checkpoints"):
        newest = read_latest(root)
        if newest is not None:
            return newest
    if not path.is_dir():
        raise UserError(f"{path}: no such directory; expected a checkpoint or a run")
    raise UserError(f"{path}: neither {WEIGHTS_FILE} nor {LATEST_FILE} in it; expected a checkpoint or a run")


def read_latest(root: str | Path) -> Path | None:
    """The checkpoint directory that ROOT/LATEST names; None where no checkpoint was completed yet.

    Raises UserError if it names a directory that is not there."""
    pointer = Path(root) / LATEST_FILE
    if not pointer.is_file():
        return None
    name = pointer.read_text(encoding="utf-8").strip()
    directory = pointer.parent / name
    if not name or Path(name).name != name or not directory.is_dir():
        raise UserError(f"{pointer}: names {name!r}, which is no directory beside it; name an existing checkpoint")
    return directory


def write_latest(root: str | Path, name: str) -> None:
    """Let ROOT/LATEST name the directory ROOT/name, in one step."""
    write_atomically(Path(root) / LATEST_FILE, name + "\n")


SETTINGS_OF_VERSION_1 = ("kind", "num_tokens", "mlp_width", "num_heads", "activation", "layer_norm_eps")
TOLD_BY_WEIGHTS = ("num_blocks", "learn_queries", "query_std", "position_codes")
"""Settings that stored tokens depend on only through the weights and their names."""


def adapter_fingerprint(config: EDJEConfig, state: dict[str, Tensor]) -> str:
    """16 hex digits that change with anything stored tokens depend on: the adapter's configuration and weights.

    `state` is a model's state dict, or only its `adapter.*` entries; other entries do not matter, and neither does
    their device. Weights are compared as float32: a copy cast to bfloat16 is another adapter."""
    settings = _fingerprinted_settings(config.adapter)
    adapter = {name: tensor for name, tensor in state.items() if name.startswith("adapter.")}
    return tensors_hash(adapter, json.dumps(settings, sort_keys=True))


def _fingerprinted_settings(adapter: AdapterConfig) -> dict[str, Any]:
    """Settings of version 1 as they are; later ones only where they differ from their default, so that fingerprints of
    checkpoints that were made before a setting existed stay what they are."""
    defaults = {field.name: field.default for field in fields(adapter)}
    return {
        name: value
        for name, value in to_dict(adapter).items()
        if name in SETTINGS_OF_VERSION_1 or (name not in TOLD_BY_WEIGHTS and value != defaults[name])
    }


def weights_fingerprint(state: dict[str, Tensor]) -> str:
    """16 hex digits that change with any weight of a model's state dict, compared as float32."""
    return tensors_hash(untied(state))
