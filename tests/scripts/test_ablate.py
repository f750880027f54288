"""Ablations as a user runs them: every variant trained and evaluated once, what is done skipped, noise called noise."""

import json

import pytest
import yaml

from evaluation.ablations import difference
from evaluation.provenance import stamp
from models.errors import UserError
from scripts.ablate import main
from tests.processes import ROOT, run_script


@pytest.fixture
def sweep(run_config, tmp_path):
    """`started` starts from the first seed of `pooled`, and stands before it."""
    pooled = {"model": {"adapter": {"kind": "pooling"}}}
    started = {"like": "pooled", "model": {"init_from": "run:pooled/seed0"}}
    path = tmp_path / "sweep.yaml"
    variants = {"run": {}, "started": started, "pooled": pooled}
    path.write_text(yaml.safe_dump({"base": str(run_config), "variants": variants}, sort_keys=False))
    return path


def test_variants_are_trained_evaluated_and_compared_and_a_second_start_only_draws(sweep, stores, tmp_path):
    out = tmp_path / "ablations"
    command = ["scripts/ablate.py", sweep, "--only", "run,started", "--out", out]
    command += ["training.steps=2", f"data.store={stores[0]}", f"data.caption_store={stores[1]}"]
    done = run_script(*command)
    assert done.returncode == 0, done.stderr[-3000:]
    trained = [line.split()[3] for line in done.stdout.splitlines() if line.startswith("$ train.py")]
    assert sorted(trained) == sorted(f"{out / name}/config.yaml" for name in ("run", "pooled", "started"))
    assert trained.index(f"{out}/pooled/config.yaml") < trained.index(f"{out}/started/config.yaml")
    config = yaml.safe_load((out / "started" / "seed0" / "config.yaml").read_text())
    assert config["model"]["init_from"] == str(out / "pooled" / "seed0") and config["training"]["steps"] == 2
    entries = json.loads((out / "ablations.json").read_text())
    assert [(e["name"], e["vision_tokens"], e["bytes_per_image"]) for e in entries] == [
        ("run", 4, 4 * 32 * 2),
        ("started", 4, 4 * 32 * 2),
    ]
    assert entries[0]["trained_parameters"] > entries[1]["trained_parameters"]
    for entry in entries:
        measured = json.loads((out / entry["name"] / "seed0" / "results.json").read_text())
        assert entry["R@1"]["t2i"]["reranked"] == [measured["t2i"]["reranked"]["R@1"]]
        assert entry["R@1"]["i2t"]["embedding"] == [measured["i2t"]["embedding"]["R@1"]]
        assert entry["provenance"] == measured["provenance"]
    table, plot = (out / "ablations.md").read_text(), (out / "ablations.svg").read_text()
    assert table in done.stdout and table.count("\n") == 4
    assert all(plot.count(f">{entry['name']}<") == 2 for entry in entries)
    again = run_script(*command)
    assert again.returncode == 0 and "$ train.py" not in again.stdout
    assert (out / "ablations.md").read_text() == table
    timed = run_script(*command, "--time-again", "--plot", "started")
    assert timed.returncode == 0 and "$ train.py" not in timed.stdout
    plot = (out / "ablations.svg").read_text()
    assert ">started<" in plot and ">run<" not in plot and "| run " in (out / "ablations.md").read_text()
    for entry in json.loads((out / "ablations.json").read_text()):
        measured = json.loads((out / entry["name"] / "seed0" / "timed" / "results.json").read_text())
        assert entry["milliseconds_per_query"] == 1000 * measured["k"] / measured["pairs_per_second"]
    printed = run_script("scripts/ablate.py", "--table", out / "ablations.json", "--only", "started,run")
    assert printed.returncode == 0 and printed.stdout.splitlines()[2].startswith("| started ")

    # A variant that is another one now is not mixed with runs of the old one.
    changed = yaml.safe_load(sweep.read_text())
    changed["variants"]["run"] = {"training": {"lr": 0.5}}
    sweep.write_text(yaml.safe_dump(changed))
    refused = run_script(*command)
    assert refused.returncode == 2 and "variant run of" in refused.stderr and "choose another --out" in refused.stderr


def test_a_difference_within_twice_its_standard_error_is_noise():
    assert difference([82.0, 83.0, 81.0], [80.0, 82.5, 81.5]).endswith("(noise)")
    assert difference([90.0, 91.0, 90.5], [80.0, 81.0, 80.5]) == "+10.0 ± 0.8"
    assert difference([90.0], [80.0]) == "+10.0"


def test_a_record_gives_the_differences_from_any_of_its_variants_in_every_column(tmp_path, capsys):
    recalls = {"a": [80.0, 81.0], "b": [85.0, 86.0], "c": [80.0, 82.0]}
    sizes = dict.fromkeys(("vision_tokens", "bytes_per_image", "trained_parameters", "milliseconds_per_query"), 1)
    record = [
        {"name": name, "R@1": {"t2i": {"reranked": seeds, "fused": seeds}, "i2t": {"reranked": seeds}}}
        | {"seeds": [0, 1], "provenance": stamp().to_json(), **sizes}
        for name, seeds in recalls.items()
    ]
    (tmp_path / "ablations.json").write_text(json.dumps(record))
    main(["--table", str(tmp_path / "ablations.json"), "--against", "b"])
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in capsys.readouterr().out.splitlines()]
    assert lines[0] == ["against b", "T2I, match logit", "T2I, fused", "I2T, match logit"]
    assert lines[2:] == [["a", *3 * ["-5.0 ± 1.4"]], ["c", *3 * ["-4.5 ± 2.2"]]]
    main(["--table", str(tmp_path / "ablations.json"), "--against", "a", "c"])
    assert len(capsys.readouterr().out.splitlines()) == 3
    with pytest.raises(UserError, match="--against names d; the record has a, b, c"):
        main(["--table", str(tmp_path / "ablations.json"), "--against", "d"])


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["none.yaml"], "none.yaml"),
        (["training.steps=1"], "0 files given; give one sweep"),
        ([ROOT / "configs" / "demo.yaml"], "demo.yaml: unknown key"),
        ([ROOT / "configs" / "demo_ablations.yaml", "--only", "m16,m17"], "--only names m17; the variants are m16"),
        ([ROOT / "configs" / "demo_ablations.yaml", "--plot", "x"], "--plot names x; the variants are m16, local"),
        ([ROOT / "configs" / "demo_ablations.yaml", "--dataset", "coco"], "--dataset and --data-root go together"),
        (["--table", ROOT / "LICENSE"], "LICENSE: not an ablations.json"),
    ],
)
def test_without_a_sweep_of_these_variants_nothing_runs(tmp_path, arguments, words):
    done = run_script("scripts/ablate.py", *arguments, "--out", tmp_path / "out")
    assert done.returncode == 2 and words in done.stderr and "Traceback" not in done.stderr
    assert not (tmp_path / "out").exists()


def test_a_variant_that_fails_is_named(tmp_path):
    (tmp_path / "base.yaml").write_text("seed: 1\n")
    sweep = tmp_path / "sweep.yaml"
    sweep.write_text("base: base.yaml\nvariants: {broken: {training: {steps: 0}}}\n")
    done = run_script("scripts/ablate.py", sweep, "--out", tmp_path / "out")
    assert done.returncode == 2 and "training.steps is 0" in done.stderr
    assert f"{sweep}: variant broken: train.py ended with exit status 2" in done.stderr.splitlines()[-1]
