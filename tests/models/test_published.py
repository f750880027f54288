"""Published weights by name: every container that people have, converted once, with the outputs of their makers."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import huggingface_hub
import pytest
import torch
from safetensors.torch import load_file, save_file

from models.checkpoints import checkpoint, conversion
from models.checkpoints.hub import locate_checkpoint
from models.checkpoints.published import PUBLISHED_REPOSITORIES
from models.edje import EDJE
from models.errors import UserError
from models.reranker import Reranker
from tests.hub_stand_in import HubStandIn, Repository
from tests.parity.published_case import CASES, PARITY, assert_close
from tests.processes import ROOT

CASE = PARITY / "tiny_m4"
BESIDE = ("config.json", "vocab.txt")


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch) -> Path:
    """The folder of conversions, empty."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "home" / "hub"))
    return tmp_path / "home" / "edje"


@pytest.fixture
def hub(monkeypatch):
    with HubStandIn() as hub:
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", hub.url)
        url = hub.url + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(huggingface_hub.constants, "HUGGINGFACE_CO_URL_TEMPLATE", url)
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_DISABLE_XET", True)
        yield hub


def publish(hub: HubStandIn, name: str, files: dict[str, bytes]) -> None:
    hub.repositories[name] = Repository()
    hub.repositories[name].commit("main", files)


def folder_with(tmp_path: Path, case: Path = CASE) -> Path:
    """A folder with what tensors cannot tell, and no weights yet."""
    folder = tmp_path / "published"
    folder.mkdir()
    for name in BESIDE:
        shutil.copy(case / name, folder)
    return folder


def check(model: EDJE, case: Path = CASE) -> None:
    """Its vision tokens and logits are those of the published code."""
    inputs, expected = load_file(case / "inputs.safetensors"), load_file(case / "expected.safetensors")
    tokens = model.compress(inputs["patch_tokens"])
    assert_close(tokens, expected["vision_tokens"])
    captions = json.loads((case / "inputs.json").read_text())["raw_captions"]
    assert_close(model.score(captions, tokens), expected["positive_logits"])


def tensors() -> dict[str, torch.Tensor]:
    return load_file(CASE / "checkpoint.safetensors")


@pytest.mark.parametrize("case", CASES)
def test_a_repository_of_the_hub_loads_by_its_name(hub, cache, case):
    names = ("checkpoint.safetensors", *BESIDE)
    publish(hub, "owner/published", {name: (PARITY / case / name).read_bytes() for name in names})
    check(EDJE.from_pretrained("owner/published"), PARITY / case)
    assert len(list(cache.iterdir())) == 1


@pytest.mark.parametrize("case", CASES)
def test_a_directory_and_a_file_load_by_their_paths(case):
    check(EDJE.from_pretrained(PARITY / case), PARITY / case)
    check(EDJE.from_pretrained(PARITY / case / "checkpoint.safetensors"), PARITY / case)


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module.model.", "model."])
@pytest.mark.parametrize("key", ["model", "state_dict", "module", None])
def test_wrappers_of_names_and_of_the_whole_are_taken_off(tmp_path, prefix, key):
    state = {prefix + name: tensor for name, tensor in tensors().items()}
    content = state if key is None else {key: state, "epoch": 3, "optimizer": {"state": {}, "param_groups": []}}
    folder = folder_with(tmp_path)
    torch.save(content, folder / "last.pth")
    check(EDJE.from_pretrained(folder))


def test_parts_that_were_wrapped_by_themselves_are_read(tmp_path):
    """DistributedDataParallel around the language model alone, torch.compile around the adapter alone."""
    inner = (("language_model.", "language_model.module."), ("vision_projection.", "vision_projection._orig_mod."))
    state = tensors()
    for part, wrapped in inner:
        state = {name.replace(part, wrapped, 1): tensor for name, tensor in state.items()}
    save_file(state, folder_with(tmp_path) / "model.safetensors")
    check(EDJE.from_pretrained(tmp_path / "published"))


def test_a_checkpoint_of_ours_loads_with_the_names_that_wrappers_left(tmp_path):
    EDJE.from_pretrained(CASE).save_pretrained(tmp_path / "ours")
    file = tmp_path / "ours" / "model.safetensors"
    save_file({f"module._orig_mod.{name}": tensor for name, tensor in load_file(file).items()}, file)
    check(EDJE.from_pretrained(tmp_path / "ours"))


