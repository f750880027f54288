"""The joint encoder against transformers' BertForMaskedLM on the same weights, and against itself in other batches.

The reference is padded, masked and fed the way the published code does it; ours is packed.
"""

from dataclasses import replace

import pytest
import torch
from torch import Tensor
from transformers import BertConfig, BertForMaskedLM

from models.config import EncoderConfig
from models.encoder import joint_encoder, optimized_encoder
from models.encoder.joint_encoder import JointEncoder
from models.encoder.optimized_encoder import OptimizedEncoder
from models.errors import UserError
from models.language.captions import CaptionIds

CLS, SEP, WIDTH, NUM_TOKENS = 2, 3, 32, 6
CONFIG = EncoderConfig(
    vocab_size=60, hidden_size=WIDTH, num_layers=3, num_heads=4, intermediate_size=48, max_positions=40
)
EXACT = {"rtol": 0, "atol": 1e-5}


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.mark.parametrize("std", [0.02, 0.2])
def test_random_weights_have_the_configured_deviation(std):
    state = JointEncoder(replace(CONFIG, initializer_range=std), cls_id=CLS, sep_id=SEP).state_dict()
    for name in ("embeddings.word_embeddings", "encoder.layer.2.output.dense"):
        assert state[f"bert.{name}.weight"].std().item() == pytest.approx(std, rel=0.1)
    assert not state["bert.encoder.layer.2.output.dense.bias"].any()


def reference_model(config: EncoderConfig = CONFIG) -> BertForMaskedLM:
    """Weights large enough that every forgotten bias, norm, segment or position shows."""
    model = BertForMaskedLM(
        BertConfig(
            vocab_size=config.vocab_size,
            hidden_size=config.hidden_size,
            num_hidden_layers=config.num_layers,
            num_attention_heads=config.num_heads,
            intermediate_size=config.intermediate_size,
            max_position_embeddings=config.max_positions,
            hidden_act=config.activation,
            layer_norm_eps=config.layer_norm_eps,
        )
    ).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(mean=float("LayerNorm.weight" in name), std=0.2)
    return model


def our_model(reference: BertForMaskedLM, config: EncoderConfig = CONFIG) -> JointEncoder:
    encoder = JointEncoder(config, cls_id=CLS, sep_id=SEP).eval()
    encoder.load_state_dict(reference.state_dict())
    return encoder


def ragged(lengths: list[int]) -> CaptionIds:
    return CaptionIds(torch.randint(5, CONFIG.vocab_size, (sum(lengths),)), torch.tensor(lengths))


class Batch:
    """Pairs of captions of unequal length (one empty, two equal) with three images; index Q in no order of length."""

    def __init__(self, lengths: tuple[int, ...] = (4, 0, 9, 2, 4)):
        self.captions = ragged(list(lengths))
        self.tokens = torch.randn(3, NUM_TOKENS, WIDTH)
        self.caption_index = torch.tensor([2, 0, 1, 4, 3, 0, 2])
        self.image_index = torch.tensor([0, 1, 2, 0, 1, 1, 2])

    def __len__(self) -> int:
        return len(self.caption_index)

    def pack(self, encoder):
        return encoder.pack_pairs(self.captions, self.tokens, self.caption_index, self.image_index)

    def pieces(self, pair: int) -> list[int]:
        start, stop = self.captions.offsets[self.caption_index[pair] :][:2].tolist()
        return self.captions.ids[start:stop].tolist()


