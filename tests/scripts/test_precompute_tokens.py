"""Stores written by the script: the tokens of the model itself, whatever the batches, workers, ranks and kills."""

import json
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
import torch

import models.stores.indexing
from models.config import LocalConfig
from models.edje import EDJE
from models.errors import UserError
from models.stores.indexing import precompute, precompute_captions
from models.stores.token_store import TokenStore
from models.vision.backbones import Backbone
from models.vision.images import open_image
from scripts.precompute_tokens import parse_arguments, read_image_files
from tests.processes import ROOT, run_script
from tests.shards import sample, write_shards, write_tar
from tests.tiny_model import CAPTIONS, make_model, write_backbone, write_images

SCRIPT = "scripts/precompute_tokens.py"


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> Path:
    """backbone/, checkpoint/, local/ (a checkpoint that does not compress), images/, annotations.json, list.txt."""
    root = tmp_path_factory.mktemp("precompute")
    backbone = Backbone.load(write_backbone(root / "backbone"), precision="float32")
    make_model(backbone, root / "vocab.txt").save_pretrained(root / "checkpoint")
    local = make_model(backbone, root / "vocab.txt", adapter=LocalConfig(mlp_width=16))
    local.save_pretrained(root / "local")
    names = write_images(root / "images", 150)
    images = [
        {"filename": name, "split": ("train", "val", "test")[i % 3], "sentences": [{"raw": c} for c in CAPTIONS]}
        for i, name in enumerate(names[:12])
    ]
    (root / "annotations.json").write_text(json.dumps({"images": images}))
    (root / "list.txt").write_text("\n".join(names[:5]) + "\n\n")
    return root


@pytest.fixture(scope="module")
def backbone(files) -> Backbone:
    return Backbone.load(EDJE.from_pretrained(files / "checkpoint").config.backbone, precision="float32")


def paths_and_ids(files: Path, count: int) -> tuple[list[Path], list[str]]:
    ids = sorted(p.relative_to(files / "images").as_posix() for p in (files / "images").rglob("*.png"))[:count]
    return [files / "images" / item_id for item_id in ids], ids


def contents(path: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in path.iterdir()}


def run(*arguments, torchrun: int = 0) -> subprocess.CompletedProcess:
    arguments = [*arguments, "--device", "cpu", "--precision", "float32"]
    if not torchrun:
        return run_script(SCRIPT, *arguments)
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={torchrun}"]
    command = [sys.executable, *launcher, ROOT / SCRIPT, *arguments]
    return subprocess.run(command, capture_output=True, text=True, cwd="/")


@pytest.mark.parametrize("name, shape", [("checkpoint", (4, 16)), ("local", (16, 16)), (None, (16, 32))])
def test_a_store_holds_what_the_model_gives_for_each_image(files, backbone, tmp_path, name, shape):
    model = EDJE.from_pretrained(files / name) if name else None
    paths, ids = paths_and_ids(files, 70)
    store = precompute(tmp_path / "s", paths, ids, backbone, model, batch_size=7, progress=False)
    assert store.ids == ids and (store.tokens_per_item, store.width) == shape
    assert bool(store.manifest.adapter) == bool(name)
    for row in (0, 1, 63, 64, 69):
        with torch.inference_mode():
            features = backbone.encode_images(backbone.preprocess(open_image(paths[row]))[None])
            tokens = model.compress(features.patch_tokens) if model else features.patch_tokens
        torch.testing.assert_close(store.gather([ids[row]]).float(), tokens, rtol=1e-3, atol=1e-3)
        torch.testing.assert_close(store.gather_embeddings([ids[row]]), features.embedding, rtol=0, atol=1e-6)


def test_encoding_leaves_the_random_state_alone(files, backbone, tmp_path):
    state = torch.get_rng_state()
    precompute(tmp_path / "s", *paths_and_ids(files, 3), backbone, progress=False)
    assert torch.equal(torch.get_rng_state(), state)


def test_workers_change_nothing(files, backbone, tmp_path):
    paths, ids = paths_and_ids(files, 20)
    for workers in (0, 2):
        precompute(tmp_path / f"{workers}", paths, ids, backbone, batch_size=8, num_workers=workers, progress=False)
    assert contents(tmp_path / "0") == contents(tmp_path / "2")


