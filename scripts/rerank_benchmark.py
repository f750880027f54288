"""Reranking throughput: our joint encoder against transformers' BertModel on the same weights and the same pairs.

The job of every contestant: caption ids and vision tokens in memory -> one float32 match logit a pair. Input layout,
encoder and match head are timed; tokenising, the adapter and reading from a store are not. Letters: Q pairs, m vision
tokens, H width, L length of a sequence.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import BertConfig, BertModel

from models.captions import CaptionIds
from models.config import EncoderConfig
from models.edje import MatchHead
from models.joint_encoder import EncoderPass, JointEncoder
from models.precision import dtype_name, fastest_dtype
from scripts.benchmark_timing import alternate, matmul_peak, ratio, spread

CLS_ID, SEP_ID = 101, 102
NUM_VISION_TOKENS = 64
CAPTION_LENGTHS = (4, 40)
EQUAL_LENGTH = 16
OUR_BATCH = 256
"""Pairs a call; on a CPU the encoder itself cuts a call to what fits the cache."""
BASELINE_BATCH = 32
"""What sentence-transformers' CrossEncoder.predict takes by default."""
TARGETS = {
    "float32 against BertModel, varied lengths, arrival order": 1.4,
    "float32 against BertModel, varied lengths, sorted": 1.2,
    "float32 against BertModel, equal lengths": 1.1,
    "bfloat16 against our float32, varied lengths": 3.3,
    "bfloat16 against our float32, equal lengths": 3.3,
}


@dataclass(frozen=True)
class Pairs:
    """Q captions and the vision tokens [Q, m, H] of their images."""

    captions: CaptionIds
    tokens: Tensor

    def select(self, index: Tensor) -> Pairs:
        return Pairs(self.captions.select(index), self.tokens[index])


