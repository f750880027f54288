"""A new metric is one entry of METRICS: JSON, Markdown, the report and the reader of results.json follow."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from data.caption_datasets import CaptionDataset
from evaluation.figures import read_results
from evaluation.metrics import METRICS, Metric
from evaluation.output import evaluation_record, write_results
from evaluation.report.page import write_report
from evaluation.results import DirectionResults, Results
from models.errors import UserError
from scripts.results_table import table

RECIPROCAL_RANK = Metric(
    name="mrr",
    title="mean reciprocal rank",
    short="MRR",
    compute=lambda queries: 100.0 * float((1.0 / (queries.first_right + 1)).mean()),
    form=".2f",
)


def direction() -> DirectionResults:
    """Three queries with three candidates, of which the embedding ranks the right one 1st, 2nd, 3rd."""
    images = np.arange(3)
    candidates = np.array([[0, 1, 2], [0, 1, 2], [0, 1, 2]])
    similarities = np.array([[3.0, 2.0, 1.0]] * 3, np.float32)
    logits = np.array([[1.0, 0.0], [0.0, 1.0], [0.0, 1.0]], np.float32)
    return DirectionResults(images, images, candidates, similarities, logits, np.array([0, 1, 2]))


@pytest.fixture
def results() -> Results:
    seconds = {"backbone": 0.0, "compress": 0.0, "rerank": 1.0}
    return Results(direction(), direction(), [None] * 3, seconds=seconds, precision="float32")


def write_evaluation(out: Path, results: Results) -> tuple[dict, str, str]:
    """results.json, results.md and report.html."""
    dataset = CaptionDataset(out, ["a.png", "b.png", "c.png"], ["a", "b", "c"], np.arange(3), [None] * 3)
    record = evaluation_record(results, "runs/x", "x.json", "test")
    write_results(out, results, dataset, record)
    page = write_report(out, record, results, dataset).read_text()
    return json.loads((out / "results.json").read_text()), (out / "results.md").read_text(), page


def test_a_metric_added_in_one_place_is_in_json_markdown_report_and_reader(tmp_path, results):
    older = tmp_path / "older"
    write_evaluation(older, results)
    METRICS.append(RECIPROCAL_RANK)
    try:
        document, text, page = write_evaluation(tmp_path / "newer", results)
        expected = {"embedding": 100 * (1 + 1 / 2 + 1 / 3) / 3, "reranked": 100 * (1 + 1 + 1 / 3) / 3}
        for column, value in expected.items():
            assert document["t2i"][column]["mrr"] == pytest.approx(value)
            assert f"| {value:.1f} " in text and f">{value:.2f}</td>" in page
        assert "mean reciprocal rank" in text and ">MRR</th>" in page
        records = [read_results(tmp_path / name / "results.json") for name in ("newer", "older")]
        assert records[0].figures.t2i.columns["reranked"].metrics["mrr"] == pytest.approx(expected["reranked"])
        assert "77.8 ± 0.0" in table([records[0]] * 2, with_subsets=False)
        with_older = table(records, with_subsets=False).splitlines()[-1]
        assert [cell.strip() for cell in with_older.split("|")][7] == "–"
        (tmp_path / "broken.json").write_text(json.dumps(document).replace('"mrr": ', '"mrr": "high", "x": '))
        with pytest.raises(UserError, match="t2i.embedding.mrr is 'high'; expected a number"):
            read_results(tmp_path / "broken.json")
    finally:
        METRICS.remove(RECIPROCAL_RANK)
