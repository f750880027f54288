"""Check a download of Flickr30k or COCO, say exactly what is missing and where people get it, and what comes next.

python scripts/prepare_data.py flickr30k --root flickr30k
python scripts/prepare_data.py coco --root coco --splits test --decode 500

Looks for either family of annotations (Karpathy's file, or BLIP's and ALBEF's list a split), compares every split's
images and captions with the published counts, and looks for every image file; --decode also decodes a random sample.
Downloads and writes nothing. Exit code 2 if anything is missing.
"""

from __future__ import annotations

import argparse
import random
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from tqdm import tqdm

from data.caption_datasets import CaptionDataset
from data.named_datasets import NAMED_DATASETS, SPLITS, NamedDataset
from models.errors import UserError, run_entry_point
from models.images import ImageError, may_be_image, open_image


def check_split(named: NamedDataset, root: Path, split: str, problems: list[str]) -> CaptionDataset | None:
    """Print what a split holds and add what is wrong with it to `problems`; None if it cannot be read."""
    try:
        dataset = named.load(root, split, check_images=False)
    except UserError as error:
        problems.append(f"{split}: {error}")
        return None
    missing = [image_id for i, image_id in enumerate(dataset.image_ids) if not may_be_image(dataset.path(i))]
    print(
        f"{split}: {len(dataset):,} images and {len(dataset.captions):,} captions, as published; "
        f"{len(dataset) - len(missing):,} image files are there ({named.annotations(root, split)}, {dataset.root})"
    )
    if missing:
        problems.append(
            f"{split}: {len(missing):,} of {len(dataset):,} images are missing or empty under {dataset.root}: "
            f"{', '.join(missing[:3])}{', ...' if len(missing) > 3 else ''}"
        )
    return dataset


def check_decoding(datasets: list[CaptionDataset], count: int, problems: list[str]) -> None:
    """Decode `count` random images of those that are there, the same ones each time."""
    paths = [dataset.path(i) for dataset in datasets for i in range(len(dataset)) if may_be_image(dataset.path(i))]
    sample = random.Random(0).sample(paths, min(count, len(paths)))
    unreadable = 0
    for path in tqdm(sample, desc="decode", unit="image"):
        try:
            open_image(path)
        except ImageError as error:
            problems.append(str(error))
            unreadable += 1
    print(f"decoded {len(sample) - unreadable:,} of {len(sample):,} images of a random sample")


def next_commands(name: str, root: Path, splits: list[str]) -> list[str]:
    """What to run on a complete download: evaluation, and the stores that training reads."""
    named = NAMED_DATASETS[name]
    split = splits[-1]
    file = named.annotations(root, split)
    images = named.load(root, split, check_images=False).root
    precompute = "python scripts/precompute_tokens.py"
    source = f"--images {file} --root {images}"
    commands = [
        "Evaluate a checkpoint:",
        f"  python evaluation/evaluate_retrieval.py --checkpoint runs/NAME --dataset {name} --data-root {root} "
        f"--split {split}",
        "Or store its tokens of the split first, and evaluate from them:",
        f"  {precompute} --checkpoint runs/NAME {source} --split {split} --out runs/NAME/{name}_{split}_tokens",
        f"  python evaluation/evaluate_retrieval.py --checkpoint runs/NAME --dataset {name} --data-root {root} "
        f"--split {split} --store runs/NAME/{name}_{split}_tokens",
    ]
    if file.name == named.karpathy_file and "train" in splits:
        commands += [
            "Store patch tokens and caption embeddings of all splits, to train from:",
            f"  {precompute} --backbone-name ViT-B-16-quickgelu --backbone-pretrained openai {source} "
            f"--out runs/{name}/patches --captions runs/{name}/captions",
        ]
    return commands


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dataset", choices=list(NAMED_DATASETS))
    parser.add_argument("--root", type=Path, required=True, metavar="DIR", help="folder of annotations and images")
    parser.add_argument(
        "--splits", nargs="+", choices=SPLITS, default=list(SPLITS), help="splits that are needed (default: all)"
    )
    parser.add_argument("--decode", type=int, default=0, metavar="N", help="also decode a random sample of N images")
    return parser.parse_args()


def main() -> None:
    arguments = parse_arguments()
    named, root, problems = NAMED_DATASETS[arguments.dataset], arguments.root, []
    if not root.is_dir():
        problems.append(f"{root}: no such folder")
    datasets = [check_split(named, root, split, problems) for split in arguments.splits]
    if arguments.decode:
        check_decoding([dataset for dataset in datasets if dataset is not None], arguments.decode, problems)
    if problems:
        print("\nMissing or wrong:", *(f"  {problem}" for problem in problems), sep="\n")
        print("\nWhere people get them:", *(f"  {what}: {where}" for what, where in named.sources), sep="\n")
        raise UserError(f"{root}: {named.title} is not complete, {len(problems)} problems are listed above")
    print(f"\n{named.title} is complete.\n", *next_commands(arguments.dataset, root, arguments.splits), sep="\n")


if __name__ == "__main__":
    run_entry_point(main)
