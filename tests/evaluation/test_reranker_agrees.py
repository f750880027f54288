"""What an application gets is what the evaluation reports: the same rankings, recalls and probabilities, in float32."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch

from data.caption_datasets import CaptionDataset, load_annotations
from evaluation.calibration import Calibration
from evaluation.metrics import RECALL_DEPTHS, recall_at_k, right_answers
from evaluation.results import DirectionResults
from evaluation.retrieval import evaluate
from models.config import CompressionConfig, EDJEConfig, EncoderConfig
from models.distributed import DistributedContext
from models.edje import EDJE
from models.language.captions import CaptionTokenizer, build_vocabulary
from models.reranker import Reranker
from models.stores.indexing import precompute
from models.stores.token_store import TokenStore
from models.vision.backbones import Backbone

K = 10
ALONE = DistributedContext()


@dataclass
class Case:
    """One model, one store and what the evaluation found with them."""

    reranker: Reranker
    store: TokenStore
    dataset: CaptionDataset
    found: DirectionResults
    """Text to image."""

    def assert_recalls_are_the_fused_columns(self, rankings: list[list[int]]) -> None:
        """rankings: image numbers, best first, of every caption."""
        hits = right_answers(np.array(rankings), self.found.query_image, self.found.item_image)
        fused = self.found.figures().columns["fused"].metrics
        assert [recall_at_k(hits, k) for k in RECALL_DEPTHS] == [fused[f"R@{k}"] for k in RECALL_DEPTHS]
        np.testing.assert_array_equal(rankings, self.found.rankings("fused")[:, :K])


@pytest.fixture(scope="module", params=[0.0, 20.0], ids=["plain", "with the cosine in the logit"])
def case(request, tmp_path_factory, backbone: Backbone, annotations: Path, scenes: Path) -> Case:
    """Random weights; at this lambda logits and cosines matter alike."""
    folder = tmp_path_factory.mktemp("agrees")
    dataset = load_annotations(annotations, scenes, "train")
    build_vocabulary(dataset.captions, folder / "vocab.txt")
    tokenizer = CaptionTokenizer.from_pretrained(folder / "vocab.txt")
    sizes = {"hidden_size": 16, "num_layers": 2, "num_heads": 2, "intermediate_size": 32}
    config = EDJEConfig(
        backbone=backbone.config,
        dims=backbone.dims,
        backbone_fingerprint=backbone.fingerprint,
        adapter=CompressionConfig(num_tokens=4, mlp_width=16, num_heads=2),
        encoder=EncoderConfig(vocab_size=tokenizer.vocab_size, **sizes),
        residual_similarity=request.param,
        fusion_lambda=20.0,
        probability_scale=0.5,
        probability_offset=-3.0,
    )
    torch.manual_seed(0)
    model = EDJE(config, tokenizer).eval()
    for parameter in model.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.3)
    torch.nn.init.normal_(model.match_head.out.weight)
    reranker = Reranker(model, backbone, torch.float32)
    paths = [dataset.path(image) for image in range(len(dataset))]
    store = precompute(folder / "store", paths, dataset.image_ids, backbone, reranker.model, progress=False)
    results = evaluate(model, backbone, dataset, ALONE, k=K, store=store, dtype=torch.float32)
    return Case(reranker, store, dataset, results.t2i)


def test_search_ranks_as_the_evaluations_fused_column(case):
    numbers = {image: number for number, image in enumerate(case.dataset.image_ids)}
    lists = case.reranker.search(case.dataset.captions, case.store, top_k=K, pool=K)
    case.assert_recalls_are_the_fused_columns([[numbers[hit["id"]] for hit in hits] for hits in lists])


@pytest.mark.parametrize("known_similarities", [False, True])
def test_rank_of_one_query_at_a_time_ranks_as_the_evaluations_fused_column(case, known_similarities):
    rankings = []
    for query, caption in enumerate(case.dataset.captions):
        pool = case.found.candidates[query, :K]
        given = {"similarities": case.found.similarities[query, :K]} if known_similarities else {}
        hits = case.reranker.rank(caption, [case.dataset.image_ids[n] for n in pool], store=case.store, **given)
        rankings.append([int(pool[hit["corpus_id"]]) for hit in hits])
    case.assert_recalls_are_the_fused_columns(rankings)


def test_the_fused_column_differs_from_both_of_its_parts(case):
    """Else the tests above would pass on the wrong score."""
    fused = case.found.rankings("fused")[:, :K]
    for column in ("embedding", "reranked"):
        assert (fused != case.found.rankings(column)[:, :K]).any(axis=1).mean() > 0.1


def test_the_probability_of_a_hit_is_the_one_that_the_evaluation_judges(case):
    caption = case.dataset.captions[7]
    pool = [case.dataset.image_ids[number] for number in case.found.candidates[7, :K]]
    hits = case.reranker.rank(caption, pool, store=case.store)
    calibration = Calibration.of(case.reranker.model.config)
    assert calibration == case.found.calibration
    expected = calibration.probabilities(case.found.scores("fused")[7])
    for hit in hits:
        assert hit["probability"] == pytest.approx(expected[hit["corpus_id"]], abs=1e-5)
