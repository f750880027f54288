"""Checkpoints: a directory with config.yaml, model.safetensors and tokenizer.json that loads without network.

A run keeps them as OUTPUT/checkpoints/step-00000500/ (with its training_state.pt beside), and OUTPUT/checkpoints/LATEST
names the newest complete one. Everything is written under a temporary name, flushed to disk and renamed, so a kill
at any line leaves whole directories only. Weights are safetensors: loading one runs no code.

    config, state, tokenizer = read_checkpoint(resolve_checkpoint("runs/demo"))
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
import yaml
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor, nn

from .captions import TOKENIZER_FILE, CaptionTokenizer
from .config import EDJEConfig
from .config_io import from_dict, to_dict
from .errors import UserError

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
    write_safetensors(directory / WEIGHTS_FILE, _untied(state))
    tokenizer.save(directory)


def write_config(directory: str | Path, config: EDJEConfig) -> None:
    """Write or replace a checkpoint's config.yaml in one step (a fusion weight may be chosen after training)."""
    replace_text(Path(directory) / CONFIG_FILE, yaml.safe_dump(to_dict(config), sort_keys=False))


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
        raise UserError(f"{path}: not readable as YAML ({_one_line(error)}); restore the file") from error
    return from_dict(EDJEConfig, data, where=str(path))


def read_safetensors(path: Path) -> dict[str, Tensor]:
    """All tensors of a file, on the CPU. Raises UserError naming the file if it is missing or damaged."""
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise UserError(
            f"{path}: missing, truncated or damaged ({_one_line(error)}); copy or write it again"
        ) from error


def check_weights(state: dict[str, Tensor], where: str | Path) -> None:
    """Raise UserError naming the first tensor that holds no weights: no dense floating-point values, or not finite."""
    for name, tensor in state.items():
        if tensor.is_meta or tensor.layout != torch.strided or not tensor.is_floating_point():
            kind = "no data" if tensor.is_meta else tensor.dtype if tensor.layout == torch.strided else tensor.layout
            raise UserError(f"{where}: {name} holds {kind}; expected dense floating-point values; save the weights so")
        if not tensor.float().isfinite().all():
            raise UserError(f"{where}: {name} has values that are NaN or infinite; take an undamaged checkpoint")


def write_safetensors(path: Path, state: dict[str, Tensor]) -> None:
    """All tensors into one file with the permissions of any other new file."""
    path.write_bytes(save(state, metadata={"format": "pt"}))  # save_file would let its owner alone read it


def half_precision(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same tensors with floating-point ones rounded to float16: half a file's bytes."""
    return {name: tensor.half() if tensor.is_floating_point() else tensor for name, tensor in state.items()}


def load_state(
    module: nn.Module,
    state: dict[str, Tensor],
    where: str | Path = "checkpoint",
    name_in_file: Callable[[str], str] = str,
) -> None:
    """Copy `state` into `module`, strictly: same names, same shapes. Of tied parameters any one name is enough.

    name_in_file: what the file calls a name of `module`, for messages, where the two differ. Raises UserError that
    lists missing, unexpected and mis-shaped names, and then leaves `module` as it was."""
    expected = module.state_dict(keep_vars=True)
    names_of: dict[int, list[str]] = defaultdict(list)
    for name, tensor in expected.items():
        names_of[id(tensor)].append(name)
    missing = [name_in_file(names[0]) for names in names_of.values() if not any(name in state for name in names)]
    unexpected = [name_in_file(name) for name in state if name not in expected]
    misshaped = [
        f"{name_in_file(name)} is {list(tensor.shape)}, expected {list(expected[name].shape)}"
        for name, tensor in state.items()
        if name in expected and tensor.shape != expected[name].shape
    ]
    found = (("missing", missing), ("unexpected", unexpected), ("mis-shaped", misshaped))
    problems = [f"{len(names)} {kind}: {shortened(names)}" for kind, names in found if names]
    if problems:
        raise UserError(f"{where}: the weights do not fit the model's configuration; {'; '.join(problems)}")
    complete = {name: state[next(n for n in names_of[id(t)] if n in state)] for name, t in expected.items()}
    module.load_state_dict(complete)


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
    replace_text(Path(root) / LATEST_FILE, name + "\n")


def adapter_fingerprint(config: EDJEConfig, state: dict[str, Tensor]) -> str:
    """16 hex digits that change with anything stored tokens depend on: the adapter's configuration and weights.

    `state` is a model's state dict, or only its `adapter.*` entries; other entries do not matter, and neither does
    their device. Weights are compared as float32: a copy cast to bfloat16 is another adapter."""
    settings = to_dict(config.adapter)
    # Stored tokens depend on the weights that training made of these, and the weights' names tell the blocks.
    for told_by_weights in ("query_std", "places", "learn_queries", "num_blocks"):
        del settings[told_by_weights]
    adapter = {name: tensor for name, tensor in state.items() if name.startswith("adapter.")}
    return _tensors_hash(adapter, json.dumps(settings, sort_keys=True))


def weights_fingerprint(state: dict[str, Tensor]) -> str:
    """16 hex digits that change with any weight of a model's state dict, compared as float32."""
    return _tensors_hash(_untied(state))


def _tensors_hash(state: dict[str, Tensor], settings: str = "") -> str:
    digest = hashlib.sha256(settings.encode())
    for name in sorted(state):
        tensor = state[name].detach().to("cpu", torch.float32).contiguous()
        digest.update(f"{name}{list(tensor.shape)}".encode())
        digest.update(tensor.numpy().tobytes())
    return digest.hexdigest()[:16]


def shortened(names: list[str], most: int = 6) -> str:
    """The first `most` of them, and how many there are beside."""
    rest = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + rest


@contextmanager
def atomic_directory(final: str | Path) -> Iterator[Path]:
    """A temporary directory that becomes `final` if the block ends well, and disappears if it does not.

    Its files are flushed to disk before the rename. An older `final` is replaced; a kill between the two renames
    that this takes leaves it whole as `.NAME.old`. Raises UserError if `final` cannot be created, or is `.` or `..`,
    which cannot be renamed."""
    final = Path(final)
    if final.name in ("", ".."):
        raise UserError(f"{final}: no directory by its name; name the one to write, e.g. {final / 'checkpoint'}")
    temporary, old = final.with_name(f".{final.name}.tmp"), final.with_name(f".{final.name}.old")
    shutil.rmtree(temporary, ignore_errors=True)  # left by a killed writer
    try:
        temporary.mkdir(parents=True)
    except OSError as error:
        raise UserError(f"{final}: cannot be created ({error.strerror}); choose a directory to write to") from error
    try:
        yield temporary
        for path in (*temporary.rglob("*"), temporary):
            _flush(path)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    shutil.rmtree(old, ignore_errors=True)
    if final.exists():
        os.rename(final, old)
    os.rename(temporary, final)
    _flush(final.parent)
    shutil.rmtree(old, ignore_errors=True)


def replace_text(path: Path, text: str) -> None:
    """Write a small text file in one step: a reader sees the old content or the new, never a part."""
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(text, encoding="utf-8")
    _flush(temporary)
    os.replace(temporary, path)
    _flush(path.parent)


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _untied(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """One name for each memory: safetensors refuses tensors that share it, and copies would double the file."""
    kept: dict[tuple, tuple[str, Tensor]] = {}
    for name, tensor in state.items():
        memory = (tensor.untyped_storage().data_ptr(), tensor.storage_offset(), tensor.shape, tensor.stride())
        kept.setdefault(memory, (name, tensor))
    return {name: tensor.detach().to("cpu").contiguous() for name, tensor in kept.values()}


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())
