"""Render the data set of coloured shapes: images, captions and annotations in Karpathy's layout."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from models.errors import run_entry_point

from .dataset import write_contact_sheet, write_scenes


def parse_arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m data.scenes",
        description=__doc__.partition("\n")[0],
        epilog="example: python -m data.scenes --out data_scenes",
    )
    parser.add_argument("--out", required=True, type=Path, help="folder of the data set")
    parser.add_argument("--train", type=int, default=6000, help="training images (default %(default)s)")
    parser.add_argument("--val", type=int, default=500, help="validation images (default %(default)s)")
    parser.add_argument("--test", type=int, default=500, help="test images (default %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="draws everything (default %(default)s)")
    parser.add_argument("--image-size", type=int, default=64, help="side in pixels (default %(default)s)")
    parser.add_argument("--contact-sheet", type=Path, metavar="FILE.png", help="also draw 24 test scenes")
    return parser.parse_args(argv)


def main() -> None:
    arguments = parse_arguments()
    annotation_file = write_scenes(
        arguments.out, arguments.train, arguments.val, arguments.test, arguments.seed, arguments.image_size
    )
    if arguments.contact_sheet:
        write_contact_sheet(annotation_file, arguments.contact_sheet)
    print(annotation_file)


if __name__ == "__main__":
    run_entry_point(main)
