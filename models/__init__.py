"""EDJE, the inference library: everything that scoring images with text needs, and nothing else.

In a checkout this package is `models`; installed by pip it is `edje`:

    from edje import Reranker

The public names load on first use, so that reading a configuration does not import the backbone's libraries.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .backbone import Backbone
    from .edje import EDJE
    from .reranker import Reranker
    from .token_store import TokenStore

__all__ = ["EDJE", "Backbone", "Reranker", "TokenStore"]

_MODULES = {"EDJE": "edje", "Backbone": "backbone", "Reranker": "reranker", "TokenStore": "token_store"}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_MODULES[name]}", __name__), name)
