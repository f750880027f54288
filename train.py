"""Train EDJE: a frozen backbone, a token-compression adapter and a small joint encoder.

One process:  python train.py --config configs/demo.yaml
Eight GPUs:   torchrun --nproc_per_node=8 train.py --config configs/pretrain_siglip2_l16.yaml output=runs/NAME
Override:     python train.py --config configs/demo.yaml training.lr=1e-4 data.root=DIR
Resume:       the same command; it continues after the last complete checkpoint.
All keys:     below, and in docs/config.md
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from data.neighbours import CaptionKeys
from models.distributed import process_group
from models.errors import run_entry_point
from models.precision import resolve_precision
from training.config import RunConfig, load_config
from training.config_reference import help_text
from training.features import open_features, open_retriever
from training.loop import Run, build_optimizer, train
from training.objectives import Objectives, check_words
from training.setup import (
    build_batches,
    build_model,
    load_teacher,
    load_training_split,
    load_validation_split,
)
from training.trackers import check_installed


def parse_arguments(argv: Sequence[str] | None = None) -> RunConfig:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=help_text(), formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", required=True, help="YAML file, e.g. configs/demo.yaml")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="e.g. training.lr=1e-4 output=runs/NAME")
    arguments = parser.parse_args(argv)
    return load_config(arguments.config, arguments.overrides)


def main() -> None:
    config = parse_arguments()
    check_installed(config.training.trackers)
    with process_group(config.device) as distributed:
        dataset = load_training_split(config, distributed)
        validation = load_validation_split(config)
        dtype = distributed.agree(resolve_precision(config.training.precision, distributed.device))
        features = open_features(config, distributed, dtype)  # patch-token stores, or the frozen backbone: one copy
        model = build_model(config, features, dataset, distributed).to(distributed.device)
        check_words(config.objectives, model.tokenizer)
        teacher = load_teacher(config, features, model, distributed)  # None unless a distillation asks for it
        keys = CaptionKeys(dataset)
        retriever = open_retriever(config)  # None unless negatives are mined by another model's similarities
        # Knows what each step reads, so that a run resumes anywhere.
        batches = build_batches(config, features, retriever, dataset, keys, distributed)
        objectives = Objectives(config.objectives, config.negatives, config.seed, distributed, teacher)
        run = Run(config, model, build_optimizer(model, config.training), distributed, dtype)
        train(run, batches, features, retriever, keys, objectives, validation)


if __name__ == "__main__":
    run_entry_point(main)
