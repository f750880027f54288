"""The emoji data set from npm packages: the published captions and splits, exact pixels, and only pinned content."""

import base64
import hashlib
import http.server
import io
import json
import subprocess
import sys
import tarfile
import threading
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import resvg_py
from PIL import Image

from data.caption_datasets import load_annotations
from data.emoji import packages
from data.emoji.dataset import ANNOTATIONS, STYLES, build_dataset, compare_datasets
from data.emoji.drawings import render_jpeg
from data.emoji.packages import EMOJIBASE, Package, registry
from models.errors import UserError
from scripts import prepare_data

ROOT = Path(__file__).parents[2]
EXCERPTS = json.loads((Path(__file__).parent / "emoji" / "excerpts.json").read_text())
SQUARE = {"body": '<path fill="#c02040" d="M0 0h16v32H0z"/>'}
"""A drawing of 32 x 32 units, its left half red."""


def make_archive(folder: Path, name: str, files: dict[str, object]) -> Package:
    """A package as npm publishes it, with these JSON files, and its pin."""
    archive = io.BytesIO()
    with tarfile.open(fileobj=archive, mode="w:gz") as tar:
        for path, content in files.items():
            data = json.dumps(content).encode()
            member = tarfile.TarInfo(f"package/{path}")
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return store(folder, name, archive.getvalue())


def store(folder: Path, name: str, content: bytes) -> Package:
    digest = base64.b64encode(hashlib.sha512(content).digest()).decode()
    package = Package(name, "1.0.0", f"sha512-{digest}")
    folder.mkdir(exist_ok=True)
    (folder / package.file).write_bytes(content)
    return package


def make_style(folder: Path, style: str) -> Package:
    characters = dict.fromkeys(EXCERPTS["drawn"][style], "square")
    icons = {"width": 32, "height": 32, "icons": {"square": SQUARE}}
    return make_archive(folder, f"@iconify-json/{style}", {"icons.json": icons, "chars.json": characters})


@pytest.fixture
def archives(tmp_path):
    return tmp_path / "archives"


@pytest.fixture
def pins(archives):
    """Small packages in `archives`: the excerpts' texts, a red and white square for every emoji."""
    return {
        "emojibase": make_archive(archives, "emojibase-data", EXCERPTS["emojibase"]),
        "styles": {style: make_style(archives, style) for style in STYLES},
    }


def test_captions_splits_and_subsets_are_those_of_the_published_data_set(tmp_path, archives, pins):
    built = json.loads(build_dataset(tmp_path / "emoji", archives, **pins).read_text())
    found = [
        {
            "style": image["style"],
            "key": image["filename"].removesuffix(".jpg"),
            "split": image["split"],
            "subset": image["subset"],
            "captions": [sentence["raw"] for sentence in image["sentences"]],
        }
        for image in built["images"]
    ]
    assert found == EXCERPTS["images"]
    splits = {(image["style"], image["split"], image["subset"]) for image in found}
    assert len(splits) == 9 and ("noto", "test", "composition") in splits  # the excerpts hold every case but one


def test_numbers_run_on_and_the_annotations_load_with_every_image(tmp_path, archives, pins):
    file = build_dataset(tmp_path / "emoji", archives, **pins)
    images = json.loads(file.read_text())["images"]
    assert [image["imgid"] for image in images] == list(range(len(images)))
    numbers = [number for image in images for number in image["sentids"]]
    assert numbers == list(range(1, len(numbers) + 1))
    for split in ("train", "val", "test"):
        dataset = load_annotations(file, file.parent, split)
        dataset.check_images(file)
        assert len(dataset) == sum(image["split"] == split for image in images) > 0


def decoded(svg: str) -> np.ndarray:
    image = Image.open(io.BytesIO(render_jpeg(svg)))
    assert image.format == "JPEG" and image.mode == "RGB"
    return np.asarray(image, dtype=int)


def svg(body: str, width: int = 32, height: int = 32) -> str:
    return f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}">{body}</svg>'


