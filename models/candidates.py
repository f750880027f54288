"""What a caller gives to be scored: queries, candidates, pairs and first-stage figures, checked before any work begins.

Every mistake is one UserError that says what was given and what was expected. Letters: n pairs, Q queries, De embedding
width.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from .errors import UserError
from .vision.images import ImageSource

Item = TypeVar("Item")
Pair = tuple[str, ImageSource]
Numbers = Sequence[float] | np.ndarray | Tensor


def as_images(documents: Iterable[ImageSource], what: str = "documents") -> list[ImageSource]:
    """The candidates of a query as a list; a generator is used up.

    Raises UserError where one image, or something that is no collection at all, stands in place of the list."""
    pixels = isinstance(documents, np.ndarray | Tensor) and documents.ndim < 4
    if pixels or isinstance(documents, str | Path | bytes | Image.Image) or hasattr(documents, "read"):
        raise UserError(f"{what} is one image ({_show(documents)}); pass a list of images, even of one")
    if not isinstance(documents, Iterable):
        raise UserError(f"{what} is a {type(documents).__name__}; expected a list of images or of ids of a store")
    return list(documents)


def as_paths(paths: Iterable[str | Path]) -> list[str | Path]:
    """Paths of images to index, as a list. Raises UserError naming what is there instead."""
    if not isinstance(paths, Iterable):
        raise UserError(f"what to index is a {type(paths).__name__}; expected a folder or a list of paths")
    paths = list(paths)
    for number, path in enumerate(paths):
        if not isinstance(path, str | Path):
            raise UserError(f"item {number} to index is a {type(path).__name__}; expected a path: a store needs names")
    return paths


def as_captions(captions: Iterable[str], what: str = "captions") -> list[str]:
    """A list of captions, each of them some text. Raises UserError naming what is there instead."""
    if isinstance(captions, str):
        raise UserError(f"{what} is one text ({_show(captions)}); pass a list of texts, even of one")
    if not isinstance(captions, Iterable):
        raise UserError(f"{what} is a {type(captions).__name__}; expected a list of texts")
    captions = list(captions)
    for number, caption in enumerate(captions):
        check_caption(caption, f"{what}[{number}]")
    return captions


def as_queries(query: str | Iterable[str]) -> tuple[list[str], bool]:
    """The queries as a list, and whether one text was given instead of a list. Raises UserError as as_captions()."""
    if isinstance(query, str):
        check_caption(query, "the query")
        return [query], True
    return as_captions(query, "query"), False


def check_caption(caption: object, what: str) -> None:
    """Raises UserError unless it is a text that says something."""
    if not isinstance(caption, str):
        raise UserError(f"{what} is a {type(caption).__name__}; expected text")
    if not caption.strip():
        raise UserError(f"{what} is empty; give a text that says what to look for")


def as_pairs(pairs: Iterable[Pair]) -> tuple[list[Pair], bool]:
    """(caption, image) pairs as a list, and whether a single pair was given instead of a list of them.

    Raises UserError naming the first that is no pair, or whose parts are swapped."""
    if isinstance(pairs, str | bytes | Path | Image.Image) or not isinstance(pairs, Iterable):
        raise UserError(f"pairs is a {type(pairs).__name__}; expected a list of (caption, image) pairs")
    pairs = list(pairs)
    single = len(pairs) == 2 and isinstance(pairs[0], str)
    checked = [_pair(pair, number) for number, pair in enumerate([tuple(pairs)] if single else pairs)]
    return checked, single


def _pair(pair: Any, number: int) -> Pair:
    if not isinstance(pair, tuple | list) or len(pair) != 2:
        given = f"{len(pair)} parts" if isinstance(pair, tuple | list) else f"a {type(pair).__name__}"
        raise UserError(f"pairs[{number}] is {given}; expected (caption, image)")
    caption, image = pair
    if not isinstance(caption, str) and isinstance(image, str):
        raise UserError(
            f"pairs[{number}] is ({_show(caption)}, {_show(image)}); the caption goes first, then the image"
        )
    check_caption(caption, f"the caption of pairs[{number}]")
    return caption, image


def documents_of_queries(queries: Sequence[str], documents: Iterable[Any]) -> list[list[ImageSource]]:
    """The candidates of each query: one list for all of them, or a list of lists, one for each.

    Raises UserError where there are not as many lists as queries."""
    listed: list[Any] = as_images(documents)
    own = [isinstance(document, list | tuple) for document in listed]
    if not any(own):
        return [listed] * len(queries)
    if not all(own) or len(listed) != len(queries):
        raise UserError(
            f"documents holds {sum(own)} lists among {len(listed)} items for {len(queries)} queries; "
            "pass one list of images for all queries, or one list for each"
        )
    return [as_images(images, f"documents[{number}]") for number, images in enumerate(listed)]


def cosines_of_queries(similarities: Iterable[Numbers], counts: Sequence[int]) -> Tensor:
    """First-stage cosines of the candidates of Q queries, one list for each of `counts` many, joined: [n] float32.

    Raises UserError where a query's are not as many as its candidates, or where they cannot be cosines."""
    lists = list(similarities) if isinstance(similarities, Iterable) else []
    if len(lists) != len(counts):
        raise UserError(f"similarities holds {len(lists)} lists for {len(counts)} queries; pass one list for each")
    return torch.cat([torch.empty(0), *map(as_cosines, lists, counts)])


