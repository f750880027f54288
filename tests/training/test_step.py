"""A whole optimizer step: one pass for all objectives, few operators, no waiting for the device, nothing from NaN."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import pytest
import torch
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from data.batches import random_stream
from models.distributed import DistributedContext
from models.edje import EDJE
from models.encoder import encoder_pass
from models.encoder.attention import AttentionAtOnce
from models.errors import UserError
from models.language.captions import CaptionIds
from tests.training.step_fixture import emoji_run, step_inputs
from training.altered_captions import CaptionAlterer
from training.features import StepInputs
from training.loop import Run, optimizer_step
from training.losses import altered_captions_loss, contrastive_loss, text_recovery_loss
from training.objectives import ALTERED, Objectives, StepLosses

CPU = DistributedContext()


class Batches:
    """Gives the same inputs at every step, or those of a list."""

    def __init__(self, *inputs: StepInputs):
        self.inputs = list(inputs)

    def next(self) -> StepInputs:
        return self.inputs.pop(0) if len(self.inputs) > 1 else self.inputs[0]


def make_step(tmp_path, distributed: DistributedContext = CPU, dtype: torch.dtype = torch.float32):
    run, objectives = emoji_run(str(tmp_path), distributed, dtype)
    inputs = step_inputs(run.config, run.model.tokenizer, distributed.device)
    return run, objectives, inputs


class Operators(TorchDispatchMode):
    """Counts what is dispatched."""

    def __init__(self):
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        self.counts[str(operator)] += 1
        return operator(*args, **(kwargs or {}))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_step_dispatches_few_operators_and_reads_no_number_back(tmp_path, monkeypatch, dtype):
    """With the form of attention that a GPU has: each operator there is a launch, each number read a wait."""
    monkeypatch.setattr(encoder_pass, "sequence_attention", AttentionAtOnce)
    run, objectives, inputs = make_step(tmp_path, dtype=dtype)
    optimizer_step(run, Batches(inputs), objectives, 10.0)  # makes the optimizer's state
    with Operators() as operators:
        optimizer_step(run, Batches(inputs), objectives, 10.0)
    assert sum(operators.counts.values()) <= 3000
    assert not operators.counts["aten._local_scalar_dense.default"]


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_step_on_a_gpu_never_waits_for_it(tmp_path, dtype):
    distributed = DistributedContext(device=torch.device("cuda", 0))
    run, objectives, inputs = make_step(tmp_path, distributed, dtype)
    optimizer_step(run, Batches(inputs), objectives, 10.0)
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(3):
            optimizer_step(run, Batches(inputs), objectives, 10.0)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    run.guard.check()


@pytest.mark.gpu
def test_a_gpu_trains_to_the_losses_of_a_cpu(tmp_path):
    """Float32 without dropout, three steps. AdamW's first ones turn rounding of tiny gradients into whole steps."""
    curves = []
    for device in ("cpu", "cuda"):
        run, objectives, inputs = make_step(tmp_path, DistributedContext(device=torch.device(device)))
        run.model.encoder.config = without_dropout(run.model)
        curves.append(
            [
                {k: v.item() for k, v in optimizer_step(run, Batches(inputs), objectives, 10.0)[0][0].losses.items()}
                for _ in range(3)
            ]
        )
    for on_cpu, on_gpu in zip(*curves, strict=True):
        assert on_gpu == pytest.approx(on_cpu, rel=5e-3)


def without_dropout(model: EDJE):
    return replace(model.encoder.config, hidden_dropout=0.0, attention_dropout=0.0)


