"""LanceDB reranks with EDJE: real tables and searches, compared with rank() on the same rows."""

import pickle
from dataclasses import dataclass

import lancedb
import numpy as np
import pyarrow as pa
import pytest
from lancedb.index import FTS
from lancedb.query import BooleanQuery, MatchQuery, Occur

from models import Reranker, TokenStore, UserError
from models.integrations.lancedb import EDJEReranker
from models.stores.indexing import precompute
from models.vision.backbones import Backbone
from tests.tiny_model import CAPTIONS, make_model, write_backbone, write_images

QUERY = CAPTIONS[0]


@dataclass
class World:
    """Nine images under 'a/' and 'b/', their store, and a table of them in a schema of somebody's own."""

    reranker: Reranker
    store: TokenStore
    table: lancedb.table.Table
    images: str

    def vector(self) -> np.ndarray:
        return self.reranker.backbone.encode_texts([QUERY])[0].numpy()

    def search(self, limit=9):
        return self.table.search(self.vector()).distance_type("cosine").limit(limit)

    def expected(self, files, query=QUERY, **options) -> list[tuple[str, float]]:
        """rank() of the files, none of LanceDB involved: (file, score), best first."""
        hits = self.reranker.rank(query, files, store=self.store, **options)
        return [(files[hit["corpus_id"]], hit["score"]) for hit in hits]

    def files(self, numbers) -> list[str]:
        return [name for number, name in enumerate(self.store.ids) if number in numbers]


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> World:
    root = tmp_path_factory.mktemp("lancedb")
    backbone = Backbone.load(write_backbone(root / "backbone"), precision="float32")
    make_model(backbone, root / "vocab.txt", fusion_lambda=5.0).save_pretrained(root / "checkpoint")
    names = write_images(root / "images", 9)
    reranker = Reranker.from_pretrained(root / "checkpoint", device="cpu", dtype="float32")
    store = reranker.index(root / "images", root / "store", progress=False)
    reranker.store = None  # what a reranker has that indexed nothing itself
    vectors = store.gather_embeddings(names).numpy()
    rows = {
        "file": names,
        "number": list(range(9)),
        "seen": [f"{'dogs' if i % 2 else 'a ball'} in photo {i}" for i in range(9)],
        "jpeg": [(root / "images" / name).read_bytes() for name in names],
        "vector": pa.FixedSizeListArray.from_arrays(pa.array(vectors.ravel()), vectors.shape[1]),
    }
    table = lancedb.connect(root / "lance").create_table("photos", pa.table(rows))
    table.create_index("seen", config=FTS())
    return World(reranker, store, table, str(root / "images"))


def assert_ranked(results: pa.Table, expected: list[tuple[str, float]], atol: float = 1e-5) -> None:
    assert results["file"].to_pylist() == [name for name, _ in expected]
    np.testing.assert_allclose(results["_relevance_score"], [score for _, score in expected], rtol=0, atol=atol)


@pytest.mark.parametrize("score", [None, "fused", "match"])
def test_a_vector_search_is_reranked_as_rank_does(world, score):
    files = [row["file"] for row in world.search(limit=6).to_list()]
    plug = EDJEReranker(world.reranker, "file", store=world.store, score=score)
    results = world.search(limit=6).rerank(plug, query_string=QUERY).to_arrow()
    assert_ranked(results, world.expected(files, score=score))
    assert results["file"].to_pylist() != files


def test_other_columns_stay_with_their_row_and_the_schema_grows_by_the_score_alone(world):
    plug = EDJEReranker(world.reranker, "file", store=world.store)
    results = world.search().rerank(plug, query_string=QUERY).to_arrow()
    own = world.table.to_arrow()
    assert results.schema == own.schema.append(pa.field("_relevance_score", pa.float32()))
    assert results.drop_columns("_relevance_score").sort_by("number").equals(own.sort_by("number"))


def test_all_scores_are_kept_on_request(world):
    plug = EDJEReranker(world.reranker, "file", store=world.store, return_score="all")
    distances = {row["file"]: row["_distance"] for row in world.search().to_list()}
    vector = world.search().rerank(plug, query_string=QUERY).to_list()
    assert {row["file"]: row["_distance"] for row in vector} == distances
    words = world.table.search("dogs", query_type="fts").rerank(plug).to_list()
    assert len(words) == 4 and all(row["_score"] > 0 for row in words)


def test_a_full_text_search_is_reranked_by_its_words(world):
    plug = EDJEReranker(world.reranker, "file", store=world.store)
    expected = world.expected(world.files(range(1, 9, 2)), "dogs")
    for query in ("dogs", MatchQuery("dogs", "seen")):
        assert_ranked(world.table.search(query, query_type="fts").rerank(plug).to_arrow(), expected)


