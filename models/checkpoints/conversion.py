"""Published checkpoints as checkpoints of ours: written where one asks for it, or once into a cache.

convert("edje.pth", "checkpoints/edje")       # a checkpoint directory
cached_conversion(Path("edje.pth"))           # the same, beside the Hub's cache; from the second time on at once
"""

from __future__ import annotations

import atexit
import hashlib
import json
import os
import shutil
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..config import BackboneConfig
from ..errors import UserError, one_line
from ..language.captions import VOCABULARY_FILE
from .checkpoint import weights_fingerprint, write_checkpoint
from .model_card import model_card
from .published import CONFIG_JSON, Published, read_published
from .weight_files import INDEX_SUFFIX, find_weight_file, shard_names

_UNFINISHED = ".converting-"
_VERSION = 1
"""Raised whenever the same files would be converted into something else."""


def convert(
    source: str | Path,
    out: str | Path,
    config_json: str | Path | None = None,
    backbone: BackboneConfig | None = None,
    named: dict[str, Any] | None = None,
) -> Published:
    """Write the checkpoint directory `out` from published weights, and return what it holds.

    config_json, named: as for read_published(). backbone: instead of the one that the weights name. Raises UserError
    before anything is written."""
    published = read_published(source, config_json, named)
    if backbone is not None:
        published = published._replace(config=replace(published.config, backbone=backbone))
    weights = weights_fingerprint(published.state)
    # Whoever trained these weights says under which licence; nobody has told us.
    card = model_card(published.config, Path(out).name, weights=weights, license=None)
    write_checkpoint(out, published.config, published.state, published.tokenizer, card)
    return published


def cached_conversion(source: Path, named: dict[str, Any] | None = None) -> Path:
    """The checkpoint directory that a published file or directory was converted into, beside the Hub's cache.

    Converted where it is not there yet: by several processes at once, one's result stays; a kill leaves nothing that
    would be taken for one. Files of other names, sizes or times of change make another. Where the cache is full or
    cannot be written, the directory is a temporary one that ends with this process, and a line on stderr says so."""
    final = _cache() / f"{source.stem or 'checkpoint'}-{_key(source, named)}"
    if final.is_dir():
        return final
    try:
        _convert_into_cache(source, final, named)
    except OSError as error:
        print(f"{final}: cannot be kept ({one_line(error)}); converting {source} for this process", file=sys.stderr)
        return _convert_for_this_process(source, final.name, named)
    return final


def _convert_into_cache(source: Path, final: Path, named: dict[str, Any] | None) -> None:
    cache = final.parent
    cache.mkdir(parents=True, exist_ok=True)
    _remove_leftovers(cache)
    with tempfile.TemporaryDirectory(prefix=_UNFINISHED, dir=cache) as folder:
        convert(source, Path(folder) / "checkpoint", named=named)
        try:
            os.rename(Path(folder) / "checkpoint", final)
        except OSError:
            if not final.is_dir():  # else another process was first
                raise


def _convert_for_this_process(source: Path, name: str, named: dict[str, Any] | None) -> Path:
    try:
        folder = tempfile.mkdtemp(prefix="edje-")
        atexit.register(shutil.rmtree, folder, ignore_errors=True)
        convert(source, Path(folder) / name, named=named)
    except OSError as error:
        raise UserError(
            f"{source}: its conversion cannot be written to {tempfile.gettempdir()} either ({one_line(error)}); free "
            "some space, or set TMPDIR"
        ) from error
    return Path(folder) / name


def _remove_leftovers(cache: Path) -> None:
    """What processes left that were killed while they converted, a day ago or longer."""
    for folder in cache.glob(f"{_UNFINISHED}*"):
        if time.time() - folder.stat().st_mtime > 24 * 3600:
            shutil.rmtree(folder, ignore_errors=True)


def _cache() -> Path:
    from huggingface_hub import constants

    return Path(constants.HF_HUB_CACHE).parent / "edje"


def _key(source: Path, named: dict[str, Any] | None) -> str:
    """16 hex digits that change with every file that a conversion reads."""
    weights = find_weight_file(source)
    files = [weights, weights.parent / CONFIG_JSON, weights.parent / VOCABULARY_FILE]
    if weights.name.endswith(INDEX_SUFFIX):
        files += [weights.parent / name for name in shard_names(weights)]
    found = [(str(file.resolve()), file.stat().st_size, file.stat().st_mtime_ns) for file in files if file.is_file()]
    return hashlib.sha256(json.dumps([_VERSION, found, named]).encode()).hexdigest()[:16]
