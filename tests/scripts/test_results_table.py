"""Tables from results.json files: seeds averaged, older files readable, and the paper's layout with ours beside it."""

from __future__ import annotations

import json
import statistics
from dataclasses import replace
from pathlib import Path
from typing import Any

import open_clip
import pytest

from evaluation.figures import read_results
from models.errors import UserError
from scripts.results_table import PAPER, comparison, paper_tables, table
from tests.processes import ROOT, run_script

SCRIPT = "scripts/results_table.py"
SEEDS = sorted((ROOT / "benchmarks" / "results" / "demo").glob("seed*.json"))


def cells(text: str) -> list[list[str]]:
    """The cells of a Markdown table's rows."""
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line[:1] == "|"]


def test_files_of_before_folds_are_of_whole_splits(tmp_path):
    newer = read_results(SEEDS[1])
    with_folds = table([read_results(SEEDS[0]), newer], with_subsets=False)
    document = json.loads(SEEDS[0].read_text())
    del document["folds"]
    older = read_results(write(tmp_path, "older", document))
    assert table([older, newer], with_subsets=False) == with_folds
    with pytest.raises(UserError, match="results differ in folds"):
        table([older, replace(newer, folds=5)], with_subsets=False)


def test_seeds_are_averaged_and_the_protocol_is_named(tmp_path):
    seeds = [read_results(path) for path in SEEDS]
    text = table(seeds, with_subsets=True)
    recalls = [seed.figures.t2i.columns["fused"].metrics["R@1"] for seed in seeds]
    fused = next(row for row in cells(text) if row[:2] == ["text to image", "EDJE, logit + λ × cosine"])
    assert fused[2] == f"{statistics.mean(recalls):.1f} ± {statistics.stdev(recalls):.1f}"
    sums = [seed.figures.rsum["fused"] for seed in seeds]
    assert fused[6] == f"{statistics.mean(sums):.1f} ± {statistics.stdev(sums):.1f}"
    seeds[1] = replace(seeds[1], model=replace(seeds[1].model, residual_similarity=41.63))
    assert "match logit alone, which contains the first stage's cosine, learned weight 0, 41.6" in table(seeds, False)
    document = json.loads(SEEDS[1].read_text())
    del document["rsum"]  # as evaluations wrote before
    seeds[1] = read_results(write(tmp_path, "older", document))
    older = cells(table(seeds, with_subsets=True))
    assert next(row for row in older if row[:2] == fused[:2])[6] == "–"
    assert "500 images, 2,500 captions" in text and "k = 10" in text and "3 seeds" in text
    assert "match logit alone" in text and "λ = 50" in text and "*three objects*, image to text" in text


@pytest.mark.parametrize("key, value", [("k", 20), ("folds", 5), ("split", "val")])
def test_results_of_different_protocols_are_not_averaged(key, value):
    first = read_results(SEEDS[0])
    with pytest.raises(UserError, match=f"results differ in {key}"):
        table([first, replace(first, **{key: value})], with_subsets=False)


def test_experiments_stand_side_by_side():
    folder = SEEDS[0].parents[1]
    rows = cells(comparison([folder / "demo", folder / "emoji_frozen"]))
    seeds = [read_results(path).figures.i2t.columns["fused"].metrics["R@1"] for path in SEEDS]
    assert [row[:2] for row in rows[2:]] == [
        [n, d] for n in ("demo", "emoji_frozen") for d in ("text to image", "image to text")
    ]
    assert (
        rows[3][2:4] == ["500", "3"] and rows[3][6] == f"{statistics.mean(seeds):.1f} ± {statistics.stdev(seeds):.1f}"
    )


def test_experiments_are_runs_folders_of_seeds_or_records(tmp_path):
    write(tmp_path, "one", result(61.0))
    for seed, recall in enumerate((62.0, 64.0)):
        write(tmp_path, f"several/seed{seed}", result(recall))
    rows = cells(comparison([tmp_path / "one", tmp_path / "several"]))[2:]
    assert [row[0] for row in rows] == ["one", "one", "several", "several"]
    assert [row[3] for row in rows] == ["1", "1", "2", "2"] and rows[0][5] == "61.0" and rows[2][5] == "63.0 ± 1.4"


def test_a_record_is_written_as_it_was_read():
    for path in SEEDS:
        document = json.loads(path.read_text())
        assert read_results(path).to_json() == document
        assert list(read_results(path).to_json()) == list(document)


