"""Weight files of other projects: a state dict as .safetensors, or as torch's pickle, which is read without being run.

    tensors, config = read_weights(find_weight_file(Path("edje.pth")))

Read are single files and sharded ones with their index, state dicts that a training script wrapped ({"model": ...,
"epoch": ...}), and names as DataParallel and torch.compile leave them (`module._orig_mod.model.NAME`).
"""

from __future__ import annotations

import json
import pickle
import re
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import UserError, one_line
from ..state_dicts import read_safetensors, without_wrappers

WEIGHT_SUFFIXES = (".safetensors", ".pth", ".pt", ".bin", ".ckpt")
INDEX_SUFFIX = ".index.json"
"""Of the file that lists the shards of a state dict: model.safetensors.index.json, pytorch_model.bin.index.json."""
PREFERRED_STEMS = ("model", "pytorch_model", "checkpoint")
"""The weights of a folder with several files, by name, the first that is there."""
NO_WEIGHTS = re.compile(r"(optimizer|scheduler|scaler|training_args|training_state|rng_state.*)\.\w+")
"""Files with a weight file's suffix that training scripts write beside the weights."""
WRAPPING_KEYS = ("model", "state_dict", "model_state_dict", "module")
"""Where a saved dictionary holds the state dict, in any nesting."""
_SHARD = re.compile(r".*-\d+-of-\d+")
ADVICE = {
    "a Git LFS pointer": "fetch the file itself: git lfs pull",
    "a web page": "download the file itself",
    "a safetensors file": "rename it to .safetensors",
    "a torch file": "rename it to .pth",
}
"""What to do with a file that is something else than its suffix says."""


def find_weight_file(path: Path) -> Path:
    """The file itself, or the weight file (or index of shards) that choose_weight_file() takes from a directory.

    Raises UserError if there is none, or if several may be meant."""
    if path.is_file():
        return path
    if not path.is_dir():
        raise UserError(f"{path}: no such file or directory; expected a checkpoint (.pth or .safetensors)")
    return path / choose_weight_file((file.name for file in path.iterdir() if file.is_file()), path)


def choose_weight_file(names: Iterable[str], where: str | Path) -> str:
    """Of a folder's file names the one with the weights, or the index of their shards.

    The only one; else the first of model, pytorch_model and checkpoint. Of one name in several formats: .safetensors,
    which runs no code, and one file before shards. Raises UserError naming the files if there is none, or if no rule
    tells which is meant."""
    names, by_stem = list(names), dict[str, list[str]]()
    found = sorted(name for name in names if _is_weights(name))
    shards = sorted(
        name for name in names if Path(name).suffix in WEIGHT_SUFFIXES and _SHARD.fullmatch(Path(name).stem)
    )
    if shards and not found:
        raise UserError(f"{where}: {shards[0]} is a shard, and its index (*{INDEX_SUFFIX}) is missing; fetch it too")
    for name in found:
        by_stem.setdefault(_stem(name), []).append(name)
    stems = [stem for stem in PREFERRED_STEMS if stem in by_stem][:1] or list(by_stem)
    if len(stems) != 1:
        listed = f"{', '.join(found)}; pass the file that is meant" if found else "none; pass the file"
        raise UserError(f"{where}: expected one weight file ({', '.join(WEIGHT_SUFFIXES)}), found {listed}")
    return min(by_stem[stems[0]], key=lambda name: (".safetensors" not in name, name.endswith(INDEX_SUFFIX), name))


def _is_weights(name: str) -> bool:
    suffix = Path(name.removesuffix(INDEX_SUFFIX)).suffix
    return suffix in WEIGHT_SUFFIXES and not NO_WEIGHTS.fullmatch(name) and not _SHARD.fullmatch(Path(name).stem)


def _stem(name: str) -> str:
    return Path(name.removesuffix(INDEX_SUFFIX)).stem


def shard_names(index: Path) -> list[str]:
    """The shards that an index lists, sorted. Raises UserError if it is damaged, or names files of other folders."""
    try:
        names = sorted({*json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()})
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{index}: not an index of shards ({one_line(error)}); fetch it again") from error
    for name in names:
        if not isinstance(name, str) or Path(name).name != name or not name:
            raise UserError(f"{index}: lists {name!r}, which is no file beside it; fetch it again")
    return names


