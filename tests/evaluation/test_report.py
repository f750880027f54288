"""The report: what it shows is what the scores say, and the page needs nothing but itself."""

from __future__ import annotations

import json
import math
import re
import xml.etree.ElementTree as ET
from dataclasses import replace
from html import unescape
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data.caption_datasets import CaptionDataset, load_annotations
from evaluation.calibration import Calibration
from evaluation.figures import read_results
from evaluation.output import evaluation_record, read_rankings, write_results
from evaluation.report.__main__ import main
from evaluation.report.charts import Line, LineChart, Panel, Point, scatter_charts
from evaluation.report.curves import LOSSES
from evaluation.report.examples import pick_examples
from evaluation.report.page import write_report
from evaluation.results import DirectionResults, Results
from models.errors import UserError

VOID = {"img", "meta", "br", "circle", "path"}


def random_direction(seed: int, query_image: np.ndarray, item_image: np.ndarray) -> DirectionResults:
    rng = np.random.default_rng(seed)
    similarities = rng.normal(size=(len(query_image), len(item_image))) + 1.5 * (query_image[:, None] == item_image)
    similarities = similarities.astype(np.float32)
    ranking = np.argsort(-similarities, axis=1)
    candidates = ranking[:, :10]
    first_right = (item_image[ranking] == query_image[:, None]).argmax(axis=1)
    logits = rng.normal(size=(len(query_image), 8)).astype(np.float32)
    similarities = np.take_along_axis(similarities, candidates, axis=1)
    fitted = {"fusion_lambda": 2.0, "calibration": Calibration(0.7, -2.0, "val")}
    return DirectionResults(query_image, item_image, candidates, similarities, logits, first_right, **fitted)


@pytest.fixture
def dataset(annotations: Path, scenes: Path) -> CaptionDataset:
    return load_annotations(annotations, scenes, "train")


@pytest.fixture
def results(dataset: CaptionDataset) -> Results:
    images = np.arange(len(dataset))
    return Results(
        t2i=random_direction(0, dataset.caption_image, images),
        i2t=random_direction(1, images, dataset.caption_image),
        image_subsets=dataset.subsets,
        seconds={"backbone": 1.0, "compress": 0.5, "rerank": 2.0},
        precision="float32",
    )


@pytest.fixture
def out(tmp_path: Path, results: Results, dataset: CaptionDataset) -> Path:
    """A directory as evaluate_retrieval.py leaves it."""
    record = evaluation_record(results, "runs/<b>/checkpoint", "data/dataset_scenes.json", "test")
    write_results(tmp_path, results, dataset, record)
    losses = dict.fromkeys(LOSSES, 1.0)
    metrics = [{"step": step, **losses, "itm": 2.0 / step, "val/t2i/fused/R@1": 10.0 * step} for step in range(1, 5)]
    (tmp_path / "metrics.jsonl").write_text("\n".join(map(json.dumps, metrics)) + '\n{"step": 5, "it')
    write_report(tmp_path, record, results, dataset, tmp_path / "metrics.jsonl")
    return tmp_path


class BalancedTags(HTMLParser):
    """Collects sources and checks that every tag is closed in order."""

    def __init__(self):
        super().__init__()
        self.open, self.sources = [], []

    def handle_starttag(self, tag, attributes):
        if tag not in VOID:
            self.open.append(tag)
        self.sources += [value for name, value in attributes if name in ("src", "href")]

    def handle_startendtag(self, tag, attributes):
        assert tag in VOID

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def test_the_page_is_well_formed_and_needs_no_network(out):
    page = (out / "report.html").read_text()
    parser = BalancedTags()
    parser.feed(page)
    assert not parser.open
    assert parser.sources and all(source.startswith("data:image/") for source in parser.sources)
    assert "<script" not in page and not re.search(r"url\(|@import|https?://", page)


def test_page_and_table_name_data_split_counts_pool_folds_and_scores(results, dataset, tmp_path):
    folded = replace(results, t2i=replace(results.t2i, folds=4), i2t=replace(results.i2t, folds=4))
    record = evaluation_record(folded, "runs/x", "data/scenes.json", "train")
    write_results(tmp_path, folded, dataset, record)
    write_report(tmp_path, record, folded, dataset)
    expected = (
        "data/scenes.json, train split: 48 images, 240 captions; the embedding's first k = 8 candidates of each query "
        "reranked; 4 folds of 12 images, each its own gallery, figures averaged; EDJE by the match logit alone, or "
        "fused: match logit + λ × cosine, λ = 2 from validation."
    )
    assert expected in (tmp_path / "results.md").read_text()
    assert expected in unescape((tmp_path / "report.html").read_text())


