"""What separates a scene from the candidates that are ranked above it: how often each kind of difference is missed.

python scripts/scene_errors.py runs/demo/rankings.npz runs/demo/scenes/dataset_scenes.json
python scripts/scene_errors.py runs/demo/rankings.npz runs/demo/scenes/dataset_scenes.json \\
    --out benchmarks/results/demo/scene_errors.json     a record as well
python scripts/scene_errors.py --table benchmarks/results/demo/scene_errors.json     a record's table again

For every caption and every other candidate of its pool: by what do the two scenes differ, and does the right one score
higher, by the embedding's cosine and by the match logit? 50% wrong is a coin toss. Only rendered scenes have the
description that this needs.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from data.caption_datasets import CaptionDataset, read_field
from data.scenes.world import KINDS
from evaluation.json_fields import read_json_object
from evaluation.output import read_rankings
from evaluation.provenance import stamp
from evaluation.results import DirectionResults
from models.errors import UserError, run_entry_point
from models.files import write_atomically


def read_scenes(path: Path, dataset: CaptionDataset) -> list[dict[str, Any]]:
    """The description of each image's scene. Raises UserError naming the file and the first image that has none."""
    scenes = read_field(path, dataset, "scene")
    for image, scene in zip(dataset.image_ids, scenes, strict=True):
        if not isinstance(scene, dict) or not {"family", "objects"} <= scene.keys():
            raise UserError(f"{path}: does not describe the scene of {image}; give the file that was evaluated")
    return scenes


def difference(scene: dict[str, Any], other: dict[str, Any]) -> str:
    """`other family`; or, between siblings, `positions`: the same objects stand elsewhere; `binding of colour`, or of
    another kind: each shape has another one; `binding of several`."""
    if scene["family"] != other["family"]:
        return "other family"
    mine, theirs = ({thing["shape"]: thing for thing in s["objects"]} for s in (scene, other))
    rebound = [kind for kind in KINDS if any(mine[shape][kind] != theirs[shape][kind] for shape in mine)]
    if not rebound:
        return "positions"
    return f"binding of {rebound[0] if len(rebound) == 1 else 'several'}"


def count_errors(results: DirectionResults, scenes: list[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """By kind of difference: `pairs`, and the share in percent that `cosine` and `logit` order wrongly.

    results: text to image; scenes: the description of each image. A tie is an error. Queries whose own image is not in
    the pool are left out."""
    pairs: Counter[str] = Counter()
    wrong: dict[str, Counter[str]] = {"cosine": Counter(), "logit": Counter()}
    scores = {"cosine": results.scores("embedding"), "logit": results.scores("reranked")}
    for query, image in enumerate(results.query_image):
        pool = results.candidates[query, : results.k]
        for own in np.flatnonzero(pool == image):
            for rank in np.flatnonzero(pool != image):
                kind = difference(scenes[image], scenes[pool[rank]])
                pairs[kind] += 1
                for name, values in scores.items():
                    wrong[name][kind] += bool(values[query, rank] >= values[query, own])
    return {
        kind: {"pairs": total, **{name: 100 * counts[kind] / total for name, counts in wrong.items()}}
        for kind, total in sorted(pairs.items())
    }


def table(kinds: Mapping[str, Mapping[str, float]]) -> str:
    """Markdown, a row for each kind of difference."""
    header = ["| candidate differs in | pairs | wrong by the embedding | by the match logit |", "|---|---:|---:|---:|"]
    rows = [
        f"| {kind} | {counts['pairs']:,.0f} | {counts['cosine']:.1f}% | {counts['logit']:.1f}% |"
        for kind, counts in kinds.items()
    ]
    return "\n".join([*header, *rows])


def read_record(path: Path) -> dict[str, dict[str, float]]:
    """What --out wrote, as count_errors() gives it. Raises UserError naming the file."""
    kinds = read_json_object(path, "record of scripts/scene_errors.py").inside("kinds")
    return {kind: {name: kinds.inside(kind).number(name) for name in ("pairs", "cosine", "logit")} for kind in kinds}


def parse_arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rankings", type=Path, nargs="?", help="rankings.npz of evaluation/evaluate_retrieval.py")
    parser.add_argument("annotations", type=Path, nargs="?", help="dataset_scenes.json")
    parser.add_argument("--out", type=Path, metavar="FILE.json", help="also write a record")
    parser.add_argument("--table", type=Path, metavar="FILE.json", help="read no rankings; print a record's table")
    arguments = parser.parse_args(argv)
    if not arguments.annotations and not arguments.table:
        parser.error("give rankings.npz and dataset_scenes.json, or --table FILE.json")
    return arguments


def main(argv: Sequence[str] | None = None) -> None:
    arguments = parse_arguments(argv)
    if arguments.table:
        print(table(read_record(arguments.table)))
        return
    results, dataset = read_rankings(arguments.rankings)
    kinds = count_errors(results.t2i, read_scenes(arguments.annotations, dataset))
    if arguments.out:
        record = {"provenance": stamp().to_json(), "kinds": kinds}
        write_atomically(arguments.out, json.dumps(record, indent=1) + "\n")
    print(table(kinds))


if __name__ == "__main__":
    run_entry_point(main)
