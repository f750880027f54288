"""Checkpoints: round trip, damage, strict loading, LATEST, fingerprints, nothing half-written."""

import os
import signal
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import save_file

from models.checkpoints.checkpoint import (
    CARD_FILE,
    CHECKPOINT_FILES,
    adapter_fingerprint,
    read_checkpoint,
    read_latest,
    resolve_checkpoint,
    write_checkpoint,
    write_config,
    write_latest,
)
from models.config import ADAPTER_CONFIGS, BackboneConfig, BackboneDims, CompressionConfig, EDJEConfig, EncoderConfig
from models.config_io import to_dict
from models.edje import EDJE
from models.errors import UserError
from models.files import atomic_directory
from models.language.captions import CaptionTokenizer, build_vocabulary
from models.state_dicts import load_state

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> EDJE:
    vocabulary = tmp_path_factory.mktemp("vocabulary") / "vocab.txt"
    build_vocabulary(["a red ball", "two dogs"], vocabulary)
    tokenizer = CaptionTokenizer.from_pretrained(vocabulary)
    config = EDJEConfig(
        backbone=BackboneConfig(name="ViT-B-16", pretrained="random"),
        dims=BackboneDims(num_patches=9, patch_width=8, embedding_width=6),
        adapter=CompressionConfig(num_tokens=2, mlp_width=12, num_heads=2),
        encoder=EncoderConfig(
            vocab_size=tokenizer.vocab_size, hidden_size=16, num_layers=2, num_heads=2, intermediate_size=24
        ),
    )
    torch.manual_seed(0)
    return EDJE(config, tokenizer).eval()


@pytest.fixture
def saved(model, tmp_path) -> Path:
    model.save_pretrained(tmp_path / "saved")
    return tmp_path / "saved"


def test_a_saved_model_comes_back_bit_by_bit(model, saved):
    again = EDJE.from_pretrained(saved)
    assert again.config == model.config
    assert again.tokenizer.vocab == model.tokenizer.vocab
    for name, tensor in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor), name


def test_whoever_may_read_the_config_may_read_the_weights(saved):
    modes = {(saved / name).stat().st_mode for name in ("model.safetensors", "config.yaml", "tokenizer.json")}
    assert len(modes) == 1


def test_tied_weights_are_stored_once_and_stay_tied(saved):
    _, state, _ = read_checkpoint(saved)
    assert "encoder.cls.predictions.decoder.weight" not in state
    encoder = EDJE.from_pretrained(saved).encoder
    assert encoder.mlm_logits(torch.zeros(1, 16)).shape == (1, len(encoder.word_table))
    assert encoder.cls["predictions"].decoder.weight is encoder.word_table


def test_saving_again_replaces_a_checkpoint_and_leaves_nothing_beside(model, saved):
    model.save_pretrained(saved)
    assert sorted(os.listdir(saved)) == sorted([*CHECKPOINT_FILES, CARD_FILE])
    assert os.listdir(saved.parent) == ["saved"]


def test_a_directory_with_other_files_is_never_overwritten(model, tmp_path):
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(UserError, match="holds thesis.tex"):
        model.save_pretrained(tmp_path)
    assert os.listdir(tmp_path) == ["thesis.tex"]


@pytest.mark.parametrize("name", ["model.safetensors", "tokenizer.json", "config.yaml"])
def test_files_of_another_project_under_our_names_are_never_overwritten(model, tmp_path, name):
    (tmp_path / name).write_text("batch_size: 8")
    with pytest.raises(UserError, match=f"no plain checkpoint .holds {name}"):
        model.save_pretrained(tmp_path)
    assert (tmp_path / name).read_text() == "batch_size: 8"


def test_an_empty_directory_is_written_to(model, tmp_path):
    (tmp_path / "made").mkdir()
    model.save_pretrained(tmp_path / "made")
    assert EDJE.from_pretrained(tmp_path / "made").config == model.config


@pytest.mark.parametrize("name", [".", "", ".."])
def test_a_directory_without_a_name_is_an_error(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="name the one to write"), atomic_directory(name):
        pass
    assert os.listdir(tmp_path) == []


def test_a_place_that_cannot_be_written_to_is_an_error(model, saved):
    with pytest.raises(UserError, match="below: cannot be created"):
        model.save_pretrained(saved / "config.yaml" / "below")


def test_an_error_while_writing_keeps_the_old_checkpoint(model, saved):
    before = {name: (saved / name).read_bytes() for name in CHECKPOINT_FILES}
    with pytest.raises(AttributeError):
        write_checkpoint(saved, model.config, {"text_projection.weight": "no tensor"}, model.tokenizer, "card")
    assert {name: (saved / name).read_bytes() for name in CHECKPOINT_FILES} == before
    assert os.listdir(saved.parent) == ["saved"]


