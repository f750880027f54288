"""Ablations as a user runs them: every config trained and evaluated once, what is done skipped, noise called noise."""

import json

import pytest
import yaml

from models.errors import UserError
from scripts.ablate import difference, main
from tests.processes import ROOT, run_script


def test_configs_are_trained_evaluated_and_compared_and_a_second_start_only_draws(run_config, stores, tmp_path):
    pooled = tmp_path / "pooled.yaml"
    pooled.write_text(yaml.safe_dump({"base": run_config.name, "model": {"adapter": {"kind": "pooling"}}}))
    out = tmp_path / "ablations"
    command = ["scripts/ablate.py", run_config, pooled, "--out", out]
    command += ["training.steps=2", f"data.store={stores[0]}", f"data.caption_store={stores[1]}"]
    done = run_script(*command)
    assert done.returncode == 0, done.stderr[-3000:]
    entries = json.loads((out / "ablations.json").read_text())
    assert [(e["name"], e["vision_tokens"], e["bytes_per_image"]) for e in entries] == [
        ("run", 4, 4 * 32 * 2),
        ("pooled", 4, 4 * 32 * 2),
    ]
    assert entries[0]["trained_parameters"] > entries[1]["trained_parameters"]
    for entry in entries:
        measured = json.loads((out / entry["name"] / "seed0" / "results.json").read_text())
        assert entry["R@1"]["t2i"]["reranked"] == [measured["t2i"]["reranked"]["R@1"]]
        assert entry["R@1"]["i2t"]["embedding"] == [measured["i2t"]["embedding"]["R@1"]]
    table, plot = (out / "ablations.md").read_text(), (out / "ablations.svg").read_text()
    assert table in done.stdout and table.count("\n") == 4
    assert all(plot.count(f">{entry['name']}<") == 2 for entry in entries)
    again = run_script(*command)
    assert again.returncode == 0 and "$ train.py" not in again.stdout
    assert (out / "ablations.md").read_text() == table
    timed = run_script(*command, "--time-again", "--plot", "pooled")
    assert timed.returncode == 0 and "$ train.py" not in timed.stdout
    plot = (out / "ablations.svg").read_text()
    assert ">pooled<" in plot and ">run<" not in plot and "| run " in (out / "ablations.md").read_text()
    for entry in json.loads((out / "ablations.json").read_text()):
        measured = json.loads((out / entry["name"] / "seed0" / "timed" / "results.json").read_text())
        assert entry["milliseconds_per_query"] == 1000 * measured["k"] / measured["pairs_per_second"]


def test_a_difference_within_twice_its_standard_error_is_noise():
    assert difference([82.0, 83.0, 81.0], [80.0, 82.5, 81.5]).endswith("(noise)")
    assert difference([90.0, 91.0, 90.5], [80.0, 81.0, 80.5]) == "+10.0 ± 0.8"
    assert difference([90.0], [80.0]) == "+10.0"


def test_a_record_gives_the_differences_from_any_of_its_configs_in_every_column(tmp_path, capsys):
    recalls = {"a": [80.0, 81.0], "b": [85.0, 86.0], "c": [80.0, 82.0]}
    record = [
        {"name": name, "R@1": {"t2i": {"reranked": seeds, "fused": seeds}, "i2t": {"reranked": seeds}}}
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
        (["training.steps=1"], "no config given"),
        ([ROOT / "configs" / "demo.yaml", "--plot", "m16"], "--plot names m16; the configs are demo"),
    ],
)
def test_without_configs_nothing_runs(tmp_path, arguments, words):
    done = run_script("scripts/ablate.py", *arguments, "--out", tmp_path / "out")
    assert done.returncode == 2 and words in done.stderr and "Traceback" not in done.stderr
    assert not (tmp_path / "out").exists()


def test_a_config_that_fails_is_named(tmp_path):
    config = tmp_path / "broken.yaml"
    config.write_text("training: {steps: 0}\n")
    done = run_script("scripts/ablate.py", config, "--out", tmp_path / "out")
    assert done.returncode == 2 and "training.steps is 0" in done.stderr
    assert f"{config}: train.py ended with exit status 2" in done.stderr.splitlines()[-1]