def test_an_epoch_among_the_tensors_is_left_out(tmp_path):
    torch.save(tensors() | {"epoch": 3, "args": {"lr": 0.1}}, folder_with(tmp_path) / "last.ckpt")
    check(EDJE.from_pretrained(tmp_path / "published"))


def test_a_dictionary_in_a_dictionary_is_found(tmp_path):
    folder = folder_with(tmp_path)
    torch.save({"model": {"state_dict": tensors(), "step": 4}, "config": {}}, folder / "last.bin")
    check(EDJE.from_pretrained(folder))


@pytest.mark.parametrize("suffix", [".safetensors", ".bin"])
def test_shards_load_by_their_index(tmp_path, hub, suffix):
    folder, stem = folder_with(tmp_path), "model" if suffix == ".safetensors" else "pytorch_model"
    weight_map, names = {}, sorted(tensors())
    for number in range(3):
        shard = f"{stem}-{number + 1:05d}-of-00003{suffix}"
        part = {name: tensors()[name] for name in names[number::3]}
        (save_file if suffix == ".safetensors" else torch.save)(part, folder / shard)
        weight_map |= dict.fromkeys(part, shard)
    index = folder / f"{stem}{suffix}.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    check(EDJE.from_pretrained(folder))
    check(EDJE.from_pretrained(index))
    publish(hub, "owner/sharded", {file.name: file.read_bytes() for file in folder.iterdir()})
    check(EDJE.from_pretrained("owner/sharded"))

    index.write_text(json.dumps({"weight_map": weight_map | {"strange.weight": shard}}))
    with pytest.raises(UserError, match="it and its shards differ in strange.weight"):
        EDJE.from_pretrained(folder)
    index.write_text(json.dumps({"weight_map": weight_map | {"strange.weight": "../elsewhere.bin"}}))
    with pytest.raises(UserError, match="which is no file beside it"):
        EDJE.from_pretrained(folder)
    (folder / shard).unlink()
    index.write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(UserError, match="1 of 3 shards are missing, the first is .*-00003-of-00003"):
        EDJE.from_pretrained(folder)
    index.unlink()
    with pytest.raises(UserError, match="is a shard, and its index .* is missing"):
        EDJE.from_pretrained(folder)


def test_of_several_files_the_safetensors_of_the_usual_name_is_meant(tmp_path):
    folder = folder_with(tmp_path)
    other = {name: tensor + 1 for name, tensor in tensors().items()}
    save_file(tensors(), folder / "model.safetensors")
    torch.save(other, folder / "pytorch_model.bin")
    torch.save(other, folder / "checkpoint.pth")
    torch.save(other, folder / "model.pth")
    torch.save({"state": {}}, folder / "optimizer.pt")
    check(EDJE.from_pretrained(folder))


def test_two_names_for_one_tensor_are_refused(tmp_path):
    folder = folder_with(tmp_path)
    state = tensors()
    torch.save(state | {f"module.{name}": tensor for name, tensor in state.items()}, folder / "model.pth")
    with pytest.raises(UserError, match=r"model.pth: holds \S+ twice, the second time as module\."):
        EDJE.from_pretrained(folder)


def test_a_known_repository_needs_not_name_its_models(hub, monkeypatch):
    """Sizes are checked all the same: this one is not what that repository holds."""
    name, named = next(iter(PUBLISHED_REPOSITORIES.items()))
    assert named["siglip_path"] == "google/siglip2-large-patch16-384"
    publish(hub, name, {"model.safetensors": (CASE / "checkpoint.safetensors").read_bytes()})
    with pytest.raises(UserError, match="patch_width is 24 by its tensors, 1024 by the models that it names"):
        EDJE.from_pretrained(name)
    publish(hub, "owner/unknown", {"model.safetensors": (CASE / "checkpoint.safetensors").read_bytes()})
    with pytest.raises(UserError, match="names the vision tower ''"):
        EDJE.from_pretrained("owner/unknown")


def test_the_second_start_converts_nothing_and_needs_no_hub(hub, monkeypatch):
    publish(hub, "owner/published", {name: (CASE / name).read_bytes() for name in ("checkpoint.safetensors", *BESIDE)})
    first = locate_checkpoint("owner/published")
    monkeypatch.setattr(conversion, "convert", None)
    assert locate_checkpoint("owner/published") == first
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    assert locate_checkpoint("owner/published") == first
    check(EDJE.from_pretrained("owner/published"))


