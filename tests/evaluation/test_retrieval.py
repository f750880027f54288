"""First stage and reranking against the plainest code: one pair at a time, one query at a time."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from eccv_caption._metrics import compute_coco1k_r_at_k

from data.caption_datasets import CaptionDataset, load_annotations
from evaluation.gallery import build_gallery
from evaluation.retrieval import _collect, evaluate, first_stage, rerank_pools
from models.checkpoints.checkpoint import adapter_fingerprint
from models.config import CompressionConfig, EDJEConfig, EncoderConfig
from models.distributed import DistributedContext
from models.edje import EDJE
from models.errors import UserError
from models.language.captions import CaptionTokenizer, build_vocabulary
from models.stores.token_store import TokenStore, TokenStoreWriter
from models.vision.backbones import Backbone

ALONE = DistributedContext()


@pytest.fixture(scope="module")
def dataset(annotations: Path, scenes: Path) -> CaptionDataset:
    return load_annotations(annotations, scenes, "train")


@pytest.fixture(scope="module")
def tokenizer(dataset: CaptionDataset, tmp_path_factory) -> CaptionTokenizer:
    vocabulary = tmp_path_factory.mktemp("vocabulary") / "vocab.txt"
    build_vocabulary(dataset.captions, vocabulary)
    return CaptionTokenizer.from_pretrained(vocabulary)


def make_model(backbone: Backbone, tokenizer: CaptionTokenizer, **options) -> EDJE:
    """Random, with weights large enough that the candidates' logits lie apart."""
    config = EDJEConfig(
        backbone=backbone.config,
        dims=backbone.dims,
        backbone_fingerprint=backbone.fingerprint,
        adapter=CompressionConfig(num_tokens=4, mlp_width=16, num_heads=2),
        encoder=EncoderConfig(
            vocab_size=tokenizer.vocab_size, hidden_size=16, num_layers=2, num_heads=2, intermediate_size=32
        ),
        **options,
    )
    torch.manual_seed(0)
    model = EDJE(config, tokenizer)
    for parameter in model.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.3)
    return model.eval()


@pytest.fixture(scope="module")
def model(backbone: Backbone, tokenizer: CaptionTokenizer) -> EDJE:
    return make_model(backbone, tokenizer)


def float32_results(model, backbone, dataset, **options):
    return evaluate(model, backbone, dataset, ALONE, dtype=torch.float32, **options)


@pytest.mark.parametrize("seed", range(3))
def test_first_stage_is_brute_force_with_ties_in_order_of_item_number(seed):
    generator = torch.Generator().manual_seed(seed)
    items = torch.randint(-1, 2, (40, 3), generator=generator).float()  # many equal, many opposite
    queries = torch.randn(300, 3, generator=generator)
    query_image, item_image = np.arange(300) % 9, np.arange(40) % 8  # nothing is right for image 8
    pools = first_stage(queries, items, query_image, item_image, depth=7)
    cosines = (queries.double() @ items.double().T).float()
    for query, row in enumerate(cosines.tolist()):
        order = sorted(range(40), key=lambda item, row=row: (-row[item], item))
        assert pools.ids[query].tolist() == order[:7]
        right = [rank for rank, item in enumerate(order) if item_image[item] == query_image[query]]
        assert pools.first_right[query] == (right[0] if right else 40)
    torch.testing.assert_close(pools.similarities, cosines.gather(1, pools.ids), rtol=0, atol=0)


def test_first_stage_of_a_small_gallery_returns_all_of_it():
    pools = first_stage(torch.eye(3), torch.eye(3), np.arange(3), np.arange(3), depth=10)
    assert pools.ids.tolist() == [[0, 1, 2], [1, 0, 2], [2, 0, 1]]


@pytest.mark.parametrize("residual", [0.0, 2.0])
def test_reranked_logits_are_those_of_one_pair_at_a_time(backbone, tokenizer, dataset, residual):
    model = make_model(backbone, tokenizer, residual_similarity=residual)
    torch.nn.init.normal_(model.match_head.out.weight)
    results = float32_results(model, backbone, dataset, k=4)
    gallery = build_gallery(model, backbone, dataset, ALONE)
    for part, queries_are_captions in ((results.t2i, True), (results.i2t, False)):
        for query in range(0, len(part.query_image), 17):
            for place, candidate in enumerate(part.candidates[query, :4]):
                caption, image = (query, candidate) if queries_are_captions else (candidate, query)
                tokens, cosine = gallery.tokens(torch.tensor([image])), part.similarities[query, place : place + 1]
                alone = model.score([dataset.captions[caption]], tokens, torch.from_numpy(cosine) if residual else None)
                assert part.logits[query, place] == pytest.approx(alone.item(), abs=1e-5)