def test_another_json_file_is_refused_in_one_line(tmp_path):
    (tmp_path / "other.json").write_text('{"t2i": 3}')
    ended = run_script(SCRIPT, tmp_path / "other.json")
    assert ended.returncode == 2 and "Traceback" not in ended.stderr
    assert "other.json: not a results.json" in ended.stderr


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("i2t.embedding", None, "i2t.embedding is missing; expected an object"),
        ("images", None, "images is missing; expected a whole number"),
        ("model", "null", "model is None; expected an object"),
        ("model.backbone", 3, "model.backbone is 3; expected text"),
        ("t2i.reranked.R@5", '"93.2"', "t2i.reranked.R@5 is '93.2'; expected a number"),
        ("i2t.fused", None, "i2t.fused is missing; expected an object"),
        ("t2i.fused.lambda", "true", "t2i.fused.lambda is True; expected a number"),
        ("t2i.gain_R@1_ci95", "[1.0]", "t2i.gain_R@1_ci95 is [1.0]; expected two numbers"),
        ("rsum.fused", "[]", "rsum.fused is []; expected a number"),
        ("subsets.three objects.t2i.embedding.R@1", None, "subsets.three objects.t2i.embedding.R@1 is missing"),
        ("", "[" * 100_000, "recursion"),
    ],
)
def test_a_field_that_is_missing_or_of_another_kind_is_named_with_its_file(tmp_path, path, value, message):
    """value: JSON; None removes the field."""
    content = json.loads(SEEDS[0].read_text())
    *above, last = path.split(".")
    record = content
    for name in above:
        record = record[name]
    record[last] = "HERE"
    if value is None:
        del record[last]
    text = json.dumps(content).replace('"HERE"', str(value))
    (tmp_path / "results.json").write_text(text)
    with pytest.raises(UserError) as caught:
        read_results(tmp_path / "results.json")
    assert str(caught.value).startswith(f"{tmp_path / 'results.json'}: not a results.json")
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_one_file_is_not_two_seeds(tmp_path):
    (tmp_path / "link.json").symlink_to(SEEDS[0])
    for second in (SEEDS[0], tmp_path / "link.json"):
        ended = run_script(SCRIPT, SEEDS[0], second, SEEDS[1])
        assert ended.returncode == 2 and f"{SEEDS[0]} and {second}: one file" in ended.stderr


def test_seeds_of_other_subsets_are_not_put_into_one_table():
    first, second = (read_results(path) for path in SEEDS[:2])
    second = replace(second, subsets={})
    with pytest.raises(UserError, match="results differ in subsets"):
        table([first, second], with_subsets=True)
    assert "2 seeds" in table([first, second], with_subsets=False)


def test_a_figure_that_an_older_result_lacks_is_a_dash_in_the_papers_cells(tmp_path):
    older = result(86.0)
    del older["t2i"]["reranked"]["R@5"]
    write(tmp_path, "old", older)
    assert "86.0/–/93.0" in paper_tables(tmp_path)


def result(reranked: float, **changed: Any) -> dict[str, Any]:
    """results.json of a zero-shot evaluation on Flickr30k; `changed`: other entries, of the model or at the top."""
    found = json.loads(SEEDS[0].read_text())
    found |= {"dataset": "flickr30k", "images": 1000, "captions": 5000, "folds": 1}
    found["t2i"]["reranked"] = {"R@1": reranked, "R@5": 92.25, "R@10": 93.0}
    found["i2t"]["reranked"] |= {"R@1": 88.2}
    found["model"] = {
        "backbone": "ViT-L-16-SigLIP2-384",
        "pretrained": "webli",
        "adapter": "compression",
        "vision_tokens": 64,
        "bytes_per_image": 49_152,
        "joint_layers": 12,
        "joint_width": 384,
        "joint_parameters": 33_360_000,
        "residual_similarity": 0.0,
        "setting": "zero-shot",
    }
    for key, value in changed.items():
        (found["model"] if key in found["model"] else found)[key] = value
    return found


def write(root: Path, name: str, content: dict[str, Any]) -> Path:
    (root / name).mkdir(parents=True)
    file = root / name / "results.json"
    file.write_text(json.dumps(content))
    return file


def section(text: str, title: str) -> list[list[str]]:
    return cells(next(part for part in text.split("### ") if part.startswith(title)))


