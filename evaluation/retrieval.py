"""Evaluate retrieval in both directions: first stage by embedding, then all queries' pairs reranked together.

No loop over queries: the pairs of all queries are one list, ordered by caption length so that a micro-batch holds
similar lengths, and cut into fixed micro-batches that are dealt out to the ranks. A micro-batch's arithmetic does not
depend on who computes it, so the rankings are the same, bit for bit, for any number of processes. Letters: Q queries,
N candidates, C captions, k candidates reranked per query, D kept, De embedding width.

    results = evaluate(model, backbone, dataset, distributed, k=10)
    results.t2i.figures().columns["reranked"].metrics["R@1"]
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from data.caption_datasets import CaptionDataset
from models.config import EDJEConfig
from models.distributed import DistributedContext
from models.edje import EDJE
from models.encoder.optimized_encoder import pairs_at_once
from models.errors import UserError
from models.language.captions import CaptionIds
from models.matching import MatchPass
from models.precision import dtype_name, fastest_dtype
from models.stores.token_store import TokenStore
from models.vision.backbones import Backbone

from .blocks import Stopwatch, blocks, own_blocks, progress_bar, run_blocks
from .calibration import Calibration
from .figures import DIRECTIONS
from .gallery import Gallery, build_gallery
from .metrics import RECALL_DEPTHS
from .results import DirectionResults, Results

QUERIES_PER_BLOCK = 256


@dataclass(frozen=True)
class Pools:
    """The first stage's candidates, best first."""

    ids: Tensor
    """[Q, D] int64."""
    similarities: Tensor
    """[Q, D] float32 cosines."""
    first_right: Tensor
    """[Q] int64: 0-based rank of the first right answer among all N items; N where there is none."""


