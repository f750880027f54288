"""MTEB evaluates EDJE: its own runner over tasks in memory, compared with our evaluation of the same model."""

from __future__ import annotations

import socket
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import mteb
import numpy as np
import pytest
import torch
from datasets import Dataset
from mteb.abstasks.retrieval import AbsTaskRetrieval
from mteb.abstasks.retrieval_dataset_loaders import RetrievalSplitData
from mteb.abstasks.task_metadata import TaskMetadata
from mteb.cache import ResultCache
from mteb.models.models_protocols import CrossEncoderProtocol, EncoderProtocol, SearchProtocol
from PIL import Image

from data.caption_datasets import CaptionDataset, load_annotations
from evaluation.metrics import recall_at_k, right_answers
from evaluation.results import DirectionResults
from evaluation.retrieval import evaluate
from models.distributed import DistributedContext
from models.edje import EDJE
from models.errors import UserError
from models.integrations.mteb import EDJESearch
from models.reranker import Reranker
from models.stores.token_store import TokenStore
from models.vision.backbones import Backbone

ROOT = Path(__file__).parents[2]
POOL = 3


def scenes_task(dataset: CaptionDataset, category: str) -> AbsTaskRetrieval:
    """A data set as a task of MTEB: images under their own ids, captions c0, c1, ..."""
    captions = [f"c{number}" for number in range(len(dataset.captions))]
    pictures = [dataset.open_image(number) for number in range(len(dataset))]
    images = Dataset.from_dict({"id": list(dataset.image_ids), "image": pictures})
    texts = Dataset.from_dict({"id": captions, "text": list(dataset.captions)})
    queries, corpus = (texts, images) if category == "t2i" else (images, texts)
    relevant: dict[str, dict[str, int]] = {}
    for caption, number in zip(captions, dataset.caption_image, strict=True):
        pair = caption, dataset.image_ids[number]
        query, document = pair if category == "t2i" else reversed(pair)
        relevant.setdefault(query, {})[document] = 1

    class Scenes(AbsTaskRetrieval):
        metadata = TaskMetadata(
            name=f"Scenes{category}",
            description="Rendered scenes and their captions.",
            dataset={"path": "memory", "revision": "1"},
            type="Any2AnyRetrieval",
            category=category,
            modalities=["text", "image"],
            eval_langs=["eng-Latn"],
            main_score="recall_at_1",
        )

        def load_data(self, num_proc: int | None = None, **kwargs: object) -> None:
            split = RetrievalSplitData(corpus=corpus, queries=queries, relevant_docs=relevant, top_ranked=None)
            self.dataset, self.data_loaded = {"default": {"test": split}}, True

    return Scenes()


@dataclass
class Case:
    model: EDJE
    backbone: Backbone
    dataset: CaptionDataset

    def plug(self, stores: Path, **options) -> EDJESearch:
        reranker = Reranker(self.model, self.backbone, torch.float32)
        return EDJESearch(reranker, stores, "edje/tiny", "1", **{"pool": POOL} | options)

    def run(self, plug: EDJESearch, category: str, cache: ResultCache | None = None) -> dict[str, float]:
        """MTEB's own figures."""
        result = mteb.evaluate(plug, scenes_task(self.dataset, category), cache=cache, show_progress_bar=False)
        return result.task_results[0].scores["test"][0]

    def evaluated(self, stores: Path, category: str) -> DirectionResults:
        """Our evaluation, from the tokens that the plug stored."""
        store, alone = only_store(stores), DistributedContext()
        results = evaluate(self.model, self.backbone, self.dataset, alone, k=POOL, store=store, dtype=torch.float32)
        return results.t2i if category == "t2i" else results.i2t


@pytest.fixture(autouse=True)
def offline(monkeypatch) -> None:
    """Neither MTEB nor the plug asks anything of the network."""

    def refuse(*arguments: object) -> None:
        raise AssertionError("a connection was opened")

    monkeypatch.setattr(socket.socket, "connect", refuse)


@pytest.fixture(scope="module")
def case(scenes: Path, annotations: Path) -> Case:
    """Weights that know scenes: of random ones every order is equally good."""
    model = EDJE.from_pretrained(ROOT / "configs" / "pretrained" / "scenes")
    backbone = Backbone.load(model.config.backbone, precision="float32")
    return Case(model, backbone, load_annotations(annotations, scenes, "test"))


