"""Shards as a data set: what tarfile reads, in an order that stays near, and one error for whatever is wrong."""

import pickle
import tarfile

import numpy as np
import pytest
import torch

from data import webdataset_shards
from data.batches import BatchPlan, ImageRows, TrainingBatches
from data.webdataset_shards import SHARDS_AT_A_TIME, find_shards, load_shards
from models.errors import UserError
from models.vision.images import ImageError, open_image
from tests.shards import jpeg, sample, write_shards, write_tar

COUNTS = [5, 1, 7, 3, 4, 6, 2, 5, 3, 4]


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    root = tmp_path_factory.mktemp("shards")
    write_shards(root, COUNTS)
    return root


@pytest.fixture
def dataset(shards, tmp_path):
    return load_shards("{00000..00009}.tar", shards, tmp_path)


def pixels(image):
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).float()


@pytest.mark.parametrize("num_workers", [0, 2])
def test_the_samples_are_those_of_the_tars(shards, tmp_path, num_workers):
    dataset = load_shards("*.tar", shards, tmp_path, num_workers)
    image = 0
    for file in sorted(shards.glob("*.tar")):
        with tarfile.open(file) as tar:
            members = {member.name: tar.extractfile(member).read() for member in tar}
        for name in (name for name in members if name.endswith(".jpg")):
            assert dataset.image_ids[image] == f"{file.name}/{name}"
            assert dataset.captions[image].encode() == members[name.replace("jpg", "txt")]
            start, stop = dataset.caption_range(image)
            assert (start, stop) == (image, image + 1)
            (tmp_path / "image.jpg").write_bytes(members[name])
            assert dataset.open_image(image) == open_image(tmp_path / "image.jpg")
            image += 1
    assert image == len(dataset) == len(dataset.captions) == sum(COUNTS)


def test_an_index_is_read_from_the_cache_and_travels_as_its_folder(shards, tmp_path, dataset, monkeypatch):
    monkeypatch.setattr(webdataset_shards, "_index_shard", None)  # what would read the tars again
    again = load_shards("{00000..00009}.tar", shards, tmp_path)
    sent = pickle.dumps(again)
    assert len(sent) < 1000
    for other in (again, pickle.loads(sent)):
        assert other.captions == dataset.captions and other.open_image(20) == dataset.open_image(20)


def test_an_epoch_holds_every_image_once_and_few_shards_at_a_time(dataset):
    orders = [dataset.epoch_order(np.random.default_rng(seed)) for seed in (0, 0, 1)]
    assert np.array_equal(orders[0], orders[1]) and not np.array_equal(orders[0], orders[2])
    for order in orders:
        assert sorted(order) == list(range(len(dataset)))
        order_of_shards = list(dict.fromkeys(dataset.image_shard[order].tolist()))
        first = 0
        while first < len(order):
            together, at = set(), first
            while at < len(order) and len(together | {int(dataset.image_shard[order[at]])}) <= SHARDS_AT_A_TIME:
                together.add(int(dataset.image_shard[order[at]]))
                at += 1
            # A window ends with its shards: nothing of them comes later.
            assert at - first == sum(COUNTS[shard] for shard in together)
            first = at
        assert order_of_shards != sorted(order_of_shards)


def test_reading_resumes_in_the_middle_of_an_epoch_on_any_number_of_ranks_and_workers(dataset):
    plan = BatchPlan(dataset, batch_size=6, seed=3)
    whole = list(TrainingBatches(plan, ImageRows(pixels)).read(0, 10, 0))
    for number, batch in enumerate(TrainingBatches(plan, ImageRows(pixels)).read(4, 10, 2), 4):
        assert torch.equal(batch.content, whole[number].content) and torch.equal(batch.captions, whole[number].captions)
    for number in (0, 7):
        parts = [TrainingBatches(plan, ImageRows(pixels), rank, 3)[number] for rank in range(3)]
        assert torch.equal(torch.cat([part.content for part in parts]), whole[number].content)
    read = torch.cat([batch.images for batch in whole])[: len(dataset)]
    assert sorted(read.tolist()) == list(range(len(dataset)))
    assert all(torch.equal(batch.images, batch.captions) for batch in whole)


def test_an_unreadable_image_is_replaced_and_named_by_shard_and_member(tmp_path):
    members = [m for number in range(6) for m in sample(number)]
    members[6] = (members[6][0], jpeg(2)[:100])
    write_tar(tmp_path / "a.tar", members)
    dataset = load_shards("a.tar", tmp_path, tmp_path / "cache")
    with pytest.raises(ImageError, match=r"a.tar: member 000000002.jpg: image cannot be decoded"):
        dataset.open_image(2)
    batch = TrainingBatches(BatchPlan(dataset, batch_size=6, seed=1), ImageRows(pixels))[0]
    (line,) = set(batch.unreadable)
    assert "000000002.jpg" in line and 2 not in batch.images


def test_a_shard_that_disappears_while_training_is_an_unreadable_image(tmp_path):
    (file,) = write_shards(tmp_path, [3])
    dataset = load_shards(file.name, tmp_path, tmp_path / "cache")
    file.unlink()
    with pytest.raises(ImageError, match=r"00000.tar: member 000000001.jpg cannot be read \(No such file"):
        dataset.open_image(1)


