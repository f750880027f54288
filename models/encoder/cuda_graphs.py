"""Small calls on a GPU: the encoder's launches are recorded once as a CUDA graph and replayed.

A call of 64 pairs is some 200 kernels of a few microseconds each, which Python cannot launch as fast as the GPU runs
them. A graph has fixed shapes, so a call is filled up to a size of which there are few: rows behind the last sequence
belong to none, and sequences behind the last have no rows.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from .attention import VariableLengthKernel
from .packing import Group, PackedInput

MOST_ROWS = 24_576
"""256 pairs of 64 vision tokens. Larger calls keep the GPU busy by themselves, and only the filling would be felt: on
an H200 64 pairs of the local model (38,000 rows) took 9.0 ms recorded and 8.7 launched."""
MOST_RECORDED = 32
"""Recorded sizes that are kept, the latest used: each holds its activations."""

Encode = Callable[[PackedInput, VariableLengthKernel], Tensor]
"""[CLS] states [Q, H] of a packed input, with the given attention."""


class Size(NamedTuple):
    """Rows, sequences and longest sequence that a recorded pass has room for."""

    rows: int
    sequences: int
    longest: int

    @classmethod
    def around(cls, packed: PackedInput) -> Size:
        """The least recorded size that holds `packed`: an eighth of its rows too large at most."""
        rows = len(packed.positions)
        return cls(
            rows=_rounded(rows, max(16, 1 << (rows.bit_length() - 4))),
            sequences=1 << (len(packed.cls_rows) - 1).bit_length(),
            longest=_rounded(packed.groups[-1].length, 64),
        )


@dataclass(frozen=True)
class _Buffers:
    """Where every recorded pass reads its input: [rows, H], [rows], [rows], and [sequences + 1] rows of [CLS]."""

    embeddings: Tensor
    positions: Tensor
    segments: Tensor
    cls_rows: Tensor

    def fill(self, packed: PackedInput, size: Size) -> None:
        rows, sequences = len(packed.positions), len(packed.cls_rows)
        self.embeddings[:rows].copy_(packed.embeddings)
        self.positions[:rows].copy_(packed.positions)
        self.segments[:rows].copy_(packed.segments)
        self.cls_rows[:sequences].copy_(packed.cls_rows)
        self.cls_rows[sequences : size.sequences + 1].fill_(rows)

    def view(self, size: Size) -> tuple[PackedInput, Tensor]:
        """The first of them as an input of this size, and where its sequences begin and end, [sequences + 1]."""
        cls_rows = self.cls_rows[: size.sequences + 1]
        packed = PackedInput(
            embeddings=self.embeddings[: size.rows],
            positions=self.positions[: size.rows],
            segments=self.segments[: size.rows],
            groups=(Group(0, 1, size.longest),),  # the longest alone counts
            cls_rows=cls_rows[:-1].clamp(max=size.rows - 1),
            caption_rows=cls_rows[:0],
        )
        return packed, cls_rows.sort().values.int()


class RecordedPasses:
    """The [CLS] states of small inputs by recorded passes of one encoder, in bfloat16.

    May be called from several threads: they take turns."""

    def __init__(self, encode: Encode, num_heads: int):
        self._encode = encode
        self._num_heads = num_heads
        self._buffers: _Buffers | None = None
        self._recorded: OrderedDict[Size, tuple[torch.cuda.CUDAGraph, Tensor]] = OrderedDict()
        self._lock = threading.Lock()

    @staticmethod
    def suit(packed: PackedInput) -> bool:
        """Whether the input is small, and on the stream for which the turns hold."""
        device = packed.embeddings.device
        return (
            len(packed.positions) <= MOST_ROWS
            and torch.cuda.current_stream(device) == torch.cuda.default_stream(device)
            and not torch.cuda.is_current_stream_capturing()
        )

    def __call__(self, packed: PackedInput) -> Tensor:
        """[Q, H], in the caller's order."""
        size = Size.around(packed)
        with self._lock, torch.cuda.device(packed.embeddings.device):
            buffers = self._buffers
            if buffers is None or len(buffers.cls_rows) <= size.sequences:
                buffers = self._buffers = self._make_buffers(packed.embeddings, size)
            buffers.fill(packed, size)
            if size not in self._recorded:
                self._recorded[size] = self._record(buffers, size)
                if len(self._recorded) > MOST_RECORDED:
                    self._recorded.popitem(last=False)
            self._recorded.move_to_end(size)
            graph, result = self._recorded[size]
            graph.replay()
            return result[: len(packed.cls_rows)].clone()

    @torch.inference_mode(False)  # or no later call outside of it could fill them
    def _make_buffers(self, embeddings: Tensor, size: Size) -> _Buffers:
        """Zeros: what stands behind the last row must be finite."""
        self._recorded.clear()
        zeros = embeddings.new_zeros
        return _Buffers(
            embeddings=zeros(MOST_ROWS, embeddings.shape[1]),
            positions=zeros(MOST_ROWS, dtype=torch.int64),
            segments=zeros(MOST_ROWS, dtype=torch.int64),
            cls_rows=zeros(size.sequences + 1, dtype=torch.int64),
        )

    @torch.inference_mode(False)
    @torch.no_grad()
    def _record(self, buffers: _Buffers, size: Size) -> tuple[torch.cuda.CUDAGraph, Tensor]:
        graph, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            self._run(buffers, size)  # whatever is set up at a first call must not be recorded
        torch.cuda.current_stream().wait_stream(stream)
        pool = next((recorded.pool() for recorded, _ in self._recorded.values()), None)
        with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):  # other threads may allocate
            result = self._run(buffers, size)
        return graph, result

    def _run(self, buffers: _Buffers, size: Size) -> Tensor:
        packed, starts = buffers.view(size)
        return self._encode(packed, VariableLengthKernel(starts, size.longest, self._num_heads))


def _rounded(number: int, step: int) -> int:
    return -(-number // step) * step
