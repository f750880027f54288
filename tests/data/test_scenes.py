"""The embedded data set: reproducible, no leaks between splits, captions true and not told apart by words alone.

Captions are read back here by a parser of their own, which knows the language but nothing of how they were made."""

from __future__ import annotations

import json
import re
from collections import Counter, defaultdict
from itertools import groupby, permutations
from pathlib import Path

import pytest
from PIL import Image

from data.scenes.__main__ import main
from data.scenes.captions import CaptionWriter
from data.scenes.dataset import read_annotations, write_contact_sheet, write_scenes
from data.scenes.world import VALUES, Scene, draw_splits
from models.errors import UserError

SIZES = {"train": 240, "val": 40, "test": 120}
MEANING = {
    **{word: ("size", "large") for word in ("large", "big")},
    **{word: ("size", "small") for word in ("small", "little")},
    **{word: ("texture", "plain") for word in ("plain", "solid")},
    **{word: ("texture", "dotted") for word in ("dotted", "spotted")},
    "striped": ("texture", "striped"),
    **{word: ("colour", word) for word in "red orange yellow green cyan blue pink black".split()},
    **{word: ("shape", word) for word in "triangle star heart".split()},
    **{word: ("shape", "circle") for word in ("circle", "disc")},
    **{word: ("shape", "square") for word in ("square", "box")},
    **{word: ("shape", "cross") for word in ("cross", "plus")},
    **{word: ("shape", "diamond") for word in ("diamond", "rhombus")},
    **{word: ("shape", "moon") for word in ("moon", "crescent")},
}
DIRECTION = {"left": (-1, 0), "right": (1, 0)}
DIRECTION |= {word: (0, -1) for word in ("above", "over")} | {word: (0, 1) for word in ("below", "under", "beneath")}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("scenes")
    write_scenes(out, SIZES["train"], SIZES["val"], SIZES["test"], seed=0)
    return out


@pytest.fixture(scope="module")
def images(folder) -> list[dict]:
    return read_annotations(folder / "dataset_scenes.json")["images"]


def captions_of(image: dict) -> list[str]:
    return [sentence["raw"] for sentence in image["sentences"]]


def objects_of(image: dict) -> list[dict]:
    return image["scene"]["objects"]


def scene_key(image: dict) -> tuple:
    """What the picture shows on a grid of quarters: the same scene whatever its jitter."""
    return tuple(
        sorted(
            (round(4 * o["x"]), round(4 * o["y"]), o["size"], o["texture"], o["colour"], o["shape"])
            for o in objects_of(image)
        )
    )


def parse(caption: str) -> tuple[list[dict], list[tuple[int, tuple[int, int], int]]]:
    """Named objects in order of mention, and relations (subject, direction, object) between them."""
    objects, letters, current = [], [], {}
    for word in caption.split():
        if word in MEANING:
            kind, value = MEANING[word]
            current[kind] = value
            if kind == "shape":
                letters.append(str(len(objects)))
                objects.append(current)
                current = {}
        elif word in DIRECTION or word in ("and", "with", "has", "that", "it", "its"):
            letters.append(word)
    return objects, list(read_relations(" ".join(letters)))


def read_relations(skeleton: str):
    """`skeleton` is a caption with objects as numbers and little words left out: "0 left 1 and above 2"."""
    place = "left|right|above|over|below|under|beneath"
    if found := re.fullmatch(rf"(\d) (?:with|has) (\d) {spot(place)}(?: and (\d) {spot(place)})?", skeleton):
        anchor, first, *rest = (part for part in found.groups() if part)
        yield int(first), DIRECTION[rest[0]], int(anchor)
        if len(rest) == 3:
            yield int(rest[1]), DIRECTION[rest[2]], int(anchor)
    elif found := re.fullmatch(rf"(\d) ({place}) (\d) that ({place}) (\d)", skeleton):
        a, near, c, further, b = found.groups()
        yield int(a), DIRECTION[near], int(c)
        yield int(c), DIRECTION[further], int(b)
    elif found := re.fullmatch(rf"(\d) ({place}) (\d)(?: and ({place}) (\d))?", skeleton):
        subject, *rest = (part for part in found.groups() if part)
        for word, other in zip(rest[::2], rest[1::2], strict=True):
            yield int(subject), DIRECTION[word], int(other)
    elif found := re.fullmatch(rf"({place}) (\d)(?: and ({place}) (\d))? (\d)", skeleton):
        *rest, subject = (part for part in found.groups() if part)
        for word, other in zip(rest[::2], rest[1::2], strict=True):
            yield int(subject), DIRECTION[word], int(other)
    else:
        raise AssertionError(f"the test cannot read {skeleton!r}")


def spot(place: str) -> str:
    """ "to its left" and "above it", without the "to"."""
    return rf"(?:its )?({place})(?: it)?"


