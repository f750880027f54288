"""The breakdown of errors by what separates scenes, on hand-made rankings."""

import json
from dataclasses import replace
from pathlib import Path
from subprocess import CompletedProcess

import numpy as np
import pytest

from data.caption_datasets import CaptionDataset
from evaluation.output import evaluation_record, write_results
from evaluation.results import DirectionResults, Results
from models.errors import UserError
from scripts.scene_errors import count_errors, difference, main
from tests.processes import run_script


def scene(family: int, *objects: tuple[str, str]) -> dict:
    things = [{"size": "large", "texture": "plain", "colour": c, "shape": s, "x": 0.5, "y": 0.5} for c, s in objects]
    return {"family": family, "layout": "row", "objects": things}


RED_BLUE = scene(0, ("red", "star"), ("blue", "moon"))
SWAPPED = scene(0, ("blue", "moon"), ("red", "star"))
REBOUND = scene(0, ("red", "moon"), ("blue", "star"))
STRANGER = scene(1, ("red", "star"), ("blue", "moon"))
CAPTION_IMAGE = np.array([0, 0, 1, 2, 3])
SCENES = {"a.png": RED_BLUE, "b.png": SWAPPED, "c.png": REBOUND, "d.png": STRANGER}


def rankings(logits: list[float]) -> DirectionResults:
    """One caption of a.png, the embedding's order a b c d; of the other four the own image is not in the pool."""
    return DirectionResults(
        query_image=CAPTION_IMAGE,
        item_image=np.arange(4),
        candidates=np.array([[0, 1, 2, 3], [1, 2, 3, 3], [0, 2, 3, 3], [0, 1, 3, 3], [0, 1, 2, 2]]),
        similarities=np.array([[0.9, 0.9, 0.5, 0.4]] + 4 * [[1, 1, 1, 1]], np.float32),
        logits=np.array([logits] + 4 * [[1, 1, 1, 1]], np.float32),
        first_right=np.array([0, 4, 4, 4, 4]),
    )


def test_siblings_differ_in_positions_or_in_binding():
    assert [difference(RED_BLUE, other) for other in (SWAPPED, REBOUND, STRANGER)] == [
        "positions",
        "binding of colour",
        "other family",
    ]
    larger = {"family": 0, "objects": [{**REBOUND["objects"][0], "size": "small"}, REBOUND["objects"][1]]}
    assert difference(RED_BLUE, larger) == "binding of several" and difference(REBOUND, larger) == "binding of size"


def test_a_tie_counts_as_wrong_and_pools_without_the_image_do_not_count():
    found = count_errors(rankings([2.0, 1.0, 3.0, 0.0]), list(SCENES.values()))
    assert found == {
        "positions": {"pairs": 1, "cosine": 100.0, "logit": 0.0},
        "binding of colour": {"pairs": 1, "cosine": 0.0, "logit": 100.0},
        "other family": {"pairs": 1, "cosine": 0.0, "logit": 0.0},
    }


def test_candidates_below_the_reranked_pool_do_not_count():
    deeper = rankings([2.0, 1.0, 3.0, 0.0])
    shallow = replace(deeper, logits=deeper.logits[:, :2])
    assert count_errors(shallow, list(SCENES.values())) == {"positions": {"pairs": 1, "cosine": 100.0, "logit": 0.0}}


def test_the_command_prints_a_table_writes_a_record_and_refuses_other_files_in_one_line(tmp_path, capsys):
    found = rankings([2.0, 1.0, 3.0, 0.0])
    dataset = CaptionDataset(tmp_path, sorted(SCENES), ["a star"] * 5, CAPTION_IMAGE, [None] * 4)
    reverse = replace(found.of_queries(np.arange(4)), query_image=np.arange(4), item_image=CAPTION_IMAGE)
    seconds = {"backbone": 0.0, "compress": 0.0, "rerank": 1.0}
    results = Results(t2i=found, i2t=reverse, image_subsets=dataset.subsets, seconds=seconds, precision="float32")
    write_results(tmp_path, results, dataset, evaluation_record(results, "runs/x", "scenes.json", "test"))
    (tmp_path / "cut.npz").write_bytes((tmp_path / "rankings.npz").read_bytes()[:200])
    images = [{"filepath": "", "filename": name, "scene": s} for name, s in SCENES.items()]
    (tmp_path / "scenes.json").write_text(json.dumps({"images": images}))
    (tmp_path / "few.json").write_text(json.dumps({"images": images[:2]}))
    (tmp_path / "plain.json").write_text(json.dumps({"images": [{"filename": "a.png"}]}))

    def run(first: str, second: str, *options: str | Path) -> CompletedProcess:
        return run_script("scripts/scene_errors.py", tmp_path / first, tmp_path / second, *options)

    good = run("rankings.npz", "scenes.json", "--out", tmp_path / "record.json")
    assert good.returncode == 0 and "| positions | 1 | 100.0% | 0.0% |" in good.stdout
    assert json.loads((tmp_path / "record.json").read_text())["provenance"]["versions"]["torch"]
    capsys.readouterr()
    main(["--table", str(tmp_path / "record.json")])
    assert capsys.readouterr().out == good.stdout
    with pytest.raises(UserError, match="scenes.json: not a record of scripts/scene_errors.py"):
        main(["--table", str(tmp_path / "scenes.json")])
    bad_pairs = [
        ("rankings.npz", "few.json"),
        ("rankings.npz", "plain.json"),
        ("scenes.json", "scenes.json"),
        ("cut.npz", "scenes.json"),
    ]
    for bad in bad_pairs:
        result = run(*bad)
        assert result.returncode == 2 and "Traceback" not in result.stderr and str(tmp_path) in result.stderr
