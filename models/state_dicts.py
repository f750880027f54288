"""State dicts: read and written as safetensors, checked, hashed, and copied into a module strictly.

Nothing here knows what the tensors are for: backbones, adapters and whole checkpoints all use it.
"""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor, nn

from .errors import UserError, one_line
from .files import write_atomically

_WRAPPERS = {"module", "_orig_mod", "model"}
"""Parts of names that are none of the model: of DataParallel, of torch.compile, of a module that holds the model."""


def read_safetensors(path: Path) -> dict[str, Tensor]:
    """All tensors of a file, on the CPU. Raises UserError naming the file if it is missing or damaged."""
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path}: missing, truncated or damaged ({one_line(error)}); copy or write it again") from error


def without_wrappers(state: dict[str, Tensor], where: str | Path) -> dict[str, Tensor]:
    """The same tensors by the names that the model itself gives them, whatever wrapped it or its parts, in any nesting:
    `a.b` for `module._orig_mod.a.module.b`. Raises UserError if two then have one name."""
    result: dict[str, Tensor] = {}
    for name, tensor in state.items():
        inner = ".".join(part for part in name.split(".") if part not in _WRAPPERS)
        if inner in result:
            raise UserError(f"{where}: holds {inner} twice, the second time as {name}; save one model's state dict")
        result[inner] = tensor
    return result


def check_weights(state: dict[str, Tensor], where: str | Path) -> None:
    """Raise UserError naming the first tensor that holds no weights: no dense floating-point values, or not finite."""
    for name, tensor in state.items():
        if tensor.is_meta or tensor.layout != torch.strided or not tensor.is_floating_point():
            kind = "no data" if tensor.is_meta else tensor.dtype if tensor.layout == torch.strided else tensor.layout
            raise UserError(f"{where}: {name} holds {kind}; expected dense floating-point values; save the weights so")
        if not tensor.float().isfinite().all():
            raise UserError(f"{where}: {name} has values that are NaN or infinite; take an undamaged checkpoint")


def write_safetensors(path: Path, state: dict[str, Tensor]) -> None:
    """All tensors into one file with the permissions of any other new file, which appears whole or not at all."""
    write_atomically(path, save(state, metadata={"format": "pt"}))  # save_file would let its owner alone read it


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
    names_of = check_state(module, state, where, name_in_file)
    expected = module.state_dict(keep_vars=True)
    complete = {name: state[next(n for n in names_of[id(t)] if n in state)] for name, t in expected.items()}
    module.load_state_dict(complete)


def check_state(
    module: nn.Module, state: dict[str, Tensor], where: str | Path, name_in_file: Callable[[str], str] = str
) -> dict[int, list[str]]:
    """Raises UserError as load_state() does; `module` may have shapes alone (the meta device).

    Returns the names of each parameter, by its id: tied ones have several."""
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
    return names_of


def tensors_hash(state: dict[str, Tensor], settings: str = "") -> str:
    digest = hashlib.sha256(settings.encode())
    for name in sorted(state):
        tensor = state[name].detach().to("cpu", torch.float32).contiguous()
        digest.update(f"{name}{list(tensor.shape)}".encode())
        digest.update(tensor.numpy().tobytes())
    return digest.hexdigest()[:16]


def untied(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """One name for each memory: safetensors refuses tensors that share it, and copies would double the file."""
    kept: dict[tuple, tuple[str, Tensor]] = {}
    for name, tensor in state.items():
        memory = (tensor.untyped_storage().data_ptr(), tensor.storage_offset(), tensor.shape, tensor.stride())
        kept.setdefault(memory, (name, tensor))
    return {name: tensor.detach().to("cpu").contiguous() for name, tensor in kept.values()}


def shortened(names: list[str], most: int = 6) -> str:
    """The first `most` of them, and how many there are beside."""
    rest = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + rest
