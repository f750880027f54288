"""Hugging Face datasets as annotations: written, saved and loaded by the real package, compared with what went in."""

from __future__ import annotations

import pickle
import shutil
import sys
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from datasets import Dataset, DatasetDict, Features, List, Value

from data.annotation_records import ColumnNames
from data.batches import BatchPlan, ImageRows, TrainingBatches
from data.caption_datasets import CaptionDataset, load_annotations, read_field
from data.huggingface_datasets import DatasetImages, annotation_path
from evaluation.output import DIRECTION_ARRAYS
from models.errors import UserError
from models.stores.token_store import TokenStore
from models.vision.images import ImageError, open_image
from tests.processes import run_script
from tests.shards import jpeg

ONE, SEVERAL = Value("string"), List(Value("string"))
PICTURES = [jpeg(seed) for seed in range(5)]


def of_rows(images: list, captions: list, kind=ONE, **more: list) -> Dataset:
    """Bytes of image files in the rows, or whatever else an Image feature takes."""
    rows = [{"bytes": image, "path": None} if isinstance(image, bytes) else image for image in images]
    columns = {"image": rows, "caption": captions, **more}
    kinds = {"image": datasets.Image(), "caption": kind} | {name: Value("string") for name in more}
    return Dataset.from_dict(columns, Features(kinds))


def saved(data: Dataset | DatasetDict, folder: Path) -> Path:
    data.save_to_disk(folder)
    return folder


def pairs(dataset: CaptionDataset) -> list[tuple[bytes, list[str]]]:
    """Every image's pixels and captions."""
    found = []
    for image in range(len(dataset)):
        start, stop = dataset.caption_range(image)
        found.append((dataset.open_image(image).tobytes(), list(dataset.captions[start:stop])))
    return found


