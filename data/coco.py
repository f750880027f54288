"""COCO's pictures by the names of 2014 in the folders of 2017: the same files, divided another way.

Karpathy's and BLIP's annotations say val2014/COCO_val2014_000000391895.jpg; who has the archives of 2017 has this
picture as train2017/000000391895.jpg or val2017/000000391895.jpg.
"""

from __future__ import annotations

import re
from pathlib import Path

FOLDERS = ("train2017", "val2017")
_NAME_OF_2014 = re.compile(r"COCO_(?:train|val)2014_(\d{12}\.jpg)")


def coco_file(path: Path) -> Path:
    """`path` itself, or the same picture in a folder of 2017 beside its own where only that is there."""
    name = _NAME_OF_2014.fullmatch(path.name)
    if name is None or path.exists():
        return path
    candidates = (above / folder / name[1] for above in (path.parent.parent, path.parent) for folder in FOLDERS)
    return next((candidate for candidate in candidates if candidate.exists()), path)
