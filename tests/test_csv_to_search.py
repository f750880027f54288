"""A CSV and a folder of pictures, from training to search, through the commands alone: no converter is written."""

import csv
import json
from pathlib import Path

from data.caption_datasets import is_validation
from evaluation import evaluate_retrieval
from models import Reranker, TokenStore
from tests.processes import run_script
from tests.tiny_model import write_images

COLOURS, THINGS = ("red", "green", "blue", "white", "black", "pink"), ("ball", "cube", "ring", "star", "cross")


def write_csv(file: Path, images: list[str], captions: dict[str, str]) -> None:
    with file.open("w", newline="", encoding="utf-8") as stream:
        writer = csv.writer(stream)
        writer.writerow(["photo", "what it shows"])
        writer.writerows((image, captions[image]) for image in images)


def done(script: str, *arguments: object) -> None:
    process = run_script(script, *arguments)
    assert process.returncode == 0, process.stderr[-3000:]


def test_a_csv_and_a_folder_are_trained_on_evaluated_and_searched(run_config, backbone_dir, tmp_path):
    images = write_images(tmp_path / "photos", 60)
    captions = {
        image: f"a {COLOURS[number % 6]} {THINGS[number // 6 % 5]}, number {number}"
        for number, image in enumerate(images)
    }
    write_csv(tmp_path / "all.csv", images, captions)
    bad = next(image for image in images if not is_validation(image, 0.3))
    write_csv(tmp_path / "bad.csv", images, captions | {bad: " "})
    columns = ("--image-column", "photo", "--caption-column", "what it shows")
    data = [
        f"data.root={tmp_path / 'photos'}",
        f"data.annotations={tmp_path / 'bad.csv'}",
        "data.image_column=photo",
        "data.caption_column=what it shows",
        "data.val_share=0.3",
        "data.val_split=val",
        f"output={tmp_path / 'run'}",
    ]
    stores = ("--out", tmp_path / "patches", "--captions", tmp_path / "texts", "--root", tmp_path / "photos")
    images_of = ("--images", tmp_path / "all.csv", *columns)
    done("scripts/precompute_tokens.py", "--backbone-pretrained", backbone_dir, *images_of, *stores)

    done(
        "train.py",
        "--config",
        run_config,
        *data,
        f"data.store={tmp_path / 'patches'}",
        f"data.caption_store={tmp_path / 'texts'}",
    )
    left_out = (tmp_path / "run" / "left_out.txt").read_text()
    assert left_out.count("\n") == 1 and f"{bad!r} has an empty caption" in left_out

    evaluate_retrieval.main(["--checkpoint", str(tmp_path / "run"), "--split", "val", "--device", "cpu", "--k", "5"])
    [results] = (tmp_path / "run").glob("evaluation-bad-val/results.json")
    record = json.loads(results.read_text())
    assert 8 <= record["images"] == record["captions"] <= 28 and record["t2i"]["fused"]["lambda"] >= 0

    done(
        "scripts/precompute_tokens.py",
        "--checkpoint",
        tmp_path / "run",
        *images_of,
        "--root",
        tmp_path / "photos",
        "--out",
        tmp_path / "store",
    )
    store = TokenStore.open(tmp_path / "store")
    reranker = Reranker.from_pretrained(tmp_path / "run", device="cpu")
    assert sorted(store.ids) == images and len(reranker.search(captions[images[3]], store, top_k=5)) == 5
