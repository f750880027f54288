"""A figure in the prose of README and docs stands in a table of its page that is printed from a record, or follows from
a file of the repository by one division."""

import json
import re
from pathlib import Path

import pytest

from scripts.docs_tables import documents
from training.config import load_config

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
FIGURE = re.compile(r"(?<![\w.])\d+\.\d+(?![\w.]*\d)")
TABLE = re.compile(r"<!-- table: .+? -->\n(.*?)<!-- /table -->", re.DOTALL)
NOT_PROSE = re.compile(
    r"```.*?```|<!-- table: .+?<!-- /table -->|<!--.*?-->|`[^`\n]+`|\]\([^)]*\)|^\|.*?$", re.DOTALL | re.M
)
PAGES = [path for path in documents() if path.name != "config.md"]


def recorded(page: str) -> set[str]:
    """Figures of a page's printed tables."""
    return set(FIGURE.findall("".join(TABLE.findall(page))))


def known() -> set[str]:
    """Figures that need no table: the paper's, versions that pyproject.toml asks for, and two quotients."""
    peak = json.loads((RESULTS / "rerank_cpu.json").read_text())["rerank"]["matmul_peak_gflops"]
    weights = (ROOT / "configs" / "pretrained" / "scenes" / "model.safetensors").stat().st_size
    return {
        *FIGURE.findall((RESULTS / "paper.json").read_text()),
        *FIGURE.findall((ROOT / "pyproject.toml").read_text()),
        f"{peak['bfloat16'] / peak['float32']:.2f}",
        f"{weights / 1e6:.1f}",
    }


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
def test_a_figure_in_the_prose_is_in_a_record(path):
    page = path.read_text()
    assert sorted(set(FIGURE.findall(NOT_PROSE.sub("", page))) - recorded(page) - known()) == []


def test_the_demo_page_names_the_steps_of_its_pretraining_and_of_its_embedder():
    page = (ROOT / "docs" / "demo.md").read_text() + (ROOT / "docs" / "results.md").read_text()
    stages = sorted((ROOT / "configs" / "demo_pretraining").glob("*.yaml"))
    assert f"{sum(load_config(stage).training.steps for stage in stages):,} steps in all" in page
    record = json.loads((ROOT / "configs" / "embedders" / "scenes-vit" / "TRAINING.json").read_text())
    assert f"limit of {record['steps']:,} steps" in page.replace("\n", " ")
    assert f"step {record['best_step']:,}" in page
