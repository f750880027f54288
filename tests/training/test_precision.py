"""One precision for a run: rank 0 decides, for training and for the validations within it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.processes import ROOT

ONE_RANK = """
import json, os, sys
from pathlib import Path
import torch
import train, training.features, training.loop

with_bfloat16, out = sys.argv.pop(1), Path(sys.argv.pop(1))
torch.cpu._is_avx512_bf16_supported = lambda: os.environ["RANK"] == with_bfloat16
evaluate, autocast, used = training.features.evaluate, training.loop._autocast, set()
training.features.evaluate = lambda *a, **o: used.add(f"validation {o.get('dtype')}") or evaluate(*a, **o)
training.loop._autocast = lambda run: used.add(f"training {run.dtype}") or autocast(run)
train.main()
(out / f"rank{os.environ['RANK']}.json").write_text(json.dumps(sorted(used)))
"""
"""train.py on a rank whose processor has bfloat16 or not, and the precisions that it used."""


@pytest.mark.parametrize(
    ("rank_with_bfloat16", "precision", "expected"),
    [(0, "auto", torch.bfloat16), (1, "auto", torch.float32), (1, "bfloat16", torch.bfloat16)],
)
def test_rank_0_decides_for_training_and_validation(
    run_config: Path,
    stores: tuple[Path, Path],
    tmp_path: Path,
    rank_with_bfloat16: int,
    precision: str,
    expected: torch.dtype,
):
    script = tmp_path / "one_rank.py"
    script.write_text(ONE_RANK)
    overrides = [f"data.store={stores[0]}", f"data.caption_store={stores[1]}", f"training.precision={precision}"]
    ended = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--standalone", script]
        + [str(rank_with_bfloat16), tmp_path, "--config", run_config, f"output={tmp_path / 'run'}"]
        + [*overrides, "training.steps=1", "data.val_split=val"],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )
    assert ended.returncode == 0, ended.stderr[-3000:]
    for rank in (0, 1):
        used = json.loads((tmp_path / f"rank{rank}.json").read_text())
        assert used == [f"training {expected}", f"validation {expected}"]
