"""Rankings that follow from scores: ties, pools, fusion, subsets, the choice of lambda."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from evaluation.calibration import Calibration, fit_calibration
from evaluation.metrics import recall_at_k, right_answers
from evaluation.results import LAMBDA_GRID, DirectionResults, Results, choose_lambda, with_fitted_scores
from models.config import BackboneConfig, BackboneDims, CompressionConfig, EDJEConfig, EncoderConfig

K, DEPTH, NUM_IMAGES = 6, 10, 12
CONFIG = EDJEConfig(
    backbone=BackboneConfig(name="ViT-B-16", pretrained="random"),
    dims=BackboneDims(num_patches=9, patch_width=8, embedding_width=6),
    adapter=CompressionConfig(),
    encoder=EncoderConfig(),
)


def direction(seed: int, query_image: np.ndarray, item_image: np.ndarray, ties: bool = False) -> DirectionResults:
    """Random scores; with `ties`, logits take three values only."""
    rng = np.random.default_rng(seed)
    similarities = rng.normal(size=(len(query_image), len(item_image))).astype(np.float32)
    ranking = np.argsort(-similarities, axis=1)
    candidates = ranking[:, :DEPTH]
    logits = rng.normal(size=(len(query_image), K)).astype(np.float32)
    return DirectionResults(
        query_image=query_image,
        item_image=item_image,
        candidates=candidates,
        similarities=np.take_along_axis(similarities, candidates, axis=1),
        logits=np.round(logits) if ties else logits,
        first_right=right_answers(ranking, query_image, item_image).argmax(axis=1),
    )


def random_results(seed: int, ties: bool = False) -> Results:
    images, caption_image = np.arange(NUM_IMAGES), np.repeat(np.arange(NUM_IMAGES), 5)
    return Results(
        t2i=direction(seed, caption_image, images, ties),
        i2t=direction(seed + 1, images, caption_image, ties),
        image_subsets=["red" if image % 3 else None for image in images],
        seconds={"backbone": 1.0, "compress": 1.0, "rerank": 2.0},
        precision="float32",
    )


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("column", ["reranked", "fused"])
def test_reranking_a_pool_of_k_leaves_recall_at_k_and_below_the_pool_everything(seed, column):
    results = random_results(seed).with_lambda(3.0)
    for part in (results.t2i, results.i2t):
        for pool in (1, 3, K):
            reranked, embedding = part.rankings(column, pool), part.rankings("embedding")
            np.testing.assert_array_equal(reranked[:, pool:], embedding[:, pool:])
            np.testing.assert_array_equal(np.sort(reranked, axis=1), np.sort(embedding, axis=1))
            for k in range(pool, DEPTH + 1):
                assert recall_at_k(part.hits(column, pool), k) == recall_at_k(part.hits("embedding"), k)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("column", ["embedding", "reranked", "fused"])
def test_the_rank_of_the_first_right_answer_is_that_in_the_whole_gallery(seed, column):
    """The whole ranking, written out: the pool in the column's order, then everything else in the embedding's."""
    images, caption_image = np.arange(NUM_IMAGES), np.repeat(np.arange(NUM_IMAGES), 5)
    for query_image, item_image in ((caption_image, images), (images, caption_image)):
        part = replace(direction(seed, query_image, item_image), fusion_lambda=3.0)
        ranks, shown = part.first_right_ranks(column), part.rankings(column)
        for query, image in enumerate(query_image):
            if part.first_right[query] < DEPTH:
                expected = next(r for r, item in enumerate(shown[query]) if item_image[item] == image)
            else:
                expected = part.first_right[query]
            assert ranks[query] == expected


@pytest.mark.parametrize("seed", range(5))
def test_equal_logits_keep_the_first_stages_order(seed):
    part = random_results(seed, ties=True).t2i
    for query, ranking in enumerate(part.rankings("reranked")):
        order = sorted(range(K), key=lambda place, row=part.logits[query]: (-row[place], place))
        np.testing.assert_array_equal(ranking[:K], part.candidates[query, order])


def test_fused_goes_from_the_logits_order_to_the_embeddings():
    results = random_results(0)
    logits_alone, embedding_alone = results.with_lambda(0.0).t2i, results.with_lambda(1e6).t2i
    np.testing.assert_array_equal(logits_alone.rankings("fused"), results.t2i.rankings("reranked"))
    np.testing.assert_array_equal(embedding_alone.rankings("fused"), results.t2i.rankings("embedding"))


def test_without_lambda_there_is_no_fused_column():
    summary = random_results(0).figures().to_json()
    assert "fused" not in summary["t2i"] and not any(key.startswith("fused") for key in summary["i2t"])
    assert random_results(0).with_lambda(2.0).figures().to_json()["t2i"]["fused"]["lambda"] == 2.0


def test_a_calibration_is_of_the_default_score_and_of_one_lambda():
    results, calibration = random_results(0), Calibration(0.5, -1.0, "val")
    for column, part in (
        ("reranked", results.with_lambda(None, calibration).t2i),
        ("fused", results.with_lambda(2.0, calibration).t2i),
    ):
        scores, right = part.scored_pool()
        np.testing.assert_array_equal(scores, part.scores(column).ravel())
        np.testing.assert_array_equal(right, part.hits("embedding")[:, :K].ravel())
        found = part.figures().to_json()["calibration"]
        probabilities = 1 / (1 + np.exp(1.0 - 0.5 * scores))
        assert found["brier_after"] == pytest.approx(np.mean((probabilities - right) ** 2))
        assert found["ece_before"] != found["ece_after"] and found["split"] == "val"
    assert results.with_lambda(2.0, calibration).with_lambda(3.0).t2i.calibration is None
    assert "calibration" not in results.with_lambda(2.0).figures().to_json()["t2i"]


def test_lambda_and_calibration_are_fitted_on_validation_the_latter_on_text_to_image_alone():
    validation = random_results(4)
    config = with_fitted_scores(CONFIG, validation, "val")
    assert config.fusion_lambda == choose_lambda(validation) and config.fusion_split == "val"
    fused = validation.with_lambda(config.fusion_lambda)
    assert Calibration.of(config) == fit_calibration(*fused.t2i.scored_pool(), "val")
    assert Calibration.of(config) != fit_calibration(*fused.i2t.scored_pool(), "val")
    assert Calibration.of(CONFIG) is None


def test_a_subset_has_its_own_queries_and_the_whole_gallery():
    results = random_results(0)
    part = results.subset("red")
    assert {results.image_subsets[image] for image in part.t2i.query_image} == {"red"}
    assert len(part.t2i.query_image) == 8 * 5 and len(part.i2t.query_image) == 8
    assert len(part.t2i.item_image) == NUM_IMAGES
    np.testing.assert_array_equal(part.i2t.logits, results.i2t.logits[part.i2t.query_image])
    assert results.subset_names() == ["red"]


def test_rsum_is_the_sum_of_the_six_recalls_of_a_column():
    results = random_results(2).with_lambda(1.0)
    for part in (results.figures().to_json(), results.subset("red").figures().to_json()):
        for column in ("embedding", "reranked", "fused"):
            six = [part[direction][column][f"R@{k}"] for direction in ("t2i", "i2t") for k in (1, 5, 10)]
            assert part["rsum"][column] == pytest.approx(sum(six))


def test_pool_ceiling_is_what_a_perfect_reranker_reaches():
    part = random_results(3).t2i
    perfect = replace(part, logits=part.hits("embedding")[:, :K].astype(np.float32))
    assert perfect.figures().to_json()["reranked"]["R@1"] == part.figures().to_json()["pool_ceiling"]


def with_scores(results: Results, logits: str, similarities: str) -> Results:
    """Scores that are `right` (1 for right answers, else 0) or `wrong` (the opposite), each below 1 in size."""

    def changed(part: DirectionResults) -> DirectionResults:
        right = part.hits("embedding").astype(np.float32)
        score = {"right": right, "wrong": -right}
        return replace(part, logits=score[logits][:, :K], similarities=score[similarities])

    return replace(results, t2i=changed(results.t2i), i2t=changed(results.i2t))


def test_lambda_is_zero_where_the_similarity_misleads_and_above_one_where_the_logit_does():
    assert choose_lambda(with_scores(random_results(0), logits="right", similarities="wrong")) == 0.0
    assert choose_lambda(with_scores(random_results(0), logits="wrong", similarities="right")) == 2.0


def test_of_equally_good_lambdas_the_smallest_is_chosen():
    everywhere_right = with_scores(random_results(0), logits="right", similarities="right")
    assert choose_lambda(everywhere_right, grid=(5.0, 0.5, 1.0)) == 0.5


def test_chosen_lambda_is_the_best_of_the_grid():
    results = random_results(7)

    def mean_recall(value: float) -> float:
        fused = results.with_lambda(value)
        return sum(recall_at_k(part.hits("fused"), 1) for part in (fused.t2i, fused.i2t)) / 2

    assert mean_recall(choose_lambda(results)) == max(mean_recall(value) for value in LAMBDA_GRID)
