"""The loop as a user runs it, train.py in its own process: resume is exact, kills lose nothing, errors are one line."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from models.edje import EDJE
from tests.processes import ROOT, run_script
from tests.shards import write_shards


def run(config: Path, *overrides: str, processes: int = 1) -> subprocess.CompletedProcess:
    if processes == 1:
        return run_script("train.py", "--config", config, *overrides)
    torchrun = ["torch.distributed.run", f"--nproc_per_node={processes}", "--master_port=0", "--standalone"]
    command = [sys.executable, "-m", *torchrun, ROOT / "train.py", "--config", config, *overrides]
    return subprocess.run(command, capture_output=True, text=True, cwd="/")


def train(config: Path, *overrides: str, processes: int = 1) -> None:
    done = run(config, *overrides, processes=processes)
    assert done.returncode == 0, done.stderr[-3000:]


def weights(output: Path) -> dict[str, torch.Tensor]:
    latest = (output / "checkpoints" / "LATEST").read_text().strip()
    return load_file(output / "checkpoints" / latest / "model.safetensors")


def losses(output: Path, name: str = "itm") -> list[float]:
    lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    return [line[name] for line in lines if name in line]


def assert_same_weights(a: Path, b: Path) -> None:
    first, second = weights(a), weights(b)
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


def stored(stores: tuple[Path, Path]) -> list[str]:
    return [f"data.store={stores[0]}", f"data.caption_store={stores[1]}"]


def test_ten_steps_resume_and_ten_are_twenty_straight(run_config, stores, tmp_path):
    """In float32 with dropout on, and across an epoch's end (48 images, 8 a step)."""
    shared = [*stored(stores), "training.checkpoint_every=10", "training.decay=exponential"]
    train(run_config, *shared, "training.steps=20", f"output={tmp_path / 'straight'}")
    train(run_config, *shared, "training.steps=10", f"output={tmp_path / 'halved'}")
    train(run_config, *shared, "training.steps=20", f"output={tmp_path / 'halved'}")
    assert_same_weights(tmp_path / "straight", tmp_path / "halved")
    assert losses(tmp_path / "straight") == losses(tmp_path / "halved")


def test_a_killed_run_ends_like_an_uninterrupted_one(run_config, stores, tmp_path):
    """SIGKILL between two steps, inside a save, and between a whole checkpoint and the pointer to it."""
    shared = [*stored(stores), "training.checkpoint_every=2", "training.steps=16"]
    train(run_config, *shared, f"output={tmp_path / 'straight'}")
    output = tmp_path / "killed"
    for kill_at in (("training.loop.optimizer_step", 4), ("torch.save", 2), ("training.loop.write_latest", 3)):
        arguments = ["--config", run_config, *shared, f"output={output}"]
        assert run_script("train.py", *arguments, kill_at=kill_at).returncode == -signal.SIGKILL
    train(run_config, *shared, f"output={output}")
    assert_same_weights(tmp_path / "straight", output)
    assert losses(tmp_path / "straight") == losses(output)


def test_stored_patch_tokens_train_like_images(run_config, stores, tmp_path):
    """Stores hold float16 tokens: the losses agree to its precision, with no backbone pass at all."""
    train(run_config, f"output={tmp_path / 'images'}")
    train(run_config, *stored(stores), "backbone.pretrained=", f"output={tmp_path / 'stored'}")
    for name in ("itm", "mlm", "itc", "text_recovery"):
        first, second = losses(tmp_path / "images", name), losses(tmp_path / "stored", name)
        assert first == pytest.approx(second, rel=2e-3), name


ALTERED = ["objectives.altered_captions=0.5", "objectives.altered_words=[[[left],[right]],[[red],[blue]]]"]
NO_DROPOUT = ["model.encoder.hidden_dropout=0", "model.encoder.attention_dropout=0"]