@pytest.mark.parametrize("score", [None, "match"])
@pytest.mark.parametrize("category", ["t2i", "i2t"])
def test_mteb_reports_the_recall_of_our_own_evaluation(case, tmp_path, category, score):
    figures = case.run(case.plug(tmp_path, score=score), category)
    found = case.evaluated(tmp_path, category)

    def hits(column: str) -> np.ndarray:
        return right_answers(found.rankings(column), found.query_image, found.item_image)[:, :10]

    ours = hits("fused" if score is None else "reranked")
    for k in (1, 3, 5, 10):
        # Any caption of an image is right, which MTEB calls a hit; where one image is right, its recall is the same.
        assert figures[f"hit_rate_at_{k}"] == pytest.approx(recall_at_k(ours, k) / 100, abs=1e-5)
        assert category == "i2t" or figures[f"recall_at_{k}"] == figures[f"hit_rate_at_{k}"]
    assert figures["mrr_at_10"] == pytest.approx(reciprocal_rank(ours), abs=1e-5)
    assert figures["mrr_at_10"] != pytest.approx(reciprocal_rank(hits("embedding")), abs=1e-3)


def reciprocal_rank(hits: np.ndarray) -> float:
    return float(np.where(hits.any(1), 1 / (hits.argmax(1) + 1), 0).mean())


def test_results_of_another_pool_or_score_are_kept_apart(case, tmp_path):
    cache = ResultCache(tmp_path / "results")
    runs = [{"pool": 1}, {"pool": POOL}, {"pool": POOL, "score": "match"}]
    kept = [case.run(case.plug(tmp_path / "stores", **options), "t2i", cache) for options in runs]
    assert len({figures["mrr_at_10"] for figures in kept}) == 3
    again = case.run(case.plug(tmp_path / "stores", **runs[1]), "t2i", cache)
    assert again["mrr_at_10"] == pytest.approx(kept[1]["mrr_at_10"], abs=1e-5)
    assert len(list((tmp_path / "results").rglob("Scenest2i.json"))) == 3


def test_a_checkpoint_is_told_from_others_by_all_of_its_weights(case, tmp_path):
    case.model.save_pretrained(tmp_path / "one")
    other = EDJE.from_pretrained(tmp_path / "one")
    with torch.no_grad():
        other.match_head.out.bias += 1
    other.save_pretrained(tmp_path / "other")
    metas = [
        EDJESearch.from_pretrained(tmp_path / name, tmp_path / "stores", device="cpu", dtype="float32").mteb_model_meta
        for name in ("one", "other")
    ]
    assert [meta.name for meta in metas] == ["edje/one", "edje/other"]
    assert metas[0].revision != metas[1].revision


def test_mteb_takes_it_for_a_search_and_for_nothing_else(case, tmp_path):
    plug = case.plug(tmp_path)
    assert isinstance(plug, SearchProtocol)
    assert not isinstance(plug, EncoderProtocol | CrossEncoderProtocol)


def parts(category: str = "t2i", **changed: object) -> dict[str, object]:
    """What MTEB passes to index() and to search()."""
    task = SimpleNamespace(name="Parts", revision="1", category=category)
    options = {"task_metadata": task, "hf_split": "test", "hf_subset": "default", "num_proc": None}
    return options | {"encode_kwargs": {"show_progress_bar": False, "batch_size": 1}} | changed


def pictures(case: Case) -> Dataset:
    ids = [f"i{number}" for number in range(len(case.dataset))]
    return Dataset.from_dict({"id": ids, "image": [case.dataset.open_image(number) for number in range(len(ids))]})


def searched(case: Case, plug: EDJESearch, images: Dataset, **changed: object) -> dict[str, float]:
    """One query's documents in the order of MTEB's metrics: by score, then by id, both falling."""
    plug.index(images, **parts())
    queries = Dataset.from_dict({"id": ["q"], "text": [case.dataset.captions[0]]})
    found = plug.search(queries, **parts(top_k=100, **changed))["q"]
    return dict(sorted(found.items(), key=lambda item: (item[1], item[0]), reverse=True))


