"""Benchmark sections `lists` and `shards`: memory that lists of millions of pairs take, speed of reading tar shards.

`lists`: a list of pairs, one row per caption as in pretraining lists, is written; a process of its own reads it into
the cache, then runs the training reader with 4 workers. The proportional set sizes (PSS: shared pages divided among
those who share them) of that process and of the workers are added up. The same with 1,000 pairs shows what the
libraries take. Every image is the same file, as millions cannot be written here.

`shards`: images a second that the training reader gets out of WebDataset shards with 2 workers, against 2 processes
that do nothing but decode the same JPEGs, held in memory, with PIL; alternating. Once decoding alone (the reader keeps
one pixel an image), once with CLIP's transform in both, where the reader also hands the pixels to the main process.
"""

from __future__ import annotations

import io
import multiprocessing
import random
import resource
import tarfile
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from open_clip.transform import PreprocessCfg, image_transform_v2
from PIL import Image
from tqdm import tqdm

from data.batches import BatchPlan, ImageRows, TrainingBatches
from data.caption_datasets import CaptionDataset, load_annotations
from data.neighbours import CaptionKeys
from data.webdataset_shards import load_shards
from models.vision.images import open_image

from .timing import spread

NUM_WORKERS = 4
"""Of the memory section."""
BATCH_SIZE = 32
FEW_PAIRS = 1000
NUM_BATCHES = 24
"""Read before memory is measured: every worker has then held an epoch's order, pages of captions and images."""
WORDS = "a the small large red wooden dog woman street window beside holding under near two people table".split()


def benchmark_lists(num_pairs: int) -> dict[str, Any]:
    """Seconds and peak memory of reading a list once, and PSS of the processes that then train from it."""
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        Image.effect_noise((256, 256), 60).convert("RGB").save(root / "image.jpg")
        lists: dict[str, Any] = {}
        for count in (FEW_PAIRS, num_pairs):
            file = root / f"{count}.json"
            _write_list(file, count)
            with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:  # its memory is its own
                measured = pool.submit(_training_memory, file, root / "cache").result()
            lists[f"{count:,} pairs"] = {"list_bytes": file.stat().st_size, **measured}
    return {"workers": NUM_WORKERS, "lists": lists}


def _write_list(file: Path, num_pairs: int) -> None:
    """Pairs whose ids are as long as CC12M's and whose captions have 6 to 17 words."""
    generator = random.Random(0)
    captions = [" ".join(generator.choices(WORDS, k=generator.randrange(6, 18))) for _ in range(10_007)]
    with file.open("w") as stream:
        for i in tqdm(range(num_pairs), desc="write the list", unit="pair"):
            row = f'{{"image": "cc12m/{i // 10000:05d}/{i:09d}.jpg", "caption": "{captions[i % len(captions)]}"}}'
            stream.write(f"{',' if i else '['}\n{row}")
        stream.write("\n]\n")


def _peak_bytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


class _OneImage(CaptionDataset):
    """A data set whose images are all the same file."""

    def open_image(self, image: int) -> Image.Image:
        return open_image(self.root / "image.jpg")


def _training_memory(file: Path, cache: Path) -> dict[str, Any]:
    """What reading the list took, and PSS of this process and its data-loader workers while they read batches."""
    multiprocessing.set_start_method("fork", force=True)  # as in training; this process itself was spawned
    before, start = _peak_bytes(), time.perf_counter()
    listed = load_annotations(file, file.parent, None, cache=cache)
    seconds, peak = time.perf_counter() - start, _peak_bytes() - before
    dataset = _OneImage(**vars(listed))
    keys = CaptionKeys(dataset)
    batches = TrainingBatches(BatchPlan(dataset, BATCH_SIZE, seed=0), ImageRows(preprocess()))
    stream = batches.read(0, 10**9, NUM_WORKERS)
    for _ in range(NUM_BATCHES):
        batch = next(stream)
        assert len([dataset.captions[c] for c in batch.captions]) == BATCH_SIZE
        keys.true_pairs(batch.captions, batch.images)
    workers = [process.pid for process in multiprocessing.active_children() if process.pid is not None]
    return {
        "seconds_to_read": seconds,
        "peak_bytes_to_read": peak,
        "pss_bytes_main": pss_bytes("self"),
        "pss_bytes_workers": sum(pss_bytes(worker) for worker in workers),
        "num_workers": len(workers),
    }