def separate_passes(model: EDJE, objectives: Objectives, inputs: StepInputs) -> dict[str, torch.Tensor]:
    """The same losses, each objective with an encoder pass of its own."""
    tokens, own, size = model.compress(inputs.patch_tokens), torch.arange(len(inputs.rows)), len(inputs.rows)
    scope = objectives.negatives.scope(inputs)
    pairs = objectives.negatives.choose(inputs, scope)
    logits = model.match_logits(inputs.captions, tokens, pairs.caption_index, pairs.image_index)
    captions = inputs.captions.truncate(model.max_joint_pieces)
    masked = objectives._draw_mask(captions, inputs.rows, model.tokenizer)
    ids = captions.ids.masked_fill(masked, model.tokenizer.mask_id)
    packed = model.encoder.pack_pairs(CaptionIds(ids, captions.lengths), tokens, own, own)
    words = model.encoder.mlm_logits(model.encoder.encode(packed, packed.caption_rows[masked]))
    words_alter = CaptionAlterer(objectives.config.altered_words, model.tokenizer, "objectives.altered_words")
    streams = [random_stream(objectives.seed, ALTERED, row) for row in inputs.rows.tolist()]
    altered, changed = words_alter(captions, streams)
    rows = changed.nonzero().flatten()
    true, false = (model.match_logits(c, tokens, rows, rows) for c in (captions, altered))
    texts, images = model.text_cls(inputs.captions), model.image_cls(tokens)
    scale = model.itc_logit_scale.exp().clamp(max=100)
    return {
        "itm": pairs.itm_loss(logits),
        "mlm": F.cross_entropy(words, captions.ids[masked]),
        "altered_captions": altered_captions_loss(true, false) / len(rows),
        "text_recovery": text_recovery_loss(model.recover_text_embedding(texts), inputs.text_embeddings),
        "itc": contrastive_loss(images, texts, images, texts, torch.arange(size), inputs.excluded, scale),
    }


def gradients(model: EDJE, losses: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    model.zero_grad()
    sum(losses.values()).backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("form", ["by length", "at once"])
def test_one_pass_gives_the_losses_and_gradients_of_separate_ones(tmp_path, monkeypatch, form):
    if form == "at once":
        monkeypatch.setattr(encoder_pass, "sequence_attention", AttentionAtOnce)
    run, _, inputs = make_step(tmp_path)
    model = run.model.eval()
    config = replace(
        run.config.objectives,
        text_recovery=1.0,
        altered_captions=1.0,
        altered_words=((("red",), ("blue",)), (("left",), ("right",))),
    )
    objectives = Objectives(config, run.config.negatives, run.config.seed, CPU)
    expected = separate_passes(model, objectives, inputs)
    found = objectives(model, inputs).losses
    assert set(found) == set(expected)
    for name, loss in expected.items():
        torch.testing.assert_close(found[name], loss, rtol=1e-5, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")
    of_one, of_many = gradients(model, found), gradients(model, expected)
    for name, gradient in of_many.items():
        torch.testing.assert_close(of_one[name], gradient, rtol=1e-4, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")


def snapshot(run: Run) -> dict[str, torch.Tensor]:
    state = {f"model.{name}": tensor.clone() for name, tensor in run.model.state_dict().items()}
    moments = [tensor.clone() for s in run.optimizer.state.values() for tensor in s.values()]
    return state | {f"optimizer.{i}": tensor for i, tensor in enumerate(moments)}


def unchanged(run: Run, before: dict[str, torch.Tensor]) -> bool:
    after = snapshot(run)
    return set(after) == set(before) and all(torch.equal(after[name], before[name]) for name in before)


def spoilt(inputs: StepInputs) -> StepInputs:
    patches = inputs.patch_tokens.clone()
    patches[3, 2, 1] = torch.nan
    return replace(inputs, patch_tokens=patches)


def test_a_loss_that_is_not_finite_changes_nothing_and_stops_the_run_a_step_later(tmp_path):
    run, objectives, inputs = make_step(tmp_path)
    batches = Batches(inputs, spoilt(inputs), inputs)
    optimizer_step(run, batches, objectives, 10.0)
    before = snapshot(run)
    optimizer_step(run, batches, objectives, 10.0)
    assert unchanged(run, before)
    with pytest.raises(UserError, match=r"step 1: the loss itm and mlm and itc is not finite; nothing was updated"):
        optimizer_step(run, batches, objectives, 10.0)
    assert unchanged(run, before)


class HugeGradient(Objectives):
    """A finite loss whose gradient overflows."""

    def __call__(self, model: EDJE, inputs: StepInputs) -> StepLosses:
        found = super().__call__(model, inputs)
        first = model.match_head.dense.weight.flatten()[0]
        return replace(found, total=found.total + (first - first.detach()) * torch.inf)


def test_a_gradient_that_is_not_finite_changes_nothing_and_stops_the_run_before_its_checkpoint(tmp_path):
    run, objectives, inputs = make_step(tmp_path)
    optimizer_step(run, Batches(inputs), objectives, 10.0)
    before = snapshot(run)
    broken = HugeGradient(objectives.config, run.config.negatives, run.config.seed, CPU)
    optimizer_step(run, Batches(inputs), broken, 10.0)
    assert unchanged(run, before)
    with pytest.raises(UserError, match=r"step 1: the gradient norm is (inf|nan); lower training.lr or use float32"):
        run.guard.check()
