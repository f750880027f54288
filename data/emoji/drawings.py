"""Emoji as artists drew them: SVG out of a package, JPEG out of SVG."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

from models.errors import UserError
from models.vision.images import open_image

from .concepts import concept_key
from .packages import read_documents

SIDE = 128
"""Pixels of an image's longer side; three drawings are not square."""
_QUALITY = 90


def read_drawings(archive: Path) -> dict[str, str]:
    """One artist's emoji, from an `@iconify-json` package: concept key -> SVG. Raises UserError if it is damaged."""
    drawn, characters = read_documents(archive, "icons.json", "chars.json")
    return {concept_key(hexcode): _svg(drawn["icons"][name], drawn) for hexcode, name in characters.items()}


def _svg(icon: dict[str, Any], drawn: dict[str, Any]) -> str:
    """A document of the icon's own size where it has one, else of the set's."""
    width, height = (icon.get(side, drawn[side]) for side in ("width", "height"))
    return f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}">{icon["body"]}</svg>'


def render_jpeg(svg: str) -> bytes:
    """A picture over white, its longer side of 128 pixels. Raises UserError if resvg-py is absent or too old."""
    try:
        from resvg_py import svg_to_bytes
    except ImportError:
        raise UserError(
            "drawing emoji needs resvg-py, which is not installed; pip install -r requirements-emoji.txt"
        ) from None
    # No fonts: drawings are made of paths, and a text would look different on each machine.
    png = svg_to_bytes(svg_string=svg, width=SIDE, height=SIDE, skip_system_fonts=True)
    # Pillow puts it over white, not resvg: the two round differently, which JPEG makes visible.
    drawing = open_image(png)
    if max(drawing.size) != SIDE:  # old versions take no notice of the width
        raise UserError(
            f"resvg-py drew {drawing.width} x {drawing.height} pixels instead of {SIDE} on the longer side; "
            "pip install -r requirements-emoji.txt"
        )
    jpeg = io.BytesIO()
    drawing.save(jpeg, "JPEG", quality=_QUALITY)
    return jpeg.getvalue()