def test_a_process_killed_while_writing_leaves_no_directory(tmp_path):
    script = (
        "import os, signal, sys; from models.files import atomic_directory\n"
        "with atomic_directory(sys.argv[1]) as temporary:\n"
        "    (temporary / 'half').write_text('x'); os.kill(os.getpid(), signal.SIGKILL)"
    )
    killed = subprocess.run([sys.executable, "-c", script, tmp_path / "final"], cwd=ROOT)
    assert killed.returncode == -signal.SIGKILL
    assert not (tmp_path / "final").exists()
    with atomic_directory(tmp_path / "final") as temporary:
        assert os.listdir(temporary) == []
    assert os.listdir(tmp_path) == ["final"]


@pytest.mark.parametrize("name", CHECKPOINT_FILES)
def test_a_missing_file_is_named(saved, name):
    (saved / name).unlink()
    with pytest.raises(UserError, match=rf"{name}: no such file"):
        read_checkpoint(saved)


@pytest.mark.parametrize("name", CHECKPOINT_FILES)
@pytest.mark.parametrize("keep", [0.0, 0.3, 0.98])
def test_a_truncated_file_is_named_in_one_line(saved, name, keep):
    content = (saved / name).read_bytes()
    # The last characters of config.yaml are whole keys; cut inside a value's mapping instead.
    (saved / name).write_bytes(content[: int(len(content) * keep)] + (b" {" if name == "config.yaml" else b""))
    with pytest.raises(UserError, match=name) as caught:
        read_checkpoint(saved)
    assert "\n" not in str(caught.value)


def test_random_bytes_are_no_weights(saved):
    (saved / "model.safetensors").write_bytes(bytes(range(256)) * 40)
    with pytest.raises(UserError, match="model.safetensors: missing, truncated or damaged"):
        EDJE.from_pretrained(saved)


def test_weights_that_are_not_finite_or_no_floating_point_are_named(model, saved):
    for change in (lambda t: t * float("nan"), lambda t: t + float("inf"), lambda t: t.to(torch.int8)):
        state = dict(model.adapter.state_dict(prefix="adapter."))
        state["adapter.mlp.fc1.weight"] = change(state["adapter.mlp.fc1.weight"])
        save_file(state, saved / "model.safetensors")
        with pytest.raises(UserError, match=r"model.safetensors: adapter.mlp.fc1.weight (has|holds torch.int8)"):
            EDJE.from_pretrained(saved)


def test_wrong_keys_of_a_config_are_all_named(saved):
    config = yaml.safe_load((saved / "config.yaml").read_text())
    config["adapter"]["num_token"] = config["adapter"].pop("num_tokens")
    del config["dims"]["patch_width"]
    (saved / "config.yaml").write_text(yaml.safe_dump(config))
    with pytest.raises(UserError, match=r"config.yaml: .*dims.patch_width.* missing.*adapter.num_token'.*num_tokens"):
        read_checkpoint(saved)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("dims.num_patches", 0, "at least 1"),
        ("dims.patch_width", -1, "at least 1"),
        ("dims.embedding_width", 0, "at least 1"),
        ("adapter.layer_norm_eps", 0.0, "above 0 and finite"),
        ("encoder.layer_norm_eps", float("nan"), "above 0 and finite"),
        ("encoder.num_layers", 0, "at least 1"),
        ("encoder.vocab_size", -1, "at least 1"),
        ("encoder.hidden_size", 0, "at least 1"),
        ("encoder.intermediate_size", 0, "at least 1"),
        ("encoder.max_positions", 0, "at least 1"),
        ("encoder.type_vocab_size", 1, "at least 2"),
        ("encoder.hidden_dropout", 2.0, "at least 0 and below 1"),
        ("encoder.attention_dropout", -0.1, "at least 0 and below 1"),
        ("max_caption_tokens", 3, "at least 4"),
        ("residual_similarity", -1.0, "at least 0 and finite"),
        ("fusion_lambda", float("inf"), "finite"),
    ],
)
def test_a_value_that_no_model_can_have_is_named(saved, key, value, message):
    config = yaml.safe_load((saved / "config.yaml").read_text())
    *sections, name = key.split(".")
    (config[sections[0]] if sections else config)[name] = value
    (saved / "config.yaml").write_text(yaml.safe_dump(config))
    with pytest.raises(UserError, match=f"config.yaml: {key} is {value}; it must be {message}"):
        read_checkpoint(saved)


def test_a_model_card_in_another_encoding_does_not_keep_a_checkpoint_from_loading(saved):
    (saved / CARD_FILE).write_bytes("trained on café photos".encode("latin-1"))
    assert EDJE.from_pretrained(saved).card.startswith("trained on caf")


def test_a_vocabulary_larger_than_the_encoders_is_an_error(saved):
    config = yaml.safe_load((saved / "config.yaml").read_text())
    config["encoder"]["vocab_size"] = 7
    (saved / "config.yaml").write_text(yaml.safe_dump(config))
    with pytest.raises(UserError, match="encoder.vocab_size 7"):
        read_checkpoint(saved)


