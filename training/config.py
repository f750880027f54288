"""A run's whole configuration: frozen dataclasses, YAML files with `base:`, dotted overrides, validation.

    config = load_config("configs/emoji.yaml", ["data.root=DIR", "training.lr=1e-4"])

A key that does not exist, a value of the wrong type or an impossible combination is a UserError that names the key,
its file and the nearest valid key. Sizes are global: a file means the same on 1 and on 8 GPUs.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import yaml

from data.annotation_records import ColumnNames
from data.huggingface_datasets import annotation_path
from models.config import AdapterConfig, BackboneConfig, CompressionConfig, EncoderConfig
from models.config_io import from_dict, to_dict
from models.errors import UserError, one_line
from models.files import write_atomically
from models.precision import PRECISIONS

from .trackers import chosen_trackers


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The trained part: adapter, joint encoder, and what they start from."""

    adapter: AdapterConfig = field(default_factory=CompressionConfig)
    """From patch tokens [B, P, Dv] to vision tokens [B, m, H]. Settings that name a kind are for that kind alone."""
    encoder_weights: str = ""
    """BERT weights to start from: Hugging Face name, directory, or package:NAME/FOLDER of a pip package. Published:
    microsoft/MiniLM-L12-H384-uncased. Empty: `encoder` sizes, random weights, a vocabulary of the training captions."""
    encoder: EncoderConfig = field(default_factory=EncoderConfig)
    """Sizes of an encoder from scratch. Pretrained weights and checkpoints bring their own: a size that is given and
    differs is an error. Dropout rates are always taken from here, and position tables grow to what is given."""
    init_from: str = ""
    """EDJE checkpoint to start from (fine-tuning, or a compressed model from a local one). encoder_weights is then not
    read."""
    init_adapter: bool = True
    """With init_from: take its adapter too; settings of model.adapter that are given and differ are an error. False
    where the adapter is another one, e.g. compressed from local."""
    max_caption_tokens: int = 64
    """Tokens of a joint input beside the vision tokens. Published: 64. A checkpoint keeps its own."""
    residual_similarity: float = 0.0
    """match logit = w * first-stage cosine + head, the head starting at zero and w at this value (the embedder's logit
    scale, e.g. 100 for CLIP): training starts at the embedding's ranking. 0, the paper's: the head alone. Worth it only
    where the similarities on training images are no better than on others. With init_from, a checkpoint that has it
    keeps its weight; one without keeps its head, and starts from the sum."""


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """What training and validation read."""

    root: str = ""
    """Directory that the annotations' image paths are relative to."""
    annotations: str | tuple[str, ...] = ""
    """Annotation file of any layout in docs/data.md (Karpathy's or COCO's JSON, a list, CSV, JSON lines, parquet) or
    folder of pictures with .txt files, or a list of such that are read as one: an image that two of them name has the
    captions of both. Relative to `root` unless absolute; `.` is `root` itself. Or a Hugging Face dataset, alone: its
    folder, or hf:OWNER/NAME."""
    image_column: str = ""
    """Column of the image paths where it has an unusual name. Empty: image, filepath, file_name, filename, ..."""
    caption_column: str = ""
    """Column of the captions where it has an unusual name. Empty: caption, title, text, comment, ..."""
    split_column: str = ""
    """Column that says which split a row is of. Empty: `split`, where there is one."""
    val_share: float = 0.0
    """Of annotations that do not say their splits, the share of images that is `val_split`, chosen by a hash of their
    paths, so that none ever moves; training reads the others. 0: all of them are trained on."""
    val_annotations: str = ""
    """Annotation file of `val_split`. Empty: `annotations`, which must then hold several splits, as Karpathy's do."""
    train_split: str = "train"
    """Split to train on."""
    val_split: str = "val"
    """Split for evaluations during training and for the fusion's lambda; empty: none."""
    shards: str | tuple[str, ...] = ""
    """WebDataset tar shards (as img2dataset writes them) to train on instead of `annotations`: braces or a glob, e.g.
    cc12m/{00000..01242}.tar, or a list of such; relative to `root` unless absolute. YAML wants quotes around a brace at
    the start."""
    cache: str = ""
    """Folder for what is known of shards, and of lists of millions of pairs, as memory-mapped columns that are written
    once and shared by all processes. Empty: of shards, `cache` in `output`; lists are held in memory by every rank."""
    store: str = ""
    """Patch-token store of all splits (scripts/precompute_tokens.py). Empty: images, one backbone pass per step."""
    caption_store: str = ""
    """Store of the captions' text embeddings; goes with `store`."""
    num_workers: int = 0
    """Processes that read images or tokens ahead, for each rank."""
    max_unreadable: float = 0.01
    """Share of unreadable images in what was read so far at which a run stops; below it they are skipped and listed."""

    def __post_init__(self) -> None:
        if not 0 <= self.val_share < 1:
            raise UserError(f"data.val_share is {self.val_share}; it must be at least 0 and below 1")
        if self.val_share and self.val_annotations:
            raise UserError("data.val_share and data.val_annotations both say what is validated on; set one")
        if bool(self.store) != bool(self.caption_store):
            raise UserError("data.store and data.caption_store go together; set both or neither")
        if self.shards and (self.annotations or self.store):
            raise UserError(
                "data.shards stands for data.annotations and is read as images: leave data.annotations, data.store and "
                "data.caption_store empty (validation reads data.val_annotations)"
            )

    @property
    def columns(self) -> ColumnNames:
        """The columns that have unusual names."""
        return ColumnNames(self.image_column, self.caption_column, self.split_column)

    @property
    def annotation_files(self) -> list[Path]:
        """The files that `annotations` names."""
        names = (self.annotations,) if isinstance(self.annotations, str) else self.annotations
        return [annotation_path(self.root, name) for name in names if name]


