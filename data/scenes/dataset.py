"""Write the embedded data set: rendered scenes with five captions each, in the layout of Flickr30k and COCO.

    python -m data.scenes --out data_scenes
    python -m data.scenes --out data_scenes --contact-sheet sheet.png

Writes OUT/images/{train,val,test}/*.png and OUT/dataset_scenes.json (Karpathy layout); and, for pretraining,
OUT/dataset_scenes_regions.json, whose training scenes have a caption for each of their objects instead. What the scenes
are and why embeddings confuse them stands in data/scene_world.py. All splits together are drawn from one seed; the same
arguments give the same bytes, and a second start with them finds the work done.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from dataclasses import asdict
from itertools import groupby
from operator import attrgetter
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont
from tqdm import tqdm

from data.scenes.captions import CaptionWriter, region_captions
from data.scenes.rendering import render_scene
from data.scenes.world import Scene, draw_splits
from models.errors import UserError
from models.files import write_atomically
from models.vision.images import open_image

ANNOTATION_FILE = "dataset_scenes.json"
REGION_FILE = "dataset_scenes_regions.json"
FORMAT = 1
"""Counted up when the same arguments begin to give other scenes, so that old folders are written again."""


def write_scenes(
    out: str | Path, num_train: int = 6000, num_val: int = 500, num_test: int = 500, seed: int = 0, image_size: int = 64
) -> Path:
    """Write the data set into the folder `out` and return its annotation file.

    The annotation file is written last and holds the arguments: where it stands with the same arguments, nothing is
    done; where with others, the old data set is removed first.

    Raises UserError for a negative count, an image size below 32, an `out` that is a file, an annotation file that
    this module did not write, and more images than the world has scenes."""
    sizes = {"train": num_train, "val": num_val, "test": num_test}
    out = Path(out)
    _check_arguments(out, image_size, sizes)
    generation = {"format": FORMAT, "seed": seed, "image_size": image_size, **sizes}
    annotation_file = out / ANNOTATION_FILE
    previous = read_annotations(annotation_file) if annotation_file.exists() else None
    if previous and previous["generation"] == generation:
        files = [out / REGION_FILE, *(_image_file(out, image) for image in previous["images"])]
        if all(file.exists() for file in files):
            return annotation_file
    splits = draw_splits(sizes, seed)
    images = list(_annotate(splits, seed))
    if previous:
        _remove(annotation_file, previous)
    scenes = [scene for split in splits.values() for scene in split]
    for image, scene in zip(tqdm(images, desc="scenes", unit="image"), scenes, strict=True):
        path = _image_file(out, image)
        path.parent.mkdir(parents=True, exist_ok=True)
        # Seeded by the image, not by a running generator: one picture can be drawn again without the others.
        render_scene(scene, image_size, seed=f"{seed} {image['imgid']}").save(path)
    document = {"dataset": "scenes", "generation": generation}
    _write_json(out / REGION_FILE, document | {"images": list(_with_regions(images, scenes, seed))})
    _write_json(annotation_file, document | {"images": images})
    return annotation_file


def _check_arguments(out: Path, image_size: int, sizes: dict[str, int]) -> None:
    for name, value, least in [*((split, n, 0) for split, n in sizes.items()), ("image size", image_size, 32)]:
        if value < least:
            raise UserError(f"scenes: {name} is {value}; it must be at least {least}")
    if out.exists() and not out.is_dir():
        raise UserError(f"{out}: not a folder; the data set is written into one, choose another --out")


def read_annotations(file: Path) -> dict:
    """The whole annotation file. Raises UserError if this module did not write it."""
    try:
        annotations = json.loads(file.read_text(encoding="utf-8"))
        annotations["generation"], annotations["images"]
    except (ValueError, TypeError, KeyError) as error:
        raise UserError(
            f"{file}: not an annotation file of data.scenes; move it away or choose another --out"
        ) from error
    return annotations


def _annotate(splits: dict[str, list[Scene]], seed: int) -> Iterator[dict]:
    """Karpathy's record of each image, with the scene itself, its family and the number of objects as `subset`."""
    writer = CaptionWriter([scene for scenes in splits.values() for scene in scenes], seed)
    imgid = sentid = 0
    for split, scenes in splits.items():
        for _, members in groupby(scenes, key=attrgetter("family")):
            siblings = list(members)
            for scene, captions in zip(siblings, writer.write_family(siblings), strict=True):
                sentids = list(range(sentid, sentid + len(captions)))
                yield {
                    "filepath": f"images/{split}",
                    "filename": f"scene_{imgid:06d}.png",
                    "split": split,
                    "imgid": imgid,
                    **_sentences(captions, sentids, imgid),
                    "subset": {2: "two objects", 3: "three objects"}[len(scene.objects)],
                    "scene": asdict(scene),
                }
                imgid, sentid = imgid + 1, sentid + len(captions)


