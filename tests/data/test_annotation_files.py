"""Annotations as people have them: every layout gives the same images and captions, and every mistake one line."""

import csv
import gzip
import io
import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from data.annotation_files import ColumnNames, open_annotations
from data.caption_datasets import CaptionDataset, check_evaluation_rows, is_validation, load_annotations
from data.coco import coco_file
from data.named_datasets import NAMED_DATASETS
from data.webdataset_shards import load_shards
from models.errors import UserError
from tests.shards import jpeg, sample, write_tar

CAPTIONS = {
    "b/2.jpg": ["a red ball", 'the word "stop", in white'],
    "a/1.jpg": ["zwei Hunde am Meer, naß"],
    "3.jpg": ["x"],
}
ROWS = [(image, caption) for image, captions in CAPTIONS.items() for caption in captions]


def table(delimiter: str, header: tuple[str, ...], quoting: int = csv.QUOTE_MINIMAL, end: str = "\n"):
    def write(file: Path) -> None:
        with file.open("w", encoding="utf-8", newline="") as stream:
            writer = csv.writer(stream, delimiter=delimiter, quoting=quoting, lineterminator=end, escapechar="\\")
            writer.writerow(header)
            writer.writerows(ROWS)

    return write


def json_lines(image: str, caption: str):
    return lambda file: file.write_text("".join(json.dumps({image: i, caption: c}) + "\n" for i, c in ROWS))


def coco(file: Path) -> None:
    images = [{"id": 7 * number, "file_name": image} for number, image in enumerate(CAPTIONS)]
    numbers = {image["file_name"]: image["id"] for image in images}
    annotations = [{"id": n, "image_id": numbers[i], "caption": c} for n, (i, c) in enumerate(ROWS)]
    file.write_text(json.dumps({"info": {}, "images": images, "licenses": [], "annotations": annotations[::-1]}))


def results_csv(file: Path) -> None:
    lines = [f"{image}| {number}| {caption} ." for number, (image, caption) in enumerate(ROWS)]
    lines[-1] = lines[-1].replace("| x", "   x")  # the published file has one such row
    file.write_text("\n".join(["image_name| comment_number| comment", *lines]) + "\n", encoding="utf-8")


def token(file: Path) -> None:
    file.write_text("".join(f"{i}#{n}\t{c}\n" for n, (i, c) in enumerate(ROWS)), encoding="utf-8")


def parquet(file: Path) -> None:
    images, captions = zip(*ROWS, strict=True)
    pq.write_table(pa.table({"url": ["u"] * len(ROWS), "image": images, "caption": captions}), file)


def parquet_of_lists(file: Path) -> None:
    pq.write_table(pa.table({"file_name": list(CAPTIONS), "captions": list(CAPTIONS.values())}), file)


LAYOUTS = {
    "open_clip.tsv": table("\t", ("filepath", "title")),
    "semicolon.csv": table(";", ("image", "caption")),
    "windows.csv": table(",", ("image", "caption"), csv.QUOTE_ALL, "\r\n"),
    "captions.csv": table(",", ("image_path", "text")),
    "rows.jsonl": json_lines("image", "caption"),
    "metadata.jsonl": json_lines("file_name", "text"),
    "captions_val2017.json": coco,
    "results.token": token,
    "rows.parquet": parquet,
    "lists.parquet": parquet_of_lists,
    "blip.json": lambda file: file.write_text(json.dumps([{"image": i, "caption": c} for i, c in ROWS])),
}


def found(dataset: CaptionDataset) -> dict[str, list[str]]:
    return {
        image: [dataset.captions[c] for c in range(*dataset.caption_range(number))]
        for number, image in enumerate(dataset.image_ids)
    }


@pytest.mark.parametrize("name", LAYOUTS)
@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"])
def test_every_layout_gives_the_same_captions(tmp_path, name, mark):
    """COCO's annotations may come in any order; a byte order mark is no part of a text."""
    LAYOUTS[name](tmp_path / name)
    if not name.endswith(".parquet"):
        (tmp_path / name).write_bytes(mark + (tmp_path / name).read_bytes())
    captions = found(load_annotations(tmp_path / name, tmp_path, "train"))
    assert {image: sorted(texts) for image, texts in captions.items()} == {i: sorted(t) for i, t in CAPTIONS.items()}
    assert list(captions) == list(CAPTIONS)