@pytest.mark.parametrize(
    "variant",
    [
        ["negatives.per_positive=2", "negatives.random_end=0.3", "negatives.store={0}", "negatives.caption_store={1}"],
        ["negatives.mode=groups", "negatives.group_size=4", "negatives.pool=batch", *ALTERED],
        ["negatives.mode=groups", "negatives.group_size=4", "negatives.pool=dataset", "training.accumulation=2"],
    ],
    ids=["pairs", "groups", "dataset-groups"],
)
def test_two_ranks_train_to_the_loss_curve_of_one_process(run_config, stores, tmp_path, variant):
    """Per-step losses of a real two-process gloo run, uneven numbers of masked words included."""
    variant = [option.format(*stores) for option in variant]
    shared = [*stored(stores), *NO_DROPOUT, *variant, "training.steps=20", "training.batch_size=16"]
    train(run_config, *shared, f"output={tmp_path / 'one'}")
    train(run_config, *shared, f"output={tmp_path / 'two'}", processes=2)
    names = ["itm", "mlm", "itc", "text_recovery", "grad_norm"]
    for name in [*names, "altered_captions"] if ALTERED[0] in variant else names:
        assert losses(tmp_path / "two", name) == pytest.approx(losses(tmp_path / "one", name), rel=1e-4), name


@pytest.mark.parametrize(
    "overrides, message",
    [
        (["objectives.mlm_words=[[red,zyx]]"], "objectives.mlm_words: zyx is no whole word"),
        (["objectives.altered_captions=1", "objectives.altered_words=[[[red]]]"], "has no other meaning to change to"),
    ],
)
def test_words_that_cannot_be_used_end_a_run_before_it_begins(run_config, tmp_path, overrides, message):
    done = run(run_config, *overrides)
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert f"error: {overrides[-1].split('=')[0]}: " in done.stderr
    assert message in done.stderr and not (tmp_path / "run" / "config.yaml").exists()


def test_images_train_in_groups_that_another_retrievers_stores_form(run_config, stores, tmp_path):
    """Here the retriever is the backbone itself, so the groups are those of its own stores."""
    groups = ["negatives.mode=groups", "negatives.group_size=4", "negatives.pool=dataset", "training.steps=3"]
    retriever = [f"negatives.store={stores[0]}", f"negatives.caption_store={stores[1]}"]
    train(run_config, *groups, *retriever, f"output={tmp_path / 'images'}")
    train(run_config, *groups, *stored(stores), f"output={tmp_path / 'stored'}")
    assert losses(tmp_path / "images") == pytest.approx(losses(tmp_path / "stored"), rel=2e-3)


def test_a_frozen_adapter_stays_bit_for_bit(run_config, stores, tmp_path):
    shared = [*stored(stores), "training.steps=2"]
    train(run_config, *shared)
    before = tmp_path / "run"
    train(
        run_config, *shared, f"model.init_from={before}", "training.freeze_adapter=true", f"output={tmp_path / 'fine'}"
    )
    first, second = weights(before), weights(tmp_path / "fine")
    adapter = [name for name in first if name.startswith("adapter.")]
    assert adapter and all(torch.equal(first[name], second[name]) for name in adapter)
    assert any(not torch.equal(first[name], second[name]) for name in first)


def test_a_local_model_trains_without_teacher_and_teaches_a_compressed_one(run_config, stores, tmp_path):
    local = tmp_path / "local"
    train(run_config, *stored(stores), "model.adapter.kind=local", "training.steps=3", f"output={local}")
    student = [f"model.init_from={local}", "model.init_adapter=false", "model.adapter.num_tokens=2"]
    train(
        run_config, *stored(stores), *student, "training.steps=3", "objectives.distillation=1",
        f"objectives.teacher={local}", "data.val_split=val", f"output={tmp_path / 'student'}",
    )  # fmt: skip
    assert len(losses(tmp_path / "student", "distillation")) == 3
    assert weights(tmp_path / "student")["adapter.query"].shape == (1, 2, 32)
    assert losses(tmp_path / "student", "val/t2i/reranked/R@10")  # a validation ran at the end
    chosen = EDJE.from_pretrained(tmp_path / "student").config
    assert chosen.fusion_lambda is not None and chosen.fusion_split == "val"
    assert chosen.probability_scale is not None and chosen.probability_offset is not None


def test_a_resumed_run_keeps_what_its_last_validation_fitted(run_config, stores, tmp_path):
    train(run_config, *stored(stores), "training.steps=1", "data.val_split=val")
    validated = EDJE.from_pretrained(tmp_path / "run").config
    train(run_config, *stored(stores), "training.steps=2")  # without a validation split
    resumed = EDJE.from_pretrained(tmp_path / "run").config
    assert validated.probability_scale is not None and resumed == validated


