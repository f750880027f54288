"""The reranker as an application uses it: files in, lists out; and the package that pip installs."""

import io
import pickle
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from models import Reranker, TokenStore
from models.edje import EDJE
from models.encoder import linear
from models.errors import UserError
from models.recent_texts import RecentTexts
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
        (lambda: reranker.rank("  ", [image]), "query is empty"),
        (lambda: reranker.predict([(None, image)]), "caption of pairs.0. is a NoneType; expected text"),
        (lambda: reranker.rank("a", [tmp_path / "broken.png"]), "broken.png: image cannot be decoded"),
        (lambda: reranker.rank("a", ["nowhere.jpg"]), r"nowhere.jpg: neither an id of .*store nor an image file"),
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


@pytest.fixture(scope="module")
def fused(files) -> Reranker:
    """A checkpoint with a lambda and a calibration."""
    reranker = Reranker.from_pretrained(files / "checkpoint", dtype="float32")
    model = EDJE.from_pretrained(files / "checkpoint")
    model.config = replace(model.config, fusion_lambda=20.0, probability_scale=0.5, probability_offset=-3.0)
    model.save_pretrained(files / "fused")
    return Reranker.from_pretrained(files / "fused", backbone=reranker.backbone, dtype="float32")


def cosines(reranker: Reranker, query: str, images: list) -> np.ndarray:
    backbone = reranker.backbone
    features = backbone.encode_images(torch.stack([backbone.preprocess(open_image(image)) for image in images]))
    return (features.embedding @ backbone.encode_texts([query])[0]).numpy()


def test_the_default_score_is_logit_plus_lambda_times_cosine(files, fused):
    images = image_paths(files)
    pairs = [(CAPTIONS[0], image) for image in images]
    logits, scores = fused.predict(pairs, score="match"), fused.predict(pairs)
    np.testing.assert_allclose(scores, logits + 20 * cosines(fused, CAPTIONS[0], images), rtol=0, atol=1e-4)
    np.testing.assert_array_equal(fused.predict(pairs, score="fused"), scores)
    assert [*np.argsort(-scores)] == [hit["corpus_id"] for hit in fused.rank(CAPTIONS[0], images)]
    assert [*np.argsort(-logits)] == [hit["corpus_id"] for hit in fused.rank(CAPTIONS[0], images, score="match")]
    assert [*np.argsort(-scores)] != [*np.argsort(-logits)]


def test_probability_is_the_calibrated_default_score_and_of_no_other(files, fused, reranker):
    images = image_paths(files)
    for hit in fused.rank(CAPTIONS[0], images):
        assert hit["probability"] == pytest.approx(1 / (1 + np.exp(3 - 0.5 * hit["score"])), abs=1e-6)
    hits = fused.rank(CAPTIONS[0], images)
    least = hits[4]["probability"]
    assert fused.rank(CAPTIONS[0], images, min_probability=least) == hits[:5]
    assert fused.rank(CAPTIONS[0], images, activation_fn=torch.sigmoid)[0]["probability"] == hits[0]["probability"]
    assert "probability" not in fused.rank(CAPTIONS[0], images, score="match")[0]
    assert "probability" not in reranker.rank(CAPTIONS[0], images)[0]
    for call in (
        lambda: fused.rank(CAPTIONS[0], images, score="match", min_probability=0.5),
        lambda: reranker.rank(CAPTIONS[0], images, min_probability=0.5),
    ):
        with pytest.raises(UserError, match="min_probability needs a checkpoint that is calibrated"):
            call()
    with pytest.raises(UserError, match="checkpoint has no lambda"):
        reranker.rank(CAPTIONS[0], images, score="fused")


def test_the_text_tower_runs_once_a_query_and_not_where_the_caller_knows_its_output(
    files, fused, tmp_path, monkeypatch
):
    store = TokenStore.open(fused.index(files / "images", tmp_path / "store", progress=False).path)
    text, given = fused.backbone.encode_texts([CAPTIONS[1]])[0], []
    encode = fused.backbone.encode_texts
    monkeypatch.setattr(fused.backbone, "encode_texts", lambda texts: given.extend(texts) or encode(texts))
    monkeypatch.setattr(fused._scorer, "_encode_texts", RecentTexts(fused.backbone, most=2))
    cosine = (store.gather_embeddings(store.ids) @ text).numpy()
    by_text = fused.rank(CAPTIONS[1], store.ids, store=store, text_embedding=text)
    by_cosine = fused.rank(CAPTIONS[1], store.ids, store=store, similarities=cosine)
    assert given == []
    hits = fused.rank(CAPTIONS[1], store.ids, store=store)
    assert given == [CAPTIONS[1]]
    for other in (by_text, by_cosine):
        assert [hit["corpus_id"] for hit in other] == [hit["corpus_id"] for hit in hits]
        np.testing.assert_allclose([h["score"] for h in other], [h["score"] for h in hits], rtol=0, atol=1e-4)
    for query in (CAPTIONS[1], CAPTIONS[0], CAPTIONS[1], CAPTIONS[2], CAPTIONS[0]):
        fused.rank(query, store.ids[:2], store=store)
    assert given == [CAPTIONS[1], CAPTIONS[0], CAPTIONS[2], CAPTIONS[0]]  # two are remembered


