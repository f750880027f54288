"""Tokens on disk, format version 1: the backbone's or the adapter's output for each image, computed once, read by id.

    store = TokenStore.open("runs/demo/tokens")
    store.gather(["images/0001.jpg"])                # [1, 64, 384]; other records are not touched
    store.gather(["images/0001.jpg"], tokens=8)      # [1, 8, 384]; reads 8 tokens of the record

A store is a directory:
    manifest.json      format version, fingerprints of backbone and adapter, sizes, checksums; written last
    ids.jsonl          one JSON string per line, in the order of the records
    shard-00000.bin    tokens [n, m, H], embeddings [n, De] float32, SHA-256 of both (32 bytes)
Three kinds share the format: compressed tokens [m, H], patch tokens [P, Dv] (adapter fingerprint empty), and caption
embeddings (no tokens, ids are the captions). A 64 x 384 record in float16 has 49,152 bytes; manifest, ids and checksums
add less than 1% to it. Embeddings stay float32: rounded ones would change the order of the first stage.

dtypes are codecs.py's: float16, bfloat16, or int8 with a scale per token.

Letters: n items, m tokens per item, H token width, De embedding width.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ..errors import UserError
from ..files import PositionedReader, write_atomically
from .codecs import CODECS
from .store_format import (
    CHECKSUM_BYTES,
    IDS,
    MANIFEST,
    PLAN,
    FileRecord,
    StoreManifest,
    check_size,
    default_items_per_shard,
    difference,
    file_checksum,
    has_size,
    id_lines,
    manifest_text,
    parse_manifest,
    read_ids,
    read_manifest,
    shard_name,
)

READ_AHEAD_ROWS = 256
"""Reads announced to the kernel at a time."""


class TokenStore:
    """A finished store, read by id or by row; open() checks every file's size and touches no record.

    Reads are positioned reads announced to the kernel beforehand: as fast as a memory map when the pages are cached,
    and without its read-ahead of megabytes a record when they are not. Safe to hand to data-loader workers."""

    def __init__(self, path: Path, manifest: StoreManifest, ids: list[str]):
        self._files: dict[int, PositionedReader] = {}
        self.path, self.manifest, self.ids = path, manifest, ids

    @classmethod
    def open(cls, path: str | Path) -> TokenStore:
        """Raises UserError naming the file: no store, unfinished, newer version, truncated, foreign, inconsistent."""
        path = Path(path)
        manifest = read_manifest(path)
        for record in (manifest.ids, *manifest.shards):
            check_size(path / record.file, record.bytes)
        return cls(path, manifest, read_ids(path / IDS, manifest))

    def __reduce__(self) -> tuple[Callable[[Path], TokenStore], tuple[Path]]:
        return TokenStore.open, (self.path,)

    def __len__(self) -> int:
        return self.manifest.count

    def __contains__(self, item_id: object) -> bool:
        return item_id in self._row_of

    @property
    def tokens_per_item(self) -> int:
        return self.manifest.tokens_per_item

    @property
    def width(self) -> int:
        return self.manifest.width

    @property
    def embedding_width(self) -> int:
        return self.manifest.embedding_width

    @property
    def dtype(self) -> str:
        """float16, bfloat16 or int8: a name in codecs.CODECS."""
        return self.manifest.dtype

    @cached_property
    def _row_of(self) -> dict[str, int]:
        return {item_id: row for row, item_id in enumerate(self.ids)}

    def rows(self, ids: Sequence[str]) -> np.ndarray:
        """Rows [n] int64 of the ids. Raises UserError naming the first id that the store does not have."""
        if isinstance(ids, str):
            raise UserError(f"{self.path}: ids is the string {ids!r}; pass a list of ids")
        try:
            return np.fromiter((self._row_of[item_id] for item_id in ids), np.int64, len(ids))
        except KeyError as error:
            raise UserError(
                f"{self.path}: no item {error.args[0]!r} among its {len(self)} ids (the first is {self.ids[0]!r}); "
                "use ids listed in store.ids, or rebuild the store with this item"
            ) from None

    def gather(self, ids: Sequence[str], tokens: int | None = None) -> Tensor:
        """Tokens of the items in the order given, duplicates included: [n, m, H], or the first `tokens` of each.

        float16 and bfloat16 come back as stored, int8 as float16. Raises UserError for an unknown id."""
        return self.gather_rows(self.rows(ids), tokens)

    def gather_rows(self, rows: np.ndarray, tokens: int | None = None) -> Tensor:
        """gather() by row number, [n] int64."""
        manifest = self.manifest
        tokens = self.tokens_per_item if tokens is None else tokens
        if not 0 <= tokens <= self.tokens_per_item:
            raise UserError(f"{self.path}: {tokens} tokens per item requested; the store has {self.tokens_per_item}")
        codec = manifest.codec
        raw = self._read(rows, manifest.record_bytes, tokens * codec.token_bytes, in_embeddings=False)
        return codec.decode(raw.view(len(raw), tokens, codec.token_bytes))

    def gather_embeddings(self, ids: Sequence[str]) -> Tensor:
        """First-stage embeddings of the items, [n, De] float32."""
        return self.gather_embedding_rows(self.rows(ids))

    def gather_embedding_rows(self, rows: np.ndarray) -> Tensor:
        """gather_embeddings() by row number, [n] int64."""
        num_bytes = 4 * self.embedding_width
        return self._read(rows, num_bytes, num_bytes, in_embeddings=True).view(torch.float32)

    def check(self, backbone: str, adapter: str | None = None) -> None:
        """Raises UserError naming both fingerprints if another backbone or adapter made the tokens.

        adapter: "" for patch tokens, None to accept any adapter."""
        where, fix = self.path / MANIFEST, "rebuild the store with scripts/precompute_tokens.py"
        if self.manifest.backbone != backbone:
            raise UserError(f"{where}: made by backbone {self.manifest.backbone}, but {backbone} is used here; {fix}")
        if adapter is not None and self.manifest.adapter != adapter:
            found, wanted = (f"adapter {name}" if name else "no adapter" for name in (self.manifest.adapter, adapter))
            raise UserError(f"{where}: made by {found}, but {wanted} is used here; {fix}")

    def verify(self) -> None:
        """Read every byte and compare checksums. Raises UserError naming the first file that does not match."""
        for record in (self.manifest.ids, *self.manifest.shards):
            file = self.path / record.file
            if file_checksum(file, 0 if file.name == IDS else CHECKSUM_BYTES) != record.sha256:
                raise UserError(
                    f"{file}: corrupt, its content does not match the checksum in {MANIFEST}; "
                    "delete this file and rerun the command that made the store"
                )

    def _read(self, rows: np.ndarray, stride: int, num_bytes: int, in_embeddings: bool) -> Tensor:
        """The first `num_bytes` of each row's record, [n, num_bytes] uint8."""
        rows = np.asarray(rows, np.int64)
        if len(rows) and not (0 <= rows.min() and rows.max() < len(self)):
            raise IndexError(f"{self.path}: rows {rows.min()} to {rows.max()} requested; it has {len(self)}")
        raw = np.empty((len(rows), num_bytes), np.uint8)
        if not num_bytes:
            return torch.from_numpy(raw)
        shards, positions = (part.tolist() for part in np.divmod(rows, self.manifest.items_per_shard))
        for start in range(0, len(rows), READ_AHEAD_ROWS):
            reads = []
            for i in range(start, min(start + READ_AHEAD_ROWS, len(rows))):
                section = self.manifest.shard_items(shards[i]) * self.manifest.record_bytes if in_embeddings else 0
                reads.append((self._reader(shards[i]), section + positions[i] * stride, raw[i].data))
            self._read_block(reads)
        return torch.from_numpy(raw)

    def _read_block(self, reads: list[tuple[PositionedReader, int, memoryview]]) -> None:
        """Read at an offset into each buffer; all are announced first, so that reads from disk overlap."""
        for reader, offset, buffer in reads:
            reader.will_need(offset, len(buffer))
        for reader, offset, buffer in reads:
            if reader.read_into(buffer, offset) != len(buffer):
                raise UserError(f"{self.path}: a shard was cut short while in use; rebuild the store")

    def _reader(self, shard: int) -> PositionedReader:
        reader = self._files.get(shard)
        if reader is None:  # of two threads that open it at once, one's stays
            reader = self._files.setdefault(shard, PositionedReader(self.path / shard_name(shard), random=True))
        return reader


