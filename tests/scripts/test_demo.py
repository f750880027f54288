"""The demo's own script, whole, on a few scenes: every step runs, a second start skips, the results are there."""

import json
import os
import subprocess
import sys
from pathlib import Path

import yaml

ROOT = Path(__file__).parents[2]
SMALL = [
    "training.steps=4",
    "training.batch_size=16",
    "training.checkpoint_every=2",
    "negatives.group_size=4",
    "evaluation.k=5",
]


# Two of the stages, one on each annotation file: every further one starts the same process again.
STAGES = [f"configs/demo_pretraining/{name}.yaml" for name in ("1_align", "6_places")]


def demo(out: Path, shared: Path, *options: str) -> subprocess.CompletedProcess:
    environment = os.environ | {
        "EDJE_PYTHON": sys.executable,
        "OUT": str(out),
        "SHARED": str(shared),
        "SCENES": "--train 60 --val 12 --test 12",
        "STAGES": " ".join(STAGES),
    }
    return subprocess.run(
        ["bash", str(ROOT / "scripts" / "demo.sh"), *options, *SMALL],
        env=environment,
        capture_output=True,
        text=True,
        cwd="/",
    )


def test_the_demo_ends_with_its_table_a_second_start_only_evaluates_and_pretraining_is_an_option(tmp_path):
    shared, out = tmp_path / "shared", tmp_path / "demo"
    first = demo(out, shared)
    assert first.returncode == 0, first.stderr[-3000:]
    results = json.loads((out / "results.json").read_text())
    assert (results["images"], results["captions"], results["split"]) == (12, 60, "test")
    assert {"embedding", "reranked", "fused"} <= results["t2i"].keys() & results["i2t"].keys()
    assert (out / "report.html").stat().st_size > 5000
    last_lines = "\n".join(first.stdout.splitlines()[-40:])
    assert "EDJE" in last_lines and "R@1" in last_lines and "report.html" in last_lines
    made = [out / "checkpoints" / "step-00000004" / "model.safetensors", shared / "scenes" / "dataset_scenes.json"]
    written = [file.stat().st_mtime_ns for file in made]
    second = demo(out, shared)
    assert second.returncode == 0, second.stderr[-3000:]
    assert [file.stat().st_mtime_ns for file in made] == written
    repeated = json.loads((out / "results.json").read_text())
    assert repeated["t2i"] == results["t2i"] and repeated["i2t"] == results["i2t"]
    pretrained = demo(tmp_path / "own", shared, "--pretrain")
    assert pretrained.returncode == 0, pretrained.stderr[-3000:]
    stages = [shared / "pretrained" / Path(stage).stem for stage in STAGES]
    assert all((stage / "checkpoints" / "step-00000004" / "model.safetensors").is_file() for stage in stages)
    starts = [
        yaml.safe_load((run / "config.yaml").read_text())["model"]["init_from"] for run in (*stages, tmp_path / "own")
    ]
    assert starts == ["", *map(str, stages)]