def padded_reference(model: BertForMaskedLM, batch: Batch) -> tuple[list[Tensor], list[Tensor]]:
    """Hidden states and MLM logits of each pair, from one right-padded batch with an attention mask."""
    pieces = [batch.pieces(pair) for pair in range(len(batch))]
    longest = max(map(len, pieces)) + NUM_TOKENS + 3
    words = model.bert.embeddings.word_embeddings.weight
    segments, mask = torch.zeros(len(batch), longest).long(), torch.zeros(len(batch), longest).long()
    rows = []
    for pair, caption in enumerate(pieces):
        text = words[[CLS, *caption, SEP]]
        sequence = torch.cat([text, batch.tokens[batch.image_index[pair]], words[[SEP]]])
        rows.append(torch.cat([sequence, torch.zeros(longest - len(sequence), WIDTH)]))
        segments[pair, len(text) : len(sequence)] = 1
        mask[pair, : len(sequence)] = 1
    embeddings = torch.stack(rows)
    output = model(inputs_embeds=embeddings, token_type_ids=segments, attention_mask=mask, output_hidden_states=True)
    lengths = mask.sum(1).tolist()
    hidden = [row[:length] for row, length in zip(output.hidden_states[-1], lengths, strict=True)]
    return hidden, [row[:length] for row, length in zip(output.logits, lengths, strict=True)]


def sequences(packed, rows: Tensor) -> list[Tensor]:
    """Packed rows [T, X] -> each sequence [L, X], in the caller's order."""
    lengths = {start: g.length for g in packed.groups for start in range(g.start, g.rows.stop, g.length)}
    return [rows[start : start + lengths[start]] for start in packed.cls_rows.tolist()]


