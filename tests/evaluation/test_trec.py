"""Files that other programs read: read back by plain code that sorts by score, they give our rankings and recalls."""

from __future__ import annotations

import random
from collections import defaultdict
from pathlib import Path
from urllib.parse import unquote

import numpy as np
import pytest

from data.caption_datasets import CaptionDataset
from evaluation.metrics import recall_at_k
from evaluation.output import evaluation_record, write_results
from evaluation.results import DirectionResults, Results

IMAGES = ["a b.jpg", "val/100%.jpg", "x#0", "x", "é\u00a0ü\t.png", "six.jpg"]
NUM_CAPTIONS = [2, 1, 3, 1, 5, 2]


def direction(seed: int, query_image: np.ndarray, item_image: np.ndarray) -> DirectionResults:
    """Everything is kept, a pool of 4 is reranked, and most scores tie."""
    rng = np.random.default_rng(seed)
    candidates = np.argsort(rng.random((len(query_image), len(item_image))), axis=1)
    return DirectionResults(
        query_image=query_image,
        item_image=item_image,
        candidates=candidates,
        similarities=np.zeros(candidates.shape, np.float32),
        logits=rng.integers(0, 2, (len(query_image), 4)).astype(np.float32),
        first_right=(item_image[candidates] == query_image[:, None]).argmax(axis=1),
        fusion_lambda=1.0,
    )


@pytest.fixture
def results() -> Results:
    images, caption_image = np.arange(len(IMAGES)), np.repeat(np.arange(len(IMAGES)), NUM_CAPTIONS)
    return Results(
        t2i=direction(0, caption_image, images),
        i2t=direction(1, images, caption_image),
        image_subsets=[None] * len(IMAGES),
        seconds={"backbone": 0.0, "compress": 0.0, "rerank": 1.0},
        precision="float32",
    )


@pytest.fixture
def dataset(results) -> CaptionDataset:
    caption_image = results.i2t.item_image
    captions = [f"caption {i}" for i in range(len(caption_image))]
    return CaptionDataset(Path("images"), IMAGES, captions, caption_image, [None] * len(IMAGES))


def write(out: Path, results: Results, dataset: CaptionDataset) -> None:
    write_results(out, results, dataset, evaluation_record(results, "runs/x", "x.json", "test"))


def read_run(path: Path) -> dict[str, list[str]]:
    """Candidates of each query by falling score; of equal ones in random order, so a tie in the file would show."""
    lines = [line.split() for line in path.read_text().splitlines()]
    assert all(len(line) == 6 for line in lines)
    random.Random(0).shuffle(lines)
    found = defaultdict(list)
    for query, _, item, _, _, _ in sorted(lines, key=lambda line: -float(line[4])):
        found[query].append(item)
    return found


def read_qrels(path: Path) -> dict[str, set[str]]:
    right = defaultdict(set)
    for line in path.read_text().splitlines():
        query, _, item, relevant = line.split()
        assert relevant == "1"
        right[query].add(item)
    return right


@pytest.mark.parametrize("way", ["t2i", "i2t"])
@pytest.mark.parametrize("column", ["embedding", "reranked", "fused"])
def test_files_read_back_give_our_order_and_our_recall(results, dataset, tmp_path, way, column):
    write(tmp_path, results, dataset)
    run, right = read_run(tmp_path / f"run.{way}.{column}.trec"), read_qrels(tmp_path / f"qrels.{way}.trec")
    part = getattr(results, way)
    captions = [f"{image}#{n}" for image, count in zip(IMAGES, NUM_CAPTIONS, strict=True) for n in range(count)]
    queries, items = (captions, IMAGES) if way == "t2i" else (IMAGES, captions)

    def plain(name: str) -> str:
        """The id as it was: the number behind the last # is ours, everything else is encoded."""
        image, mark, number = name.partition("#")
        return unquote(image) + mark + number

    expected = [[items[item] for item in row] for row in part.rankings(column)[:, :10]]
    assert {plain(query): [plain(item) for item in found] for query, found in run.items()} == dict(
        zip(queries, expected, strict=True)
    )
    for k in (1, 5, 10):
        share = np.mean([bool(right[query] & set(found[:k])) for query, found in run.items()])
        assert 100 * share == pytest.approx(recall_at_k(part.hits(column), k))
    assert sum(map(len, right.values())) == sum(NUM_CAPTIONS)


def test_a_fused_run_of_an_older_evaluation_does_not_stay(results, dataset, tmp_path):
    write(tmp_path, results, dataset)
    assert (tmp_path / "run.i2t.fused.trec").exists()
    write(tmp_path, results.with_lambda(None), dataset)
    assert not list(tmp_path.glob("run.*.fused.trec")) and len(list(tmp_path.glob("*.trec"))) == 6