@dataclass(frozen=True, kw_only=True)
class NegativesConfig:
    """Hard negatives: mined by the backbone's own similarity over the global batch (paper, training section)."""

    mode: str = "pairs"
    """`pairs`, the paper's: `per_positive` images and captions per positive. `groups`: `group_size` mutual neighbours,
    all pairs scored, cross-entropy over rows and columns: about half the pairs for as many negatives."""
    per_positive: int = 1
    """pairs: hard negatives per positive, in each direction. Published: 1."""
    sampled: bool = False
    """pairs: draw negatives in proportion to exp(similarity / temperature) instead of taking the hardest."""
    temperature: float = 0.05
    """pairs, sampled: temperature of the draw, in units of cosine."""
    group_size: int = 8
    """groups: members of a group."""
    pool: str = "batch"
    """groups: where neighbours come from: the global `batch`, or the whole `dataset` (needs data.store)."""
    neighbours: int = 32
    """groups from the data set: members are drawn from this many nearest images of the group's first."""
    within: str = ""
    """groups from the data set: annotation field that neighbours must share, e.g. `style`. Empty: any image."""
    random_start: float = 1.0
    """Share of negatives that are random at the first step. Hard ones alone leave ITM at chance."""
    random_end: float = 0.15
    """Share of random negatives after the curriculum."""
    store: str = ""
    """Token store of another retriever, by whose similarities negatives are mined instead of the backbone's own."""
    caption_store: str = ""
    """Store of that retriever's caption embeddings; goes with `store`."""
    random_steps: int = 0
    """Steps over which the share goes from start to end, linearly. 0: random_end from the first step."""

    def __post_init__(self) -> None:
        if self.mode not in ("pairs", "groups"):
            raise UserError(f"negatives.mode is {self.mode!r}; expected 'pairs' or 'groups'")
        if self.pool not in ("batch", "dataset"):
            raise UserError(f"negatives.pool is {self.pool!r}; expected 'batch' or 'dataset'")
        if self.mode == "groups" and self.group_size < 2:
            raise UserError(f"negatives.group_size is {self.group_size}; a group needs at least 2 members")
        if self.mode == "pairs" and self.per_positive < 1:
            raise UserError(f"negatives.per_positive is {self.per_positive}; it must be at least 1")
        if bool(self.store) != bool(self.caption_store):
            raise UserError("negatives.store and negatives.caption_store go together; set both or neither")
        if self.mode == "pairs" and self.pool == "dataset":
            raise UserError("negatives.pool is 'dataset', which only negatives.mode 'groups' has; use 'batch'")

    def random_share(self, step: int) -> float:
        """Share of random negatives at `step` (0-based)."""
        progress = min(1.0, step / self.random_steps) if self.random_steps else 1.0
        return self.random_start + progress * (self.random_end - self.random_start)


