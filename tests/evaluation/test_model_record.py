"""What is told about a model: its sizes, and from the configs of its runs what it was trained on."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from evaluation.model_record import benchmark_name, model_record, run_directory
from models.vision.backbones import Backbone
from tests.tiny_model import make_model


@pytest.fixture(scope="module")
def model(backbone: Backbone, tmp_path_factory):
    return make_model(backbone, tmp_path_factory.mktemp("model") / "vocab.txt")


def write_run(root: Path, name: str, annotations: str | list[str], **model: str) -> Path:
    (root / name / "checkpoints" / "step-1").mkdir(parents=True)
    config = {"data": {"annotations": annotations}, "model": model}
    (root / name / "config.yaml").write_text(yaml.safe_dump(config))
    return root / name


def test_sizes_are_those_of_the_model(model, tmp_path):
    record = model_record(model, tmp_path, "coco")
    assert (record.adapter, record.vision_tokens, record.bytes_per_image) == ("compression", 4, 4 * 16 * 2)
    assert (record.joint_layers, record.joint_width) == (2, 16)
    stored = model.encoder.state_dict(keep_vars=True).values()
    assert record.joint_parameters == sum({id(p): p.numel() for p in stored if p.requires_grad}.values())


@pytest.mark.parametrize(
    "dataset, setting",
    [
        ("flickr30k", "zero-shot"),
        ("data/flickr30k_test.json", "zero-shot"),
        ("data/coco_karpathy_test.json", "fine-tuned"),
    ],
)
def test_zero_shot_is_a_data_set_that_no_run_of_the_line_was_trained_on(model, tmp_path, dataset, setting):
    first = write_run(tmp_path, "first", ["lists/cc3m.json", "lists/vg.json"], encoder_weights="MiniLM")
    second = write_run(tmp_path, "second", "dataset_coco.json", init_from=str(first / "checkpoints" / "step-1"))
    record = model_record(model, second, dataset)
    assert record.trained_on == ["dataset_coco.json", "cc3m.json", "vg.json"]
    assert record.setting == setting and record.joint_encoder == "MiniLM"


def test_a_lost_config_makes_the_setting_unknown_unless_a_known_file_or_the_user_tells(model, tmp_path):
    run = write_run(tmp_path, "run", "dataset_coco.json", init_from=str(tmp_path / "lost"))
    assert model_record(model, run, "flickr30k").setting == "unknown"
    assert model_record(model, run, "coco").setting == "fine-tuned"
    assert model_record(model, run, "flickr30k", "zero-shot").setting == "zero-shot"
    assert model_record(model, tmp_path / "lost", "coco").trained_on == []


def test_runs_that_lead_back_to_each_other_end(model, tmp_path):
    run = write_run(tmp_path, "run", "a.json", init_from=str(tmp_path / "other"))
    write_run(tmp_path, "other", "b.json", init_from=str(run))
    assert model_record(model, run, "coco").trained_on == ["a.json", "b.json"]


def test_names_of_data_sets_and_runs(tmp_path):
    names = ["flickr30k", "x/dataset_flickr30k.json", "coco_karpathy_train.json", "coco/dataset_scenes.json"]
    assert list(map(benchmark_name, names)) == ["flickr30k", "flickr30k", "coco", "dataset_scenes.json"]
    assert run_directory("given", tmp_path / "checkpoints" / "step-1") == tmp_path
    assert run_directory("given", tmp_path / "alone") == Path("given")