@pytest.mark.parametrize("direction", ["t2i", "i2t"])
def test_logits_do_not_depend_on_the_size_of_the_micro_batch(model, backbone, dataset, direction):
    with torch.inference_mode():
        gallery = build_gallery(model, backbone, dataset, ALONE)
        embeddings = (gallery.text_embeddings, gallery.image_embeddings)
        images = (dataset.caption_image, np.arange(len(dataset)))
        way = 1 if direction == "t2i" else -1
        pools = first_stage(*embeddings[::way], *images[::way], depth=10)
        by_size = [rerank_pools(model, gallery, pools, direction, 5, ALONE, pairs_per_batch=n) for n in (1024, 100, 7)]
    for logits in by_size[1:]:
        torch.testing.assert_close(logits, by_size[0], rtol=0, atol=1e-5)


def test_recall_at_k_is_the_embeddings_own(model, backbone, dataset):
    summary = float32_results(model, backbone, dataset, k=5).figures().to_json()
    for direction in ("t2i", "i2t"):
        part = summary[direction]
        for name in ("R@5", "R@10"):
            assert part["reranked"][name] == part["embedding"][name]
        assert part["pool_ceiling"] == part["embedding"]["R@5"]


def test_a_pair_that_comes_back_twice_stops_the_evaluation():
    half = (torch.tensor([0, 1]), torch.tensor([0.5, 0.25]))
    with pytest.raises(AssertionError, match="twice or not at all"):
        _collect([half, half], total=4, distributed=ALONE)


def test_stored_patch_tokens_give_the_results_of_images_without_a_backbone(model, backbone, dataset, stores):
    from_images = float32_results(model, backbone, dataset)
    tokens, captions = (TokenStore.open(path) for path in stores)
    from_stores = float32_results(model, None, dataset, store=tokens, caption_store=captions)
    for ours, theirs in ((from_stores.t2i, from_images.t2i), (from_stores.i2t, from_images.i2t)):
        np.testing.assert_array_equal(ours.candidates, theirs.candidates)
        np.testing.assert_allclose(ours.logits, theirs.logits, atol=2e-2)  # tokens were rounded to float16
    assert from_stores.seconds["backbone"] == 0.0


def write_compressed(path: Path, model: EDJE, backbone: Backbone, dataset: CaptionDataset, adapter: str) -> TokenStore:
    with torch.inference_mode():
        gallery = build_gallery(model, backbone, dataset, ALONE)
        tokens = gallery.tokens(torch.arange(len(dataset)))
    writer = TokenStoreWriter(
        path,
        dataset.image_ids,
        tokens_per_item=tokens.shape[1],
        width=tokens.shape[2],
        embedding_width=gallery.image_embeddings.shape[1],
        dtype="float16",
        backbone_fingerprint=backbone.fingerprint,
        adapter_fingerprint=adapter,
        items_per_shard=len(dataset),
    )
    writer.write_shard(0, tokens, gallery.image_embeddings)
    writer.finish()
    return TokenStore.open(path)


def test_stored_compressed_tokens_give_the_results_of_images(model, backbone, dataset, tmp_path):
    fingerprint = adapter_fingerprint(model.config, model.state_dict())
    store = write_compressed(tmp_path / "store", model, backbone, dataset, fingerprint)
    from_store = float32_results(model, backbone, dataset, store=store)
    from_images = float32_results(model, backbone, dataset)
    np.testing.assert_array_equal(from_store.t2i.candidates, from_images.t2i.candidates)
    np.testing.assert_allclose(from_store.t2i.logits, from_images.t2i.logits, atol=2e-2)
    assert from_store.seconds["compress"] == 0.0


def test_tokens_of_another_adapter_are_refused(model, backbone, dataset, tmp_path):
    store = write_compressed(tmp_path / "store", model, backbone, dataset, adapter="another")
    with pytest.raises(UserError, match="another"):
        float32_results(model, backbone, dataset, store=store)


def test_a_backbone_that_the_model_was_not_trained_with_is_refused(model, backbone, dataset):
    config = replace(model.config, backbone_fingerprint="ViT-B-16/another")
    other = EDJE(config, model.tokenizer)
    with pytest.raises(UserError, match=r"ViT-B-16/another"):
        float32_results(other, backbone, dataset)


def test_without_backbone_both_stores_are_needed(model, dataset, stores):
    with pytest.raises(UserError, match="caption store"):
        float32_results(model, None, dataset, store=TokenStore.open(stores[0]))


