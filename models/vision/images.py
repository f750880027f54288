"""Open an image as a person sees it: RGB, upright, transparency over white; anything unreadable is one clear error.

An image may be a path, a PIL image, encoded bytes or a file object with them, or decoded pixels: a NumPy array as
Pillow, OpenCV or a video reader gives it (but RGB), a tensor as torchvision gives it.
"""

from __future__ import annotations

import io
import re
import stat
import warnings
from pathlib import Path
from typing import BinaryIO, TypeAlias

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from ..errors import UserError, one_line

ImageSource: TypeAlias = str | Path | bytes | BinaryIO | Image.Image | np.ndarray | Tensor
"""A path; an encoded file as bytes or file object; a PIL image; uint8 pixels [H, W, 3] or [H, W] as an array; pixels
[3, H, W] or [1, H, W] as a tensor, uint8 or floats from 0 to 1."""
_URL = re.compile(r"[a-z][a-z0-9+.-]+://", re.IGNORECASE)


class ImageError(UserError):
    """An image that cannot be read: missing, not an image, cut short, or beyond PIL's size limit."""


def may_be_image(path: str | Path) -> bool:
    """Whether a file is there that has any bytes: a look at the folder, not into the file."""
    try:
        found = Path(path).stat()
    except (OSError, ValueError):  # absent, or a name that no file can have: too long, or with a null character
        return False
    return stat.S_ISREG(found.st_mode) and found.st_size > 0


def is_url(name: str) -> bool:
    """Whether a text names something on a network and not a file."""
    return _URL.match(name) is not None


def open_image(source: ImageSource) -> Image.Image:
    """Read an image completely and return it in mode RGB.

    The EXIF rotation is applied, transparent pixels show white, 16-bit greys are scaled to 8 bits. A PIL image is
    converted the same way, an array or tensor is taken as pixels of sRGB; a stream of bytes goes by its `name` in
    errors. Raises ImageError naming the file, or what was given instead of an image; an image over PIL's size limit is
    refused, not resized.
    """
    if isinstance(source, np.ndarray | Tensor):
        return _to_rgb(Image.fromarray(_pixels(source)))
    name = _name(source)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            if isinstance(source, Image.Image):
                return _to_rgb(ImageOps.exif_transpose(source))
            with Image.open(io.BytesIO(source) if isinstance(source, bytes) else source) as image:
                image.load()  # a truncated file fails here, not later in a worker
                ImageOps.exif_transpose(image, in_place=True)  # without a copy: it is nobody else's image
                return _to_rgb(image)
    except FileNotFoundError:
        raise ImageError(f"{name}: {_why_absent(name)}") from None
    except IsADirectoryError:
        raise ImageError(f"{name}: a folder, not an image; pass the files in it") from None
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise ImageError(f"{name}: image is over the size limit ({one_line(error)}); shrink it before use") from None
    except UnidentifiedImageError:
        raise ImageError(f"{name}: not an image that Pillow can read; replace or remove it") from None
    except (OSError, SyntaxError, ValueError, EOFError) as error:
        raise ImageError(f"{name}: image cannot be decoded ({one_line(error)}); replace or remove it") from None


def _name(source: object) -> str:
    """What errors call a source that is no array. Raises ImageError for what cannot be an image at all."""
    if isinstance(source, str | Path):
        return str(source)
    if isinstance(source, bytes):
        return f"image of {len(source)} bytes"
    if isinstance(source, Image.Image) or hasattr(source, "read"):
        return str(getattr(source, "name", "image"))
    raise ImageError(
        f"an image is a {type(source).__name__}; expected a path, a PIL image, bytes, a file object, a NumPy array "
        "[H, W, 3] or a tensor [3, H, W]"
    )


def _why_absent(name: str) -> str:
    if is_url(name):
        return "a URL, and images are read from disk; download it, then pass its path or its bytes"
    return "no such image file; check the data root and the file name"


def _pixels(source: np.ndarray | Tensor) -> np.ndarray:
    """Decoded pixels as uint8 [H, W, 3] or [H, W]. Raises ImageError for any other shape, dtype or range."""
    if isinstance(source, Tensor):
        return _pixels_of_tensor(source)
    if source.dtype != np.uint8:
        raise ImageError(f"an image array has dtype {source.dtype}; expected uint8, values from 0 to 255")
    if 0 in source.shape or not (source.ndim == 2 or (source.ndim == 3 and source.shape[2] == 3)):
        raise ImageError(f"an image array has shape {list(source.shape)}; expected [H, W, 3] (RGB) or [H, W] (grey)")
    return np.ascontiguousarray(source)


def _pixels_of_tensor(source: Tensor) -> np.ndarray:
    if source.ndim != 3 or source.shape[0] not in (1, 3) or not source.numel():
        raise ImageError(
            f"an image tensor has shape {list(source.shape)}; expected [3, H, W] (RGB) or [1, H, W] (grey)"
        )
    pixels = source.detach().cpu()
    if pixels.is_floating_point():
        low, high = pixels.min().item(), pixels.max().item()
        if not (0 <= low and high <= 1):  # NaN is neither
            raise ImageError(
                f"an image tensor of {pixels.dtype} has values from {low:g} to {high:g}; expected 0 to 1, "
                "or uint8: not yet normalised"
            )
        pixels = (pixels.float() * 255).round().to(torch.uint8)
    if pixels.dtype != torch.uint8:
        raise ImageError(f"an image tensor has dtype {pixels.dtype}; expected uint8, or floats from 0 to 1")
    return pixels.squeeze(0).numpy() if len(pixels) == 1 else pixels.permute(1, 2, 0).contiguous().numpy()


def _to_rgb(image: Image.Image) -> Image.Image:
    """Any upright image in mode RGB."""
    if image.mode.startswith("I"):  # 16-bit greys; Pillow's own conversion clips at 255
        image = image.convert("I").point(lambda value: value * (1 / 257)).convert("L")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image)
    return image if image.mode == "RGB" else image.convert("RGB")  # convert() copies even what is RGB