@pytest.mark.parametrize("return_score", ["relevance", "all"])
def test_a_hybrid_search_scores_each_row_of_either_search_once(world, return_score):
    plug = EDJEReranker(world.reranker, "file", store=world.store, return_score=return_score, distance_type="cosine")
    search = world.table.search(query_type="hybrid").vector(world.vector()).text("dogs").distance_type("cosine")
    results = search.limit(5).rerank(plug).to_arrow()
    found = {*world.files(range(1, 9, 2)), *(row["file"] for row in world.search(limit=5).to_list())}
    assert len(found) > 5
    assert_ranked(results, world.expected(sorted(found), "dogs")[:5])
    assert ("_distance" in results.column_names) == (return_score == "all")


@pytest.mark.parametrize("distance_type", ["cosine", "l2", "dot"])
def test_cosines_of_the_search_are_reused_for_every_distance_of_lancedb(world, distance_type):
    expected = world.expected(world.store.ids)
    search = world.table.search(world.vector()).distance_type(distance_type).limit(9)
    reranker = pickle.loads(pickle.dumps(world.reranker))  # which remembers no query
    reranker.backbone.encode_texts = lambda captions: pytest.fail("the text tower ran")
    plug = EDJEReranker(reranker, "file", store=world.store, distance_type=distance_type)
    assert_ranked(search.rerank(plug, query_string=QUERY).to_arrow(), expected)


def test_a_column_may_hold_paths_or_encoded_images(world):
    expected = world.expected(world.store.ids)
    for column, root in (("file", world.images), ("jpeg", None)):
        plug = EDJEReranker(world.reranker, column, root=root)
        results = world.search().rerank(plug, query_string=QUERY).to_arrow()
        assert_ranked(results, expected, atol=0.02)  # the store rounds tokens to float16


def test_whole_numbers_name_ids_of_the_same_digits(world, tmp_path):
    images = [f"{world.images}/{name}" for name in world.store.ids]
    ids = [str(number) for number in range(9)]
    model, backbone = world.reranker.model, world.reranker.backbone
    store = precompute(tmp_path / "numbers", images, ids, backbone, model, progress=False)
    plug = EDJEReranker(world.reranker, "number", store=store)
    assert_ranked(world.search().rerank(plug, query_string=QUERY).to_arrow(), world.expected(world.store.ids))


def test_a_search_without_rows_gives_an_empty_table_with_a_score(world):
    plug = EDJEReranker(world.reranker, "file", store=world.store)
    results = world.search().where("number > 100").rerank(plug, query_string=QUERY).to_arrow()
    assert len(results) == 0 and results.schema.field("_relevance_score").type == pa.float32()
    assert len(world.table.search("zebra", query_type="fts").rerank(plug).to_arrow()) == 0


def test_several_vector_searches_are_reranked_together(world):
    plug = EDJEReranker(world.reranker, "file", store=world.store)
    parts = [world.search(limit=3).with_row_id(True).to_arrow(), world.search(limit=6).with_row_id(True).to_arrow()]
    results = plug.rerank_multivector(parts, QUERY, deduplicate=True)
    assert_ranked(results, world.expected([row["file"] for row in world.search(limit=6).to_list()]))


def test_each_mistake_is_told_in_one_line(world):
    def plug(column="file", store=world.store, **options):
        return EDJEReranker(world.reranker, column, store=store, **options)

    def rerank(plug, search=None):
        return (search or world.search()).rerank(plug, query_string=QUERY).to_arrow()

    boolean = world.table.search(BooleanQuery([(Occur.MUST, MatchQuery("dogs", "seen"))]), query_type="fts")
    for expected, call in {
        "no column 'id', only file, number, seen, jpeg, vector, _distance": lambda: rerank(plug("id")),
        "'vector' is a list in row 0": lambda: rerank(plug("vector")),
        "neither an id of .* nor an image file": lambda: rerank(plug("seen")),
        "without text; pass its words": lambda: plug().rerank_multivector([world.search().to_arrow()], None),
        "a BooleanQuery; pass its words": lambda: boolean.rerank(plug()).to_arrow(),
        "distance_type is 'hamming'; expected one of 'cosine', 'l2', 'dot'": lambda: plug(distance_type="hamming"),
        "store is a str; expected a loaded TokenStore": lambda: plug(store="photos.store"),
        "reranker is a str; expected a loaded Reranker": lambda: EDJEReranker("runs/demo", "file"),
        "return_score is 'some'": lambda: plug(return_score="some"),
        "no column '_distance'": lambda: plug(distance_type="l2").rerank_vector(QUERY, world.table.to_arrow()),
        "score is 'cosine'": lambda: rerank(plug(score="cosine")),
    }.items():
        with pytest.raises(UserError, match=expected) as raised:
            call()
        assert "\n" not in str(raised.value)


def test_an_empty_cell_is_named_by_its_row(world):
    results = world.search().to_arrow().slice(0, 2)
    results = results.set_column(0, "file", pa.array(["a/000.png", None]))
    with pytest.raises(UserError, match="column 'file' is empty in row 1"):
        EDJEReranker(world.reranker, "file", store=world.store).rerank_vector(QUERY, results)
