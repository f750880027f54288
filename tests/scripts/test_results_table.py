"""Tables from results.json files: seeds averaged, older files readable, and the paper's layout with ours beside it."""

from __future__ import annotations

import statistics

import pytest

from models.errors import UserError
from scripts.results_table import read_results, table
from tests.processes import ROOT, run_script

SCRIPT = "scripts/results_table.py"
SEEDS = sorted((ROOT / "benchmarks" / "demo").glob("seed*.json"))


def cells(text: str) -> list[list[str]]:
    """The cells of a Markdown table's rows."""
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line[:1] == "|"]


def test_seeds_are_averaged_and_the_protocol_is_named():
    seeds = [read_results(path) for path in SEEDS]
    text = table(seeds, with_subsets=True)
    recalls = [seed["t2i"]["fused"]["R@1"] for seed in seeds]
    fused = next(row for row in cells(text) if row[:2] == ["text to image", "EDJE, logit + λ × cosine"])
    assert fused[2] == f"{statistics.mean(recalls):.1f} ± {statistics.stdev(recalls):.1f}"
    assert fused[5] == "–"  # these files were written before median ranks were
    assert "500 images, 2,500 captions" in text and "k = 10" in text and "3 seeds" in text
    assert "match logit alone" in text and "λ = 50" in text and "*three objects*, image to text" in text


@pytest.mark.parametrize("key, value", [("k", 20), ("folds", 5), ("split", "val")])
def test_results_of_different_protocols_are_not_averaged(key, value):
    first = read_results(SEEDS[0])
    with pytest.raises(UserError, match=f"results differ in {key}"):
        table([first, {**first, key: value}], with_subsets=False)


def test_another_json_file_is_refused_in_one_line(tmp_path):
    (tmp_path / "other.json").write_text('{"t2i": 3}')
    ended = run_script(SCRIPT, tmp_path / "other.json")
    assert ended.returncode == 2 and "Traceback" not in ended.stderr
    assert "other.json: not a results.json" in ended.stderr
