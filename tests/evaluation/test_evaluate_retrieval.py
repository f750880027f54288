"""The evaluation command as a user runs it: its files, its table, its errors, one process and several."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

from data.caption_datasets import load_annotations
from evaluation.calibration import Calibration
from evaluation.evaluate_retrieval import main, moved
from evaluation.output import read_rankings
from models.checkpoints.checkpoint import read_config, write_config, write_latest
from models.config import BackboneConfig, CompressionConfig, EDJEConfig, EncoderConfig
from models.edje import EDJE
from models.errors import UserError
from models.language.captions import CaptionTokenizer, build_vocabulary
from models.vision.backbones import Backbone
from tests.processes import ROOT, run_script

SCRIPT = "evaluation/evaluate_retrieval.py"
GAIN_KEYS = {"helped", "hurt", "gain_R@1_ci95"}
DIRECTION_KEYS = {"embedding", "reranked", "pool_ceiling"} | GAIN_KEYS
FUSED_KEYS = {"fused"} | {f"fused_{key}" for key in GAIN_KEYS}


@pytest.fixture(scope="module")
def run(tmp_path_factory, backbone: Backbone, annotations: Path, scenes: Path) -> Path:
    """A run directory as training leaves it: config.yaml, metrics.jsonl, one checkpoint and LATEST."""
    run = tmp_path_factory.mktemp("run")
    captions = load_annotations(annotations, scenes, "train").captions
    build_vocabulary(captions, run / "vocab.txt")
    tokenizer = CaptionTokenizer.from_pretrained(run / "vocab.txt")
    sizes = {"hidden_size": 16, "num_layers": 2, "num_heads": 2, "intermediate_size": 32}
    config = EDJEConfig(
        backbone=backbone.config,
        dims=backbone.dims,
        backbone_fingerprint=backbone.fingerprint,
        adapter=CompressionConfig(num_tokens=4, mlp_width=16, num_heads=2),
        encoder=EncoderConfig(vocab_size=tokenizer.vocab_size, **sizes),
    )
    torch.manual_seed(0)
    model = EDJE(config, tokenizer)
    for parameter in model.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.3)
    model.save_pretrained(run / "checkpoints" / "step-00000007")
    write_latest(run / "checkpoints", "step-00000007")
    data = {"root": str(scenes), "annotations": annotations.name}
    (run / "config.yaml").write_text(yaml.safe_dump({"data": data}))
    (run / "metrics.jsonl").write_text('{"step": 1, "itm": 2.0}\n{"step": 2, "itm": 1.5}\n{"step": 3, "it')
    return run


def evaluate(*arguments: str | Path) -> None:
    main([str(argument) for argument in arguments])


def read(out: Path) -> dict:
    return json.loads((out / "results.json").read_text())


def test_a_runs_own_data_is_evaluated_and_every_file_written(run, tmp_path, capsys, annotations):
    evaluate("--checkpoint", run, "--out", tmp_path)
    summary = read(tmp_path)
    assert (summary["dataset"], summary["split"], summary["k"]) == (str(annotations), "test", 10)
    assert (summary["images"], summary["captions"]) == (12, 60)
    assert summary["checkpoint"] == str(run / "checkpoints" / "step-00000007")
    assert set(summary["seconds"]) == {"backbone", "compress", "rerank"} and summary["pairs_per_second"] > 0
    for direction in ("t2i", "i2t"):
        part = summary[direction]
        assert set(part) == DIRECTION_KEYS
        assert set(part["embedding"]) == set(part["reranked"]) == {"R@1", "R@5", "R@10", "median_rank"}
        assert 0 <= part["embedding"]["R@1"] <= part["pool_ceiling"] <= 100
        assert len(part["gain_R@1_ci95"]) == 2
    printed = capsys.readouterr().out
    assert summary["model"]["trained_on"] == [annotations.name] and summary["model"]["setting"] == "fine-tuned"
    assert (
        "EDJE by the match logit alone" in printed
        and "embedding alone" in printed
        and "text to image" in printed
        and str(tmp_path / "report.html") in printed
    )
    assert {path.name for path in tmp_path.iterdir()} == {
        "results.json",
        "results.md",
        "report.html",
        "rankings.npz",
        *(f"qrels.{direction}.trec" for direction in ("t2i", "i2t")),
        *(f"run.{direction}.{column}.trec" for direction in ("t2i", "i2t") for column in ("embedding", "reranked")),
    }
    assert "Training" in (tmp_path / "report.html").read_text()
    assert read(tmp_path)["provenance"]["machine"]["cores"] == os.cpu_count()


def test_without_out_the_results_lie_in_the_run(run):
    evaluate("--checkpoint", run / "checkpoints" / "step-00000007", "--split", "val", "--k", "3")
    assert read(run / "evaluation-dataset_scenes-val")["k"] == 3


def test_folds_are_told_and_have_a_folder_of_their_own(run):
    evaluate("--checkpoint", run, "--split", "train", "--folds", "4")
    out = run / "evaluation-dataset_scenes-train-4-folds"
    assert read(out)["folds"] == 4
    assert read_rankings(out / "rankings.npz")[0].figures().to_json() | read(out) == read(out)


def test_subsets_of_the_file_are_reported_one_by_one(run, tmp_path, scenes, annotations):
    evaluate("--checkpoint", run, "--out", tmp_path, "--dataset", annotations, "--data-root", scenes)
    expected = set(load_annotations(annotations, scenes, "test").subsets)
    subsets = read(tmp_path)["subsets"]
    assert set(subsets) == expected
    assert all(set(part[direction]) == DIRECTION_KEYS for part in subsets.values() for direction in ("t2i", "i2t"))


def test_lambda_and_calibration_of_a_validation_split_are_saved_and_used_from_then_on(run, tmp_path, capsys):
    checkpoint = run / "checkpoints" / "step-00000007"
    before = read_config(checkpoint)
    evaluate("--checkpoint", run, "--out", tmp_path / "a", "--lambda-split", "val")
    fitted = read_config(checkpoint)
    chosen = fitted.fusion_lambda
    evaluate("--checkpoint", run, "--out", tmp_path / "b")
    write_config(checkpoint, before)
    assert before.fusion_lambda is None
    printed = capsys.readouterr().out
    assert f"lambda {chosen:g}, probability = sigmoid({fitted.probability_scale:.4g} * score " in printed
    calibration = Calibration.of(fitted)
    for out in ("a", "b"):
        part = read(tmp_path / out)["t2i"]
        assert set(part) == DIRECTION_KEYS | FUSED_KEYS | {"calibration"} and part["fused"]["lambda"] == chosen
        assert set(part["calibration"]) == {"ece_before", "ece_after", "brier_before", "brier_after", "split"}
        assert part["calibration"]["split"] == "val"
        text, page = ((tmp_path / out / name).read_text() for name in ("results.md", "report.html"))
        assert f"λ = {chosen:g} from split val." in text
        assert f"{part['calibration']['ece_after']:.3f}" in text and "text-to-image pools of split val" in text
        assert "Text to image: reliability" in page
        results, _ = read_rankings(tmp_path / out / "rankings.npz")
        assert results.t2i.calibration == results.i2t.calibration == calibration


def test_a_checkpoint_without_calibration_has_none_in_any_file(run, tmp_path):
    evaluate("--checkpoint", run, "--out", tmp_path)
    summary = read(tmp_path)
    parts = [summary, *summary["subsets"].values()]
    assert all("calibration" not in part[direction] for part in parts for direction in ("t2i", "i2t"))
    assert "ECE" not in (tmp_path / "results.md").read_text()
    assert "reliability" not in (tmp_path / "report.html").read_text()
    assert read_rankings(tmp_path / "rankings.npz")[0].t2i.calibration is None


@pytest.mark.parametrize(("split", "other"), [("test", "test"), ("train", "restval"), ("restval", "train")])
def test_lambda_is_never_chosen_on_the_split_that_is_evaluated(run, tmp_path, split, other):
    config = run / "checkpoints" / "step-00000007" / "config.yaml"
    before = config.read_bytes()
    ended = run_script(
        SCRIPT, "--checkpoint", run, "--split", split, "--lambda-split", other, "--out", tmp_path / "out"
    )
    assert ended.returncode == 2 and len(ended.stderr.splitlines()) == 1
    assert f"error: --lambda-split {other} would choose lambda on images of --split {split}" in ended.stderr
    assert config.read_bytes() == before and not (tmp_path / "out").exists()


def test_stores_named_by_the_run_stand_for_images_and_backbone(run, tmp_path, scenes, annotations, stores):
    data = {
        "root": str(scenes),
        "annotations": annotations.name,
        "store": str(stores[0]),
        "caption_store": str(stores[1]),
    }
    from_stores = tmp_path / "run"
    from_stores.mkdir()
    (from_stores / "checkpoints").symlink_to(run / "checkpoints")
    (from_stores / "config.yaml").write_text(yaml.safe_dump({"data": data}))
    evaluate("--checkpoint", from_stores, "--out", tmp_path / "a", "--precision", "float32")
    evaluate("--checkpoint", run, "--out", tmp_path / "b", "--precision", "float32")
    a, b = read(tmp_path / "a"), read(tmp_path / "b")
    assert a["t2i"]["embedding"] == b["t2i"]["embedding"] and a["seconds"]["backbone"] == 0.0


def launch(processes: int, *arguments: str | Path) -> subprocess.CompletedProcess:
    torchrun = ["torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    command = [sys.executable, "-m", *torchrun, SCRIPT, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT)


@pytest.mark.parametrize("processes", [2, 3])
def test_rankings_are_bit_identical_for_any_number_of_processes(run, tmp_path, processes):
    """48 images in 2 blocks, 2,400 + 480 pairs in 19 + 4 micro-batches: neither divides among 2 or 3 ranks."""
    evaluate("--checkpoint", run, "--split", "train", "--out", tmp_path / "one")
    ended = launch(processes, "--checkpoint", run, "--split", "train", "--out", tmp_path / "many")
    assert ended.returncode == 0, ended.stderr
    one, many = (read_rankings(tmp_path / name / "rankings.npz")[0] for name in ("one", "many"))
    for ours, theirs in ((many.t2i, one.t2i), (many.i2t, one.i2t)):
        for name in ("candidates", "similarities", "logits"):
            np.testing.assert_array_equal(getattr(ours, name), getattr(theirs, name))


def test_bad_input_ends_in_one_line_and_exit_code_2(run, tmp_path):
    ended = run_script(SCRIPT, "--checkpoint", run, "--k", 13, "--out", tmp_path / "out")
    assert ended.returncode == 2 and "Traceback" not in ended.stderr
    assert ended.stderr.strip().splitlines()[-1].startswith("error: k is 13, but the gallery has 12 images")
    assert not (tmp_path / "out").exists()


def test_a_benchmarks_name_is_refused_for_a_split_of_another_size(run, scenes, annotations, tmp_path):
    (tmp_path / "dataset_flickr30k.json").write_bytes(annotations.read_bytes())
    (tmp_path / "images").symlink_to(scenes / "images")
    with pytest.raises(UserError, match=r"12 images and 60 captions, Flickr30k's has 1,000 and 5,000"):
        evaluate("--checkpoint", run, "--dataset", "flickr30k", "--data-root", tmp_path)


def test_figures_by_cocos_extended_ground_truth_are_refused_for_other_data(run, tmp_path):
    ended = run_script(SCRIPT, "--checkpoint", run, "--eccv", "--out", tmp_path / "out")
    assert ended.returncode == 2 and "dataset_scenes.json: names no COCO image and caption numbers" in ended.stderr
    assert not (tmp_path / "out").exists()


def test_lists_are_never_taken_for_a_split_that_they_are_not(run, scenes, annotations, tmp_path):
    """A list is one split: a run's own is what it was trained on, and lambda must not be chosen on the test list."""
    dataset = load_annotations(annotations, scenes, "test")
    rows = [
        {"image": dataset.image_ids[image], "caption": dataset.captions[i]}
        for i, image in enumerate(dataset.caption_image)
    ]
    (tmp_path / "test.json").write_text(json.dumps(rows))
    from_lists = tmp_path / "run"
    from_lists.mkdir()
    (from_lists / "checkpoints").symlink_to(run / "checkpoints")
    for annotation in (str(tmp_path / "test.json"), ["a.json", "b.json"]):
        data = {"root": str(scenes), "annotations": annotation}
        (from_lists / "config.yaml").write_text(yaml.safe_dump({"data": data}))
        with pytest.raises(UserError, match="annotations are one split, what it was trained on; pass --dataset"):
            evaluate("--checkpoint", from_lists)
    arguments = [
        "--checkpoint",
        run,
        "--dataset",
        tmp_path / "test.json",
        "--data-root",
        scenes,
        "--out",
        tmp_path / "out",
    ]
    with pytest.raises(UserError, match="test.json: is one split, so --lambda-split"):
        evaluate(*arguments, "--lambda-split", "val")
    evaluate(*arguments)
    assert read(tmp_path / "out")["captions"] == 60
    (tmp_path / "test.json").write_text(json.dumps(rows + rows[:1]))
    with pytest.raises(UserError, match="test.json: image .* in two rows"):
        evaluate(*arguments)