def test_search_reranks_the_nearest_of_the_store(files, fused, tmp_path):
    store = fused.index(files / "images", tmp_path / "store", progress=False)
    cosine = (store.gather_embeddings(store.ids) @ fused.backbone.encode_texts([CAPTIONS[0]])[0]).numpy()
    pool = [store.ids[i] for i in np.argsort(-cosine, kind="stable")[:6]]
    expected = fused.rank(CAPTIONS[0], pool, top_k=4, store=store)
    hits = fused.search(CAPTIONS[0], store, top_k=4, pool=6)
    assert [hit["id"] for hit in hits] == [pool[hit["corpus_id"]] for hit in expected]
    assert [hit["first_stage_rank"] for hit in hits] == [hit["corpus_id"] + 1 for hit in expected]
    assert [hit["probability"] for hit in hits] == pytest.approx([h["probability"] for h in expected], abs=1e-6)
    assert len(fused.search(CAPTIONS[0], store, top_k=50)) == 9
    both = fused.search([CAPTIONS[0], CAPTIONS[1]], store, top_k=4, pool=6)
    assert [hit["id"] for hit in both[0]] == [hit["id"] for hit in hits] and both[1] != both[0]
    with pytest.raises(UserError, match="top_k is 10 and pool 5"):
        fused.search(CAPTIONS[0], store, pool=5)
    with pytest.raises(UserError, match="store is a str; expected a token store"):
        fused.search(CAPTIONS[0], "photos")


def test_a_list_of_queries_ranks_shared_or_own_candidates(files, reranker):
    images = image_paths(files)
    alone = [reranker.rank(caption, images, top_k=3) for caption in CAPTIONS]
    shared = reranker.rank(CAPTIONS, (image for image in images), top_k=3)
    own = reranker.rank(CAPTIONS, [images[: 4 + n] for n in range(len(CAPTIONS))])
    assert [[hit["corpus_id"] for hit in hits] for hits in shared] == [[h["corpus_id"] for h in hits] for hits in alone]
    assert [len(hits) for hits in own] == [4 + n for n in range(len(CAPTIONS))]
    assert reranker.rank([], images) == []
    with pytest.raises(UserError, match="2 lists among 2 items for 3 queries"):
        reranker.rank(CAPTIONS[:3], [images, images])


def test_captions_are_ranked_for_an_image_by_the_same_scores(files, fused):
    image = image_paths(files)[0]
    hits = fused.rank_captions(image, CAPTIONS, top_k=2, return_documents=True)
    scores = fused.predict([(caption, image) for caption in CAPTIONS])
    assert [hit["corpus_id"] for hit in hits] == [*np.argsort(-scores)][:2]
    assert [hit["text"] for hit in hits] == [CAPTIONS[hit["corpus_id"]] for hit in hits]
    with pytest.raises(UserError, match="captions is one text"):
        fused.rank_captions(image, CAPTIONS[0])


