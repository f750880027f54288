"""Configurations: inheritance, overrides, and errors that name key, file and remedy, and the reference of all keys."""

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from models.config_io import to_dict, type_name
from models.errors import UserError
from training.config import RunConfig, load_config, save_config
from training.config_reference import markdown, sections

ROOT = Path(__file__).parents[2]
CONFIGS = sorted(
    path
    for folder in (
        "configs",
        "configs/demo_pretraining",
        "configs/emoji_pretraining",
    )
    for path in (ROOT / folder).glob("*.yaml")
    if path.name not in ("ablations.yaml", "demo_ablations.yaml")  # sweeps: test_sweep.py
)


def write(path: Path, **content) -> Path:
    path.write_text(yaml.safe_dump(content))
    return path


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.name)
def test_every_config_loads(path):
    assert isinstance(load_config(path), RunConfig)


def test_a_file_overrides_its_base_key_by_key(tmp_path):
    write(tmp_path / "base.yaml", training={"lr": 1e-3, "steps": 7}, seed=1)
    child = write(tmp_path / "child.yaml", base="base.yaml", training={"lr": 2e-3})
    config = load_config(child, ["seed=9", "training.encoder_lr=3e-5", "data.root="])
    assert (config.training.lr, config.training.steps, config.seed) == (2e-3, 7, 9)
    assert config.training.encoder_lr == 3e-5 and config.data.root == ""


def test_a_saved_config_loads_to_the_same(tmp_path):
    config = load_config(
        write(tmp_path / "a.yaml", negatives={"mode": "groups"}),
        ["backbone.token_stages=[2, 3]", "backbone.token_grid=5"],
    )
    save_config(config, tmp_path / "saved.yaml")
    assert load_config(tmp_path / "saved.yaml") == config


@pytest.mark.parametrize(
    "overrides, words",
    [
        (["training.warmup_step=3"], ["unknown key 'training.warmup_step'", "did you mean 'training.warmup_steps'"]),
        (["trainin.lr=3"], ["unknown key 'trainin'", "'training'"]),
        (["training.steps=many"], ["'training.steps' is 'many'", "an integer"]),
        (["training.lr=[1]"], ["'training.lr' is [1]", "a number"]),
        (["training.steps=0"], ["training.steps is 0"]),
        (["training.decay=linear"], ["training.decay is 'linear'", "cosine"]),
        (["negatives.mode=groups", "negatives.group_size=7"], ["multiple of", "negatives.group_size (7)"]),
        (["negatives.per_positive=256"], ["negatives.per_positive is 256", "below"]),
        (["negatives.mode=groups", "negatives.pool=dataset"], ["needs", "data.store"]),
        (["objectives.distillation=1"], ["objectives.distillation is 1.0", "teacher"]),
        (["data.store=x"], ["data.caption_store"]),
        (["negatives.caption_store=x"], ["negatives.store"]),
        (["training.lr"], ["expected key=value"]),
        (["model.adapter.kind=mean"], ["adapter.kind is 'mean'", "compression"]),
        (["model.adapter.query_std=-1"], ["adapter.query_std is -1.0", "above 0"]),
        (["model.encoder.initializer_range=0"], ["encoder.initializer_range is 0.0", "above 0"]),
        (["model.encoder.initializer_range=.nan"], ["encoder.initializer_range is nan", "finite"]),
    ],
)  # fmt: skip
def test_a_wrong_value_is_one_line_that_names_it(tmp_path, overrides, words):
    file = write(tmp_path / "run.yaml", seed=1)
    with pytest.raises(UserError) as caught:
        load_config(file, overrides)
    assert "\n" not in str(caught.value)
    for word in words:
        assert word in str(caught.value)


def test_all_problems_are_reported_at_once(tmp_path):
    with pytest.raises(UserError, match="'seeed'.*'training.lr'"):
        load_config(write(tmp_path / "run.yaml", seeed=1, training={"lr": "fast"}))


def test_a_base_that_leads_back_is_refused(tmp_path):
    write(tmp_path / "a.yaml", base="b.yaml")
    write(tmp_path / "b.yaml", base="a.yaml")
    with pytest.raises(UserError, match="leads back"):
        load_config(tmp_path / "a.yaml")


def test_the_random_share_falls_linearly_to_its_floor(tmp_path):
    file = write(tmp_path / "run.yaml", negatives={"random_start": 1.0, "random_end": 0.2, "random_steps": 10})
    negatives = load_config(file).negatives
    assert [round(negatives.random_share(step), 3) for step in (0, 5, 10, 99)] == [1.0, 0.6, 0.2, 0.2]


def test_annotations_are_one_file_or_a_list_of_files(tmp_path):
    file = write(tmp_path / "a.yaml", data={"root": "pairs", "annotations": "cc3m.json"})
    one, several = load_config(file), load_config(file, ["data.annotations=[cc3m.json, /sbu.json]"])
    assert one.data.annotations == "cc3m.json" and one.data.annotation_files == [Path("pairs/cc3m.json")]
    assert several.data.annotation_files == [Path("pairs/cc3m.json"), Path("/sbu.json")]
    for config in (one, several):
        save_config(config, tmp_path / "saved.yaml")
        assert load_config(tmp_path / "saved.yaml") == config
    with pytest.raises(UserError, match="'data.annotations' is 3; expected"):
        load_config(file, ["data.annotations=3"])
    with pytest.raises(UserError, match="'data.annotations' is 3; expected"):
        load_config(file, ["data.annotations=[a.json, 3]"])


def test_the_reference_gives_every_key_its_meaning_type_and_default():
    keys = {key.name: key for section in sections(RunConfig()) for key in section.keys}
    assert set(keys) == set(flattened(to_dict(RunConfig())))
    assert [name for name, key in keys.items() if not key.meaning] == []
    assert keys["training.encoder_lr"].kind == "a number or null" and keys["training.encoder_lr"].default == "null"
    assert keys["training.steps"].meaning == "Optimizer steps." and keys["training.steps"].default == "1000"


def flattened(data: dict, prefix: str = "") -> Iterator[str]:
    for key, value in data.items():
        yield from flattened(value, f"{prefix}{key}.") if isinstance(value, dict) else [prefix + key]


def test_docs_config_md_is_current():
    assert (ROOT / "docs" / "config.md").read_text() == markdown(), (
        "run: python -m training.config_reference > docs/config.md"
    )


def test_train_py_help_lists_every_key():
    shown = subprocess.run([sys.executable, "train.py", "--help"], cwd=ROOT, check=True, capture_output=True, text=True)
    for section in sections(RunConfig()):
        for key in section.keys:
            assert f"  {key.name}: {key.kind} (default {key.default})\n" in shown.stdout


@pytest.mark.parametrize(
    ("hint", "words"),
    [
        (float | None, "a number or null"),
        (str | tuple[str, ...], "a string or a list of strings"),
        (tuple[tuple[str, ...], ...], "a list of lists of strings"),
    ],
)
def test_a_type_is_said_in_words(hint, words):
    assert type_name(hint) == words
