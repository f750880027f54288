"""Benchmark section `query`: what one query costs through Reranker.rank, and how much of it is the text tower.

A query ranks CANDIDATES images of a token store on disk: reading tokens and embeddings, tokenising, the joint encoder
in the device's fastest precision. The fused score needs the query's embedding too; it is computed, remembered, or left
out where the caller passes the first stage's cosines. Random weights: their values do not change the time.
"""

from __future__ import annotations

import itertools
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch

from models.config import BackboneConfig, CompressionConfig, EDJEConfig, EncoderConfig
from models.edje import EDJE
from models.language.captions import CaptionTokenizer, build_vocabulary
from models.precision import dtype_name
from models.reranker import Reranker
from models.stores.token_store import TokenStore, TokenStoreWriter
from models.vision.backbones import Backbone

from .timing import alternate, spread

BACKBONE = BackboneConfig(name="ViT-L-14-336-quickgelu", pretrained="random")
ITEMS, CANDIDATES, TOKENS = 1000, 100, 64
WORDS = "a red kite over the beach on windy day two children run along water".split()


def benchmark_query(device: torch.device, rounds: int) -> dict[str, Any]:
    """Milliseconds of a query by what is known of it before; every round asks other queries."""
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        reranker = _reranker(device, Path(folder))
        store = _store(reranker, Path(folder) / "store")
        queries = _queries(reranker, store)
        seconds = alternate(queries, rounds, warm_up=2, device=device)
    return {
        "backbone": BACKBONE.name,
        "joint_encoder": "MiniLM-L12-H384's shape",
        "dtype": dtype_name(reranker.model.encoder.dtype),
        "candidates": CANDIDATES,
        "tokens": TOKENS,
        "rounds": rounds,
        "milliseconds": {name: spread([1000 * value for value in times]) for name, times in seconds.items()},
    }


def _reranker(device: torch.device, folder: Path) -> Reranker:
    backbone = Backbone.load(BACKBONE, device)
    build_vocabulary(WORDS, folder / "vocab.txt")
    config = EDJEConfig(
        backbone=BACKBONE,
        dims=backbone.dims,
        backbone_fingerprint=backbone.fingerprint,
        adapter=CompressionConfig(num_tokens=TOKENS),
        encoder=EncoderConfig(),
        fusion_lambda=1.0,
    )
    model = EDJE(config, CaptionTokenizer.from_pretrained(folder / "vocab.txt")).eval().to(device)
    return Reranker(model, backbone)


def _store(reranker: Reranker, path: Path) -> TokenStore:
    model = reranker.model
    writer = TokenStoreWriter(
        path,
        [f"{number}.jpg" for number in range(ITEMS)],
        TOKENS,
        model.config.encoder.hidden_size,
        model.config.dims.embedding_width,
        "float16",
        reranker.backbone.fingerprint,
        model.adapter_fingerprint,
    )
    for shard in writer.missing_shards():
        count = len(writer.shard_ids(shard))
        embeddings = torch.nn.functional.normalize(torch.randn(count, writer.manifest.embedding_width), dim=-1)
        writer.write_shard(shard, torch.randn(count, TOKENS, writer.manifest.width), embeddings)
    writer.finish()
    return TokenStore.open(path)


def _queries(reranker: Reranker, store: TokenStore) -> dict[str, Any]:
    generator, number = np.random.default_rng(0), itertools.count()

    def ids() -> list[str]:
        return [store.ids[row] for row in generator.choice(ITEMS, CANDIDATES, replace=False)]

    def new_query() -> str:
        words = [*generator.choice(WORDS, 10), str(next(number))]
        return " ".join(words)

    known = new_query()
    return {
        "match logit alone": lambda: reranker.rank(new_query(), ids(), store=store, score="match"),
        "fused, cosines passed": lambda: reranker.rank(
            new_query(), ids(), store=store, similarities=np.zeros(CANDIDATES)
        ),
        "fused, a query that came before": lambda: reranker.rank(known, ids(), store=store),
        "fused, a new query": lambda: reranker.rank(new_query(), ids(), store=store),
    }
