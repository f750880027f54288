"""Flickr30k and COCO by name: either family of annotations, in the layouts in use, at the published sizes only."""

import json
from dataclasses import replace

import pytest

from data.named_datasets import NAMED_DATASETS
from models.errors import UserError

FLICKR = NAMED_DATASETS["flickr30k"]
SMALL = replace(FLICKR, sizes={"train": (3, 6), "val": (1, 2), "test": (2, 4)})
"""The same data set with published sizes that a test can write."""


def write_family(root, family, dataset=SMALL, images="flickr30k-images"):
    """Annotations of one family for `dataset`'s sizes, without images; image paths as that family writes them."""
    names = {split: [f"{split}{i}.jpg" for i in range(n)] for split, (n, _) in dataset.sizes.items()}
    root.mkdir(parents=True, exist_ok=True)
    if family == "karpathy":
        sentences = [{"raw": "one"}, {"raw": "two"}]
        records = [{"filename": f, "split": s, "sentences": sentences} for s in names for f in names[s]]
        (root / dataset.karpathy_file).write_text(json.dumps({"images": records}))
        return
    for split, files in names.items():
        rows = [{"image": f"{images}/{f}", "caption": ["one", "two"], "image_id": f} for f in files]
        if split == "train":  # a row a caption
            rows = [{**row, "caption": caption} for row in rows for caption in row["caption"]]
        (root / dataset.list_file.format(split=split)).write_text(json.dumps(rows))


def touch(folder, names):
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        (folder / name).write_bytes(b"x")


@pytest.mark.parametrize("family", ["karpathy", "lists"])
@pytest.mark.parametrize("split", ["train", "val", "test"])
def test_either_family_gives_the_same_split(tmp_path, family, split):
    write_family(tmp_path, family)
    count = SMALL.sizes[split][0]
    touch(tmp_path / "flickr30k-images", [f"{split}{i}.jpg" for i in range(count)])
    dataset = SMALL.load(tmp_path, split)
    assert [dataset.path(i) for i in range(len(dataset))] == [
        tmp_path / "flickr30k-images" / f"{split}{i}.jpg" for i in range(count)
    ]
    assert list(dataset.captions) == ["one", "two"] * count


@pytest.mark.parametrize("annotations", ["", "annotations", "annotation"])
@pytest.mark.parametrize("images", ["flickr30k-images", "flickr30k_images", "images", ""])
def test_files_are_found_in_the_folders_in_use(tmp_path, annotations, images):
    write_family(tmp_path / annotations, "karpathy")
    touch(tmp_path / images, ["test0.jpg", "test1.jpg"])
    assert SMALL.load(tmp_path, "test").root == tmp_path / images


def test_sizes_are_those_published():
    """Hodosh et al. and Karpathy's splits: 31,014 images of five captions; COCO: 123,287 images, 616,767 captions."""
    images, captions = (sum(size[i] for size in FLICKR.sizes.values()) for i in (0, 1))
    assert (images, captions) == (31_014, 5 * 31_014)
    images, captions = (sum(size[i] for size in NAMED_DATASETS["coco"].sizes.values()) for i in (0, 1))
    assert (images, captions) == (123_287, 616_767)


@pytest.mark.parametrize("name", ["flickr30k", "coco"])
def test_another_size_is_refused_with_the_reason(tmp_path, name):
    write_family(tmp_path, "karpathy", replace(NAMED_DATASETS[name], sizes=SMALL.sizes))
    with pytest.raises(UserError, match="test split has 2 images and 4 captions.*not comparable"):
        NAMED_DATASETS[name].load(tmp_path, "test")


def test_an_absent_file_names_both_families_and_an_unknown_split_the_known(tmp_path):
    with pytest.raises(UserError, match=r"neither dataset_flickr30k.json .* nor flickr30k_val.json"):
        FLICKR.load(tmp_path, "val")
    with pytest.raises(UserError, match="no split 'restval'; it has train, val, test"):
        FLICKR.load(tmp_path, "restval")


def test_missing_images_are_counted(tmp_path):
    write_family(tmp_path, "lists")
    touch(tmp_path / "flickr30k-images", ["test1.jpg"])
    with pytest.raises(UserError, match="test0.jpg: no such image, or an empty file; 1 of the 2 images"):
        SMALL.load(tmp_path, "test")
    assert len(SMALL.load(tmp_path, "test", check_images=False)) == 2