@dataclass(frozen=True, kw_only=True)
class ObjectivesConfig:
    """Weights of the losses; 0 leaves an objective, and its forward pass, out. Paper: 1 each, ITC 0."""

    itm: float = 1.0
    """Image-text matching: the match logit tells a caption's image from hard negatives."""
    mlm: float = 1.0
    """Masked language modelling of the caption, given the image."""
    mlm_probability: float = 0.5
    """Share of a caption's tokens that is masked. Published: 0.5."""
    mlm_words: tuple[tuple[str, ...], ...] = ()
    """Groups of words, such as colours or relations: of each caption only the words of one group that occurs in it are
    masked, each with mlm_probability (1 hides all of them). What is left then names everything else, so the image must
    be asked which object has which colour, or stands where; random masks hide that, or let it be guessed."""
    text_recovery: float = 1.0
    """Text-embedding recovery: the joint encoder, given the caption alone, predicts the backbone's
    text embedding."""
    itc: float = 0.0
    """Image-text contrast between a vision-only and a text-only pass."""
    altered_captions: float = 0.0
    """An image's own caption against the same caption made false in a word or two (training/altered_captions.py)."""
    altered_words: tuple[tuple[tuple[str, ...], ...], ...] = ()
    """For altered_captions: groups of meanings that exclude one another, each the words that say it, such as
    [[[left], [right]], [[above, over], [below, under]]]. Words of different meanings in a caption change places, or one
    becomes a word of another meaning; of each caption, the words of one group that occurs in it."""
    align_steps: int = 0
    """First steps without ITM and distillation: an alignment stage by contrast, MLM and altered captions, where ITM
    stays at chance."""
    distillation: float = 0.0
    """The teacher's match logits as targets; see `teacher`."""
    teacher: str = ""
    """Checkpoint of the local model whose logits are distilled; goes with a distillation weight above 0."""

    @property
    def weights(self) -> dict[str, float]:
        """The weights that are not 0, by objective."""
        names = ("itm", "mlm", "text_recovery", "itc", "altered_captions", "distillation")
        return {name: getattr(self, name) for name in names if getattr(self, name)}

    def __post_init__(self) -> None:
        if self.align_steps and not (self.itc or self.mlm or self.text_recovery or self.altered_captions):
            raise UserError(
                f"objectives.align_steps is {self.align_steps}, but itc, mlm, text_recovery and altered_captions are "
                "all 0: nothing would be trained in these steps"
            )
        if bool(self.altered_words) != (self.altered_captions > 0):
            raise UserError(
                f"objectives.altered_captions is {self.altered_captions} and objectives.altered_words "
                f"{list(self.altered_words)}; words go with a weight above 0, and no words with 0"
            )
        if bool(self.teacher) != (self.distillation > 0):
            raise UserError(
                f"objectives.distillation is {self.distillation} and objectives.teacher {self.teacher!r}; "
                "a teacher goes with a weight above 0, and no teacher with 0"
            )