def test_flickrs_results_csv_is_read_with_its_broken_row(tmp_path):
    results_csv(tmp_path / "results.csv")
    captions = found(load_annotations(tmp_path / "results.csv", tmp_path, None))
    assert captions == {image: [f"{text} ." for text in texts] for image, texts in CAPTIONS.items()}


def test_a_caption_that_begins_with_a_quote_swallows_no_rows(tmp_path):
    (tmp_path / "a.tsv").write_text('filepath\ttitle\n1.jpg\t"open\n2.jpg\ta "good" one\n3.jpg\t"he said ""no"""\n')
    captions = found(load_annotations(tmp_path / "a.tsv", tmp_path, None))
    assert captions == {"1.jpg": ['"open'], "2.jpg": ['a "good" one'], "3.jpg": ['he said "no"']}
    (tmp_path / "a.csv").write_text('image,caption\n1.jpg,"two\nlines"\n2.jpg,x\n')
    assert found(load_annotations(tmp_path / "a.csv", tmp_path, None)) == {"1.jpg": ["two\nlines"], "2.jpg": ["x"]}
    for text in ('1.jpg,"open\n2.jpg,x\n', '1.jpg,"open\n2.jpg,"x"\n'):
        (tmp_path / "a.csv").write_text(f"image,caption\n{text}")
        with pytest.raises(UserError, match="a.csv: line 3 cannot be read .*close or double its quotes"):
            load_annotations(tmp_path / "a.csv", tmp_path, None)


def test_columns_are_known_in_capitals_too(tmp_path):
    (tmp_path / "a.csv").write_text(",Image,Caption\n0,1.jpg,x\n")  # with the index that pandas writes
    assert found(load_annotations(tmp_path / "a.csv", tmp_path, None)) == {"1.jpg": ["x"]}


def test_columns_of_any_name_can_be_named(tmp_path):
    table(",", ("bild", "beschreibung"))(tmp_path / "a.csv")
    names = ColumnNames("bild", "beschreibung")
    assert found(load_annotations(tmp_path / "a.csv", tmp_path, None, columns=names)) == CAPTIONS
    with pytest.raises(
        UserError, match=r"a.csv: no column for the image among 'bild', 'beschreibung'.*image_column=NAME"
    ):
        load_annotations(tmp_path / "a.csv", tmp_path, None)
    with pytest.raises(UserError, match="no column 'image' among 'bild'"):
        load_annotations(tmp_path / "a.csv", tmp_path, None, columns=ColumnNames("image", "beschreibung"))


def test_a_column_says_the_split(tmp_path):
    rows = [{"file_name": f"{n}.jpg", "text": "x", "split": s} for n, s in enumerate(["train", "validation", "train"])]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "a.json").write_text(json.dumps([row | {"image": row["file_name"], "caption": "x"} for row in rows]))
    (tmp_path / "a.csv").write_text("image,caption,part\n0.jpg,x,train\n1.jpg,x,val\n2.jpg,x,train\n")
    for name, columns in (("a.jsonl", ColumnNames()), ("a.json", ColumnNames()), ("a.csv", ColumnNames(split="part"))):
        read = {
            split: load_annotations(tmp_path / name, tmp_path, split, columns=columns) for split in ("train", "val")
        }
        assert [list(read[split].image_ids) for split in read] == [["0.jpg", "2.jpg"], ["1.jpg"]]
        with pytest.raises(UserError, match=r"no split 'test'; there are train \(2 rows\), val"):
            load_annotations(tmp_path / name, tmp_path, "test", columns=columns)
        with pytest.raises(UserError, match="says itself which split an image is of; leave val_share out"):
            load_annotations(tmp_path / name, tmp_path, "val", columns=columns, val_share=0.1)


