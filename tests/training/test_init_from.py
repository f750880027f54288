"""Starting from a checkpoint: what it brings holds, and a setting that contradicts it is named."""

from pathlib import Path

import numpy as np
import pytest
import yaml

from data.caption_datasets import CaptionDataset, load_annotations
from data.neighbours import CaptionKeys
from models.checkpoints.checkpoint import read_config
from models.config import LocalConfig
from models.distributed import DistributedContext
from models.edje import EDJE
from models.errors import UserError
from models.vision.backbones import Backbone
from tests.processes import ROOT, run_script
from tests.tiny_model import make_model
from training.config import load_config
from training.features import BackboneFeatures
from training.setup import build_batches, build_model, refuse_contradictions

PRETRAINED = "configs/pretrained/scenes"


@pytest.fixture
def checkpoint(tmp_path: Path, backbone: Backbone) -> Path:
    """4 vision tokens of width 16, captions of up to 40 tokens."""
    model = make_model(backbone, tmp_path / "vocab.txt", max_caption_tokens=40)
    model.save_pretrained(tmp_path / "checkpoint")
    return tmp_path / "checkpoint"


def built_from(checkpoint: Path, run_config: Path, backbone: Backbone, *overrides: str, base: str = "") -> EDJE:
    """The model that training builds from `checkpoint` with a file, its base, and the command line."""
    file, inherited = run_config.with_name("start.yaml"), run_config.with_name("base.yaml")
    inherited.write_text(base)
    file.write_text(f"base: base.yaml\nmodel: {{init_from: {checkpoint}}}\n")
    config = load_config(file, overrides)
    features = BackboneFeatures(backbone)
    return build_model(
        config, features, CaptionDataset(Path(), [], [], np.zeros(0, np.int64), []), DistributedContext()
    )


CONTRADICTIONS = [
    ("model.max_caption_tokens", 64, 40),
    ("model.encoder.intermediate_size", 64, 32),
    ("model.encoder.num_layers", 4, 2),
    ("model.adapter.num_tokens", 8, 4),
    ("model.adapter.kind", "local", "compression"),
]


@pytest.mark.parametrize(("key", "wrong", "right"), CONTRADICTIONS)
def test_a_size_that_contradicts_the_checkpoint_is_named(checkpoint, run_config, backbone, key, wrong, right):
    """Given on the command line, or inherited from a base: both are explicit."""
    message = rf"checkpoint: {key} is {wrong}, the checkpoint's is {right}; drop the key"
    with pytest.raises(UserError, match=message):
        built_from(checkpoint, run_config, backbone, f"{key}={wrong}")
    section, name = key.removeprefix("model.").rpartition(".")[::2]
    inherited = f"{{{name}: {wrong}}}" if not section else f"{{{section}: {{{name}: {wrong}}}}}"
    with pytest.raises(UserError, match=message):
        built_from(checkpoint, run_config, backbone, base=f"model: {inherited}\n")
    assert built_from(checkpoint, run_config, backbone, f"{key}={right}").config.max_caption_tokens == 40


def test_defaults_contradict_nothing_and_another_adapter_may_differ(checkpoint, run_config, backbone):
    assert built_from(checkpoint, run_config, backbone).config.adapter.num_tokens == 4
    other = ["model.init_adapter=false", "model.adapter.num_tokens=2", "model.adapter.mlp_width=8"]
    other += ["model.adapter.num_heads=2", "model.encoder.max_positions=600", "model.encoder.hidden_dropout=0.3"]
    config = built_from(checkpoint, run_config, backbone, *other).config
    assert (config.adapter.num_tokens, config.encoder.max_positions, config.encoder.hidden_dropout) == (2, 600, 0.3)


def starts_from_the_committed_checkpoint(path: Path) -> bool:
    if "variants:" in path.read_text():  # a sweep
        return False
    return not {"pretrained", "embedders"} & {*path.parts} and load_config(path).model.init_from == PRETRAINED


def test_no_committed_config_contradicts_the_committed_checkpoint():
    """configs/demo.yaml and those above it inherit the sizes that the pretraining was given."""
    configs = [path for path in (ROOT / "configs").rglob("*.yaml") if starts_from_the_committed_checkpoint(path)]
    assert len(configs) >= 1
    source = read_config(ROOT / PRETRAINED)
    for path in configs:
        config = load_config(path)
        assert "model.encoder.hidden_size" in config.given
        brought = {"model": source, "model.encoder": source.encoder}
        if config.model.init_adapter:
            brought["model.adapter"] = source.adapter
        refuse_contradictions(config, brought, PRETRAINED)


def test_the_saved_configuration_of_a_run_tells_the_sizes_of_its_model(checkpoint, run_config, tmp_path):
    """So that training from a run's own config.yaml contradicts nothing."""
    out = tmp_path / "run"
    plain = yaml.safe_load(run_config.read_text())
    del plain["model"]
    file = tmp_path / "from_checkpoint.yaml"
    file.write_text(yaml.safe_dump(plain | {"model": {"init_from": str(checkpoint)}, "output": str(out)}))
    ended = run_script("train.py", "--config", file, "training.steps=1")
    assert ended.returncode == 0, ended.stderr[-2000:]
    saved = load_config(out / "config.yaml")
    assert (saved.model.adapter.num_tokens, saved.model.max_caption_tokens) == (4, 40)
    again = run_script("train.py", "--config", out / "config.yaml", "training.steps=1", f"output={tmp_path / 'again'}")
    assert again.returncode == 0, again.stderr[-2000:]


def test_a_setting_of_another_kind_of_adapter_than_the_checkpoints_is_named(tmp_path, run_config, backbone):
    make_model(backbone, tmp_path / "vocab.txt", adapter=LocalConfig(mlp_width=8)).save_pretrained(tmp_path / "local")
    with pytest.raises(UserError, match="model.adapter.num_blocks is given for another kind of adapter"):
        built_from(tmp_path / "local", run_config, backbone, "model.adapter.num_blocks=2")


def test_groups_that_a_ranks_rows_cannot_form_are_refused(scenes, run_config, backbone):
    groups = ["negatives.mode=groups", "negatives.group_size=4", "training.batch_size=12", "training.precision=float32"]
    config, features = load_config(run_config, groups), BackboneFeatures(backbone)
    dataset = load_annotations(scenes / "dataset_scenes.json", scenes, "train")
    build_batches(config, features, None, dataset, CaptionKeys(dataset), DistributedContext())
    with pytest.raises(UserError, match=r"each of 2 processes has 6 rows.*negatives.group_size \(4\) does not divide"):
        build_batches(config, features, None, dataset, CaptionKeys(dataset), DistributedContext(rank=1, size=2))


def test_a_run_without_any_objective_is_refused(run_config):
    with pytest.raises(UserError, match="the weights of all objectives are 0"):
        load_config(run_config, [f"objectives.{name}=0" for name in ("itm", "mlm", "text_recovery", "itc")])