def is_true(parsed: tuple, image: dict) -> bool:
    named, relations = parsed
    found = []
    for description in named:
        fitting = [o for o in objects_of(image) if description.items() <= o.items()]
        if not fitting:
            return False
        assert len(fitting) == 1, "an object is named ambiguously"
        found.append(fitting[0])
    return all(
        (found[a]["x"] - found[b]["x"]) * dx + (found[a]["y"] - found[b]["y"]) * dy > 0.25
        for a, (dx, dy), b in relations
    )


def test_counts_and_files_are_those_asked_for(folder, images):
    assert Counter(image["split"] for image in images) == SIZES
    assert [image["imgid"] for image in images] == list(range(400))
    for image in images[::40]:
        with Image.open(folder / image["filepath"] / image["filename"]) as picture:
            assert (picture.size, picture.mode) == ((64, 64), "RGB")


def test_every_image_has_five_different_captions_numbered_through(images):
    sentids = [sentence["sentid"] for image in images for sentence in image["sentences"]]
    assert sentids == list(range(2000)) == [i for image in images for i in image["sentids"]]
    for image in images:
        assert len({*captions_of(image)}) == 5
        assert all(sentence["imgid"] == image["imgid"] for sentence in image["sentences"])
        assert all(6 <= len(caption.split()) <= 16 for caption in captions_of(image))


def test_the_region_file_describes_each_object_of_training_images_and_leaves_the_others_as_they_are(folder, images):
    with_regions = read_annotations(folder / "dataset_scenes_regions.json")["images"]
    assert [image["filename"] for image in with_regions] == [image["filename"] for image in images]
    numbers = [s["sentid"] for image in with_regions + images[: SIZES["train"]] for s in image["sentences"]]
    assert len(set(numbers)) == len(numbers)
    for image, plain in zip(with_regions, images, strict=True):
        if image["split"] != "train":
            assert image == plain
            continue
        for thing, caption in zip(objects_of(image), captions_of(image), strict=True):
            description = dict(MEANING[word] for word in caption.split() if word in MEANING)
            assert description.items() <= thing.items() and {"colour", "shape"} <= description.keys(), caption
            places = {DIRECTION[word] for word in caption.split() if word in DIRECTION}
            x, y = ((value > 0.6) - (value < 0.4) for value in (thing["x"], thing["y"]))
            assert places == {(x, 0), (0, y)} - {(0, 0)}, caption


def test_the_same_seed_gives_the_same_bytes(folder, images, tmp_path):
    write_scenes(tmp_path, SIZES["train"], SIZES["val"], SIZES["test"], seed=0)
    for name in [
        "dataset_scenes.json",
        "dataset_scenes_regions.json",
        *(f"{i['filepath']}/{i['filename']}" for i in images),
    ]:
        assert (tmp_path / name).read_bytes() == (folder / name).read_bytes(), name


def test_another_seed_gives_other_scenes(images, tmp_path):
    others = read_annotations(write_scenes(tmp_path, 200, 0, 0, seed=1))["images"]
    common = {scene_key(image) for image in images} & {scene_key(image) for image in others}
    assert len(common) < 10


def test_no_scene_and_no_picture_occurs_twice_in_any_split(folder, images):
    assert len({scene_key(image) for image in images}) == len(images)
    pixels = {Image.open(folder / i["filepath"] / i["filename"]).tobytes() for i in images}
    assert len(pixels) == len(images)


def test_no_family_reaches_over_two_splits(images):
    splits = defaultdict(set)
    for image in images:
        columns = [sorted(o[kind] for o in objects_of(image)) for kind in ("size", "texture", "colour", "shape")]
        splits[image["scene"]["layout"], str(columns)].add((image["split"], image["scene"]["family"]))
    assert all(len(members) == 1 for members in splits.values())


def test_siblings_caption_by_caption_consist_of_the_same_words(images):
    families = defaultdict(list)
    for image in images:
        families[image["scene"]["family"]].append(image)
    for siblings in families.values():
        assert 4 <= len(siblings) <= 6
        for worded in zip(*map(captions_of, siblings), strict=True):
            assert len({*worded}) == len(siblings)
            assert len({tuple(sorted(caption.split())) for caption in worded}) == 1


@pytest.mark.parametrize("seed", range(6))
def test_captions_are_true_of_their_image_and_of_no_other(seed, tmp_path):
    images = read_annotations(write_scenes(tmp_path, 100, 0, 100, seed=seed, image_size=32))["images"]
    for image in images:
        for caption in captions_of(image):
            parsed = parse(caption)
            assert len(parsed[0]) == len(objects_of(image)) == len(parsed[1]) + 1, caption
            assert [other["imgid"] for other in images if is_true(parsed, other)] == [image["imgid"]], caption


def test_named_objects_are_where_and_what_the_picture_shows(folder, images):
    for image in images[:60]:
        picture = Image.open(folder / image["filepath"] / image["filename"])
        for thing in objects_of(image):
            if thing["texture"] != "plain" or thing["shape"] == "moon":
                continue
            red, green, blue = picture.getpixel((round(64 * thing["x"]), round(64 * thing["y"])))
            looks = {"red": red > green + 90, "green": green > red + 50, "blue": blue > red + 90}
            looks |= {"black": max(red, green, blue) < 60, "yellow": min(red, green) > blue + 90}
            assert looks.get(thing["colour"], True), thing