class TokenStoreWriter:
    """Writes a store shard by shard; finished shards survive a kill, and a new writer continues with the missing ones.

    Every process of a run creates a writer with the same arguments and writes its own shards; when all are done, one
    of them calls finish(). Raises UserError if an id repeats, or if the directory holds anything else."""

    def __init__(
        self,
        path: str | Path,
        ids: Sequence[str],
        tokens_per_item: int,
        width: int,
        embedding_width: int,
        dtype: str,
        backbone_fingerprint: str,
        adapter_fingerprint: str = "",
        items_per_shard: int | None = None,
    ):
        self.path, self.ids = Path(path), list(ids)
        if dtype not in CODECS:
            raise UserError(f"{path}: dtype is {dtype!r}; expected one of {', '.join(CODECS)}")
        _refuse_duplicates(self.path, self.ids)
        lines = id_lines(self.ids)
        self.manifest = StoreManifest(
            backbone=backbone_fingerprint,
            adapter=adapter_fingerprint,
            count=len(self.ids),
            tokens_per_item=tokens_per_item,
            width=width,
            embedding_width=embedding_width,
            dtype=dtype,
            items_per_shard=items_per_shard or default_items_per_shard(len(self.ids)),
            ids=FileRecord(file=IDS, bytes=len(lines), sha256=hashlib.sha256(lines).hexdigest()),
        )
        self._begin(lines)

    def _begin(self, lines: bytes) -> None:
        """Create the directory, or check that it holds a part of this same store."""
        begun = [self.path / name for name in (MANIFEST, PLAN) if (self.path / name).exists()]
        if begun:
            there = replace(parse_manifest(begun[0]), shards=())
            if there != self.manifest:
                raise UserError(f"{begun[0]}: {difference(there, self.manifest)}; delete it or choose another path")
        elif self._holds_other_files():
            raise UserError(f"{self.path}: holds other files, no token store; choose another path")
        self.path.mkdir(parents=True, exist_ok=True)
        if not begun:
            write_atomically(self.path / PLAN, [manifest_text(self.manifest)])
        if not has_size(self.path / IDS, len(lines)):
            write_atomically(self.path / IDS, [lines])

    def _holds_other_files(self) -> bool:
        """Whether the path is a file, or a directory with files that no rank's writer creates before the shards."""
        if not self.path.exists():
            return False
        own = (PLAN, IDS)
        return not self.path.is_dir() or any(
            file.name not in own and ".tmp-" not in file.name for file in self.path.iterdir()
        )

    def missing_shards(self) -> list[int]:
        """Numbers of the shards that are absent or of the wrong length, ascending."""
        return [
            shard
            for shard in range(self.manifest.num_shards)
            if not has_size(self.path / shard_name(shard), self.manifest.shard_bytes(shard))
        ]

    def shard_ids(self, shard: int) -> list[str]:
        start = shard * self.manifest.items_per_shard
        return self.ids[start : start + self.manifest.items_per_shard]

    def write_shard(self, shard: int, tokens: Tensor, embeddings: Tensor) -> None:
        """Write one shard and flush it to disk: tokens [n, m, H] and embeddings [n, De], any device and dtype.

        Raises UserError naming the item if a value is not finite, or too large for the store's dtype."""
        manifest, ids = self.manifest, self.shard_ids(shard)
        expected = (len(ids), manifest.tokens_per_item, manifest.width), (len(ids), manifest.embedding_width)
        if (tuple(tokens.shape), tuple(embeddings.shape)) != expected:
            raise ValueError(f"shard {shard}: shapes {tokens.shape} and {embeddings.shape}; expected {expected}")
        embeddings = embeddings.detach().to("cpu", torch.float32).contiguous()
        encoded, finite = manifest.codec.encode(tokens.detach().cpu())
        finite &= embeddings.isfinite().all(-1)
        if not finite.all():
            bad = ids[int(finite.logical_not().nonzero()[0])]
            raise UserError(f"{bad}: its tokens are not finite in {manifest.dtype}; check the weights, or use bfloat16")
        parts = [part.numpy().data.cast("B") for part in (encoded, embeddings.view(torch.uint8)) if part.numel()]
        digest = hashlib.sha256()
        for part in parts:
            digest.update(part)
        write_atomically(self.path / shard_name(shard), [*parts, digest.digest()])

    def finish(self) -> None:
        """Write the manifest, which makes the store readable; called by one process, once every shard exists."""
        if missing := self.missing_shards():
            raise UserError(
                f"{self.path}: {len(missing)} of {self.manifest.num_shards} shards are missing, the first is "
                f"{shard_name(missing[0])}; run the same command again to write them"
            )
        shards = []
        for shard in range(self.manifest.num_shards):
            file = self.path / shard_name(shard)
            with file.open("rb") as stream:
                stream.seek(-CHECKSUM_BYTES, os.SEEK_END)
                checksum = stream.read().hex()
            shards.append(FileRecord(file=file.name, bytes=self.manifest.shard_bytes(shard), sha256=checksum))
        text = manifest_text(replace(self.manifest, shards=tuple(shards)))
        if not (self.path / MANIFEST).exists() or (self.path / MANIFEST).read_bytes() != text:
            write_atomically(self.path / MANIFEST, [text])
        for leftover in (self.path / PLAN, *self.path.glob("*.tmp-*")):
            leftover.unlink(missing_ok=True)


def _refuse_duplicates(path: Path, ids: list[str]) -> None:
    if not ids:
        raise UserError(f"{path}: no ids given; a token store holds at least one item")
    seen: set[str] = set()
    for item_id in ids:
        if item_id in seen:
            raise UserError(f"{path}: id {item_id!r} is given twice; ids must be unique, remove one")
        seen.add(item_id)