def test_predict_takes_the_options_of_a_cross_encoder(files, reranker):
    images = image_paths(files)
    pairs = [(caption, image) for caption in CAPTIONS for image in images]
    scores = reranker.predict(pairs)
    np.testing.assert_allclose(reranker.predict(iter(pairs), batch_size=5), scores, rtol=0, atol=1e-5)
    tensor = reranker.predict(pairs, convert_to_tensor=True)
    assert tensor.dtype == torch.float32 and torch.equal(tensor, torch.from_numpy(scores))
    listed = reranker.predict(pairs, convert_to_numpy=False)
    assert isinstance(listed, list) and torch.equal(torch.stack(listed), tensor)
    np.testing.assert_allclose(
        reranker.predict(pairs, activation_fn=torch.sigmoid), 1 / (1 + np.exp(-scores)), atol=1e-6
    )
    shares = reranker.predict(pairs, apply_softmax=True).reshape(len(CAPTIONS), -1)
    of_caption = np.exp(scores.reshape(len(CAPTIONS), -1).astype(np.float64))
    np.testing.assert_allclose(shares, of_caption / of_caption.sum(1, keepdims=True), rtol=1e-5)
    single = reranker.predict((CAPTIONS[0], images[0]))
    assert isinstance(single, np.float32) and single == pytest.approx(scores[0], abs=1e-5)
    assert reranker.predict([[CAPTIONS[0], str(images[0])]])[0] == pytest.approx(scores[0], abs=1e-5)
    assert reranker.predict([]).shape == (0,)
    given = reranker.rank(CAPTIONS[0], images, return_documents=True)
    assert [hit["text"] for hit in given] == [images[hit["corpus_id"]] for hit in given]


def test_every_form_of_an_image_has_the_score_of_its_file(files, reranker):
    path = image_paths(files)[3]
    picture = Image.open(path).convert("RGB")
    array, grey = np.array(picture), np.array(picture.convert("L"))
    tensor = torch.from_numpy(array).permute(2, 0, 1)
    with path.open("rb") as file:
        forms = [
            str(path),
            picture,
            path.read_bytes(),
            io.BytesIO(path.read_bytes()),
            file,
            array,
            tensor,
            tensor / 255,
        ]
        scores = reranker.predict([(CAPTIONS[0], form) for form in [path, *forms]])
    np.testing.assert_allclose(scores, scores[0], rtol=0, atol=1e-5)
    greys = reranker.predict(
        [(CAPTIONS[0], form) for form in (picture.convert("L"), grey, torch.from_numpy(grey)[None])]
    )
    np.testing.assert_allclose(greys, greys[0], rtol=0, atol=1e-5)
    assert abs(greys[0] - scores[0]) > 1e-4


def test_a_text_that_is_neither_id_nor_path_says_so_and_others_what_they_are(files, fused, tmp_path):
    fused.index(files / "images", tmp_path / "store", progress=False)
    for text, message in (
        ("x.png", "x.png: neither an id of .*store nor an image file"),
        ("https://example.org/a.jpg", "a URL, and images are read from disk"),
        (str(tmp_path), "a folder, not an image"),
        ("\0.png", "neither an id of .*store nor an image file"),
    ):
        with pytest.raises(UserError, match=message):
            fused.rank(CAPTIONS[0], [image_paths(files)[0], text])


