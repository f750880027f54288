"""Benchmark section `store`: what fetching a query's candidates from a token store takes, warm and cold.

A fetch reads the 64 vision tokens of 384 and the embedding of 64 random items by id, and decodes them to float32. Warm:
the files lie in the page cache. Cold: the kernel was asked to drop them just before (Linux, files already on disk).
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from models.stores.token_store import TokenStore, TokenStoreWriter

from .timing import seconds_of, spread

ITEMS, FETCHED = 20_000, 64
TOKENS, WIDTH, EMBEDDING_WIDTH = 64, 384, 512
DTYPES = ("float16", "int8")
CPU = torch.device("cpu")


def benchmark_store(rounds: int) -> dict[str, Any]:
    """Milliseconds of a fetch, by dtype and state of the page cache; a round is one fetch of other items."""
    fetches = {}
    for dtype in DTYPES:
        with tempfile.TemporaryDirectory() as folder:
            store = write_store(Path(folder) / "store", dtype, ITEMS)
            for state, prepare in (("warm", _touch), ("cold", _drop)):
                fetches[f"{dtype}, {state}"] = spread(_milliseconds(store, prepare, rounds))
    return {
        "items": ITEMS,
        "fetched": FETCHED,
        "tokens": TOKENS,
        "width": WIDTH,
        "embedding_width": EMBEDDING_WIDTH,
        "rounds": rounds,
        "milliseconds": fetches,
    }


def _milliseconds(store: TokenStore, prepare: Callable[[Path], None], rounds: int) -> list[float]:
    """Of `rounds` fetches, each after prepare(); one before them warms up."""
    generator, times = np.random.default_rng(0), []
    for _ in range(rounds + 1):
        ids = [store.ids[i] for i in generator.choice(ITEMS, FETCHED, replace=False)]
        prepare(store.path)
        times.append(1000 * seconds_of(partial(_fetch, store, ids), CPU))
    return times[1:]


def _fetch(store: TokenStore, ids: list[str]) -> tuple[Tensor, Tensor]:
    return store.gather(ids), store.gather_embeddings(ids)


def write_store(path: Path, dtype: str, items: int) -> TokenStore:
    """A store of `items` images with random tokens."""
    torch.manual_seed(0)
    writer = TokenStoreWriter(
        path, [f"{i:06d}.jpg" for i in range(items)], TOKENS, WIDTH, EMBEDDING_WIDTH, dtype, "random", "random"
    )
    for shard in writer.missing_shards():
        count = len(writer.shard_ids(shard))
        writer.write_shard(shard, torch.randn(count, TOKENS, WIDTH), torch.randn(count, EMBEDDING_WIDTH))
    writer.finish()
    return TokenStore.open(path)


def _touch(path: Path) -> None:
    """Read every file, so that the kernel holds it."""
    for file in path.glob("*.bin"):
        with file.open("rb", buffering=0) as stream:
            while stream.read(1 << 24):
                pass


def _drop(path: Path) -> None:
    """Ask the kernel to forget every file."""
    for file in path.glob("*.bin"):
        with file.open("rb") as stream:
            os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
