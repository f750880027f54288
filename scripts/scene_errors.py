"""What separates a scene from the candidates that are ranked above it: how often each kind of difference is missed.

python scripts/scene_errors.py runs/demo/rankings.npz runs/demo/scenes/dataset_scenes.json

For every caption and every other candidate of its pool: by what do the two scenes differ, and does the right one score
higher, by the embedding's cosine and by the match logit? 50% wrong is a coin toss. Only rendered scenes have the
description that this needs.
"""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from data.caption_datasets import CaptionDataset, read_field
from data.scenes.world import KINDS
from evaluation.output import read_rankings
from evaluation.results import DirectionResults
from models.errors import UserError, run_entry_point


def read_scenes(path: Path, dataset: CaptionDataset) -> list[dict[str, Any]]:
    """The description of each image's scene. Raises UserError naming the file and the first image that has none."""
    scenes = read_field(path, dataset, "scene")
    for image, scene in zip(dataset.image_ids, scenes, strict=True):
        if not isinstance(scene, dict) or not {"family", "objects"} <= scene.keys():
            raise UserError(f"{path}: does not describe the scene of {image}; give the file that was evaluated")
    return scenes


def difference(scene: dict[str, Any], other: dict[str, Any]) -> str:
    """`other family`; or, between siblings, `places`: the same objects stood elsewhere; `binding of colour`, or of
    another kind: each shape has another one; `binding of several`."""
    if scene["family"] != other["family"]:
        return "other family"
    mine, theirs = ({thing["shape"]: thing for thing in s["objects"]} for s in (scene, other))
    rebound = [kind for kind in KINDS if any(mine[shape][kind] != theirs[shape][kind] for shape in mine)]
    if not rebound:
        return "places"
    return f"binding of {rebound[0] if len(rebound) == 1 else 'several'}"


def count_errors(results: DirectionResults, scenes: list[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """By kind of difference: `pairs`, and the share in percent that `cosine` and `logit` order wrongly.

    results: text to image; scenes: the description of each image. A tie is an error. Queries whose own image is not in
    the pool are left out."""
    pairs, wrong = Counter(), {"cosine": Counter(), "logit": Counter()}
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rankings", type=Path, help="rankings.npz of evaluation/evaluate_retrieval.py")
    parser.add_argument("annotations", type=Path, help="dataset_scenes.json")
    arguments = parser.parse_args()
    results, dataset = read_rankings(arguments.rankings)
    scenes = read_scenes(arguments.annotations, dataset)
    print("| candidate differs in | pairs | ordered wrongly by the embedding | by EDJE |\n|---|---|---|---|")
    for kind, counts in count_errors(results.t2i, scenes).items():
        print(f"| {kind} | {counts['pairs']:,} | {counts['cosine']:.1f}% | {counts['logit']:.1f}% |")


if __name__ == "__main__":
    run_entry_point(main)