def test_a_drawing_becomes_the_pixels_that_its_svg_says(tmp_path, archives, pins):
    root = build_dataset(tmp_path / "emoji", archives, **pins).parent
    expected = Image.new("RGB", (128, 128), "white")
    expected.paste((0xC0, 0x20, 0x40), (0, 0, 64, 128))
    jpeg = io.BytesIO()
    expected.save(jpeg, "JPEG", quality=90)
    for file in (root / "images").rglob("*.jpg"):
        assert file.read_bytes() == jpeg.getvalue(), file


def test_what_is_transparent_shows_white_and_the_longer_side_has_128_pixels():
    half = decoded(svg('<path fill="#000" fill-opacity=".5" d="M0 0h32v32H0z"/>'))
    assert np.abs(half - 127.5).max() <= 1.5
    wide = decoded(svg('<path d="M0 0h32v16H0z"/>', height=16))
    assert wide.shape == (64, 128, 3) and wide.max() == 0


INTERRUPTED = """
import json, os, signal, sys
from data.emoji import dataset
from data.emoji.packages import Package
root, archives, stop, pins = sys.argv[1], sys.argv[2], int(sys.argv[3]), json.loads(sys.argv[4])
drawn, render = [], dataset.render_jpeg
def render_or_die(svg):
    drawn.append(svg)
    if len(drawn) > stop:
        os.kill(os.getpid(), signal.SIGKILL)
    return render(svg)
dataset.render_jpeg = render_or_die
emojibase, *styles = [Package(*pin) for pin in pins]
dataset.build_dataset(root, archives, emojibase, dict(zip(dataset.STYLES, styles)))
"""


def test_a_build_that_was_killed_goes_on_where_it_stopped(tmp_path, archives, pins):
    root = tmp_path / "emoji"
    every = [vars(package) for package in (pins["emojibase"], *pins["styles"].values())]
    fields = json.dumps([list(pin.values()) for pin in every])
    command = [sys.executable, "-c", INTERRUPTED, root, archives, "5", fields]
    killed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert killed.returncode == -9, killed.stderr
    there = {file: file.stat().st_mtime_ns for file in root.rglob("*.jpg")}
    assert len(there) == 5 and not (root / ANNOTATIONS).exists()
    empty = next(iter(there))
    empty.write_bytes(b"")  # as a crash of the machine leaves a file
    build_dataset(root, archives, **pins)
    del there[empty]
    assert {file: file.stat().st_mtime_ns for file in there} == there
    whole = build_dataset(tmp_path / "whole", archives, **pins).parent
    assert compare_datasets(root, whole).identical_files == len(EXCERPTS["images"])
    assert not list(root.rglob("*.tmp*"))


@pytest.fixture
def server(tmp_path, monkeypatch):
    """An npm registry on this machine that serves files of the folder `registry`; what was asked for."""
    asked = []

    class Handler(http.server.SimpleHTTPRequestHandler):
        def do_GET(self):
            asked.append(self.path)
            super().do_GET()

        def log_message(self, *_):
            pass

    (tmp_path / "registry").mkdir()
    served = http.server.ThreadingHTTPServer(("127.0.0.1", 0), partial(Handler, directory=tmp_path / "registry"))
    thread = threading.Thread(target=served.serve_forever, args=(0.01,))
    thread.start()
    monkeypatch.setenv("npm_config_registry", f"http://127.0.0.1:{served.server_port}/")
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    yield asked
    served.shutdown()
    thread.join()
    served.server_close()


def publish(tmp_path: Path, archives: Path, package: Package) -> Path:
    """Put an archive where npm's registries have it, e.g. @iconify-json/noto/-/noto-1.0.0.tgz."""
    target = tmp_path / "registry" / package.name / "-" / f"{package.name.split('/')[-1]}-{package.version}.tgz"
    target.parent.mkdir(parents=True)
    (archives / package.file).rename(target)
    return target


def test_packages_are_downloaded_once_and_kept(tmp_path, archives, pins, server):
    for package in (pins["emojibase"], *pins["styles"].values()):
        publish(tmp_path, archives, package)
    build_dataset(tmp_path / "emoji", **pins)
    assert sorted(server) == [
        "/@iconify-json/fluent-flat/-/fluent-flat-1.0.0.tgz",
        "/@iconify-json/noto/-/noto-1.0.0.tgz",
        "/@iconify-json/twemoji/-/twemoji-1.0.0.tgz",
        "/emojibase-data/-/emojibase-data-1.0.0.tgz",
    ]
    build_dataset(tmp_path / "emoji", **pins)
    assert len(server) == 4


