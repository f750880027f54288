"""The token store against the tensors that went in; interruptions, damage and mix-ups each have one clear end.

The golden store of version 1 was made by: python tests/models/test_token_store.py
"""

import json
import os
import pickle
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch

from models.errors import UserError
from models.stores.codecs import CODECS, Codec
from models.stores.token_store import TokenStore, TokenStoreWriter

ROOT = Path(__file__).parents[2]
GOLDEN = Path(__file__).parent / "store_v1"
TORCH_DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "int8": torch.float16}


def item_ids(count: int) -> list[str]:
    return [f"images/{i:012d}.jpg" for i in range(count)]


def random_items(count: int, tokens: int = 5, width: int = 6, embedding_width: int = 4, seed: int = 0):
    generator = torch.Generator().manual_seed(seed)
    return (
        torch.randn(count, tokens, width, generator=generator) * 3,
        torch.randn(count, embedding_width, generator=generator),
    )


def make_writer(path, count: int, dtype: str = "float16", items_per_shard: int = 4, **options) -> TokenStoreWriter:
    settings = dict(
        tokens_per_item=5, width=6, embedding_width=4, backbone_fingerprint="vit/a", adapter_fingerprint="x"
    )
    settings.update(options)
    ids = settings.pop("ids", item_ids(count))
    return TokenStoreWriter(path, ids, dtype=dtype, items_per_shard=items_per_shard, **settings)


def write_shards(writer: TokenStoreWriter, tokens, embeddings, shards) -> None:
    for shard in shards:
        part = slice(shard * writer.manifest.items_per_shard, (shard + 1) * writer.manifest.items_per_shard)
        writer.write_shard(shard, tokens[part], embeddings[part])


def write_store(path, count: int = 10, dtype: str = "float16", **options) -> tuple[torch.Tensor, torch.Tensor]:
    tokens, embeddings = random_items(count)
    writer = make_writer(path, count, dtype, **options)
    write_shards(writer, tokens, embeddings, writer.missing_shards())
    writer.finish()
    return tokens, embeddings


def contents(path: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in path.iterdir()}


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_float_tokens_come_back_as_the_dtype_rounds_them(tmp_path, dtype):
    tokens, embeddings = write_store(tmp_path / "s", dtype=dtype)
    store = TokenStore.open(tmp_path / "s")
    assert torch.equal(store.gather(store.ids), tokens.to(TORCH_DTYPES[dtype]))
    assert torch.equal(store.gather_embeddings(store.ids), embeddings)


@pytest.mark.parametrize("magnitude", [0.0, 1e-8, 1e-6, 1e-4, 1e-3, 0.01, 1.0, 300.0])
def test_int8_tokens_come_back_within_057_steps(tmp_path, magnitude):
    tokens, embeddings = random_items(10)
    tokens *= magnitude
    writer = make_writer(tmp_path / "s", 10, "int8")
    write_shards(writer, tokens, embeddings, writer.missing_shards())
    writer.finish()
    store = TokenStore.open(tmp_path / "s")
    back = store.gather(store.ids)
    step = (tokens.abs().amax(-1, keepdim=True) / 127).clamp(min=2.0**-14)
    assert back.dtype == torch.float16
    assert ((back.float() - tokens).abs() <= 0.57 * step + 2.0**-25).all()
    assert torch.equal(store.gather_embeddings(store.ids), embeddings)


