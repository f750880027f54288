"""How a token lies in a store's bytes: one codec per dtype that a store can have.

    codec = make_codec("int8", width=384)
    codec.token_bytes                     # 386: 384 values and a float16 scale
    stored, finite = codec.encode(tokens)       # [n, m, 384] -> [n, m, 386] uint8, [n] bool
    codec.decode(stored)                  # [n, m, 384] float16

A new dtype is a class here and its line in CODECS. Letters: n items, m tokens per item, H token width.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor


@dataclass(frozen=True)
class Codec(ABC):
    """Tokens of one width to bytes and back. Each token is encoded by itself, so that prefixes can be read."""

    width: int
    """H, e.g. 384."""

    @property
    @abstractmethod
    def token_bytes(self) -> int:
        """Bytes of one token."""

    @property
    def torch_dtype(self) -> torch.dtype | None:
        """The dtype whose values are stored as they are; None where encoding needs the tokens as they were computed."""
        return None

    @abstractmethod
    def encode(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Tokens [n, m, H] on the CPU -> bytes [n, m, token_bytes] uint8, and whether each item survives, [n] bool.

        An item does not survive if a value is not finite or lies beyond what the codec can hold."""

    @abstractmethod
    def decode(self, stored: Tensor) -> Tensor:
        """Bytes [n, m, token_bytes] uint8 -> tokens [n, m, H]."""


@dataclass(frozen=True)
class FloatCodec(Codec):
    """Values in a floating-point dtype; decoding is a view of the same memory."""

    dtype: torch.dtype

    @property
    def token_bytes(self) -> int:
        return self.width * self.dtype.itemsize

    @property
    def torch_dtype(self) -> torch.dtype:
        return self.dtype

    def encode(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        encoded = tokens.to(self.dtype).contiguous()
        return encoded.view(torch.uint8), encoded.isfinite().all(-1).all(-1)

    def decode(self, stored: Tensor) -> Tensor:
        return stored.view(self.dtype) if self.width else stored.to(self.dtype)


@dataclass(frozen=True)
class Int8Codec(Codec):
    """int8 values with one float16 scale per token behind them; decoded to float16.

    With step = max(largest magnitude of the token / 127, 2^-14), a value comes back within 0.57 steps."""

    @property
    def token_bytes(self) -> int:
        return self.width + torch.float16.itemsize

    def encode(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        tokens = tokens.float()
        largest = tokens.abs().amax(-1, keepdim=True) if self.width else tokens.new_zeros(*tokens.shape[:2], 1)
        scales = (largest / 127).half()
        # A token too small for any float16 scale has scale 0 and comes back as zeros; 0/0 as int8 is undefined.
        values = (tokens / scales.float()).nan_to_num().round().clamp(-127, 127).to(torch.int8)
        encoded = torch.cat([values.view(torch.uint8), scales.view(torch.uint8)], dim=-1)
        return encoded, scales.isfinite().all(-1).all(-1)

    def decode(self, stored: Tensor) -> Tensor:
        values, scales = stored.split([self.width, torch.float16.itemsize], dim=-1)
        return values.view(torch.int8).half() * scales.contiguous().view(torch.float16)


CODECS: dict[str, Callable[[int], Codec]] = {
    "float16": partial(FloatCodec, dtype=torch.float16),
    "bfloat16": partial(FloatCodec, dtype=torch.bfloat16),
    "int8": Int8Codec,
}
"""A store's dtype, as its manifest and `--dtype` name it -> the codec for tokens of a width."""


def make_codec(dtype: str, width: int) -> Codec:
    """The codec of a dtype in CODECS for tokens of `width` values."""
    return CODECS[dtype](width)
