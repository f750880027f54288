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


# Two of the stages, one on each annotation file: every further one starts the same process again.
STAGES = [f"configs/demo_pretraining/{name}.yaml" for name in ("1_align", "6_places")]


def demo(out: Path, *options: str) -> subprocess.CompletedProcess:
    environment = os.environ | {
        "EDJE_PYTHON": sys.executable,
        "OUT": str(out),
        "SHARED": str(out),
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


def test_the_demo_ends_with_its_table_and_a_second_start_skips_what_is_done(tmp_path):
    first = demo(tmp_path)
    assert first.returncode == 0, first.stderr[-3000:]
    results = json.loads((tmp_path / "results.json").read_text())
    assert (results["images"], results["captions"], results["split"]) == (12, 60, "test")
    assert {"embedding", "reranked", "fused"} <= results["t2i"].keys() & results["i2t"].keys()
    assert (tmp_path / "report.html").stat().st_size > 5000
    last_lines = "\n".join(first.stdout.splitlines()[-25:])
    assert "EDJE" in last_lines and "R@1" in last_lines and "report.html" in last_lines
    weights = tmp_path / "checkpoints" / "step-00000004" / "model.safetensors"
    written = weights.stat().st_mtime_ns
    # Pretraining is done, though the first start did without; the run that started from other weights is complete.
    second = demo(tmp_path, "--pretrain")
    assert second.returncode == 0, second.stderr[-3000:]
    assert weights.stat().st_mtime_ns == written
    repeated = json.loads((tmp_path / "results.json").read_text())
    assert repeated["t2i"] == results["t2i"] and repeated["i2t"] == results["i2t"]
    stages = [tmp_path / "pretrained" / Path(stage).stem for stage in STAGES]
    assert all((stage / "checkpoints" / "step-00000004" / "model.safetensors").is_file() for stage in stages)
    assert yaml.safe_load((stages[1] / "config.yaml").read_text())["model"]["init_from"] == str(stages[0])
    assert f"init_from: {stages[1]}" in (tmp_path / "config.yaml").read_text()
