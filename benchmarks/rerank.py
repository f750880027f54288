"""Reranking throughput: our joint encoder against transformers' BertModel on the same weights and the same pairs.

The job of every contestant: caption ids and vision tokens in memory -> one float32 match logit per pair. Input layout,
encoder and match head are timed; tokenising, the adapter and reading from a store are not. Letters: Q pairs, m vision
tokens, H width, L length of a sequence.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from copy import deepcopy
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import BertConfig, BertModel

from benchmarks.rerank_gpu import gpu_section
from benchmarks.rerank_pairs import NUM_VISION_TOKENS, Pairs, make_pairs, our_logits
from benchmarks.timing import alternate, matmul_peak, ratio, spread
from models.config import EncoderConfig
from models.edje import MatchHead
from models.encoder.encoder_pass import EncoderPass
from models.encoder.joint_encoder import JointEncoder
from models.encoder.optimized_encoder import pairs_at_once
from models.precision import dtype_name, fastest_dtype

CLS_ID, SEP_ID = 101, 102
CAPTION_LENGTHS = (4, 40)
EQUAL_LENGTH = 16
BASELINE_BATCH = {"cpu": 32, "cuda": 1024}
"""32 is what sentence-transformers' CrossEncoder.predict takes by default; a GPU wants more."""
CALL_PAIRS, CALL_TOKENS = 64, (64, 576)
"""The paper's measure of time: one call of 64 pairs, of the compressed and of the local model at 384 px."""


class Comparison(NamedTuple):
    """`faster` and `slower` name contestants; `target` is what a CPU with AMX is to reach, None where none is set."""

    name: str
    faster: str
    slower: str
    target: float | None = None


COMPARISONS = (
    *(
        Comparison(
            f"float32 against BertModel, {kind}",
            f"ours float32, {kind.split(', ')[0]}",
            f"BertModel float32, {kind}",
            target,
        )
        for kind, target in (
            ("varied lengths, arrival order", 1.4),
            ("varied lengths, sorted", 1.2),
            ("equal lengths", 1.1),
        )
    ),
    *(
        Comparison(f"bfloat16 against our float32, {kind}", f"ours bfloat16, {kind}", f"ours float32, {kind}", 3.3)
        for kind in ("varied lengths", "equal lengths")
    ),
    *(
        Comparison(
            f"bfloat16 against BertModel in bfloat16, {kind}",
            f"ours bfloat16, {kind.split(', ')[0]}",
            f"BertModel bfloat16, {kind}",
        )
        for kind in ("varied lengths, arrival order", "varied lengths, sorted", "equal lengths")
    ),
)


class Baseline(nn.Module):
    """What one would write with transformers: inputs_embeds, attention mask, pooler, one linear map."""

    def __init__(self, encoder: JointEncoder):
        super().__init__()
        config = encoder.config
        self.bert = BertModel(
            BertConfig(  # type: ignore[call-arg]  # attn_implementation is a keyword of every config
                vocab_size=config.vocab_size,
                hidden_size=config.hidden_size,
                num_hidden_layers=config.num_layers,
                num_attention_heads=config.num_heads,
                intermediate_size=config.intermediate_size,
                attn_implementation="sdpa",
            )
        )
        self.bert.load_state_dict(
            {
                key.removeprefix("bert."): value
                for key, value in encoder.state_dict().items()
                if key.startswith("bert.")
            },
            strict=False,  # the pooler is the match head's part, below
        )
        self.out = nn.Linear(config.hidden_size, 1)

    def forward(self, pairs: Pairs) -> Tensor:
        """Logits [Q] of one padded batch."""
        lengths = pairs.captions.lengths.unsqueeze(1)
        place = torch.arange(int(lengths.max()) + NUM_VISION_TOKENS + 3, device=lengths.device).unsqueeze(0)
        is_piece = (place > 0) & (place <= lengths)
        vision = place - lengths - 2
        is_vision = (vision >= 0) & (vision < NUM_VISION_TOKENS)
        ids = (
            torch.where(place == 0, CLS_ID, SEP_ID).expand(is_piece.shape).masked_scatter(is_piece, pairs.captions.ids)
        )
        embeddings = self.bert.embeddings.word_embeddings(ids)
        embeddings[is_vision] = pairs.tokens.flatten(0, 1).to(embeddings.dtype)
        output = self.bert(
            inputs_embeds=embeddings,
            token_type_ids=(vision >= 0).long(),
            attention_mask=(vision <= NUM_VISION_TOKENS).long(),
        )
        return self.out(output.pooler_output).squeeze(-1).float()

    def by_batches(self, pairs: Pairs, size: int, in_order_of_length: bool) -> Tensor:
        """Logits [Q] by batches of `size`, as the pairs come or sorted by length first."""
        if not in_order_of_length:
            return self._batches(pairs, size)
        order = pairs.captions.lengths.argsort()
        return self._batches(pairs.select(order), size)[order.argsort()]

    def _batches(self, pairs: Pairs, size: int) -> Tensor:
        index = torch.arange(len(pairs.captions), device=pairs.tokens.device)
        return torch.cat([self(pairs.select(part)) for part in index.split(size)])


