"""Checkpoints by name: uploaded in one commit, fetched again, against a local server with the Hub's endpoints."""

import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import huggingface_hub
import open_clip
import pytest
import torch
import yaml

from data.scenes.dataset import write_scenes
from evaluation import evaluate_retrieval
from models.checkpoints.checkpoint import CARD_FILE, CHECKPOINT_FILES, weights_fingerprint, write_latest
from models.checkpoints.hub import upload_checkpoint
from models.checkpoints.model_card import BACKBONE_REPOSITORIES, PIPELINE_TAG, model_card
from models.config import BackboneConfig
from models.edje import EDJE
from models.errors import UserError
from models.reranker import Reranker
from models.vision.backbones import Backbone
from tests.hub_stand_in import HubStandIn
from tests.processes import ROOT
from tests.tiny_model import CAPTIONS, make_model, write_backbone, write_images

FILES = {*CHECKPOINT_FILES, CARD_FILE}


@pytest.fixture(scope="module")
def backbone(tmp_path_factory) -> Backbone:
    return Backbone.load(write_backbone(tmp_path_factory.mktemp("clip") / "tiny"), precision="float32")


@pytest.fixture
def model(backbone, tmp_path, monkeypatch) -> EDJE:
    """A model that names its backbone by a path that others may have too."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(backbone.config.pretrained, tmp_path / "clips" / "tiny")
    model = make_model(backbone, tmp_path / "vocab.txt")
    model.config = replace(model.config, backbone=BackboneConfig(pretrained="clips/tiny"))
    return model


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """A hub without content, and a cache without content."""
    with HubStandIn() as hub:
        hub.stand_in(monkeypatch, tmp_path / "cache")
        yield hub


def logits(model: EDJE) -> torch.Tensor:
    patches = torch.randn(len(CAPTIONS), 16, 32, generator=torch.Generator().manual_seed(0))
    return model.score(CAPTIONS, model.compress(patches))


def test_what_was_pushed_comes_back_by_its_name(hub, model):
    url = model.push_to_hub("owner/tiny", private=True)
    repository = hub.repositories["owner/tiny"]
    assert url == f"{hub.url}/owner/tiny/commit/{repository.branches['main']}"
    assert repository.private and repository.files().keys() == FILES and len(repository.commits) == 2
    again = EDJE.from_pretrained("owner/tiny")
    assert again.config == model.config and torch.equal(logits(again), logits(model))


def test_a_reranker_loads_by_name_and_ranks(hub, model, tmp_path):
    model.push_to_hub("owner/tiny")
    reranker = Reranker.from_pretrained("owner/tiny", dtype="float32")
    images = [tmp_path / "images" / name for name in write_images(tmp_path / "images", 3)]
    assert len(reranker.rank("a red ball", images)) == 3


def test_a_checkpoint_is_evaluated_by_its_name_and_nothing_is_written_beside_it(hub, model, tmp_path, capsys):
    model.push_to_hub("owner/tiny", revision="v1")
    write_scenes(tmp_path / "scenes", num_train=4, num_val=4, num_test=4, seed=3)
    arguments = ["--checkpoint", "owner/tiny", "--revision", "v1", "--dataset", "scenes/dataset_scenes.json"]
    arguments += ["--data-root", "scenes", "--k", "3", "--precision", "float32", "--device", "cpu"]
    with pytest.raises(UserError, match="owner/tiny: read from a cache, which is no place for results"):
        evaluate_retrieval.main(arguments)
    fetched = {file: file.read_bytes() for file in (tmp_path / "cache").rglob("*") if file.is_file()}
    evaluate_retrieval.main([*arguments, "--lambda-split", "val", "--out", "results"])
    assert "for these results only" in capsys.readouterr().out
    results = json.loads(Path("results/results.json").read_text())
    assert (results["checkpoint"], results["images"]) == ("owner/tiny@v1", 4)
    assert results["model"]["setting"] == "unknown" and not Path("owner").exists()
    assert {file: file.read_bytes() for file in (tmp_path / "cache").rglob("*") if file.is_file()} == fetched


def test_a_revision_is_a_branch_a_tag_or_a_commit(hub, model):
    model.push_to_hub("owner/tiny")
    first, before = hub.repositories["owner/tiny"].branches["main"], logits(model)
    with torch.no_grad():
        model.match_head.out.bias += 1
    model.push_to_hub("owner/tiny", revision="tuned")
    assert hub.repositories["owner/tiny"].branches["main"] == first
    for revision, expected in ((None, before), ("main", before), (first, before), ("tuned", logits(model))):
        assert torch.equal(logits(EDJE.from_pretrained("owner/tiny", revision=revision)), expected)


def test_a_directory_that_exists_wins_and_asks_no_hub(hub, model, tmp_path):
    model.push_to_hub("owner/tiny")
    with torch.no_grad():
        model.match_head.out.bias += 1
    model.save_pretrained(tmp_path / "owner" / "tiny")
    hub.requests.clear()
    assert torch.equal(logits(EDJE.from_pretrained("owner/tiny")), logits(model))
    assert hub.requests == []
    with pytest.raises(UserError, match="owner/tiny: on this disk, where it has no revision 'main'"):
        EDJE.from_pretrained("owner/tiny", revision="main")


def test_what_was_fetched_once_loads_without_a_hub(hub, model, monkeypatch):
    model.push_to_hub("owner/tiny")
    EDJE.from_pretrained("owner/tiny")
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")
    assert torch.equal(logits(EDJE.from_pretrained("owner/tiny")), logits(model))


def test_neither_a_directory_nor_a_repository_is_one_clear_error(hub, model, monkeypatch):
    model.push_to_hub("owner/tiny")
    hub.repositories["owner/tiny"].commits["1" * 40] = {"config.yaml": b"", "notes.txt": b""}
    cases = [
        (("owner/other",), "owner/other: no such directory, and no repository of that name could be fetched"),
        (("owner/tiny", "v9"), "no repository of that name at revision 'v9' could be fetched"),
        (("owner/tiny", "1" * 40), "the repository at revision '1+' on the model hub has no model.safetensors"),
        (("runs/demo/nothing",), "runs/demo/nothing: no such directory"),
    ]
    for (name, *revision), message in cases:
        with pytest.raises(UserError, match=message) as caught:
            EDJE.from_pretrained(name, revision=revision[0] if revision else None)
        assert "\n" not in str(caught.value)
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(UserError, match="runs/nothing: no such directory, and no repository .*check the name"):
        Reranker.from_pretrained("runs/nothing")


def test_only_a_checkpoints_own_files_are_fetched(hub, model):
    model.push_to_hub("owner/tiny")
    files = hub.repositories["owner/tiny"].files()
    files |= {"training_state.pt": b"optimizer", "code.py": b"import os"}
    EDJE.from_pretrained("owner/tiny")
    assert not [line for line in hub.requests if "training_state.pt" in line or "code.py" in line]


def test_of_a_runs_checkpoint_only_its_own_files_are_uploaded(hub, model, tmp_path):
    model.save_pretrained(tmp_path / "step-00000001")
    (tmp_path / "step-00000001" / "training_state.pt").write_bytes(b"optimizer")
    upload_checkpoint(tmp_path / "step-00000001", "owner/tiny")
    assert hub.repositories["owner/tiny"].files().keys() == FILES


def test_a_push_that_is_refused_commits_nothing(hub, model, tmp_path, backbone):
    hub.refuse = 403
    with pytest.raises(
        UserError, match="owner/tiny: the model hub did not take the checkpoint .*nothing was committed"
    ):
        model.push_to_hub("owner/tiny")
    assert hub.repositories["owner/tiny"].files() == {}
    hub.requests.clear()
    with pytest.raises(UserError, match="no/such/name: the model hub did not take"):
        model.push_to_hub("no/such/name")
    model.config = replace(model.config, backbone=backbone.config)
    with pytest.raises(UserError, match="backbone.pretrained is /.*, which nobody else has; .*--backbone-pretrained"):
        model.push_to_hub("owner/tiny")
    model.save_pretrained(tmp_path / "half")
    (tmp_path / "half" / "model.safetensors").unlink()
    with pytest.raises(UserError, match="model.safetensors: no such file"):
        upload_checkpoint(tmp_path / "half", "owner/tiny")
    assert hub.requests == []


def metadata(card: str) -> dict:
    _, front, _ = card.split("---\n", 2)
    return yaml.safe_load(front)


def test_a_saved_checkpoint_has_a_card_that_the_hub_reads(model, tmp_path):
    model.config = replace(model.config, backbone=BackboneConfig(name="ViT-L-16-SigLIP2-384", pretrained="webli"))
    model.save_pretrained(tmp_path / "small-edje")
    card = huggingface_hub.ModelCard.load(tmp_path / "small-edje" / CARD_FILE)
    assert card.data.license == "bsd-3-clause" and card.data.library_name == "edje"
    assert card.data.base_model == ["timm/ViT-L-16-SigLIP2-384"] and card.data.pipeline_tag == PIPELINE_TAG
    assert "reranking" in card.data.tags and card.data.metrics is None
    assert (
        "No evaluation is recorded with this checkpoint." in card.text and 'from_pretrained("small-edje")' in card.text
    )
    assert model.config.backbone_fingerprint in card.text


def test_a_card_with_tables_names_metrics_data_and_origin_and_stays_with_the_weights(hub, model, tmp_path):
    facts = {"datasets": ["coco"], "base_models": ["microsoft/MiniLM-L12-H384-uncased"], "license": "mit"}
    weights = weights_fingerprint(model.state_dict())
    model.card = model_card(model.config, "tiny", ["| R@1 |\n|---|\n| 86.9 |"], weights=weights, **facts)
    found = metadata(model.card)
    assert (found["metrics"], found["datasets"], found["base_model"], found["license"]) == (["recall"], *facts.values())
    assert "| 86.9 |" in model.card and "No evaluation" not in model.card
    model.save_pretrained(tmp_path / "saved")
    assert (tmp_path / "saved" / CARD_FILE).read_text() == model.card
    EDJE.from_pretrained(tmp_path / "saved").push_to_hub("owner/other")
    pushed = hub.repositories["owner/other"].files()[CARD_FILE].decode()
    assert "\n# owner/other\n" in pushed and 'from_pretrained("owner/other")' in pushed and "| 86.9 |" in pushed
    assert pushed.replace("owner/other", "tiny") == model.card


def test_figures_do_not_go_with_other_weights(model, tmp_path):
    weights = weights_fingerprint(model.state_dict())
    model.card = model_card(model.config, "tiny", ["| 86.9 |"], weights=weights)
    with torch.no_grad():
        model.match_head.out.bias += 1
    model.save_pretrained(tmp_path / "trained")
    card = (tmp_path / "trained" / CARD_FILE).read_text()
    assert "86.9" not in card and "No evaluation is recorded" in card and weights not in card


def test_a_card_claims_neither_a_fingerprint_nor_a_licence_that_is_not_known(model):
    card = model_card(replace(model.config, backbone_fingerprint=""), "tiny", license=None)
    assert "license" not in metadata(card) and "fingerprint is not recorded" in card and "refused" not in card


def test_the_card_names_both_models_of_a_backbone(model):
    both = BackboneConfig(name="ViT-B-32", pretrained="openai", token_model="test_vit", token_pretrained="r160_in1k")
    card = model_card(replace(model.config, backbone=both, residual_similarity=100.0), "tiny")
    assert "timm model `test_vit` with weights `r160_in1k`, for patch tokens" in card
    assert "open_clip model `ViT-B-32` with weights `openai`, for embeddings" in card
    assert "contains the first stage's cosine" in card
    local = BackboneConfig(pretrained="/home/someone/clips/tiny")
    card = model_card(replace(model.config, backbone=local), "tiny")
    assert "open_clip model `tiny`, for patch tokens and embeddings" in card and "/home" not in card


def test_repositories_of_the_papers_backbones_are_open_clips():
    for (name, tag), repository in BACKBONE_REPOSITORIES.items():
        assert open_clip.get_pretrained_cfg(name, tag)["hf_hub"].rstrip("/") == repository


def test_a_folder_with_a_readme_of_its_own_is_never_overwritten(model, tmp_path):
    (tmp_path / "project").mkdir()
    (tmp_path / "project" / CARD_FILE).write_text("mine")
    with pytest.raises(UserError, match="holds README.md"):
        model.save_pretrained(tmp_path / "project")
    assert (tmp_path / "project" / CARD_FILE).read_text() == "mine"


def test_the_export_command_uploads_what_it_wrote(hub, model, tmp_path):
    """In a process of its own, which finds the hub as a user's does: by the environment."""
    model.save_pretrained(tmp_path / "run" / "checkpoints" / "step-00000001")
    (tmp_path / "run" / "checkpoints" / "step-00000001" / "training_state.pt").write_bytes(b"optimizer")
    write_latest(tmp_path / "run" / "checkpoints", "step-00000001")
    command = [sys.executable, ROOT / "scripts" / "export_checkpoint.py", "run", "--out", "out", "--push", "owner/tiny"]
    environment = {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "home"), "HF_HUB_DISABLE_XET": "1"}
    done = subprocess.run(command, cwd=tmp_path, env=os.environ | environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    written = {path.name: path.read_bytes() for path in Path("out").iterdir()}
    assert hub.repositories["owner/tiny"].files() == written and written.keys() == FILES
    assert 'from_pretrained("owner/tiny")' in written[CARD_FILE].decode()