@dataclass(frozen=True)
class HalfBytes(Codec):
    """Whole numbers from 0 to 15, two in a byte."""

    @property
    def token_bytes(self) -> int:
        return self.width // 2

    def encode(self, tokens):
        values = tokens.to(torch.uint8).unflatten(-1, (-1, 2))
        return values[..., 0] + 16 * values[..., 1], ((tokens >= 0) & (tokens < 16)).all(-1).all(-1)

    def decode(self, stored):
        return torch.stack([stored % 16, stored // 16], dim=-1).flatten(-2).half()


def test_a_dtype_that_torch_does_not_have_is_a_class_and_its_name(tmp_path, monkeypatch):
    monkeypatch.setitem(CODECS, "half-bytes", HalfBytes)
    tokens, embeddings = torch.arange(4 * 5 * 6).view(4, 5, 6).float() % 16, random_items(4)[1]
    writer = make_writer(tmp_path / "s", 4, "half-bytes")
    writer.write_shard(0, tokens, embeddings)
    writer.finish()
    store = TokenStore.open(tmp_path / "s")
    store.verify()
    assert torch.equal(store.gather(store.ids[::-1]), tokens.flip(0).half())
    assert torch.equal(store.gather(store.ids, tokens=2), tokens[:, :2].half())
    assert torch.equal(store.gather_embeddings(store.ids), embeddings)
    tokens[3, 2, 1] = 16
    with pytest.raises(UserError, match=f"{store.ids[3]}: its tokens are not finite in half-bytes"):
        make_writer(tmp_path / "refused", 4, "half-bytes").write_shard(0, tokens, embeddings)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("dtype", ["float16", "int8"])
def test_gather_follows_the_order_given_with_duplicates_and_reads_prefixes(tmp_path, seed, dtype):
    write_store(tmp_path / "s", count=11, dtype=dtype)
    store = TokenStore.open(tmp_path / "s")
    everything, embeddings = store.gather(store.ids), store.gather_embeddings(store.ids)
    generator = np.random.default_rng(seed)
    rows = generator.integers(0, 11, size=generator.integers(1, 700))  # beyond one block of reads
    ids = [store.ids[row] for row in rows]
    assert torch.equal(store.gather(ids), everything[rows])
    assert torch.equal(store.gather(ids, tokens=2), everything[rows, :2])
    assert torch.equal(store.gather_embeddings(ids), embeddings[rows])


def test_gather_reads_the_wanted_records_and_nothing_else(tmp_path):
    """Every byte outside the prefix of the one record is made unlike itself; the prefix comes back all the same."""
    tokens, _ = write_store(tmp_path / "s", count=4, dtype="float16")
    record, prefix = 5 * 6 * 2, 2 * 6 * 2
    file = tmp_path / "s" / "shard-00000.bin"
    data = bytearray(b ^ 0xFF for b in file.read_bytes())
    data[2 * record : 2 * record + prefix] = file.read_bytes()[2 * record : 2 * record + prefix]
    file.write_bytes(data)
    store = TokenStore.open(tmp_path / "s")
    assert torch.equal(store.gather([store.ids[2]], tokens=2), tokens[2:3, :2].half())


def test_unknown_ids_and_impossible_requests_are_refused(tmp_path):
    write_store(tmp_path / "s")
    store = TokenStore.open(tmp_path / "s")
    with pytest.raises(UserError, match="no item 'nowhere.jpg' among its 10 ids"):
        store.gather([store.ids[0], "nowhere.jpg"])
    with pytest.raises(UserError, match="pass a list"):
        store.gather(store.ids[0])
    with pytest.raises(UserError, match="6 tokens per item requested; the store has 5"):
        store.gather(store.ids[:1], tokens=6)
    with pytest.raises(IndexError):
        store.gather_rows(np.array([10]))
    with pytest.raises(IndexError):
        store.gather_rows(np.array([-1]))
    assert store.gather([]).shape == (0, 5, 6)


def test_ids_of_any_text_come_back_exactly(tmp_path):
    ids = ["two\nlines", "tab\t", 'quote"', "snö 雪", "\udcff odd file name", "\u2028", ""]
    write_store(tmp_path / "s", count=7, ids=ids)
    assert TokenStore.open(tmp_path / "s").ids == ids


def test_a_store_of_embeddings_alone_has_no_tokens(tmp_path):
    embeddings = random_items(10)[1]
    writer = make_writer(tmp_path / "s", 10, tokens_per_item=0, width=0, adapter_fingerprint="")
    write_shards(writer, torch.empty(10, 0, 0), embeddings, writer.missing_shards())
    writer.finish()
    store = TokenStore.open(tmp_path / "s")
    store.verify()
    assert store.gather(store.ids[:3]).shape == (3, 0, 0)
    assert torch.equal(store.gather_embeddings(store.ids), embeddings)


def test_an_opened_store_survives_pickling_to_a_worker(tmp_path):
    write_store(tmp_path / "s")
    store = TokenStore.open(tmp_path / "s")
    expected = store.gather(store.ids)
    assert torch.equal(pickle.loads(pickle.dumps(store)).gather(store.ids), expected)


def test_the_format_adds_less_than_one_percent_to_64_tokens_of_384(tmp_path):
    count = 130
    writer = TokenStoreWriter(tmp_path / "s", item_ids(count), 64, 384, 0, "float16", "vit/a", "x")
    for shard in writer.missing_shards():
        size = len(writer.shard_ids(shard))
        writer.write_shard(shard, torch.zeros(size, 64, 384), torch.zeros(size, 0))
    writer.finish()
    on_disk = sum(file.stat().st_size for file in (tmp_path / "s").iterdir())
    assert 0 < on_disk - count * 49152 < 0.01 * count * 49152


WRITE_UNTIL_KILLED = """
import os, signal, sys
sys.path[:0] = [{root!r}, {tests!r}]
from test_token_store import write_store
rename = os.replace
def replace(source, target):
    if target.name == "shard-00003.bin":
        os.kill(os.getpid(), signal.SIGKILL)
    rename(source, target)
os.replace = replace
write_store({path!r}, count=40)
"""


def test_a_killed_writer_goes_on_at_the_first_missing_shard_to_identical_bytes(tmp_path):
    """SIGKILL when the fourth of ten shards is written and not yet renamed."""
    write_store(tmp_path / "whole", count=40)
    code = WRITE_UNTIL_KILLED.format(root=str(ROOT), tests=str(Path(__file__).parent), path=str(tmp_path / "s"))
    killed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert list((tmp_path / "s").glob("shard-00003.bin.tmp-*"))
    with pytest.raises(UserError, match="unfinished"):
        TokenStore.open(tmp_path / "s")
    tokens, embeddings = random_items(40)
    writer = make_writer(tmp_path / "s", 40)
    assert writer.missing_shards() == list(range(3, 10))
    finished = (tmp_path / "s" / "shard-00000.bin").stat().st_mtime_ns
    write_shards(writer, tokens, embeddings, writer.missing_shards())
    writer.finish()
    assert (tmp_path / "s" / "shard-00000.bin").stat().st_mtime_ns == finished
    assert contents(tmp_path / "s") == contents(tmp_path / "whole")


@pytest.mark.parametrize("failing_call", range(1, 7))  # plan, ids, three shards, manifest
def test_a_crash_at_any_rename_leaves_a_store_that_can_be_continued(tmp_path, monkeypatch, failing_call):
    write_store(tmp_path / "whole")
    replace, calls = os.replace, []

    def crash(source, target):
        calls.append(target)
        if len(calls) == failing_call:
            raise KeyboardInterrupt
        replace(source, target)

    monkeypatch.setattr(os, "replace", crash)
    with pytest.raises(KeyboardInterrupt):
        write_store(tmp_path / "s")
    with pytest.raises(UserError, match="unfinished|no token store"):
        TokenStore.open(tmp_path / "s")
    monkeypatch.undo()
    write_store(tmp_path / "s")
    assert contents(tmp_path / "s") == contents(tmp_path / "whole")


def test_two_writers_with_disjoint_shards_make_the_store_of_one(tmp_path):
    write_store(tmp_path / "whole")
    tokens, embeddings = random_items(10)
    first, second = make_writer(tmp_path / "s", 10), make_writer(tmp_path / "s", 10)
    write_shards(second, tokens, embeddings, [1])
    with pytest.raises(UserError, match="2 of 3 shards are missing, the first is shard-00000.bin"):
        second.finish()
    write_shards(first, tokens, embeddings, [0, 2])
    first.finish()
    assert contents(tmp_path / "s") == contents(tmp_path / "whole")


def test_writing_a_finished_store_again_changes_nothing(tmp_path):
    write_store(tmp_path / "s")
    times = {file.name: file.stat().st_mtime_ns for file in (tmp_path / "s").iterdir()}
    writer = make_writer(tmp_path / "s", 10)
    assert writer.missing_shards() == []
    writer.finish()
    assert {file.name: file.stat().st_mtime_ns for file in (tmp_path / "s").iterdir()} == times


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(backbone_fingerprint="vit/b"), "backbone 'vit/a', this one would have 'vit/b'"),
        (dict(adapter_fingerprint="y"), "adapter 'x', this one would have 'y'"),
        (dict(dtype="int8"), "dtype 'float16', this one would have 'int8'"),
        (dict(ids=item_ids(10)[::-1]), "other ids"),
    ],
)
@pytest.mark.parametrize("finished", [True, False])
def test_a_directory_with_another_store_is_refused_and_untouched(tmp_path, change, message, finished):
    write_store(tmp_path / "s") if finished else make_writer(tmp_path / "s", 10)
    before = contents(tmp_path / "s")
    with pytest.raises(UserError, match=message):
        make_writer(tmp_path / "s", 10, **change)
    assert contents(tmp_path / "s") == before