def _with_regions(images: list[dict], scenes: list[Scene], seed: int) -> Iterator[dict]:
    """The records, training images with region captions in place of captions; numbered on where captions end."""
    rng = random.Random(f"regions {seed}")
    sentid = sum(len(image["sentids"]) for image in images)
    for image, scene in zip(images, scenes, strict=True):
        if image["split"] == "train":
            captions = region_captions(scene, rng)
            sentids = list(range(sentid, sentid + len(captions)))
            sentid += len(captions)
            image = image | _sentences(captions, sentids, image["imgid"])
        yield image


def _sentences(captions: list[str], sentids: list[int], imgid: int) -> dict:
    """Captions as Karpathy's records have them."""
    sentences = [{"raw": raw, "sentid": i, "imgid": imgid} for raw, i in zip(captions, sentids, strict=True)]
    return {"sentids": sentids, "sentences": sentences}


def _image_file(out: Path, image: dict) -> Path:
    return out / image["filepath"] / image["filename"]


def _remove(annotation_file: Path, annotations: dict) -> None:
    """Remove a data set, its annotation file first: what is left after a crash is not taken for a whole one."""
    annotation_file.unlink()
    for image in annotations["images"]:
        _image_file(annotation_file.parent, image).unlink(missing_ok=True)


def _write_json(file: Path, content: dict) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(file, json.dumps(content))


def write_contact_sheet(annotation_file: Path, picture: str | Path) -> None:
    """A picture of 24 test scenes at three times their size with one caption each; a row is a family of siblings."""
    images = [image for image in read_annotations(annotation_file)["images"] if image["split"] == "test"]
    families = [list(members) for _, members in groupby(images, key=lambda image: image["scene"]["family"])]
    # Both numbers of objects, the largest families first.
    families.sort(key=lambda members: (-len(members), members[0]["imgid"]))
    rows = [
        members[:6]
        for subset in ("two objects", "three objects")
        for members in [f for f in families if f[0]["subset"] == subset][:2]
    ]
    width, height, font = 210, 262, ImageFont.load_default(size=13)
    sheet = Image.new("RGB", (6 * width, len(rows) * height), "white")
    draw = ImageDraw.Draw(sheet)
    for row, members in enumerate(rows):
        for column, image in enumerate(members):
            corner = (column * width + 9, row * height + 6)
            scene = open_image(_image_file(annotation_file.parent, image))
            sheet.paste(scene.resize((192, 192), Image.Resampling.NEAREST), corner)
            caption = image["sentences"][row % len(image["sentences"])]["raw"]
            draw.text((corner[0], corner[1] + 196), _wrap(caption, 192, font), fill="black", font=font, spacing=2)
    sheet.save(picture)


def _wrap(text: str, width: float, font: ImageFont.FreeTypeFont | ImageFont.ImageFont) -> str:
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if font.getlength(longer) > width:
            lines.append(word)
        else:
            lines[-1] = longer
    return "\n".join(lines)
