"""The joint encoder's form for inference: weights in one dtype, prepared for the device, in calls of a suitable size.

Letters: T packed rows, H width, R wanted rows, Q sequences.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..language.captions import CaptionIds
from .attention import has_kernel
from .cuda_graphs import MOST_ROWS, RecordedPasses
from .encoder_pass import EncoderPass, EncoderWeights, LayerWeights
from .linear import Linear, Norm, fuse, has_triton
from .mixture import Sequences, pack_mixture
from .packing import PackedInput


def _float32_copy(tensor: Tensor) -> Tensor:
    return tensor.detach().float().clone()


GPU_ROWS = 400_000
"""On a GPU: rows a call; MiniLM's widest activations then have 1.2 GB in bfloat16. On an H200 calls of 256 pairs,
23,000 rows, reached two thirds of the pairs a second."""
_MEAN_CAPTION = 24
"""Rows of a pair that are not vision tokens, about."""


def pairs_at_once(device: torch.device, num_tokens: int) -> int:
    """Pairs of `num_tokens` vision tokens that suit one call; on a CPU the encoder cuts a call smaller by itself."""
    return 128 if device.type == "cpu" else max(1, GPU_ROWS // (num_tokens + _MEAN_CAPTION))


ROWS_AT_ONCE = 2048
"""On a CPU: rows that pass through all layers together, about 24 pairs. With 64 pairs at once the activations outgrow
what the allocator keeps and are mapped afresh at every step."""
BFLOAT16_BOUND = 0.1
"""A logit in bfloat16 lies within this many standard deviations of a batch's logits from its float32 value. MiniLM-L6's
own weights: 0.01 in the mean, 0.04 at most."""


class OptimizedEncoder(EncoderPass):
    """The inference form: weights detached and in one dtype, linear maps fused with what follows, no dropout.

    Tables and the first norm stay float32: they cost little, and packing takes tokens of any dtype. A snapshot, on
    the device of the encoder it was made from: it does not see later changes."""

    training = False

    def __init__(self, encoder: EncoderPass, dtype: torch.dtype):
        self.config, self.special, self._dtype = encoder.config, encoder.special, dtype
        with torch.no_grad():
            weights = encoder.weights()
            self._weights = EncoderWeights(
                words=_float32_copy(weights.words),
                positions=_float32_copy(weights.positions),
                segments=_float32_copy(weights.segments),
                norm=Norm(_float32_copy(weights.norm.weight), _float32_copy(weights.norm.bias)),
                layers=tuple(self._prepare(layer) for layer in weights.layers),
            )
        self._recorded = self._make_recorded()

    def _make_recorded(self) -> RecordedPasses | None:
        recordable = self._dtype == torch.bfloat16 and has_kernel(self.word_table.device)
        return RecordedPasses(self._record_cls, self.config.num_heads) if recordable else None

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_recorded": None}  # launches of this process

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__ |= state
        self._recorded = self._make_recorded()

    def _prepare(self, layer: LayerWeights) -> LayerWeights:
        def linear(part: Linear) -> Linear:
            return fuse(Linear(copy(part.weight), copy(part.bias)))

        def norm(part: Norm) -> Norm:
            return Norm(copy(part.weight), copy(part.bias))

        def copy(tensor: Tensor) -> Tensor:
            return tensor.detach().to(self._dtype, copy=True)

        return LayerWeights(
            query=linear(layer.query),
            key_value=linear(layer.key_value),
            attention_output=linear(layer.attention_output),
            attention_norm=norm(layer.attention_norm),
            intermediate=linear(layer.intermediate),
            output=linear(layer.output),
            output_norm=norm(layer.output_norm),
        )

    def weights(self) -> EncoderWeights:
        return self._weights

    @property
    def word_table(self) -> Tensor:
        return self._weights.words

    @property
    def dtype(self) -> torch.dtype:
        return self._dtype

    def pack_pairs(
        self, captions: CaptionIds, tokens: Tensor, caption_index: Tensor, image_index: Tensor
    ) -> PackedInput:
        """As EncoderPass.pack_pairs, without caption_rows for few pairs on a GPU.

        These are laid out on the CPU and sent in one copy: on the GPU the layout is some 60 launches, which keep the
        host busy for nearly as long as the GPU is with 64 pairs."""
        few = len(caption_index) * (tokens.shape[1] + _MEAN_CAPTION) <= MOST_ROWS
        if tokens.device.type == "cpu" or not few:
            return super().pack_pairs(captions, tokens, caption_index, image_index)
        pairs = Sequences(captions.to("cpu"), caption_index.cpu(), image_index.cpu())
        return pack_mixture(self.word_table, self.special, tokens, [pairs]).packed

    @torch.no_grad()  # not inference_mode: a teacher's logits enter a loss
    def encode(self, packed: PackedInput, rows: Tensor | None = None) -> Tensor:
        """As EncoderPass.encode; on a CPU by parts of ROWS_AT_ONCE rows."""
        if packed.embeddings.device.type != "cpu" or len(packed.embeddings) <= ROWS_AT_ONCE:
            return super().encode(packed, rows)
        hidden = torch.cat([super(OptimizedEncoder, self).encode(part) for part in packed.parts(ROWS_AT_ONCE)])
        return hidden if rows is None else hidden[rows]

    @torch.no_grad()
    def encode_cls(self, packed: PackedInput) -> Tensor:
        """As EncoderPass.encode_cls; on a CPU by parts of ROWS_AT_ONCE rows, on a GPU small inputs by recorded
        launches."""
        if packed.embeddings.device.type != "cpu":
            if self._recorded is not None and self._recorded.suit(packed):
                self._check_fits_positions(packed, self._weights.positions)
                return self._recorded(packed)
            return super().encode_cls(packed)
        if len(packed.embeddings) <= ROWS_AT_ONCE:
            return super().encode_cls(packed)
        parts = packed.parts(ROWS_AT_ONCE)
        hidden = torch.cat([super(OptimizedEncoder, self).encode_cls(part) for part in parts])
        return hidden[packed.cls_rows.argsort().argsort()]

    def _embed(self, packed: PackedInput, weights: EncoderWeights) -> Tensor:
        if self._dtype != torch.bfloat16 or not has_triton(packed.embeddings.device):
            return super()._embed(packed, weights)
        from . import kernels

        return kernels.embed(
            packed.embeddings,
            packed.positions,
            packed.segments,
            weights.positions,
            weights.segments,
            *weights.norm,
            self.config.layer_norm_eps,
            self._dtype,
        )

    def _record_cls(self, packed: PackedInput, attention: Callable[..., Tensor]) -> Tensor:
        return self._encode_cls(packed, attention, self._weights)