def as_cosines(similarities: Numbers, count: int) -> Tensor:
    """First-stage cosines of `count` pairs, [n] float32 on the CPU.

    Raises UserError where the number differs, or where they cannot be cosines."""
    cosines = _as_floats(similarities, "similarities")
    if cosines.shape != (count,):
        raise UserError(f"similarities have shape {list(cosines.shape)}; expected one cosine a pair, [{count}]")
    if not (cosines.abs() <= 1.01).all():  # a little beyond 1 is rounding; NaN is neither
        raise UserError("similarities are not cosines, which lie from -1 to 1; pass the cosine of both embeddings")
    return cosines


def as_text_embeddings(embeddings: Numbers, count: int, width: int) -> Tensor:
    """Text embeddings of `count` queries, [Q, De] float32 on the CPU; one query's may be [De].

    Raises UserError where the shape is another, or where they are not L2-normalised."""
    texts = _as_floats(embeddings, "text_embedding")
    texts = texts[None] if texts.ndim == 1 else texts
    if texts.shape != (count, width):
        raise UserError(
            f"text_embedding has shape {list(texts.shape)}; this backbone's embeddings of {count} queries are "
            f"[{count}, {width}]"
        )
    if not ((texts.norm(dim=-1) - 1).abs() < 0.01).all():
        raise UserError("text_embedding is not L2-normalised; pass what backbone.encode_texts() gives")
    return texts


def _as_floats(numbers: Numbers, what: str) -> Tensor:
    """Float32 on the CPU, of whatever holds numbers. Raises UserError for what does not."""
    if isinstance(numbers, Iterable) and not isinstance(numbers, np.ndarray | Tensor):
        numbers = list(numbers)
    try:
        return torch.as_tensor(numbers, dtype=torch.float32).detach().cpu()
    except (TypeError, ValueError, RuntimeError):  # text, nothing, lists of unequal lengths
        raise UserError(f"{what} is no list, array or tensor of numbers; pass one") from None


def identity(image: ImageSource) -> Hashable:
    """Equal for images that are the same: the path, the bytes, or else the very object (== compares pixels)."""
    return image if isinstance(image, str | Path | bytes) else id(image)


def distinct(items: Sequence[Item], key: Callable[[Item], Hashable]) -> tuple[list[Item], Tensor]:
    """Each item once, and for every given one its number among them, [n] int64."""
    numbers: dict[Hashable, int] = {}
    index = [numbers.setdefault(key(item), len(numbers)) for item in items]
    items_by_number = dict(zip(index, items, strict=True))
    return [items_by_number[number] for number in range(len(numbers))], torch.tensor(index, dtype=torch.int64)


def _show(value: object) -> str:
    """A value for an error: short texts and paths as they are, else the type."""
    if isinstance(value, str | Path):
        text = repr(str(value))
        return text if len(text) <= 60 else f"{text[:57]}..."
    return type(value).__name__
