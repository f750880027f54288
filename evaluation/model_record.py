"""What results.json says about the model, so that a table can tell which row its figures belong to."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import yaml

from data.named_datasets import NAMED_DATASETS
from models.checkpoints.checkpoint import CONFIG_FILE
from models.edje import EDJE

from .json_fields import Fields

SETTINGS = ("zero-shot", "fine-tuned")
"""Trained on no file of the evaluated data set, or on one."""


@dataclass(frozen=True, kw_only=True)
class ModelRecord:
    """The entry `model` of results.json."""

    backbone: str
    """As its configuration names it; of a path on this machine the last part."""
    pretrained: str
    """A tag, or the last part of a path, so that the file can be shared."""
    adapter: str
    vision_tokens: int
    bytes_per_image: int
    """Of float16 tokens."""
    joint_encoder: str = ""
    """Weights that training started from; empty where no config of the run's line names them."""
    joint_layers: int
    joint_width: int
    joint_parameters: int
    residual_similarity: float = 0.0
    """Weight of the first stage's cosine in the match logit."""
    trained_on: list[str] = field(default_factory=list)
    """Annotation files of the run and of those that it started from, newest first, where their configs are known."""
    setting: str
    """One of SETTINGS, or `unknown`."""

    def to_json(self) -> dict[str, object]:
        return asdict(self)

    @classmethod
    def from_json(cls, fields: Fields) -> ModelRecord:
        """Raises UserError naming the field that is missing or of another kind."""
        return cls(
            backbone=fields.text("backbone"),
            pretrained=fields.text("pretrained"),
            adapter=fields.text("adapter"),
            vision_tokens=fields.whole("vision_tokens"),
            bytes_per_image=fields.whole("bytes_per_image"),
            joint_encoder=fields.text("joint_encoder") if "joint_encoder" in fields else "",
            joint_layers=fields.whole("joint_layers"),
            joint_width=fields.whole("joint_width"),
            joint_parameters=fields.whole("joint_parameters"),
            residual_similarity=fields.number("residual_similarity") if "residual_similarity" in fields else 0.0,
            trained_on=fields.texts("trained_on") if "trained_on" in fields else [],
            setting=fields.text("setting"),
        )


def model_record(model: EDJE, run: Path, dataset: str, setting: str | None = None) -> ModelRecord:
    """What there is to say about a model evaluated on `dataset`, the name in results.json.

    run: the directory that the checkpoint belongs to. Where a config of the run's line is lost, none of the known files
    is of the data set and `setting` is not given, the setting is `unknown`."""
    config, runs = model.config, _run_configs(run)
    files = [Path(file).name for run in runs for file in annotation_files(run)]
    if setting is None and benchmark_name(dataset) in map(benchmark_name, files):
        setting = "fine-tuned"
    elif setting is None and all(map(annotation_files, runs)):
        setting = "zero-shot"
    width = config.encoder.hidden_size
    return ModelRecord(
        backbone=_shared_name(config.backbone.name),
        pretrained=Path(config.backbone.pretrained).name,
        adapter=config.adapter.kind,
        vision_tokens=config.num_vision_tokens,
        bytes_per_image=config.num_vision_tokens * width * 2,
        joint_encoder=next((name for run in runs if (name := _section(run, "model").get("encoder_weights"))), ""),
        joint_layers=config.encoder.num_layers,
        joint_width=width,
        joint_parameters=sum(parameter.numel() for parameter in model.encoder.parameters()),
        residual_similarity=model.similarity_weight,
        trained_on=files,
        setting=setting or "unknown",
    )


def _shared_name(name: str) -> str:
    return Path(name).name if Path(name).is_absolute() else name


def benchmark_name(dataset: str) -> str:
    """`flickr30k` or `coco` where a data set's name or file says so, else the file's name."""
    name = Path(dataset).name
    return next((known for known in NAMED_DATASETS if known in name), name)


def run_directory(given: str | Path, checkpoint: Path) -> Path:
    """The run that a checkpoint belongs to: above `checkpoints/`, or what was given itself."""
    return checkpoint.parents[1] if checkpoint.parent.name == "checkpoints" else Path(given)


def read_run_config(run: Path) -> dict[str, Any]:
    """config.yaml of a training run; empty where there is none or it is a checkpoint's, which names no data."""
    try:
        config = yaml.safe_load((run / CONFIG_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError):
        return {}
    return config if isinstance(config, dict) and "data" in config else {}


def _run_configs(run: Path) -> list[dict[str, Any]]:
    """The run's config and those of the runs that it started from, newest first; the last is {} where it is lost."""
    configs, seen = [], set()
    while run.resolve() not in seen:
        seen.add(run.resolve())
        configs.append(read_run_config(run))
        start = _section(configs[-1], "model").get("init_from")
        if not start:
            break
        run = run_directory(start, Path(start))
    return configs


def annotation_files(config: dict[str, Any]) -> list[str]:
    """The files that a run's config.yaml names to train on, one or a list; none where it reads shards."""
    named = _section(config, "data").get("annotations") or []
    return [named] if isinstance(named, str) else named


def _section(config: dict[str, Any], name: str) -> dict[str, Any]:
    return config.get(name) or {}