def test_loading_lists_missing_unexpected_and_misshaped_names(model):
    state = dict(model.state_dict())
    del state["adapter.query"]
    state["adapter.layernorm.weight"] = torch.ones(3)
    state["encoder.pooler.weight"] = torch.ones(3)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(UserError) as caught:
        load_state(model, state, where="here.safetensors")
    assert "1 missing: adapter.query" in str(caught.value)
    assert "1 unexpected: encoder.pooler.weight" in str(caught.value)
    assert "1 mis-shaped: adapter.layernorm.weight is [3], expected [8]" in str(caught.value)
    assert str(caught.value).startswith("here.safetensors: ")
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


def test_a_config_that_does_not_fit_its_weights_is_an_error_naming_the_directory(model, saved):
    write_config(saved, replace(model.config, adapter=CompressionConfig(num_tokens=3, mlp_width=12, num_heads=2)))
    with pytest.raises(UserError, match=r"saved: .*adapter.query is \[1, 2, 8\], expected \[1, 3, 8\]"):
        EDJE.from_pretrained(saved)


def test_a_run_and_its_checkpoints_folder_mean_the_newest_checkpoint(model, tmp_path):
    checkpoints = tmp_path / "checkpoints"
    for name in ("step-00000010", "step-00000009"):
        model.save_pretrained(checkpoints / name)
    assert read_latest(checkpoints) is None
    write_latest(checkpoints, "step-00000010")
    (tmp_path / "config.yaml").write_text("a run's own")
    newest = checkpoints / "step-00000010"
    assert resolve_checkpoint(tmp_path) == resolve_checkpoint(checkpoints) == resolve_checkpoint(newest) == newest
    assert EDJE.from_pretrained(tmp_path).config == model.config


@pytest.mark.parametrize("content", ["", "step-00000099\n", "../elsewhere\n", "/\n"])
def test_a_pointer_to_nothing_is_an_error(tmp_path, content):
    (tmp_path / "LATEST").write_text(content)
    with pytest.raises(UserError, match="LATEST: names"):
        resolve_checkpoint(tmp_path)


def test_a_directory_without_a_checkpoint_is_an_error(tmp_path):
    with pytest.raises(UserError, match="neither model.safetensors nor LATEST"):
        resolve_checkpoint(tmp_path)
    with pytest.raises(UserError, match="no such directory"):
        resolve_checkpoint(tmp_path / "absent")


def test_the_fingerprint_changes_with_the_adapter_and_with_nothing_else(model):
    state, config = model.state_dict(), model.config
    fingerprint = adapter_fingerprint(config, state)
    assert adapter_fingerprint(config, {k: v for k, v in state.items() if k.startswith("adapter.")}) == fingerprint
    assert adapter_fingerprint(config, state | {"match_head.out.bias": torch.ones(1)}) == fingerprint
    assert adapter_fingerprint(replace(config, fusion_lambda=1.0), state) == fingerprint
    started_otherwise = replace(config, adapter=replace(config.adapter, query_std=4.0))
    assert adapter_fingerprint(started_otherwise, state) == fingerprint
    nudged = state["adapter.query"].clone()
    nudged[0, 1, 3] += 1e-6
    assert adapter_fingerprint(config, state | {"adapter.query": nudged}) != fingerprint
    other = replace(config, adapter=replace(config.adapter, layer_norm_eps=1e-5))
    assert adapter_fingerprint(other, state) != fingerprint


def test_the_fingerprint_survives_saving_and_loading(model, saved):
    config, state, _ = read_checkpoint(saved)
    assert adapter_fingerprint(config, state) == adapter_fingerprint(model.config, model.state_dict())


def test_the_fingerprint_of_a_known_checkpoint_stays():
    """Stores that were made with it are refused after any change."""
    config, state, _ = read_checkpoint(ROOT / "configs" / "pretrained" / "scenes")
    assert adapter_fingerprint(config, state) == "7642f24f4f49f4f8"


@dataclass(frozen=True, kw_only=True)
class LaterConfig(CompressionConfig):
    """The configuration of an adapter as a later version may extend it."""

    later_setting: int = 0


def test_a_setting_added_later_changes_the_fingerprint_only_where_it_is_used(model, monkeypatch):
    monkeypatch.setitem(ADAPTER_CONFIGS, "compression", LaterConfig)
    state, fingerprint = model.state_dict(), adapter_fingerprint(model.config, model.state_dict())
    later = LaterConfig(**to_dict(model.config.adapter))
    assert adapter_fingerprint(replace(model.config, adapter=later), state) == fingerprint
    used = replace(later, later_setting=1)
    assert adapter_fingerprint(replace(model.config, adapter=used), state) != fingerprint
