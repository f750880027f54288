"""The data of a run: several lists, their cache, and a validation split that is never the training data."""

import json

import pytest

from data.webdataset_shards import ShardDataset
from models.distributed import DistributedContext
from models.errors import UserError
from tests.shards import write_shards
from training.config import DataConfig, RunConfig
from training.setup import load_training_split, load_validation_split


@pytest.fixture
def lists(tmp_path):
    """Two training lists that share an image, and a validation list."""
    for name, rows in {"a": [("1", "x"), ("2", "y")], "b": [("2", "z"), ("3", "w")], "val": [("9", "v")]}.items():
        rows = [{"image": f"{image}.jpg", "caption": caption} for image, caption in rows]
        (tmp_path / f"{name}.json").write_text(json.dumps(rows))
    return tmp_path


def config(root, **data) -> RunConfig:
    return RunConfig(data=DataConfig(root=str(root), **data))


def test_lists_are_trained_on_as_one_with_and_without_a_cache(lists):
    for cache in ("", str(lists / "cache"), str(lists / "cache")):
        dataset = load_training_split(
            config(lists, annotations=("a.json", "b.json"), cache=cache), DistributedContext()
        )
        assert dataset.image_ids == ["1.jpg", "2.jpg", "3.jpg"] and dataset.captions == ["x", "y", "z", "w"]
        assert bool(dataset.folder) == bool(cache)


def test_validation_reads_its_own_file_or_another_split_but_never_a_training_list(lists, scenes, annotations):
    assert load_validation_split(config(lists, annotations="a.json", val_split="")) is None
    own = load_validation_split(config(lists, annotations=("a.json", "b.json"), val_annotations="val.json"))
    assert own.captions == ["v"]
    assert len(load_validation_split(config(scenes, annotations=annotations.name))) == 12
    with pytest.raises(UserError, match="b.json is what is trained on; name another file in data.val_annotations"):
        load_validation_split(config(lists, annotations=("b.json", "a.json")))


def test_a_run_without_data_is_refused(tmp_path):
    with pytest.raises(UserError, match="data.root and data.annotations are needed"):
        load_training_split(config(tmp_path), DistributedContext())


def test_shards_stand_for_annotations_and_validation_reads_its_own_file(lists):
    write_shards(lists / "cc", [3, 2])
    own = config(lists, shards="cc/{00000..00001}.tar", val_annotations="val.json")
    own = RunConfig(data=own.data, output=str(lists / "run"))
    dataset = load_training_split(own, DistributedContext())
    assert isinstance(dataset, ShardDataset) and len(dataset) == 5 and dataset.folder.parent == lists / "run" / "cache"
    assert load_validation_split(own).captions == ["v"]
    with pytest.raises(UserError, match="data.shards is what is trained on; name another file"):
        load_validation_split(config(lists, shards="cc/*.tar"))
    with pytest.raises(UserError, match="data.shards stands for data.annotations"):
        DataConfig(shards="cc/*.tar", annotations="a.json")
