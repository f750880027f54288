"""Encode images once and store their tokens: compressed by a trained checkpoint, or patch tokens to train from.

Compressed tokens, to rerank and to evaluate from:
    torchrun --nproc_per_node=8 scripts/precompute_tokens.py --checkpoint runs/demo --images photos --out photos.store
Patch tokens of a data set and the embeddings of its captions, to train from (data.store, data.caption_store):
    python scripts/precompute_tokens.py --backbone-name ViT-B-16-quickgelu --backbone-pretrained openai \\
        --images dataset_flickr30k.json --root flickr30k-images --out runs/patches --captions runs/captions
The backbone may also be a model on the Hugging Face Hub, or a directory:
    python scripts/precompute_tokens.py --backbone-name google/siglip2-large-patch16-384 --images photos \\
        --out runs/patches

Images in WebDataset shards, as img2dataset writes them:
    python scripts/precompute_tokens.py --checkpoint runs/demo --shards "cc12m/{00000..01242}.tar" --out cc12m.store

Ids are paths relative to the folder or root; in shards, SHARD/MEMBER. The same command continues a killed run: the
store's finished shards are kept, and the manifest, written last, makes the store readable.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from PIL import Image

from data.annotation_files import ANNOTATION_SUFFIXES, add_column_options, column_names
from data.annotation_records import USUAL_NAMES, ColumnNames
from data.caption_datasets import CaptionDataset, load_annotations
from data.huggingface_datasets import is_dataset
from data.webdataset_shards import load_shards
from models.config import BackboneConfig
from models.distributed import DistributedContext, process_group
from models.edje import EDJE
from models.errors import UserError, run_entry_point
from models.precision import PRECISIONS, dtype_name, resolve_precision
from models.stores.codecs import CODECS
from models.stores.indexing import Images, find_images, precompute, precompute_captions, unreadable_images
from models.stores.token_store import TokenStore
from models.vision.backbones import Backbone
from models.vision.images import ImageSource


@dataclass
class Items:
    """What to encode: N images under N ids, and the captions of an annotation file or of shards."""

    images: Images
    ids: list[str]
    captions: list[str]


@dataclass(frozen=True)
class DecodedImages:
    """Images of a data set that have no files of their own, read when asked for."""

    dataset: CaptionDataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, row: int) -> Image.Image:
        return self.dataset.open_image(row)


@dataclass(frozen=True)
class SelectedImages:
    """Some rows of other images."""

    images: Images
    rows: list[int]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, row: int) -> ImageSource:
        return self.images[self.rows[row]]


def read_items(args: argparse.Namespace, distributed: DistributedContext) -> Items:
    """The images and captions named by --images or --shards."""
    if args.images is not None:
        if args.index is not None:
            raise UserError(f"--index {args.index}: only shards have an index; pass --shards, or drop --index")
        return read_image_files(args)
    if args.split is not None:
        raise UserError(f"--split {args.split}: shards have no splits; name only the shards of the split")
    index = args.index or args.out.with_name(f"{args.out.name}.index")
    with distributed.main_first():
        dataset = load_shards(args.shards, args.root or Path(), index, args.workers)
    return Items(DecodedImages(dataset), list(dataset.image_ids), list(dataset.captions))


def read_image_files(args: argparse.Namespace) -> Items:
    """Images of a folder, of annotations of any layout, or of a text file with one path per line.

    --root: the folder that a file's paths are relative to, by default the file's own."""
    images, split = args.images, args.split
    columns = column_names(args)
    root = args.root or (images if images.is_dir() else images.parent)
    if _is_annotations(args, columns):
        dataset = load_annotations(images, root, split, columns=columns, val_share=args.val_share, lenient=True)
        for line in dataset.left_out:
            print(f"left out: {line}", file=sys.stderr)
        in_rows = dataset.row_images is not None
        files = DecodedImages(dataset) if in_rows else [dataset.path(i) for i in range(len(dataset))]
        return Items(files, list(dataset.image_ids), list(dataset.captions))
    if split is not None:
        raise UserError(f"--split {split}: {images} has no splits; pass an annotation file, or drop --split")
    ids = find_images(images) if images.is_dir() else _read_lines(images)
    return Items([root / item_id for item_id in ids], ids, [])


def _is_annotations(args: argparse.Namespace, columns: ColumnNames) -> bool:
    """Of a folder, whether its captions are asked for; of a file, whether it is more than one path per line."""
    if is_dataset(args.images):
        return True
    if args.images.is_dir():
        return args.captions is not None or args.split is not None
    return args.images.suffix.lower() in ANNOTATION_SUFFIXES or columns != USUAL_NAMES


def _read_lines(file: Path) -> list[str]:
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(
            f"{file}: cannot be read as a list of images ({error}); pass a folder, an annotation file (.json) or a "
            "text file with one path per line"
        ) from None
    return [line.strip() for line in lines if line.strip()]


def leave_out_unreadable(items: Items, distributed: DistributedContext, num_workers: int) -> None:
    """Decode every image once, and drop and name those that cannot be read."""
    bad = unreadable_images(items.images, distributed, num_workers)
    if distributed.is_main:
        for reason in bad.values():
            print(f"left out: {reason}", file=sys.stderr)
    kept = [i for i in range(len(items.ids)) if i not in bad]
    items.images, items.ids = SelectedImages(items.images, kept), [items.ids[i] for i in kept]


def load_models(args: argparse.Namespace, distributed: DistributedContext) -> tuple[Backbone, EDJE | None]:
    """The backbone and the model of the checkpoint, or the backbone named by the options and no model."""
    if args.batch_size < 1:
        raise UserError(f"--batch-size is {args.batch_size}; it must be at least 1")
    # One precision for all ranks: their machines may differ, and the store is one.
    precision = dtype_name(distributed.agree(resolve_precision(args.precision, distributed.device)))
    if args.checkpoint is not None:
        model = EDJE.from_pretrained(args.checkpoint, device=distributed.device)
        return Backbone.load(model.config.backbone, distributed.device, precision), model
    config = BackboneConfig(
        name=args.backbone_name,
        pretrained=args.backbone_pretrained,
        token_model=args.token_model,
        token_pretrained=args.token_pretrained,
        token_stages=tuple(args.token_stages),
        token_grid=args.token_grid,
    )
    return Backbone.load(config, distributed.device, precision), None


def describe(store: TokenStore, what: str) -> str:
    size = sum(record.bytes for record in store.manifest.shards)
    return f"{store.path}: {len(store):,} {what} ({store.manifest.backbone}), {size / 1e6:,.1f} MB {store.dtype}"


def run(args: argparse.Namespace, distributed: DistributedContext) -> None:
    items = read_items(args, distributed)
    if args.more_captions and args.captions is None:
        raise UserError("--more-captions: needs a store to write to; pass --captions STORE, or drop it")
    if args.captions is not None and not items.captions:
        raise UserError(f"--captions {args.captions}: {args.images} has no captions; pass an annotation file or shards")
    for file in args.more_captions:
        items.captions += load_annotations(file, args.root or file.parent, args.split).captions
    backbone, model = load_models(args, distributed)
    if args.skip_unreadable:
        leave_out_unreadable(items, distributed, args.workers)
    options = dict(distributed=distributed, dtype=args.dtype, batch_size=args.batch_size, num_workers=args.workers)
    stores = [(precompute(args.out, items.images, items.ids, backbone, model, **options), "images")]
    if args.captions is not None:
        stores.append(
            (precompute_captions(args.captions, items.captions, backbone, distributed=distributed), "captions")
        )
    if distributed.is_main:
        print(*(describe(store, what) for store, what in stores), sep="\n")


def parse_arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", type=Path, metavar="DIR", help="trained model: store its compressed tokens")
    parser.add_argument(
        "--backbone-name",
        default="",
        metavar="NAME",
        help="no model: store patch tokens; open_clip name, hf-hub:OWNER/NAME, or OWNER/NAME or folder of transformers",
    )
    parser.add_argument(
        "--backbone-pretrained", default="", metavar="NAME", help="its tag or weight file; or, alone, a directory"
    )
    parser.add_argument("--token-model", default="", help="timm model whose patch tokens are stored instead")
    parser.add_argument("--token-pretrained", default="", help="its timm tag, .safetensors file or directory")
    parser.add_argument("--token-stages", type=int, nargs="+", default=[], help="convolutional towers, e.g. 2 3 4")
    parser.add_argument("--token-grid", type=int, default=0, help="convolutional towers: side of the token grid")
    images = parser.add_mutually_exclusive_group(required=True)
    images.add_argument(
        "--images", type=Path, help="folder, annotations (docs/data.md), or a text file with one path per line"
    )
    images.add_argument("--shards", nargs="+", metavar="PATTERN", help="WebDataset shards; {00..10}, {a,b}, * expand")
    parser.add_argument("--index", type=Path, metavar="DIR", help="where the shards' index is kept (STORE.index)")
    parser.add_argument(
        "--root", type=Path, help="folder that a file's paths (default: the file's) or shards (.) are relative to"
    )
    parser.add_argument("--split", help="of an annotation file; default: all splits")
    add_column_options(parser)
    parser.add_argument("--out", type=Path, required=True, metavar="STORE", help="directory of the token store")
    parser.add_argument("--captions", type=Path, metavar="STORE", help="also store the captions' embeddings there")
    parser.add_argument(
        "--more-captions", type=Path, nargs="+", default=[], metavar="FILE", help="annotation files: their captions too"
    )
    parser.add_argument("--dtype", default="float16", choices=list(CODECS), help="of the stored tokens (%(default)s)")
    parser.add_argument("--precision", default="auto", choices=PRECISIONS, help="of the backbone")
    parser.add_argument("--batch-size", type=int, default=32, help="images per backbone pass (%(default)s)")
    parser.add_argument("--workers", type=int, default=0, help="processes per rank that decode images (%(default)s)")
    parser.add_argument("--skip-unreadable", action="store_true", help="list unreadable images and leave them out")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda")
    args = parser.parse_args(argv)
    if (args.checkpoint is not None) == bool(args.backbone_name or args.backbone_pretrained):
        parser.error("pass either --checkpoint, or a backbone: --backbone-name, --backbone-pretrained or both")
    return args


def main() -> None:
    args = parse_arguments()
    with process_group(args.device) as distributed:
        run(args, distributed)


if __name__ == "__main__":
    run_entry_point(main)
