"""How well a model fills in the words of scenes: all words of one kind hidden in a caption, the image shown.

python scripts/scene_words.py runs/demo/pretrained/7_relations runs/demo/scenes/dataset_scenes.json

With every colour of a caption hidden, only the image tells which object has which; who recognises colours but does not
bind them is right half of the time with two objects, a third with three. Any word of the right meaning counts ("disc"
for "circle"). What a pretraining by such masks (objectives.mlm_words) has taught, before a match logit is trained.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from data.caption_datasets import CaptionDataset, load_annotations
from data.scenes.captions import word_kinds
from evaluation.gallery import build_gallery
from models.distributed import DistributedContext
from models.edje import EDJE
from models.errors import UserError, run_entry_point
from models.language.captions import CaptionIds
from models.vision.backbones import Backbone
from scripts.scene_errors import read_scenes


@torch.inference_mode()
def fill_in(model: EDJE, tokens: Tensor, dataset: CaptionDataset, values: dict[str, str]) -> list[tuple[int, bool]]:
    """For each hidden word: the image of its caption, and whether the likeliest of the words `values` means the same.

    tokens: vision tokens [N, m, H] of all images; values: the words of one kind with the value that each means."""
    vocabulary = model.tokenizer.vocab
    meanings = {vocabulary[word]: value for word, value in values.items() if word in vocabulary}
    if not meanings:
        raise UserError(f"the model's vocabulary has none of the words {', '.join(values)}; it is of other captions")
    choices = torch.tensor(list(meanings))
    captions = model.tokenizer(dataset.captions)
    hidden = torch.isin(captions.ids, choices)
    masked = CaptionIds(captions.ids.masked_fill(hidden, model.tokenizer.mask_id), captions.lengths)
    images = torch.from_numpy(dataset.caption_image)
    packed = model.encoder.pack_pairs(masked, tokens, torch.arange(len(captions)), images)
    logits = model.encoder.mlm_logits(model.encoder.encode(packed, packed.caption_rows[hidden]))
    guesses = choices[logits[:, choices].argmax(1)]
    image_of = images.repeat_interleave(captions.lengths)[hidden]
    return [
        (image, meanings[guess] == meanings[truth])
        for image, guess, truth in zip(image_of.tolist(), guesses.tolist(), captions.ids[hidden].tolist(), strict=True)
    ]


def parse_arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path, help="model or run; its backbone encodes the images")
    parser.add_argument("annotations", type=Path, help="dataset_scenes.json")
    parser.add_argument("--split", default="val")
    return parser.parse_args(argv)


def main() -> None:
    arguments = parse_arguments()
    model = EDJE.from_pretrained(arguments.checkpoint)
    dataset = load_annotations(arguments.annotations, arguments.annotations.parent, arguments.split)
    objects = [len(scene["objects"]) for scene in read_scenes(arguments.annotations, dataset)]
    gallery = build_gallery(model, Backbone.load(model.config.backbone), dataset, DistributedContext())
    tokens = gallery.tokens(torch.arange(len(dataset)))
    print("| hidden | right with two objects | with three |\n|---|---|---|")
    for kind, values in word_kinds().items():
        found = fill_in(model, tokens, dataset, values)
        of_count = {n: [right for image, right in found if objects[image] == n] for n in (2, 3)}
        print(f"| {kind} | {' | '.join(f'{100 * sum(r) / max(1, len(r)):.0f}%' for r in of_count.values())} |")


if __name__ == "__main__":
    run_entry_point(main)