def test_val_share_holds_out_the_same_images_in_every_layout_and_beside_any_others(tmp_path):
    images = [f"folder/{number}.jpg" for number in range(400)]
    (tmp_path / "all.csv").write_text("image,caption\n" + "".join(f"{image},x\n" for image in images))
    (tmp_path / "half.jsonl").write_text("".join(json.dumps({"image": i, "caption": "y"}) + "\n" for i in images[::2]))
    (tmp_path / "odd.csv").write_text("image,caption\n" + "".join(f"./folder/../{image},x\n" for image in images))
    parts = [
        set(load_annotations(tmp_path / "all.csv", tmp_path, s, val_share=0.1).image_ids) for s in ("train", "val")
    ]
    assert parts[0] | parts[1] == set(images) and not parts[0] & parts[1] and 20 < len(parts[1]) < 60
    half = load_annotations(tmp_path / "half.jsonl", tmp_path, "val", val_share=0.1)
    assert set(half.image_ids) == parts[1] & set(images[::2])
    odd = load_annotations(tmp_path / "odd.csv", tmp_path, "val", val_share=0.1)
    assert {image.removeprefix("./folder/../") for image in odd.image_ids} == parts[1]
    more = set(load_annotations(tmp_path / "all.csv", tmp_path, "val", val_share=0.3).image_ids)
    assert parts[1] < more
    assert is_validation("folder/0.jpg", 1.0 - 1e-12) and not is_validation("folder/0.jpg", 0.0)
    with pytest.raises(UserError, match="no split 'test'; val_share makes train and val of it"):
        load_annotations(tmp_path / "all.csv", tmp_path, "test", val_share=0.1)
    with pytest.raises(UserError, match="val_share is 1.5"):
        load_annotations(tmp_path / "all.csv", tmp_path, "val", val_share=1.5)


def test_a_folder_of_pictures_with_texts_beside_them(tmp_path):
    for name in ("a/1.png", "a/2.jpg", "3.webp"):
        (tmp_path / "photos" / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (4, 4)).save(tmp_path / "photos" / name)
    (tmp_path / "photos" / "a" / "1.txt").write_text("a red ball\n\na ball on grass\n", encoding="utf-8-sig")
    (tmp_path / "photos" / "a" / "2.txt").write_text(" \n")
    (tmp_path / "photos" / "a" / "2.json").write_text(json.dumps({"caption": "two dogs", "width": 3}))
    (tmp_path / "photos" / "3.txt").write_text("x")
    expected = {"3.webp": ["x"], "a/1.png": ["a red ball", "a ball on grass"], "a/2.jpg": ["two dogs"]}
    assert found(load_annotations(tmp_path / "photos", tmp_path / "photos", None, check_images=True)) == expected
    above = load_annotations(tmp_path / "photos", tmp_path, None, check_images=True)
    assert found(above) == {f"photos/{image}": texts for image, texts in expected.items()}
    with pytest.raises(UserError, match="lies outside of the data root"):
        load_annotations(tmp_path / "photos", tmp_path / "photos" / "a", None)
    (tmp_path / "photos" / "3.txt").unlink()
    with pytest.raises(UserError, match="image '3.webp' has no captions"):
        load_annotations(tmp_path / "photos", tmp_path / "photos", None)
    lenient = load_annotations(tmp_path / "photos", tmp_path / "photos", None, lenient=True)
    assert len(lenient) == 2 and len(lenient.left_out) == 1 and "'3.webp' has no captions" in lenient.left_out[0]
    (tmp_path / "photos" / "metadata.csv").write_text("file_name,text\na/2.jpg,from the metadata\n")
    assert found(load_annotations(tmp_path / "photos", tmp_path, None)) == {"photos/a/2.jpg": ["from the metadata"]}
    for name in ("metadata.csv", "a/1.txt", "a/2.txt", "a/2.json"):
        (tmp_path / "photos" / name).unlink()
    with pytest.raises(UserError, match="no image in it has a .txt of the same name"):
        load_annotations(tmp_path / "photos", tmp_path / "photos", None, lenient=True)