def test_each_mistake_about_what_is_scored_is_named(files, reranker, tmp_path):
    image, array = image_paths(files)[0], np.zeros((8, 8, 3), np.uint8)
    caption = CAPTIONS[0]
    cases = [
        (lambda: reranker.rank(caption, str(image)), "documents is one image .*pass a list"),
        (lambda: reranker.rank(caption, image), "documents is one image"),
        (lambda: reranker.rank(caption, array), "documents is one image"),
        (lambda: reranker.rank(caption, 5), "documents is a int"),
        (lambda: reranker.rank(None, [image]), "query is a NoneType"),
        (lambda: reranker.rank([caption, [caption]], [image]), r"query\[1\] is a list; expected text"),
        (lambda: reranker.predict([([caption], image)]), r"caption of pairs\[0\] is a list; expected text"),
        (lambda: reranker.predict([(image, caption)]), "the caption goes first, then the image"),
        (lambda: reranker.predict([(str(image), caption)]), "is an image: the caption goes first"),
        (lambda: reranker.predict([(caption, image, 1)]), r"pairs\[0\] is 3 parts"),
        (lambda: reranker.predict([caption, image, image]), r"pairs\[0\] is a str"),
        (lambda: reranker.predict(str(image)), "pairs is a str"),
        (lambda: reranker.rank(caption, ["https://example.org/a.jpg"]), "a URL, and images are read from disk"),
        (lambda: reranker.rank(caption, [tmp_path]), "a folder, not an image"),
        (lambda: reranker.rank(caption, [None]), "an image is a NoneType; expected a path"),
        (lambda: reranker.rank(caption, [array.astype(np.float32)]), "dtype float32; expected uint8"),
        (lambda: reranker.rank(caption, [array.transpose(2, 0, 1)]), r"shape \[3, 8, 8\]; expected \[H, W, 3\]"),
        (lambda: reranker.rank(caption, [torch.from_numpy(array)]), r"shape \[8, 8, 3\]; expected \[3, H, W\]"),
        (lambda: reranker.rank(caption, [torch.full((3, 8, 8), 2.0)]), "values from 2 to 2; expected 0 to 1"),
        (lambda: reranker.rank(caption, [b"no image"]), "image of 8 bytes: not an image"),
        (lambda: reranker.rank(caption, [image], score="best"), "score is 'best'; expected 'fused' or 'match'"),
        (lambda: reranker.rank(caption, [image], similarities=[0.1, 0.2]), r"similarities have shape \[2\]"),
        (lambda: reranker.rank(caption, [image], similarities=[3.0]), "similarities are not cosines"),
        (lambda: reranker.rank(caption, [image], text_embedding=[1.0]), "text_embedding has shape"),
        (lambda: reranker.rank(caption, [image], batch_size=0), "batch_size is 0"),
        (lambda: reranker.predict([(caption, image)], prompt_name="query"), "this model has no prompts"),
        (lambda: reranker.rank(caption, [image], similarities=["near"]), "similarities is no list, array or tensor"),
        (lambda: reranker.rank(caption, [image], text_embedding="red"), "text_embedding is no list, array or tensor"),
        (lambda: reranker.rank([caption] * 2, [image], similarities=[0.1, 0.2]), r"similarities have shape \[\]"),
        (lambda: reranker.rank([caption] * 2, [image], similarities=[[0.1]]), "holds 1 lists for 2 queries"),
        (lambda: reranker.rank([caption] * 2, [image], similarities=0.1), "holds 0 lists for 2 queries"),
        (lambda: reranker.rank(caption, ["a.png"], store=str(tmp_path)), "store is a str; .*TokenStore.open"),
        (lambda: reranker.search(caption, store=tmp_path), "store is a PosixPath; .*TokenStore.open"),
        (lambda: reranker.rank(caption, [image], top_k=2.5), "top_k is 2.5; expected a whole number"),
        (lambda: reranker.rank(caption, [image], top_k="3"), "top_k is '3'; expected a whole number"),
        (lambda: reranker.predict([(caption, image)], batch_size=1.5), "batch_size is 1.5; expected a whole number"),
        (lambda: reranker.rank(caption, [image], min_probability="0.5"), "min_probability is '0.5'; expected a number"),
        (lambda: reranker.rank(caption, [image], min_probability=50), "min_probability is 50; expected a number from"),
        (lambda: reranker.rank(caption, [image], activation_fn="sigmoid"), "activation_fn is a str"),
        (lambda: reranker.rank(caption, [image] * 2, activation_fn=torch.sum), r"gave \[\] of scores \[2\]"),
        (lambda: reranker.rank(caption, [image], activation_fn=np.asarray), "gave a ndarray of scores"),
        (lambda: reranker.index([array], tmp_path / "store"), "item 0 to index is a ndarray; expected a path"),
        (lambda: reranker.index(5, tmp_path / "store"), "what to index is a int; expected a folder"),
        (lambda: reranker.index([image], None), "store_path is a NoneType"),
        (lambda: reranker.index([image], tmp_path / "store", num_workers=-1), "num_workers is -1"),
        (lambda: Reranker.from_pretrained(None), "a checkpoint is a NoneType"),
        (lambda: Reranker.from_pretrained("a" * 3000), "no such checkpoint .*too long"),
        (lambda: Reranker.from_pretrained(files / "checkpoint", device=None), "device is None; expected auto"),
        (lambda: Reranker.from_pretrained(files / "checkpoint", backbone="ViT-B-16"), "backbone is a str; .*Config"),
    ]
    for number, (call, message) in enumerate(cases):
        with pytest.raises(UserError, match=message):
            call()
            pytest.fail(f"case {number}: no error")


def test_cosines_of_one_query_never_pass_for_those_of_another(files, fused):
    images = image_paths(files)[:4]
    lists, cosines = [images[:2], images[2:]], [[0.1, 0.2], [0.3, 0.4]]
    both = fused.rank(CAPTIONS[:2], lists, similarities=cosines)
    alone = [fused.rank(CAPTIONS[i], lists[i], similarities=cosines[i]) for i in range(2)]
    for hits, expected in zip(both, alone, strict=True):
        assert [hit["corpus_id"] for hit in hits] == [hit["corpus_id"] for hit in expected]
        scores = [[hit["score"] for hit in found] for found in (hits, expected)]
        np.testing.assert_allclose(*scores, rtol=0, atol=1e-5)
    with pytest.raises(UserError, match=r"similarities have shape \[3\]; expected one cosine a pair, \[2\]"):
        fused.rank(CAPTIONS[:2], lists, similarities=[[0.1, 0.2, 0.3], [0.4]])