def test_caption_embeddings_are_stored_once_for_equal_captions(backbone, tmp_path):
    captions = [CAPTIONS[0], CAPTIONS[1], CAPTIONS[0], "A red  ball"]
    store = precompute_captions(tmp_path / "s", captions, backbone, progress=False)
    assert store.ids == [CAPTIONS[0], CAPTIONS[1], "A red  ball"] and store.tokens_per_item == 0
    torch.testing.assert_close(store.gather_embeddings(captions), backbone.encode_texts(captions), rtol=0, atol=1e-6)


def test_an_interrupted_run_continues_to_identical_bytes(files, backbone, tmp_path, monkeypatch):
    paths, ids = paths_and_ids(files, 150)
    precompute(tmp_path / "whole", paths, ids, backbone, progress=False)
    encode, calls = models.stores.indexing._encode, []

    def encode_until_interrupted(*arguments):
        calls.append(arguments)
        if len(calls) == 4:  # two batches of 32 fill the first shard of 64
            raise KeyboardInterrupt
        return encode(*arguments)

    monkeypatch.setattr(models.stores.indexing, "_encode", encode_until_interrupted)
    with pytest.raises(KeyboardInterrupt):
        precompute(tmp_path / "s", paths, ids, backbone, progress=False)
    calls[:] = [None] * 4
    precompute(tmp_path / "s", paths, ids, backbone, progress=False)
    assert len(calls) - 4 == 3  # of five batches, the two of the finished shard are not encoded again
    assert contents(tmp_path / "s") == contents(tmp_path / "whole")


