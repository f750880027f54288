"""The token store's format, version 1: manifest and lengths of the files; codecs.py has the bytes of a token."""

from __future__ import annotations

import hashlib
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..config_io import from_dict, to_dict
from ..errors import UserError
from .codecs import CODECS, Codec, make_codec

FORMAT, VERSION = "edje-token-store", 1
MANIFEST, PLAN, IDS = "manifest.json", "unfinished.json", "ids.jsonl"
CHECKSUM_BYTES = 32
"""SHA-256 at the end of every shard, of all bytes before it."""


@dataclass(frozen=True, kw_only=True)
class FileRecord:
    """Name, length and checksum that one of the store's files must have."""

    file: str
    bytes: int
    sha256: str


@dataclass(frozen=True, kw_only=True)
class StoreManifest:
    """The content of manifest.json, and of unfinished.json while a store is written: the same, but for the shards."""

    format: str = FORMAT
    version: int = VERSION
    backbone: str
    """Fingerprint of the backbone that encoded the items."""
    adapter: str
    """Fingerprint of the adapter that compressed them; empty for patch tokens and captions."""
    count: int
    tokens_per_item: int
    width: int
    embedding_width: int
    dtype: str
    items_per_shard: int
    """Items in every shard except the last, which may have fewer."""
    ids: FileRecord
    shards: tuple[FileRecord, ...] = ()

    @property
    def codec(self) -> Codec:
        """Encodes and decodes the store's tokens."""
        return make_codec(self.dtype, self.width)

    @property
    def record_bytes(self) -> int:
        """Bytes of one item's tokens, e.g. 49,152."""
        return self.tokens_per_item * self.codec.token_bytes

    @property
    def num_shards(self) -> int:
        return math.ceil(self.count / self.items_per_shard)

    def shard_items(self, shard: int) -> int:
        return min(self.items_per_shard, self.count - shard * self.items_per_shard)

    def shard_bytes(self, shard: int) -> int:
        """Length of a shard's file."""
        return self.shard_items(shard) * (self.record_bytes + 4 * self.embedding_width) + CHECKSUM_BYTES


def shard_name(shard: int) -> str:
    return f"shard-{shard:05d}.bin"


def default_items_per_shard(count: int) -> int:
    """At most 512 shards, so that all of a store's files can stay open; at least 64 items in each."""
    return max(64, math.ceil(count / 512))


def read_manifest(path: Path) -> StoreManifest:
    """The manifest of a finished store. Raises UserError if there is none, or if it contradicts itself."""
    if not (path / MANIFEST).is_file():
        if (path / PLAN).is_file():
            raise UserError(f"{path}: an unfinished token store; run the same command again to continue it")
        raise UserError(
            f"{path}: no token store there ({MANIFEST} is missing); make one with scripts/precompute_tokens.py"
        )
    manifest = parse_manifest(path / MANIFEST)
    expected = [(shard_name(i), manifest.shard_bytes(i)) for i in range(manifest.num_shards)]
    if [(record.file, record.bytes) for record in manifest.shards] != expected or manifest.ids.file != IDS:
        raise UserError(
            f"{path / MANIFEST}: the files it lists do not fit its count, widths and dtype; it was changed or is "
            "corrupt; rebuild the store"
        )
    return manifest


def parse_manifest(file: Path) -> StoreManifest:
    """Read manifest.json or unfinished.json. Raises UserError: not JSON, not a store, a newer version, wrong keys."""
    try:
        data: Any = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{file}: cannot be read as JSON ({error}); corrupt or not a token store; rebuild it") from None
    if not isinstance(data, dict) or data.get("format") != FORMAT:
        raise UserError(
            f"{file}: not the manifest of a token store (its format is not {FORMAT!r}); choose another path"
        )
    version = data.get("version")
    if not isinstance(version, int) or not 1 <= version <= VERSION:
        raise UserError(
            f"{file}: format version {version}, this code reads up to {VERSION}; update the code or rebuild the store"
        )
    manifest = from_dict(StoreManifest, data, where=str(file))
    sizes = (manifest.tokens_per_item, manifest.width, manifest.embedding_width)
    if manifest.dtype not in CODECS or min(sizes) < 0 or min(manifest.count, manifest.items_per_shard) < 1:
        raise UserError(f"{file}: impossible dtype, width or count; it was changed or is corrupt; rebuild the store")
    return manifest


def manifest_text(manifest: StoreManifest) -> bytes:
    return (json.dumps(to_dict(manifest), indent=1) + "\n").encode()


def difference(there: StoreManifest, wanted: StoreManifest) -> str:
    """The first way in which two stores differ, for a message."""
    old, new = to_dict(there), to_dict(wanted)
    key = next(key for key in old if key != "shards" and old[key] != new[key])
    if key == "ids":
        return "holds a store of other ids"
    return f"holds a store with {key} {old[key]!r}, this one would have {new[key]!r}"


def id_lines(ids: list[str]) -> bytes:
    """ids.jsonl: one JSON string a line, so that captions with line breaks and odd file names come back exactly."""
    return "".join(json.dumps(item_id) + "\n" for item_id in ids).encode()


def read_ids(file: Path, manifest: StoreManifest) -> list[str]:
    """Raises UserError if the file is not what the manifest's checksum says."""
    lines = file.read_bytes()
    if hashlib.sha256(lines).hexdigest() != manifest.ids.sha256:
        raise UserError(f"{file}: corrupt, its content does not match the checksum in {MANIFEST}; rebuild the store")
    return json.loads(b"[" + b",".join(lines.splitlines()) + b"]")


def has_size(file: Path, size: int) -> bool:
    return file.is_file() and file.stat().st_size == size


def check_size(file: Path, size: int) -> None:
    """Raises UserError if the file is absent or not of the length that the manifest says."""
    if not file.is_file():
        raise UserError(
            f"{file}: missing, but {MANIFEST} lists it; rerun the command that made the store to rewrite it"
        )
    if (found := file.stat().st_size) != size:
        what = "truncated" if found < size else "not this store's file"
        raise UserError(
            f"{file}: has {found:,} bytes, {MANIFEST} says {size:,}: {what}; "
            "rerun the command that made the store to rewrite it"
        )


def file_checksum(file: Path, trailing_bytes: int) -> str:
    """SHA-256 of a file without its last `trailing_bytes`."""
    digest, left = hashlib.sha256(), file.stat().st_size - trailing_bytes
    with file.open("rb") as stream:
        while left and (part := stream.read(min(left, 1 << 20))):
            digest.update(part)
            left -= len(part)
    return digest.hexdigest()