def useful_operations(config: EncoderConfig, lengths: Tensor) -> float:
    """Floating point operations that the job needs: no padding, only [CLS] in the last layer."""
    width, inner, layers = config.hidden_size, config.intermediate_size, config.num_layers
    rows = (lengths + NUM_VISION_TOKENS + 3).double()
    full = 2 * rows * (4 * width**2 + 2 * width * inner) + 4 * rows**2 * width
    last = 4 * rows * width**2 + 2 * (2 * width**2 + 2 * width * inner) + 4 * rows * width
    return float(((layers - 1) * full + last).sum())


@torch.inference_mode()
def benchmark_rerank(device: torch.device, num_pairs: int, rounds: int, baseline_batch: int | None) -> dict[str, Any]:
    """Run all contestants alternately; the section of the record."""
    torch.manual_seed(0)
    config = EncoderConfig()
    encoder = JointEncoder(config, cls_id=CLS_ID, sep_id=SEP_ID).eval().to(device)
    baseline, head = Baseline(encoder).eval().to(device), MatchHead(config.hidden_size).to(device)
    assert baseline.bert.pooler is not None
    head.dense.load_state_dict(baseline.bert.pooler.dense.state_dict())
    head.out.load_state_dict(baseline.out.state_dict())
    encoder.extend_positions(CALL_TOKENS[-1] + EQUAL_LENGTH + 3)
    # bfloat16 only where it is in hardware: a CPU that emulates it takes minutes for the peak's product alone.
    dtypes = list(dict.fromkeys((torch.float32, fastest_dtype(device))))
    ours = {dtype: encoder.optimized(dtype) for dtype in dtypes}
    theirs = {dtype: deepcopy(baseline).to(dtype) for dtype in dtypes}
    inputs = {
        "varied lengths": make_pairs(num_pairs, *CAPTION_LENGTHS, config.hidden_size, device),
        "equal lengths": make_pairs(num_pairs, EQUAL_LENGTH, EQUAL_LENGTH, config.hidden_size, device),
    }
    baseline_batch = baseline_batch or BASELINE_BATCH[device.type]
    contestants = _contestants(inputs, ours, theirs, head, baseline_batch)
    calls = {
        num_tokens: make_pairs(CALL_PAIRS, EQUAL_LENGTH, EQUAL_LENGTH, config.hidden_size, device, num_tokens)
        for num_tokens in CALL_TOKENS
    }
    fastest = ours[dtypes[-1]]
    call_runs = {
        f"{num_tokens} vision tokens": partial(our_logits, fastest, head, pairs) for num_tokens, pairs in calls.items()
    }
    peaks = {dtype: matmul_peak(dtype, device) for dtype in ours}
    seconds = alternate(contestants, rounds, warm_up=1, device=device)
    call_seconds = alternate(call_runs, rounds, warm_up=1, device=device)
    peaks = {dtype: max(peak, matmul_peak(dtype, device)) for dtype, peak in peaks.items()}
    reference = contestants["BertModel float32, varied lengths, arrival order"]()
    record = {
        "model": "BERT of MiniLM-L12-H384's shape, random weights, seed 0",
        "vision_tokens": NUM_VISION_TOKENS,
        "caption_pieces": {"varied": list(CAPTION_LENGTHS), "equal": EQUAL_LENGTH},
        "pairs": num_pairs,
        "batch": {"ours": pairs_at_once(device, NUM_VISION_TOKENS), "BertModel": baseline_batch},
        "warm_up": 1,
        "rounds": rounds,
        "time_includes": "input layout, encoder, match head; not tokenising, adapter, store",
        "matmul_peak_gflops": {dtype_name(dtype): peak / 1e9 for dtype, peak in peaks.items()},
        "largest_logit_difference_from_BertModel": {
            dtype_name(dtype): float(
                (contestants[f"ours {dtype_name(dtype)}, varied lengths"]() - reference).abs().max()
            )
            for dtype in dtypes
        },
        "results": _results(config, inputs, peaks, seconds),
        "ratios": _ratios(seconds, device),
        "calls": {
            "pairs": CALL_PAIRS,
            "caption_pieces": EQUAL_LENGTH,
            "dtype": dtype_name(fastest.dtype),
            "milliseconds": {name: spread([1000 * value for value in times]) for name, times in call_seconds.items()},
        },
    }
    if device.type == "cuda":
        record["gpu"] = gpu_section(fastest, head, inputs["varied lengths"], rounds, device)
    return record