def test_the_page_shows_figures_by_the_extended_ground_truth_where_there_are(results, dataset, tmp_path):
    record = evaluation_record(results, "runs/x", "coco", "test")
    assert "mAP@R" not in write_report(tmp_path, record, results, dataset).read_text()
    document = record.to_json()
    for number, part in enumerate(document[way][column] for way in ("t2i", "i2t") for column in results.t2i.columns):
        part["eccv"] = {"mAP@R": 31.0 + number, "R-Precision": 41.0, "R@1": 51.0, "COCO R@1": 61.0}
    (tmp_path / "results.json").write_text(json.dumps(document))
    page = write_report(tmp_path, read_results(tmp_path / "results.json"), results, dataset).read_text()
    assert "<th>mAP@R</th>" in page and all(f"<td>{31.0 + number}</td>" in page for number in range(6))


def test_calibration_is_shown_as_it_was_recorded_with_a_plot_of_its_bins(out, results):
    page = unescape((out / "report.html").read_text())
    record = read_results(out / "results.json")
    assert record.figures == results.figures()
    for title, part in (("Text to image", record.figures.t2i), ("Image to text", record.figures.i2t)):
        assert f"<td>{part.calibration.brier_after:.3f}</td>" in page
        plot = page[page.index(f"{title}: reliability") :]
        assert f"after, ECE {part.calibration.ece_after:.3f}" in plot[: plot.index("<svg")]
        assert plot[: plot.index("</svg>")].count("<circle") > 10  # bins before and after, and the diagonal's ends
    assert "fitted on the text-to-image pools of split val" in page


def test_results_without_calibration_draw_a_page_without_it(results, dataset, tmp_path):
    plain = results.with_lambda(2.0)
    record = evaluation_record(plain, "runs/x", "data/scenes.json", "test")
    write_results(tmp_path, plain, dataset, record)
    page = write_report(tmp_path, read_results(tmp_path / "results.json"), plain, dataset).read_text()
    assert "reliability" not in page and read_results(tmp_path / "results.json").figures.t2i.calibration is None
    assert "calibration" not in json.loads((tmp_path / "results.json").read_text())["t2i"]


def test_the_page_shows_numbers_of_evaluation_record_and_escapes_names(out):
    page, summary = (out / "report.html").read_text(), json.loads((out / "results.json").read_text())
    for direction in ("t2i", "i2t"):
        for column in ("embedding", "reranked", "fused"):
            assert f">{summary[direction][column]['R@5']:.1f}</td>" in page
            assert f">{summary[direction][column]['median_rank']:g}</td>" in page
    assert all(f">{value:.1f}</td>" in page for value in summary["rsum"].values())
    assert "runs/&lt;b&gt;/checkpoint" in page
    assert "Validation, text to image" in page


@pytest.mark.parametrize("helped", [True, False])
@pytest.mark.parametrize("direction", ["t2i", "i2t"])
def test_examples_are_those_whose_right_answer_moved_furthest(results, direction, helped):
    part = getattr(results, direction)
    moves = []
    embedding, reranked = part.rankings("embedding"), part.rankings("reranked")
    for query, image in enumerate(part.query_image):
        first, last = (reranked, embedding) if helped else (embedding, reranked)
        ranks = [
            next((r for r, item in enumerate(x[query]) if part.item_image[item] == image), 99) for x in (first, last)
        ]
        if ranks[0] == 0 and 0 < ranks[1] < part.k:
            moves.append(ranks[1])
    chosen = pick_examples(part, "reranked", helped, count=5)
    far = [example.rank_before if helped else example.rank_after for example in chosen]
    assert far == sorted(far, reverse=True) and far[0] == max(moves)
    assert len({part.query_image[example.query] for example in chosen}) == len(chosen)
    for example in chosen:
        assert (example.rank_after if helped else example.rank_before) == 0
        first = example.after[0] if helped else example.before[0]
        assert first in example.right