class Baseline(nn.Module):
    """What one would write with transformers: inputs_embeds, attention mask, pooler, one linear map."""

    def __init__(self, encoder: JointEncoder):
        super().__init__()
        config = encoder.config
        self.bert = BertModel(
            BertConfig(
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
        embeddings[is_vision] = pairs.tokens.flatten(0, 1)
        output = self.bert(
            inputs_embeds=embeddings,
            token_type_ids=(vision >= 0).long(),
            attention_mask=(vision <= NUM_VISION_TOKENS).long(),
        )
        return self.out(output.pooler_output).squeeze(-1)

    def by_batches(self, pairs: Pairs, size: int, in_order_of_length: bool) -> Tensor:
        """Logits [Q] by batches of `size`, as the pairs come or sorted by length first."""
        if not in_order_of_length:
            return self._batches(pairs, size)
        order = pairs.captions.lengths.argsort()
        return self._batches(pairs.select(order), size)[order.argsort()]

    def _batches(self, pairs: Pairs, size: int) -> Tensor:
        index = torch.arange(len(pairs.captions), device=pairs.tokens.device)
        return torch.cat([self(pairs.select(part)) for part in index.split(size)])


def our_logits(encoder: EncoderPass, head: MatchHead, pairs: Pairs) -> Tensor:
    """Logits [Q] by the product's own code, OUR_BATCH pairs a call."""
    index = torch.arange(len(pairs.captions), device=pairs.tokens.device)
    logits = []
    for part in index.split(OUR_BATCH):
        packed = encoder.pack_pairs(pairs.captions, pairs.tokens, part, part)
        logits.append(head(encoder.encode(packed, packed.cls_rows)))
    return torch.cat(logits)


def make_pairs(num_pairs: int, shortest: int, longest: int, width: int, device: torch.device) -> Pairs:
    """Random captions of `shortest` to `longest` pieces and random vision tokens."""
    lengths = torch.randint(shortest, longest + 1, (num_pairs,))
    ids = torch.randint(1000, 30000, (int(lengths.sum()),))
    return Pairs(CaptionIds(ids, lengths).to(device), torch.randn(num_pairs, NUM_VISION_TOKENS, width).to(device))


def useful_operations(config: EncoderConfig, lengths: Tensor) -> float:
    """Floating point operations that the job needs: no padding, only [CLS] in the last layer."""
    width, inner, layers = config.hidden_size, config.intermediate_size, config.num_layers
    rows = (lengths + NUM_VISION_TOKENS + 3).double()
    full = 2 * rows * (4 * width**2 + 2 * width * inner) + 4 * rows**2 * width
    last = 4 * rows * width**2 + 2 * (2 * width**2 + 2 * width * inner) + 4 * rows * width
    return float(((layers - 1) * full + last).sum())


@torch.inference_mode()
def benchmark_rerank(device: torch.device, num_pairs: int, rounds: int, baseline_batch: int) -> dict[str, Any]:
    """Run all contestants alternately; the section of the record."""
    torch.manual_seed(0)
    encoder = JointEncoder(EncoderConfig(), cls_id=CLS_ID, sep_id=SEP_ID).eval().to(device)
    baseline, head = Baseline(encoder).eval().to(device), MatchHead(encoder.config.hidden_size).to(device)
    head.dense.load_state_dict(baseline.bert.pooler.dense.state_dict())
    head.out.load_state_dict(baseline.out.state_dict())
    # Not where the probe refuses bfloat16: a CPU that emulates it takes minutes for the peak's product alone.
    dtypes = dict.fromkeys((torch.float32, fastest_dtype(device)))
    ours = {dtype: encoder.optimized(dtype) for dtype in dtypes}
    width = encoder.config.hidden_size
    inputs = {
        "varied lengths": make_pairs(num_pairs, *CAPTION_LENGTHS, width, device),
        "equal lengths": make_pairs(num_pairs, EQUAL_LENGTH, EQUAL_LENGTH, width, device),
    }
    contestants: dict[str, Callable[[], Tensor]] = {}
    batches: dict[str, int] = {}
    for kind, pairs in inputs.items():
        for order in ("arrival order", "sorted") if kind == "varied lengths" else ("",):
            name = ", ".join(filter(None, ["BertModel float32", kind, order]))

            def run(pairs: Pairs = pairs, order: str = order) -> Tensor:
                return baseline.by_batches(pairs, baseline_batch, order == "sorted")

            batches[name], contestants[name] = baseline_batch, run
        for dtype, form in ours.items():
            name = f"ours {dtype_name(dtype)}, {kind}"
            batches[name] = OUR_BATCH
            contestants[name] = lambda form=form, pairs=pairs: our_logits(form, head, pairs)
    peaks = {dtype: matmul_peak(dtype, device) for dtype in ours}
    seconds = alternate(contestants, rounds, warm_up=1, device=device)
    peaks = {dtype: max(peak, matmul_peak(dtype, device)) for dtype, peak in peaks.items()}
    return _section(encoder.config, inputs, contestants, batches, peaks, seconds, rounds)


def _section(
    config: EncoderConfig,
    inputs: dict[str, Pairs],
    contestants: dict[str, Callable[[], Tensor]],
    batches: dict[str, int],
    peaks: dict[torch.dtype, float],
    seconds: dict[str, list[float]],
    rounds: int,
) -> dict[str, Any]:
    results = []
    for name, times in seconds.items():
        kind = next(kind for kind in inputs if kind in name)
        lengths, dtype = inputs[kind].captions.lengths, torch.bfloat16 if "bfloat16" in name else torch.float32
        rates = spread([len(lengths) / value for value in times])
        operations = useful_operations(config, lengths) / len(lengths) * rates["median"]
        results.append(
            {
                "name": name,
                "pairs_per_second": rates,
                "batch": batches[name],
                "share_of_matmul_peak": operations / peaks[dtype],
            }
        )
    reference = contestants["BertModel float32, varied lengths, arrival order"]()
    differences = {
        name: float((contestants[f"ours {name}, varied lengths"]() - reference).abs().max())
        for name in map(dtype_name, peaks)
    }
    return {
        "model": "BERT of MiniLM-L12-H384's shape, random weights, seed 0",
        "vision_tokens": NUM_VISION_TOKENS,
        "caption_pieces": {"varied": list(CAPTION_LENGTHS), "equal": EQUAL_LENGTH},
        "pairs": len(inputs["varied lengths"].captions),
        "warm_up": 1,
        "rounds": rounds,
        "time_includes": "input layout, encoder, match head; not tokenising, adapter, store",
        "matmul_peak_gflops": {dtype_name(dtype): peak / 1e9 for dtype, peak in peaks.items()},
        "largest_logit_difference_from_BertModel": differences,
        "results": results,
        "ratios": _ratios(seconds),
    }


def _ratios(seconds: dict[str, list[float]]) -> list[dict[str, Any]]:
    """Each target with what was reached, round by round; bfloat16's only where it ran."""
    ratios = []
    for name, target in TARGETS.items():
        head, _, rest = name.partition(", ")
        kind = rest.split(", ")[0]
        dtype, _, opponent = head.partition(" against ")
        if f"ours {dtype}, {kind}" not in seconds:
            continue
        slower = f"BertModel float32, {rest}" if opponent == "BertModel" else f"ours float32, {kind}"
        reached = ratio(seconds[slower], seconds[f"ours {dtype}, {kind}"])
        ratios.append({"name": name, "target": target, "reached": reached})
    return ratios