@pytest.mark.parametrize("cached", [False, True])
def test_rows_without_a_caption_are_left_out_of_training_and_an_error_in_evaluation(tmp_path, cached):
    rows = [("1.jpg", "a ball"), ("1.jpg", " "), ("2.jpg", ""), ("3.jpg", None), ("4.jpg", "two dogs")]
    (tmp_path / "a.json").write_text(json.dumps([{"image": image, "caption": caption} for image, caption in rows]))
    options = {"cache": tmp_path / "cache"} if cached else {}
    for _ in range(2):
        dataset = load_annotations(tmp_path / "a.json", tmp_path, "train", lenient=True, **options)
        assert found(dataset) == {"1.jpg": ["a ball"], "4.jpg": ["two dogs"]}
        assert ["'1.jpg'" in dataset.left_out[0], len(dataset.left_out)] == [True, 3]
    with pytest.raises(UserError, match="image '1.jpg' has an empty caption"):
        load_annotations(tmp_path / "a.json", tmp_path, "train", **options)
    (tmp_path / "b.json").write_text(json.dumps([{"image": "a.jpg", "caption": []}]))
    with pytest.raises(UserError, match="lists no images with captions"):
        load_annotations(tmp_path / "b.json", tmp_path, "train", lenient=True)


def test_coco_pictures_are_found_in_the_folders_of_2017(tmp_path):
    for folder, number in (("train2017", 9), ("val2017", 25)):
        (tmp_path / folder).mkdir()
        Image.fromarray(np.full((2, 2, 3), number, np.uint8)).save(tmp_path / folder / f"{number:012d}.jpg")
    images = [
        {"filepath": "val2014", "filename": f"COCO_val2014_{n:012d}.jpg", "split": "test", "sentences": [{"raw": "x"}]}
        for n in (9, 25)
    ]
    (tmp_path / "dataset_coco.json").write_text(json.dumps({"images": images}))
    dataset = load_annotations(tmp_path / "dataset_coco.json", tmp_path, "test", check_images=True)
    assert list(dataset.image_ids) == ["val2014/COCO_val2014_000000000009.jpg", "val2014/COCO_val2014_000000000025.jpg"]
    assert [np.asarray(dataset.open_image(i)).mean() for i in (0, 1)] == pytest.approx([9, 25], abs=2)
    (tmp_path / "val2014").mkdir()
    own = tmp_path / "val2014" / "COCO_val2014_000000000009.jpg"
    Image.new("RGB", (2, 2), "white").save(own)
    assert dataset.path(0) == own and coco_file(tmp_path / "other.jpg") == tmp_path / "other.jpg"
    assert NAMED_DATASETS["coco"].image_root(tmp_path, dataset) == tmp_path


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("a.csv", b"image,caption\n1.jpg,x,y\n", "line 2 has 3 fields, the header 2"),
        ("a.csv", b"image,caption\n,x\n", "line 2 names no image"),
        ("a.csv", b'image,caption\n1.jpg,"' + b"x" * (1 << 25), "line [12] cannot be read .*field larger"),
        ("a.csv", b"image,caption\n1.jpg,\xff\n", "not UTF-8 text"),
        ("a.csv", b"1.jpg\n2.jpg\n", "is no header with several columns"),
        ("a.csv.gz", gzip.compress(b"image,caption\n1.jpg,x\n"), "no UTF-8 text: packed"),
        ("a.csv", "image,caption\n1.jpg,x\n".encode("utf-16"), "no UTF-8 text: packed, in another encoding"),
        ("a.csv", b"", "empty, as a truncated download is"),
        ("a.csv", b"image,caption\n", "lists no images"),
        ("a.jsonl", b'{"image": "1.jpg", "caption": "x"}\n{"image": \n', "line 2 is not valid JSON"),
        ("a.jsonl", b'{"image": "1.jpg", "caption": "x"}\n{"caption": "y"}\n', "line 2 has no image or no caption"),
        ("a.jsonl", b'{"url": "1.jpg", "caption": "x"}\n', "no column for the image among 'url', 'caption'"),
        ("a.token", b"1.jpg#0\tx\nstray\n", "line 2 is no IMAGE#NUMBER<TAB>caption"),
        ("a.json", b'{"images": [{"id": 1, "file_name": "a"}], "annotations": [{"image_id": 2, "caption": "x"}]}',
         "annotations.0. is of image_id 2, which is not among the images"),
        ("a.json", b'{"images": [{"id": 1, "file_name": "a"}], "annotations": [{"image_id": 1, "bbox": []}]}',
         "pass captions_\\*.json, not instances"),
        ("a.json", b'{"images": [{"id": 1}], "annotations": []}', 'images.0. has no "id" or no "file_name"'),
        ("a.parquet", b"PAR1 damaged", "not readable as parquet"),
    ],
)  # fmt: skip
def test_a_wrong_file_is_one_line_that_names_it(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=f"{name}: .*{message}") as caught:
        load_annotations(tmp_path / name, tmp_path, None)
    assert "\n" not in str(caught.value)