def test_a_checkpoint_without_residual_similarity_starts_from_the_sum_and_one_with_it_keeps_its_weight(
    run_config, stores, tmp_path
):
    """At a learning rate of 0: the weights are those that training starts from."""
    still = [*stored(stores), "training.steps=1", "training.lr=0", "training.warmup_lr=0", "training.min_lr=0"]
    train(run_config, *still, f"output={tmp_path / 'plain'}")
    for name, start, weight in (("added", "plain", 20), ("kept", "added", 3)):
        options = [f"model.init_from={tmp_path / start}", f"model.residual_similarity={weight}"]
        train(run_config, *still, *options, f"output={tmp_path / name}")
    plain, added, kept = (EDJE.from_pretrained(tmp_path / name) for name in ("plain", "added", "kept"))
    assert [m.config.residual_similarity for m in (plain, added, kept)] == [0, 20, 20]
    tokens, cosines = torch.randn(2, 4, 32), torch.tensor([0.1, 0.9])
    logits = plain.score(["a red ball", "a cube"], tokens)
    for model in (added, kept):
        scores = model.score(["a red ball", "a cube"], tokens, cosines)
        torch.testing.assert_close(scores, logits + 20 * cosines)


def refused(config: Path, *overrides: str) -> str:
    """The one line on which a run ends that cannot be."""
    done = run(config, *overrides)
    lines = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert done.returncode == 2 and len(lines) == 1 and "Traceback" not in done.stderr, done.stderr[-3000:]
    return lines[0]


def test_a_loss_that_is_not_finite_stops_the_run_before_anything_moves(run_config, stores, tmp_path):
    shared = [*stored(stores), "training.checkpoint_every=1"]
    train(run_config, *shared, "training.steps=1")
    before = weights(tmp_path / "run")
    line = refused(run_config, *shared, "training.lr=1e30", "training.warmup_steps=0", "training.steps=9")
    assert "step 2" in line and "not finite" in line and ("itm" in line or "mlm" in line)
    assert set(weights(tmp_path / "run")) == set(before)


def test_too_many_unreadable_images_stop_the_run_and_few_are_listed(run_config, scenes, tmp_path):
    shutil.copytree(scenes, tmp_path / "data")
    images = sorted((tmp_path / "data" / "images" / "train").iterdir())
    images[0].write_bytes(b"no image")
    few = run(run_config, f"data.root={tmp_path / 'data'}", "data.max_unreadable=0.1", f"output={tmp_path / 'few'}")
    assert few.returncode == 0, few.stderr[-2000:]
    assert "1 images could not be read" in few.stdout + few.stderr and images[0].name in few.stdout + few.stderr
    for image in images[:6]:
        image.write_bytes(b"no image")
    line = refused(run_config, f"data.root={tmp_path / 'data'}", f"output={tmp_path / 'many'}")
    assert "data.max_unreadable" in line and "images/train" in line


def test_a_run_from_shards_resumes_to_the_weights_of_an_uninterrupted_one(run_config, tmp_path):
    """20 images, 8 a step: the first three steps end in the middle of the second epoch, all six in the third."""
    write_shards(tmp_path / "cc", [7, 3, 6, 4])
    shards = ["data.annotations=", f"data.root={tmp_path}", "data.shards=cc/{00000..00003}.tar"]
    shared = [*shards, "training.decay=exponential"]
    train(run_config, *shared, "data.num_workers=1", "training.steps=6", f"output={tmp_path / 'straight'}")
    for steps in (3, 6):
        train(run_config, *shared, f"training.steps={steps}", f"output={tmp_path / 'halved'}")
    assert_same_weights(tmp_path / "straight", tmp_path / "halved")


def test_a_store_of_another_backbone_and_a_damaged_checkpoint_are_refused(run_config, stores, tmp_path):
    train(run_config, *stored(stores), "training.steps=1")
    state = next((tmp_path / "run" / "checkpoints").glob("step-*/training_state.pt"))
    state.write_bytes(state.read_bytes()[:200])
    assert "training_state.pt" in refused(run_config, *stored(stores), "training.steps=2")
    line = refused(run_config, *stored(stores), "training.resume=never")
    assert "training.resume" in line
    other = shutil.copytree(stores[0], tmp_path / "other")
    manifest = json.loads((other / "manifest.json").read_text())
    (other / "manifest.json").write_text(json.dumps(manifest | {"backbone": "another"}))
    assert "another" in refused(run_config, f"data.store={other}", f"data.caption_store={stores[1]}")
