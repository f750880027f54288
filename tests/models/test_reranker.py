"""The reranker as an application uses it: files in, lists out; and the package that pip installs."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from models import Reranker, TokenStore
from models.edje import EDJE
from models.errors import UserError
from models.vision.backbones import Backbone
from models.vision.images import open_image
from tests.tiny_model import CAPTIONS, make_model, write_backbone, write_images

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> Path:
    """backbone/, checkpoint/, residual/ (a checkpoint with residual_similarity) and images/."""
    root = tmp_path_factory.mktemp("reranker")
    backbone = Backbone.load(write_backbone(root / "backbone"), precision="float32")
    make_model(backbone, root / "vocab.txt").save_pretrained(root / "checkpoint")
    make_model(backbone, root / "vocab.txt", residual_similarity=3.0).save_pretrained(root / "residual")
    write_images(root / "images", 9)
    return root


@pytest.fixture(params=["checkpoint", "residual"])
def reranker(files, request) -> Reranker:
    return Reranker.from_pretrained(files / request.param, dtype="float32")


def image_paths(files: Path) -> list[Path]:
    return sorted((files / "images").rglob("*.png"))


def logits_by_hand(files: Path, name: str) -> np.ndarray:
    """[caption, image]: one pair at a time through the public parts, nothing shared between pairs."""
    model = EDJE.from_pretrained(files / name)
    backbone = Backbone.load(model.config.backbone, precision="float32")
    logits = np.empty((len(CAPTIONS), 9), np.float32)
    for column, path in enumerate(image_paths(files)):
        features = backbone.encode_images(backbone.preprocess(open_image(path))[None])
        tokens = model.compress(features.patch_tokens)
        for row, caption in enumerate(CAPTIONS):
            cosine = (backbone.encode_texts([caption]) * features.embedding).sum(-1)
            residual = cosine if model.config.residual_similarity else None
            logits[row, column] = model.score([caption], tokens, residual).item()
    return logits


@pytest.mark.parametrize("name", ["checkpoint", "residual"])
def test_predict_gives_each_pair_the_logit_it_has_alone(files, name):
    reranker, generator = Reranker.from_pretrained(files / name, dtype="float32"), np.random.default_rng(0)
    images = image_paths(files)
    rows, columns = generator.integers(3, size=150), generator.integers(9, size=150)
    pairs = [(CAPTIONS[row], images[column]) for row, column in zip(rows, columns, strict=True)]
    expected = logits_by_hand(files, name)[rows, columns]
    logits = reranker.predict(pairs)
    assert logits.dtype == np.float32 and logits.shape == (150,)
    assert expected.std() > 0.1
    np.testing.assert_allclose(logits, expected, rtol=0, atol=1e-5)


def test_rank_is_predict_sorted_best_first(files, reranker):
    images = image_paths(files)
    scores = reranker.predict([(CAPTIONS[0], image) for image in images])
    ranked = reranker.rank(CAPTIONS[0], images)
    assert [r["corpus_id"] for r in ranked] == sorted(range(9), key=lambda i: -scores[i])
    np.testing.assert_allclose([r["score"] for r in ranked], sorted(scores, reverse=True), rtol=0, atol=1e-5)
    assert reranker.rank(CAPTIONS[0], images, top_k=3) == ranked[:3]
    assert reranker.rank(CAPTIONS[0], images, top_k=100) == ranked
    assert reranker.rank(CAPTIONS[0], []) == []


def test_equal_scores_keep_the_order_given(files, reranker):
    image, other = image_paths(files)[:2]
    ranked = reranker.rank(CAPTIONS[1], [image] * 20 + [other] + [image] * 20)
    same = [r["corpus_id"] for r in ranked if r["corpus_id"] != 20]
    assert same == [*range(20), *range(21, 41)]


def test_images_given_several_times_are_encoded_once(files, reranker, monkeypatch):
    encoded = []
    encode = reranker.backbone.encode_images
    monkeypatch.setattr(
        reranker.backbone, "encode_images", lambda pixels: encoded.append(len(pixels)) or encode(pixels)
    )
    path, image = str(image_paths(files)[0]), Image.open(image_paths(files)[1])
    reranker.predict([(caption, source) for caption in CAPTIONS for source in (path, image, path)])
    assert sum(encoded) == 2


def test_modes_and_sizes_may_be_mixed_and_transparency_goes_over_white(files, reranker):
    picture = Image.open(image_paths(files)[0]).convert("RGB")
    transparent = Image.new("RGBA", (70, 30), (255, 0, 0, 0))
    modes = [picture.convert(mode) for mode in ("L", "P", "CMYK", "1", "LA", "I", "RGBA")]
    ranked = reranker.rank(
        CAPTIONS[0], [transparent, *modes, Image.new("RGB", (9, 200), "white"), image_paths(files)[0]]
    )
    assert len(ranked) == 10
    white = reranker.predict([(CAPTIONS[0], transparent), (CAPTIONS[0], Image.new("RGB", (70, 30), "white"))])
    assert white[0] == pytest.approx(white[1], abs=1e-5)
    full = reranker.predict([(CAPTIONS[0], picture.convert("RGBA")), (CAPTIONS[0], image_paths(files)[0])])
    assert full[0] == pytest.approx(full[1], abs=1e-5)


@pytest.mark.parametrize("dtype, atol", [("float16", 5e-3), ("bfloat16", 5e-2), ("int8", 5e-2)])
def test_ids_of_a_store_score_as_their_images_without_the_image_tower(
    files, reranker, tmp_path, dtype, atol, monkeypatch
):
    images = image_paths(files)
    expected = reranker.predict([(CAPTIONS[2], image) for image in images])
    store = reranker.index(files / "images", tmp_path / "store", dtype=dtype, progress=False)
    assert store.ids == [image.relative_to(files / "images").as_posix() for image in images]
    monkeypatch.setattr(reranker.backbone, "encode_images", None)
    for given in (None, TokenStore.open(tmp_path / "store")):
        logits = reranker.predict([(CAPTIONS[2], item_id) for item_id in store.ids], store=given)
        np.testing.assert_allclose(logits, expected, rtol=0, atol=atol)
    assert len(reranker.rank(CAPTIONS[2], store.ids, top_k=4)) == 4


def test_ids_and_images_may_be_mixed(files, reranker, tmp_path):
    images = image_paths(files)
    store = reranker.index(images[:5], tmp_path / "store", progress=False)
    assert store.ids == [str(path) for path in images[:5]]
    mixed = [store.ids[0], images[6], Image.open(images[7]), store.ids[3], str(images[8])]
    by_image = reranker.predict([(CAPTIONS[0], images[i]) for i in (0, 6, 7, 3, 8)])
    np.testing.assert_allclose(reranker.predict([(CAPTIONS[0], c) for c in mixed]), by_image, rtol=0, atol=5e-3)


def test_indexing_again_opens_the_finished_store(files, reranker, tmp_path, monkeypatch):
    first = reranker.index(files / "images", tmp_path / "store", progress=False)
    monkeypatch.setattr(reranker.backbone, "encode_images", None)
    assert reranker.index(files / "images", tmp_path / "store", progress=False).manifest == first.manifest


def test_bad_input_is_one_clear_error(files, reranker, tmp_path):
    image = image_paths(files)[0]
    (tmp_path / "broken.png").write_bytes(image.read_bytes()[:60])
    store = reranker.index(files / "images", tmp_path / "store", progress=False)
    cases = [
        (lambda: reranker.rank("  ", [image]), "caption is empty"),
        (lambda: reranker.predict([(None, image)]), "caption is empty or no text"),
        (lambda: reranker.rank("a", [tmp_path / "broken.png"]), "broken.png: image cannot be decoded"),
        (lambda: reranker.rank("a", ["nowhere.jpg"]), r"nowhere.jpg: no such image file.*nor an id of .*store"),
        (lambda: reranker.rank("a", [image], top_k=0), "top_k is 0"),
        (lambda: reranker.index(tmp_path / "nothing", tmp_path / "s2"), "no such folder"),
        (lambda: reranker.index([image, image], tmp_path / "s2"), "given twice"),
        (lambda: reranker.index([], tmp_path / "s2"), "no ids"),
        (lambda: Reranker.from_pretrained(files / "nothing"), "no such directory"),
        (lambda: Reranker.from_pretrained(files / "checkpoint", dtype="float64"), "dtype is 'float64'"),
    ]
    for call, message in cases:
        with pytest.raises(UserError, match=message):
            call()
    assert not (tmp_path / "s2").exists() and reranker.store is store


def test_another_models_store_and_another_backbone_are_refused(files, tmp_path):
    reranker = Reranker.from_pretrained(files / "checkpoint", dtype="float32")
    store = reranker.index(files / "images", tmp_path / "store", progress=False)
    model = EDJE.from_pretrained(files / "checkpoint")
    with torch.no_grad():
        model.adapter.query += 1
    trained_on = Reranker(model, reranker.backbone)
    with pytest.raises(UserError, match="made by adapter .* but adapter .* is used here"):
        trained_on.rank("a", store.ids, store=store)
    other = write_backbone(tmp_path / "other", seed=5)
    with pytest.raises(UserError, match="trained with backbone .* this one is"):
        Reranker.from_pretrained(files / "checkpoint", backbone=other)


def test_a_backbone_that_was_moved_or_loaded_already_can_be_given(files, tmp_path):
    moved = write_backbone(tmp_path / "moved")
    loaded = Backbone.load(moved, precision="float32")
    for backbone in (moved, loaded):
        assert Reranker.from_pretrained(files / "checkpoint", backbone=backbone).rank("a", image_paths(files)[:2])


RANK_FROM_ELSEWHERE = """
import sys
import edje
assert "open_clip" not in sys.modules, "the package imports the backbone's libraries before they are used"
from edje import EDJE, Backbone, Reranker, TokenStore
reranker = Reranker.from_pretrained(sys.argv[1])
store = reranker.index(sys.argv[2], "store")
ranked = reranker.rank("a red ball", store.ids, top_k=3)
print(edje.__file__, len(ranked), sorted(sys.modules.keys() & {"models", "data"}))
"""


def test_pip_installs_a_package_that_ranks_from_another_folder(files, wheel, tmp_path):
    site, elsewhere = tmp_path / "site", tmp_path / "elsewhere"
    elsewhere.mkdir()
    options = ["--quiet", "--no-deps", "--no-index", "--target", str(site)]
    subprocess.run([sys.executable, "-m", "pip", "install", *options, str(wheel)], check=True, capture_output=True)
    run = subprocess.run(
        [sys.executable, "-c", RANK_FROM_ELSEWHERE, str(files / "checkpoint"), str(files / "images")],
        cwd=elsewhere,
        env={"PYTHONPATH": str(site), "PATH": "/usr/bin:/bin"},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr
    assert run.stdout.split() == [str(site / "edje" / "__init__.py"), "3", "[]"]


def test_reading_a_configuration_does_not_import_the_backbones_libraries():
    code = "import models.config, sys; print({'open_clip', 'torch'} & {*sys.modules})"
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert run.stdout == "set()\n", run.stderr


def test_an_unknown_public_name_is_an_attribute_error():
    import models

    with pytest.raises(AttributeError, match="no attribute 'Rerankers'"):
        models.Rerankers  # noqa: B018


def test_the_committed_checkpoint_finds_its_backbone_from_any_working_directory(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    reranker = Reranker.from_pretrained(ROOT / "configs" / "pretrained" / "scenes", dtype="float32")
    assert reranker.backbone.fingerprint == reranker.model.config.backbone_fingerprint