@dataclass(frozen=True, kw_only=True)
class TrainingConfig:
    """How a run trains."""

    steps: int = 1000
    """Optimizer steps."""
    batch_size: int = 256
    """Image-caption pairs per optimizer step, over all ranks. Published: 32 on each of 8 GPUs."""
    accumulation: int = 1
    """Micro-batches per optimizer step; negatives are mined within a micro-batch, over all ranks."""
    lr: float = 3e-4
    """Peak learning rate. Published: 3e-4 in pretraining, 2e-5 in fine-tuning."""
    encoder_lr: float | None = None
    """Peak learning rate of the joint encoder, where it should differ from `lr`."""
    warmup_steps: int = 100
    """Steps of linear warm-up from warmup_lr to the peak."""
    warmup_lr: float = 1e-6
    """Learning rate that warm-up starts from."""
    decay: str = "cosine"
    """`cosine` to min_lr at the last step; or, published, `exponential`: times decay_rate per epoch, down to min_lr."""
    decay_rate: float = 0.9
    """`exponential`: factor per epoch. Published: 0.9."""
    min_lr: float = 1e-6
    """Learning rate that the decay ends at."""
    weight_decay: float = 0.05
    """AdamW, matrices only: norms, biases and single vectors do not decay."""
    clip_norm: float = 1.0
    """Gradient norm above which gradients are scaled down; 0: never."""
    freeze_adapter: bool = False
    """Keep the adapter, and so every stored token, as it is."""
    precision: str = "auto"
    """`auto`: bfloat16 autocast where the device is faster with it; `float32`; `bfloat16`."""
    resume: str = "auto"
    """`auto`: continue after the last checkpoint in `output`; `never`: refuse to start over one."""
    log_every: int = 10
    """Steps between lines of the log and of metrics.jsonl."""
    report_to: str | tuple[str, ...] = "none"
    """Where the curves of metrics.jsonl go too: `none`, `tensorboard`, `wandb`, `trackio`, or a list of these. Each is
    an extra of the same name."""
    evaluate_every: int = 0
    """Steps between evaluations on data.val_split; 0: only at the end."""
    checkpoint_every: int = 500
    """Steps between checkpoints to resume from."""
    keep_checkpoints: int = 2
    """Checkpoints to keep; older ones are deleted."""

    @property
    def trackers(self) -> tuple[str, ...]:
        """What report_to names, each once."""
        return chosen_trackers(self.report_to)

    def __post_init__(self) -> None:
        chosen_trackers(self.report_to)
        allowed = {
            "decay": ("cosine", "exponential"),
            "precision": PRECISIONS,
            "resume": ("auto", "never"),
        }
        for key, values in allowed.items():
            if getattr(self, key) not in values:
                raise UserError(f"training.{key} is {getattr(self, key)!r}; expected one of {', '.join(values)}")
        for key in ("steps", "batch_size", "accumulation", "log_every", "checkpoint_every", "keep_checkpoints"):
            if getattr(self, key) < 1:
                raise UserError(f"training.{key} is {getattr(self, key)}; it must be at least 1")
        if self.batch_size % self.accumulation:
            raise UserError(
                f"training.batch_size is {self.batch_size}; it must be a multiple of "
                f"training.accumulation ({self.accumulation})"
            )