def preprocess() -> Callable:
    """CLIP's own transform at 224 px."""
    return image_transform_v2(PreprocessCfg(size=224), is_train=False)


def pss_bytes(process: int | str) -> int:
    """Proportional set size of a process (Linux)."""
    lines = Path(f"/proc/{process}/smaps_rollup").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("Pss:"))


NUM_SHARDS, IMAGES_A_SHARD = 8, 80
EPOCHS = 4
"""Passes over all images that a round times: one takes a third of a second on a fast CPU, where queues still count."""
NUM_CORES = 2
READ_AHEAD = 8
"""Batches read before the clock starts: what the workers had prepared while the other contestant ran."""


def benchmark_shards(rounds: int) -> dict[str, Any]:
    """Images a second of both contestants, decoding alone and with CLIP's transform, and the ratios of the medians."""
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        images = _write_shards(root)
        dataset = load_shards("*.tar", root, root / "cache", NUM_CORES)
        transforms = {"decoding": _first_value, "decoding and transform": preprocess()}
        comparisons = {name: _compare(dataset, images, with_, rounds) for name, with_ in transforms.items()}
    return {
        "images": len(images),
        "mean_bytes": sum(map(len, images)) // len(images),
        "processes": NUM_CORES,
        "rounds": rounds,
        "comparisons": comparisons,
    }


def _compare(dataset: CaptionDataset, images: list[bytes], transform: Callable, rounds: int) -> dict[str, Any]:
    batches = TrainingBatches(BatchPlan(dataset, BATCH_SIZE, seed=0), ImageRows(transform))
    num_batches = EPOCHS * len(images) // BATCH_SIZE
    seconds: dict[str, list[float]] = {"training reader": [], "PIL": []}
    with multiprocessing.get_context("fork").Pool(NUM_CORES, _hold, (images, transform)) as pool:
        stream = batches.read(0, 10**9, NUM_CORES)
        for _ in tqdm(range(rounds + 1), desc="rounds"):
            for _ in range(READ_AHEAD):
                next(stream)
            start = time.perf_counter()
            for _ in range(num_batches):
                next(stream)
            seconds["training reader"].append(time.perf_counter() - start)
            time.sleep(1.5)  # the workers fill their queues and rest
            start = time.perf_counter()
            pool.map(_decode, EPOCHS * list(range(len(images))), chunksize=BATCH_SIZE)
            seconds["PIL"].append(time.perf_counter() - start)
    rates = {name: spread([EPOCHS * len(images) / s for s in values[1:]]) for name, values in seconds.items()}
    ratio = rates["training reader"]["median"] / rates["PIL"]["median"]
    return {"images_per_second": rates, "ratio_of_medians": ratio}


def _write_shards(root: Path) -> list[bytes]:
    """Shards of 500 x 375 JPEGs, smooth with some noise as photographs are; returns the images' bytes."""
    generator = np.random.default_rng(0)
    images = []
    for shard in range(NUM_SHARDS):
        with tarfile.open(root / f"{shard:05d}.tar", "w") as tar:
            for number in range(shard * IMAGES_A_SHARD, (shard + 1) * IMAGES_A_SHARD):
                coarse = Image.fromarray(generator.integers(0, 256, (24, 32, 3), np.uint8)).resize((500, 375))
                noise = generator.normal(0, 6, (375, 500, 1))
                pixels = (np.asarray(coarse) + noise).clip(0, 255).astype(np.uint8)
                buffer = io.BytesIO()
                Image.fromarray(pixels).save(buffer, "JPEG", quality=90)
                images.append(buffer.getvalue())
                for suffix, content in ((".jpg", images[-1]), (".txt", b"a caption"), (".json", b"{}")):
                    member = tarfile.TarInfo(f"{number:09d}{suffix}")
                    member.size = len(content)
                    tar.addfile(member, io.BytesIO(content))
    return images


def _first_value(image: Image.Image) -> torch.Tensor:
    """What remains of a decoded image where its pixels are not wanted."""
    return torch.tensor(image.getpixel((0, 0)))


_held: list[Any] = []
"""Images and transform of a process that decodes for comparison."""


def _hold(images: list[bytes], transform: Callable) -> None:
    torch.set_num_threads(1)  # as data-loader workers have
    _held[:] = [images, transform]


def _decode(number: int) -> None:
    images, transform = _held
    with Image.open(io.BytesIO(images[number])) as image:
        transform(image.convert("RGB"))