def evaluate(
    model: EDJE,
    backbone: Backbone | None,
    dataset: CaptionDataset,
    distributed: DistributedContext,
    k: int = 10,
    store: TokenStore | None = None,
    caption_store: TokenStore | None = None,
    dtype: torch.dtype | None = None,
    pairs_per_batch: int | None = None,
    progress: bool = False,
    folds: int = 1,
    depth: int = 0,
) -> Results:
    """Embedding alone and EDJE on one split, text to image and image to text; the same Results on every rank.

    k: candidates reranked per query. store: patch tokens, or this model's compressed tokens; caption_store: text
    embeddings; with both, `backbone` may be None. dtype: of the joint encoder, by default the device's fastest.
    folds: equal parts of the images, each ranked and reranked as a gallery of its own; everything is still encoded
    once and all pairs are batched together. depth: candidates kept per query, at least max(k, 10).
    `fused` is in the results if the model's config has a fusion_lambda, and how far its probabilities are off if it is
    calibrated. Raises UserError if k exceeds the gallery, the
    folds are not equal, or backbone, store or an image file is not usable."""
    check_pool(k, dataset, folds)
    dtype = dtype or distributed.agree(fastest_dtype(distributed.device))
    watch = Stopwatch(distributed.device, {"backbone": 0.0, "compress": 0.0, "rerank": 0.0})
    was_training = model.training
    scorer = model.eval().optimized(dtype)
    with torch.inference_mode():
        gallery = build_gallery(model, backbone, dataset, distributed, store, caption_store, watch, progress)
        directions = {}
        for direction in DIRECTIONS:
            images = _image_numbers(dataset, direction)
            edges = np.arange(folds + 1) * (len(dataset) // folds)
            pools = _pools_of_folds(*_embeddings(gallery, direction), *images, edges, max(k, depth, *RECALL_DEPTHS))
            with watch.part("rerank"):
                logits = rerank_pools(scorer, gallery, pools, direction, k, distributed, pairs_per_batch, progress)
            directions[direction] = _direction_results(*images, pools, logits, model.config, folds)
    model.train(was_training)
    precision = dtype_name(dtype)
    return Results(**directions, image_subsets=dataset.subsets, seconds=watch.seconds, precision=precision)


def check_pool(k: int, dataset: CaptionDataset, folds: int = 1) -> None:
    """Raises UserError unless the folds are equal and 1 <= k <= number of candidates in both directions in each."""
    images, captions = len(dataset), len(dataset.captions)
    if folds < 1 or images % folds:
        raise UserError(f"{folds} folds of {images} images are not equal; choose a divisor of {images}")
    if folds > 1 and images // folds < max(RECALL_DEPTHS):
        raise UserError(f"{folds} folds of {images} images have {images // folds} each; R@10 needs at least 10")
    smallest = min(images // folds, captions)
    if not 1 <= k <= smallest:
        gallery = f"the gallery has {images} images and {captions} captions"
        raise UserError(
            f"k is {k}, but {gallery if folds == 1 else f'each of {folds} folds has {smallest} images'}; "
            f"choose k from 1 to {smallest}"
        )


def _pools_of_folds(
    queries: Tensor, items: Tensor, query_image: np.ndarray, item_image: np.ndarray, edges: np.ndarray, depth: int
) -> Pools:
    """first_stage() of each fold among its own items; item numbers count through the folds.

    edges: [folds + 1] first image of each fold and the number of images; queries and items are sorted by image."""
    of_folds = []
    bounds = (itertools.pairwise(np.searchsorted(images, edges).tolist()) for images in (query_image, item_image))
    for query_bounds, item_bounds in zip(*bounds, strict=True):
        query, item = slice(*query_bounds), slice(*item_bounds)
        pools = first_stage(queries[query], items[item], query_image[query], item_image[item], depth)
        of_folds.append((pools.ids + item.start, pools.similarities, pools.first_right))
    return Pools(*(torch.cat(column) for column in zip(*of_folds, strict=True)))


def first_stage(queries: Tensor, items: Tensor, query_image: np.ndarray, item_image: np.ndarray, depth: int) -> Pools:
    """The `depth` items of highest cosine for each query: queries [Q, De], items [N, De], both normalised.

    query_image [Q] and item_image [N] say which items are right. Equal similarities are ordered by item number.
    Returns all N where depth exceeds N. Beyond the result, memory holds a few [QUERIES_PER_BLOCK, N] at a time."""
    depth = min(depth, len(items))
    image_of_query = torch.tensor(query_image, device=items.device)
    image_of_item = torch.tensor(item_image, device=items.device)
    items = items.double()
    numbers = torch.arange(len(items), device=items.device)

    def search(part: slice) -> tuple[Tensor, Tensor, Tensor]:
        # float64, rounded to float32: items with the same embedding tie exactly, wherever they lie in the product.
        cosine = (queries[part].double() @ items.T).float()
        order = _ordered_integers(cosine) * len(items) - numbers
        best = order.topk(depth, dim=1).indices
        wrong = image_of_query[part, None] != image_of_item
        first_right = order.masked_fill(wrong, torch.iinfo(torch.int64).min).amax(dim=1, keepdim=True)
        return best, cosine.gather(1, best), (order > first_right).sum(dim=1)

    found = list(run_blocks(search, blocks(len(queries), QUERIES_PER_BLOCK), queries.device))
    return Pools(*(torch.cat(column) for column in zip(*found, strict=True)))


def _ordered_integers(values: Tensor) -> Tensor:
    """float32 -> int64 in the same order, so that a tie-breaking number fits below. Values are finite."""
    bits = (values + 0.0).view(torch.int32).long()  # + 0.0: -0.0 becomes 0.0
    return torch.where(bits >= 0, bits, -(bits & 0x7FFFFFFF))


def rerank_pools(
    model: MatchPass,
    gallery: Gallery,
    pools: Pools,
    direction: str,
    k: int,
    distributed: DistributedContext,
    pairs_per_batch: int | None = None,
    progress: bool = False,
) -> Tensor:
    """Match logits [Q, k] float32 (CPU) of the first k candidates of every query, on every rank.

    direction: `t2i` (queries are captions) or `i2t` (queries are images)."""
    pairs = _PairList.of(model, gallery, pools, direction, k)
    size = pairs_per_batch or pairs_at_once(distributed.device, model.config.num_vision_tokens)
    own = own_blocks(blocks(len(pairs), size), distributed)
    blocks_of_logits = run_blocks(lambda part: pairs.logits(model, gallery, part), own, distributed.device)
    scored = list(progress_bar(blocks_of_logits, len(own), f"rerank {direction}", progress))
    return _collect(scored, len(pairs), distributed).view(len(pools.ids), k)


@dataclass(frozen=True)
class _PairList:
    """Every pair of one direction, shortest captions first: number in [0, Q * k), caption, image, cosine."""

    captions: CaptionIds
    number: Tensor
    caption: Tensor
    image: Tensor
    similarity: Tensor

    @classmethod
    def of(cls, model: MatchPass, gallery: Gallery, pools: Pools, direction: str, k: int) -> _PairList:
        captions = model.tokenizer(gallery.dataset.captions, model.max_joint_pieces)
        candidates = pools.ids[:, :k].flatten().cpu()
        queries = torch.arange(len(pools.ids)).repeat_interleave(k)
        caption, image = (queries, candidates) if direction == "t2i" else (candidates, queries)
        number = captions.lengths[caption].argsort(stable=True)
        similarity = pools.similarities[:, :k].flatten().cpu()[number]
        return cls(captions, number, caption[number], image[number], similarity)

    def __len__(self) -> int:
        return len(self.number)

    def logits(self, model: MatchPass, gallery: Gallery, part: slice) -> tuple[Tensor, Tensor]:
        """Numbers and match logits of the pairs of one micro-batch; each of its images is fetched once."""
        captions, caption_index = self.caption[part].unique(return_inverse=True)
        images, image_index = self.image[part].unique(return_inverse=True)
        device = model.device
        logits = model.match_logits(
            self.captions.select(captions).to(device),
            gallery.tokens(images),
            caption_index.to(device),
            image_index.to(device),
            self.similarity[part].to(device) if model.config.residual_similarity else None,
        )
        return self.number[part], logits.cpu()


def _collect(scored: list[tuple[Tensor, Tensor]], total: int, distributed: DistributedContext) -> Tensor:
    """Logits of all ranks' pairs in order of pair number, [total]; every pair must come back exactly once."""
    mine = tuple(torch.cat([item[i] for item in scored]).numpy() if scored else np.empty(0) for i in (0, 1))
    numbers, logits = (np.concatenate(column) for column in zip(*distributed.gather_objects(mine), strict=True))
    times = np.bincount(numbers.astype(np.int64), minlength=total)
    assert len(times) == total and (times == 1).all(), "a pair was scored twice or not at all"
    ordered = np.empty(total, dtype=np.float32)
    ordered[numbers.astype(np.int64)] = logits
    return torch.from_numpy(ordered)


def _embeddings(gallery: Gallery, direction: str) -> tuple[Tensor, Tensor]:
    """Embeddings of queries and of candidates."""
    text, image = gallery.text_embeddings, gallery.image_embeddings
    return (text, image) if direction == "t2i" else (image, text)


def _image_numbers(dataset: CaptionDataset, direction: str) -> tuple[np.ndarray, np.ndarray]:
    """Image number of each query and of each candidate."""
    caption_image, images = dataset.caption_image, np.arange(len(dataset))
    return (caption_image, images) if direction == "t2i" else (images, caption_image)


def _direction_results(
    query_image: np.ndarray,
    item_image: np.ndarray,
    pools: Pools,
    logits: Tensor,
    config: EDJEConfig,
    folds: int,
) -> DirectionResults:
    return DirectionResults(
        query_image=query_image,
        item_image=item_image,
        candidates=pools.ids.cpu().numpy(),
        similarities=pools.similarities.cpu().numpy(),
        logits=logits.numpy(),
        first_right=pools.first_right.cpu().numpy(),
        fusion_lambda=config.fusion_lambda,
        calibration=Calibration.of(config),
        folds=folds,
    )
