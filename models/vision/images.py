"""Open an image as a person sees it: RGB, upright, transparency over white; anything unreadable is one clear error."""

from __future__ import annotations

import stat
import warnings
from pathlib import Path
from typing import BinaryIO

from PIL import Image, ImageOps, UnidentifiedImageError

from ..errors import UserError, one_line


class ImageError(UserError):
    """An image that cannot be read: missing, not an image, cut short, or beyond PIL's size limit."""


def may_be_image(path: str | Path) -> bool:
    """Whether a file is there that has any bytes: a look at the folder, not into the file."""
    try:
        found = Path(path).stat()
    except (OSError, ValueError):  # absent, or a name that no file can have: too long, or with a null character
        return False
    return stat.S_ISREG(found.st_mode) and found.st_size > 0


def open_image(source: str | Path | BinaryIO | Image.Image) -> Image.Image:
    """Read an image completely and return it in mode RGB.

    The EXIF rotation is applied, transparent pixels show white, 16-bit greys are scaled to 8 bits. A PIL image is
    converted the same way; a stream of bytes goes by its `name` in errors. Raises ImageError naming the file; an image
    over PIL's size limit is refused, not resized.
    """
    name = str(source) if isinstance(source, str | Path) else getattr(source, "name", "image")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            if isinstance(source, Image.Image):
                return _to_rgb(ImageOps.exif_transpose(source))
            with Image.open(source) as image:
                image.load()  # a truncated file fails here, not later in a worker
                ImageOps.exif_transpose(image, in_place=True)  # without a copy: it is nobody else's image
                return _to_rgb(image)
    except FileNotFoundError:
        raise ImageError(f"{name}: no such image file; check the data root and the file name") from None
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise ImageError(f"{name}: image is over the size limit ({one_line(error)}); shrink it before use") from None
    except UnidentifiedImageError:
        raise ImageError(f"{name}: not an image that Pillow can read; replace or remove it") from None
    except (OSError, SyntaxError, ValueError, EOFError) as error:
        raise ImageError(f"{name}: image cannot be decoded ({one_line(error)}); replace or remove it") from None


def _to_rgb(image: Image.Image) -> Image.Image:
    """Any upright image in mode RGB."""
    if image.mode.startswith("I"):  # 16-bit greys; Pillow's own conversion clips at 255
        image = image.convert("I").point(lambda value: value * (1 / 257)).convert("L")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image)
    return image if image.mode == "RGB" else image.convert("RGB")  # convert() copies even what is RGB
