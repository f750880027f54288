"""Check a download of Flickr30k or COCO and say exactly what is missing, or make the emoji data set.

python scripts/prepare_data.py flickr30k --root flickr30k
python scripts/prepare_data.py coco --root coco --splits test --decode 500 --list missing.txt
python scripts/prepare_data.py emoji --root emoji

flickr30k and coco: looks for either family of annotations (Karpathy's file, or BLIP's and ALBEF's list a split),
compares every split's images and captions with the published counts, and checks that every image file exists; --decode
also decodes a sample. Says where people get what is missing, and what to run next. Downloads nothing, and writes only
the file named by --list. Exit code 2 if anything is missing.

emoji: downloads four npm packages of pinned content, 12 MB, and draws 9,529 images from them. Killed and started again,
it goes on where it stopped.
"""

from __future__ import annotations

import argparse
import random
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from tqdm import tqdm

from data.caption_datasets import CaptionDataset
from data.emoji.dataset import build_dataset, compare_datasets
from data.json_documents import is_list, read_json
from data.named_datasets import NAMED_DATASETS, SPLITS, WHERE_TO_GET, NamedDataset
from models.errors import UserError, run_entry_point
from models.files import write_atomically
from models.vision.images import ImageError, may_be_image, open_image


@dataclass
class Findings:
    """What is wrong with a download."""

    annotations: list[str] = field(default_factory=list)
    """A line for each split whose captions are missing or differ from those published."""
    images: list[str] = field(default_factory=list)
    """A line for each split with missing images, and for each that does not decode."""
    missing: list[Path] = field(default_factory=list)
    """Every image file that is missing or empty."""


def read_once(file: Path, documents: dict[Path, Any]) -> Any:
    """The content of Karpathy's file, kept in `documents` for the next split; None for a list, which is one split."""
    if file not in documents:
        print(f"reading {file} ({file.stat().st_size / 1e6:,.1f} MB)", flush=True)
        documents[file] = None if is_list(file) else read_json(file)
    return documents[file]


def check_split(
    named: NamedDataset, root: Path, split: str, documents: dict[Path, Any], findings: Findings
) -> CaptionDataset | None:
    """Print what a split holds and add what is wrong with it to `findings`; None if it cannot be read."""
    try:
        file = named.annotations(root, split)
        dataset = named.load(root, split, check_images=False, document=read_once(file, documents))
    except UserError as error:
        findings.annotations.append(f"{split}: {str(error).removesuffix(WHERE_TO_GET)}")
        return None
    images = tqdm(range(len(dataset)), desc=f"{split}: check images", unit="image", delay=1)
    missing = [i for i in images if not may_be_image(dataset.path(i))]
    print(
        f"{split}: {len(dataset):,} images and {len(dataset.captions):,} captions, as published; "
        f"{len(dataset) - len(missing):,} image files are there ({file}, {dataset.root})"
    )
    if missing:
        names = ", ".join(dataset.image_ids[i] for i in missing[:3])
        findings.images.append(
            f"{split}: {len(missing):,} of {len(dataset):,} images are missing or empty under {dataset.root}: "
            f"{names}{', ... (--list FILE writes all)' if len(missing) > 3 else ''}"
        )
        findings.missing += map(dataset.path, missing)
    return dataset


def check_decoding(datasets: list[CaptionDataset], count: int, findings: Findings) -> None:
    """Decode `count` random images of those that exist, the same ones each time."""
    missing = set(findings.missing)
    paths = [dataset.path(i) for dataset in datasets for i in range(len(dataset)) if dataset.path(i) not in missing]
    sample = random.Random(0).sample(paths, min(count, len(paths)))
    unreadable = 0
    for path in tqdm(sample, desc="decode", unit="image"):
        try:
            open_image(path)
        except ImageError as error:
            findings.images.append(str(error))
            unreadable += 1
    print(f"decoded {len(sample) - unreadable:,} of {len(sample):,} images of a random sample")