@dataclass(frozen=True, kw_only=True)
class EvaluationConfig:
    """Evaluations during training and at its end, on data.val_split."""

    k: int = 10
    """Rerank pool: the embedding's first k candidates per query. Published: 10."""


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """One run: what `train.py --config FILE` reads and saves beside its results."""

    output: str = "runs/run"
    """Directory of the run: config.yaml, metrics.jsonl, checkpoints/, and the files of training.report_to."""
    seed: int = 42
    """Of initial weights, data order, masks and negatives."""
    device: str = "auto"
    """`auto`: a GPU if there is one, else the CPU; or a torch device, e.g. `cpu`."""
    backbone: BackboneConfig = field(default_factory=BackboneConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    negatives: NegativesConfig = field(default_factory=NegativesConfig)
    objectives: ObjectivesConfig = field(default_factory=ObjectivesConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    given: frozenset[str] = field(default=frozenset(), compare=False, metadata={"saved": False})
    """Keys such as `model.adapter.num_tokens` that a file, its `base:` or the command line set, and no default did."""

    def __post_init__(self) -> None:
        if not self.objectives.weights:
            raise UserError("the weights of all objectives are 0: nothing would be trained; raise one of objectives.*")
        micro_batch = self.training.batch_size // self.training.accumulation
        if self.negatives.mode == "groups" and micro_batch % self.negatives.group_size:
            raise UserError(
                f"training.batch_size / training.accumulation is {micro_batch}; it must be a multiple of "
                f"negatives.group_size ({self.negatives.group_size})"
            )
        if self.negatives.mode == "pairs" and self.negatives.per_positive >= micro_batch:
            raise UserError(
                f"negatives.per_positive is {self.negatives.per_positive}; it must be below "
                f"training.batch_size / training.accumulation ({micro_batch}), the pool that it is drawn from"
            )
        if self.negatives.pool == "dataset" and not (self.data.store or self.negatives.store):
            raise UserError(
                "negatives.pool is 'dataset', which needs the embeddings of data.store or of negatives.store; set one "
                "or use 'batch'"
            )


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> RunConfig:
    """Read a YAML file, what it inherits through `base:`, and `key.path=value` overrides; validate the whole.

    Raises UserError naming the file and the key."""
    data = read_with_base(Path(path))
    for override in overrides:
        _apply_override(data, override)
    return replace(from_dict(RunConfig, data, where=str(path)), given=frozenset(_leaf_keys(data)))


def _leaf_keys(data: dict[str, Any], prefix: str = "") -> Iterator[str]:
    for key, value in data.items():
        if isinstance(value, dict):
            yield from _leaf_keys(value, f"{prefix}{key}.")
        else:
            yield prefix + key


def save_config(config: RunConfig, path: Path) -> None:
    """Write the resolved configuration, atomically."""
    write_atomically(path, yaml.safe_dump(to_dict(config), sort_keys=False))


def read_with_base(path: Path, seen: tuple[Path, ...] = (), inherit: bool = True) -> dict[str, Any]:
    """The keys of a YAML file, over those of the file that its `base:` names, unless `inherit` is False."""
    if path.resolve() in seen:
        raise UserError(f"{path}: `base:` leads back to this file")
    try:
        data = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    except UnicodeDecodeError:
        raise UserError(f"{path}: not a text file; give the path of a YAML file") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); give the path of a YAML file") from error
    except yaml.YAMLError as error:
        raise UserError(f"{path}: not YAML: {one_line(error)}") from error
    if not isinstance(data, dict):
        raise UserError(f"{path}: holds {type(data).__name__}; expected a mapping of keys to values")
    base = data.pop("base", None) if inherit else None
    if base is None:
        return data
    return merge(read_with_base(path.parent / base, (*seen, path.resolve())), data)


def merge(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    """`over` on top of `base`, key by key at every depth."""
    merged = dict(base)
    for key, value in over.items():
        both_mappings = isinstance(value, dict) and isinstance(merged.get(key), dict)
        merged[key] = merge(merged[key], value) if both_mappings else value
    return merged


def _apply_override(data: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise UserError(f"override {override!r}: expected key=value, e.g. training.lr=1e-4")
    *parents, last = key.split(".")
    for parent in parents:
        data = data.setdefault(parent, {})
        if not isinstance(data, dict):
            raise UserError(f"override {override!r}: '{parent}' holds a value, not keys")
    try:
        data[last] = yaml.safe_load(text) if text else ""
    except yaml.YAMLError as error:
        raise UserError(f"override {override!r}: the value is not YAML") from error