def test_ours_stand_below_the_papers_row_that_they_belong_to_and_elsewhere_are_dashes(tmp_path):
    write(tmp_path, "a/seed0", result(86.0))
    write(tmp_path, "a/seed1", result(87.0))
    write(tmp_path, "b", result(88.0, adapter="local", vision_tokens=576, bytes_per_image=442_368))
    write(tmp_path, "c", result(70.0, backbone="ViT-L-14-quickgelu", pretrained="dfn2b", setting="unknown"))
    text = paper_tables(tmp_path)
    rows = section(text, "Flickr30k zero-shot: embedding alone")
    start = next(i for i, row in enumerate(rows) if row[0] == "SigLIP 2 ViT-L/16 384")
    assert rows[start][1:4] == ["paper", "82.3/96.0/98.0", "87.8/97.3/98.0"]
    assert rows[start + 1][1] == "ours: a/seed0: ViT-L-16-SigLIP2-384 webli, 64 tokens, 12 layers of 384, k = 10"
    assert [row[3] for row in rows[start + 1 :]] == ["86.0/92.2/93.0", "87.0/92.2/93.0", "88.0/92.2/93.0"]
    dfn = next(i for i, row in enumerate(rows) if row[0].startswith("DFN"))
    assert rows[dfn + 1][1].endswith("training data unknown") and rows[dfn + 1][3].startswith("70.0/")
    clip = next(i for i, row in enumerate(rows) if row[0].startswith("CLIP ViT-B"))
    assert rows[clip + 1] == ["", "ours", "–", "–", "–", "–"]
    encoders = section(text, "Flickr30k zero-shot against other joint encoders")
    compressed = next(i for i, row in enumerate(encoders) if row[0] == "EDJE compressed-64")
    assert encoders[compressed + 1][2:] == ["86.0", "88.2", "49", "33", "–"]
    assert encoders[2][0] == "BLIP ViT-L" and encoders[3][0] == "BLIP-2 ViT-L"  # of others: no row of ours
    assert "belong to no row" not in text


def test_a_model_of_transformers_stands_in_the_row_of_its_weights(tmp_path):
    write(tmp_path, "a", result(86.0, backbone="google/siglip2-large-patch16-384", pretrained=""))
    rows = section(paper_tables(tmp_path), "Flickr30k zero-shot: embedding alone")
    start = next(i for i, row in enumerate(rows) if row[0] == "SigLIP 2 ViT-L/16 384")
    assert rows[start + 1][1].startswith("ours: a: google/siglip2-large-patch16-384, 64 tokens")


@pytest.mark.parametrize(
    "changed",
    [
        {"setting": "fine-tuned"},
        {"folds": 5},
        {"split": "val"},
        {"captions": 4999},
        {"dataset": "data/dataset_coco.json"},
        {"pretrained": "openai"},
        {"joint_layers": 6},
        {"residual_similarity": 50.0},
    ],
)
def test_a_result_of_another_protocol_or_model_is_in_no_row_and_named(tmp_path, changed):
    write(tmp_path, "other", result(86.0, **changed))
    text = paper_tables(tmp_path)
    assert "ours:" not in text and f"{tmp_path / 'other' / 'results.json'}: " in text.split("belong to no row:")[1]


def test_an_older_result_that_names_no_model_is_told(tmp_path):
    older = json.loads(SEEDS[0].read_text())
    del older["model"]
    write(tmp_path, "old", older)
    assert "results.json: names no model" in paper_tables(tmp_path)


def test_a_pool_of_k_leaves_the_papers_recall_at_k_to_a_tenth_but_for_one_cell():
    """Guards the figures against slips of typing: only CLIP L/14-336 I2T differs by more, in the paper itself."""
    first = json.loads(PAPER.read_text(encoding="utf-8"))["tables"][0]
    apart = []
    for row in first["rows"]:
        at_10 = [float(cell.split("/")[2]) for cell in row["paper"]]
        apart += [row["name"] for i in (0, 2) if abs(at_10[i] - at_10[i + 1]) > 0.1 + 1e-9]
    assert len(first["rows"]) == 7 and apart == ["CLIP ViT-L/14 336"]


def test_every_backbone_of_the_papers_tables_is_one_of_open_clip():
    known = set(open_clip.list_pretrained())
    named = [
        (wanted["backbone"], wanted["pretrained"])
        for part in json.loads(PAPER.read_text(encoding="utf-8"))["tables"]
        for wanted in (part["where"] | (row["ours"] or {}) for row in part["rows"])
        if "backbone" in wanted
    ]
    assert named and set(named) <= known


def test_every_row_has_a_cell_for_each_column():
    for part in json.loads(PAPER.read_text(encoding="utf-8"))["tables"]:
        assert all(len(row["paper"]) == len(part["columns"]) for row in part["rows"])


def test_the_command_prints_the_papers_tables_and_refuses_an_empty_folder(tmp_path):
    write(tmp_path / "runs", "x", result(86.0))
    ended = run_script(SCRIPT, "--paper", tmp_path / "runs")
    assert ended.returncode == 0 and "86.0/92.2/93.0" in ended.stdout
    (tmp_path / "empty").mkdir()
    for arguments, problem in (
        (("--paper", tmp_path / "empty"), "no results.json in it"),
        ((), "or --paper DIR"),
        (("--compare", tmp_path / "empty"), "no results.json, seed"),
    ):
        ended = run_script(SCRIPT, *arguments)
        assert ended.returncode == 2 and problem in ended.stderr and "Traceback" not in ended.stderr