def _contestants(
    inputs: dict[str, Pairs],
    ours: Mapping[torch.dtype, EncoderPass],
    theirs: Mapping[torch.dtype, Baseline],
    head: MatchHead,
    baseline_batch: int,
) -> dict[str, Callable[[], Tensor]]:
    """Every model on every input, by name."""
    contestants: dict[str, Callable[[], Tensor]] = {}
    for kind, pairs in inputs.items():
        for dtype, model in theirs.items():
            for order in ("arrival order", "sorted") if kind == "varied lengths" else ("",):
                name = ", ".join(filter(None, [f"BertModel {dtype_name(dtype)}", kind, order]))
                contestants[name] = partial(model.by_batches, pairs, baseline_batch, order == "sorted")
        for dtype, form in ours.items():
            contestants[f"ours {dtype_name(dtype)}, {kind}"] = partial(our_logits, form, head, pairs)
    return contestants


def _results(
    config: EncoderConfig, inputs: dict[str, Pairs], peaks: dict[torch.dtype, float], seconds: dict[str, list[float]]
) -> list[dict[str, Any]]:
    """A row for each contestant."""
    rows = []
    for name, times in seconds.items():
        lengths = next(pairs.captions.lengths for kind, pairs in inputs.items() if kind in name).cpu()
        dtype = torch.bfloat16 if "bfloat16" in name else torch.float32
        rates = spread([len(lengths) / value for value in times])
        operations = useful_operations(config, lengths) / len(lengths) * rates["median"]
        rows.append({"name": name, "pairs_per_second": rates, "share_of_matmul_peak": operations / peaks[dtype]})
    return rows


def _ratios(seconds: dict[str, list[float]], device: torch.device) -> list[dict[str, Any]]:
    """Each comparison whose contestants ran, round by round."""
    return [
        {
            "name": c.name,
            "target": c.target if device.type == "cpu" else None,
            "reached": ratio(seconds[c.slower], seconds[c.faster]),
        }
        for c in COMPARISONS
        if c.slower in seconds and c.faster in seconds
    ]
