"""COCO's extended ground truth: our figures are the package's own on the same rankings, found by COCO's numbers."""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from eccv_caption import Metrics

from data.caption_datasets import CaptionDataset, load_annotations
from evaluation import eccv
from evaluation.eccv import DEPTH, CocoIds, may_be_coco_test, read_coco_ids, with_extended_figures
from evaluation.evaluate_retrieval import Source, find_coco_ids
from evaluation.figures import EvaluationRecord
from evaluation.output import evaluation_record
from evaluation.results import DirectionResults, Results
from evaluation.tables import markdown_table
from models.distributed import DistributedContext
from models.errors import UserError


@pytest.fixture(scope="module")
def truth() -> Metrics:
    return Metrics()


@pytest.fixture(scope="module")
def annotations(truth, tmp_path_factory) -> Path:
    """Karpathy's layout with COCO's numbers: the 5,000 images shuffled, ten of them with a sixth caption that the
    package does not know as COCO's; two of these are right by its extended ground truth."""
    rng = np.random.default_rng(0)
    images = rng.permutation(list(truth.coco_gts["i2t"])).tolist()
    sixth = dict(zip(images[:10], [144675, 467259, *range(10**7, 10**7 + 8)], strict=True))
    records = [
        {
            "filename": f"{image}.jpg",
            "split": "test",
            "cocoid": image,
            "sentences": [
                {"raw": f"caption {number}", "sentid": number}
                for number in [*truth.coco_gts["i2t"][image], *([sixth[image]] if image in sixth else [])]
            ],
        }
        for image in images
    ]
    records.append({"filename": "x.jpg", "split": "val", "cocoid": 1, "sentences": [{"raw": "x", "sentid": 1}]})
    path = tmp_path_factory.mktemp("coco") / "dataset_coco.json"
    path.write_text(json.dumps({"images": records}))
    return path


@pytest.fixture(scope="module")
def dataset(annotations) -> CaptionDataset:
    return load_annotations(annotations, "images", "test")


@pytest.fixture(scope="module")
def ids(annotations, dataset) -> CocoIds:
    return read_coco_ids(annotations, dataset)


def direction(seed: int, query_image: np.ndarray, item_image: np.ndarray) -> DirectionResults:
    """Random candidates, among them an own one for most queries; a pool of 10 with random logits."""
    rng = np.random.default_rng(seed)
    start = rng.integers(0, len(item_image), len(query_image))
    steps = rng.permutation(len(item_image) - 1)[: DEPTH - 1] + 1
    candidates = (start[:, None] + np.concatenate([[0], steps])) % len(item_image)
    own = np.searchsorted(item_image, query_image)
    put = ~(candidates == own[:, None]).any(axis=1) & (rng.random(len(own)) < 0.8)
    candidates[put, rng.integers(0, 15, len(own))[put]] = own[put]
    return DirectionResults(
        query_image=query_image,
        item_image=item_image,
        candidates=candidates,
        similarities=np.tile(np.linspace(1, 0, DEPTH, dtype=np.float32), (len(own), 1)),
        logits=rng.normal(size=(len(own), 10)).astype(np.float32),
        first_right=np.full(len(own), 400),
    )


@pytest.fixture(scope="module")
def results(dataset) -> Results:
    images = np.arange(len(dataset))
    return Results(
        t2i=direction(1, dataset.caption_image, images),
        i2t=direction(2, images, dataset.caption_image),
        image_subsets=dataset.subsets,
        seconds={"backbone": 0.0, "compress": 0.0, "rerank": 1.0},
        precision="float32",
    )


def figures(results: Results, ids: CocoIds) -> EvaluationRecord:
    return with_extended_figures(evaluation_record(results, "runs/x", "coco", "test"), results, ids)


def test_figures_are_the_packages_own_on_the_same_rankings(truth, dataset, ids, results):
    record = figures(results, ids)
    summary = record.to_json()
    known = set(truth.coco_ids.tolist())
    for column in ("embedding", "reranked"):
        t2i, i2t = {}, {}
        for query, row in enumerate(results.t2i.rankings(column)):
            t2i[int(ids.captions[query])] = [int(ids.images[item]) for item in row]
        for query, row in enumerate(results.i2t.rankings(column)):
            i2t[int(ids.images[query])] = [int(ids.captions[item]) for item in row if int(ids.captions[item]) in known]
        names = {"eccv_map_at_r": "mAP@R", "eccv_rprecision": "R-Precision", "eccv_r1": "R@1", "coco_5k_r1": "COCO R@1"}
        theirs = truth.compute_all_metrics(i2t, t2i, target_metrics=list(names), verbose=False)
        for name, ours in names.items():
            for way in ("t2i", "i2t"):
                assert summary[way][column]["eccv"][ours] == pytest.approx(100 * theirs[name][way])
    # Ours of 25,010 captions and 5,000 images: the package leaves ten captions out.
    assert summary["t2i"]["reranked"]["eccv"]["COCO R@1"] == pytest.approx(summary["t2i"]["reranked"]["R@1"], abs=0.05)
    assert "| ECCV Caption" in markdown_table([record])