def test_a_directory_with_other_files_or_a_file_is_refused(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    for path in (tmp_path, tmp_path / "notes.txt"):
        with pytest.raises(UserError, match="no token store"):
            make_writer(path, 10)
    assert contents(tmp_path) == {"notes.txt": b"mine"}


def test_bad_items_are_refused(tmp_path):
    with pytest.raises(UserError, match="'a.jpg' is given twice"):
        make_writer(tmp_path / "s", 2, ids=["a.jpg", "a.jpg"])
    with pytest.raises(UserError, match="no ids"):
        make_writer(tmp_path / "s", 0)
    with pytest.raises(UserError, match="float64"):
        make_writer(tmp_path / "s", 2, dtype="float64")
    writer = make_writer(tmp_path / "s", 4)
    tokens, embeddings = random_items(4)
    tokens[2, 1, 3] = 1e5
    with pytest.raises(UserError, match=r"images/000000000002.jpg.*not finite in float16"):
        writer.write_shard(0, tokens, embeddings)
    tokens[2, 1, 3], embeddings[1, 0] = 1.0, torch.nan
    with pytest.raises(UserError, match="images/000000000001.jpg"):
        writer.write_shard(0, tokens, embeddings)
    with pytest.raises(ValueError, match="shapes"):
        writer.write_shard(0, tokens[:3], embeddings[:3])
    assert writer.missing_shards() == [0]


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, 1e7])
def test_int8_refuses_what_it_cannot_hold(tmp_path, bad):
    tokens, embeddings = random_items(4)
    tokens[3, 0, 0] = bad
    with pytest.raises(UserError, match="images/000000000003.jpg"):
        make_writer(tmp_path / "s", 4, "int8").write_shard(0, tokens, embeddings)