def test_captions_may_be_in_the_json_alone_and_other_members_are_ignored(tmp_path):
    members = [m for m in sample(1, "only in json") if not m[0].endswith(".txt")]
    members += [(f"./more/{name}", content) for name, content in sample(2, "日本語 🎈")]
    members += [("000000001.seg.png", b"a mask"), ("._000000003.jpg", b"of a file manager"), ("README", b"text")]
    write_tar(tmp_path / "a.tar", members)
    dataset = load_shards("a.tar", tmp_path, tmp_path / "cache")
    assert dataset.captions == ["only in json", "日本語 🎈"]
    assert dataset.image_ids == ["a.tar/000000001.jpg", "a.tar/./more/000000002.jpg"]


def test_a_byte_order_mark_is_not_part_of_a_caption(tmp_path):
    mark = b"\xef\xbb\xbf"
    members = [*sample(1)[:1], ("000000001.txt", mark + b"a red ball")]
    members += [*sample(2)[:1], ("000000002.json", mark + b'{"caption": "two dogs"}')]
    write_tar(tmp_path / "a.tar", members)
    assert load_shards("a.tar", tmp_path, tmp_path / "cache").captions == ["a red ball", "two dogs"]


@pytest.mark.parametrize(
    ("members", "message"),
    [
        (sample(1)[:1], "sample '000000001' has no caption"),
        ([*sample(1)[:1], ("000000001.txt", b" \n")], "sample '000000001' has no caption"),
        ([*sample(1)[:1], ("000000001.json", b'{"caption": null}')], "sample '000000001' has no caption"),
        ([*sample(1)[:1], ("000000001.json", b'["a"]')], "member '000000001.json' cannot be read"),
        ([*sample(1)[:1], ("000000001.json", b'{"caption": "bad \\ud800"}')], ".*has the caption .*half"),
        ([*sample(1)[:1], ("000000001.json", b"[" * 100_000)], "member '000000001.json' cannot be read"),
        ([*sample(1)[:1], ("000000001.txt", b"\xff")], "member '000000001.txt' cannot be read"),
        (sample(1)[1:], "sample '000000001' has .txt, .json: 0 images"),
        ([*sample(1), ("000000001.png", b"")], "sample '000000001' has .jpg, .txt, .json, .png: 2 images"),
        (sample(1) + sample(2) + sample(1), "member '000000001.jpg' occurs twice"),
        ([], "holds no samples"),
        ([("README", b"text")], "holds no samples"),
    ],
)  # fmt: skip
def test_a_wrong_sample_is_one_line_with_shard_and_key(tmp_path, members, message):
    write_tar(tmp_path / "a.tar", members)
    with pytest.raises(UserError, match=f"a.tar: {message}") as caught:
        load_shards("a.tar", tmp_path, tmp_path / "cache")
    assert "\n" not in str(caught.value) and not (tmp_path / "cache").exists()


def test_a_shard_cut_at_any_block_is_refused(tmp_path):
    (file,) = write_shards(tmp_path, [2])
    whole = file.read_bytes()
    with tarfile.open(file) as tar:
        end = max(member.offset_data + member.size for member in tar)
    for size in [*range(0, end, 512), end - 1]:
        file.write_bytes(whole[:size])
        with pytest.raises(UserError, match="00000.tar: not a whole uncompressed tar"):
            load_shards(file.name, tmp_path, tmp_path / "cache")


@pytest.mark.parametrize("content", [b"no tar at all" * 100, b"\x1f\x8b\x08\x00 gzip" * 100])
def test_a_file_that_is_no_tar_is_refused(tmp_path, content):
    (tmp_path / "a.tar").write_bytes(content)
    with pytest.raises(UserError, match="a.tar: not a whole uncompressed tar"):
        load_shards("a.tar", tmp_path, tmp_path / "cache")


def test_a_damaged_header_in_the_middle_is_refused(tmp_path):
    (file,) = write_shards(tmp_path, [3])
    with tarfile.open(file) as tar:
        header = tar.getmember("000000001.jpg").offset
    content = bytearray(file.read_bytes())
    content[header : header + 8] = b"damaged!"
    file.write_bytes(content)
    with pytest.raises(UserError, match=f"cut short at byte {header:,}"):
        load_shards(file.name, tmp_path, tmp_path / "cache", num_workers=2)


def test_patterns_are_braces_globs_and_lists_of_them(shards):
    names = [f"{i:05d}.tar" for i in range(10)]
    for patterns, expected in (
        (["{00000..00003}.tar"], names[:4]),
        (["0000{8,9}.tar", "0000{0..1}.tar"], names[8:] + names[:2]),
        (["0000[2-4].tar"], names[2:5]),
        (["*.tar"], names),
    ):
        assert [file.name for file in find_shards(patterns, shards)] == expected
    with pytest.raises(UserError, match="00010.tar: no such shard; 3 of 12 shards are missing"):
        find_shards(["000{01..12}.tar"], shards)
    with pytest.raises(UserError, match="no shard matches; correct the pattern"):
        find_shards(["*.zip"], shards)
    with pytest.raises(UserError, match="00003.tar: named twice"):
        find_shards(["00003.tar", "*.tar"], shards)


def test_shards_of_one_name_in_two_folders_are_told_apart_wherever_a_run_starts(tmp_path, monkeypatch):
    for folder in ("cc3m", "cc12m"):
        write_shards(tmp_path / folder, [2])
    monkeypatch.chdir(tmp_path)
    dataset = load_shards(["cc3m/*.tar", "cc12m/*.tar"], ".", "cache")
    assert dataset.image_ids[::2] == ["cc3m/00000.tar/000000000.jpg", "cc12m/00000.tar/000000000.jpg"]
    monkeypatch.chdir(tmp_path / "cc3m")
    again = load_shards(["cc3m/*.tar", "cc12m/*.tar"], "..", "../cache")
    assert again.folder.name == dataset.folder.name and again.open_image(3).size == (32, 32)
