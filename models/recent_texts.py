"""Text embeddings of the latest queries, so that a query that comes again does not run the text tower again."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from threading import Lock
from typing import Any

import torch
from torch import Tensor

from .vision.backbones import Backbone

MOST_TEXTS = 1024
"""Kept, the latest used: 4 MB at an embedding width of 1024."""


class RecentTexts:
    """encode_texts() of a backbone with a memory. May be called from several threads; pickled without its memory."""

    def __init__(self, backbone: Backbone, most: int = MOST_TEXTS):
        self._backbone, self._most = backbone, most
        self._known: OrderedDict[str, Tensor] = OrderedDict()
        self._lock = Lock()

    def __call__(self, captions: Sequence[str]) -> Tensor:
        """C distinct captions -> [C, De] float32, L2-normalised, on the backbone's device."""
        with self._lock:
            known = {caption: self._known[caption] for caption in captions if caption in self._known}
        new = [caption for caption in captions if caption not in known]
        known |= zip(new, self._backbone.encode_texts(new), strict=True)
        with self._lock:
            for caption in captions:
                self._known[caption] = known[caption]
                self._known.move_to_end(caption)
            while len(self._known) > self._most:
                self._known.popitem(last=False)
        return torch.stack([known[caption] for caption in captions])

    def __getstate__(self) -> dict[str, Any]:
        return {"backbone": self._backbone, "most": self._most}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(**state)  # type: ignore[misc]