def test_no_query_finds_nothing_and_cosines_may_be_any_iterable(files, fused, tmp_path):
    store = fused.index(files / "images", tmp_path / "store", progress=False)
    assert fused.search([], store) == fused.rank([], store.ids) == []
    given = [0.1] * len(store)
    expected = fused.rank(CAPTIONS[0], store.ids, similarities=given)
    for cosines in ((cosine for cosine in given), torch.tensor(given, requires_grad=True), np.array(given)):
        assert fused.rank(CAPTIONS[0], store.ids, similarities=cosines) == expected


@pytest.fixture(params=["plain", "prepacked"])
def maps(request, monkeypatch) -> None:
    """Both forms of the joint encoder's linear maps; oneDNN's packed weights are those of CPUs with AVX-512."""
    forced = request.param == "prepacked"
    if forced and not hasattr(torch.ops.mkldnn, "_reorder_linear_weight"):
        pytest.skip("this build of torch has no packed linear maps")
    monkeypatch.setattr(linear, "_has_fused_form", lambda device, dtype: forced and dtype == torch.float32)


SCORE_IN_NEW_PROCESSES = """
import os, pickle, sys
import torch
torch.set_num_threads(2)
reranker, pairs = pickle.load(sys.stdin.buffer)
scores = reranker.predict(pairs * 8)
if hasattr(os, "fork") and os.fork() == 0:
    os._exit(0 if abs(reranker.predict(pairs * 8) - scores).max() < 1e-5 else 1)
if hasattr(os, "fork"):
    assert os.waitstatus_to_exitcode(os.wait()[1]) == 0, "another score after a fork"
sys.stdout.buffer.write(pickle.dumps(scores))
"""


@pytest.mark.usefixtures("maps")
def test_a_reranker_is_pickled(files):
    reranker, image = Reranker.from_pretrained(files / "residual", dtype="float32"), image_paths(files)[0]
    pairs = [(caption, image) for caption in CAPTIONS]
    np.testing.assert_allclose(
        pickle.loads(pickle.dumps(reranker)).predict(pairs), reranker.predict(pairs), rtol=0, atol=1e-5
    )


def test_a_reranker_is_sent_to_a_new_process_and_used_after_a_fork(files):
    reranker = Reranker.from_pretrained(files / "residual", dtype="float32")
    pairs = [(caption, image) for caption in CAPTIONS for image in image_paths(files)]
    run = subprocess.run(
        [sys.executable, "-c", SCORE_IN_NEW_PROCESSES],
        input=pickle.dumps((reranker, pairs)),
        capture_output=True,
        cwd=ROOT,
        timeout=300,
    )
    assert run.returncode == 0, run.stderr.decode()
    np.testing.assert_allclose(pickle.loads(run.stdout)[: len(pairs)], reranker.predict(pairs), rtol=0, atol=1e-5)


def test_a_reranker_is_used_from_eight_threads(files, fused, tmp_path):
    store = fused.index(files / "images", tmp_path / "store", progress=False)
    expected = {caption: fused.search(caption, store) for caption in CAPTIONS}
    with ThreadPoolExecutor(8) as pool:
        queries = [CAPTIONS[number % len(CAPTIONS)] for number in range(40)]
        for query, hits in zip(queries, pool.map(lambda query: fused.search(query, store), queries), strict=True):
            assert [hit["id"] for hit in hits] == [hit["id"] for hit in expected[query]]


def test_the_reranking_evaluator_of_sentence_transformers_runs_on_ours(files, reranker):
    from sentence_transformers.cross_encoder.evaluation import CrossEncoderRerankingEvaluator

    images = [str(path) for path in image_paths(files)]
    right = [images[0], images[4]]
    asked = list(zip(CAPTIONS[:2], right, strict=True))
    samples = [{"query": query, "positive": [image], "documents": images} for query, image in asked]
    figures = CrossEncoderRerankingEvaluator(samples, name="tiny", write_csv=False)(reranker)
    ranks = [
        [images[hit["corpus_id"]] for hit in reranker.rank(query, images)].index(image) + 1 for query, image in asked
    ]
    assert figures["tiny_mrr@10"] == pytest.approx(np.mean([1 / rank for rank in ranks]))
    assert reranker.model_card_data.metrics