@pytest.mark.parametrize("activation", ["gelu", "gelu_new", "relu"])
@pytest.mark.parametrize("eps", [1e-12, 1e-3])
def test_hidden_states_and_mlm_logits_are_those_of_transformers(activation, eps):
    config = replace(CONFIG, activation=activation, layer_norm_eps=eps)
    reference = reference_model(config)
    encoder, batch = our_model(reference, config), Batch()
    packed = batch.pack(encoder)
    hidden = encoder.encode(packed)
    expected_hidden, expected_logits = padded_reference(reference, batch)
    for ours, theirs in zip(sequences(packed, hidden), expected_hidden, strict=True):
        torch.testing.assert_close(ours, theirs, **EXACT)
    for ours, theirs in zip(sequences(packed, encoder.mlm_logits(hidden)), expected_logits, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


def test_state_dict_goes_to_transformers_and_back_unchanged():
    reference = reference_model()
    encoder, other = our_model(reference), reference_model()
    report = other.load_state_dict(encoder.state_dict(), strict=True)
    assert not report.missing_keys and not report.unexpected_keys
    for name, value in other.state_dict().items():
        assert torch.equal(value, reference.state_dict()[name]), name


def test_decoder_and_word_embeddings_stay_one_parameter():
    encoder = JointEncoder(CONFIG, cls_id=CLS, sep_id=SEP).double()
    predictions = encoder.cls["predictions"]
    assert predictions.decoder.weight is encoder.word_table
    assert predictions.decoder.bias is predictions.bias


def test_gradients_of_the_packed_pass_are_those_of_the_padded_reference():
    reference, batch = reference_model(), Batch()
    encoder = our_model(reference)
    batch.tokens.requires_grad_()
    packed = batch.pack(encoder)
    torch.stack([h.tanh().sum() for h in sequences(packed, encoder.encode(packed))]).sum().backward()
    ours, batch.tokens.grad = batch.tokens.grad, None
    torch.stack([h.tanh().sum() for h in padded_reference(reference, batch)[0]]).sum().backward()
    torch.testing.assert_close(ours, batch.tokens.grad, rtol=1e-4, atol=1e-5)
    theirs = dict(reference.named_parameters())
    for name, parameter in encoder.named_parameters():
        if name.startswith("bert."):
            close = torch.allclose(parameter.grad, theirs[name].grad, rtol=1e-3, atol=1e-4)
            assert close, name


@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("optimized", [True, False])
def test_wanted_rows_are_the_rows_of_the_full_pass(grad, optimized):
    encoder, batch = our_model(reference_model()), Batch()
    encoder = encoder.optimized(torch.float32) if optimized else encoder
    packed = batch.pack(encoder)
    with torch.set_grad_enabled(grad):
        full = encoder.encode(packed)
        for rows in (packed.cls_rows, packed.cls_rows.clone(), packed.caption_rows, torch.tensor([5, 0, 5])):
            torch.testing.assert_close(encoder.encode(packed, rows), full[rows], **EXACT)
        torch.testing.assert_close(encoder.encode_cls(packed), full[packed.cls_rows], **EXACT)


def spread_logits(encoder, batch: Batch, order: Tensor) -> Tensor:
    """Match logits of the pairs in the given order, by a random head under which they differ by about 1."""
    captions, tokens = batch.captions, batch.tokens
    packed = encoder.pack_pairs(captions, tokens, batch.caption_index[order], batch.image_index[order])
    head = torch.randn(WIDTH, generator=torch.Generator().manual_seed(1))
    return encoder.encode_cls(packed).float() @ head


@pytest.mark.parametrize("rows_at_once", [1, 40, 10_000])
@pytest.mark.parametrize("form", ["training", torch.float32, torch.bfloat16])
def test_a_logit_does_not_depend_on_neighbours_batch_size_or_order(form, rows_at_once, monkeypatch):
    monkeypatch.setattr(optimized_encoder, "ROWS_AT_ONCE", rows_at_once)
    encoder, batch = our_model(reference_model()), Batch()
    encoder = encoder if form == "training" else encoder.optimized(form)
    together = spread_logits(encoder, batch, torch.arange(len(batch)))
    assert together.std() > 0.5
    order = torch.tensor([3, 6, 0, 2, 5, 1, 4])
    # bfloat16: a row may be summed in another order in another batch, and then rounds to the next of its 8 bits.
    bound = 0.1 if form == torch.bfloat16 else 1e-5
    torch.testing.assert_close(spread_logits(encoder, batch, order), together[order], rtol=0, atol=bound)
    for pair in range(len(batch)):
        alone = spread_logits(encoder, batch, torch.tensor([pair]))
        torch.testing.assert_close(alone, together[[pair]], rtol=0, atol=bound)


@pytest.mark.parametrize("length", [5, 7, 22, 23])
def test_optimized_form_in_float32_is_the_training_form(length):
    # With vision tokens and specials: sequences of 14, 16 (no fill of keys), 31 and 32.
    encoder, batch = our_model(reference_model()), Batch((length, length, length, length, length))
    packed = batch.pack(encoder)
    fast = encoder.optimized(torch.float32)
    torch.testing.assert_close(fast.encode(batch.pack(fast)), encoder.encode(packed), **EXACT)


def test_optimized_form_is_a_snapshot():
    encoder, batch = our_model(reference_model()), Batch()
    fast = encoder.optimized(torch.float32)
    before = fast.encode(batch.pack(fast))
    with torch.no_grad():
        for parameter in encoder.parameters():
            parameter.zero_()
    assert torch.equal(fast.encode(batch.pack(fast)), before)


def test_bfloat16_logits_stay_within_the_stated_bound_of_float32():
    # MiniLM's shape, weights three times as large as at initialisation: as initialised, pairs hardly differ.
    encoder = JointEncoder(EncoderConfig(vocab_size=100), cls_id=CLS, sep_id=SEP).eval()
    with torch.no_grad():
        for parameter in encoder.bert["encoder"].parameters():
            if parameter.dim() == 2:
                parameter.mul_(3)
    captions, tokens = CaptionIds(torch.randint(5, 100, (48 * 12,)), torch.full((48,), 12)), torch.randn(48, 64, 384)
    index, heads = torch.arange(48), torch.randn(384, 8) / 384**0.5
    logits = {}
    for dtype in (torch.float32, torch.bfloat16):
        fast = encoder.optimized(dtype)
        packed = fast.pack_pairs(captions, tokens, index, index)
        logits[dtype] = fast.encode_cls(packed).float() @ heads
    spread = logits[torch.float32].std()
    assert spread > 0.5
    assert (logits[torch.bfloat16] - logits[torch.float32]).abs().max() < optimized_encoder.BFLOAT16_BOUND * spread


def test_training_form_learns_under_bfloat16_autocast():
    encoder, batch = our_model(reference_model()).train(), Batch()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        packed = batch.pack(encoder)
        encoder.mlm_logits(encoder.encode(packed, packed.caption_rows)).float().logsumexp(1).sum().backward()
    for name, parameter in encoder.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name


def test_dropout_acts_in_training_alone():
    encoder, batch = our_model(reference_model()), Batch()
    packed = batch.pack(encoder)
    assert torch.equal(encoder.encode(packed), encoder.encode(packed))
    encoder.train()
    assert not torch.equal(encoder.encode(packed), encoder.encode(packed))
    encoder.config = replace(CONFIG, hidden_dropout=0.0, attention_dropout=0.0)
    torch.testing.assert_close(encoder.encode(packed), encoder.eval().encode(packed), rtol=0, atol=0)


def test_positions_are_extended_by_their_last_row():
    encoder = JointEncoder(CONFIG, cls_id=CLS, sep_id=SEP)
    before = encoder.weights().positions.clone()
    encoder.extend_positions(50)
    after = encoder.weights().positions
    assert torch.equal(after[:40], before) and torch.equal(after[40:], before[-1:].expand(10, -1))
    encoder.extend_positions(45)
    assert len(encoder.weights().positions) == encoder.config.max_positions == 50


def test_a_sequence_longer_than_the_position_table_is_an_error():
    encoder = JointEncoder(replace(CONFIG, max_positions=14), cls_id=CLS, sep_id=SEP)
    fits, too_long = ragged([5]), ragged([6])
    zero, tokens = torch.zeros(1, dtype=torch.int64), torch.randn(1, NUM_TOKENS, WIDTH)
    encoder.encode(encoder.pack_pairs(fits, tokens, zero, zero))
    with pytest.raises(UserError, match="15 tokens .* 14 positions"):
        encoder.encode(encoder.pack_pairs(too_long, tokens, zero, zero))


def test_an_unknown_activation_is_an_error():
    with pytest.raises(UserError, match="encoder.activation is 'swish'"):
        JointEncoder(replace(CONFIG, activation="swish"), cls_id=CLS, sep_id=SEP)


def test_optimized_form_picks_the_fastest_dtype():
    fast = JointEncoder(CONFIG, cls_id=CLS, sep_id=SEP).optimized()
    assert isinstance(fast, OptimizedEncoder) and fast.dtype == joint_encoder.fastest_dtype("cpu")


def test_a_call_on_a_gpu_has_as_many_rows_however_many_tokens_an_image_has():
    for num_tokens in (1, 64, 576, 10**6):
        pairs = optimized_encoder.pairs_at_once(torch.device("cuda"), num_tokens)
        assert pairs == 1 or 0.5 * optimized_encoder.GPU_ROWS < pairs * (num_tokens + 20) <= optimized_encoder.GPU_ROWS


@pytest.mark.gpu
@pytest.mark.parametrize("form", ["training", torch.float32, torch.bfloat16])
def test_gpu_agrees_with_cpu(form):
    encoder, batch = our_model(reference_model()), Batch()
    expected = spread_logits(encoder, batch, torch.arange(len(batch)))
    encoder = encoder.cuda()
    encoder = encoder if form == "training" else encoder.optimized(form)
    batch.captions, batch.tokens = batch.captions.to("cuda"), batch.tokens.cuda()
    packed = encoder.pack_pairs(batch.captions, batch.tokens, batch.caption_index.cuda(), batch.image_index.cuda())
    head = torch.randn(WIDTH, generator=torch.Generator().manual_seed(1))
    logits = encoder.encode_cls(packed).float().cpu() @ head
    torch.testing.assert_close(logits, expected, rtol=0, atol=0.2 if form == torch.bfloat16 else 1e-3)
