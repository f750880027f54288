"""Annotations: both layouts read alike, and every wrong row is an error that names it."""

import json
import pickle
import random

import pytest
from PIL import Image

from data.caption_datasets import check_evaluation_rows, load_annotations
from models.errors import UserError


def karpathy(*images) -> dict:
    """Images as (filename, split, captions)."""
    keys = ("filename", "split", "sentences")
    return {"images": [dict(zip(keys, (f, s, [{"raw": c} for c in cs]), strict=True)) for f, s, cs in images]}


def numbered(*images) -> dict:
    """Images as (filename, split, imgid, sentid), one caption each."""
    document = karpathy(*((filename, split, ["x"]) for filename, split, _, _ in images))
    for image, (_, _, imgid, sentid) in zip(document["images"], images, strict=True):
        image["imgid"], image["sentences"][0]["sentid"] = imgid, sentid
    return document


def with_fields(**fields) -> dict:
    """One image with these fields beside or in place of its own."""
    document = karpathy(("a.jpg", "test", ["x"]))
    document["images"][0] |= fields
    return document


def load(tmp_path, document, split="test", **options):
    file = tmp_path / "captions.json"
    file.write_text(document if isinstance(document, str) else json.dumps(document))
    return load_annotations(file, tmp_path, split, **options)


def test_karpathy_split_keeps_order_and_captions(tmp_path):
    document = karpathy(("b.jpg", "test", ["one", "Two"]), ("x.jpg", "train", ["no"]), ("a.jpg", "test", ["three"]))
    document["images"][2]["filepath"] = "val2014"
    document["images"][2]["subset"] = "style"
    dataset = load(tmp_path, document)
    assert dataset.image_ids == ["b.jpg", "val2014/a.jpg"] and len(dataset) == 2
    assert dataset.captions == ["one", "Two", "three"]
    assert dataset.caption_image.tolist() == [0, 0, 1] and dataset.caption_image.dtype == "int64"
    assert dataset.subsets == [None, "style"]
    assert dataset.path(1) == tmp_path / "val2014" / "a.jpg"


def test_every_caption_lies_in_its_images_range(tmp_path):
    counts = [3, 1, 5, 2]
    dataset = load(tmp_path, karpathy(*((f"{i}.jpg", "test", [f"{i}"] * n) for i, n in enumerate(counts))))
    for image, count in enumerate(counts):
        start, stop = dataset.caption_range(image)
        assert dataset.captions[start:stop] == [str(image)] * count


def test_restval_counts_as_train(tmp_path):
    document = karpathy(("a.jpg", "train", ["x"]), ("b.jpg", "restval", ["y"]), ("c.jpg", "val", ["z"]))
    assert load(tmp_path, document, "train").image_ids == ["a.jpg", "b.jpg"]
    assert load(tmp_path, document, "val").image_ids == ["c.jpg"]


def test_a_list_with_a_row_a_caption_equals_one_with_lists(tmp_path):
    rows = [
        {"image": "a.jpg", "caption": "one"},
        {"image": "b.jpg", "caption": "x"},
        {"image": "a.jpg", "caption": "two"},
    ]
    lists = [{"image": "a.jpg", "caption": ["one", "two"]}, {"image": "b.jpg", "caption": ["x"]}]
    first, second = load(tmp_path, rows), load(tmp_path, lists)
    assert first.image_ids == second.image_ids == ["a.jpg", "b.jpg"]
    assert first.captions == second.captions == ["one", "two", "x"]
    assert first.caption_image.tolist() == second.caption_image.tolist() == [0, 0, 1]


