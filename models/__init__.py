"""EDJE, the inference library: everything that scoring images with text needs, and nothing else.

In a checkout this package is `models`; installed by pip it is `edje`:

    from edje import Reranker

The public names load on first use, so that reading a configuration does not import the backbone's libraries.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .edje import EDJE
    from .errors import UserError
    from .reranker import Reranker
    from .stores.token_store import TokenStore
    from .vision.backbones import Backbone

__all__ = ["EDJE", "Backbone", "Reranker", "TokenStore", "UserError"]
__version__ = "0.1.0"

_MODULES = {
    "EDJE": "edje",
    "Backbone": "vision.backbones",
    "Reranker": "reranker",
    "TokenStore": "stores.token_store",
    "UserError": "errors",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_MODULES[name]}", __name__), name)