def test_rankings_read_back_draw_the_same_report(out):
    before = (out / "report.html").read_bytes()
    (out / "report.html").unlink()
    main(["--results", str(out)])
    assert (out / "report.html").read_bytes() == before


def test_rankings_read_back_are_those_that_were_written(out, results, dataset):
    again, same_dataset = read_rankings(out / "rankings.npz")
    assert again.figures().to_json() == results.figures().to_json()
    assert same_dataset.captions == dataset.captions and same_dataset.path(3) == dataset.path(3)


def test_damaged_rankings_are_named(tmp_path):
    (tmp_path / "rankings.npz").write_bytes(b"PK\x03\x04 cut short")
    with pytest.raises(UserError, match=r"rankings\.npz"):
        main(["--results", str(tmp_path)])


def test_the_teaser_is_a_picture(out):
    main(["--results", str(out), "--teaser", str(out / "teaser.png")])
    with Image.open(out / "teaser.png") as teaser:
        assert teaser.size == (1200, 640)


def test_captions_and_file_names_are_text_on_the_page(results, dataset, tmp_path):
    evil = '"><script>alert(1)</script>'
    named = replace(dataset, image_ids=[f"{evil}{name}" for name in dataset.image_ids])
    shown = replace(named, captions=[f"{evil}{caption}" for caption in dataset.captions])
    for image, evil_name in zip(dataset.image_ids, shown.image_ids, strict=True):
        (tmp_path / evil_name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / evil_name).write_bytes((dataset.root / image).read_bytes())
    shown = replace(shown, root=tmp_path)
    record = replace(evaluation_record(results, "runs/x", f"data/{evil}.json", "test"), split=evil)
    page = write_report(tmp_path, record, results, shown).read_text()
    assert "<script" not in page and page.count("&lt;script&gt;alert(1)") > 10 and '<img src="data:image/' in page
    parser = BalancedTags()
    parser.feed(page)
    assert not parser.open


def test_a_chart_leaves_out_what_is_not_finite_and_an_empty_one_has_no_lines():
    assert LineChart("t", "x", "y", [Line("a", [1.0], [math.nan], "accent")]).lines == []
    chart = LineChart("t", "x", "y", [Line("a", [1, 2, 3], [1.0, math.nan, 2.0], "accent")]).svg()
    assert "nan" not in chart and chart.count("<circle") == 2


def test_a_chart_takes_its_colours_from_the_page_spans_its_values_and_has_nothing_that_charts_share():
    chart = LineChart("<t>", "steps & more", "%", [Line("a", [1, 40, 90], [38.2, 50.0, 64.8], "accent")]).svg()
    assert "var(--accent)" in chart and "var(--muted)" in chart and "#0000" not in chart
    assert not re.search(r'id="|href|url\(|xmlns|font-family', chart)
    texts = [text.text for text in ET.fromstring(chart).iter("text")]
    assert texts == ["1", "20", "40", "60", "80", "steps & more", "35", "40", "45", "50", "55", "60", "65"]
    assert 'aria-label="&lt;t&gt;"' in chart


def test_names_of_points_do_not_overlap_and_all_lies_inside():
    points = [Point(f"m{i}", 4096.0, 80.0 + i / 10, 0.5) for i in range(6)]
    points += [Point("long_name_before", 3500.0, 80.55, 0.0), Point("long_name", 16384.0, 90.0, 0.0)]
    file = scatter_charts([Panel("bytes", points)], "R@1", ("embedding", 71.0))
    assert file == scatter_charts([Panel("bytes", points)], "R@1", ("embedding", 71.0))
    svg = ET.fromstring(file)
    _, _, width, height = map(float, svg.get("viewBox").split())
    texts = [t for t in svg.iter("{http://www.w3.org/2000/svg}text") if t.text.startswith(("m", "long"))]
    assert len(texts) == 8
    boxes = []
    for text in texts:
        anchor = re.search(r"text-anchor: (\w+)", text.get("style"))
        length = 6.5 * len(text.text)  # pixels, about
        left = float(text.get("x")) - (length if anchor and anchor[1] == "end" else 0)
        boxes.append((left, left + length, float(text.get("y"))))
    for number, (left, right, line) in enumerate(boxes):
        assert 0 < left and right < width + 1 and 0 < line < height
        for other_left, other_right, other_line in boxes[:number]:
            assert left >= other_right or other_left >= right or abs(line - other_line) >= 12
