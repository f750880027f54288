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
    "objectives.align_steps=2",
    "negatives.group_size=4",
    "evaluation.k=5",
]


def demo(out: Path, shared: Path, *options: str) -> subprocess.CompletedProcess:
    environment = os.environ | {
        "EDJE_PYTHON": sys.executable,
        "OUT": str(out),
        "SHARED": str(shared),
        "SCENES": "--train 60 --val 12 --test 12",
    }
    return subprocess.run(
        ["bash", str(ROOT / "scripts" / "demo.sh"), *options, *SMALL],
        env=environment,
        capture_output=True,
        text=True,
        cwd="/",
    )


def test_the_demo_ends_with_its_table_a_second_start_only_evaluates_and_pretraining_is_an_option(tmp_path):
    first = demo(tmp_path / "demo", tmp_path / "shared")
    assert first.returncode == 0, first.stderr[-3000:]
    results = json.loads((tmp_path / "demo" / "results.json").read_text())
    assert (results["images"], results["captions"], results["split"]) == (12, 60, "test")
    assert {"embedding", "reranked", "fused"} <= results["t2i"].keys() & results["i2t"].keys()
    assert (tmp_path / "demo" / "report.html").stat().st_size > 5000
    last_lines = "\n".join(first.stdout.splitlines()[-25:])
    assert "EDJE" in last_lines and "R@1" in last_lines and "report.html" in last_lines
    weights = next((tmp_path / "demo" / "checkpoints").glob("step-00000004/model.safetensors")).stat().st_mtime_ns
    second = demo(tmp_path / "demo", tmp_path / "shared")
    assert second.returncode == 0, second.stderr[-3000:]
    again = next((tmp_path / "demo" / "checkpoints").glob("step-00000004/model.safetensors")).stat().st_mtime_ns
    assert again == weights
    repeated = json.loads((tmp_path / "demo" / "results.json").read_text())
    assert repeated["t2i"] == results["t2i"] and repeated["i2t"] == results["i2t"]
    pretrained = demo(tmp_path / "own", tmp_path / "shared", "--pretrain")
    assert pretrained.returncode == 0, pretrained.stderr[-3000:]
    assert (tmp_path / "shared" / "pretrained" / "checkpoints" / "step-00000004" / "model.safetensors").is_file()
    saved = yaml.safe_load((tmp_path / "own" / "config.yaml").read_text())
    assert saved["model"]["init_from"] == str(tmp_path / "shared" / "pretrained")