def test_a_file_that_changed_is_converted_again(tmp_path):
    folder = folder_with(tmp_path)
    save_file({name: tensor + 1 for name, tensor in tensors().items()}, folder / "model.safetensors")
    first = locate_checkpoint(folder)
    save_file(tensors(), folder / "model.safetensors")
    os.utime(folder / "model.safetensors", (1, 1))
    assert locate_checkpoint(folder) != first
    check(EDJE.from_pretrained(folder))


def test_where_the_cache_cannot_be_written_the_weights_load_all_the_same(cache, capsys):
    cache.parent.mkdir(parents=True)
    cache.write_text("a file where the folder should be")
    check(EDJE.from_pretrained(CASE))
    assert "cannot be kept" in capsys.readouterr().err and cache.read_text().startswith("a file")


def test_a_conversion_that_fails_leaves_nothing(cache, monkeypatch):
    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(conversion, "write_checkpoint", full)
    with pytest.raises(UserError, match="cannot be written to .*No space left.*set TMPDIR"):
        EDJE.from_pretrained(CASE)
    assert list(cache.iterdir()) == []


@pytest.mark.parametrize("step", ["write_config", "write_safetensors"])
def test_where_the_cache_is_full_the_weights_load_all_the_same(cache, monkeypatch, capsys, step):
    write = getattr(checkpoint, step)

    def until_full(path, *rest):
        if cache in Path(path).parents:
            raise OSError(28, "No space left on device")
        write(path, *rest)

    monkeypatch.setattr(checkpoint, step, until_full)
    check(EDJE.from_pretrained(CASE))
    assert capsys.readouterr().err.count("No space left") == 1 and list(cache.iterdir()) == []


def test_what_a_killed_conversion_left_is_never_taken_and_goes_after_a_day(cache):
    old, new = cache / ".converting-old", cache / ".converting-new"
    for folder in (old, new):
        (folder / "checkpoint").mkdir(parents=True)
    os.utime(old, (time.time() - 2 * 24 * 3600,) * 2)
    check(EDJE.from_pretrained(CASE))
    assert not old.exists() and new.exists() and len(list(cache.iterdir())) == 2


KILLED = """
import os, signal, sys
from models.checkpoints import checkpoint, hub
checkpoint.write_safetensors = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
hub.locate_checkpoint(sys.argv[1])
"""
CONVERT = """
import sys
from models.checkpoints.hub import locate_checkpoint
print(locate_checkpoint(sys.argv[1]))
"""


def test_two_processes_convert_at_once_and_agree(cache):
    command, environment = [sys.executable, "-c", CONVERT, str(CASE)], os.environ | {"HF_HOME": str(cache.parent)}
    runs = [subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    printed = {run.communicate(timeout=300)[0] for run in runs}
    assert [run.returncode for run in runs] == [0, 0] and len(printed) == 1
    assert [folder.name for folder in cache.iterdir()] == [Path(printed.pop().strip()).name]


def test_a_kill_in_the_middle_leaves_nothing_that_is_taken(cache):
    command, environment = [sys.executable, "-c", KILLED, str(CASE)], os.environ | {"HF_HOME": str(cache.parent)}
    assert subprocess.run(command, cwd=ROOT, env=environment).returncode == -signal.SIGKILL
    left = list(cache.iterdir())
    assert len(left) == 1 and left[0].name.startswith(".converting-")
    check(EDJE.from_pretrained(CASE))


def test_the_weight_file_of_a_checkpoint_of_ours_means_the_checkpoint(tmp_path):
    EDJE.from_pretrained(CASE).save_pretrained(tmp_path / "ours")
    assert locate_checkpoint(tmp_path / "ours" / "model.safetensors") == tmp_path / "ours"
    with pytest.raises(UserError, match="on this disk, where it has no revision 'v1'"):
        locate_checkpoint(CASE / "checkpoint.safetensors", revision="v1")


def test_weights_without_a_backbone_say_how_to_name_one():
    with pytest.raises(UserError, match="names no backbone; pass the one that it was trained with"):
        Reranker.from_pretrained(CASE)