@pytest.mark.parametrize(
    ("document", "message"),
    [
        ("", "captions.json: empty"),
        ('{"images": [{"filen', "not valid JSON"),
        ({"annotations": []}, "expected"),
        ({"images": []}, "lists no images"),
        ([], "lists no images"),
        (karpathy(("a.jpg", "train", ["x"])), r"no split 'test'; there are train \(1 images\)"),
        (karpathy(("a.jpg", "test", [])), "'a.jpg' has no captions"),
        (karpathy(("a.jpg", "test", ["x", "  \n"])), "'a.jpg' has an empty caption"),
        (karpathy(("a.jpg", "test", [7])), "'a.jpg' has the caption 7; expected text"),
        (karpathy(("a.jpg", "test", ["x"]), ("a.jpg", "test", ["y"])), "'a.jpg' is listed twice"),
        ({"images": [{"filename": "a.jpg", "split": "test", "sentences": "a cat"}]}, "expected a list"),
        ({"images": [{"split": "test"}]}, r"images\[0\] has no \"filename\""),
        (with_fields(filepath=7), r'images\[0\]: "filepath" is 7; expected text'),
        (with_fields(filepath=["a"]), r'"filepath" is \[\'a\'\]; expected text'),
        (with_fields(split=3), '"split" is 3; expected text'),
        (with_fields(subset=["style"]), '"subset" is .*; expected text'),
        (with_fields(filename="a\nb.jpg"), r'"filename" is \'a\\nb.jpg\'; expected text of one line'),
        (karpathy(("a.jpg", "test", ["bad \ud800 text"])), "'a.jpg' has the caption .*half a surrogate pair"),
        (karpathy(("a.jpg", "test", ["x"]), ("a.jpg", "val", ["y"])), "'a.jpg' is in the splits 'test' and 'val'"),
        (karpathy(("a.jpg", "test", ["x"]), ("b/../a.jpg", "val", ["y"])), "'b/../a.jpg' is in the splits"),
        (karpathy(("a.jpg", "test", ["x"]), ("b/../a.jpg", "test", ["y"])), "'b/../a.jpg' is the same file as 'a.jpg'"),
        (numbered(("a.jpg", "test", 5, 1), ("b.jpg", "val", 5, 2)), "'a.jpg' and 'b.jpg' have one imgid, 5"),
        (numbered(("a.jpg", "test", 5, 1), ("b.jpg", "val", 6, 1)), "'a.jpg' and 'b.jpg', have one sentid, 1"),
        ([{"image": "a.jpg", "caption": "x", "subset": 3}], 'row 0: "subset" is 3'),
        ([{"image": "a\nb.jpg", "caption": "x"}], 'row 0: "image" is'),
        ([{"image": "b.jpg", "caption": "x"}, {"image": "./b.jpg", "caption": "x"}], "is the same file as 'b.jpg'"),
        ([{"image": "a.jpg"}], "row 0 lacks"),
        ([{"image": "a.jpg", "caption": None}], "'a.jpg' has the caption None"),
        ([{"image": "a.jpg", "caption": []}], "'a.jpg' has no captions"),
        ([{"image": "a.jpg", "caption": ["x"]}, {"image": "a.jpg", "caption": ["y"]}], "'a.jpg' is listed twice"),
    ],
)  # fmt: skip
def test_a_wrong_file_is_an_error_of_one_line_that_names_it(tmp_path, document, message):
    with pytest.raises(UserError, match=message) as caught:
        load(tmp_path, document)
    assert "captions.json" in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("other", ["../{root}/a.jpg", "{path}/a.jpg", "x/..//a.jpg"])
def test_a_path_that_leads_back_into_the_root_is_the_same_image(tmp_path, other):
    other = other.format(root=tmp_path.name, path=tmp_path)
    rows = [{"image": "b.jpg", "caption": "x"}, {"image": "a.jpg", "caption": "x"}, {"image": other, "caption": "y"}]
    with pytest.raises(UserError, match="is the same file as 'a.jpg', spelled differently"):
        load(tmp_path, rows)
    assert load(tmp_path, [rows[0], rows[2], rows[2]]).image_ids == ["b.jpg", other]  # consistent: left as it is


def test_equal_captions_and_numbers_that_public_files_repeat_are_read(tmp_path):
    """COCO has images with one caption twice; BLIP's training lists repeat image_id over the rows of an image."""
    document = numbered(("a.jpg", "test", 0, 0), ("b.jpg", "test", 1, 1))
    document["images"][0]["sentences"].append({"raw": "x", "sentid": 2})
    assert load(tmp_path, document).captions == ["x", "x", "x"]
    rows = [{"image": "a.jpg", "caption": "x", "image_id": "coco_1"}] * 2
    assert load(tmp_path, rows).captions == ["x", "x"]


def test_an_evaluation_list_has_no_row_twice_and_no_number_of_two_images(tmp_path):
    file = tmp_path / "test.json"
    rows = [{"image": image, "caption": caption, "image_id": image} for image in "ab" for caption in "xy"]
    lists = [{"image": "a", "caption": ["x", "x"], "image_id": 0}, {"image": "b", "caption": ["x"], "image_id": 1}]
    for right in (rows, lists):
        file.write_text(json.dumps(right))
        check_evaluation_rows(file)
    for wrong, message in (
        (rows * 2, "test.json: image 'a' has the caption 'x' in two rows"),
        ([row | {"image_id": 7} for row in rows], "test.json: images 'a' and 'b' have one image_id, 7"),
    ):
        file.write_text(json.dumps(wrong))
        with pytest.raises(UserError, match=message):
            check_evaluation_rows(file)


