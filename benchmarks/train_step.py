"""Benchmark section `step`: pairs that a training step scores and learns from per second, reading included.

Ours: the product's own step, all objectives in one packed pass of the joint encoder.
Against it the way of the published code on the same rows, draws and weights: transformers' BertModel, padded, with a
pass each for positives, negative images, negative captions, masked captions and texts. Both read the same stored patch
tokens, so the published code's three passes of the image tower are left out. Widths are MiniLM's, weights are random:
speed does not depend on them.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import BertConfig, BertModel

from data.caption_datasets import CaptionDataset
from data.neighbours import CaptionKeys
from models.distributed import DistributedContext, share_threads
from models.encoder.bert import submodule
from models.encoder.joint_encoder import JointEncoder
from models.encoder.mixture import Sequences
from models.language.captions import CaptionIds
from models.precision import dtype_name, resolve_precision
from models.stores.token_store import TokenStoreWriter
from training.config import RunConfig, load_config
from training.features import StoredFeatures
from training.loop import Run, build_optimizer, optimizer_step
from training.objectives import Objectives
from training.setup import build_batches, build_model
from training.step_reader import StepReader

from .timing import alternate, ratio, spread

PATCHES, PATCH_WIDTH, EMBEDDING_WIDTH = 196, 768, 512
"""ViT-B/16 at 224 px."""
CAPTION_WORDS = (4, 28)
"""Words of a caption, each a word piece: 16 in the mean."""
MODELS = {"MiniLM-L12, 64 + 16 tokens": (12, 64), "MiniLM-L6, 8 + 16 tokens": (6, 8)}
NEGATIVES = {
    "groups of 8": ["negatives.mode=groups", "negatives.group_size=8"],
    "1 hard negative": ["negatives.mode=pairs", "negatives.per_positive=1"],
}


def benchmark_step(device: torch.device, rounds: int, batch_size: int, steps: int) -> dict[str, Any]:
    """Scored pairs per second of each way, by model and negatives; `steps`: in each timed round."""
    if device.type == "cuda":
        share_threads(device)  # as a run does
    with tempfile.TemporaryDirectory() as folder:
        dataset = _write_data(Path(folder), 2 * batch_size)
        results = {}
        for model, (layers, tokens) in MODELS.items():
            for negatives, overrides in NEGATIVES.items():
                config = _config(Path(folder), device, batch_size, layers, tokens, overrides)
                results[f"{model}, {negatives}"] = _measure(config, dataset, device, rounds, steps)
    return {
        "batch_size": batch_size,
        "rounds": rounds,
        "steps_per_round": steps,
        "dtype": dtype_name(resolve_precision("auto", device)),
        "objectives": "ITM, MLM, text recovery",
        "includes": "reading stored patch tokens, losses, backward, optimizer",
        "results": results,
    }


def _measure(
    config: RunConfig, dataset: CaptionDataset, device: torch.device, rounds: int, steps: int
) -> dict[str, Any]:
    distributed, paired = DistributedContext(device=device), config.negatives.mode == "pairs"
    ours = _Trainer(config, dataset, distributed)
    trainers = {"one packed pass": ours}
    if paired:  # the published code has no groups
        trainers["separate padded passes"] = _Trainer(config, dataset, distributed, padded=True)
    losses = {name: trainer.losses() for name, trainer in trainers.items()}
    contestants = {name: (lambda t=trainer: t.steps(steps)) for name, trainer in trainers.items()}
    seconds = alternate(contestants, rounds, warm_up=1, device=device)
    pairs = config.training.batch_size * (3 if paired else config.negatives.group_size) * steps
    measured: dict[str, Any] = {
        "pairs_per_second": {name: spread([pairs / s for s in values]) for name, values in seconds.items()},
        "first_losses_without_dropout": losses,
    }
    if paired:
        measured["ratio"] = ratio(seconds["separate padded passes"], seconds["one packed pass"])
    return measured


class _Trainer:
    """A run of its own, a step at a time."""

    def __init__(
        self, config: RunConfig, dataset: CaptionDataset, distributed: DistributedContext, padded: bool = False
    ):
        features, keys = StoredFeatures.open(config.data.store, config.data.caption_store), CaptionKeys(dataset)
        model = build_model(config, features, dataset, distributed)
        if padded:
            model.add_module("encoder", PaddedEncoder(model.encoder))
        model = model.to(distributed.device)
        dtype = resolve_precision(config.training.precision, distributed.device)
        self.run = Run(config, model, build_optimizer(model, config.training), distributed, dtype)
        batches = build_batches(config, features, None, dataset, keys, distributed)
        self.reader = StepReader(config, model.tokenizer, batches, features, None, keys, distributed)
        self.objectives = Objectives(config.objectives, config.negatives, config.seed, distributed)

    def steps(self, count: int) -> None:
        for _ in range(count):
            optimizer_step(self.run, self.reader, self.objectives, 100.0)

    @torch.no_grad()
    def losses(self) -> dict[str, float]:
        """Of the first batch, without dropout: equal for every way, since weights and draws are."""
        self.run.model.eval()
        with torch.autocast(self.run.distributed.device.type, self.run.dtype, self.run.dtype != torch.float32):
            found = self.objectives(self.run.model, self.reader.next()).losses
        return {name: loss.item() for name, loss in found.items()}


class PaddedEncoder(nn.Module):
    """The published way behind our encoder's interface: BertModel on padded batches, one pass for each kind."""

    def __init__(self, encoder: JointEncoder):
        super().__init__()
        config = encoder.config
        self.config, self.special, self.cls = config, encoder.special, encoder.cls
        self.bert = BertModel(
            BertConfig(
                vocab_size=config.vocab_size,
                hidden_size=config.hidden_size,
                num_hidden_layers=config.num_layers,
                num_attention_heads=config.num_heads,
                intermediate_size=config.intermediate_size,
                max_position_embeddings=config.max_positions,
            ),
            add_pooling_layer=False,
        )
        self.bert.set_attn_implementation("sdpa")
        state = {key.removeprefix("bert."): t for key, t in encoder.state_dict().items() if key.startswith("bert.")}
        self.bert.load_state_dict(state)
        submodule(self.cls, "predictions.decoder", nn.Linear).weight = self.bert.embeddings.word_embeddings.weight

    def mlm_logits(self, hidden: Tensor) -> Tensor:
        logits: Tensor = self.cls["predictions"](hidden)
        return logits

    def encode_mixture(self, tokens: Tensor, kinds: Sequence[Sequences]) -> list[Tensor]:
        """As EncoderPass.encode_mixture; positives and the two kinds of negatives of a step apart."""
        return [self._encode_kind(tokens, kind) for kind in kinds]

    def _encode_kind(self, tokens: Tensor, kind: Sequences) -> Tensor:
        captions = kind.captions
        assert captions is not None, "the published code has no vision-only pass"
        ids, lengths = self._framed(captions)
        rows = torch.arange(len(captions)) if kind.caption_index is None else kind.caption_index
        states = []
        for part in torch.arange(len(rows)).chunk(3 if kind.caption_index is not None else 1):
            images = None if kind.image_index is None else tokens[kind.image_index[part].to(tokens.device)]
            states.append(self._forward(ids[rows[part]], lengths[rows[part]], images))
        if kind.wanted_pieces is None:
            return torch.cat([hidden[:, 0] for hidden in states])
        mask = nn.utils.rnn.pad_sequence(kind.wanted_pieces.split(captions.lengths.tolist()), batch_first=True)
        return states[0][:, 1 : 1 + mask.shape[1]][mask.to(tokens.device)]

    def _framed(self, captions: CaptionIds) -> tuple[Tensor, Tensor]:
        """`[CLS] caption [SEP]`, padded to the longest, [C, longest + 2], and the lengths [C]."""
        padded = nn.utils.rnn.pad_sequence(captions.ids.split(captions.lengths.tolist()), batch_first=True)
        ids = nn.functional.pad(padded, (1, 1))
        ids[:, 0] = self.special.cls_id
        ids[torch.arange(len(ids)), captions.lengths + 1] = self.special.sep_id
        return ids, captions.lengths + 2

    def _forward(self, ids: Tensor, lengths: Tensor, images: Tensor | None) -> Tensor:
        """[Q, longest, H] last states: captions [Q, longest caption] are padded, vision tokens follow."""
        device = self.bert.device
        ids, lengths = ids.to(device), lengths.to(device)
        embedded = self.bert.embeddings.word_embeddings(ids)
        position = torch.arange(ids.shape[1], device=device)
        mask, positions = position < lengths[:, None], position.expand(len(ids), -1)
        segments = torch.zeros_like(ids)
        if images is not None:
            sep = self.bert.embeddings.word_embeddings(ids.new_tensor([self.special.sep_id]))
            vision = torch.cat([images.to(embedded.dtype), sep.expand(len(ids), 1, -1)], dim=1)
            embedded = torch.cat([embedded, vision], dim=1)
            mask = torch.cat([mask, mask.new_ones(vision.shape[:2])], dim=1)
            positions = torch.cat([positions, lengths[:, None] + torch.arange(vision.shape[1], device=device)], dim=1)
            segments = torch.cat([segments, segments.new_ones(vision.shape[:2])], dim=1)
        states: Tensor = self.bert(
            inputs_embeds=embedded, attention_mask=mask.long(), token_type_ids=segments, position_ids=positions
        ).last_hidden_state
        return states


