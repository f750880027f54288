"""Copy a run's newest checkpoint into a directory to share: half the bytes, a model card, no optimizer state.

python scripts/export_checkpoint.py runs/demo/pretrained/7_relations --out configs/pretrained/scenes \
    --backbone-pretrained ../../embedders/scenes-vit
python scripts/export_checkpoint.py runs/NAME --out shared/NAME --push OWNER/NAME

Fine-tuning starts from it (model.init_from=DIR) and Reranker.from_pretrained loads it. Weights are rounded to float16;
whoever loads them computes in float32 as before. Tokens stored with the run's own weights are refused by the copy's
fingerprint: index again. The card (README.md) has the tables of the run's evaluations of this very checkpoint
(RUN/results.json, RUN/evaluation-*/results.json, or --results), and what the run's configuration says of its data.

A backbone directory that is shared beside the copy is named by its path from --out, starting with ./ or ../: both then
load from any working directory.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from huggingface_hub import EvalResult

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from evaluation.figures import EvaluationRecord, read_results
from evaluation.metrics import RECALL_DEPTHS
from evaluation.model_record import annotation_files, read_run_config, run_directory
from evaluation.tables import COLUMN_TITLES, DIRECTION_TITLES
from models.checkpoints.checkpoint import (
    is_relative_to_checkpoint,
    located_from,
    read_checkpoint,
    weights_fingerprint,
    write_checkpoint,
)
from models.checkpoints.hub import locate_checkpoint, upload_checkpoint
from models.checkpoints.model_card import LICENSE, PIPELINE_TAG, model_card
from models.config import BackboneConfig
from models.errors import UserError, run_entry_point
from models.state_dicts import half_precision
from scripts.results_table import table

_NO_NAME = re.compile(r"[^A-Za-z0-9_.]+")
"""What no name on the Hub may contain."""


def export_checkpoint(
    source: Path,
    out: Path,
    backbone_pretrained: str = "",
    token_pretrained: str = "",
    results: Sequence[Path] = (),
    name: str = "",
    license: str | None = LICENSE,
    backbone_name: str = "",
) -> Path:
    """Write `out` from the checkpoint or run `source`; returns the checkpoint directory that was read.

    name: what the card calls it, by default the name of `out`. Raises UserError naming the first weight that float16
    cannot hold, or given results of another checkpoint, before anything is written."""
    checkpoint = locate_checkpoint(source)
    run = run_directory(str(source), checkpoint)
    config, state, tokenizer = read_checkpoint(checkpoint)
    half = half_precision(state)
    for key, tensor in half.items():
        if not torch.isfinite(tensor).all():
            raise UserError(f"{checkpoint}: {key} has values that float16 cannot hold; it cannot be exported")
    backbone = _renamed(config.backbone, backbone_name, backbone_pretrained, token_pretrained, out)
    config = replace(config, backbone=backbone)
    records = _measured(results or _results_of(run, checkpoint), checkpoint)
    datasets, base_models = _origin(run)
    card = model_card(
        config,
        name or out.name,
        _tables(records),
        datasets=datasets,
        base_models=base_models,
        weights=weights_fingerprint(half),
        license=license,
        results=[result for record in records for result in _hub_results(record)],
    )
    write_checkpoint(out, config, half, tokenizer, card)
    return checkpoint


def _renamed(backbone: BackboneConfig, name: str, pretrained: str, token_pretrained: str, out: Path) -> BackboneConfig:
    """The backbone under the names that are given; a new `name` comes with its own `pretrained`, or none.

    Raises UserError for a path from `out` that leads to nothing."""
    for named in (name, pretrained, token_pretrained):
        located = Path(located_from(out, named))
        if is_relative_to_checkpoint(named) and not located.exists():
            raise UserError(f"{named}: no such file or directory as seen from {out}; name the path from there")
    return replace(
        backbone,
        name=name or backbone.name,
        pretrained=pretrained or ("" if name else backbone.pretrained),
        token_pretrained=token_pretrained or backbone.token_pretrained,
    )


def _results_of(run: Path, checkpoint: Path) -> list[Path]:
    """The run's evaluations of this very checkpoint; those of an earlier one are not its figures."""
    found = [run / "results.json", *sorted(run.glob("evaluation-*/results.json"))]
    return [path for path in found if path.is_file() and _is_of(read_results(path), checkpoint)]


