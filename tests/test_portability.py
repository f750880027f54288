"""Stores, shards and checkpoints where POSIX calls are missing: the same bytes, by plainer calls."""

import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from data.webdataset_shards import load_shards
from models import files
from models.edje import EDJE
from models.errors import UserError
from models.files import PositionedReader
from models.stores.token_store import TokenStore, TokenStoreWriter
from models.vision.backbones import Backbone
from tests.shards import jpeg, sample, write_tar
from tests.tiny_model import make_model, write_backbone

POSIX_CALLS = ("preadv", "pread", "posix_fadvise", "uname", "fork", "sched_getaffinity")
SYSTEMS = {"posix": (), "macos": ("preadv", "posix_fadvise"), "windows": POSIX_CALLS}
ITEMS, WIDTH = 40, 6


def leave_out(monkeypatch, system: str) -> None:
    """From here on, only the calls of `system` are there; on Windows no directory can be opened, nor a read-only file
    be flushed."""
    for name in SYSTEMS[system]:
        monkeypatch.delattr(os, name, raising=False)
    if system != "windows":
        return
    here, opened = dict(vars(os)), {}

    def open_file(path, flags, *rest):
        if Path(path).is_dir():
            raise PermissionError(13, "Permission denied", str(path))
        descriptor = here["open"](path, flags, *rest)
        opened[descriptor] = flags
        return descriptor

    def fsync(descriptor):
        if not opened.pop(descriptor, os.O_RDWR) & os.O_RDWR:
            raise OSError(9, "Bad file descriptor")
        here["fsync"](descriptor)

    bare = SimpleNamespace(**{name: call for name, call in here.items() if name != "O_DIRECTORY"})
    bare.open, bare.fsync = open_file, fsync
    monkeypatch.setattr(files, "os", bare)


def write_store(path: Path) -> Path:
    generator = torch.Generator().manual_seed(0)
    ids = [f"folder/{number}.jpg" for number in range(ITEMS)]
    writer = TokenStoreWriter(path, ids, 5, WIDTH, 4, "float16", "backbone", "adapter", items_per_shard=7)
    for shard in writer.missing_shards():
        count = len(writer.shard_ids(shard))
        tokens = torch.randn(count, 5, WIDTH, generator=generator)
        writer.write_shard(shard, tokens, torch.randn(count, 4, generator=generator))
    writer.finish()
    return path


def content(folder: Path) -> dict[str, bytes]:
    return {file.relative_to(folder).as_posix(): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


@pytest.fixture(params=["macos", "windows"])
def elsewhere(request, monkeypatch):
    """A function that takes the calls away; tests write their references before they call it."""
    return lambda: leave_out(monkeypatch, request.param)


def test_a_store_has_the_same_bytes_and_is_read_by_eight_threads(tmp_path, elsewhere):
    here = TokenStore.open(write_store(tmp_path / "here"))
    expected = here.gather(here.ids), here.gather_embeddings(here.ids)
    elsewhere()
    there = TokenStore.open(write_store(tmp_path / "there"))
    assert content(tmp_path / "there") == content(tmp_path / "here")
    there.verify()
    rows = [np.random.default_rng(seed).integers(0, ITEMS, 30) for seed in range(64)]
    with ThreadPoolExecutor(8) as pool:
        for row, tokens, few, embeddings in zip(
            rows,
            pool.map(there.gather_rows, rows),
            pool.map(lambda row: there.gather_rows(row, 2), rows),
            pool.map(there.gather_embedding_rows, rows),
            strict=True,
        ):
            assert torch.equal(tokens, expected[0][row]) and torch.equal(few, expected[0][row, :2])
            assert torch.equal(embeddings, expected[1][row])


def test_a_store_that_is_cut_while_in_use_is_one_error(tmp_path, elsewhere):
    elsewhere()
    store = TokenStore.open(write_store(tmp_path / "store"))
    os.truncate(tmp_path / "store" / "shard-00001.bin", 10)
    with pytest.raises(UserError, match="a shard was cut short while in use"):
        store.gather(store.ids)


def test_shards_are_indexed_and_read(tmp_path, elsewhere):
    write_tar(tmp_path / "sub" / "0.tar", [member for number in range(5) for member in sample(number)])
    write_tar(tmp_path / "sub" / "1.tar", [member for number in range(5, 8) for member in sample(number)])
    here = load_shards("sub/{0..1}.tar", tmp_path, tmp_path / "cache")
    pixels = [np.asarray(here.open_image(row)) for row in range(8)]
    elsewhere()
    there = load_shards("sub/{0..1}.tar", tmp_path, tmp_path / "another cache")
    assert list(there.image_ids) == list(here.image_ids) and "0.tar/000000000.jpg" in there.image_ids
    for row, expected in enumerate(pixels):
        np.testing.assert_array_equal(np.asarray(there.open_image(row)), expected)


def test_a_checkpoint_is_written_replaced_and_read(tmp_path, elsewhere):
    model = make_model(
        Backbone.load(write_backbone(tmp_path / "backbone"), precision="float32"), tmp_path / "vocab.txt"
    )
    model.save_pretrained(tmp_path / "here")
    elsewhere()
    for _ in range(2):
        model.save_pretrained(tmp_path / "there")
        read = EDJE.from_pretrained(tmp_path / "there").state_dict()
        assert all(torch.equal(read[name], value) for name, value in model.state_dict().items())
    names = {"config.yaml", "model.safetensors", "tokenizer.json"}
    here, there = content(tmp_path / "here"), content(tmp_path / "there")
    assert here.keys() == there.keys() and all(here[name] == there[name] for name in names)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["backbone", "here", "there", "vocab.txt"]


@pytest.mark.parametrize("system", SYSTEMS)
def test_positioned_reads_return_what_is_there(tmp_path, monkeypatch, system):
    (tmp_path / "file").write_bytes(jpeg(3))
    whole = (tmp_path / "file").read_bytes()
    leave_out(monkeypatch, system)
    reader = PositionedReader(tmp_path / "file", random=True)
    reader.will_need(0, 10)
    for offset, count in ((0, 4), (10, 0), (len(whole) - 3, 3), (len(whole) - 3, 9), (len(whole), 5), (3, 1)):
        assert reader.read(offset, count) == whole[offset : offset + count]