def _config(
    folder: Path, device: torch.device, batch_size: int, layers: int, tokens: int, negatives: list[str]
) -> RunConfig:
    path = folder / "config.yaml"
    path.write_text(
        f"""
        output: {folder / "run"}
        data: {{store: {folder / "tokens"}, caption_store: {folder / "captions"}, num_workers: {_workers(device)}}}
        model:
          adapter: {{num_tokens: {tokens}}}
          encoder: {{num_layers: {layers}}}
        objectives: {{itm: 1.0, mlm: 1.0, text_recovery: 1.0}}
        training: {{steps: 1000000, batch_size: {batch_size}}}
        """
    )
    return load_config(path, negatives)


def _workers(device: torch.device) -> int:
    return 6 if device.type == "cuda" else 0


def _write_data(folder: Path, num_images: int) -> CaptionDataset:
    """Random patch tokens and embeddings, and captions of made-up words."""
    stream = np.random.default_rng(0)
    words = [f"{a}{b}{c}" for a in "bdfgklmnprst" for b in "aeiou" for c in "bdfgklmnprst"]
    captions = [
        " ".join(stream.choice(words, stream.integers(*CAPTION_WORDS, endpoint=True))) for _ in range(num_images)
    ]
    images = [f"{i}.jpg" for i in range(num_images)]
    for name, keys, shape in (("tokens", images, (PATCHES, PATCH_WIDTH)), ("captions", captions, (0, 0))):
        writer = TokenStoreWriter(folder / name, keys, *shape, EMBEDDING_WIDTH, "float16", "random")
        for shard in writer.missing_shards():
            count = len(writer.shard_ids(shard))
            embeddings = torch.nn.functional.normalize(torch.randn(count, EMBEDDING_WIDTH), dim=-1)
            writer.write_shard(shard, torch.randn(count, *shape).half(), embeddings)
        writer.finish()
    return CaptionDataset(folder, images, captions, np.arange(num_images), [None] * num_images)
