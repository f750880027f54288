"""Copy a run's newest checkpoint into a directory to share: half the bytes, no optimizer state, no local path.

python scripts/export_checkpoint.py runs/demo/pretrained/7_relations --out configs/pretrained/scenes \
    --backbone-pretrained configs/embedders/scenes-vit

Fine-tuning starts from it (model.init_from=DIR) and Reranker.from_pretrained loads it. Weights are rounded to float16;
whoever loads them computes in float32 as before. Tokens stored with the run's own weights are refused by the copy's
fingerprint: index again.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import replace
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from models.checkpoint import half_precision, read_checkpoint, resolve_checkpoint, write_checkpoint
from models.errors import UserError, run_entry_point


def export_checkpoint(source: Path, out: Path, backbone_pretrained: str = "") -> Path:
    """Write `out` from the checkpoint or run `source`; returns the checkpoint directory that was read.

    Raises UserError naming the first weight that float16 cannot hold, before anything is written."""
    source = resolve_checkpoint(source)
    config, state, tokenizer = read_checkpoint(source)
    half = half_precision(state)
    for name, tensor in half.items():
        if not torch.isfinite(tensor).all():
            raise UserError(f"{source}: {name} has values that float16 cannot hold; it cannot be exported")
    if backbone_pretrained:
        config = replace(config, backbone=replace(config.backbone, pretrained=backbone_pretrained))
    write_checkpoint(out, config, half, tokenizer)
    return source


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path, metavar="RUN_OR_CHECKPOINT")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="checkpoint directory to write")
    parser.add_argument("--backbone-pretrained", default="", help="what the copy's config.yaml names as backbone")
    arguments = parser.parse_args()
    source = export_checkpoint(arguments.source, arguments.out, arguments.backbone_pretrained)
    print(f"{arguments.out}: float16 copy of {source}")


if __name__ == "__main__":
    run_entry_point(main)