def test_two_ranks_write_the_store_of_one_process(files, backbone, tmp_path):
    done = run(
        "--checkpoint", files / "checkpoint", "--images", files / "images", "--out", tmp_path / "two", torchrun=2
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    paths, ids = paths_and_ids(files, 150)
    one = precompute(tmp_path / "one", paths, ids, backbone, EDJE.from_pretrained(files / "checkpoint"), progress=False)
    two = TokenStore.open(tmp_path / "two")
    two.verify()
    assert two.ids == one.ids and two.manifest.adapter == one.manifest.adapter
    torch.testing.assert_close(two.gather(ids), one.gather(ids), rtol=2e-3, atol=1e-3)


def test_patch_tokens_and_captions_of_an_annotation_file(files, backbone, tmp_path):
    regions = [{"filename": "any.png", "split": "train", "sentences": [{"raw": c} for c in ("a region", CAPTIONS[0])]}]
    (tmp_path / "regions.json").write_text(json.dumps({"images": regions}))
    done = run(
        "--backbone-pretrained", files / "backbone", "--images", files / "annotations.json",
        "--root", files / "images", "--out", tmp_path / "patches", "--captions", tmp_path / "captions",
        "--more-captions", tmp_path / "regions.json",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    store, captions = TokenStore.open(tmp_path / "patches"), TokenStore.open(tmp_path / "captions")
    store.check(backbone=backbone.fingerprint, adapter="")
    captions.check(backbone=backbone.fingerprint)
    assert (len(store), captions.ids) == (12, [*CAPTIONS, "a region"])
    assert "12 images" in done.stdout and "4 captions" in done.stdout


def test_images_come_from_a_folder_an_annotation_file_or_a_list(files, tmp_path):
    def read(images, *options):
        arguments = ["--checkpoint", "x", "--out", "y", "--images", str(images), *map(str, options)]
        return read_image_files(parse_arguments(arguments))

    folder = read(files / "images")
    assert folder.ids == paths_and_ids(files, 150)[1] and all(path.is_file() for path in folder.images)
    assert read(files / "annotations.json", "--root", files / "images").ids == folder.ids[:12]
    assert read(files / "annotations.json", "--root", files / "images", "--split", "val").ids == folder.ids[1:12:3]
    assert read(files / "list.txt", "--root", files / "images").ids == folder.ids[:5]
    for images, split, message in [
        (files / "nothing.txt", None, "nothing.txt: cannot be read as a list of images"),
        (files / "nothing.json", None, "no such file"),
        (files / "images", "test", "no image in it has a .txt"),
        (files / "list.txt", "test", "list.txt has no splits"),
        (tmp_path, None, "it holds no images"),
    ]:
        with pytest.raises(UserError, match=message):
            read(images, *(["--split", split] if split else []))


def test_images_of_shards_are_stored_as_files_would_be(files, tmp_path):
    write_shards(tmp_path / "shards", [40, 30])
    command = ["--backbone-pretrained", files / "backbone", "--shards", "{00000..00001}.tar", "--root"]
    out = ["--out", tmp_path / "s", "--captions", tmp_path / "captions"]
    done = run(*command, tmp_path / "shards", *out, torchrun=2)
    assert done.returncode == 0, done.stderr
    for file in (tmp_path / "shards").glob("*.tar"):
        with tarfile.open(file) as tar:
            tar.extractall(tmp_path / "unpacked" / file.name, filter="data")
    unpacked = ["--images", tmp_path / "unpacked", "--out", tmp_path / "f"]
    done = run("--backbone-pretrained", files / "backbone", *unpacked, torchrun=2)
    assert done.returncode == 0, done.stderr
    assert contents(tmp_path / "s") == contents(tmp_path / "f")
    assert len(TokenStore.open(tmp_path / "captions")) == 70
    refused = run(*command, tmp_path / "shards", *out, "--split", "val")
    assert refused.returncode == 2 and "shards have no splits" in refused.stderr
    refused = run("--checkpoint", files / "checkpoint", *unpacked, "--index", tmp_path / "index")
    assert refused.returncode == 2 and "only shards have an index" in refused.stderr


def test_an_unreadable_image_of_a_shard_is_left_out_when_asked(files, tmp_path):
    broken = [(name, b"no image" if name.endswith("jpg") else content) for name, content in sample(1)]
    write_tar(tmp_path / "0.tar", [*sample(0), *broken, *sample(2)])
    command = ["--checkpoint", files / "checkpoint", "--shards", tmp_path / "0.tar", "--out", tmp_path / "s"]
    done = run(*command, "--skip-unreadable")
    assert done.returncode == 0 and f"left out: {tmp_path / '0.tar'}: member 000000001.jpg" in done.stderr
    assert TokenStore.open(tmp_path / "s").ids == ["0.tar/000000000.jpg", "0.tar/000000002.jpg"]


def test_unreadable_images_end_the_run_after_the_rest_was_stored(files, backbone, tmp_path):
    paths, ids = paths_and_ids(files, 130)
    broken, missing = tmp_path / "broken.png", tmp_path / "missing.png"
    broken.write_bytes(paths[3].read_bytes()[:70])
    with pytest.raises(UserError, match=r"broken.png: .*2 images are unreadable.*missing.png.*fix or remove .* rerun"):
        precompute(tmp_path / "s", [broken, missing, *paths[2:]], ids, backbone, progress=False)
    assert sorted(file.name for file in (tmp_path / "s").glob("shard*")) == ["shard-00001.bin", "shard-00002.bin"]
    broken.write_bytes(paths[0].read_bytes())
    missing.write_bytes(paths[1].read_bytes())
    precompute(tmp_path / "s", [broken, missing, *paths[2:]], ids, backbone, progress=False)
    precompute(tmp_path / "whole", paths, ids, backbone, progress=False)
    assert contents(tmp_path / "s") == contents(tmp_path / "whole")


def test_the_script_names_unreadable_images_and_leaves_them_out_when_asked(files, tmp_path):
    names = write_images(tmp_path / "images", 4)
    (tmp_path / "images" / names[1]).write_bytes(b"no image")
    command = ["--checkpoint", files / "checkpoint", "--images", tmp_path / "images"]
    refused = run(*command, "--out", tmp_path / "refused")
    assert refused.returncode == 2 and "Traceback" not in refused.stderr
    assert f"error: {tmp_path / 'images' / names[1]}: not an image" in refused.stderr
    assert not (tmp_path / "refused" / "manifest.json").exists()
    skipped = run(*command, "--out", tmp_path / "skipped", "--skip-unreadable")
    assert skipped.returncode == 0 and f"left out: {tmp_path / 'images' / names[1]}" in skipped.stderr
    assert TokenStore.open(tmp_path / "skipped").ids == [names[0], *names[2:]]


def test_another_backbones_checkpoint_is_refused_before_anything_is_written(files, tmp_path):
    other = Backbone.load(write_backbone(tmp_path / "other", seed=9), precision="float32")
    paths, ids = paths_and_ids(files, 2)
    with pytest.raises(UserError, match="trained with backbone .*, this one is"):
        precompute(tmp_path / "s", paths, ids, other, EDJE.from_pretrained(files / "checkpoint"))
    assert not (tmp_path / "s").exists()
