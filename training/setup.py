"""Builds the parts of a run from its configuration: data, features, model, teacher.

Letters: P patch tokens, Dv patch width, De embedding width.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from operator import attrgetter
from pathlib import Path

import torch

from data.annotation_files import open_annotations
from data.batches import BatchPlan, TrainingBatches
from data.caption_datasets import CaptionDataset, load_annotations, read_field
from data.huggingface_datasets import annotation_path
from data.neighbours import CaptionKeys
from data.webdataset_shards import load_shards
from models.config import FORMER_ADAPTER_KEYS, EDJEConfig, EncoderConfig, check_backbone
from models.distributed import DistributedContext
from models.edje import EDJE
from models.errors import UserError
from models.files import make_directory
from models.language.captions import CaptionTokenizer, build_vocabulary
from models.language.pretrained import read_bert_config
from models.state_dicts import load_state
from models.vision.backbones import is_transformers_directory

from .config import DataConfig, NegativesConfig, RunConfig
from .features import Embeddings, Features
from .negatives import negatives_strategy

log = logging.getLogger("edje")


def load_training_split(config: RunConfig, distributed: DistributedContext) -> CaptionDataset:
    """The images and captions to train on."""
    data = config.data
    if not data.root or not (data.annotation_files or data.shards):
        raise UserError("data.root and data.annotations are needed; e.g. data.root=DIR on the command line")
    if data.shards:
        cache = data.cache or Path(config.output) / "cache"
        with distributed.main_first():
            return load_shards(data.shards, data.root, cache, data.num_workers)
    with distributed.main_first() if data.cache else nullcontext():
        return load_annotations(
            data.annotation_files,
            data.root,
            data.train_split,
            cache=data.cache or None,
            columns=data.columns,
            val_share=data.val_share,
            lenient=True,
        )


def load_validation_split(config: RunConfig) -> CaptionDataset | None:
    """The images and captions that training evaluates on, None where data.val_split is empty."""
    data = config.data
    if not data.val_split:
        return None
    if data.val_annotations:
        file = annotation_path(data.root, data.val_annotations)
        return load_annotations(file, data.root, data.val_split, columns=data.columns)
    whole = [] if data.val_share else [str(file) for file in data.annotation_files if _is_one_split(file, data)]
    if whole or not data.annotation_files:
        raise UserError(
            f"data.val_split is {data.val_split!r}, but {whole[0] if whole else 'data.shards'} is what is trained on; "
            "name another file in data.val_annotations, hold out a part by data.val_share=0.05, or leave "
            "data.val_split empty"
        )
    return load_annotations(
        data.annotation_files,
        data.root,
        data.val_split,
        columns=data.columns,
        val_share=data.val_share,
        lenient=bool(data.val_share),  # a part of what is trained on: a bad row of it stops no run
    )


def _is_one_split(file: Path, data: DataConfig) -> bool:
    return not open_annotations(file, data.columns, Path(data.root)).has_splits


def build_model(
    config: RunConfig, features: Features, dataset: CaptionDataset, distributed: DistributedContext
) -> EDJE:
    """The model to train: from a checkpoint (`init_from`), on pretrained BERT weights, or from scratch.

    The same on every rank: initial weights come from config.seed."""
    torch.manual_seed(config.seed)
    if config.model.init_from:
        return _from_checkpoint(config, features)
    weights = config.model.encoder_weights
    if weights:
        tokenizer = CaptionTokenizer.from_pretrained(weights)
        brought = read_bert_config(weights)
        refuse_contradictions(config, {"model.encoder": brought}, weights)
        encoder = replace(
            brought,
            hidden_dropout=config.model.encoder.hidden_dropout,
            attention_dropout=config.model.encoder.attention_dropout,
        )
    else:
        tokenizer = _tokenizer_of_captions(config, dataset, distributed)
        encoder = replace(config.model.encoder, vocab_size=tokenizer.vocab_size)
    model_config = _model_config(config, features, encoder)
    longest = model_config.max_caption_tokens + model_config.num_vision_tokens
    encoder = replace(encoder, max_positions=max(encoder.max_positions, longest, _given_positions(config)))
    model = EDJE(replace(model_config, encoder=encoder), tokenizer)
    if weights:
        missing = model.encoder.load_bert(weights)
        if missing and config.objectives.mlm and distributed.is_main:
            log.warning("%s has no %s: these start at random", weights, ", ".join(missing))
    return model


def _model_config(config: RunConfig, features: Features, encoder: EncoderConfig) -> EDJEConfig:
    backbone = config.backbone
    return EDJEConfig(
        backbone=replace(
            backbone,
            name=_located(backbone.name) if is_transformers_directory(backbone.name) else backbone.name,
            pretrained=_located(backbone.pretrained),
            token_pretrained=_located(backbone.token_pretrained),
        ),
        dims=features.dims,
        backbone_fingerprint=features.fingerprint,
        adapter=config.model.adapter,
        encoder=encoder,
        max_caption_tokens=config.model.max_caption_tokens,
        residual_similarity=config.model.residual_similarity,
    )


def _located(pretrained: str) -> str:
    """A checkpoint names its backbone from wherever it is loaded: a directory by its absolute path."""
    return str(Path(pretrained).resolve()) if pretrained and Path(pretrained).exists() else pretrained


def _tokenizer_of_captions(
    config: RunConfig, dataset: CaptionDataset, distributed: DistributedContext
) -> CaptionTokenizer:
    path = Path(config.output) / "vocab.txt"
    if distributed.is_main:
        make_directory(path.parent)
        build_vocabulary(dataset.captions, path)
    distributed.barrier()
    return CaptionTokenizer.from_pretrained(path)


def _from_checkpoint(config: RunConfig, features: Features) -> EDJE:
    """All weights of a checkpoint, or all but its adapter; positions grow where the new adapter has more tokens."""
    source = EDJE.from_pretrained(config.model.init_from)
    check_backbone(source.config, features, config.model.init_from)
    brought: dict[str, object] = {"model.encoder": source.config.encoder, "model": source.config}
    if config.model.init_adapter:
        brought["model.adapter"] = source.config.adapter
    refuse_contradictions(config, brought, config.model.init_from)
    adapter = source.config.adapter if config.model.init_adapter else config.model.adapter
    named = _model_config(config, features, source.config.encoder)
    model_config = replace(
        source.config,
        adapter=adapter,
        backbone=named.backbone,
        backbone_fingerprint=named.backbone_fingerprint,
        residual_similarity=source.config.residual_similarity or named.residual_similarity,
        fusion_lambda=None,
        fusion_split="",
        probability_scale=None,
        probability_offset=None,
    )
    rows = max(model_config.max_caption_tokens + model_config.num_vision_tokens, _given_positions(config))
    source.encoder.extend_positions(rows)
    encoder = replace(
        source.encoder.config,
        hidden_dropout=config.model.encoder.hidden_dropout,
        attention_dropout=config.model.encoder.attention_dropout,
    )
    model = EDJE(replace(model_config, encoder=encoder), source.tokenizer)
    fresh: list[str] = []
    if not config.model.init_adapter:
        fresh.append("adapter.")
    if not source.config.residual_similarity:
        fresh.append("similarity_log_weight")
    loaded = source.state_dict()
    state = {name: own if name.startswith(tuple(fresh)) else loaded[name] for name, own in model.state_dict().items()}
    load_state(model, state, where=config.model.init_from)
    return model


_OF_TRAINING = {"model.encoder.hidden_dropout", "model.encoder.attention_dropout", "model.encoder.max_positions"}
"""Encoder settings that hold for a run whatever its weights bring: a position table may be lengthened."""
_OF_CHECKPOINT = {"model.max_caption_tokens"}
"""Settings of `model` itself that a checkpoint keeps."""


def refuse_contradictions(config: RunConfig, brought: Mapping[str, object], where: str) -> None:
    """Raise UserError naming every key that was given and differs from what the weights of `where` were made with.

    brought: the weights' own configurations, by the section of the run's configuration that they overrule."""
    problems = []
    for key in sorted(config.given - _OF_TRAINING):
        section, _, name = key.rpartition(".")
        if section not in brought or (section == "model" and key not in _OF_CHECKPOINT):
            continue
        name = FORMER_ADAPTER_KEYS.get(name, name)
        values = attrgetter(section)(config), brought[section]
        if not all(hasattr(value, name) for value in values):  # adapters of two kinds
            problems.append(f"{key} is given for another kind of adapter than the checkpoint's")
            continue
        ours, theirs = (getattr(value, name) for value in values)
        if ours != theirs:
            problems.append(f"{key} is {ours}, the checkpoint's is {theirs}")
    if problems:
        raise UserError(f"{where}: {'; '.join(problems)}; drop the key, or start from other weights")


def _given_positions(config: RunConfig) -> int:
    """encoder.max_positions where it was asked for, else 0."""
    return config.model.encoder.max_positions if "model.encoder.max_positions" in config.given else 0


def load_teacher(config: RunConfig, features: Features, model: EDJE, distributed: DistributedContext) -> EDJE | None:
    """The frozen model whose logits are distilled, or None where none is configured."""
    if not config.objectives.teacher:
        return None
    teacher = EDJE.from_pretrained(config.objectives.teacher, distributed.device).requires_grad_(False)
    check_backbone(teacher.config, features, config.objectives.teacher)
    if teacher.tokenizer.vocab != model.tokenizer.vocab:
        raise UserError(
            f"{config.objectives.teacher}: the teacher's vocabulary is not the student's; use the same tokenizer"
        )
    return teacher


def build_batches(
    config: RunConfig,
    features: Features,
    retriever: Embeddings | None,
    dataset: CaptionDataset,
    keys: CaptionKeys,
    distributed: DistributedContext,
) -> TrainingBatches:
    """The run's batches: this rank's share of each global micro-batch."""
    accumulation = config.training.accumulation
    strategy = negatives_strategy(config.negatives, config.seed, distributed)
    own_rows = config.training.batch_size // accumulation // distributed.size
    if own_rows % strategy.rows_together:
        raise UserError(
            f"each of {distributed.size} processes has {own_rows} rows of a micro-batch, which negatives.group_size "
            f"({strategy.rows_together}) does not divide; change training.batch_size or the number of processes"
        )
    embeddings = retriever or features.embeddings
    neighbours = None
    if embeddings is not None:
        neighbours = strategy.neighbours(keys, dataset, embeddings, partial(_field_of_images, config, dataset))
    plan = BatchPlan(
        dataset,
        config.training.batch_size // accumulation,
        config.seed,
        neighbours,
        strategy.laid_out_group_size,
        partial(_random_share, config.negatives, accumulation),
    )
    return TrainingBatches(plan, features.rows(dataset), distributed.rank, distributed.size)


def _random_share(negatives: NegativesConfig, accumulation: int, number: int) -> float:
    return negatives.random_share(number // accumulation)


def _field_of_images(config: RunConfig, dataset: CaptionDataset, field: str) -> list[str | None]:
    """An annotation field that negatives.within names, for each image."""
    files = config.data.annotation_files
    of_files = zip(*(read_field(file, dataset, field) for file in files), strict=True)
    labels = [next((label for label in of_image if label is not None), None) for of_image in of_files]
    if not any(labels):
        raise UserError(f"{files[0]}: no image has the field {field!r} that negatives.within names")
    return labels
