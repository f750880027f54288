"""What separates a scene from the candidates that are ranked above it: how often each kind of difference is missed.

python scripts/scene_errors.py runs/demo/rankings.npz runs/demo/scenes/dataset_scenes.json

For every caption and every other candidate of its pool: by what do the two scenes differ, and does the right one score
higher, by the embedding's cosine and by the match logit? 50% wrong is a coin toss. Only rendered scenes have the
description that this needs.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from data.scene_world import KINDS
from models.errors import UserError, run_entry_point


def read_scenes(path: Path) -> dict[str, dict[str, Any]]:
    """Scene descriptions by image id. Raises UserError naming the file if it has none."""
    try:
        images = json.loads(path.read_text())["images"]
        return {(Path(i.get("filepath") or "") / i["filename"]).as_posix(): i["scene"] for i in images}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path}: no annotations of rendered scenes ({error!r}); write some with data.scenes") from None


def difference(scene: dict[str, Any], other: dict[str, Any]) -> str:
    """`other family`; or, between siblings, `places`: the same objects stood elsewhere; `binding`: other objects."""
    if scene["family"] != other["family"]:
        return "other family"
    described = [sorted(tuple(thing[kind] for kind in KINDS) for thing in s["objects"]) for s in (scene, other)]
    return "places" if described[0] == described[1] else "binding"


def count_errors(rankings: dict[str, np.ndarray], scenes: dict[str, dict[str, Any]]) -> dict[str, dict[str, float]]:
    """By kind of difference: `pairs`, and the share in percent that `cosine` and `logit` order wrongly.

    rankings: arrays of rankings.npz: t2i_query_image [Q], t2i_candidates, t2i_similarities, t2i_logits [Q, k].
    A tie is an error. Queries whose own image is not in the pool are left out."""
    ids = [str(x) for x in rankings["image_ids"]]
    pairs, wrong = Counter(), {"cosine": Counter(), "logit": Counter()}
    scores = {"cosine": rankings["t2i_similarities"], "logit": rankings["t2i_logits"]}
    for query, (image, candidates) in enumerate(
        zip(rankings["t2i_query_image"], rankings["t2i_candidates"], strict=True)
    ):
        place = np.flatnonzero(candidates == image)
        if not len(place):
            continue
        for rank, candidate in enumerate(candidates):
            if rank == place[0]:
                continue
            kind = difference(scenes[ids[image]], scenes[ids[candidate]])
            pairs[kind] += 1
            for name, values in scores.items():
                wrong[name][kind] += bool(values[query, rank] >= values[query, place[0]])
    return {
        kind: {"pairs": total, **{name: 100 * counts[kind] / total for name, counts in wrong.items()}}
        for kind, total in sorted(pairs.items())
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rankings", type=Path, help="rankings.npz of evaluation/evaluate_retrieval.py")
    parser.add_argument("annotations", type=Path, help="dataset_scenes.json")
    arguments = parser.parse_args()
    scenes = read_scenes(arguments.annotations)
    try:
        with np.load(arguments.rankings, allow_pickle=False) as file:
            rankings = dict(file)
        missing = [str(x) for x in rankings["image_ids"] if str(x) not in scenes]
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"{arguments.rankings}: not a rankings.npz of an evaluation ({error!r})") from None
    if missing:
        raise UserError(f"{arguments.annotations}: does not describe {missing[0]}; give the file that was evaluated")
    print("| candidate differs in | pairs | ordered wrongly by the embedding | by EDJE |\n|---|---|---|---|")
    for kind, counts in count_errors(rankings, scenes).items():
        print(f"| {kind} | {counts['pairs']:,} | {counts['cosine']:.1f}% | {counts['logit']:.1f}% |")


if __name__ == "__main__":
    run_entry_point(main)
