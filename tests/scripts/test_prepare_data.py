"""Checking a download: complete at the published sizes, or a list of exactly what is missing, and exit code 2."""

import json
from dataclasses import replace

import pytest
from PIL import Image

from data.named_datasets import NAMED_DATASETS
from scripts.prepare_data import Findings, check_split
from tests.processes import run_script

SCRIPT = "scripts/prepare_data.py"


@pytest.fixture
def flickr(tmp_path):
    """A test list and its images at Flickr30k's published size: 1,000 images, 5,000 captions."""
    num_images, num_captions = NAMED_DATASETS["flickr30k"].sizes["test"]
    captions = ["a man"] * (num_captions // num_images)
    names = [f"flickr30k-images/{i}.jpg" for i in range(num_images)]
    rows = [{"image": name, "caption": captions} for name in names]
    (tmp_path / "flickr30k_test.json").write_text(json.dumps(rows))
    (tmp_path / "flickr30k-images").mkdir()
    Image.new("RGB", (2, 2)).save(tmp_path / names[0])
    for name in names[1:]:
        (tmp_path / name).hardlink_to(tmp_path / names[0])
    return tmp_path


def test_a_complete_split_ends_with_the_commands_that_come_next(flickr):
    ended = run_script(SCRIPT, "flickr30k", "--root", flickr, "--splits", "test", "--decode", "20")
    assert ended.returncode == 0, ended.stderr
    assert "test: 1,000 images and 5,000 captions, as published; 1,000 image files" in ended.stdout
    assert "decoded 20 of 20" in ended.stdout
    assert f"--dataset flickr30k --data-root {flickr}" in ended.stdout and "precompute_tokens.py" in ended.stdout


def test_what_is_missing_is_listed_with_its_sources_and_ends_in_exit_code_2(flickr):
    (flickr / "flickr30k-images" / "7.jpg").unlink()
    damaged = flickr / "flickr30k-images" / "8.jpg"
    damaged.unlink()
    damaged.write_bytes(b"no image")
    ended = run_script(SCRIPT, "flickr30k", "--root", flickr, "--splits", "val", "test", "--decode", "999")
    assert ended.returncode == 2 and "Traceback" not in ended.stderr
    assert ended.stderr.strip().splitlines()[-1].startswith(f"error: {flickr}: Flickr30k is not complete, 3 problems")
    assert "neither dataset_flickr30k.json (Karpathy) nor flickr30k_val.json" in ended.stdout
    assert "test: 1 of 1,000 images are missing or empty" in ended.stdout and "flickr30k-images/7.jpg" in ended.stdout
    assert f"{damaged}: not an image" in ended.stdout and "decoded 998 of 999" in ended.stdout
    assert "caption_datasets.zip" in ended.stdout and "shannon.cs.illinois.edu" in ended.stdout
    assert "complete.\n" not in ended.stdout and "prepare_data.py says" not in ended.stdout


def test_all_missing_images_are_written_and_only_their_source_is_named(flickr):
    missing = [flickr / "flickr30k-images" / f"{i}.jpg" for i in range(5)]
    for path in missing:
        path.unlink()
    arguments = ("flickr30k", "--root", flickr, "--splits", "test")
    ended = run_script(SCRIPT, *arguments)
    assert ended.returncode == 2 and "images/2.jpg, ... (--list FILE writes all)" in ended.stdout
    assert "shannon.cs.illinois.edu" in ended.stdout and "caption_datasets.zip" not in ended.stdout
    ended = run_script(SCRIPT, *arguments, "--list", flickr / "missing.txt")
    assert ended.returncode == 2
    assert (flickr / "missing.txt").read_text().splitlines() == list(map(str, missing))
    ended = run_script(SCRIPT, *arguments, "--list", flickr / "absent" / "missing.txt")
    assert ended.returncode == 2 and "missing.txt: cannot be written" in ended.stderr
    assert "Traceback" not in ended.stderr


def test_karpathys_file_is_parsed_once_for_all_splits(tmp_path, monkeypatch, capsys):
    named = replace(NAMED_DATASETS["flickr30k"], sizes=dict.fromkeys(("train", "val", "test"), (1, 1)))
    images = [{"filename": f"{split}.jpg", "split": split, "sentences": [{"raw": "x"}]} for split in named.sizes]
    (tmp_path / named.karpathy_file).write_text(json.dumps({"images": images}))
    parsed, load = [], json.load
    monkeypatch.setattr(json, "load", lambda stream: parsed.append(stream.name) or load(stream))
    documents, findings = {}, Findings()
    datasets = [check_split(named, tmp_path, split, documents, findings) for split in named.sizes]
    assert [list(dataset.image_ids) for dataset in datasets] == [["train.jpg"], ["val.jpg"], ["test.jpg"]]
    assert len(parsed) == 1 and capsys.readouterr().out.count("reading ") == 1


def test_an_empty_file_counts_as_missing(flickr):
    for file in (flickr / "flickr30k-images").iterdir():
        file.unlink()
        file.touch()
    ended = run_script(SCRIPT, "flickr30k", "--root", flickr, "--splits", "test")
    assert ended.returncode == 2 and "test: 1,000 of 1,000 images are missing or empty" in ended.stdout


def test_another_size_is_named_with_the_published_one(flickr):
    rows = json.loads((flickr / "flickr30k_test.json").read_text())
    (flickr / "flickr30k_test.json").write_text(json.dumps(rows[:-1]))
    ended = run_script(SCRIPT, "flickr30k", "--root", flickr, "--splits", "test")
    assert ended.returncode == 2 and "999 images and 4,995 captions, Flickr30k's has 1,000 and 5,000" in ended.stdout


def test_an_empty_folder_lacks_everything(tmp_path):
    ended = run_script(SCRIPT, "coco", "--root", tmp_path / "absent")
    assert ended.returncode == 2 and "absent: no such folder" in ended.stdout
    assert ended.stdout.count("dataset_coco.json (Karpathy) nor") == 3
    assert "https://cocodataset.org/#download" in ended.stdout
