"""Exporting a run: half the bytes, nothing of the run's machine, scores that agree with the run's own."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml
from huggingface_hub import ModelCard
from safetensors.torch import load_file

from models.checkpoints.checkpoint import CARD_FILE, read_config, write_config, write_fusion, write_latest
from models.checkpoints.hub import upload_checkpoint
from models.config import BackboneConfig
from models.edje import EDJE
from models.errors import UserError
from models.reranker import Reranker
from models.vision.backbones import Backbone
from scripts.export_checkpoint import export_checkpoint
from tests.processes import ROOT, run_script
from tests.tiny_model import CAPTIONS, make_model, write_backbone


@pytest.fixture
def run(tmp_path) -> Path:
    """A run directory whose newest checkpoint names a backbone by its absolute path."""
    backbone = Backbone.load(write_backbone(tmp_path / "clip"), torch.device("cpu"))
    checkpoints = tmp_path / "run" / "checkpoints"
    make_model(backbone, tmp_path / "vocab.txt").save_pretrained(checkpoints / "step-00000002")
    (checkpoints / "step-00000002" / "training_state.pt").write_bytes(b"optimizer")
    write_latest(checkpoints, "step-00000002")
    return tmp_path / "run"


def test_the_copy_is_half_as_large_and_scores_as_the_run_does(tmp_path, run):
    source = export_checkpoint(run, tmp_path / "shared" / "tiny", "clips/tiny")
    assert source.name == "step-00000002"
    state = load_file(tmp_path / "shared" / "tiny" / "model.safetensors")
    assert {tensor.dtype for tensor in state.values()} == {torch.float16}
    copy, original = EDJE.from_pretrained(tmp_path / "shared" / "tiny"), EDJE.from_pretrained(run)
    assert copy.config.backbone.pretrained == "clips/tiny"
    assert next(copy.parameters()).dtype == torch.float32
    patches = torch.randn(len(CAPTIONS), 16, 32, generator=torch.Generator().manual_seed(0))
    ours, theirs = (m.score(CAPTIONS, m.compress(patches).detach()) for m in (copy, original))
    assert not torch.equal(ours, theirs)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=0.02 * theirs.abs().max().item())


def write_results(file: Path, checkpoint: str, r1: float) -> Path:
    """The figures of a real evaluation, under the name of another checkpoint."""
    results = json.loads((ROOT / "benchmarks" / "results" / "demo" / "seed0.json").read_text())
    results |= {"checkpoint": checkpoint, "dataset": "/home/someone/coco/coco_karpathy_test.json"}
    results["t2i"]["reranked"]["R@1"] = r1
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(results))
    return file


def test_the_card_has_the_runs_figures_of_this_checkpoint_and_no_other(tmp_path, run):
    write_results(run / "results.json", "runs/x/checkpoints/step-00000002", 61.25)
    write_results(run / "evaluation-coco-val" / "results.json", "elsewhere/step-00000002", 62.25)
    write_results(run / "evaluation-old" / "results.json", "runs/x/checkpoints/step-00000001", 63.25)
    config = {"data": {"annotations": "lists/coco_train.json"}, "model": {"encoder_weights": "microsoft/MiniLM-L12"}}
    (run / "config.yaml").write_text(yaml.safe_dump(config))
    export_checkpoint(run, tmp_path / "copy", "clips/tiny")
    card = (tmp_path / "copy" / CARD_FILE).read_text()
    assert "coco_karpathy_test.json, test split: 500 images, 2,500 captions; the embedding's first k = 10" in card
    assert "| 61.2 |" in card and "| 62.2 |" in card and "| 63.2 |" not in card and "No evaluation" not in card
    assert str(tmp_path) not in card and "/home/someone" not in card
    front = yaml.safe_load(card.split("---\n")[1])
    assert (front["datasets"], front["base_model"]) == (["coco_train"], ["microsoft/MiniLM-L12"])
    assert front["metrics"] == ["recall"]
    found = ModelCard(card).data
    assert found.model_name == "copy" and len(found.eval_results) == 2 * 2 * 3 * 3, "evaluations, directions, columns"
    recall = {
        (r.task_name, r.metric_name, r.metric_value)
        for r in found.eval_results
        if r.dataset_name == "coco_karpathy_test"
    }
    assert ("text to image reranking, k = 10", "R@1, EDJE, match logit alone", 61.25) in recall
    assert {r.dataset_split for r in found.eval_results} == {"test"}
    config = {"data": {"annotations": ["lists/cc3m.json", "lists/my data (v1).json"]}}
    (run / "config.yaml").write_text(yaml.safe_dump(config))
    export_checkpoint(run, tmp_path / "from_lists")
    front = yaml.safe_load((tmp_path / "from_lists" / CARD_FILE).read_text().split("---\n")[1])
    assert front["datasets"] == ["cc3m", "my-data-v1"]


def test_without_results_the_card_says_so_and_results_of_another_checkpoint_are_refused(tmp_path, run):
    export_checkpoint(run, tmp_path / "copy")
    assert "No evaluation is recorded with this checkpoint." in (tmp_path / "copy" / CARD_FILE).read_text()
    other = write_results(tmp_path / "other.json", "runs/x/checkpoints/step-00000001", 61.25)
    with pytest.raises(UserError, match="other.json: measured .*step-00000001, not .*step-00000002"):
        export_checkpoint(run, tmp_path / "copy2", results=[other])
    shutil.copy(ROOT / "LICENSE", run / "results.json")
    with pytest.raises(UserError, match="results.json: not a results.json"):
        export_checkpoint(run, tmp_path / "copy2")
    assert not (tmp_path / "copy2").exists()


def test_weights_that_float16_cannot_hold_are_refused_and_nothing_is_written(tmp_path, run):
    model = EDJE.from_pretrained(run)
    with torch.no_grad():
        model.match_head.out.weight[0, 0] = 1e6
    model.save_pretrained(tmp_path / "wide")
    with pytest.raises(UserError, match="match_head.out.weight has values that float16 cannot hold"):
        export_checkpoint(tmp_path / "wide", tmp_path / "copy")
    assert not (tmp_path / "copy").exists()


def test_a_wrong_source_is_one_line_and_exit_code_2(tmp_path):
    result = run_script("scripts/export_checkpoint.py", tmp_path / "none", "--out", tmp_path / "copy")
    assert result.returncode == 2
    assert str(tmp_path / "none") in result.stderr and "Traceback" not in result.stderr


def test_a_backbone_beside_the_copy_is_found_from_any_working_directory(tmp_path, run, monkeypatch):
    with pytest.raises(UserError, match=r"../clips: no such file or directory as seen from .*shared/tiny"):
        export_checkpoint(run, tmp_path / "shared" / "tiny", "../clips")
    assert not (tmp_path / "shared").exists()
    export_checkpoint(run, tmp_path / "shared" / "tiny", "../../clip")
    (tmp_path / "moved").mkdir()
    for name in ("shared", "clip"):
        shutil.move(tmp_path / name, tmp_path / "moved" / name)
    monkeypatch.chdir(tmp_path)
    assert Reranker.from_pretrained(Path("moved", "shared", "tiny")).backbone.dims.num_patches == 16
    with pytest.raises(UserError, match=r"backbone.pretrained is ../../clip, which nobody else has"):
        upload_checkpoint(tmp_path / "moved" / "shared" / "tiny", "owner/tiny")


def test_what_was_fitted_is_all_that_changes_in_a_checkpoint(tmp_path, run):
    export_checkpoint(run, tmp_path / "copy", "../clip")
    fitted = {"fusion_lambda": 3.0, "fusion_split": "val", "probability_scale": 0.5, "probability_offset": -2.0}
    before = read_config(tmp_path / "copy")
    write_fusion(tmp_path / "copy", replace(before, backbone=BackboneConfig(name="another"), **fitted))
    assert before.backbone.pretrained == "../clip"  # still relative, as it is in the file
    assert read_config(tmp_path / "copy") == replace(before, **fitted)


def test_a_path_from_the_working_directory_still_loads_where_older_exports_wrote_one(tmp_path, run, monkeypatch):
    export_checkpoint(run, tmp_path / "deep" / "er" / "copy")
    config = read_config(tmp_path / "deep" / "er" / "copy")
    write_config(tmp_path / "deep" / "er" / "copy", replace(config, backbone=BackboneConfig(pretrained="../clip")))
    monkeypatch.chdir(tmp_path / "run")
    assert Reranker.from_pretrained(tmp_path / "deep" / "er" / "copy").backbone.dims.num_patches == 16