def test_images_inside_a_parquet_file_are_not_taken_for_paths(tmp_path):
    column = pa.array([{"bytes": b"x", "path": "a"}])
    pq.write_table(pa.table({"image": column, "caption": ["x"]}), tmp_path / "a.parquet")
    with pytest.raises(UserError, match="column 'image' holds struct.*, not paths"):
        load_annotations(tmp_path / "a.parquet", tmp_path, None)


def test_a_caption_in_two_rows_of_an_evaluated_file_is_refused(tmp_path):
    (tmp_path / "a.csv").write_text("image,caption\n1.jpg,x\n2.jpg,x\n1.jpg,x\n")
    with pytest.raises(UserError, match="a.csv: image '1.jpg' has the caption 'x' in two rows"):
        check_evaluation_rows(tmp_path / "a.csv")


def test_what_divides_a_file_is_told_without_reading_all_of_it(tmp_path, monkeypatch):
    (tmp_path / "a.json").write_text(json.dumps({"images": [{"filename": "a.jpg", "split": "test", "sentences": []}]}))
    monkeypatch.setattr("data.annotation_files.read_json", None)
    assert open_annotations(tmp_path / "a.json").has_splits


def test_samples_of_shards_without_a_caption_are_left_out(tmp_path):
    empty = [("000000001.jpg", jpeg(1)), ("000000001.txt", b" ")]
    from_json = [("000000002.jpg", jpeg(2)), ("000000002.txt", b""), ("000000002.json", b'{"caption": "from json"}')]
    write_tar(tmp_path / "0.tar", [*sample(0), *empty, *from_json])
    for _ in range(2):  # from the file, then from the index
        dataset = load_shards("0.tar", tmp_path, tmp_path / "cache")
        assert list(dataset.captions) == ["a thing, number 0", "from json"]
        assert len(dataset.left_out) == 1 and "sample '000000001' has no caption" in dataset.left_out[0]
        expected = np.asarray(Image.open(io.BytesIO(jpeg(2))))
        np.testing.assert_array_equal(np.asarray(dataset.open_image(1)), expected)
    write_tar(tmp_path / "1.tar", empty)
    with pytest.raises(UserError, match="sample '000000001' has no caption .*nor has any other of its 1 samples"):
        load_shards("1.tar", tmp_path, tmp_path / "cache")


def test_what_a_shard_holds_instead_of_an_image_is_said(tmp_path):
    write_tar(tmp_path / "0.tar", [("1.heic", b"x"), ("1.txt", b"x")])
    with pytest.raises(UserError, match=r"sample '1' has .heic, .txt: 0 images \(jpg, .*\) instead of one; write"):
        load_shards("0.tar", tmp_path, tmp_path / "cache")
    write_tar(tmp_path / "1.tar", [("a.b.jpg", jpeg(1)), ("a.b.txt", b"x")])
    with pytest.raises(UserError, match=r"sample 'a' has .b.jpg, .b.txt: 0 images .*must hold no dots"):
        load_shards("1.tar", tmp_path, tmp_path / "cache")
    with pytest.raises(UserError, match=r"\{05..01\} counts down; write the smaller number first"):
        load_shards("{05..01}.tar", tmp_path, tmp_path / "cache")
