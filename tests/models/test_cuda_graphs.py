"""Recorded passes: sizes that hold what they are asked to hold and, where there is a GPU, the same [CLS] states."""

import random
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
import torch

from models.config import EncoderConfig
from models.encoder import cuda_graphs
from models.encoder.cuda_graphs import Size
from models.encoder.encoder_pass import EncoderPass
from models.encoder.joint_encoder import JointEncoder
from models.encoder.packing import PackedInput
from models.language.captions import CaptionIds

CONFIG = EncoderConfig(vocab_size=60, hidden_size=64, num_layers=3, num_heads=2, intermediate_size=96)


def packed_pairs(encoder: JointEncoder, pairs: int, longest: int, num_tokens: int, device: str) -> PackedInput:
    lengths = torch.randint(1, longest + 1, (pairs,))
    captions = CaptionIds(torch.randint(4, 60, (int(lengths.sum()),)), lengths).to(device)
    index = torch.arange(pairs, device=device)
    tokens = torch.randn(pairs, num_tokens, CONFIG.hidden_size, device=device)
    return encoder.pack_pairs(captions, tokens, index, index)


def test_sizes_are_few_and_hold_their_input():
    random.seed(0)
    encoder = JointEncoder(CONFIG, cls_id=2, sep_id=3)
    sizes = set()
    for _ in range(200):
        pairs, num_tokens = random.randint(1, 100), random.randint(1, 70)
        packed = packed_pairs(encoder, pairs, 40, num_tokens, "cpu")
        size, rows = Size.around(packed), len(packed.positions)
        assert rows <= size.rows <= max(1.125 * rows, rows + 15)
        assert pairs <= size.sequences < 2 * pairs
        assert size.longest - 64 < packed.groups[-1].length <= size.longest
        sizes.add(size.rows)
    assert len(sizes) <= 8 * 13, "eight between powers of two"


@pytest.fixture
def encoder() -> JointEncoder:
    torch.manual_seed(0)
    encoder = JointEncoder(replace(CONFIG, initializer_range=0.2), cls_id=2, sep_id=3).eval().cuda()
    encoder.extend_positions(700)
    return encoder


def check(fast: EncoderPass, packed: PackedInput) -> None:
    expected = EncoderPass.encode_cls(fast, packed)
    torch.testing.assert_close(fast.encode_cls(packed), expected, rtol=0, atol=0.1)


@pytest.mark.gpu
def test_recorded_passes_give_what_a_pass_gives(encoder, monkeypatch):
    monkeypatch.setattr(cuda_graphs, "MOST_RECORDED", 4)
    fast = encoder.optimized(torch.bfloat16)
    for pairs, longest, num_tokens in [(64, 30, 64), (1, 5, 4), (7, 40, 64), (64, 30, 60), (3, 8, 600), (1, 5, 4)]:
        packed = packed_pairs(encoder, pairs, longest, num_tokens, "cuda")
        check(fast, packed)
        with torch.inference_mode():
            check(fast, packed)
    assert 0 < len(fast._recorded._recorded) <= 4


@pytest.mark.gpu
def test_few_pairs_are_laid_out_alike_on_cpu_and_gpu(encoder):
    lengths = torch.randint(0, 20, (9,))
    captions = CaptionIds(torch.randint(4, 60, (int(lengths.sum()),)), lengths).to("cuda")
    caption_index, image_index = torch.randint(9, (30,), device="cuda"), torch.randint(5, (30,), device="cuda")
    arguments = captions, torch.randn(5, 12, CONFIG.hidden_size, device="cuda"), caption_index, image_index
    fast = encoder.optimized(torch.bfloat16)
    few, expected = fast.pack_pairs(*arguments), EncoderPass.pack_pairs(fast, *arguments)
    assert few.groups == expected.groups
    for name in ("embeddings", "positions", "segments", "cls_rows"):
        assert torch.equal(getattr(few, name), getattr(expected, name)), name


@pytest.mark.gpu
def test_threads_take_turns(encoder):
    fast = encoder.optimized(torch.bfloat16)
    inputs = [packed_pairs(encoder, pairs, 20, 16, "cuda") for pairs in (8, 8, 20, 33) * 4]
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda packed: check(fast, packed), inputs))


@pytest.mark.gpu
def test_another_stream_and_large_inputs_are_not_recorded(encoder):
    fast = encoder.optimized(torch.bfloat16)
    with torch.cuda.stream(torch.cuda.Stream()):
        check(fast, packed_pairs(encoder, 4, 10, 16, "cuda"))
    large = packed_pairs(encoder, 1000, 10, 64, "cuda")
    assert len(large.positions) > cuda_graphs.MOST_ROWS
    check(fast, large)
    assert not fast._recorded._recorded