def pixels(content: bytes) -> bytes:
    return open_image(content).tobytes()


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch) -> None:
    """What load_dataset() prepares stays in the test's folder, and the Hub is not asked."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)


def test_rows_hold_images_and_lists_of_captions(tmp_path):
    captions = [[f"{number}, said once", f"{number}, said twice"] for number in range(5)]
    dataset = load_annotations(saved(of_rows(PICTURES, captions, SEVERAL), tmp_path / "saved"), ".", None)
    assert pairs(dataset) == [(pixels(picture), of) for picture, of in zip(PICTURES, captions, strict=True)]
    assert dataset.image_ids == [f"{row:08d}" for row in range(5)]
    assert read_field(tmp_path / "saved", dataset, "style") == [None] * 5


def test_rows_of_one_caption_are_put_together_where_they_hold_the_same_picture(tmp_path):
    rows = of_rows([PICTURES[i] for i in (0, 1, 0, 2, 1, 0)], [f"caption {row}" for row in range(6)])
    dataset = load_annotations(saved(rows, tmp_path / "saved"), ".", None)
    assert pairs(dataset) == [
        (pixels(PICTURES[0]), ["caption 0", "caption 2", "caption 5"]),
        (pixels(PICTURES[1]), ["caption 1", "caption 4"]),
        (pixels(PICTURES[2]), ["caption 3"]),
    ]
    assert dataset.image_ids == ["00000000", "00000001", "00000003"]


def test_keys_of_a_dictionary_are_splits_and_an_id_is_the_same_whatever_is_read(tmp_path):
    keys = {"train": [0, 1, 1], "validation": [1, 2], "test": [3, 3]}
    rows = {key: of_rows([PICTURES[i] for i in of], [f"{key} {i}" for i in range(len(of))]) for key, of in keys.items()}
    folder = saved(DatasetDict(rows), tmp_path / "saved")
    whole = load_annotations(folder, ".", None)
    ids = ["train/00000000", "train/00000001", "validation/00000000", "validation/00000001", "test/00000000"]
    assert whole.image_ids == ids
    of_splits = [load_annotations(folder, ".", split) for split in ("train", "val", "test")]
    assert [image_id for of_split in of_splits for image_id in of_split.image_ids] == ids
    assert [pair for of_split in of_splits for pair in pairs(of_split)] == pairs(whole)
    with pytest.raises(UserError, match=r"saved: no split 'dev2'; there are test \(2 rows\), train \(3 rows\), valid"):
        load_annotations(folder, ".", "dev2")


def test_images_of_other_splits_are_not_read(tmp_path, monkeypatch):
    read = []
    first_rows = DatasetImages.first_rows
    monkeypatch.setattr(DatasetImages, "first_rows", lambda self, key: read.append(key) or first_rows(self, key))
    rows = {key: of_rows(PICTURES, ["a", "b", "c", "d", "e"]) for key in ("train", "test")}
    load_annotations(saved(DatasetDict(rows), tmp_path / "saved"), ".", "test")
    assert read == ["test"]


def test_a_column_of_splits_goes_before_the_keys(tmp_path):
    """As in nlphuji/flickr30k: all rows under the key `test`."""
    rows = of_rows(PICTURES, list("abcde"), split=["train", "val", "test", "train", "test"])
    folder = saved(DatasetDict({"test": rows}), tmp_path / "saved")
    assert load_annotations(folder, ".", "train").captions == ["a", "d"]
    assert load_annotations(folder, ".", "test").image_ids == ["test/00000002", "test/00000004"]


def test_a_dataset_that_is_not_divided_is_divided_by_val_share(tmp_path):
    rows = of_rows([PICTURES[i % 5] for i in range(10)], [f"caption {row}" for row in range(10)])
    folder = saved(rows, tmp_path / "saved")
    train, val = (load_annotations(folder, ".", split, val_share=0.5) for split in ("train", "val"))
    assert len(train) and len(val) and sorted([*train.image_ids, *val.image_ids]) == [f"{row:08d}" for row in range(5)]
    assert all(len(captions) == 2 for dataset in (train, val) for _, captions in pairs(dataset))


def test_a_column_of_paths_names_files_under_the_root(tmp_path):
    (tmp_path / "photos").mkdir()
    for number, picture in enumerate(PICTURES):
        (tmp_path / "photos" / f"{number}.jpg").write_bytes(picture)
    names = [f"photos/{number}.jpg" for number in (0, 1, 0, 3)]
    rows = Dataset.from_dict({"file_name": names, "text": list("abcd")})
    dataset = load_annotations(saved(rows, tmp_path / "saved"), tmp_path, None, check_images=True)
    assert dataset.image_ids == ["photos/0.jpg", "photos/1.jpg", "photos/3.jpg"]
    assert pairs(dataset)[0] == (pixels(PICTURES[0]), ["a", "c"])


def test_columns_of_unusual_names_are_named(tmp_path):
    columns = {"picture": PICTURES, "thumbnail": PICTURES, "answer": [["a"]] * 5, "id": range(5)}
    kinds = Features(picture=datasets.Image(), thumbnail=datasets.Image(), answer=SEVERAL, id=Value("int64"))
    folder = saved(Dataset.from_dict(columns, kinds), tmp_path / "saved")
    assert len(load_annotations(folder, ".", None, columns=ColumnNames("picture", "answer")).captions) == 5
    with pytest.raises(UserError, match=r"no column for the image among 'picture', 'thumbnail', 'answer', 'id'"):
        load_annotations(folder, ".", None)
    with pytest.raises(UserError, match=r"column 'id' holds Value\('int64'\), not captions or lists of captions; name"):
        load_annotations(folder, ".", None, columns=ColumnNames("picture", "id"))
    with pytest.raises(UserError, match=r"column 'answer' holds List\(Value\('string'\)\), not images or paths; name"):
        load_annotations(folder, ".", None, columns=ColumnNames("answer", "answer"))


def test_a_name_is_loaded_by_load_dataset(tmp_path, monkeypatch):
    """A directory OWNER/NAME stands for the repository, which load_dataset() takes as well."""
    monkeypatch.chdir(tmp_path)
    Path("owner/name").mkdir(parents=True)
    of_rows(PICTURES, list("abcde")).to_parquet("owner/name/train-00000.parquet")
    of_rows(PICTURES[:2], list("xy")).to_parquet("owner/name/test-00000.parquet")
    dataset = load_annotations("hf:owner/name", "elsewhere", "test", check_images=True)
    assert pairs(dataset) == [(pixels(PICTURES[0]), ["x"]), (pixels(PICTURES[1]), ["y"])]
    assert annotation_path("root", "hf:owner/name") == Path("hf:owner/name")
    with pytest.raises(UserError, match=r"hf:owner/none: cannot be loaded \(.*\); check the name and the network"):
        load_annotations("hf:owner/none", ".", None)
    with pytest.raises(UserError, match=r"hf:: cannot be loaded \(expected hf:OWNER/NAME\)"):
        load_annotations("hf:", ".", None)
    with pytest.raises(UserError, match=r"hf:owner/name:large: cannot be loaded \(BuilderConfig 'large' not found"):
        load_annotations("hf:owner/name:large", ".", None)


def test_columns_are_cached_and_travel_as_the_names_of_files(tmp_path, monkeypatch):
    rows = of_rows(PICTURES, list("abcde"))
    folder = saved(DatasetDict({"train": rows}), tmp_path / "saved")
    dataset = load_annotations(folder, ".", "train", cache=tmp_path / "columns")
    monkeypatch.setattr("data.caption_datasets._read_columns", None)  # what would read the rows again
    again = load_annotations(folder, ".", "train", cache=tmp_path / "columns")
    sent = pickle.dumps(again)
    assert len(sent) < sum(map(len, PICTURES)) and PICTURES[0][:64] not in sent
    assert pairs(again) == pairs(pickle.loads(sent)) == pairs(dataset)


def test_another_dataset_under_the_same_name_is_read_again(tmp_path):
    folder, cached = tmp_path / "saved", tmp_path / "columns"
    saved(of_rows(PICTURES, list("abcde")), folder)
    assert load_annotations(folder, ".", None, cache=cached).captions == list("abcde")
    shutil.rmtree(folder)
    saved(of_rows(PICTURES, list("vwxyz")), folder)
    assert load_annotations(folder, ".", None, cache=cached).captions == list("vwxyz")


def test_workers_read_the_rows_and_a_bad_image_is_replaced_and_named(tmp_path):
    pictures = [*PICTURES[:3], PICTURES[3][:100], None]
    rows = of_rows(pictures, [["a"], ["b"], ["c"], ["d"], ["e"]], SEVERAL)
    dataset = load_annotations(saved(DatasetDict({"train": rows}), tmp_path / "saved"), ".", "train")
    with pytest.raises(ImageError, match=r"saved: row 3 of train: image cannot be decoded"):
        dataset.open_image(3)
    with pytest.raises(ImageError, match=r"saved: row 4 of train has no image; remove the row"):
        dataset.open_image(4)
    plan = BatchPlan(dataset, batch_size=5, seed=1)
    reader = ImageRows(lambda image: torch.from_numpy(np.array(image)).float())
    [batch] = TrainingBatches(plan, reader).read(0, 1, num_workers=1)
    assert set(batch.images.tolist()) <= {0, 1, 2}
    assert {line.partition(" of train")[0][-5:] for line in batch.unreadable} == {"row 3", "row 4"}


def test_rows_without_a_caption_are_left_out_of_training_and_refused_in_an_evaluation(tmp_path):
    rows = of_rows(PICTURES, [["a"], [], None, [None, "d"], [" "]], SEVERAL)
    folder = saved(rows, tmp_path / "saved")
    dataset = load_annotations(folder, ".", None, lenient=True)
    assert dataset.image_ids == ["00000000", "00000003"] and dataset.captions == ["a", "d"]
    assert len(dataset.left_out) == 3
    with pytest.raises(UserError, match=r"saved: image '00000001' has no captions"):
        load_annotations(folder, ".", None)


def test_what_cannot_be_read_is_one_line(tmp_path):
    folder = saved(of_rows(PICTURES, list("abcde")), tmp_path / "saved")
    with pytest.raises(UserError, match=r"saved: a Hugging Face dataset is read alone"):
        load_annotations([folder, tmp_path / "other.json"], ".", None)
    [arrow] = folder.glob("*.arrow")
    arrow.write_bytes(arrow.read_bytes()[:50])
    with pytest.raises(UserError, match=r"saved: cannot be loaded \(.*\); save it again with save_to_disk") as error:
        load_annotations(folder, ".", None)
    assert "\n" not in str(error.value)
    empty = saved(DatasetDict({}), tmp_path / "empty")
    with pytest.raises(UserError, match=r"empty: has no rows"):
        load_annotations(empty, ".", None)


def test_without_the_package_its_installation_is_named(tmp_path, monkeypatch):
    folder = saved(of_rows(PICTURES, list("abcde")), tmp_path / "saved")
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(UserError, match=r"saved: a Hugging Face dataset, which needs a package; pip install datasets"):
        load_annotations(folder, ".", None)


def run(script: str, *arguments: str | Path) -> None:
    done = run_script(script, *arguments)
    assert done.returncode == 0, done.stderr


def test_a_run_on_a_saved_dataset_is_the_run_on_its_files(scenes, annotations, run_config, tmp_path):
    """Training, evaluation and a store of tokens, as a user starts them."""
    rows = {}
    for split in ("train", "test"):
        files = load_annotations(annotations, scenes, split)
        pictures = [files.path(image).read_bytes() for image in range(len(files))]
        captions = [files.captions[slice(*files.caption_range(image))] for image in range(len(files))]
        rows[split] = of_rows(pictures, captions, SEVERAL)
    sources = {"files": annotations, "rows": saved(DatasetDict(rows), tmp_path / "saved")}
    rankings, tokens = {}, {}
    for name, source in sources.items():
        out = tmp_path / name
        run("train.py", "--config", run_config, "training.steps=2", f"output={out}", f"data.annotations={source}")
        run("evaluation/evaluate_retrieval.py", "--checkpoint", out, "--out", out)
        rankings[name] = np.load(out / "rankings.npz")
        select = ("--images", source, "--split", "test")
        run("scripts/precompute_tokens.py", "--checkpoint", out, *select, "--out", out / "store")
        store = TokenStore.open(out / "store")
        tokens[name] = store.gather(store.ids)
    for array in DIRECTION_ARRAYS:
        assert np.array_equal(rankings["files"][f"t2i_{array}"], rankings["rows"][f"t2i_{array}"])
    assert torch.equal(tokens["files"], tokens["rows"])
    assert store.ids == [f"test/{row:08d}" for row in range(12)]
    assert "data:image/" in (tmp_path / "rows" / "report.html").read_text()