def test_a_missing_image_is_named_before_anything_is_computed(run, annotations, tmp_path):
    with pytest.raises(UserError, match=r"no such image, or an empty file; 12 of the 12 images"):
        evaluate("--checkpoint", run, "--dataset", annotations, "--data-root", tmp_path)


def test_a_data_set_needs_its_root(run, annotations):
    with pytest.raises(UserError, match="needs --data-root"):
        evaluate("--checkpoint", run, "--dataset", annotations)


def test_a_checkpoint_without_a_run_needs_a_data_set(run, tmp_path):
    (tmp_path / "alone").symlink_to(run / "checkpoints" / "step-00000007")
    with pytest.raises(UserError, match="pass --dataset"):
        evaluate("--checkpoint", tmp_path / "alone")


def test_another_backbone_is_refused(run, tmp_path, annotations, scenes):
    config = replace(read_config(run / "checkpoints" / "step-00000007"), backbone_fingerprint="vit/another")
    other = tmp_path / "other"
    other.mkdir()
    for name in ("model.safetensors", "tokenizer.json"):
        (other / name).symlink_to(run / "checkpoints" / "step-00000007" / name)
    write_config(other, config)
    with pytest.raises(UserError, match="trained with backbone vit/another, this one is open_clip/"):
        evaluate("--checkpoint", other, "--dataset", annotations, "--data-root", scenes)


@pytest.mark.parametrize("named", [("ViT-B-32", "openai"), ("google/siglip2-large-patch16-384", "")])
def test_a_backbone_that_moved_into_a_folder_is_loaded_from_it(backbone, named):
    """The folder names its architecture itself, and a name beside it would be refused."""
    config = moved(BackboneConfig(name=named[0], pretrained=named[1]), backbone.config.pretrained)
    assert Backbone.load(config).fingerprint == backbone.fingerprint
    assert moved(BackboneConfig(name=named[0], pretrained=named[1]), "weights.pt").name == named[0]