def _is_of(record: EvaluationRecord, checkpoint: Path) -> bool:
    # By the step directory's name: the path was written as the evaluation was given it, maybe on another machine.
    return Path(record.checkpoint).name == checkpoint.name


def _measured(files: Sequence[Path], checkpoint: Path) -> list[EvaluationRecord]:
    """The evaluations; the data set by its file's name, without this machine's folders."""
    records = []
    for file in files:
        record = read_results(file)
        if not _is_of(record, checkpoint):
            raise UserError(f"{file}: measured {record.checkpoint}, not {checkpoint}; evaluate this checkpoint")
        records.append(replace(record, dataset=Path(record.dataset).name))
    return records


def _tables(records: Sequence[EvaluationRecord]) -> list[str]:
    tables = [table([record], with_subsets=False) for record in records]
    return tables and [*tables, "Measured with the run's own weights, before they were rounded to float16."]


def _hub_results(record: EvaluationRecord) -> list[EvalResult]:
    """Every recall as an entry of the Hub's model index, in percent."""
    name = Path(record.dataset).stem.removeprefix("dataset_")
    return [
        EvalResult(
            task_type=PIPELINE_TAG,
            task_name=f"{DIRECTION_TITLES[direction]} reranking, k = {record.k}",
            dataset_type=_NO_NAME.sub("-", name).strip("-.").lower(),
            dataset_name=name,
            dataset_split=record.split,
            metric_type="recall",
            metric_name=f"R@{depth}, {COLUMN_TITLES[column]}",
            metric_value=round(figures.metrics[f"R@{depth}"], 2),
        )
        for direction, part in record.figures.directions().items()
        for column, figures in part.columns.items()
        for depth in RECALL_DEPTHS
        if f"R@{depth}" in figures.metrics
    ]


def _origin(run: Path) -> tuple[list[str], list[str]]:
    """Data and language model of the run's configuration, as far as they have names that others know."""
    config = read_run_config(run)
    weights = (config.get("model") or {}).get("encoder_weights") or ""
    datasets = [_NO_NAME.sub("-", Path(file).stem).strip("-.") for file in annotation_files(config)]
    on_hub = re.fullmatch(r"[\w.-]+/[\w.-]+", weights) and not Path(weights).exists()
    return datasets, [weights] if on_hub else []


def parse_arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path, metavar="RUN_OR_CHECKPOINT")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="checkpoint directory to write")
    parser.add_argument("--backbone-name", default="", help="the backbone's name in the copy's config.yaml")
    parser.add_argument("--backbone-pretrained", default="", help="its weights or directory there")
    parser.add_argument("--token-pretrained", default="", help="the same for the model of its patch tokens")
    parser.add_argument("--results", type=Path, nargs="+", default=[], metavar="FILE", help="results.json for the card")
    parser.add_argument(
        "--license", default=LICENSE, help=f"of the weights, on the card (default: {LICENSE}; '': none)"
    )
    parser.add_argument("--push", default="", metavar="OWNER/NAME", help="upload the directory to this repository")
    parser.add_argument("--private", action="store_true", help="with --push: a repository that only you see")
    return parser.parse_args(argv)


def main() -> None:
    args = parse_arguments()
    source = export_checkpoint(
        args.source,
        args.out,
        args.backbone_pretrained,
        args.token_pretrained,
        args.results,
        args.push,
        args.license or None,
        args.backbone_name,
    )
    print(f"{args.out}: float16 copy of {source}")
    if args.push:
        print(upload_checkpoint(args.out, args.push, private=args.private or None))


if __name__ == "__main__":
    run_entry_point(main)