def images_of(dataset: CaptionDataset, first: int, stop: int) -> CaptionDataset:
    """These images and their captions as a data set of their own."""
    own = (dataset.caption_image >= first) & (dataset.caption_image < stop)
    captions = [caption for caption, chosen in zip(dataset.captions, own, strict=True) if chosen]
    images = slice(first, stop)
    return CaptionDataset(
        dataset.root, dataset.image_ids[images], captions, dataset.caption_image[own] - first, dataset.subsets[images]
    )


def without_caption(dataset: CaptionDataset, number: int) -> CaptionDataset:
    captions = dataset.captions[:number] + dataset.captions[number + 1 :]
    return replace(dataset, captions=captions, caption_image=np.delete(dataset.caption_image, number))


def test_figures_of_folds_are_the_means_of_evaluations_of_each_fold_alone(model, backbone, dataset):
    model = copy_with_lambda(model, 2.0)
    dataset = without_caption(dataset, 7)  # folds with different numbers of captions
    together = float32_results(model, backbone, dataset, k=5, folds=4)
    alone = [float32_results(model, backbone, images_of(dataset, i, i + 12), k=5) for i in range(0, 48, 12)]
    for direction in ("t2i", "i2t"):
        ours, parts = getattr(together, direction), [getattr(results, direction) for results in alone]
        np.testing.assert_allclose(ours.logits, np.concatenate([part.logits for part in parts]), atol=1e-5)
        summary, summaries = ours.figures().to_json(), [part.figures().to_json() for part in parts]
        for column in ("embedding", "reranked", "fused"):
            for name, value in summary[column].items():
                assert value == pytest.approx(np.mean([s[column][name] for s in summaries]))
        assert summary["pool_ceiling"] == pytest.approx(np.mean([s["pool_ceiling"] for s in summaries]))
        assert summary["helped"] == sum(s["helped"] for s in summaries)
    assert together.t2i.folds == 4 and together.num_images == 48


def copy_with_lambda(model: EDJE, fusion_lambda: float) -> EDJE:
    other = EDJE(replace(model.config, fusion_lambda=fusion_lambda), model.tokenizer)
    other.load_state_dict(model.state_dict())
    return other.eval()


def test_folds_of_the_embedding_give_the_recall_of_eccv_captions_5_fold_protocol(model, backbone, dataset):
    """Its own code: the ranking of the whole split, filtered to each fold."""
    gallery = build_gallery(model, backbone, dataset, ALONE)
    whole = gallery.text_embeddings.double() @ gallery.image_embeddings.double().T
    rankings = dict(enumerate((-whole.float()).argsort(dim=1, stable=True).tolist()))
    folded = float32_results(model, backbone, dataset, k=5, folds=4).t2i.figures().to_json()["embedding"]
    for k in (1, 5, 10):
        of_folds = []
        for first in range(0, 48, 12):
            truth = {c: [i] for c, i in enumerate(dataset.caption_image.tolist()) if first <= i < first + 12}
            of_folds.append(compute_coco1k_r_at_k(rankings, truth, set(range(first, first + 12)), K=k))
        assert folded[f"R@{k}"] == pytest.approx(100 * np.mean(of_folds))


@pytest.mark.parametrize(
    "folds, k, problem",
    [
        (5, 5, "5 folds of 48 images are not equal"),
        (0, 5, "not equal"),
        (6, 5, "6 folds of 48 images have 8 each; R@10 needs at least 10"),
        (4, 13, "k is 13, but each of 4 folds has 12 images"),
    ],
)
def test_folds_that_do_not_divide_the_gallery_or_are_too_small_are_refused(model, backbone, dataset, folds, k, problem):
    with pytest.raises(UserError, match=problem):
        float32_results(model, backbone, dataset, k=k, folds=folds)


@pytest.mark.parametrize("k", [0, 49])
def test_a_pool_beyond_the_gallery_is_refused(model, backbone, dataset, k):
    with pytest.raises(UserError, match=rf"k is {k}, but the gallery has 48 images and 240 captions"):
        float32_results(model, backbone, dataset, k=k)


def test_an_unreadable_image_is_named(model, backbone, tmp_path):
    (tmp_path / "broken.png").write_bytes(b"no image")
    dataset = CaptionDataset(tmp_path, ["broken.png"], ["a red ball"], np.zeros(1, np.int64), [None])
    with pytest.raises(UserError, match=r"broken\.png"):
        float32_results(model, backbone, dataset, k=1)


def test_evaluation_leaves_a_model_in_training_mode_as_it_was(backbone, tokenizer, dataset):
    model = make_model(backbone, tokenizer).train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    float32_results(model, backbone, dataset, k=2)
    assert model.training and model.adapter.training and model.encoder.training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