@pytest.mark.parametrize("name", ["shard-00001.bin", "ids.jsonl"])
def test_truncated_and_missing_files_are_named_and_rewritten_by_the_same_command(tmp_path, name):
    write_store(tmp_path / "s")
    whole = contents(tmp_path / "s")
    file = tmp_path / "s" / name
    for damage, message in [
        (lambda: file.write_bytes(whole[name][:-1]), f"{name}: has .* bytes, manifest.json says .*truncated"),
        (lambda: file.write_bytes(whole[name] + b"x"), f"{name}: has .* not this store's file"),
        (file.unlink, f"{name}: missing"),
    ]:
        damage()
        with pytest.raises(UserError, match=message):
            TokenStore.open(tmp_path / "s")
        write_store(tmp_path / "s")
        assert contents(tmp_path / "s") == whole


def test_one_flipped_bit_is_found_by_verify(tmp_path):
    write_store(tmp_path / "s")
    store = TokenStore.open(tmp_path / "s")
    store.verify()
    for position in (0, -33, -1 - 32 - 4 * 4):
        file = tmp_path / "s" / "shard-00001.bin"
        data = bytearray(whole := file.read_bytes())
        data[position] ^= 1
        file.write_bytes(data)
        with pytest.raises(UserError, match="shard-00001.bin.*corrupt.*delete this file"):
            store.verify()
        file.write_bytes(whole)


