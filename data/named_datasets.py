"""Flickr30k and COCO by name: their annotation files, image folders and published counts.

    NAMED_DATASETS["flickr30k"].load("flickr30k", "test")     # 1,000 images, 5,000 captions, or a UserError

Either family of annotations will do: Karpathy's one file of all splits, or BLIP's and ALBEF's one list a split. They
hold the same images and captions; where both are there, Karpathy's is read. A split of another size is refused:
recall depends on the size of the gallery, and has been published for the wrong one.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from models.errors import UserError
from models.vision.images import may_be_image

from .caption_datasets import CaptionDataset, load_annotations
from .coco import coco_file

SPLITS = ("train", "val", "test")
ANNOTATION_FOLDERS = ("", "annotations", "annotation", "caption_datasets")
"""Where annotation files lie under the root: beside the images, in BLIP's folder, or as Karpathy's archive unpacks."""
WHERE_TO_GET = "; scripts/prepare_data.py says where people get it"
"""End of errors about a missing file; that script itself drops it."""


@dataclass(frozen=True)
class NamedDataset:
    """A public data set's files and sizes, under the user's folder `root`."""

    title: str
    karpathy_file: str
    list_file: str
    """BLIP's and ALBEF's file of one split, with {split} in its name."""
    image_folders: tuple[str, ...]
    """Folders under the root that image paths may start from: as the archives unpack, and as people rename them."""
    sizes: dict[str, tuple[int, int]]
    """Split -> images and captions. COCO's `train` includes restval."""
    annotation_sources: tuple[tuple[str, str], ...]
    """What to download, and where."""
    image_sources: tuple[tuple[str, str], ...]

    def annotations(self, root: str | Path, split: str) -> Path:
        """The file with a split's captions. Raises UserError naming the files of both families if there is none."""
        names = (self.karpathy_file, self.list_file.format(split=split))
        for name in names:
            for folder in ANNOTATION_FOLDERS:
                file = Path(root) / folder / name
                if file.is_file():
                    return file
        raise UserError(
            f"{root}: neither {names[0]} (Karpathy) nor {names[1]} (BLIP, ALBEF) is in it; put one of them there"
            f"{WHERE_TO_GET}"
        )

    def image_root(self, root: str | Path, dataset: CaptionDataset) -> Path:
        """The folder that image paths are relative to: the one that holds most of the first 100 images."""
        first = dataset.image_ids[:100]
        folders = [Path(root) / folder for folder in self.image_folders]
        return max(folders, key=lambda folder: sum(may_be_image(coco_file(folder / image_id)) for image_id in first))

    def load(self, root: str | Path, split: str, check_images: bool = True, document: Any = None) -> CaptionDataset:
        """One split, `train`, `val` or `test`, of the published size. document: as load_annotations() takes it.

        Raises UserError naming the file: absent, not readable, of another size, or images missing or empty."""
        if split not in self.sizes:
            raise UserError(f"{self.title} has no split {split!r}; it has {', '.join(self.sizes)}")
        file = self.annotations(root, split)
        dataset = load_annotations(file, root, split, document=document)
        self._check_size(dataset, split, file)
        dataset = replace(dataset, root=self.image_root(root, dataset))
        if check_images:
            dataset.check_images(file)
        return dataset

    def _check_size(self, dataset: CaptionDataset, split: str, file: Path) -> None:
        expected, found = self.sizes[split], (len(dataset), len(dataset.captions))
        if found != expected:
            raise UserError(
                f"{file}: its {split} split has {found[0]:,} images and {found[1]:,} captions, {self.title}'s has "
                f"{expected[0]:,} and {expected[1]:,}; recall on a set of another size is not comparable, so get the "
                f"published file, or pass this one as --dataset FILE.json{WHERE_TO_GET}"
            )


_KARPATHY = "https://cs.stanford.edu/people/karpathy/deepimagesent/caption_datasets.zip"
_BLIP = "https://storage.googleapis.com/sfr-vision-language-research/datasets/"

NAMED_DATASETS = {
    "flickr30k": NamedDataset(
        title="Flickr30k",
        karpathy_file="dataset_flickr30k.json",
        list_file="flickr30k_{split}.json",
        # Karpathy's file names images without their folder, BLIP's lists with it.
        image_folders=("flickr30k-images", "flickr30k_images", "images", ""),
        sizes={"train": (29_000, 145_000), "val": (1_014, 5_070), "test": (1_000, 5_000)},
        annotation_sources=(
            ("dataset_flickr30k.json (Karpathy's splits, in caption_datasets.zip)", _KARPATHY),
            ("or flickr30k_train.json, flickr30k_val.json, flickr30k_test.json (BLIP's lists)", _BLIP),
        ),
        image_sources=(
            (
                "flickr30k-images.tar.gz (31,783 images, by the request form)",
                "https://shannon.cs.illinois.edu/DenotationGraph/",
            ),
        ),
    ),
    "coco": NamedDataset(
        title="COCO",
        karpathy_file="dataset_coco.json",
        list_file="coco_karpathy_{split}.json",
        # Both families name images as val2014/COCO_val2014_000000391895.jpg.
        image_folders=("", "images", "coco-images", "coco_images"),
        sizes={"train": (113_287, 566_747), "val": (5_000, 25_010), "test": (5_000, 25_010)},
        annotation_sources=(
            ("dataset_coco.json (Karpathy's splits, in caption_datasets.zip)", _KARPATHY),
            ("or coco_karpathy_train.json, coco_karpathy_val.json, coco_karpathy_test.json (BLIP's lists)", _BLIP),
        ),
        image_sources=(
            (
                "train2014.zip and val2014.zip, or train2017.zip and val2017.zip (the same pictures)",
                "https://cocodataset.org/#download",
            ),
        ),
    ),
}
