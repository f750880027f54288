"""Weight files of other projects: a state dict as .safetensors, or as torch's pickle, which is read without being run.

tensors, config = read_weights(find_weight_file(Path("edje.pth")))
"""

from __future__ import annotations

import pickle
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import UserError, one_line
from ..state_dicts import read_safetensors

WEIGHT_SUFFIXES = (".safetensors", ".pth", ".pt", ".bin")
ADVICE = {
    "a Git LFS pointer": "fetch the file itself: git lfs pull",
    "a web page": "download the file itself",
    "a safetensors file": "rename it to .safetensors",
    "a torch file": "rename it to .pth",
}
"""What to do with a file that is something else than its suffix says."""


def find_weight_file(path: Path) -> Path:
    """The file itself, or the only weight file of a directory. Raises UserError if there is none, or several."""
    if path.is_file():
        return path
    if not path.is_dir():
        raise UserError(f"{path}: no such file or directory; expected a checkpoint (.pth or .safetensors)")
    files = sorted(f for f in path.iterdir() if f.suffix in WEIGHT_SUFFIXES and f.is_file())
    if len(files) != 1:
        found = ", ".join(f.name for f in files) or "none"
        raise UserError(
            f"{path}: expected one weight file ({', '.join(WEIGHT_SUFFIXES)}), found {found}; pass the file"
        )
    return files[0]


def read_weights(file: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The flat state dict and the config that was saved with it (empty where there was none).

    Raises UserError naming the file: damaged, of another format, or more than tensors in it (which could run code)."""
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
    state = content.get("model", content) if isinstance(content, dict) else content
    if not isinstance(state, dict) or not all(isinstance(k, str) and isinstance(t, Tensor) for k, t in state.items()):
        raise UserError(f"{file}: no state dict in it; expected names with tensors, or these under 'model'")
    named = content.get("config")
    return state, named if isinstance(named, dict) else {}


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