def test_one_right_answer_in_front_of_wrong_ones_gives_one_in_r(truth, ids, results):
    """By hand: of R right answers the first is found, so precision is 1 at the first place and nothing counts after."""
    captions, images = ({number: i for i, number in enumerate(of.tolist())} for of in (ids.captions, ids.images))
    known = set(truth.coco_ids.tolist()) | set(images)

    def first_right(part: DirectionResults, right: dict, queries: dict, items: dict) -> DirectionResults:
        candidates = part.candidates.copy()
        for query, answers in right.items():
            first = next(items[answer] for answer in answers if answer in known)
            wrong = np.setdiff1d(np.arange(2 * DEPTH), [items[answer] for answer in answers])
            candidates[queries[query]] = [first, *wrong[: DEPTH - 1]]
        return replace(part, candidates=candidates, logits=part.logits[:, :1])

    extended = truth.eccv_gts
    changed = replace(
        results,
        t2i=first_right(results.t2i, extended["t2i"], captions, images),
        i2t=first_right(results.i2t, extended["i2t"], images, captions),
    )
    summary = figures(changed, ids).to_json()
    for way in ("t2i", "i2t"):
        found = summary[way]["reranked"]["eccv"]
        expected = 100 * np.mean([1 / len(answers) for answers in extended[way].values()])
        assert found["R@1"] == 100.0
        assert found["mAP@R"] == pytest.approx(expected) and found["R-Precision"] == pytest.approx(expected)


def test_numbers_are_those_of_each_image_and_caption(truth, dataset, ids):
    for caption in (0, 7, 12_345, 25_009):
        assert dataset.captions[caption] == f"caption {ids.captions[caption]}"
        assert dataset.image_ids[dataset.caption_image[caption]] == f"{ids.images[dataset.caption_image[caption]]}.jpg"


def test_captions_that_changed_places_are_refused(annotations, dataset, tmp_path):
    document = json.loads(annotations.read_text())
    first, second = (image["sentences"][0] for image in document["images"][20:22])
    first["sentid"], second["sentid"] = second["sentid"], first["sentid"]
    (tmp_path / "swapped.json").write_text(json.dumps(document))
    with pytest.raises(UserError, match=r"swapped\.json: these 5,000 images .* not COCO's 5k test split"):
        read_coco_ids(tmp_path / "swapped.json", dataset)


def test_a_list_without_numbers_is_refused(dataset, tmp_path):
    rows = [{"image": image, "caption": ["a"]} for image in dataset.image_ids]
    (tmp_path / "coco_karpathy_test.json").write_text(json.dumps(rows))
    with pytest.raises(UserError, match=r"coco_karpathy_test\.json: names no COCO .*dataset_coco\.json"):
        read_coco_ids(tmp_path / "coco_karpathy_test.json", dataset)


def wanted(eccv: bool, folds: int = 1) -> argparse.Namespace:
    return argparse.Namespace(eccv=eccv, folds=folds, split="test")


def test_the_5k_test_split_gets_the_figures_unasked_and_other_data_does_not(annotations, dataset, scenes):
    source = Source("coco", annotations, annotations.parent)
    assert find_coco_ids(wanted(False), source, dataset, DistributedContext()) is not None
    assert find_coco_ids(wanted(False, folds=5), source, dataset, DistributedContext()) is None
    small = load_annotations(scenes / "dataset_scenes.json", scenes, "test")
    assert not may_be_coco_test(small)
    assert (
        find_coco_ids(wanted(False), Source("x", scenes / "dataset_scenes.json", scenes), small, DistributedContext())
        is None
    )
    with pytest.raises(UserError, match="drop --folds"):
        find_coco_ids(wanted(True, folds=5), source, dataset, DistributedContext())


@pytest.fixture
def without_package(monkeypatch):
    eccv._package.cache_clear()
    monkeypatch.setitem(sys.modules, "eccv_caption", None)  # what import finds where it is not installed
    yield
    eccv._package.cache_clear()


def test_without_the_package_its_pip_command_is_named(annotations, dataset, without_package, capsys):
    source = Source("coco", annotations, annotations.parent)
    with pytest.raises(UserError, match="pip install eccv-caption"):
        find_coco_ids(wanted(True), source, dataset, DistributedContext())
    assert find_coco_ids(wanted(False), source, dataset, DistributedContext()) is None
    assert "pip install eccv-caption" in capsys.readouterr().out