@pytest.fixture(scope="module")
def full_size() -> dict[str, list[Scene]]:
    return draw_splits({"train": 6000, "val": 500, "test": 500}, seed=0)


def test_at_full_size_no_described_pair_of_objects_and_no_family_occurs_twice(full_size):
    scenes = [scene for split in full_size.values() for scene in split]
    assert {split: len(drawn) for split, drawn in full_size.items()} == {"train": 6000, "val": 500, "test": 500}
    assert len({scene.key for scene in scenes}) == 7000
    assert len({scene.family_key for scene in scenes}) == len({scene.family for scene in scenes})
    pairs = Counter()
    for scene in scenes:
        for a, b in permutations(scene.objects, 2):
            right, down = round(4 * (b.x - a.x)) > 1, round(4 * (b.y - a.y)) > 1
            pairs.update((a.attributes, b.attributes, way) for way, holds in enumerate((right, down)) if holds)
    assert max(pairs.values()) == 1


def test_at_full_size_all_captions_differ_and_the_vocabulary_is_small(full_size):
    scenes = [scene for split in full_size.values() for scene in split]
    writer = CaptionWriter(scenes, seed=0)
    families = [list(siblings) for _, siblings in groupby(scenes, key=lambda scene: scene.family)]
    captions = [caption for family in families for image in writer.write_family(family) for caption in image]
    assert len({*captions}) == len(captions) == 35_000
    assert len({word for caption in captions for word in caption.split()}) <= 60


def test_more_scenes_than_the_world_has_are_refused_and_what_was_there_stays(tmp_path, monkeypatch):
    write_scenes(tmp_path, 8, 0, 0, seed=0)
    before = sorted(tmp_path.rglob("*"))
    monkeypatch.setitem(VALUES, "colour", ("red", "blue", "green"))
    monkeypatch.setitem(VALUES, "shape", ("circle", "square", "star"))
    with pytest.raises(UserError, match="ask for fewer images"):
        write_scenes(tmp_path, 5000, 0, 0, seed=0)
    assert sorted(tmp_path.rglob("*")) == before, "the data set that was there is gone"


def test_a_second_start_does_nothing_and_other_arguments_write_again(tmp_path):
    file = write_scenes(tmp_path, 8, 4, 4, seed=0)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.*")}
    write_scenes(tmp_path, 8, 4, 4, seed=0)
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.*")} == before
    write_scenes(tmp_path, 4, 4, 4, seed=0)
    assert len(read_annotations(file)["images"]) == len([*tmp_path.rglob("*.png")]) == 12


def test_a_run_that_was_cut_off_is_done_again(tmp_path):
    file = write_scenes(tmp_path, 8, 0, 0, seed=0)
    whole = {path: path.read_bytes() for path in tmp_path.rglob("*.*")}
    file.unlink()
    picture = next(tmp_path.rglob("*.png"))
    picture.write_bytes(picture.read_bytes()[:50])
    write_scenes(tmp_path, 8, 0, 0, seed=0)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*.*")} == whole
    picture.unlink()
    write_scenes(tmp_path, 8, 0, 0, seed=0)
    assert picture.read_bytes() == whole[picture]


@pytest.mark.parametrize("content", ["", "[]", json.dumps({"images": []})])
def test_an_annotation_file_of_somebody_else_is_left_alone(content, tmp_path):
    (tmp_path / "dataset_scenes.json").write_text(content)
    with pytest.raises(UserError, match="dataset_scenes.json: not an annotation file of data.scenes"):
        write_scenes(tmp_path, 8, 0, 0, seed=0)
    assert (tmp_path / "dataset_scenes.json").read_text() == content


def test_impossible_sizes_are_refused(tmp_path):
    with pytest.raises(UserError, match="train is -1; it must be at least 0"):
        write_scenes(tmp_path, -1, 0, 0, seed=0)
    with pytest.raises(UserError, match="image size is 8"):
        write_scenes(tmp_path, 8, 0, 0, seed=0, image_size=8)
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="file: not a folder"):
        write_scenes(tmp_path / "file", 8, 0, 0, seed=0)


def test_the_contact_sheet_shows_families_of_the_test_split(folder, tmp_path):
    write_contact_sheet(folder / "dataset_scenes.json", tmp_path / "sheet.png")
    assert Image.open(tmp_path / "sheet.png").size == (6 * 210, 4 * 262)


def test_the_command_prints_the_annotation_file(tmp_path, monkeypatch, capsys):
    arguments = ["--out", str(tmp_path / "new"), "--train", "4", "--val", "0", "--test", "8"]
    monkeypatch.setattr("sys.argv", ["scenes", *arguments, "--contact-sheet", str(tmp_path / "sheet.png")])
    main()
    assert capsys.readouterr().out.strip() == str(tmp_path / "new" / "dataset_scenes.json")
    assert (tmp_path / "sheet.png").exists()
