"""What a GPU's record of reranking has besides: few vision tokens, one query from a store on disk, and a profile."""

from __future__ import annotations

import tempfile
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from benchmarks.rerank_pairs import Pairs, make_pairs, our_logits
from benchmarks.store import TOKENS, WIDTH, write_store
from benchmarks.timing import alternate, spread
from models.encoder.encoder_pass import EncoderPass
from models.language.captions import CaptionIds
from models.matching import MatchHead
from models.stores.token_store import TokenStore

FEW_TOKENS, CAPTION_PIECES = 8, 16
STORED, CANDIDATES = 2_000, 100
LISTED_KERNELS = 20


def gpu_section(
    encoder: EncoderPass, head: MatchHead, varied: Pairs, rounds: int, device: torch.device
) -> dict[str, Any]:
    """Measured with `encoder`, the fastest form; varied: the pairs that are profiled."""
    few = make_pairs(4 * len(varied.captions), CAPTION_PIECES, CAPTION_PIECES, WIDTH, device, FEW_TOKENS)
    with tempfile.TemporaryDirectory() as folder:
        store = write_store(Path(folder) / "store", "float16", STORED)
        runs = {
            "few": partial(our_logits, encoder, head, few),
            "query": partial(_logits_from_store, encoder, head, store, device),
        }
        seconds = alternate(runs, rounds, warm_up=2, device=device)
    return {
        "few_tokens": {
            "vision_tokens": FEW_TOKENS,
            "caption_pieces": CAPTION_PIECES,
            "pairs_per_second": spread([len(few.captions) / value for value in seconds["few"]]),
        },
        "query_from_store": {
            "candidates": CANDIDATES,
            "items": STORED,
            "vision_tokens": TOKENS,
            "time_includes": "fetch by id from disk, copies to and from the GPU, input layout, encoder, match head",
            "milliseconds": spread([1000 * value for value in seconds["query"]]),
        },
        "kernels": _profile(encoder, head, varied),
    }


def _logits_from_store(encoder: EncoderPass, head: MatchHead, store: TokenStore, device: torch.device) -> Tensor:
    """Logits [CANDIDATES], on the CPU, of one caption and random items."""
    rows = torch.randperm(STORED)[:CANDIDATES].tolist()
    tokens = store.gather([store.ids[row] for row in rows]).to(device)
    captions = CaptionIds(torch.randint(1000, 30000, (CAPTION_PIECES,)), torch.tensor([CAPTION_PIECES]))
    images = torch.arange(CANDIDATES)
    packed = encoder.pack_pairs(captions, tokens, torch.zeros_like(images), images)
    logits: Tensor = head(encoder.encode_cls(packed))
    return logits.cpu()


def _profile(encoder: EncoderPass, head: MatchHead, pairs: Pairs) -> dict[str, Any]:
    """Microseconds on the GPU of scoring `pairs`, by kernel, most first."""
    with profile(activities=[ProfilerActivity.CUDA]) as recorded:
        our_logits(encoder, head, pairs)
        torch.cuda.synchronize()
    events = sorted(recorded.key_averages(), key=lambda event: -event.self_device_time_total)
    return {
        "pairs": len(pairs.captions),
        "rows": int((pairs.captions.lengths + TOKENS + 3).sum()),
        "microseconds": sum(event.self_device_time_total for event in events),
        "by_kernel": [
            {"name": event.key, "launches": event.count, "microseconds": event.self_device_time_total}
            for event in events[:LISTED_KERNELS]
        ],
    }