def test_another_content_than_the_pinned_one_is_refused_and_not_kept(tmp_path, archives, pins, server):
    published = publish(tmp_path, archives, pins["emojibase"])
    published.write_bytes(published.read_bytes() + b"changed")
    with pytest.raises(
        UserError, match=r"emojibase-data-1\.0\.0\.tgz: [\d,]+ bytes that are not emojibase-data 1\.0\.0"
    ):
        build_dataset(tmp_path / "emoji", **pins)
    assert [path.name for path in (tmp_path / "emoji").rglob("*")] == ["packages"]


@pytest.mark.parametrize("address", ["http://127.0.0.1:9", None])
def test_a_registry_without_the_package_or_without_an_answer_is_named(tmp_path, pins, server, monkeypatch, address):
    if address:
        monkeypatch.setenv("npm_config_registry", address)
    with pytest.raises(
        UserError, match=r"127.*cannot be downloaded \(.*(404|refused).*npm pack emojibase-data@1\.0\.0"
    ):
        build_dataset(tmp_path / "emoji", **pins)


def test_the_registry_is_the_users_own(tmp_path, monkeypatch):
    for name in ("npm_config_registry", "NPM_CONFIG_REGISTRY", "npm_config_userconfig", "NPM_CONFIG_USERCONFIG"):
        monkeypatch.delenv(name, raising=False)
    settings = tmp_path / ".npmrc"
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    assert registry() == packages.DEFAULT_REGISTRY
    settings.write_text("; registry=https://no.example\n@scope:registry=https://no.example\nfund=false\n")
    assert registry() == packages.DEFAULT_REGISTRY
    settings.write_text('registry = "https://npm.example/mirror/"\n')
    assert registry() == "https://npm.example/mirror"
    monkeypatch.setenv("NPM_CONFIG_REGISTRY", "https://other.example")
    assert registry() == "https://other.example"
    monkeypatch.setenv("NPM_CONFIG_REGISTRY", "file:///etc")
    with pytest.raises(UserError, match=r"npm's setting `registry` is 'file:///etc'; expected a URL such as https"):
        registry()


def test_the_pins_name_the_archives_of_npm():
    assert EMOJIBASE.file == "emojibase-data-17.0.0.tgz" and STYLES["noto"].file == "iconify-json-noto-1.2.9.tgz"
    assert STYLES["fluent-flat"].url_path == "@iconify-json/fluent-emoji-flat/-/fluent-emoji-flat-1.2.6.tgz"
    for package in (EMOJIBASE, *STYLES.values()):
        assert len(base64.b64decode(package.integrity.removeprefix("sha512-"), validate=True)) == 64


def test_archives_of_the_user_that_are_missing_or_changed_are_named(tmp_path, archives, pins):
    archive = archives / pins["emojibase"].file
    content = archive.read_bytes()
    archive.write_bytes(content[:-20])
    with pytest.raises(
        UserError, match=r"emojibase-data-1\.0\.0\.tgz: .* bytes that are not emojibase-data 1\.0\.0 as"
    ):
        build_dataset(tmp_path / "emoji", archives, **pins)
    archive.unlink()
    with pytest.raises(UserError, match=r"archives: holds no emojibase-data-1\.0\.0\.tgz; get it with npm pack"):
        build_dataset(tmp_path / "emoji", archives, **pins)


def linked_outside() -> bytes:
    """An archive whose en/data.json is a link to a file of the machine."""
    archive = io.BytesIO()
    with tarfile.open(fileobj=archive, mode="w:gz") as tar:
        member = tarfile.TarInfo("package/en/data.json")
        member.type, member.linkname = tarfile.SYMTYPE, "/etc/hostname"
        tar.addfile(member)
    return archive.getvalue()