def test_a_missing_file_or_a_directory_is_an_error(tmp_path):
    with pytest.raises(UserError, match="absent.json: no such file"):
        load_annotations(tmp_path / "absent.json", tmp_path, "test")
    with pytest.raises(UserError, match="it holds no images"):
        load_annotations(tmp_path, tmp_path, "test")


def test_missing_and_empty_images_are_counted_and_the_first_named(tmp_path):
    Image.new("RGB", (2, 2)).save(tmp_path / "a.png")
    document = karpathy(*((f"{name}.png", "test", ["x"]) for name in "abc"))
    with pytest.raises(UserError, match=r"b.png: no such image, or an empty file; 2 of the 3 images"):
        load(tmp_path, document, check_images=True)
    (tmp_path / "b.png").touch()
    with pytest.raises(UserError, match=r"b.png: .* an empty file; 2 of the 3 images"):
        load(tmp_path, document, check_images=True)
    with pytest.raises(UserError, match=r"aaa.png: no such image"):  # longer than a file's name can be
        load(tmp_path, karpathy(("a" * 5000 + ".png", "test", ["x"])), check_images=True)
    assert len(load(tmp_path, karpathy(("a.png", "test", ["x"])), check_images=True)) == 1


def write_list(file, rows):
    file.write_text(json.dumps([{"image": image, "caption": caption} for image, caption in rows]))
    return file


@pytest.mark.parametrize("cached", [False, True])
@pytest.mark.parametrize("seed", range(5))
def test_several_lists_are_one_with_the_captions_of_all(tmp_path, seed, cached):
    rng = random.Random(seed)
    of_files = [[(f"{rng.randrange(8)}.jpg", f"{f} {i}") for i in range(rng.randrange(1, 12))] for f in range(3)]
    files = [write_list(tmp_path / f"{f}.json", rows) for f, rows in enumerate(of_files)]
    expected = {}
    for image, caption in (row for rows in of_files for row in rows):
        expected.setdefault(image, []).append(caption)
    cache = tmp_path / "cache" if cached else None
    for _ in range(2):  # written, then read
        dataset = load_annotations(files, tmp_path, None, cache=cache)
        assert dataset.image_ids == list(expected)
        assert [dataset.captions[slice(*dataset.caption_range(i))] for i in range(len(dataset))] == [*expected.values()]
        assert list(dataset.subsets) == [None] * len(expected)


def test_a_cached_data_set_is_the_one_read_and_travels_as_its_folder(tmp_path):
    document = karpathy(*((f"{i}.jpg", "test" if i % 2 else "val", ["caption", str(i)]) for i in range(600)))
    for i, image in enumerate(document["images"]):
        image["subset"] = [None, "style", "place"][i % 3]
    plain, cached = load(tmp_path, document), load(tmp_path, document, cache=tmp_path / "cache")
    assert load(tmp_path, document, "val", cache=tmp_path / "cache").image_ids[0] == "0.jpg"
    sent = pickle.dumps(cached)
    assert len(sent) < 1000
    for dataset in (cached, pickle.loads(sent), pickle.loads(pickle.dumps(plain))):
        assert dataset.image_ids == plain.image_ids and dataset.captions == plain.captions
        assert dataset.caption_image.tolist() == plain.caption_image.tolist()
        assert list(dataset.subsets) == list(plain.subsets) and set(plain.subsets) == {None, "style", "place"}


def test_lists_of_captions_in_two_files_join_and_in_one_file_do_not(tmp_path):
    files = [write_list(tmp_path / f"{f}.json", [("a.jpg", [f"{f} one", f"{f} two"])]) for f in "xy"]
    assert load_annotations(files, tmp_path, None).captions == ["x one", "x two", "y one", "y two"]
    write_list(files[1], [("b.jpg", "z"), ("a.jpg", "one"), ("a.jpg", ["two"])])
    with pytest.raises(UserError, match="y.json: image 'a.jpg' is listed twice"):
        load_annotations(files, tmp_path, None)


def test_a_file_named_twice_and_an_empty_one_among_others_are_errors(tmp_path):
    files = [write_list(tmp_path / "a.json", [("a.jpg", "x")]), write_list(tmp_path / "b.json", [])]
    with pytest.raises(UserError, match="a.json: given twice"):
        load_annotations([files[0], files[0]], tmp_path, None)
    with pytest.raises(UserError, match="b.json: lists no images"):
        load_annotations(files, tmp_path, None)
