"""Reranking by onnxruntime against torch: the same weights, the same pairs, float32, one process, as many threads each.

The job of every contestant: caption ids and vision tokens in memory -> one float32 match logit per pair. onnxruntime
gets captions padded already, in batches; ours packs its own. Letters: Q pairs, m vision tokens, H width.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import onnxruntime
import torch
from torch import Tensor

from benchmarks.rerank_pairs import NUM_VISION_TOKENS, Pairs, make_pairs, our_logits
from benchmarks.timing import alternate, ratio, spread
from models.config import BackboneConfig, BackboneDims, CompressionConfig, EDJEConfig, EncoderConfig
from models.edje import EDJE
from models.integrations.onnx import JOINT_FILE, export_onnx, joint_inputs, open_session
from models.language.captions import CaptionTokenizer

if TYPE_CHECKING:
    from onnxruntime import InferenceSession

ROOT = Path(__file__).resolve().parents[1]
CAPTION_LENGTHS = (4, 40)
QUERY_LENGTH = 16
BATCH = 32


@torch.inference_mode()
def benchmark_onnx(num_pairs: int, rounds: int) -> dict[str, Any]:
    """One query's candidates, which share a caption, and captions of varied lengths; the section of the record."""
    torch.manual_seed(0)
    model = _model()
    with tempfile.TemporaryDirectory() as folder, torch.inference_mode(mode=False):
        difference = export_onnx(model, Path(folder) / "export")
        size = (Path(folder) / "export" / JOINT_FILE).stat().st_size
        session = open_session(Path(folder) / "export" / JOINT_FILE, threads=torch.get_num_threads())
    optimized = model.optimized(torch.float32)
    width = model.config.encoder.hidden_size
    jobs = {
        "candidates of one query": make_pairs(num_pairs, QUERY_LENGTH, QUERY_LENGTH, width, torch.device("cpu")),
        "varied lengths": make_pairs(num_pairs, *CAPTION_LENGTHS, width, torch.device("cpu")),
    }
    contestants: dict[str, Callable[[], object]] = {}
    rivals: dict[str, str] = {}
    for job, pairs in jobs.items():
        ours = f"torch, {job}"
        contestants[ours] = partial(our_logits, optimized.encoder, optimized.match_head, pairs)
        for order, index in _orders(pairs).items():
            name = f"onnxruntime, {job}{order}"
            contestants[name] = partial(_run, session, _batches(model.tokenizer, pairs.select(index)))
            rivals[name] = ours
    seconds = alternate(contestants, rounds, warm_up=1, device=torch.device("cpu"))
    return {
        "model": "MiniLM-L12-H384's shape, random weights, seed 0",
        "onnxruntime": onnxruntime.__version__,
        "threads": torch.get_num_threads(),
        "bytes": size,
        "largest_logit_difference": difference,
        "vision_tokens": NUM_VISION_TOKENS,
        "caption_pieces": {"varied": list(CAPTION_LENGTHS), "query": QUERY_LENGTH},
        "pairs": num_pairs,
        "batch": BATCH,
        "rounds": rounds,
        "time_includes": "encoder and match head, ours also the input layout; not tokenising, padding, adapter, store",
        "pairs_per_second": {name: spread([num_pairs / value for value in times]) for name, times in seconds.items()},
        "torch_times_as_fast": {name: ratio(seconds[name], seconds[ours]) for name, ours in rivals.items()},
    }


def _orders(pairs: Pairs) -> dict[str, Tensor]:
    """The pairs as they come and, where that makes a difference to padding, by length."""
    lengths = pairs.captions.lengths
    arrival = torch.arange(len(lengths))
    if (lengths == lengths[0]).all():
        return {"": arrival}
    return {", arrival order": arrival, ", sorted": lengths.argsort()}


def _batches(tokenizer: CaptionTokenizer, pairs: Pairs) -> list[dict[str, Any]]:
    """Inputs of joint.onnx for BATCH pairs each."""
    batches = []
    for part in torch.arange(len(pairs.captions)).split(BATCH):
        chosen = pairs.select(part)
        inputs = joint_inputs(tokenizer, chosen.captions, chosen.tokens)
        batches.append({name: value.numpy() for name, value in inputs.items()})
    return batches


def _run(session: InferenceSession, batches: list[dict[str, Any]]) -> Tensor:
    return torch.cat([torch.from_numpy(session.run(None, batch)[0]) for batch in batches])


def _model() -> EDJE:
    """Random weights. The adapter, which is not timed, is small."""
    tokenizer = CaptionTokenizer.from_pretrained(ROOT / "configs" / "pretrained" / "scenes")
    config = EDJEConfig(
        backbone=BackboneConfig(pretrained="random"),
        dims=BackboneDims(num_patches=NUM_VISION_TOKENS, patch_width=64, embedding_width=64),
        adapter=CompressionConfig(num_tokens=NUM_VISION_TOKENS, mlp_width=64, num_heads=4),
        encoder=EncoderConfig(),
    )
    return EDJE(config, tokenizer).eval()
