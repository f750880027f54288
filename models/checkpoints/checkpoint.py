"""Checkpoints: a directory with config.yaml, model.safetensors and tokenizer.json that loads without network.

A run keeps them as OUTPUT/checkpoints/step-00000500/ (with its training_state.pt beside), and OUTPUT/checkpoints/LATEST
names the newest complete one. Everything is written under a temporary name, flushed to disk and renamed, so a kill
at any line leaves whole directories only. Weights are safetensors: loading one runs no code.

    config, state, tokenizer = read_checkpoint(resolve_checkpoint("runs/demo"))
"""

from __future__ import annotations

import json
import os
from pathlib import Path

import yaml
from torch import Tensor

from ..config import EDJEConfig
from ..config_io import from_dict, to_dict
from ..errors import UserError, one_line
from ..files import atomic_directory, write_atomically
from ..language.captions import TOKENIZER_FILE, CaptionTokenizer
from ..state_dicts import check_weights, read_safetensors, tensors_hash, untied, write_safetensors

CONFIG_FILE = "config.yaml"
WEIGHTS_FILE = "model.safetensors"
LATEST_FILE = "LATEST"
CARD_FILE = "README.md"
CHECKPOINT_FILES = (CONFIG_FILE, WEIGHTS_FILE, TOKENIZER_FILE)


def write_checkpoint(
    directory: str | Path, config: EDJEConfig, state: dict[str, Tensor], tokenizer: CaptionTokenizer, card: str
) -> None:
    """Write a checkpoint directory, or replace one. Tensors that share memory (tied weights) are stored once.

    card: text of its README.md (models/model_card.py); the step directories of a run, which nobody is given, have none.
    Raises UserError if `directory` exists and is neither empty nor a checkpoint: nothing else is ever overwritten."""
    directory = Path(directory)
    if directory.exists():
        others = _strangers(directory)
        if others:
            raise UserError(f"{directory}: exists and is no plain checkpoint (holds {others[0]}); choose another path")
    with atomic_directory(directory) as temporary:
        write_checkpoint_files(temporary, config, state, tokenizer)
        (temporary / CARD_FILE).write_text(card, encoding="utf-8")


def _strangers(path: Path) -> list[str]:
    """What keeps `path` from being replaced by a checkpoint: all that no checkpoint has, sorted.

    Without a config of ours everything does: model.safetensors and tokenizer.json are other projects' names too."""
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
    """Write or replace a checkpoint's config.yaml in one step (a fusion weight may be chosen after training)."""
    write_atomically(Path(directory) / CONFIG_FILE, yaml.safe_dump(to_dict(config), sort_keys=False))


def read_checkpoint(directory: str | Path) -> tuple[EDJEConfig, dict[str, Tensor], CaptionTokenizer]:
    """Config, weights (on the CPU, tied ones once) and tokenizer of a checkpoint directory.

    Raises UserError naming the file that is missing, truncated or inconsistent, or the tensor that holds no weights."""
    directory = Path(directory)
    missing = [name for name in CHECKPOINT_FILES if not (directory / name).is_file()]
    if missing:
        raise UserError(f"{directory / missing[0]}: no such file; a checkpoint has {', '.join(CHECKPOINT_FILES)}")
    config = read_config(directory)
    state = read_safetensors(directory / WEIGHTS_FILE)
    check_weights(state, directory / WEIGHTS_FILE)
    tokenizer = CaptionTokenizer.from_pretrained(directory / TOKENIZER_FILE)
    if tokenizer.vocab_size > config.encoder.vocab_size:
        raise UserError(
            f"{directory / TOKENIZER_FILE} has {tokenizer.vocab_size} word pieces, {CONFIG_FILE} says "
            f"encoder.vocab_size {config.encoder.vocab_size}; restore the tokenizer of this checkpoint"
        )
    return config, state, tokenizer


def read_config(directory: str | Path) -> EDJEConfig:
    """config.yaml of a checkpoint directory. Raises UserError naming the file and every key that is wrong."""
    path = Path(directory) / CONFIG_FILE
    try:
        data = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise UserError(f"{path}: not readable as YAML ({one_line(error)}); restore the file") from error
    return from_dict(EDJEConfig, data, where=str(path))


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


def adapter_fingerprint(config: EDJEConfig, state: dict[str, Tensor]) -> str:
    """16 hex digits that change with anything stored tokens depend on: the adapter's configuration and weights.

    `state` is a model's state dict, or only its `adapter.*` entries; other entries do not matter, and neither does
    their device. Weights are compared as float32: a copy cast to bfloat16 is another adapter."""
    settings = to_dict(config.adapter)
    # Stored tokens depend on the weights that training made of these, and the weights' names tell the blocks.
    for told_by_weights in ("query_std", "places", "learn_queries", "num_blocks"):
        del settings[told_by_weights]
    adapter = {name: tensor for name, tensor in state.items() if name.startswith("adapter.")}
    return tensors_hash(adapter, json.dumps(settings, sort_keys=True))


def weights_fingerprint(state: dict[str, Tensor]) -> str:
    """16 hex digits that change with any weight of a model's state dict, compared as float32."""
    return tensors_hash(untied(state))
