"""Evaluate a checkpoint's retrieval: embedding alone against EDJE, text to image and image to text.

What the run trained on:  python evaluation/evaluate_retrieval.py --checkpoint runs/demo --out runs/demo
Any Karpathy file:        python evaluation/evaluate_retrieval.py --checkpoint runs/emoji \\
                              --dataset emoji/dataset_emoji.json --data-root emoji --split test
Eight GPUs:               torchrun --nproc_per_node=8 evaluation/evaluate_retrieval.py --checkpoint runs/coco \\
                              --dataset flickr30k --data-root flickr30k
COCO 5-fold 1k:           the same with --dataset coco --data-root coco --folds 5
A checkpoint on the Hub:  python evaluation/evaluate_retrieval.py --checkpoint OWNER/NAME --dataset coco \\
                              --data-root coco --out runs/coco-of-name

Writes results.json, results.md, report.html, rankings.npz, and TREC run files with qrels (evaluation/trec.py). The
rankings do not depend on the number of processes.
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

from data.annotation_files import add_column_options, column_names, open_annotations
from data.annotation_records import USUAL_NAMES, ColumnNames
from data.caption_datasets import CaptionDataset, check_evaluation_rows, load_annotations
from data.huggingface_datasets import annotation_path, is_dataset
from data.named_datasets import NAMED_DATASETS
from evaluation.eccv import DEPTH, CocoIds, may_be_coco_test, read_coco_ids, with_extended_figures
from evaluation.figures import EvaluationRecord
from evaluation.model_record import SETTINGS, model_record, read_run_config, run_directory
from evaluation.output import evaluation_record, write_results
from evaluation.provenance import stamp
from evaluation.report.page import write_report
from evaluation.results import Results, with_fitted_scores
from evaluation.retrieval import check_pool, evaluate
from evaluation.tables import aligned, calibration_rows, markdown_table, protocol
from models.checkpoints.checkpoint import CONFIG_FILE, write_fusion
from models.checkpoints.hub import locate_checkpoint
from models.config import BackboneConfig
from models.distributed import DistributedContext, process_group
from models.edje import EDJE
from models.errors import UserError, run_entry_point
from models.files import make_directory
from models.precision import PRECISIONS, dtype_name, resolve_precision
from models.stores.token_store import TokenStore
from models.vision.backbones import Backbone


@dataclass(frozen=True)
class Source:
    """The data to evaluate on."""

    name: str
    """What results.json calls it."""
    annotations: Path | None
    """None: a named data set, which finds its own files under `root`."""
    root: Path
    store: str = ""
    caption_store: str = ""
    columns: ColumnNames = USUAL_NAMES
    val_share: float = 0.0

    @property
    def label(self) -> str:
        """What the folder of its results is called."""
        return self.annotations.stem.replace(":", "-") if self.annotations else self.name  # no colon on Windows

    def file(self, split: str) -> Path:
        """The annotation file that holds a split."""
        return self.annotations or NAMED_DATASETS[self.name].annotations(self.root, split)

    def load(self, split: str) -> CaptionDataset:
        """One split; image files are looked for unless a store stands for them."""
        if self.annotations is None:
            dataset = NAMED_DATASETS[self.name].load(self.root, split, check_images=not self.store)
        else:
            dataset = load_annotations(
                self.annotations,
                self.root,
                split,
                check_images=not self.store,
                columns=self.columns,
                val_share=self.val_share,
            )
        check_evaluation_rows(self.file(split), self.columns, self.root, split)
        return dataset

    def is_one_split(self) -> bool:
        """Whether nothing divides its file into splits."""
        if self.annotations is None or self.val_share:
            return False
        return not open_annotations(self.annotations, self.columns, self.root).has_splits


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--checkpoint", required=True, help="directory, run (its latest checkpoint), or OWNER/NAME on the Hub"
    )
    parser.add_argument("--revision", help="branch, tag or commit, of a checkpoint on the Hub")
    parser.add_argument(
        "--dataset", help="flickr30k, coco, an annotation file or a folder (docs/data.md); default: the run's own data"
    )
    add_column_options(parser)
    parser.add_argument("--data-root", help="folder that the annotations' image paths start from")
    parser.add_argument("--split", default="test", help="split to evaluate (default: test)")
    parser.add_argument("--k", type=int, default=10, help="candidates reranked per query (default: 10)")
    parser.add_argument(
        "--folds",
        type=int,
        default=1,
        help="equal parts of the images, each its own gallery, figures averaged; 5 on COCO's test split: 5-fold 1k",
    )
    parser.add_argument(
        "--eccv",
        action="store_true",
        help="insist on mAP@R and R-Precision by COCO's extended ground truth (evaluation/eccv.py), which come by "
        "themselves with COCO's 5k test split where the package eccv-caption is installed",
    )
    parser.add_argument("--store", help="token store to read instead of images: patch tokens, or this checkpoint's own")
    parser.add_argument(
        "--caption-store", help="store of the captions' text embeddings; with --store: no backbone runs"
    )
    parser.add_argument("--backbone", help="directory or file with the backbone's weights, where they moved")
    parser.add_argument(
        "--lambda-split",
        help="choose the fused score's lambda on this split, another than --split, fit the two numbers that turn the "
        "score into a probability there, and save all three in the checkpoint",
    )
    parser.add_argument(
        "--out", help="directory of the results (default: evaluation-DATASET-SPLIT beside the checkpoint)"
    )
    parser.add_argument(
        "--setting",
        choices=SETTINGS,
        help="for results.json, where the config.yaml of the checkpoint's run does not tell what it was trained on",
    )
    parser.add_argument("--device", default="auto", help="cpu, cuda, or auto (default)")
    parser.add_argument("--precision", choices=PRECISIONS, default="auto")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    """Load, evaluate, write, print the table."""
    arguments = parse_arguments(argv)
    check_lambda_split(arguments)
    logging.getLogger("open_clip").setLevel(logging.ERROR)
    with process_group(arguments.device) as distributed:
        with distributed.main_first():
            checkpoint = locate_checkpoint(arguments.checkpoint, arguments.revision)
        # Else it is in the cache of what was fetched or converted, where nothing is written. Links are not followed: a
        # run whose checkpoints lie on another disk is a run.
        own = Path(os.path.abspath(checkpoint)).is_relative_to(os.path.abspath(arguments.checkpoint))
        if not own and not arguments.out:
            raise UserError(f"{arguments.checkpoint}: read from a cache, which is no place for results; pass --out DIR")
        source = find_source(arguments, checkpoint)
        dataset = source.load(arguments.split)
        check_pool(arguments.k, dataset, arguments.folds)
        coco_ids = find_coco_ids(arguments, source, dataset, distributed)
        evaluator = Evaluator.load(arguments, checkpoint, source, distributed)
        if distributed.is_main and arguments.out:
            make_directory(arguments.out)  # before the checkpoint learns its lambda
        if arguments.lambda_split:
            validation = source.load(arguments.lambda_split)
            evaluator.fit_scores(validation, arguments.lambda_split, checkpoint if own else None)
        results = evaluator.evaluate(dataset, arguments.folds, depth=DEPTH if coco_ids else 0)
        if distributed.is_main:
            run = run_directory(arguments.checkpoint, checkpoint)
            model = model_record(evaluator.model, run, source.name, arguments.setting)
            name = str(checkpoint) if own else "@".join(filter(None, (arguments.checkpoint, arguments.revision)))
            lambda_split = evaluator.model.config.fusion_split
            origin = stamp(distributed.device, distributed.size)
            record = evaluation_record(results, name, source.name, arguments.split, model, lambda_split, origin)
            if coco_ids:
                record = with_extended_figures(record, results, coco_ids)
            write_outputs(arguments, checkpoint, source, dataset, results, record)
        distributed.barrier()


def check_lambda_split(arguments: argparse.Namespace) -> None:
    """Lambda must be chosen on images other than those that are evaluated."""
    splits = [arguments.split, arguments.lambda_split]
    if splits[0] == splits[1] or sorted(map(str, splits)) == ["restval", "train"]:  # train includes restval
        raise UserError(
            f"--lambda-split {splits[1]} would choose lambda on images of --split {splits[0]}, the one evaluated; "
            "name another split, e.g. val"
        )


def moved(backbone: BackboneConfig, weights: str) -> BackboneConfig:
    """The same backbone with its weights elsewhere; a directory says itself what it holds, so no name goes with it."""
    return replace(backbone, name="" if Path(weights).is_dir() else backbone.name, pretrained=weights)


@dataclass
class Evaluator:
    """Everything that one evaluation and the fit on another split have in common."""

    model: EDJE
    backbone: Backbone | None
    store: TokenStore | None
    caption_store: TokenStore | None
    dtype: torch.dtype
    k: int
    distributed: DistributedContext

    @classmethod
    def load(
        cls, arguments: argparse.Namespace, checkpoint: Path, source: Source, distributed: DistributedContext
    ) -> Evaluator:
        """Model, stores, and the backbone unless stores stand for it; one precision for all ranks."""
        model = EDJE.from_pretrained(checkpoint, distributed.device)
        store = TokenStore.open(source.store) if source.store else None
        caption_store = TokenStore.open(source.caption_store) if source.caption_store else None
        dtype = distributed.agree(resolve_precision(arguments.precision, distributed.device))
        backbone = None
        if store is None or caption_store is None:
            config = model.config.backbone
            if arguments.backbone:
                config = moved(config, arguments.backbone)
            backbone = Backbone.load(config, distributed.device, dtype_name(dtype))
        return cls(model, backbone, store, caption_store, dtype, arguments.k, distributed)

    def evaluate(self, dataset: CaptionDataset, folds: int = 1, depth: int = 0) -> Results:
        return evaluate(
            self.model,
            self.backbone,
            dataset,
            self.distributed,
            k=self.k,
            store=self.store,
            caption_store=self.caption_store,
            dtype=self.dtype,
            progress=self.distributed.is_main,
            folds=folds,
            depth=depth,
        )

    def fit_scores(self, validation: CaptionDataset, split: str, checkpoint: Path | None) -> None:
        """Choose the fused score's lambda and calibrate it on a validation split, `split` by name, use both, and save
        them in `checkpoint` if given."""
        check_pool(self.k, validation)
        config = self.model.config = with_fitted_scores(self.model.config, self.evaluate(validation), split)
        if not self.distributed.is_main:
            return
        fitted = (
            f"lambda {config.fusion_lambda:g}, probability = "
            f"sigmoid({config.probability_scale:.4g} * score {config.probability_offset:+.4g})"
        )
        if checkpoint is None:
            print(f"{fitted}, for these results only")
        else:
            write_fusion(checkpoint, config)
            print(f"{fitted}, saved in {checkpoint / CONFIG_FILE}")


def find_source(arguments: argparse.Namespace, checkpoint: Path) -> Source:
    """The data that --dataset names, else the data that the run was configured with."""
    if arguments.dataset is None:
        source = _source_of_run(run_directory(arguments.checkpoint, checkpoint), arguments.data_root)
    elif arguments.data_root is None and not is_dataset(Path(arguments.dataset)):
        raise UserError(f"--dataset {arguments.dataset} needs --data-root, the folder that its image paths start from")
    elif arguments.dataset in NAMED_DATASETS:
        source = Source(arguments.dataset, None, Path(arguments.data_root))
    else:
        columns = column_names(arguments)
        source = Source(
            arguments.dataset,
            Path(arguments.dataset),
            Path(arguments.data_root or "."),
            columns=columns,
            val_share=arguments.val_share,
        )
    if arguments.lambda_split and source.is_one_split():
        raise UserError(
            f"{source.annotations}: is one split, so --lambda-split would choose on what is evaluated; "
            "pass a named data set or a file of several splits, or divide this one by --val-share"
        )
    return replace(
        source,
        store=arguments.store or source.store,
        caption_store=arguments.caption_store or source.caption_store,
    )


def _source_of_run(run: Path, data_root: str | None) -> Source:
    data: dict[str, Any] = read_run_config(run).get("data") or {}
    root = data_root or data.get("root")
    if not root or not data.get("annotations"):
        raise UserError(f"{run / CONFIG_FILE}: names no data; pass --dataset and --data-root")
    of_several = isinstance(data["annotations"], list)
    annotations = annotation_path(root, "" if of_several else data["annotations"])
    columns = ColumnNames(*(data.get(f"{name}_column") or "" for name in ("image", "caption", "split")))
    stores = data.get("store") or "", data.get("caption_store") or ""
    source = Source(str(annotations), annotations, Path(root), *stores, columns, data.get("val_share") or 0.0)
    if of_several or source.is_one_split():
        raise UserError(
            f"{run / CONFIG_FILE}: the run's annotations are one split, what it was trained on; pass --dataset and "
            "--data-root"
        )
    return source


def find_coco_ids(
    arguments: argparse.Namespace, source: Source, dataset: CaptionDataset, distributed: DistributedContext
) -> CocoIds | None:
    """COCO's numbers where figures by the extended ground truth are asked for or possible; else None, and where the
    counts are COCO's, a line that tells what is missing."""
    if arguments.eccv and arguments.folds > 1:
        raise UserError("--eccv is about the whole 5k test split as one gallery; drop --folds")
    if not arguments.eccv and (arguments.folds > 1 or not may_be_coco_test(dataset)):
        return None
    try:
        return read_coco_ids(source.file(arguments.split), dataset)
    except UserError as error:
        if arguments.eccv:
            raise
        if distributed.is_main:
            print(f"without figures by COCO's extended ground truth: {error}")
        return None


def write_outputs(
    arguments: argparse.Namespace,
    checkpoint: Path,
    source: Source,
    dataset: CaptionDataset,
    results: Results,
    record: EvaluationRecord,
) -> None:
    """The files, and the table on the terminal."""
    run = run_directory(arguments.checkpoint, checkpoint)
    base = checkpoint.parent if run == checkpoint else run
    folds = f"-{arguments.folds}-folds" if arguments.folds > 1 else ""
    out = Path(arguments.out or base / f"evaluation-{source.label}-{arguments.split}{folds}")
    write_results(out, results, dataset, record)
    report = write_report(out, record, results, dataset, run / "metrics.jsonl")
    tables = [markdown_table([record])]
    if calibration := calibration_rows(record):
        tables.append(aligned(calibration))
    print("\n" + "\n\n".join([protocol([record]), *tables, f"report: {report}"]))


if __name__ == "__main__":
    run_entry_point(main)
