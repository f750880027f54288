"""Sweeps: what a variant inherits, what comes first, and errors that name file and variant."""

from pathlib import Path

import pytest

from models.config_io import from_dict
from models.errors import UserError
from training.config import RunConfig, load_config
from training.sweep import read_sweep

CONFIGS = Path(__file__).parents[2] / "configs"
SWEEPS = {"ablations.yaml": "pretrain_siglip2_l16.yaml", "demo_ablations.yaml": "demo.yaml"}
"""And the config that each starts from."""
RUNS = Path("runs/ablations")


@pytest.mark.parametrize(
    ("name", "variant"), [(name, variant) for name in SWEEPS for variant in read_sweep(CONFIGS / name).variants]
)
def test_every_variant_is_a_run_over_its_base(name, variant):
    config = from_dict(RunConfig, read_sweep(CONFIGS / name).variants[variant].config(RUNS), where=variant)
    base = load_config(CONFIGS / SWEEPS[name])
    assert (config.backbone, config.data, config.seed) == (base.backbone, base.data, base.seed)


def sweep(tmp_path: Path, variants: str, base: str = "seed: 3\ntraining: {steps: 5, lr: 0.1}\n") -> Path:
    (tmp_path / "base.yaml").write_text(base)
    path = tmp_path / "sweep.yaml"
    path.write_text(f"base: base.yaml\nvariants: {variants}\n")
    return path


def test_a_variant_has_the_keys_of_those_that_it_is_like_and_of_the_base(tmp_path):
    found = read_sweep(sweep(tmp_path, "{c: {like: b, seed: 4}, b: {like: a, training: {lr: 0.2}}, a: {output: x}}"))
    assert list(found.variants) == ["c", "b", "a"]
    assert found.variants["c"].keys == {"seed": 4, "training": {"steps": 5, "lr": 0.2}, "output": "x"}
    assert found.variants["a"].keys == {"seed": 3, "training": {"steps": 5, "lr": 0.1}, "output": "x"}


def test_what_a_variant_starts_from_comes_first_with_its_seeds(tmp_path):
    variants = "{c: {model: {init_from: run:b/seed2}}, b: {objectives: {teacher: run:a/seed0}}, a: {}, d: {}}"
    found = read_sweep(sweep(tmp_path, variants))
    assert list(found.in_order(["c"]).items()) == [("a", {0}), ("b", {2}), ("c", set())]
    assert found.variants["c"].config(RUNS)["model"] == {"init_from": "runs/ablations/b/seed2"}
    demo = read_sweep(CONFIGS / "demo_ablations.yaml")
    order = list(demo.in_order(demo.variants))
    assert order.index("local") < order.index("m16") and set(order) == set(demo.variants)


@pytest.mark.parametrize(
    ("variants", "message"),
    [
        ("{a: {like: b}}", "variant a is like 'b'; expected another variant"),
        ("{a: {like: b}, b: {like: a}}", "and no circle"),
        ("{a: 3}", "variant a is 3; expected a mapping"),
        ("{../a: {}}", "the variant '../a' cannot name a folder"),
        ("{}", "not a sweep"),
        ("{a: {}}\nvariant: {}", "unknown key 'variant'; did you mean 'variants'"),
    ],
)
def test_a_sweep_that_makes_no_sense_is_named(tmp_path, variants, message):
    with pytest.raises(UserError, match=message) as caught:
        read_sweep(sweep(tmp_path, variants))
    assert "sweep.yaml: " in str(caught.value)


@pytest.mark.parametrize(
    ("variants", "message"),
    [
        ("{a: {teacher: run:b/seed0}}", "unknown key 'b'"),
        ("{a: {x: run:b/seed0}, b: {x: run:a/seed0}}", "variants start from each other: "),
    ],
)
def test_a_start_that_cannot_be_trained_is_named(tmp_path, variants, message):
    with pytest.raises(UserError, match=message):
        read_sweep(sweep(tmp_path, variants)).in_order(["a"])