@pytest.mark.parametrize("content", [b"", b"\x1f\x8b\x08 no gzip", linked_outside()])
def test_an_archive_that_is_no_package_ends_in_one_line_and_links_are_not_followed_out_of_it(
    tmp_path, archives, pins, content
):
    pins["emojibase"] = store(archives, "emojibase-data", content)
    with pytest.raises(
        UserError, match=r"emojibase-data-1\.0\.0\.tgz: not the expected npm package \([^\n]+\); delete"
    ):
        build_dataset(tmp_path / "emoji", archives, **pins)


def test_another_data_set_is_not_overwritten(tmp_path, archives, pins):
    other = tmp_path / "emoji" / ANNOTATIONS
    other.parent.mkdir()
    other.write_text('{"dataset": "emoji", "images": []}')
    with pytest.raises(UserError, match=r"dataset_emoji\.json: annotations of another data set; move them away"):
        build_dataset(other.parent, archives, **pins)
    assert other.read_text() == '{"dataset": "emoji", "images": []}' and not (other.parent / "images").exists()


def test_without_resvg_the_command_that_installs_it_is_named(tmp_path, archives, pins, monkeypatch):
    monkeypatch.setitem(sys.modules, "resvg_py", None)
    with pytest.raises(UserError, match=r"needs resvg-py, .*pip install -r requirements-emoji\.txt"):
        build_dataset(tmp_path / "emoji", archives, **pins)


def test_a_resvg_that_ignores_the_size_is_refused(monkeypatch):
    draw = resvg_py.svg_to_bytes
    monkeypatch.setattr(resvg_py, "svg_to_bytes", lambda width, height, **options: draw(**options))
    with pytest.raises(UserError, match=r"resvg-py drew 36 x 32 pixels instead of 128 on the longer side; pip install"):
        render_jpeg(svg("", width=36))


@pytest.fixture
def copies(tmp_path, archives, pins):
    return [build_dataset(tmp_path / name, archives, **pins).parent for name in ("one", "two")]


def test_a_comparison_counts_every_pixel(copies):
    changed = copies[1] / "images" / "noto" / "1f600.jpg"
    Image.new("RGB", (128, 128), "white").save(changed, "JPEG", quality=90)
    pixels = [np.asarray(Image.open(root / "images" / "noto" / "1f600.jpg"), dtype=int) for root in copies]
    found = compare_datasets(*copies)
    assert (found.images, found.identical_files) == (len(EXCERPTS["images"]), len(EXCERPTS["images"]) - 1)
    assert found.max_difference == np.abs(pixels[0] - pixels[1]).max() > 200
    assert found.mean_difference == pytest.approx(np.abs(pixels[0] - pixels[1]).mean() / found.images, rel=1e-12)


def test_a_comparison_names_what_cannot_be_compared(copies):
    image = copies[1] / "images" / "noto" / "1f600.jpg"
    Image.new("RGB", (64, 32)).save(image)
    with pytest.raises(UserError, match=r"1f600\.jpg: \(64, 32\) pixels, \(128, 128\) in "):
        compare_datasets(*copies)
    image.unlink()
    with pytest.raises(UserError, match=r"1f600\.jpg: "):
        compare_datasets(*copies)
    (copies[1] / ANNOTATIONS).write_text('{"images": []}')
    with pytest.raises(UserError, match=r"dataset_emoji\.json: differs from "):
        compare_datasets(*copies)


def test_the_command_builds_compares_and_says_what_to_run_next(tmp_path, archives, pins, monkeypatch, capsys):
    monkeypatch.setattr(prepare_data, "build_dataset", partial(build_dataset, **pins))
    for name, more in (("one", []), ("two", ["--compare", str(tmp_path / "one")])):
        root = tmp_path / name
        arguments = ["emoji", "--root", str(root), "--packages", str(archives), *more]
        monkeypatch.setattr(sys, "argv", ["prepare_data.py", *arguments])
        prepare_data.main()
    printed = capsys.readouterr().out
    assert f"{tmp_path / 'one' / ANNOTATIONS}: complete" in printed
    assert f"bash scripts/emoji.sh {tmp_path / 'one'} frozen" in printed
    count = len(EXCERPTS["images"])
    assert f"{count} of {count} files are the same to the byte; largest difference of a value 0 of 255" in printed
