"""Small WebDataset shards as img2dataset writes them, for tests."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path

import numpy as np
from PIL import Image


def jpeg(seed: int, side: int = 32) -> bytes:
    """A JPEG of random blocks."""
    blocks = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(blocks).resize((side, side), Image.Resampling.NEAREST).save(buffer, "JPEG")
    return buffer.getvalue()


def sample(number: int, caption: str | None = None) -> list[tuple[str, bytes]]:
    """The three members of a sample."""
    caption = caption or f"a thing, number {number}"
    return [
        (f"{number:09d}.jpg", jpeg(number)),
        (f"{number:09d}.txt", caption.encode()),
        (f"{number:09d}.json", json.dumps({"caption": caption, "key": f"{number:09d}"}).encode()),
    ]


def write_tar(file: Path, members: list[tuple[str, bytes]]) -> Path:
    """A tar of these members, in this order."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(file, "w") as tar:
        for name, content in members:
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return file


def write_shards(root: Path, counts: list[int]) -> list[Path]:
    """Shards 00000.tar, 00001.tar, ... of so many samples each."""
    firsts = np.cumsum([0, *counts])
    return [
        write_tar(root / f"{shard:05d}.tar", [m for i in range(count) for m in sample(int(firsts[shard]) + i)])
        for shard, count in enumerate(counts)
    ]