def read_weights(file: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The flat state dict, without the prefixes of wrappers, and the config that was saved with it (else empty).

    file: one weight file, or the index of its shards. Raises UserError naming the file: damaged, a shard missing, of
    another format, or more than tensors in it (which could run code)."""
    if not file.name.endswith(INDEX_SUFFIX):
        state, config = _read_file(file)
        return without_wrappers(state, file), config
    tensors: dict[str, Tensor] = {}
    names = shard_names(file)
    missing = [name for name in names if not (file.parent / name).is_file()]
    if missing:
        raise UserError(
            f"{file}: {len(missing)} of {len(names)} shards are missing, the first is {missing[0]}; fetch it"
        )
    for name in names:
        state, _ = _read_file(file.parent / name)
        twice = state.keys() & tensors.keys()
        if twice:
            raise UserError(f"{file.parent / name}: {min(twice)} is in another shard too; fetch the shards again")
        tensors |= state
    listed = json.loads(file.read_text(encoding="utf-8"))["weight_map"].keys()
    if listed != tensors.keys():
        differing = min(listed ^ tensors.keys())
        raise UserError(f"{file}: it and its shards differ in {differing}; fetch index and shards again")
    return without_wrappers(tensors, file), {}


def _read_file(file: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    _check_format(file)
    if file.suffix == ".safetensors":
        return read_safetensors(file), {}
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of pickle protocols and sparse tensors: what matters is refused below
            content = torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise UserError(
            f"{file}: holds more than tensors and plain values, and loading it could run code; "
            "save its state dict alone, best as .safetensors"
        ) from error
    except Exception as error:  # a damaged archive fails in many ways
        raise UserError(f"{file}: truncated or damaged ({one_line(error)}); fetch it again") from error
    return _unwrapped(content, file)


def _unwrapped(content: Any, file: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The state dict inside what a training script saved, and the outermost `config` on the way to it."""
    config: dict[str, Any] = {}
    while isinstance(content, dict):
        config = config or (content["config"] if isinstance(content.get("config"), dict) else {})
        inner = next((content[key] for key in WRAPPING_KEYS if isinstance(content.get(key), dict)), None)
        if inner is None:
            break
        content = inner
    entries = content.items() if isinstance(content, dict) else ()
    # Beside the tensors may be what a loop keeps: an epoch, an optimizer.
    state = {name: tensor for name, tensor in entries if isinstance(name, str) and isinstance(tensor, Tensor)}
    if not state:
        keys = ", ".join(f"'{key}'" for key in WRAPPING_KEYS)
        raise UserError(f"{file}: no state dict in it; expected names with tensors, or these under {keys}")
    return state, config


def _check_format(file: Path) -> None:
    """Raise UserError that says what the file seems to be, if that is not what its suffix says."""
    try:
        with file.open("rb") as stream:
            head = stream.read(64)
    except OSError as error:
        raise UserError(
            f"{file}: cannot be read ({error.strerror}); pass a checkpoint (.pth or .safetensors)"
        ) from error
    if not head:
        raise UserError(f"{file}: empty, as a truncated download is; fetch it again")
    expected = "a safetensors file" if file.suffix == ".safetensors" else "a torch file"
    found = _format(head)
    if found != expected and found in ADVICE:
        raise UserError(f"{file}: {found}, not {expected} as its name says; {ADVICE[found]}")
    if found != expected and expected == "a torch file":  # a damaged safetensors file is told by its reader
        raise UserError(
            f"{file}: no torch file (it starts with {head[:16]!r}); pass a checkpoint (.pth or .safetensors)"
        )


def _format(head: bytes) -> str:
    """What a file with these first bytes is, a key of ADVICE; empty where unknown."""
    if head.startswith(b"version https://git-lfs"):
        return "a Git LFS pointer"
    if head.lstrip().lower().startswith((b"<!doctype", b"<html")):
        return "a web page"
    # The length of a JSON header, then the header; first, for a length may look like the start of a pickle.
    if head[8:9] == b"{" and int.from_bytes(head[:8], "little") < 2**32:
        return "a safetensors file"
    return "a torch file" if head.startswith((b"PK", b"\x80")) else ""