def write_list(file: Path, missing: list[Path]) -> None:
    """Write the paths of all missing images, one per line."""
    try:
        write_atomically(file, "".join(f"{path}\n" for path in missing))
    except OSError as error:
        raise UserError(f"{file}: cannot be written ({error.strerror}); name another file as --list") from None
    print(f"{file}: the {len(missing):,} image files that are missing or empty")


def next_commands(name: str, root: Path, splits: list[str], images: Path) -> list[str]:
    """What to run on a complete download, its images under `images`: evaluation, and the stores that training reads."""
    named = NAMED_DATASETS[name]
    split = splits[-1]
    file = named.annotations(root, split)
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


def parse_arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    datasets = parser.add_subparsers(dest="dataset", required=True, metavar="{flickr30k,coco,emoji}")
    for name, named in NAMED_DATASETS.items():
        check = datasets.add_parser(name, help=f"check a download of {named.title}")
        check.add_argument("--root", type=Path, required=True, metavar="DIR", help="folder of annotations and images")
        check.add_argument(
            "--splits", nargs="+", choices=SPLITS, default=list(SPLITS), help="splits that are needed (default: all)"
        )
        check.add_argument("--decode", type=int, default=0, metavar="N", help="also decode a random sample of N images")
        check.add_argument(
            "--list", type=Path, metavar="FILE", help="write the paths of all missing images, one a line"
        )
    emoji = datasets.add_parser("emoji", help="make the emoji data set from its public packages")
    emoji.add_argument("--root", type=Path, required=True, metavar="DIR", help="folder to make the data set in")
    emoji.add_argument(
        "--packages", type=Path, metavar="DIR", help="archives that npm pack got; no download (default: DIR/packages)"
    )
    emoji.add_argument("--compare", type=Path, metavar="DIR", help="then say how far the images differ from this copy")
    return parser.parse_args(argv)


def make_emoji(root: Path, packages: Path | None, other: Path | None) -> None:
    """Make the data set in `root` and say what to run next, or how far its images are from another copy's."""
    annotations = build_dataset(root, packages)
    print(f"{annotations}: complete")
    if other is None:
        print(f"\nTrain and evaluate on it:\n  bash scripts/emoji.sh {root} frozen")
        return
    found = compare_datasets(root, other)
    print(
        f"annotations: equal to those of {other}\n"
        f"images: {found.identical_files:,} of {found.images:,} files are the same to the byte; "
        f"largest difference of a value {found.max_difference} of 255, mean {found.mean_difference:.4f}"
    )


def check_download(arguments: argparse.Namespace) -> None:
    """Print what a download of a named data set holds. Raises UserError if anything is missing."""
    named, root, findings = NAMED_DATASETS[arguments.dataset], arguments.root, Findings()
    if not root.is_dir():
        findings.annotations.append(f"{root}: no such folder")
    documents: dict[Path, Any] = {}
    checked = [check_split(named, root, split, documents, findings) for split in arguments.splits]
    datasets = [dataset for dataset in checked if dataset is not None]
    if arguments.decode:
        check_decoding(datasets, arguments.decode, findings)
    if arguments.list:
        write_list(arguments.list, findings.missing)
    problems = findings.annotations + findings.images
    if problems:
        print("\nMissing or wrong:", *(f"  {problem}" for problem in problems), sep="\n")
        sources = named.annotation_sources if findings.annotations else ()
        if findings.images or not datasets:  # without captions no image was looked for
            sources += named.image_sources
        print("\nWhere people get them:", *(f"  {what}: {where}" for what, where in sources), sep="\n")
        raise UserError(f"{root}: {named.title} is not complete, {len(problems)} problems are listed above")
    commands = next_commands(arguments.dataset, root, arguments.splits, datasets[-1].root)
    print(f"\n{named.title} is complete.\n", *commands, sep="\n")


def main() -> None:
    arguments = parse_arguments()
    if arguments.dataset == "emoji":
        make_emoji(arguments.root, arguments.packages, arguments.compare)
    else:
        check_download(arguments)


if __name__ == "__main__":
    run_entry_point(main)