def test_changed_ids_of_the_same_length_are_found_on_opening(tmp_path):
    write_store(tmp_path / "s")
    file = tmp_path / "s" / "ids.jsonl"
    file.write_text(file.read_text().replace("000003", "000033"[:6]))
    with pytest.raises(UserError, match="ids.jsonl.*corrupt"):
        TokenStore.open(tmp_path / "s")


@pytest.mark.parametrize(
    "key, value, message",
    [
        ("version", 2, "format version 2, this code reads up to 1"),
        ("version", "1", "format version 1"),
        ("format", "pickle", "not the manifest of a token store"),
        ("count", 12, "do not fit"),
        ("count", 0, "impossible"),
        ("count", "10", "expected an integer"),
        ("width", 7, "do not fit"),
        ("width", -6, "impossible"),
        ("dtype", "float64", "impossible"),
        ("dtype", "int8", "do not fit"),
        ("items_per_shard", 5, "do not fit"),
        ("items_per_shard", 0, "impossible"),
        ("shards", [], "do not fit"),
        ("shards", None, "shards"),
        ("ids", {"file": "../../etc/passwd", "bytes": 1, "sha256": ""}, "do not fit"),
        ("colour", "red", "unknown key 'colour'"),
    ],
)
def test_a_tampered_manifest_is_refused(tmp_path, key, value, message):
    write_store(tmp_path / "s")
    file = tmp_path / "s" / "manifest.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), key: value}))
    with pytest.raises(UserError, match=f"manifest.json: .*{message}"):
        TokenStore.open(tmp_path / "s")


@pytest.mark.parametrize("text", ["", "[]", "{", '{"format": "edje-token-store"', "\x00\xff"])
def test_a_manifest_that_is_no_manifest_is_refused(tmp_path, text):
    write_store(tmp_path / "s")
    (tmp_path / "s" / "manifest.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(UserError, match="manifest.json"):
        TokenStore.open(tmp_path / "s")


def test_opening_what_is_no_store_says_how_to_make_one(tmp_path):
    with pytest.raises(UserError, match="no token store there.*precompute_tokens.py"):
        TokenStore.open(tmp_path / "nothing")


def test_a_store_of_another_backbone_or_adapter_is_refused_naming_both(tmp_path):
    write_store(tmp_path / "s")
    store = TokenStore.open(tmp_path / "s")
    store.check(backbone="vit/a")
    store.check(backbone="vit/a", adapter="x")
    with pytest.raises(UserError, match="manifest.json: made by backbone vit/a, but vit/b is used here; rebuild"):
        store.check(backbone="vit/b")
    with pytest.raises(UserError, match="made by adapter x, but adapter y is used here"):
        store.check(backbone="vit/a", adapter="y")
    with pytest.raises(UserError, match="made by adapter x, but no adapter is used here"):
        store.check(backbone="vit/a", adapter="")


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "int8"])
def test_new_code_reads_the_version_1_store(dtype):
    store = TokenStore.open(GOLDEN / dtype)
    store.verify()
    assert store.ids == item_ids(5)
    tokens, embeddings = golden_items()
    assert torch.equal(store.gather(store.ids), tokens.to(TORCH_DTYPES[dtype]))
    assert torch.equal(store.gather_embeddings(store.ids), embeddings)


def golden_items() -> tuple[torch.Tensor, torch.Tensor]:
    """Multiples of 1/8 up to 127/8, the largest in every token: exact in all three dtypes."""
    steps = torch.arange(5 * 3 * 4).view(5, 3, 4) % 251 - 125
    steps[..., 0] = 127
    return steps / 8, torch.arange(10).view(5, 2) / 16


def write_golden_stores() -> None:
    tokens, embeddings = golden_items()
    for dtype in TORCH_DTYPES:
        sizes = dict(tokens_per_item=3, width=4, embedding_width=2, items_per_shard=3)
        writer = make_writer(GOLDEN / dtype, 5, dtype, **sizes)
        write_shards(writer, tokens, embeddings, writer.missing_shards())
        writer.finish()


if __name__ == "__main__":
    write_golden_stores()