def only_store(folder: Path) -> TokenStore:
    [manifest] = folder.rglob("manifest.json")
    return TokenStore.open(manifest.parent)


def test_the_pool_is_reranked_and_the_rest_follows_in_the_embeddings_order(case, tmp_path):
    plug = case.plug(tmp_path, pool=5)
    found = searched(case, plug, pictures(case))
    store, query = only_store(tmp_path), case.dataset.captions[0]
    cosines = store.gather_embeddings(store.ids) @ case.backbone.encode_texts([query])[0]
    order = [store.ids[row] for row in cosines.argsort(descending=True)]
    hits = plug.reranker.rank(query, order[:5], store=store)
    assert list(found) == [order[hit["corpus_id"]] for hit in hits] + order[5:]
    assert list(found)[:5] != order[:5]
    assert list(found.values())[:5] == pytest.approx([hit["score"] for hit in hits], abs=1e-4)


def test_images_are_encoded_once_for_all_runs(case, tmp_path, monkeypatch):
    found = searched(case, case.plug(tmp_path), pictures(case))
    monkeypatch.setattr(case.backbone, "encode_images", lambda pixels: pytest.fail("an image was encoded again"))
    assert searched(case, case.plug(tmp_path), pictures(case)) == found


def test_equal_images_keep_their_order_though_mteb_orders_ties_by_id(case, tmp_path):
    images = Dataset.from_dict({"id": ["b", "d", "a", "c"], "image": [Image.new("RGB", (32, 32), "red")] * 4})
    assert list(searched(case, case.plug(tmp_path, pool=3), images)) == ["b", "d", "a", "c"]


def test_the_candidates_of_a_reranking_task_are_ranked_and_no_others(case, tmp_path):
    plug, candidates = case.plug(tmp_path, pool=2), ["i7", "i1", "i4", "i0"]
    found = searched(case, plug, pictures(case), top_ranked={"q": candidates})
    hits = plug.reranker.rank(case.dataset.captions[0], candidates, store=only_store(tmp_path))
    assert list(found) == [candidates[hit["corpus_id"]] for hit in hits]
    assert list(found.values()) == pytest.approx([hit["score"] for hit in hits], abs=1e-4)


def test_each_mistake_is_told_in_one_line(case, tmp_path):
    images, plug = pictures(case).select([0]), case.plug(tmp_path / "stores")
    plug.index(images, **parts())

    def search(text: object = "a red ball", **changed: object) -> object:
        return plug.search(Dataset.from_dict({"id": ["q"], "text": [text]}), **parts(top_k=1, **changed))

    def index(images: Dataset, **changed: object) -> None:
        case.plug(tmp_path / "others").index(images, **parts(**changed))

    broken = {"id": ["i0"], "image": [{"bytes": b"no image", "path": None}]}
    mistakes: dict[str, Callable[[], object]] = {
        "category it2i; EDJE ranks": lambda: index(images, category="it2i"),
        "documents have no column 'text', only id, image": lambda: index(images, category="i2t"),
        "image 'i0' of the task is absent": lambda: index(Dataset.from_dict({"id": ["i0"], "image": [None]})),
        "image 'i0' of the task: image of 8 bytes": lambda: index(Dataset.from_dict(broken)),
        "before index": lambda: case.plug(tmp_path).search(images, **parts(top_k=1)),
        r"queries\[0\] is empty": lambda: search(" "),
        r"queries\[0\] is a NoneType": lambda: search(None),
        "query 'q' of the task has no candidates": lambda: search(top_ranked={}),
        "candidate 'i9' of query 'q' is no document": lambda: search(top_ranked={"q": ["i0", "i9"]}),
        "pool is 0": lambda: case.plug(tmp_path, pool=0),
        "score is 'cosine'": lambda: case.plug(tmp_path, score="cosine"),
        "name is 'mine'": lambda: EDJESearch(plug.reranker, tmp_path, "mine", "1"),
    }
    for expected, call in mistakes.items():
        with pytest.raises(UserError, match=expected) as raised:
            call()
        assert "\n" not in str(raised.value)
